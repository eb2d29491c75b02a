"""Figures about a whole generated set, beside the per-image flags of an audit.

All of them are computed from detector scores. Where a source speaks of distances and only their
order matters, the score with its sign turned takes their place; where differences matter,
``score_distances`` says what the distance is.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.errors import InputError

Scores = NDArray[np.float64]

SMALL_RATIO = 1 / 3
MIN_CELL_SIZE = 20
MAX_CELLS = 10
_PERMUTATIONS = 999
_LARGEST_LOGIT = 40.0  # beyond it float64 probabilities no longer differ from 0 and 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Where a set of numbers lies: smallest, quartiles, largest and mean."""

    smallest: float
    lower_quartile: float
    median: float
    upper_quartile: float
    largest: float
    mean: float

    @classmethod
    def of(cls, values: Scores) -> Spread | None:
        """Describe ``[n]`` finite numbers; ``None`` if there are none."""
        if not len(values):
            return None
        low, lower, middle, upper, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        return cls(
            smallest=float(low),
            lower_quartile=float(lower),
            median=float(middle),
            upper_quartile=float(upper),
            largest=float(high),
            mean=float(values.mean()),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyingStatistic:
    """``C_T`` of Meehan et al. (2020).

    Attributes:
        value: below 0, generated images lie closer to the training set than held-out images do
            (copying); above 0, farther away (underfitting). Each cell's part is in standard
            deviations, so values within about ±3 say nothing.
        num_cells: cells that entered it.
        z: the value in standard deviations from the mean of shuffled sets. The value itself is a
            mean over cells, so its own standard deviation is far below 1. ``None`` where all
            shuffled sets give the same.
        p_value: share of shuffled sets whose value is as low or lower: small where the generated
            images lie nearer to the training set than held-out images do.
    """

    value: float
    num_cells: int
    z: float | None
    p_value: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetMetrics:
    """Set-level figures of an audit; ``None`` where one is not defined for the data.

    Attributes:
        generated_scores: best-match scores of the generated images.
        null_scores: best-match scores of the real images of the null.
        auth_pct: see ``authentic_percentage``.
        null_auth_pct: the same of the real images of the null, where they are not from the bank.
        copying: see ``copying_statistic``.
        generated_ratio: ratio of first to second neighbour of the generated images, see
            ``neighbour_ratios``.
        null_ratio: the same of the real images of the null.
        share_small_ratio: share of generated images whose ratio is below 1/3, the rule for
            "memorized" of Yoon et al. (2023) and Gu et al. (arXiv 2310.02664).
    """

    generated_scores: Spread | None
    null_scores: Spread | None
    auth_pct: float | None
    null_auth_pct: float | None
    copying: CopyingStatistic | None
    generated_ratio: Spread | None
    null_ratio: Spread | None
    share_small_ratio: float | None


def authentic_percentage(match_scores: Scores, neighbour_scores: Scores) -> float | None:
    """Return AuthPct: the percentage of generated images that are not closer than neighbours.

    A generated image g with the nearest training image r is authentic if another training image
    is nearer to r than g is: ``score(g, r) < score(r, r')``, where r' is the training image
    nearest to r. Source: Alaa et al., "How faithful is your synthetic data?" (arXiv 2102.08921).
    Unseen real images do not reach 100 % either, so an audit reports their value beside it.

    Args:
        match_scores: ``[n]`` scores of the generated images with their nearest training image.
        neighbour_scores: ``[n]`` scores of that training image with its own nearest one.

    Returns:
        In [0, 100]; ``None`` without images.

    Raises:
        InputError: the lengths differ.
    """
    if len(match_scores) != len(neighbour_scores):
        raise InputError(f"{len(match_scores)} scores, but {len(neighbour_scores)} of neighbours")
    if not len(match_scores):
        return None
    return 100 * float(np.mean(match_scores < neighbour_scores))


def copying_statistic(
    generated_scores: Scores,
    held_out_scores: Scores,
    generated_cells: NDArray[np.integer],
    held_out_cells: NDArray[np.integer],
    *,
    seed: int = 0,
) -> CopyingStatistic | None:
    """Return the data-copying statistic ``C_T``, with its own null by permutation.

    In each cell of the image space, the Mann-Whitney U statistic counts the pairs (generated,
    held-out) whose generated image lies farther from the training set; ``Z`` is U minus its mean,
    over its standard deviation. ``C_T`` is the mean of Z over the cells that hold at least
    ``MIN_CELL_SIZE`` generated images, weighted by the number of held-out images in the cell.
    Ties count half. Source: Meehan, Chaudhuri and Dasgupta, "A non-parametric test to detect
    data-copying in generative models" (arXiv 2004.05675).

    Its null: if nothing is copied, which images are the generated ones does not matter. So the
    labels are shuffled within each cell, which keeps every cell's size.

    Args:
        generated_scores: ``[n]`` best-match scores with the training set, larger is nearer.
        held_out_scores: ``[m]`` the same of held-out real images.
        generated_cells: ``[n]`` cell numbers.
        held_out_cells: ``[m]`` cell numbers.
        seed: of the permutations.

    Returns:
        ``None`` if no cell holds enough generated images and a held-out one.
    """
    from scipy.stats import rankdata

    rng = np.random.default_rng(seed)
    totals = np.zeros(1 + _PERMUTATIONS)  # of the true labels, then of shuffled ones
    weights = num_cells = 0
    for cell in np.unique(held_out_cells):
        generated = generated_scores[generated_cells == cell]
        held_out = held_out_scores[held_out_cells == cell]
        n, m = len(generated), len(held_out)
        if n < MIN_CELL_SIZE:
            continue
        ranks = rankdata(-np.concatenate([generated, held_out]))
        sums = [ranks[:n].sum()] + [rng.permutation(ranks)[:n].sum() for _ in range(_PERMUTATIONS)]
        farther = np.array(sums) - n * (n + 1) / 2
        totals += m * (farther - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12)
        weights += m
        num_cells += 1
    if not num_cells:
        return None
    values = totals / weights
    spread = float(values[1:].std())
    return CopyingStatistic(
        value=float(values[0]),
        num_cells=num_cells,
        z=float((values[0] - values[1:].mean()) / spread) if spread else None,
        p_value=float(np.mean(values <= values[0] + 1e-12)),
    )


def num_cells(num_generated: int, num_held_out: int) -> int:
    """Return into how many cells ``copying_statistic`` should divide sets of these sizes.

    On average a cell holds at least 50 images of each set; at least one cell, at most ten.
    """
    return int(np.clip(min(num_generated, num_held_out) // 50, 1, MAX_CELLS))


def neighbour_ratios(first: Scores, second: Scores) -> Scores:
    """Return the ratio of the distances to the nearest and the second-nearest training image.

    Near 0: one training image stands out. Near 1: the image is no closer to its nearest training
    image than to the next. Two distances of 0 give 1.

    Args:
        first: ``[n]`` distances to the nearest training image, at least 0.
        second: ``[n]`` distances to the second-nearest.

    Returns:
        ``[n]`` in [0, 1].
    """
    return np.divide(first, second, out=np.ones_like(first), where=second > 0)


def score_distances(scores: Scores, identical: Scores) -> Scores:
    """Turn scores into distances: what is missing to the score of an image with itself.

    For cosine or correlation this is ``1 - score``, for the negative mean squared error the error;
    for LCMem, taken on the logit scale, the signed weighted L1 distance of the features. A score
    above that of an image with itself gives 0.

    Args:
        scores: ``[n]`` or ``[n, k]``, on a linear scale (``linear_scale``).
        identical: scores of each image with itself, of a shape that broadcasts.
    """
    distances: Scores = np.maximum(identical - scores, 0.0)
    return distances


def linear_scale(probabilities: Scores) -> Scores:
    """Return the logits of probabilities, within ±40.

    Probabilities of a good detector crowd at 0 and 1; their logits can be drawn and subtracted.
    """
    from scipy.special import logit

    logits: Scores = np.clip(logit(np.clip(probabilities, 0, 1)), -_LARGEST_LOGIT, _LARGEST_LOGIT)
    return logits
