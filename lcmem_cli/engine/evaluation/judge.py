"""The evaluation at the end of a training: thresholds from VAL, AUC per data set on TEST."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.data.loading import iter_images
from lcmem_cli.engine.data.manifest import Manifest, Record
from lcmem_cli.engine.detectors.base import Detector, FloatArray, score_listed
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.distributed import Ranks, resolve_device, resolve_workers
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.calibration import fit_threshold, required_negatives
from lcmem_cli.engine.evaluation.metrics import bootstrap_intervals, pair_metrics, roc_curve
from lcmem_cli.engine.models.checkpoint import Checkpoint
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Threshold, Unreadable
from lcmem_cli.engine.store.latents import LatentStore

BATCH_SIZE = 32
OVERALL = "overall"
MAX_NEGATIVES_PER_DATASET = 20_000
_MAX_ENUMERATED = 3_000
"""Images of a data set up to which all of its pairs are listed and negatives chosen among them."""
_MAX_POSITIVES = 2_000_000
"""Of a larger data set; beyond that they are those of a draw of each identity's images."""
FITTED_RATES: tuple[tuple[Literal["fpr", "recall"], float], ...] = (
    ("fpr", 0.01),
    ("fpr", 0.001),
    ("recall", 0.95),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a network is worth.

    Attributes:
        auc: per data set and overall ``{"auc", "low", "high", "num_positives", "num_negatives"}``.
        roc: per data set false- and true-positive rates and AUC, for plotting.
        thresholds: fitted on the VAL pairs.
        unreadable: images of VAL and TEST that were left out.
    """

    auc: dict[str, dict[str, Any]]
    roc: dict[str, tuple[NDArray[np.float64], NDArray[np.float64], float]]
    thresholds: tuple[Threshold, ...]
    unreadable: tuple[Unreadable, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithinPairs:
    """All positive pairs within identities and seeded random negatives within each data set.

    Attributes:
        first: rows of the first images.
        second: rows of the second images.
        labels: 1 where both show one identity.
        dataset: number of the data set of each pair, into ``names``.
        identity: number of each record's identity.
        names: data sets.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    labels: NDArray[np.int64]
    dataset: NDArray[np.int64]
    identity: NDArray[np.int64]
    names: tuple[str, ...]


def within_pairs(records: Sequence[Record]) -> WithinPairs:
    """Return every positive pair, and as many negatives a data set as there are, up to a limit.

    Pairs are drawn within one data set, because across data sets they are trivially easy. The same
    records always give the same pairs.
    """
    numbers: dict[tuple[str, str], int] = {}
    identity = np.asarray(
        [numbers.setdefault(r.identity, len(numbers)) for r in records], dtype=np.int64
    )
    groups: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        groups.setdefault(record.ds_name or "all", []).append(row)
    rng = np.random.default_rng(0)
    parts: list[tuple[NDArray[np.int64], ...]] = []
    for number, rows in enumerate(groups.values()):
        members = np.asarray(rows, dtype=np.int64)
        draw = _all_pairs if len(members) <= _MAX_ENUMERATED else _drawn_pairs
        a, b, same = draw(identity[members], rng)
        parts.append((members[a], members[b], same, np.full(len(a), number, dtype=np.int64)))
    first, second, labels, dataset = (np.concatenate(column) for column in zip(*parts, strict=True))
    return WithinPairs(
        first=first,
        second=second,
        labels=labels,
        dataset=dataset,
        identity=identity,
        names=tuple(groups),
    )


Drawn = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _all_pairs(identity: NDArray[np.int64], rng: np.random.Generator) -> Drawn:
    """Return first and second rows and labels, chosen among all pairs."""
    a, b = np.triu_indices(len(identity), 1)
    same = identity[a] == identity[b]
    negatives = np.flatnonzero(~same)
    if len(negatives) > MAX_NEGATIVES_PER_DATASET:
        negatives = np.sort(rng.choice(negatives, MAX_NEGATIVES_PER_DATASET, replace=False))
    chosen = np.concatenate([np.flatnonzero(same), negatives])
    return a[chosen], b[chosen], same[chosen].astype(np.int64)


def _drawn_pairs(identity: NDArray[np.int64], rng: np.random.Generator) -> Drawn:
    """Return the same without a list of all pairs, which would not fit into memory."""
    order = np.argsort(identity, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(identity[order])) + 1)
    same = sum(len(group) * (len(group) - 1) // 2 for group in groups)
    possible = len(identity) * (len(identity) - 1) // 2 - same
    if same > _MAX_POSITIVES:  # of each identity as large a part of its images
        part = math.sqrt(_MAX_POSITIVES / same)
        groups = [rng.permutation(group)[: max(2, int(part * len(group)))] for group in groups]
    positives = [
        np.stack([group[i] for i in np.triu_indices(len(group), 1)], axis=1) for group in groups
    ]
    negatives: NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)
    while len(negatives) < min(possible, MAX_NEGATIVES_PER_DATASET):
        drawn = np.sort(rng.integers(len(identity), size=(MAX_NEGATIVES_PER_DATASET, 2)), axis=1)
        drawn = drawn[identity[drawn[:, 0]] != identity[drawn[:, 1]]]
        negatives = np.unique(np.concatenate([negatives, drawn]), axis=0)
    if len(negatives) > MAX_NEGATIVES_PER_DATASET:
        kept = rng.choice(len(negatives), MAX_NEGATIVES_PER_DATASET, replace=False)
        negatives = negatives[np.sort(kept)]
    pairs = np.concatenate([*positives, negatives])
    labels = (np.arange(len(pairs)) < len(pairs) - len(negatives)).astype(np.int64)
    return pairs[:, 0], pairs[:, 1], labels


def judge(
    checkpoint: Checkpoint,
    source: LatentStore | Manifest,
    *,
    workers: int = -1,
    device: str = "auto",
    ranks: Ranks | None = None,
    reporter: Reporter = SILENT,
) -> Judgement:
    """Embed VAL and TEST once, fit thresholds on VAL, and measure on TEST.

    Args:
        checkpoint: with its fingerprint.
        source: latents, or images; both with splits.
        workers: decoding threads.
        device: where to compute.
        ranks: processes that share the embedding.
        reporter: receives progress.
    """
    detector = LCMemDetector(checkpoint, name="trained", device=resolve_device(device))
    scores: dict[str, tuple[NDArray[np.float64], WithinPairs]] = {}
    unreadable: dict[int, str] = {}
    for split in ("VAL", "TEST"):
        rows, features, bad = embed_split(
            detector, source, split, workers=workers, ranks=ranks, reporter=reporter
        )
        unreadable.update(bad)
        if rows:
            scores[split] = score_within(detector, features, [source.records[row] for row in rows])
    thresholds = fit_thresholds([scores["VAL"]] if "VAL" in scores else [], detector.fingerprint)
    auc, roc = _measure(*scores["TEST"]) if "TEST" in scores else ({}, {})
    return Judgement(
        auc=auc,
        roc=roc,
        thresholds=thresholds,
        unreadable=tuple(
            Unreadable(path=source.records[row].path, reason=unreadable[row])
            for row in sorted(unreadable)
        ),
    )


def score_within(
    detector: Detector, features: FloatArray, records: Sequence[Record]
) -> tuple[NDArray[np.float64], WithinPairs]:
    """Return scores of pairs within data sets, and the pairs; features ``[n, d]`` by record."""
    pairs = within_pairs(records)
    return score_listed(detector, features, pairs.first, pairs.second), pairs


def embed_split(
    detector: LCMemDetector,
    source: LatentStore | Manifest,
    split: str,
    *,
    workers: int = -1,
    ranks: Ranks | None = None,
    reporter: Reporter = SILENT,
) -> tuple[list[int], NDArray[np.float32], dict[int, str]]:
    """Embed a split of two images or more.

    Returns:
        Rows of its readable records, in order; their features ``[n, d]``; and the rows that cannot
        be read, with reasons.
    """
    ranks = ranks or Ranks()
    rows = [row for row, record in enumerate(source.records) if record.split == split]
    if len(rows) < 2:
        return [], np.zeros((0, detector.num_features), dtype=np.float32), {}
    made = _embed(detector, source, list(ranks.share(rows)), workers, reporter, split)
    gathered: dict[int, NDArray[np.float32]] = {}
    unreadable: dict[int, str] = {}
    for part_rows, part, part_unreadable in ranks.gather(made):
        gathered.update(zip(part_rows, part, strict=True))
        unreadable.update(part_unreadable)
    order = sorted(gathered)
    width = (len(order), detector.num_features)
    features = np.reshape([gathered[row] for row in order], width).astype(np.float32)
    return order, features, unreadable


def _embed(
    detector: LCMemDetector,
    source: LatentStore | Manifest,
    rows: list[int],
    workers: int,
    reporter: Reporter,
    split: str,
) -> tuple[list[int], NDArray[np.float32], dict[int, str]]:
    kept: list[int] = []
    unreadable: dict[int, str] = {}
    features: list[NDArray[np.float32]] = []
    with reporter.task(f"embedding {split}", len(rows), unit="image") as task:
        if isinstance(source, LatentStore):
            for start in range(0, len(rows), BATCH_SIZE):
                part = rows[start : start + BATCH_SIZE]
                features.append(detector.embed_latents(source.latents(part)))
                kept += part
                task.advance(len(part))
        else:
            paths = source.paths()
            for batch in iter_images(
                [paths[row] for row in rows],
                detector.input_size,
                workers=resolve_workers(workers),
                batch_size=BATCH_SIZE,
            ):
                if batch.indices:
                    features.append(np.asarray(detector.embed_batch(batch.images)))
                    kept += [rows[i] for i in batch.indices]
                unreadable.update({rows[i]: reason for i, reason in batch.unreadable})
                task.advance(len(batch.indices) + len(batch.unreadable))
    width = (0, detector.num_features)
    found = np.concatenate(features) if features else np.zeros(width, dtype=np.float32)
    return kept, found, unreadable


def fit_thresholds(
    scored: Sequence[tuple[NDArray[np.float64], WithinPairs]], fingerprint: str, *, by: str = ""
) -> tuple[Threshold, ...]:
    """Fit every threshold that the numbers of pairs support.

    Args:
        scored: scores of VAL pairs, with the pairs.
        fingerprint: of the checkpoint that the thresholds are for.
        by: what scored them, where it was not the checkpoint itself.
    """
    if not scored:
        return ()
    scores = np.concatenate([part for part, _ in scored])
    labels = np.concatenate([pairs.labels for _, pairs in scored])
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return ()
    names = [name for _, pairs in scored for name in pairs.names]
    fitted_on = f"VAL pairs within {len(names)} data set(s){by}: " + ", ".join(names)
    return tuple(
        fit_threshold(
            scores, labels, kind=kind, rate=rate, fingerprint=fingerprint, fitted_on=fitted_on
        )
        for kind, rate in FITTED_RATES
        if kind == "recall" or negatives >= required_negatives(rate)
    )


def _measure(
    scores: NDArray[np.float64], pairs: WithinPairs
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    auc: dict[str, dict[str, Any]] = {}
    roc: dict[str, Any] = {}
    strata = np.zeros(pairs.identity.max() + 1, dtype=np.int64)
    strata[pairs.identity[pairs.first]] = pairs.dataset
    strata[pairs.identity[pairs.second]] = pairs.dataset
    for number, name in [*enumerate(pairs.names), (-1, OVERALL)]:
        chosen = pairs.dataset == number if number >= 0 else np.ones(len(scores), dtype=bool)
        labels = pairs.labels[chosen]
        if name == OVERALL and len(pairs.names) == 1:
            continue
        try:
            value = pair_metrics(scores[chosen], labels)["auc"]
        except InputError:  # one class only, such as a set of single images
            continue
        interval = bootstrap_intervals(
            scores[chosen],
            labels,
            pairs.identity[pairs.first[chosen]],
            pairs.identity[pairs.second[chosen]],
            strata=strata,
            replicates=200,
        )["auc"]
        low, high = interval or (None, None)
        auc[name] = {
            "auc": value,
            "low": low,
            "high": high,
            "num_positives": int(labels.sum()),
            "num_negatives": int(len(labels) - labels.sum()),
        }
        fpr, tpr = roc_curve(scores[chosen], labels)[:2]
        roc[name] = (fpr, tpr, value)
    return auc, roc
