"""The search of a graphics card, through the same code on a CPU: what it finds is exact."""

from functools import partial

import numpy as np
import pytest
import torch

from lcmem_cli.engine.detectors.head import HeadDetector
from lcmem_cli.engine.detectors.vectors import VectorDetector
from lcmem_cli.engine.store import device_search
from lcmem_cli.engine.store.search import weighted_l1_matrix, weighted_l1_top_k

CPU = torch.device("cpu")


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    bank = rng.random((3000, 48), dtype=np.float32)
    queries = rng.random((40, 48), dtype=np.float32)
    queries[:10] = bank[:10] + rng.normal(0, 1e-3, (10, 48)).astype(np.float32)
    return queries, bank, rng.normal(-0.5, 1, 48).astype(np.float32)


@pytest.mark.parametrize("k", [1, 5, 4000])
@pytest.mark.parametrize("bank_rows", [16_384, 700])
def test_the_weighted_distance_is_that_of_the_exact_search(data, monkeypatch, k, bank_rows):
    monkeypatch.setattr(device_search, "_BANK_ROWS", bank_rows)
    monkeypatch.setattr(device_search, "_QUERY_ROWS", 32)
    queries, bank, weight = data
    found = device_search.top_k_on_device(
        device_search.weighted_l1(weight, CPU),
        partial(weighted_l1_matrix, weight=weight), not_needed, queries, bank, k, CPU,
    )  # fmt: skip
    expected = weighted_l1_top_k(queries, bank, weight, k)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_more_equal_rows_than_candidates_are_ordered_by_row(data):
    queries, bank, weight = data
    bank[np.arange(5, 3000, 50)] = bank[5]  # 60 of them
    weight = -np.abs(weight)
    queries = bank[5:6]
    found = device_search.top_k_on_device(
        device_search.weighted_l1(weight, CPU),
        partial(weighted_l1_matrix, weight=weight),
        lambda queries, bank, k: weighted_l1_top_k(queries, bank, weight, k),
        queries, bank, 3, CPU,
    )  # fmt: skip
    assert found.rows.tolist() == [[5, 55, 105]]


def test_the_margin_holds(data):
    queries, bank, weight = data
    score = device_search.weighted_l1(weight, CPU)
    rough = score.matrix(torch.from_numpy(queries), torch.from_numpy(bank)).numpy()
    exact = weighted_l1_matrix(queries, bank, weight)
    largest = float(max(np.abs(queries).max(), np.abs(bank).max()))
    assert 0 < np.abs(rough - exact).max() <= score.margin(largest)


def not_needed(queries, bank, k):
    raise AssertionError("the candidates suffice")


class Head(HeadDetector):
    def __init__(self, weight):
        self.weight, self.bias, self.device = weight, 0.5, CPU

    def embed_batch(self, batch):
        raise AssertionError("not needed")


class Vectors(VectorDetector):
    device = CPU

    def embed_batch(self, batch):
        raise AssertionError("not needed")


@pytest.mark.parametrize("kind", ["head", "cosine", "correlation"])
def test_detectors_take_it_and_find_the_same(data, monkeypatch, kind):
    queries, bank, weight = data
    detector = Head(weight) if kind == "head" else Vectors()
    if kind != "head":
        detector.likeness = kind
    expected = detector.top_k(queries, bank, 4)
    used = []
    monkeypatch.setattr(device_search, "is_worth_it", lambda *sizes: used.append(sizes) or True)
    found = detector.top_k(queries, bank, 4)
    assert used == [(CPU, 40, 3000)]
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-12)
