"""Pairs within data sets, on which thresholds are fitted and networks are judged."""

import numpy as np
import pytest

from lcmem_cli.engine.data import pairs
from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.data.pairs import pairs_within
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.evaluation import judge


def chosen(made, label):
    ends = zip(made.first.tolist(), made.second.tolist(), made.labels.tolist(), strict=True)
    return [tuple(sorted((a, b))) for a, b, known in ends if known == label]


@pytest.mark.parametrize("limit", [10_000, 40])
def test_pairs_of_a_large_data_set_are_drawn_as_those_of_a_small_one(monkeypatch, limit):
    rng = np.random.default_rng(0)
    records = [
        Record(path=f"{n}.png", id=f"id{rng.integers(8)}", ds_name="ab"[n % 2]) for n in range(60)
    ]
    listed = pairs_within(records, limit)
    monkeypatch.setattr(pairs, "_MAX_ENUMERATED", 5)
    drawn = pairs_within(records, limit)
    assert sorted(chosen(listed, 1)) == sorted(chosen(drawn, 1))
    negatives = chosen(drawn, 0)
    assert len(set(negatives)) == len(negatives) == len(chosen(listed, 0))
    assert all(records[a].identity != records[b].identity for a, b in negatives)
    assert all(records[a].ds_name == records[b].ds_name for a, b in negatives)
    if limit > 1000:  # all there are
        assert set(negatives) == set(chosen(listed, 0))
    assert chosen(pairs_within(records, limit), 0) == negatives


def test_many_positive_pairs_are_those_of_some_images_of_each_identity(monkeypatch):
    records = [Record(path=f"{n}.png", id=f"id{n % 3}") for n in range(90)]
    monkeypatch.setattr(pairs, "_MAX_ENUMERATED", 5)
    assert pairs_within(records).labels.sum() == 3 * 30 * 29 // 2
    monkeypatch.setattr(pairs, "_MAX_POSITIVES", 300)
    drawn = pairs_within(records)
    positives = chosen(drawn, 1)
    assert 200 < len(positives) <= 300 and len(set(positives)) == len(positives)
    assert {records[a].id for a, _ in positives} == {"id0", "id1", "id2"}
    assert all(records[a].id == records[b].id for a, b in positives)
    assert chosen(pairs_within(records), 1) == positives


def test_intervals_of_a_data_set_do_not_depend_on_the_others():
    rng = np.random.default_rng(0)
    records = [Record(path=f"{n}.png", id=f"id{n // 3}", ds_name="own") for n in range(30)]
    others = [Record(path=f"{n}.jpg", id=f"id{n // 2}", ds_name="other") for n in range(20)]
    centre = {record.identity: rng.normal(size=4) for record in records + others}
    value = {r.path: centre[r.identity] + rng.normal(size=4) for r in records + others}

    class Differences(Detector):
        embed_batch = score_matrix = None

        def score_features(self, a, b):
            return -np.abs(a - b).sum(axis=1)

    def interval(listed):
        features = np.array([value[record.path] for record in listed])
        scored = judge.ScoredSplit.of(Differences(), features, listed)
        return judge._measure(scored)[0]["own"]

    assert 0 < interval(records)["low"] < interval(records)["high"] < 1
    assert interval(records) == interval(records + others) == interval(others + records)
