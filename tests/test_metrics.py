import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from scipy.stats import t as student
from sklearn import metrics as sk

from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.metrics import (
    INTERVAL_KEYS,
    METRIC_KEYS,
    bootstrap_intervals,
    largest_count,
    pair_metrics,
    rates_at,
    roc_curve,
    smallest_count,
)


def by_definition(scores, labels, target):
    """Every metric by counting, in exact fractions, without sorting."""
    positives = [s for s, label in zip(scores, labels, strict=True) if label]
    negatives = [s for s, label in zip(scores, labels, strict=True) if not label]
    wins = sum(
        Fraction(1) if p > n else Fraction(1, 2) if p == n else Fraction(0)
        for p, n in itertools.product(positives, negatives)
    )

    def counts(threshold):
        return sum(p >= threshold for p in positives), sum(n >= threshold for n in negatives)

    def f1(threshold):
        tp, fp = counts(threshold)
        precision, recall = Fraction(tp, tp + fp), Fraction(tp, len(positives))
        return 2 * precision * recall / (precision + recall) if tp else Fraction(0)

    thresholds = sorted(set(scores))
    best = min(t for t in thresholds if f1(t) == max(map(f1, thresholds)))
    reach = max(
        t for t in thresholds if Fraction(counts(t)[0], len(positives)) >= Fraction(str(target))
    )
    result = {"auc": wins / (len(positives) * len(negatives)), "recall_target": target}
    for threshold, suffix in ((best, "_bestF1"), (reach, "_atR")):
        tp, fp = counts(threshold)
        result["threshold" + suffix] = threshold
        result["precision" + suffix] = Fraction(tp, tp + fp)
        recall = "recall_achieved_atR" if suffix == "_atR" else "recall_bestF1"
        result[recall] = Fraction(tp, len(positives))
        if suffix == "_atR":
            result["fpr_atR"] = Fraction(fp, len(negatives))
    return {key: float(value) for key, value in result.items()}


labelled = st.lists(
    st.tuples(st.integers(-4, 4).map(lambda k: k / 4), st.booleans()), min_size=2, max_size=40
).filter(lambda rows: 0 < sum(label for _, label in rows) < len(rows))


@settings(max_examples=200, deadline=None)
@given(labelled, st.sampled_from([0.01, 0.29, 0.5, 0.57, 0.95, 0.99, 1.0]))
def test_metrics_equal_their_definition_ties_included(rows, target):
    scores, labels = zip(*rows, strict=True)
    found = pair_metrics(scores, labels, target_recall=target)
    assert found == by_definition(scores, labels, target)
    assert tuple(found) == METRIC_KEYS


@settings(max_examples=50, deadline=None)
@given(labelled)
def test_auc_and_curve_agree_with_scikit_learn(rows):
    scores, labels = map(np.asarray, zip(*rows, strict=True))
    assert pair_metrics(scores, labels)["auc"] == pytest.approx(sk.roc_auc_score(labels, scores))
    fpr, tpr, thresholds = roc_curve(scores, labels)
    expected = sk.roc_curve(labels, scores, drop_intermediate=False)
    for found, wanted in zip((fpr, tpr, thresholds), expected, strict=True):
        np.testing.assert_allclose(found, wanted)


@settings(max_examples=50, deadline=None)
@given(labelled, st.randoms(use_true_random=False))
def test_metrics_do_not_depend_on_the_order_of_pairs_or_on_the_scale(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    first = pair_metrics(*zip(*rows, strict=True))
    assert first == pair_metrics(*zip(*shuffled, strict=True))
    scaled = pair_metrics([8 * s - 3 for s, _ in rows], [label for _, label in rows])
    for key, value in first.items():
        assert scaled[key] == (8 * value - 3 if key.startswith("threshold") else value)


def test_a_case_worked_out_by_hand():
    found = pair_metrics([0.9, 0.8, 0.7, 0.7, 0.4, 0.1], [1, 0, 1, 0, 1, 0], target_recall=2 / 3)
    assert found == {
        "auc": (3 + 1.5 + 1) / 9,
        "precision_bestF1": 3 / 5,
        "recall_bestF1": 1.0,
        "threshold_bestF1": 0.4,
        "precision_atR": 2 / 4,
        "recall_target": 2 / 3,
        "recall_achieved_atR": 2 / 3,
        "threshold_atR": 0.7,
        "fpr_atR": 2 / 3,
    }


def test_the_lowest_of_equally_good_thresholds_is_taken():
    # 0.9: P 1, R 1/2, F1 2/3.  0.5: P 1/2, R 1, F1 2/3.
    found = pair_metrics([0.9, 0.7, 0.6, 0.5], [1, 0, 0, 1])
    assert found["threshold_bestF1"] == 0.5


@pytest.mark.parametrize("target", [0.99, 0.29, 0.57, 0.07, 1.0])
def test_a_target_that_is_a_whole_count_of_a_hundred_is_reached_by_that_count(target):
    scores = [*range(100, 0, -1), 0]
    found = pair_metrics(scores, [1] * 100 + [0], target_recall=target)
    assert found["recall_achieved_atR"] == target
    assert found["threshold_atR"] == 101 - round(100 * target)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 2000), st.data())
def test_counts_are_the_first_and_last_on_their_side_of_a_rate(total, data):
    rate = data.draw(st.integers(0, total)) / total
    assert smallest_count(rate, total) == largest_count(rate, total) == round(rate * total)
    other = data.draw(st.floats(0, 1))
    low, high = largest_count(other, total), smallest_count(other, total)
    assert low / total <= other <= high / total
    assert low == total or (low + 1) / total > other
    assert high == 0 or (high - 1) / total < other


@pytest.mark.parametrize(
    ("scores", "labels", "target", "words"),
    [
        ([1, 2], [1, 1], 0.99, "need negative pairs"),
        ([1, 2], [0, 0], 0.99, "need positive pairs"),
        ([], [], 0.99, "need positive pairs"),
        ([1, 2], [0, 1], 0.0, r"\(0, 1\]"),
        ([1, 2], [0, 1], 1.01, r"\(0, 1\]"),
        ([1, 2], [0, 1], float("nan"), r"\(0, 1\]"),
        ([1, float("nan")], [0, 1], 0.99, "position 1"),
        ([float("inf"), 1], [0, 1], 0.99, "position 0"),
        ([1, 2, 3], [0, 1], 0.99, "3 scores"),
        ([1, 2], [0, 2], 0.99, "labels must be"),
        ([[1, 2]], [[0, 1]], 0.99, "list of numbers"),
    ],
)
def test_what_has_no_answer_is_explained(scores, labels, target, words):
    with pytest.raises(InputError, match=words):
        pair_metrics(scores, labels, target_recall=target)


def test_rates_at_a_threshold():
    scores, labels = [0.9, 0.8, 0.8, 0.3, 0.2], [1, 1, 0, 1, 0]
    assert rates_at(scores, labels, 0.8) == (2 / 3, 1 / 2)
    assert rates_at([0.5], [1], 0.5) == (1.0, None)


def naive_interval(scores, labels, first, second, threshold, replicates, seed):
    """The bootstrap with pairs repeated one by one."""
    rng = np.random.default_rng(seed)
    count = max(*first, *second) + 1
    values = []
    for _ in range(replicates):
        drawn = np.bincount(rng.integers(0, count, count), minlength=count)
        rows = [
            i
            for i, (a, b) in enumerate(zip(first, second, strict=True))
            for _ in range(drawn[a] * (1 if a == b else drawn[b]))
        ]
        s, y = np.asarray(scores)[rows], np.asarray(labels)[rows]
        if 0 < y.sum() < len(y):
            metrics = pair_metrics(s, y, target_recall=0.9)
            rates = rates_at(s, y, threshold)
            values.append([*(metrics[key] for key in INTERVAL_KEYS), *rates])
    low, middle, high = np.quantile(np.asarray(values), [0.025, 0.5, 0.975], axis=0).clip(
        1e-9, 1 - 1e-9
    )
    wider = student.ppf(0.975, count - 1) / norm.ppf(0.975) * np.sqrt(count / (count - 1))

    def moved(end):
        odds, middle_odds = end / (1 - end), middle / (1 - middle)
        moved = middle_odds * (odds / middle_odds) ** wider
        return moved / (1 + moved)

    return np.stack([moved(low), moved(high)], axis=1)


def test_the_bootstrap_repeats_pairs_as_often_as_their_identities_were_drawn():
    rng = np.random.default_rng(3)
    first = rng.integers(0, 8, 60)
    labels = np.tile([1, 0], 30)
    second = np.where(labels == 1, first, (first + rng.integers(1, 8, 60)) % 8)
    scores = (rng.normal(size=60) + labels).round(1)
    found = bootstrap_intervals(
        scores,
        labels,
        np.stack([first, second], axis=1),
        thresholds={"x": 0.5},
        target_recall=0.9,
        replicates=60,
        seed=5,
    )
    expected = naive_interval(scores, labels, first, second, 0.5, 60, 5)
    assert list(found) == [*INTERVAL_KEYS, "tpr_x", "fpr_x"]
    np.testing.assert_allclose(np.asarray(list(found.values())), expected, atol=1e-8)


def test_the_bootstrap_draws_within_data_sets_and_gives_up_where_classes_vanish():
    labels = [1, 0, 1, 0]
    identities = [[0, 0], [0, 1], [1, 1], [1, 0]]
    # Each set has one identity, which every draw must hold: nothing varies.
    found = bootstrap_intervals([4, 1, 3, 2], labels, identities, strata=[0, 1], replicates=50)
    assert found["auc"] == (1.0, 1.0)
    # Of twenty identities, the only negative pair needs two: most draws hold no such pair.
    lost = bootstrap_intervals(
        [*range(20), -1],
        [1] * 20 + [0],
        [*((i, i) for i in range(20)), (0, 1)],
        replicates=400,
        seed=1,
    )
    assert lost["auc"] is None
    with pytest.raises(InputError, match="identities of its two images"):
        bootstrap_intervals([4, 1], [1, 0], [0, 0])


def test_the_bootstrap_draws_only_identities_that_have_pairs():
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 9, (80, 2))
    labels = pairs[:, 0] == pairs[:, 1]
    scores = labels + rng.normal(size=80)
    plain = bootstrap_intervals(scores, labels, pairs, strata=[0] * 4 + [1] * 5)
    gaps, strata = 3 * np.arange(9) + 7, np.full(40, 2)
    strata[gaps] = [0] * 4 + [1] * 5
    among_others = bootstrap_intervals(scores, labels, gaps[pairs], strata=strata)
    assert among_others == plain
