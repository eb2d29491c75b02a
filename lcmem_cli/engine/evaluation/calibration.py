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


def chance_of(count: int, num_queries: int, rate: float, num_null: int) -> float:
    """Return the chance that so many queries are flagged where all are like the held-out ones.

    The threshold is itself an order statistic of the null, so the number flagged is beta-binomial
    (Wilks 1942, doi 10.1214/aoms/1177731537): wider than binomial where the null is small.

    Args:
        count: flagged queries or more.
        num_queries: all queries.
        rate: false positives per query.
        num_null: scores of the null.
    """
    from scipy.stats import betabinom

    above = largest_count(rate, num_null + 1)
    return float(betabinom.sf(count - 1, num_queries, above, num_null + 1 - above))


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


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise InputError(f"a rate must lie in (0, 1), not {rate}; for example 0.01")
    if rate < _SMALLEST_RATE:
        raise InputError(f"a rate of {rate:g} is below {_SMALLEST_RATE:g}: no data can support it")
