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


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1003, 40), (5, 33, 1024), (60, 90, 8), (1, 3, 9000)])
def test_products_are_those_of_any_number_of_queries(n, m, d):
    a, b, _ = data(n, m, d + 3)  # columns of a wider bank, as of a part of the features
    found = search.inner_products(a[:, 3:], b[:, 3:])
    expected = a[:, 3:].astype(np.float64) @ b[:, 3:].T
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


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
    found = search.approximate_top_k(a, b, w, 3, probes=40)
    assert found.recall >= 0.9
    np.testing.assert_array_equal(found.rows[:, 0], np.arange(20))
    np.testing.assert_allclose(found.scores[:, 0], 0, atol=1e-6)
    exact = search.weighted_l1_top_k(a, b, w, 1500)  # more than the cells that are searched hold
    found = search.approximate_top_k(a, b, w, 1500, probes=1)
    np.testing.assert_array_equal(found.rows, exact.rows)
    np.testing.assert_array_equal(found.scores, exact.scores)


@pytest.mark.parametrize("k", [0, -1])
def test_no_matches_asked_for_is_refused(k):
    a, b, w = data(2, 3, 4)
    with pytest.raises(InputError, match="at least 1"):
        search.weighted_l1_top_k(a, b, w, k)


def test_shapes_that_do_not_fit_are_refused():
    a, b, w = data(2, 3, 4)
    with pytest.raises(InputError, match="do not fit"):
        search.weighted_l1_matrix(a, b[:, :2], w)


@pytest.mark.parametrize("d", [1, 31, 32, 33, 256, 512, 545, 768, 1100])
def test_every_form_gives_the_same_bits(d, monkeypatch):
    a, b, w = data(20, 41, d)
    numpy_matrix = search.weighted_l1_matrix(a, b, w)
    numpy_pairs = search.weighted_l1_pairs(a, b[:20], w)
    monkeypatch.setattr(search, "SMALL", 0)
    matrix = search.weighted_l1_matrix(a, b, w)
    np.testing.assert_array_equal(matrix, numpy_matrix)
    np.testing.assert_array_equal(search.weighted_l1_matrix(b, a, w), matrix.T)
    np.testing.assert_array_equal(search.weighted_l1_pairs(a, b[:20], w), numpy_pairs)
    np.testing.assert_array_equal(numpy_pairs, np.diag(matrix[:, :20]))
    for queries in (3, 20):  # without and with the 8-bit first pass
        found = search.weighted_l1_top_k(a[:queries], b, w, 41)
        np.testing.assert_array_equal(
            found.scores, np.take_along_axis(matrix[:queries], found.rows, 1)
        )


@pytest.mark.parametrize("threads", ["1", "2", "7", "2,1", "many"])
def test_threads_change_nothing(threads, monkeypatch):
    a, b, w = data(40, 500, 100)
    expected = search.weighted_l1_top_k(a, b, w, 3)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(search, "SMALL", 0)
    found = search.weighted_l1_top_k(a, b, w, 3, block_rows=90)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.integers(1, 6),
    st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e6]),
    st.sampled_from(["uniform", "saturated", "equal", "shifted", "outlier"]),
    st.sampled_from([-1.0, 0.0, 1.0]),
)
def test_the_8_bit_pass_leaves_out_nothing_that_belongs(seed, d, k, scale, kind, sign):
    rng = np.random.default_rng(seed)
    a, b = rng.random((16, d)), rng.random((70, d))
    if kind == "saturated":
        a, b = 1 / (1 + np.exp(40 - 80 * a)), 1 / (1 + np.exp(40 - 80 * b))
    elif kind == "equal":
        a, b = a.round(1), b.round(1)
    elif kind == "shifted":
        a, b = 1000 + a * 1e-3, 1000 + b * 1e-3
    elif kind == "outlier":
        b[3] *= 1e6
    a, b = a.astype(np.float32), b.astype(np.float32)
    w = (rng.normal(size=d) + 3 * sign).astype(np.float32) * np.float32(scale)
    scores = np.full((16, k), -np.inf, dtype=np.float32)
    rows = np.full((16, k), -1, dtype=np.int64)
    for first in range(0, 70, 23):
        search._search_block(a, b[first : first + 23], w, first, scores, rows)
    matrix = search.weighted_l1_matrix(a, b, w)
    np.testing.assert_array_equal(rows, np.argsort(-matrix, axis=1, kind="stable")[:, :k])
    np.testing.assert_array_equal(scores, np.take_along_axis(matrix, rows, 1))


def test_the_margin_covers_every_pair():
    a, b, w = data(30, 200, 300)
    grid = search._Grid(a, b, w)
    (rounded_a, margin_a), (rounded_b, margin_b) = grid.round(a), grid.round(b)
    difference = np.abs(rounded_a[:, None].astype(np.int64) - rounded_b[None])
    coarse = grid.unit * (difference @ grid.weight.astype(np.int64))
    off = np.abs(coarse - naive(a, b, w))
    margin = margin_a[:, None] + margin_b[None] + grid.slack
    assert (off <= margin).all() and margin.max() < naive(a, b, w).std()


def test_a_memory_map_is_searched_as_an_array(tmp_path):
    a, b, w = data(20, 3000, 40)
    np.save(tmp_path / "bank.npy", b)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    expected = search.weighted_l1_top_k(a, b, w, 4)
    found = search.weighted_l1_top_k(a, mapped, w, 4, block_rows=700)
    np.testing.assert_array_equal(found.rows, expected.rows)


@pytest.mark.parametrize("place", ["queries", "bank", "weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(place, value):
    parts = dict(zip(("queries", "bank", "weight"), data(20, 30, 8), strict=True))
    parts[place].flat[-1] = value
    with pytest.raises(InputError, match="not finite"):
        search.weighted_l1_top_k(**parts, k=1)


def test_empty_sides_give_empty_results():
    a, b, w = data(3, 5, 8)
    assert search.weighted_l1_top_k(a[:0], b, w, 2).rows.shape == (0, 2)
    assert search.weighted_l1_top_k(a, b[:0], w, 2).rows.shape == (3, 0)
    assert search.weighted_l1_matrix(a, b[:0], w).shape == (3, 0)
