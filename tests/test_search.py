import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.store import search


def data(n, m, d, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.random((n, d), dtype=np.float32),
        rng.random((m, d), dtype=np.float32),
        rng.normal(size=d).astype(np.float32),
    )


def naive(a, b, w):
    return np.abs(a[:, None].astype(np.float64) - b[None]) @ w.astype(np.float64)


def test_small_and_compiled_paths_agree_with_float64():
    a, b, w = data(60, 150, 256)
    for part in (2, 60):  # below and above the limit for numpy
        found = search.weighted_l1_matrix(a[:part], b, w)
        np.testing.assert_allclose(found, naive(a[:part], b, w), atol=1e-5)


def test_pairs_are_the_diagonal_of_the_matrix():
    a, b, w = data(70, 70, 512)
    matrix = search.weighted_l1_matrix(a, b, w)
    np.testing.assert_allclose(search.weighted_l1_pairs(a, b, w), np.diag(matrix), atol=1e-5)


@pytest.mark.parametrize("block_rows", [7, 64, 100_000])
def test_top_k_does_not_depend_on_blocks(block_rows):
    a, b, w = data(40, 500, 128)
    found = search.weighted_l1_top_k(a, b, w, 5, block_rows=block_rows)
    matrix = search.weighted_l1_matrix(a, b, w)
    np.testing.assert_array_equal(found.rows, np.argsort(-matrix, axis=1, kind="stable")[:, :5])
    np.testing.assert_array_equal(found.scores, np.take_along_axis(matrix, found.rows, 1))


def test_equal_scores_are_ordered_by_row():
    a, b, w = data(30, 100, 700)
    b[50:] = b[:50]
    found = search.weighted_l1_top_k(a, b, w, 4)
    np.testing.assert_array_equal(found.rows[:, 1], found.rows[:, 0] + 50)


def test_merged_shards_equal_the_whole_bank():
    a, b, w = data(12, 90, 32)
    whole = search.weighted_l1_top_k(a, b, w, 6)
    cuts = [0, 10, 55, 90]
    parts = [search.weighted_l1_top_k(a, b[i:j], w, 6) for i, j in itertools.pairwise(cuts)]
    merged = search.merge_top_k(parts, cuts[:-1], 6)
    np.testing.assert_array_equal(merged.rows, whole.rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 30), st.integers(1, 5), st.integers(1, 40))
def test_generic_search_equals_sorting_the_full_matrix(n, m, k, block_rows):
    rng = np.random.default_rng(n * 1000 + m)
    a, b = rng.integers(0, 3, (n, 2)), rng.integers(0, 3, (m, 2))  # many ties

    def score(x, y):
        return -np.abs(x[:, None] - y[None]).sum(2).astype(float)

    found = search.top_k_blocked(score, a, b, k, block_rows=block_rows)
    expected = np.argsort(-score(a, b), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.rows, expected)


def test_approximate_search_reports_its_recall_and_scores_exactly():
    pytest.importorskip("faiss")
    a, b, w = data(20, 2000, 16)
    b[:20] = a
    w = -np.abs(w)
    found, recall = search.approximate_top_k(a, b, w, 3, probes=40)
    assert recall >= 0.9
    np.testing.assert_array_equal(found.rows[:, 0], np.arange(20))
    np.testing.assert_allclose(found.scores[:, 0], 0, atol=1e-6)


@pytest.mark.parametrize("k", [0, -1])
def test_no_matches_asked_for_is_refused(k):
    a, b, w = data(2, 3, 4)
    with pytest.raises(InputError, match="at least 1"):
        search.weighted_l1_top_k(a, b, w, k)


def test_shapes_that_do_not_fit_are_refused():
    a, b, w = data(2, 3, 4)
    with pytest.raises(InputError, match="do not fit"):
        search.weighted_l1_matrix(a, b[:, :2], w)
