"""The evaluation at the end of a training: thresholds from VAL, AUC per data set on TEST."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.manifest import Manifest, Record
from lcmem_cli.engine.data.pairs import PairSet, pairs_within
from lcmem_cli.engine.detectors.base import Detector, FloatArray, score_listed
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.evaluation.calibration import fit_threshold, required_negatives
from lcmem_cli.engine.evaluation.metrics import roc_curve
from lcmem_cli.engine.evaluation.study.results import OVERALL, FitRule
from lcmem_cli.engine.evaluation.study.scoring import (
    Measure,
    embed_listed,
    embed_stored,
    fit_rates,
    listed_files,
)
from lcmem_cli.engine.models.checkpoint import Checkpoint
from lcmem_cli.engine.report.plots import Curve
from lcmem_cli.engine.results import Threshold, Unreadable
from lcmem_cli.engine.store.latents import LatentStore

FITTED_RATES: tuple[tuple[FitRule, float], ...] = (("fpr", 0.01), ("fpr", 0.001), ("recall", 0.95))
_REPLICATES = 200
_UNNAMED = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a network is worth.

    Attributes:
        auc: per data set and overall ``{"auc", "low", "high", "num_positives", "num_negatives"}``.
        roc: per data set, for plotting.
        thresholds: fitted on the VAL pairs.
        unreadable: images of VAL and TEST that were left out.
    """

    auc: dict[str, dict[str, Any]]
    roc: dict[str, Curve]
    thresholds: tuple[Threshold, ...]
    unreadable: tuple[Unreadable, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredSplit:
    """Scores of pairs within data sets.

    Attributes:
        scores: ``[n]``.
        pairs: every positive one, and negatives up to a limit; across data sets they would be
            trivially easy.
        records: that the pairs hold rows of.
    """

    scores: NDArray[np.float64]
    pairs: PairSet
    records: Sequence[Record]

    @classmethod
    def of(cls, detector: Detector, features: FloatArray, records: Sequence[Record]) -> ScoredSplit:
        """Score records by their features ``[n, d]``."""
        named = [record._replace(ds_name=record.ds_name or _UNNAMED) for record in records]
        pairs = pairs_within(named)
        scores = score_listed(detector, features, pairs.first, pairs.second)
        return cls(scores=scores, pairs=pairs, records=named)


def judge(checkpoint: Checkpoint, source: LatentStore | Manifest, compute: Compute) -> Judgement:
    """Embed VAL and TEST once, fit thresholds on VAL, and measure on TEST.

    Args:
        checkpoint: with its fingerprint.
        source: latents, or images; both with splits.
        compute: how to embed.
    """
    detector = LCMemDetector(checkpoint, name="trained", device=resolve_device(compute.device))
    scored: dict[str, ScoredSplit] = {}
    reasons: dict[str, str] = {}
    for split in ("VAL", "TEST"):
        records, features, unreadable = embed_split(detector, source, split, compute)
        reasons |= {item.path: item.reason for item in unreadable}
        if records:
            scored[split] = ScoredSplit.of(detector, features, records)
    fitted_on = [scored["VAL"]] if "VAL" in scored else []
    auc, roc = _measure(scored["TEST"]) if "TEST" in scored else ({}, {})
    return Judgement(
        auc=auc,
        roc=roc,
        thresholds=fit_thresholds(fitted_on, detector.fingerprint),
        unreadable=tuple(
            Unreadable(path=record.path, reason=reasons[record.path])
            for record in source.records
            if record.path in reasons
        ),
    )


def embed_split(
    detector: LCMemDetector, source: LatentStore | Manifest, split: str, compute: Compute
) -> tuple[list[Record], FloatArray, tuple[Unreadable, ...]]:
    """Embed a split of two images or more.

    Returns:
        Its readable records, in order; their features ``[n, d]``; and what cannot be read.
    """
    records = [record for record in source.records if record.split == split]
    rows = range(len(records))
    if len(records) < 2:
        return [], np.zeros((0, detector.num_features), dtype=np.float32), ()
    if isinstance(source, LatentStore):
        found = embed_stored(detector, source, records, rows, compute)
    else:
        made = embed_files(detector, listed_files(records, source.basedir, rows), compute)
        found = embed_listed(records, source.basedir, rows, made)
    readable = [record for record, row in zip(records, found.rows, strict=True) if row >= 0]
    return readable, found.features[found.rows[found.rows >= 0]], found.unreadable


def fit_thresholds(
    scored: Sequence[ScoredSplit], fingerprint: str, *, by: str = ""
) -> tuple[Threshold, ...]:
    """Fit every threshold that the numbers of pairs support.

    Args:
        scored: VAL pairs, in one part, or one for each kind of images.
        fingerprint: of the checkpoint that the thresholds are for.
        by: what scored them, where it was not the checkpoint itself.
    """
    num_negatives = sum(part.pairs.num_negatives for part in scored)
    if not num_negatives or not any(part.pairs.num_positives for part in scored):
        return ()
    names = [name for part in scored for name in part.pairs.names]
    thresholds, _ = fit_rates(
        np.concatenate([part.scores for part in scored]),
        np.concatenate([part.pairs.labels for part in scored]),
        FITTED_RATES,
        num_distinct=num_negatives,
        fingerprint=fingerprint,
        fitted_on=f"VAL pairs within {len(names)} data set(s){by}: " + ", ".join(names),
    )
    return tuple(
        dataclasses.replace(threshold, unseen_fprs=_unseen_fprs(scored, threshold.rate))
        if threshold.kind == "fpr"
        else threshold
        for threshold in thresholds.values()
    )


def _unseen_fprs(scored: Sequence[ScoredSplit], rate: float) -> dict[str, float]:
    """Return what became of a rate in each part, at a threshold fitted to all other parts."""
    negatives = {
        ", ".join(part.pairs.names): part.scores[part.pairs.labels == 0] for part in scored
    }
    needed = required_negatives(rate)
    found = {}
    for name, own in negatives.items():
        others = [values for other, values in negatives.items() if other != name]
        if len(own) >= needed and sum(map(len, others)) >= needed:
            fitted = fit_threshold(
                np.concatenate(others), kind="fpr", rate=rate, fingerprint="", fitted_on="others"
            )
            found[name] = float(np.mean(own >= fitted.value))
    return found


def _measure(scored: ScoredSplit) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return AUC and ROC curve of each data set, and of all where there are several."""
    auc: dict[str, dict[str, Any]] = {}
    roc: dict[str, Any] = {}
    scores, pairs = scored.scores, scored.pairs
    measure = Measure(records=scored.records, replicates=_REPLICATES)
    parts = {name: pairs.dataset == number for number, name in enumerate(pairs.names)}
    if len(parts) > 1:
        parts[OVERALL] = np.ones(len(pairs), dtype=bool)
    for name, chosen in parts.items():
        found = measure(scores[chosen], pairs.select(chosen))
        if found.metrics is None:  # one class only, such as a set of single images
            continue
        low, high = found.intervals["auc"] or (None, None)
        auc[name] = {
            "auc": found.metrics["auc"],
            "low": low,
            "high": high,
            "num_positives": found.num_positives,
            "num_negatives": found.num_negatives,
        }
        fpr, tpr, _ = roc_curve(scores[chosen], pairs.labels[chosen])
        ends = found.intervals["auc"]
        roc[name] = Curve(fpr, tpr, found.metrics["auc"], found.num_negatives, ends)
    return auc, roc
