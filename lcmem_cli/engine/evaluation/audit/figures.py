"""Figures of an audit over its whole sets, and the scores to draw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.base import Detector, FloatArray
from lcmem_cli.engine.evaluation import set_metrics
from lcmem_cli.engine.evaluation.audit.null import Null
from lcmem_cli.engine.evaluation.audit.search import Found, search_training
from lcmem_cli.engine.evaluation.audit.sets import Embedded
from lcmem_cli.engine.evaluation.set_metrics import CopyingStatistic, Scores, SetMetrics, Spread
from lcmem_cli.engine.report.html import Distribution


def measure_sets(embedded: Embedded, null: Null, found: Found, *, seed: int) -> SetMetrics:
    """Return the figures about the whole set, see ``SetMetrics``.

    Args:
        embedded: the sets.
        null: real images and their best matches.
        found: best matches of the generated images.
        seed: of the cells of ``C_T``.
    """
    rows = embedded.sets.generated.rows
    best, null_best = found.best[rows], null.scores[:, 0]
    # Distances between training images are the detector's, so only its scores compare with them.
    searched, real = found.searched or found, null.searched or null
    auth, null_auth = _auth_percentages(embedded, null, searched, real)
    copying = None
    if null.kind != "leave-one-out":  # its images are from the bank themselves
        copying = _copying(embedded, null, best, seed)
    # An identical image stands first whatever its score, so scores are put in order again.
    ordered = np.sort(searched.scores, axis=1)[:, ::-1]
    ratios = _ratios(embedded.detector, embedded.sets.generated.features, ordered)
    null_ratios = _ratios(embedded.detector, null.images.features_of(null.rows), real.scores)
    per_image = ratios[rows] if len(ratios) else ratios
    return SetMetrics(
        generated_scores=Spread.of(best),
        null_scores=Spread.of(null_best),
        auth_pct=auth,
        null_auth_pct=null_auth,
        copying=copying,
        generated_ratio=Spread.of(per_image),
        null_ratio=Spread.of(null_ratios),
        share_small_ratio=float(np.mean(per_image < set_metrics.SMALL_RATIO))
        if len(per_image)
        else None,
    )


def scores_to_draw(
    embedded: Embedded, null: Null, found: Found, threshold: float | None
) -> Distribution:
    """Return the best-match scores of both sets, and the threshold, on a scale to draw."""
    detector = embedded.detector
    limit = None if threshold is None else float(_linear(detector, np.array([threshold]))[0])
    return Distribution(
        generated=_linear(detector, found.best[embedded.sets.generated.rows]),
        null=_linear(detector, null.scores[:, 0]),
        threshold=limit,
        as_logit=detector.gives_probability,
    )


def _copying(embedded: Embedded, null: Null, best: Scores, seed: int) -> CopyingStatistic | None:
    """Return ``C_T``; an image's cell is the most alike of some training images drawn for it."""
    count = set_metrics.num_cells(len(best), len(null.rows))
    rng = np.random.default_rng(seed)
    landmarks = np.sort(rng.choice(null.bank, min(count, len(null.bank)), replace=False))
    generated = embedded.sets.generated
    cells = search_training(embedded, generated.features, landmarks, 1).rows[generated.rows, 0]
    null_features = null.images.features_of(null.rows)
    null_cells = search_training(embedded, null_features, landmarks, 1).rows[:, 0]
    return set_metrics.copying_statistic(best, null.scores[:, 0], cells, null_cells, seed=seed)


def _auth_percentages(
    embedded: Embedded, null: Null, searched: Found, real: Null
) -> tuple[float | None, float | None]:
    """Return AuthPct of the generated images, and of the null's where they are not from the bank.

    A detector that is adapted to the training images tells them apart better than others, so their
    neighbours would lie too far. So the detector before adapting searches again.
    """
    before, bank, rows = embedded.before, null.bank, embedded.sets.generated.rows
    if len(bank) < 2:
        return None, None
    nearest = [(searched.best, searched.rows[:, 0]), (real.scores[:, 0], real.matches[:, 0])]
    if before is not None:
        images = before.sets.held_out or before.sets.training
        shown = (before.sets.generated.features, images.features_of(null.rows))
        tops = [search_training(before, features, bank, 1) for features in shown]
        nearest = [(top.scores[:, 0], top.rows[:, 0]) for top in tops]

    def percentage(scores: Scores, matches: NDArray[np.int64]) -> float | None:
        neighbours = _neighbours(before or embedded, bank, matches)
        return set_metrics.authentic_percentage(scores, neighbours)

    (scores, matches), of_null = nearest
    auth = percentage(scores[rows], matches[rows])
    return auth, None if null.kind == "leave-one-out" else percentage(*of_null)


def _neighbours(embedded: Embedded, bank: NDArray[np.int64], rows: NDArray[np.int64]) -> Scores:
    """Return the score of training rows with their nearest other row of the bank."""
    distinct, inverse = np.unique(rows, return_inverse=True)
    top = search_training(embedded, embedded.sets.training.features_of(distinct), bank, 2)
    itself = top.rows[:, 0] == distinct
    scores: Scores = np.where(itself, top.scores[:, 1], top.scores[:, 0])
    return scores[inverse]


def _ratios(detector: Detector, features: FloatArray, scores: Scores) -> Scores:
    """Return first-to-second-neighbour ratios ``[n]``; none without two distances."""
    unknown = scores.shape[1] < 2 or np.isnan(scores[:, 1]).any()
    if unknown or not detector.measures_distance:
        return np.zeros(0)
    identical = _linear(detector, detector.score_features(features, features))
    distances = set_metrics.score_distances(_linear(detector, scores[:, :2]), identical[:, None])
    return set_metrics.neighbour_ratios(distances[:, 0], distances[:, 1])


def _linear(detector: Detector, scores: Scores) -> Scores:
    return set_metrics.linear_scale(scores) if detector.gives_probability else scores
