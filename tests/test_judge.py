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


def part(name, negatives):
    """Pairs of one kind of images: negatives of these scores, and one positive of score 1."""
    count = 46  # of which 1,035 pairs can be made; the last two are one identity
    records = [Record(path=f"{n}.png", id=str(min(n, 44)), ds_name=name) for n in range(count)]
    made = pairs_within(records)
    scores = np.ones(len(made))
    scores[made.labels == 0] = negatives
    return judge.ScoredSplit(scores=scores, pairs=made, records=records)


def test_a_threshold_says_what_becomes_of_its_rate_for_kinds_that_it_was_not_fitted_to():
    ranks = np.arange(1034) / 2000  # below 0.517; shifted, half of them lie above all of the others
    parts = [part("low", ranks), part("high", ranks + 0.2585), part("alike", ranks)]
    found = {t.name: t for t in judge.fit_thresholds(parts, "0" * 64, by=", each by another")}
    shares = found["fpr0.01"].unseen_fprs
    assert shares["low"] == shares["alike"] == 0
    assert shares["high"] == pytest.approx(0.51, abs=0.01)
    assert found["fpr0.01"].transfer == (
        f"for other kinds of images 1.0% became 0.00% to {shares['high']:.2%}, in the median 0.00% "
        "(3 kinds, each left out)"
    )
    assert found["recall0.95"].unseen_fprs == {} and found["recall0.95"].transfer == ""


def test_pairs_of_kinds_that_were_not_left_out_tell_nothing_of_other_kinds():
    found = judge.fit_thresholds([part("own", np.arange(1034) / 2000)], "0" * 64)
    assert [threshold.unseen_fprs for threshold in found] == [{}] * len(found)
