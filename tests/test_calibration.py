import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from lcmem_cli.engine.errors import FingerprintMismatchError, InputError
from lcmem_cli.engine.evaluation.calibration import (
    allowed_with_confidence,
    benjamini_hochberg,
    clopper_pearson,
    conformal_p_values,
    conformal_threshold,
    excess_interval,
    fit_threshold,
    realised_rates,
    required_for_confidence,
    required_negatives,
    required_null_size,
)

values = st.lists(st.integers(0, 12).map(float), min_size=1, max_size=60)


def fit(scores, labels=None, **options):
    return fit_threshold(scores, labels, fingerprint="f" * 64, fitted_on="VAL", **options)


@settings(max_examples=150, deadline=None)
@given(values, st.sampled_from([0.5, 0.25, 0.1, 0.3]))
def test_an_fpr_threshold_is_the_smallest_that_holds_its_rate(negatives, rate):
    scores = np.asarray(negatives)
    if len(scores) < required_negatives(rate):
        with pytest.raises(InputError, match=f"at least {required_negatives(rate)} negative"):
            fit(scores, kind="fpr", rate=rate)
        return
    threshold = fit(scores, kind="fpr", rate=rate)
    assert (scores >= threshold.value).mean() <= rate
    assert (scores >= np.nextafter(threshold.value, -np.inf)).mean() > rate
    assert threshold.achieved_fpr == (scores >= threshold.value).mean()
    assert threshold.achieved_recall is None


@settings(max_examples=150, deadline=None)
@given(values, st.sampled_from([0.95, 0.5, 0.29]))
def test_a_recall_threshold_is_the_highest_that_reaches_its_rate(positives, rate):
    scores = np.asarray(positives)
    threshold = fit(scores, kind="recall", rate=rate)
    assert threshold.value in positives
    assert (scores >= threshold.value).mean() >= rate
    assert (scores >= np.nextafter(threshold.value, np.inf)).mean() < rate


def test_a_threshold_carries_its_counts_and_its_detector():
    threshold = fit([3, 2, 1, 2.5], [0, 0, 0, 1], kind="fpr", rate=0.34)
    assert (threshold.num_positives, threshold.num_negatives) == (1, 3)
    assert threshold.value == np.nextafter(2, 3) and threshold.achieved_fpr == 1 / 3
    assert threshold.achieved_recall == 1.0
    assert threshold.decide(3, "f" * 64) and not threshold.decide(2, "f" * 64)
    with pytest.raises(FingerprintMismatchError):
        threshold.decide(3, "0" * 64)


@pytest.mark.parametrize("rate", [0, 1, -0.1, math.nan])
def test_rates_outside_of_zero_to_one_are_refused(rate):
    for call in (
        lambda: fit([1, 2], kind="fpr", rate=rate),
        lambda: conformal_threshold([1, 2], rate),
        lambda: required_null_size(rate),
        lambda: benjamini_hochberg([0.5], rate),
    ):
        with pytest.raises(InputError, match=r"\(0, 1\)"):
            call()


@settings(max_examples=200, deadline=None)
@given(values, values, st.sampled_from([0.5, 0.29, 0.1, 0.05, 0.3]))
def test_conformal_threshold_and_p_value_are_one_rule(null, queries, rate):
    scores = np.asarray(queries)
    p_values = conformal_p_values(scores, null)
    expected = [(1 + sum(n >= q for n in null)) / (len(null) + 1) for q in queries]
    np.testing.assert_array_equal(p_values, expected)
    if len(null) < required_null_size(rate):
        with pytest.raises(InputError, match=f"at least {required_null_size(rate)} held-out"):
            conformal_threshold(null, rate)
        assert not (p_values <= rate).any()
    else:
        threshold = conformal_threshold(null, rate)
        np.testing.assert_array_equal(scores > threshold, p_values <= rate)


def test_the_conformal_threshold_is_the_stated_quantile():
    null = np.random.default_rng(0).permutation(99)
    for hundredths in range(1, 100):
        rank = 100 - hundredths  # ceil((99 + 1) (1 - q))
        assert conformal_threshold(null, hundredths / 100) == rank - 1


@pytest.mark.parametrize(
    ("rate", "size"), [(0.01, 99), (0.05, 19), (0.1, 9), (1 / 3, 2), (0.5, 1), (0.9, 1), (0.03, 33)]
)
def test_required_null_size_is_the_smallest_that_works(rate, size):
    assert required_null_size(rate) == size
    conformal_threshold(np.arange(size), rate)
    with pytest.raises(InputError):
        conformal_threshold(np.arange(size - 1), rate)


def test_conformal_rate_holds_for_exchangeable_queries():
    rng = np.random.default_rng(1)
    flagged = [rng.normal() > conformal_threshold(rng.normal(size=39), 0.1) for _ in range(4000)]
    assert abs(np.mean(flagged) - 0.1) < 0.02


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 100).map(lambda k: k / 100), max_size=30),
    st.sampled_from([0.05, 0.1, 0.2]),
)
def test_benjamini_hochberg_equals_its_step_up_definition(p_values, rate):
    ordered = sorted(p_values)
    hundredths = [round(100 * p) for p in ordered]
    passing = [
        p
        for k, (p, h) in enumerate(zip(ordered, hundredths, strict=True), 1)
        if h * len(ordered) <= round(100 * rate) * k
    ]
    expected = [p <= max(passing) if passing else False for p in p_values]
    assert benjamini_hochberg(p_values, rate).tolist() == expected


def test_clopper_pearson_equals_its_definition():
    low, high = clopper_pearson(7, 50)
    assert binom.sf(6, 50, low) == pytest.approx(0.025)
    assert binom.cdf(7, 50, high) == pytest.approx(0.025)
    assert clopper_pearson(0, 20)[0] == 0 and clopper_pearson(20, 20)[1] == 1
    assert clopper_pearson(0, 0) == (0, 1)
    narrow = clopper_pearson(7, 50, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    with pytest.raises(InputError, match="3 of 2"):
        clopper_pearson(3, 2)


def test_the_rate_really_reached_is_beta_distributed():
    low, high = realised_rates(99, 1)
    assert (low, high) == pytest.approx((0.000256, 0.0366), rel=0.01)
    rng = np.random.default_rng(0)
    thresholds = np.sort(rng.random((4000, 99)))[:, -1]  # above it lies 1 - threshold
    inside = (low <= 1 - thresholds) & (1 - thresholds <= high)
    assert inside.mean() == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("rate", "confidence", "needed"), [(0.01, 0.95, 299), (0.1, 0.9, 22)])
def test_a_rate_with_confidence_takes_more_scores(rate, confidence, needed):
    assert required_for_confidence(rate, confidence) == needed
    assert allowed_with_confidence(needed - 1, rate, confidence) == 0
    assert allowed_with_confidence(needed, rate, confidence) == 1


def test_a_threshold_with_confidence_holds_in_that_share_of_draws():
    allowed = allowed_with_confidence(500, 0.05, 0.95)
    rng = np.random.default_rng(1)
    thresholds = np.sort(rng.random((4000, 500)), axis=1)[:, -allowed]
    assert 0.94 <= (1 - thresholds <= 0.05).mean() <= 1.0
    following = np.sort(rng.random((4000, 500)), axis=1)[:, -allowed - 1]
    assert (1 - following <= 0.05).mean() < 0.955  # no rank more could be allowed


@pytest.mark.parametrize("excess", [0.0, 0.05, 0.4])
def test_the_interval_of_the_excess_covers_it_where_the_threshold_is_drawn_too(excess):
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(400):
        threshold = np.sort(rng.random(99))[-1]
        chance = 1 - threshold
        count = rng.binomial(200, excess + (1 - excess) * chance)
        low, high = excess_interval(int(count), 200, num_null=99, allowed=1)
        covered.append(low <= excess <= high)
    assert np.mean(covered) >= 0.93


def test_the_interval_of_the_excess_at_its_ends():
    assert excess_interval(0, 0, num_null=99, allowed=1) == (0.0, 1.0)
    low, high = excess_interval(0, 100, num_null=99, allowed=1)
    assert low == 0.0 and 0.02 < high < 0.06
    low, high = excess_interval(100, 100, num_null=99, allowed=1)
    assert 0.9 < low < 1.0 and high == 1.0
    wide = excess_interval(10, 100, num_null=99, allowed=1)
    narrow = excess_interval(10, 100, num_null=9999, allowed=100)
    assert wide[0] < narrow[0] < 0.1 < narrow[1] and wide[1] - wide[0] > narrow[1] - narrow[0]
    with pytest.raises(InputError):
        excess_interval(3, 2, num_null=99, allowed=1)
