"""How well scores separate pairs of one identity from pairs of two.

Conventions (method.md section 5, arXiv 2512.14421): a pair is called positive when
``score >= threshold``; thresholds are observed scores; ratios are ratios of counts. A count is
compared with a rate by one correctly rounded division, so that 99 of 100 reaches 0.99 and 5 of 6
reaches 5 / 6, which a product such as ``0.29 * 100 = 28.999...`` would not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit, ndtri, stdtrit

from lcmem_cli.engine.compiled import compiled
from lcmem_cli.engine.errors import InputError

DEFAULT_TARGET_RECALL = 0.99
CONFIDENCE = 0.95
METRIC_KEYS = (
    "auc",
    "precision_bestF1",
    "recall_bestF1",
    "threshold_bestF1",
    "precision_atR",
    "recall_target",
    "recall_achieved_atR",
    "threshold_atR",
    "fpr_atR",
)
_LEAST = 1e-9
"""Share that stands for none in log-odds."""
INTERVAL_KEYS = (
    "auc",
    "precision_bestF1",
    "recall_bestF1",
    "precision_atR",
    "recall_achieved_atR",
    "fpr_atR",
)


def pair_metrics(
    scores: ArrayLike, labels: ArrayLike, *, target_recall: float = DEFAULT_TARGET_RECALL
) -> dict[str, float]:
    """Compute the metrics of the reference's table from the scores of labelled pairs.

    The thresholds are picked on the very scores that they are judged on, as the published tables
    do; for thresholds fitted elsewhere see ``calibration.fit_threshold``.

    Args:
        scores: ``[n]``, larger is more alike.
        labels: ``[n]``, 1 (or true) for two images of one identity, else 0.
        target_recall: recall that the ``_atR`` values must reach, in (0, 1].

    Returns:
        ``auc`` (Mann-Whitney, a tie counts one half); precision, recall and the lowest threshold
        of the best F1; precision, recall, false-positive rate and threshold at the highest
        threshold whose recall is at least the target. Keys as in ``METRIC_KEYS``.

    Raises:
        InputError: one class only, a target outside (0, 1], NaN or infinite scores, or arrays
            that do not belong together.

    Example:
        >>> pair_metrics([0.9, 0.8, 0.3, 0.1], [1, 0, 1, 0])["auc"]
        0.75
    """
    check_target_recall(target_recall)
    counts = _count(*check_labelled(scores, labels))
    best = counts.best_f1()
    at_recall = counts.at_recall(target_recall)
    return {
        "auc": counts.auc(),
        "precision_bestF1": counts.precision(best),
        "recall_bestF1": counts.recall(best),
        "threshold_bestF1": float(counts.thresholds[best]),
        "precision_atR": counts.precision(at_recall),
        "recall_target": float(target_recall),
        "recall_achieved_atR": counts.recall(at_recall),
        "threshold_atR": float(counts.thresholds[at_recall]),
        "fpr_atR": counts.fpr(at_recall),
    }


def roc_curve(
    scores: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the ROC curve, one point for each distinct score.

    Args:
        scores: ``[n]``.
        labels: ``[n]``.

    Returns:
        False-positive rates and true-positive rates, both rising from 0 to 1, and the thresholds
        that give them, falling from infinity (nothing is called positive).

    Raises:
        InputError: as ``pair_metrics``.
    """
    counts = _count(*check_labelled(scores, labels))
    fpr = np.concatenate([[0.0], counts.false / counts.num_negatives])
    tpr = np.concatenate([[0.0], counts.true / counts.num_positives])
    return fpr, tpr, np.concatenate([[np.inf], counts.thresholds])


def rates_at(
    scores: ArrayLike, labels: ArrayLike, threshold: float
) -> tuple[float | None, float | None]:
    """Return the true-positive and the false-positive rate of ``score >= threshold``.

    Args:
        scores: ``[n]``.
        labels: ``[n]``.
        threshold: fitted on other data.

    Returns:
        Each rate, or ``None`` where there is no pair of that class.

    Raises:
        InputError: NaN or infinite scores, or arrays that do not belong together.
    """
    values, positive = check_pairs(scores, labels)
    called = values >= threshold
    num_positives, num_negatives = int(positive.sum()), int((~positive).sum())
    return (
        int((called & positive).sum()) / num_positives if num_positives else None,
        int((called & ~positive).sum()) / num_negatives if num_negatives else None,
    )


def bootstrap_intervals(
    scores: ArrayLike,
    labels: ArrayLike,
    identities: ArrayLike,
    *,
    strata: ArrayLike | None = None,
    thresholds: Mapping[str, float] | None = None,
    target_recall: float = DEFAULT_TARGET_RECALL,
    replicates: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """Return 95 % intervals of the metrics by bootstrap over identities.

    Pairs that share an identity are not independent, so identities are drawn with replacement
    (within their data set) and a pair counts as often as its identity was drawn; a pair of two
    identities counts as often as the product of both. Identities without a pair are not drawn.

    Args:
        scores: ``[n]``.
        labels: ``[n]``.
        identities: ``[n, 2]`` integers from 0: identity of both images of each pair.
        strata: data set number of each identity ``[max identity + 1]``; one set by default.
        thresholds: by name, thresholds fitted on other data; adds ``tpr_NAME`` and ``fpr_NAME``.
        target_recall: as in ``pair_metrics``.
        replicates: how many times identities are drawn.
        seed: equal seeds draw equal identities, so detectors are compared on the same draws.

    Returns:
        ``(low, high)`` by key (``INTERVAL_KEYS`` and the thresholds'); ``None`` where fewer than
        half of the draws held a pair of each class.

    Raises:
        InputError: as ``pair_metrics``.
    """
    check_target_recall(target_recall)
    values, positive = check_labelled(scores, labels)
    ends = np.asarray(identities)
    if ends.shape != (len(values), 2):
        raise InputError("each pair needs the identities of its two images")
    present, numbers = np.unique(ends, return_inverse=True)
    groups = np.zeros(len(present), np.int64) if strata is None else np.asarray(strata)[present]
    order = np.argsort(-values, kind="stable")
    values = values[order]
    last = _last_of_equals(values)
    thresholds = thresholds or {}
    cuts = [np.searchsorted(-values[last], -cut, side="right") for cut in thresholds.values()]
    samples: NDArray[np.float64] = _compiled()(
        _draws(groups, replicates, np.random.default_rng(seed)),
        numbers.reshape(-1, 2)[order].astype(np.int64),
        positive[order],
        last,
        np.asarray(cuts, dtype=np.int64),
        target_recall,
    )
    keys = [*INTERVAL_KEYS, *(f"{rate}_{name}" for name in thresholds for rate in ("tpr", "fpr"))]
    return {
        key: _interval(column, len(present)) for key, column in zip(keys, samples.T, strict=True)
    }


def _interval(samples: NDArray[np.float64], count: int) -> tuple[float, float] | None:
    """Return an interval from the draws that have a value, or ``None`` for want of them.

    What holds 95 % of the draws is too narrow for few identities: draws of ``n`` identities vary
    less than samples do, by a factor of ``sqrt((n - 1) / n)``, and their spread is itself known
    from ``n`` alone. So it is made wider by that factor and by Student's quantile over the normal
    one. The distances are those of log-odds, so that it stays within 0 and 1.

    Args:
        samples: of one metric in [0, 1]; NaN where it is not defined.
        count: identities that were drawn from.
    """
    drawn = samples[~np.isnan(samples)]
    if 2 * len(drawn) < len(samples) or not len(drawn):
        return None
    tail = (1 - CONFIDENCE) / 2
    bounds = np.quantile(drawn, [tail, 0.5, 1 - tail])
    if count < 2 or bounds[0] == bounds[2]:
        return float(bounds[0]), float(bounds[2])
    wider = stdtrit(count - 1, 1 - tail) / ndtri(1 - tail) * math.sqrt(count / (count - 1))
    low, middle, high = logit(bounds.clip(_LEAST, 1 - _LEAST))
    ends = expit([middle - wider * (middle - low), middle + wider * (high - middle)])
    return float(min(ends[0], bounds[0])), float(max(ends[1], bounds[2]))


def smallest_count(rate: float, total: int) -> int:
    """Return the smallest count whose share of ``total`` is at least ``rate``."""
    count = min(total, max(0, math.ceil(rate * total)))
    while count > 0 and (count - 1) / total >= rate:
        count -= 1
    while count < total and count / total < rate:
        count += 1
    return count


def largest_count(rate: float, total: int) -> int:
    """Return the largest count whose share of ``total`` is at most ``rate``."""
    count = min(total, max(0, math.floor(rate * total)))
    while count < total and (count + 1) / total <= rate:
        count += 1
    while count > 0 and count / total > rate:
        count -= 1
    return count


def check_target_recall(target: float) -> None:
    """Refuse a target recall outside (0, 1].

    Raises:
        InputError: outside, or NaN.
    """
    if not 0 < target <= 1:
        raise InputError(f"the target recall must lie in (0, 1], not {target}; for example 0.99")


def check_scores(scores: ArrayLike, *, what: str = "scores") -> NDArray[np.float64]:
    """Return scores as float64 ``[n]``.

    Raises:
        InputError: not one-dimensional, or NaN or infinite values.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise InputError(f"{what} must be a list of numbers, not of shape {list(values.shape)}")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        where = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(
            f"{bad} of {len(values)} {what} are NaN or infinite, the first at position {where}: "
            "the detector failed on these images, so no metric would mean anything"
        )
    return values


def check_pairs(
    scores: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return scores as float64 ``[n]`` and labels as booleans ``[n]``.

    Raises:
        InputError: other shapes, non-finite scores, or labels that are not 0 and 1.
    """
    values = check_scores(scores)
    marks = np.asarray(labels)
    if marks.shape != values.shape:
        raise InputError(
            f"{len(values)} scores and labels of shape {list(marks.shape)}: "
            "each score needs one label"
        )
    positive = marks == 1
    if not np.all(positive | (marks == 0)):
        raise InputError("labels must be 1 (one identity) or 0 (two identities)")
    return values, positive.astype(np.bool_)


def check_labelled(
    scores: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Check as ``check_pairs`` and that both classes are there.

    Raises:
        InputError: also when no pair is positive, or none is negative.
    """
    values, positive = check_pairs(scores, labels)
    num_positives = int(positive.sum())
    if num_positives in (0, len(values)):
        present, missing, advice = "positive", "negative", "two identities"
        if num_positives == 0:
            present, missing = missing, present
            advice = "identities with at least two images"
        raise InputError(
            f"all {len(values)} pairs are {present}: AUC, precision and recall need {missing} "
            f"pairs too; use data with {advice}"
        )
    return values, positive


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Positives (``true``) and negatives (``false``) at or above each distinct score, falling."""

    thresholds: NDArray[np.float64]
    true: NDArray[np.int64]
    false: NDArray[np.int64]

    @property
    def num_positives(self) -> int:
        return int(self.true[-1])

    @property
    def num_negatives(self) -> int:
        return int(self.false[-1])

    def precision(self, at: int) -> float:
        return int(self.true[at]) / int(self.true[at] + self.false[at])

    def recall(self, at: int) -> float:
        return int(self.true[at]) / self.num_positives

    def fpr(self, at: int) -> float:
        return int(self.false[at]) / self.num_negatives

    def auc(self) -> float:
        new_true = np.diff(self.true, prepend=0)
        lower_or_tied = 2 * self.num_negatives - self.false - np.append(0, self.false[:-1])
        # At most 2 * positives * negatives, so int64 holds it up to a thousand million of each.
        return int((new_true * lower_or_tied).sum()) / (2 * self.num_positives * self.num_negatives)

    def best_f1(self) -> int:
        # F1 = 2 TP / (positives + called). Rounding may merge neighbours, so these are compared
        # as fractions; the later index has the lower threshold.
        called = self.true + self.false
        approximate = 2 * self.true / (self.num_positives + called)
        near = np.flatnonzero(approximate >= approximate.max() * (1 - 1e-14))

        def exact(at: Any) -> tuple[Fraction, int]:
            return Fraction(int(self.true[at]), self.num_positives + int(called[at])), int(at)

        return int(max(near, key=exact))

    def at_recall(self, target: float) -> int:
        needed = smallest_count(target, self.num_positives)
        return int(np.searchsorted(self.true, needed, side="left"))


def _count(values: NDArray[np.float64], positive: NDArray[np.bool_]) -> _Counts:
    order = np.argsort(-values, kind="stable")
    values, positive = values[order], positive[order]
    ends = _last_of_equals(values)
    true = np.cumsum(positive, dtype=np.int64)[ends]
    return _Counts(values[ends], true, ends + 1 - true)


def _last_of_equals(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the position of the last of each run of equal values, which are sorted."""
    return np.append(np.flatnonzero(np.diff(values)), len(values) - 1)


def _draws(groups: NDArray[Any], replicates: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return how often each identity was drawn, ``[replicates, identities]``."""
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    drawn = np.zeros((replicates, len(groups)), dtype=np.int64)
    for row in drawn:
        for ids in members:
            row[ids] = np.bincount(rng.integers(0, len(ids), len(ids)), minlength=len(ids))
    return drawn


@functools.cache
def _compiled() -> Any:
    """Return ``_replicates`` compiled, on first use; the compiled code is kept between runs."""
    return compiled()(_replicates)


def _replicates(
    drawn: NDArray[np.int64],
    identities: NDArray[np.int64],
    positive: NDArray[np.bool_],
    last: NDArray[np.int64],
    cuts: NDArray[np.int64],
    target_recall: float,
) -> NDArray[np.float64]:
    """Compute ``INTERVAL_KEYS``, then both rates at each cut, for each draw of identities.

    Pairs are sorted by falling score; ``last`` are the last positions of equal scores, and a cut
    is the number of different scores at or above a threshold.
    """
    result = np.full((len(drawn), 6 + 2 * len(cuts)), np.nan)
    # Positives and negatives at or above each different score; none at or above infinity.
    true = np.zeros(len(last) + 1, dtype=np.int64)
    false = np.zeros(len(last) + 1, dtype=np.int64)
    for row in range(len(drawn)):
        start = 0
        for rank in range(1, len(true)):
            true[rank], false[rank] = true[rank - 1], false[rank - 1]
            for i in range(start, last[rank - 1] + 1):
                weight = drawn[row, identities[i, 0]]
                if identities[i, 0] != identities[i, 1]:
                    weight *= drawn[row, identities[i, 1]]
                if positive[i]:
                    true[rank] += weight
                else:
                    false[rank] += weight
            start = last[rank - 1] + 1
        num_true, num_false = true[-1], false[-1]
        if num_true == 0 or num_false == 0:
            continue
        doubled, best, reached = 0, -1.0, False
        for rank in range(1, len(true)):
            called = true[rank] + false[rank]
            # Mann-Whitney, doubled: a negative below counts two, one of the same score counts one.
            lower_or_tied = 2 * num_false - false[rank] - false[rank - 1]
            doubled += (true[rank] - true[rank - 1]) * lower_or_tied
            if called == 0:
                continue
            f1 = 2 * true[rank] / (num_true + called)
            if f1 >= best:
                best = f1
                result[row, 1] = true[rank] / called
                result[row, 2] = true[rank] / num_true
            if not reached and true[rank] / num_true >= target_recall:
                reached = True
                result[row, 3] = true[rank] / called
                result[row, 4] = true[rank] / num_true
                result[row, 5] = false[rank] / num_false
        result[row, 0] = doubled / (2 * num_true * num_false)
        for number, cut in enumerate(cuts):
            result[row, 6 + 2 * number] = true[cut] / num_true
            result[row, 7 + 2 * number] = false[cut] / num_false
    return result
