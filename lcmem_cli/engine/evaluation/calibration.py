"""Thresholds that are worth a stated error rate, and what may be said about a count.

Two kinds: thresholds on pair scores, fitted on labelled pairs of a split that is not the one
being judged (method.md sections 5 and 6), and conformal thresholds on best-match scores, with
finite-sample validity (method.md section 7; Bates et al., "Testing for outliers with conformal
p-values", 2023).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.metrics import (
    check_pairs,
    check_scores,
    largest_count,
    rates_at,
    smallest_count,
)
from lcmem_cli.engine.results import Threshold

_SMALLEST_RATE = 1e-12
_QUADRATURE = 2000


def fit_threshold(
    scores: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    kind: Literal["fpr", "recall"],
    rate: float,
    fingerprint: str,
    fitted_on: str,
) -> Threshold:
    """Fit a threshold for ``score >= threshold`` on pairs that will not be judged with it.

    ``fpr``: the smallest threshold at which the share of negatives called positive is at most
    ``rate``; it lies one float above the score of the first negative that must not be called.
    ``recall``: the highest threshold at which the share of positives called positive is at least
    ``rate``; it is the score of a positive.

    Args:
        scores: ``[n]``.
        labels: ``[n]`` of 1 and 0; ``None``: all pairs are of the class that ``kind`` is about.
        kind: which rate is held.
        rate: in (0, 1).
        fingerprint: of the detector that made the scores.
        fitted_on: the data, in words.

    Raises:
        InputError: a rate outside (0, 1), no pair of the class in question, fewer than
            ``required_negatives(rate)`` negatives, or non-finite scores.
    """
    _check_rate(rate)
    if labels is None:
        labels = np.full(np.shape(scores), int(kind == "recall"))
    values, positive = check_pairs(scores, labels)
    negatives, positives = np.sort(values[~positive])[::-1], np.sort(values[positive])[::-1]
    if kind == "fpr":
        allowed = largest_count(rate, len(negatives)) if len(negatives) else 0
        if allowed < 1:
            raise InputError(
                f"a threshold for a false-positive rate of {rate:g} needs at least "
                f"{required_negatives(rate)} negative pairs, {fitted_on} has {len(negatives)}; "
                "fit on more data or ask for a larger rate"
            )
        value = float(np.nextafter(negatives[allowed], np.inf))
    else:
        if not len(positives):
            raise InputError(
                f"a threshold for a recall of {rate:g} needs positive pairs, {fitted_on} has none"
            )
        value = float(positives[smallest_count(rate, len(positives)) - 1])
    recall, fpr = rates_at(values, positive, value)
    return Threshold(
        value=value,
        kind=kind,
        rate=float(rate),
        fingerprint=fingerprint,
        fitted_on=fitted_on,
        num_positives=len(positives),
        num_negatives=len(negatives),
        achieved_fpr=fpr,
        achieved_recall=recall,
    )


def required_negatives(rate: float) -> int:
    """Return how many negative pairs a false-positive rate needs: one of them must be allowed.

    Raises:
        InputError: the rate lies outside (0, 1).
    """
    return required_null_size(rate) + 1


def conformal_threshold(null: ArrayLike, rate: float) -> float:
    """Return the score that a query must EXCEED to be flagged at a per-query error rate.

    It is the ``ceil((m + 1)(1 - rate))``-th smallest of the m null scores. A score above it,
    not one equal to it, has a conformal p-value of at most ``rate``, ties included; so
    ``score > conformal_threshold(null, rate)`` and ``conformal_p_values(score, null) <= rate``
    are the same rule.

    Args:
        null: ``[m]`` scores of held-out queries that are known not to be copies.
        rate: chance of flagging such a query, in (0, 1).

    Raises:
        InputError: fewer null scores than ``required_null_size(rate)`` (the message says how
            many are needed), non-finite scores, or a rate outside (0, 1).

    Example:
        >>> conformal_threshold(range(99), 0.05)
        94.0
    """
    _check_rate(rate)
    values = np.sort(check_scores(null, what="null scores"))
    # The query counts as one more draw of the null: of the m + 1 ranks that it may take, each as
    # likely as the others where it is no copy, the highest `allowed` may be flagged.
    allowed = largest_count(rate, len(values) + 1)
    if allowed < 1:
        raise InputError(
            f"a rate of {rate:g} per query needs at least {required_null_size(rate)} held-out "
            f"scores, there are {len(values)}; hold out more images or ask for a rate of at least "
            f"{1 / (len(values) + 1):.3g}"
        )
    return float(values[len(values) - allowed])


def conformal_p_values(scores: ArrayLike, null: ArrayLike) -> NDArray[np.float64]:
    """Return ``(1 + #{null >= score}) / (m + 1)`` for each score.

    Args:
        scores: ``[n]`` of queries.
        null: ``[m]`` of held-out queries that are known not to be copies.

    Returns:
        ``[n]`` in (0, 1]; valid for any m if query and held-out images are exchangeable.

    Raises:
        InputError: non-finite scores.
    """
    queries = check_scores(scores)
    values = np.sort(check_scores(null, what="null scores"))
    at_or_above = len(values) - np.searchsorted(values, queries, side="left")
    result: NDArray[np.float64] = (1 + at_or_above) / (len(values) + 1)
    return result


def required_null_size(rate: float) -> int:
    """Return the smallest number of null scores with which any query can be flagged at ``rate``.

    Raises:
        InputError: the rate lies outside (0, 1).

    Example:
        >>> required_null_size(0.01)
        99
    """
    _check_rate(rate)
    size = max(1, math.floor(1 / rate) - 1)
    while 1 / size > rate:
        size += 1
    return size - 1


def benjamini_hochberg(p_values: ArrayLike, rate: float) -> NDArray[np.bool_]:
    """Choose queries so that the expected share of false ones among them is at most ``rate``.

    Benjamini and Hochberg (1995); conformal p-values that share one null are positively dependent
    in the way that the method needs (Bates et al., 2023).

    Args:
        p_values: ``[n]`` in [0, 1].
        rate: false-discovery rate, in (0, 1).

    Returns:
        ``[n]``, true where the query is flagged.

    Raises:
        InputError: p-values outside [0, 1] or a rate outside (0, 1).
    """
    from scipy.stats import false_discovery_control

    _check_rate(rate)
    values = check_scores(p_values, what="p-values")
    if not len(values):
        return np.zeros(0, dtype=np.bool_)
    if values.min() < 0 or values.max() > 1:
        raise InputError("p-values must lie in [0, 1]")
    # The adjustment multiplies and divides: 0.07 * 10 / 7 is a hair over the 0.1 that it equals.
    flagged: NDArray[np.bool_] = false_discovery_control(values) <= rate * (1 + 1e-12)
    return flagged


def chance_of(count: int, num_queries: int, *, num_null: float, allowed: float) -> float:
    """Return the chance that so many queries are flagged where all are like the held-out ones.

    The threshold is itself an order statistic of the null, so the number flagged is beta-binomial
    (Wilks 1942, doi 10.1214/aoms/1177731537): wider than binomial where the null is small.

    Args:
        count: flagged queries or more.
        num_queries: all queries.
        num_null: scores of the null, independent of each other.
        allowed: rank of the threshold from above.
    """
    from scipy.stats import betabinom

    return float(betabinom.sf(count - 1, num_queries, allowed, num_null + 1 - allowed))


def rank_from_above(
    num_null: int, rate: float, *, in_pairs: bool = False, confidence: float | None = None
) -> int:
    """Return which null score, counted from the highest, is the threshold for a rate.

    Args:
        num_null: scores of the null.
        rate: false positives per query, in (0, 1).
        in_pairs: whether each score may occur twice, because two images are each other's best
            match. Then an odd rank would split a pair, and flag (k + 1) / k times the rate.
        confidence: that the rate holds, over draws of the null; ``None``: it holds on average.

    Returns:
        At least 1; 0 where there are fewer than ``required_scores``.
    """
    _check_rate(rate)
    if confidence is not None:
        return allowed_with_confidence(num_null, rate, confidence)
    allowed = largest_count(rate, num_null + 1)
    return allowed - allowed % 2 if in_pairs else allowed


def required_scores(rate: float, *, in_pairs: bool = False, confidence: float | None = None) -> int:
    """Return the smallest number of null scores with which any query can be flagged.

    Args:
        rate: see ``rank_from_above``.
        in_pairs: see ``rank_from_above``.
        confidence: see ``rank_from_above``.

    Example:
        >>> required_scores(0.01), required_scores(0.01, in_pairs=True)
        (99, 199)
    """
    if confidence is not None:
        return required_for_confidence(rate, confidence)
    if not in_pairs:
        return required_null_size(rate)
    size = max(1, math.floor(2 / rate) - 2)
    while largest_count(rate, size + 1) < 2:
        size += 1
    return size


def fewest_flagged(rate: float, num_queries: int, num_null: int) -> int:
    """Return how many queries Benjamini-Hochberg flags at least, if any: no p-value is smaller.

    Args:
        rate: false-discovery rate.
        num_queries: all queries.
        num_null: scores of the null.
    """
    return math.ceil(num_queries / (rate * (num_null + 1)) - 1e-9)


def clopper_pearson(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a proportion (Clopper and Pearson, 1934).

    Args:
        count: successes.
        total: trials; with none, nothing is known and the interval is (0, 1).
        confidence: in (0, 1).

    Raises:
        InputError: a count outside 0..total, or a confidence outside (0, 1).
    """
    from scipy.stats import binomtest

    if not 0 <= count <= total:
        raise InputError(f"a count must lie between 0 and its total, not {count} of {total}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie in (0, 1), not {confidence}")
    if total == 0:
        return 0.0, 1.0
    interval = binomtest(count, total).proportion_ci(confidence_level=confidence, method="exact")
    return float(interval.low), float(interval.high)


def realised_rates(
    num_null: float, allowed: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Return between which rates a conformal threshold really flags images that copy nothing.

    The threshold is an order statistic of the null, so the share of the population above it is
    itself random, with a beta distribution (Wilks 1942, doi 10.1214/aoms/1177731537).

    Args:
        num_null: scores of the null, independent of each other.
        allowed: rank of the threshold from above, at least 1: ``num_null + 1`` times the rate,
            rounded down.
        confidence: of the interval, in (0, 1).

    Example:
        >>> [round(rate, 4) for rate in realised_rates(99, 1)]
        [0.0003, 0.0366]
    """
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low, high = beta.ppf([tail, 1 - tail], allowed, num_null + 1 - allowed)
    return float(low), float(high)


def allowed_with_confidence(num_null: int, rate: float, confidence: float) -> int:
    """Return the rank from above of a threshold that holds a rate with a stated confidence.

    Over draws of the null, the share of the population above that order statistic is at most
    ``rate`` with a probability of at least ``confidence`` (a one-sided tolerance bound).

    Args:
        num_null: scores of the null, independent of each other.
        rate: false positives per image, in (0, 1).
        confidence: in (0, 1).

    Returns:
        At least 1; 0 where no threshold among so few scores holds the rate.

    Example:
        >>> allowed_with_confidence(298, 0.01, 0.95), allowed_with_confidence(299, 0.01, 0.95)
        (0, 1)
    """
    from scipy.stats import beta

    _check_rate(rate)
    most = largest_count(rate, num_null + 1)  # more would not even hold on average
    ranks = np.arange(1, most + 1)
    holds = beta.cdf(rate, ranks, num_null + 1 - ranks) >= confidence
    return int(np.count_nonzero(holds))  # the probability falls with the rank


def required_for_confidence(rate: float, confidence: float) -> int:
    """Return how many null scores a rate takes that is to hold with a stated confidence.

    Example:
        >>> required_for_confidence(0.01, 0.95)
        299
    """
    _check_rate(rate)
    return math.ceil(math.log1p(-confidence) / math.log1p(-rate) - 1e-12)


def excess_interval(
    count: int, total: int, *, num_null: float, allowed: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Return an interval of the share of images that are flagged beyond chance.

    Each image is flagged because of what it copies with probability c, or else by chance. The
    chance is what lies above an order statistic of the null, so it has a beta distribution. The
    interval holds every c that a two-sided test of the count does not reject. It therefore
    includes the uncertainty of the threshold, which the interval of Clopper and Pearson does not.

    Args:
        count: flagged images.
        total: images, independent of each other.
        num_null: scores of the null, independent of each other.
        allowed: rank of the threshold from above, at least 1.
        confidence: in (0, 1).

    Returns:
        Within [0, 1]; (0, 1) without images.

    Raises:
        InputError: a count outside 0..total.
    """
    from scipy.optimize import brentq
    from scipy.stats import beta, binom

    if not 0 <= count <= total:
        raise InputError(f"a count must lie between 0 and its total, not {count} of {total}")
    if total == 0:
        return 0.0, 1.0
    # Equally likely values of the chance rate: a quadrature that needs no density.
    middles = (np.arange(_QUADRATURE) + 0.5) / _QUADRATURE
    chance = beta.ppf(middles, allowed, num_null + 1 - allowed)
    tail = (1 - confidence) / 2

    def at_least(excess: float) -> float:
        return float(binom.sf(count - 1, total, excess + (1 - excess) * chance).mean())

    def at_most(excess: float) -> float:
        return float(binom.cdf(count, total, excess + (1 - excess) * chance).mean())

    low, high = 0.0, 1.0
    if at_least(0.0) < tail:
        low = float(brentq(lambda excess: at_least(excess) - tail, 0.0, 1.0))
    if count < total:
        # Fewer flags than chance gives: no excess explains them better than none.
        high = (
            0.0
            if at_most(0.0) < tail
            else float(brentq(lambda excess: at_most(excess) - tail, 0.0, 1.0))
        )
    return low, high


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise InputError(f"a rate must lie in (0, 1), not {rate}; for example 0.01")
    if rate < _SMALLEST_RATE:
        raise InputError(f"a rate of {rate:g} is below {_SMALLEST_RATE:g}: no data can support it")
