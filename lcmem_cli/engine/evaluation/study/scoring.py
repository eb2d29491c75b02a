"""From images to scores to numbers: what the studies, and the judging of a training, share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.batching import Batching
from lcmem_cli.engine.data.loading import LoadedBatch
from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.data.pairs import PairSet, identity_numbers
from lcmem_cli.engine.detectors.base import Adapted, Detector, score_listed
from lcmem_cli.engine.detectors.embedding import EmbeddedFiles
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.errors import InputError, NotAdaptableError
from lcmem_cli.engine.evaluation.calibration import fit_threshold, required_negatives
from lcmem_cli.engine.evaluation.metrics import (
    DEFAULT_TARGET_RECALL,
    INTERVAL_KEYS,
    bootstrap_intervals,
    pair_metrics,
    rates_at,
)
from lcmem_cli.engine.evaluation.study.results import FitRule, RateAtThreshold, SetResult
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Threshold, Unreadable
from lcmem_cli.engine.store.latents import LatentStore

_TILE = 64
Fitted = tuple[dict[tuple[FitRule, float], Threshold], dict[tuple[FitRule, float], str]]
"""By kind and rate: thresholds, and for the others the reason why there is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded:
    """Features of listed images.

    Attributes:
        features: ``[d, k]``, perhaps a memory map.
        rows: ``[records]`` feature row of each, or -1 where it is unreadable or was not asked for.
        unreadable: images that were left out, under their listed names.
    """

    features: NDArray[Any]
    rows: NDArray[np.int64]
    unreadable: tuple[Unreadable, ...]

    def score(
        self, detector: Detector, pairs: PairSet, *, dense: bool = False
    ) -> NDArray[np.float64]:
        """Score pairs ``[n]``; NaN where an image is unreadable.

        Args:
            detector: what scores.
            pairs: of the records.
            dense: whether they make up most of a matrix within each data set.
        """
        first, second = self.rows[pairs.first], self.rows[pairs.second]
        if dense:
            return score_dense(detector, self.features, first, second, pairs.dataset)
        return score_listed(detector, self.features, first, second)


def listed_files(records: Sequence[Record], basedir: Path, needed: Sequence[int]) -> list[Path]:
    """Return the files of the ``needed`` rows of ``records``."""
    return [basedir / records[row].path for row in needed]


def embed_listed(
    records: Sequence[Record],
    basedir: Path,
    needed: Sequence[int],
    made: EmbeddedFiles,
    reporter: Reporter = SILENT,
    **told: str,
) -> Embedded:
    """Bring the features of the files of the ``needed`` rows of ``records`` to these rows.

    Args:
        records: images.
        basedir: folder that their paths start from.
        needed: rows.
        made: what was made of ``listed_files``.
        reporter: told how many images there were, and how many the network had to see.
        **told: what else it is told.
    """
    counts = {"distinct": len(made.features), "encoder_passes": made.encoder_passes}
    reporter.event("embedded", **told, images=len(needed), **counts)
    rows = np.full(len(records), -1, dtype=np.int64)
    rows[needed] = made.rows
    reasons = {item.path: item.reason for item in made.unreadable}
    paths = [records[row].path for row in needed]
    unreadable = tuple(
        Unreadable(path=path, reason=reasons[file])
        for path in paths
        if (file := str(basedir / path)) in reasons
    )
    return Embedded(features=made.features, rows=rows, unreadable=unreadable)


def embed_stored(
    detector: LCMemDetector,
    store: LatentStore,
    records: Sequence[Record],
    needed: Sequence[int],
    compute: Compute,
) -> Embedded:
    """Embed the stored latents of the ``needed`` rows of ``records``.

    Images that the store lists as unreadable, and those without finite features, are unreadable.

    Raises:
        InputError: the store knows nothing of an image.
    """
    stored = {record.path: row for row, record in enumerate(store.records)}
    reasons = {item.path: item.reason for item in store.unreadable}
    missing = [p for row in needed if (p := records[row].path) not in stored and p not in reasons]
    if missing:
        raise InputError(
            f"{store.folder}: has no latents of {len(missing):,} of {len(needed):,} images, the "
            f"first is {missing[0]!r}; make them with lcmem latents on the same filelist"
        )
    made: dict[int, NDArray[Any]] = {}
    bad = {row: reasons[path] for row in needed if (path := records[row].path) not in stored}
    mine = compute.ranks.share([row for row in needed if row not in bad])
    batching = Batching(compute.batch_size, detector.device, reporter=compute.reporter)
    name = f"embedding latents ({detector.name})"
    with compute.reporter.task(name, len(mine), unit="image") as task:
        for start in range(0, len(mine), batching.loaded):
            part = list(mine[start : start + batching.loaded])
            latents = store.latents([stored[records[row].path] for row in part])
            batch = LoadedBatch(indices=part, images=latents, unreadable=[])
            indices, pieces, failed = batching.embed(detector.embed_latents, batch)
            made.update(zip(indices, itertools.chain.from_iterable(pieces), strict=True))
            bad.update(failed)
            task.advance(len(part))
    # Rows come from the ranks in no order; each process sorts them, so that all hold the same.
    for of_rank, bad_of_rank in compute.ranks.gather((made, bad)):
        made |= of_rank
        bad |= bad_of_rank
    kept = sorted(made)
    features = np.zeros((len(kept), detector.num_features), dtype=np.float32)
    rows = np.full(len(records), -1, dtype=np.int64)
    for place, row in enumerate(kept):
        features[place], rows[row] = made[row], place
    unreadable = tuple(Unreadable(path=records[row].path, reason=bad[row]) for row in bad)
    return Embedded(features=features, rows=rows, unreadable=unreadable)


def check_latents(detector: LCMemDetector, store: LatentStore) -> None:
    """Refuse latents that another codec made than the one the detector was trained with.

    Raises:
        InputError: another codec, another way of feeding it, another image size or precision.
    """
    wanted, found = detector.checkpoint.codec, store.spec
    same = (wanted.weights_hash, wanted.input_range) == (found.weights_hash, found.input_range)
    if not same or found.posterior != "mean":
        raise InputError(
            f"{store.folder}: latents of {found.describe()}, but {detector.name} needs those of "
            f"{wanted.describe()}; encode the images with that codec (lcmem latents), or leave "
            "out --latents"
        )
    if store.image_size != detector.input_size:
        raise InputError(
            f"{store.folder}: latents of images of {store.image_size} pixels, but {detector.name} "
            f"takes {detector.input_size}; encode them with lcmem latents --size "
            f"{detector.input_size}"
        )
    if store.precision != detector.precision:
        raise InputError(
            f"{store.folder}: latents computed in {store.precision}, but {detector.name} computes "
            f"in {detector.precision}; set --precision {store.precision}, or encode them again"
        )


def score_dense(
    detector: Detector,
    features: NDArray[Any],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    groups: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Score pairs that make up most of a matrix within each group, tile by tile.

    Args:
        detector: what scores.
        features: ``[d, k]``, perhaps a memory map.
        first: ``[n]`` feature row of each first image, or -1 where it is unreadable.
        second: ``[n]`` the same for the second image.
        groups: ``[n]`` such as the data set of each pair.

    Returns:
        ``[n]``; NaN where an image is unreadable. Up to rounding the same as ``score_listed``.
    """
    scores = np.full(len(first), np.nan)
    for group in np.unique(groups):
        usable = np.flatnonzero((first >= 0) & (second >= 0) & (groups == group))
        rows, local = np.unique([first[usable], second[usable]], return_inverse=True)
        # Scores are symmetric, so that the tiles of one triangle are enough.
        top, left = np.sort(local.reshape(2, -1), axis=0)
        tiles = top // _TILE * (len(rows) // _TILE + 1) + left // _TILE
        order = np.argsort(tiles, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(tiles[order])) + 1):
            if not len(part):
                continue
            i, j = top[part[0]] // _TILE * _TILE, left[part[0]] // _TILE * _TILE
            matrix = detector.score_matrix(
                features[rows[i : i + _TILE]], features[rows[j : j + _TILE]]
            )
            scores[usable[part]] = matrix[top[part] - i, left[part] - j]
    return scores


class AdaptedToSets:
    """A detector for each data set, adapted to some images of it; no identity is used.

    Args:
        detector: made the features.
        embedded: features of all images.
        contents: SHA-256 of each record's file, ``None`` where only its latents are there.
        train: rows of the records to adapt to, by data set.
        reporter: told of each data set that it is not adapted to.

    Attributes:
        num_images: by data set, how many images its detector was adapted to; 0: it scores as it is.
    """

    def __init__(
        self,
        detector: Detector,
        embedded: Embedded,
        contents: Sequence[str | None],
        train: Mapping[str, Iterable[int]],
        *,
        reporter: Reporter = SILENT,
    ) -> None:
        self._embedded = embedded
        self._kinds: dict[str, Adapted] = {}
        rows, features = embedded.rows, embedded.features
        for name, records in train.items():
            # By feature row: copies of one image count once.
            content_of = {
                int(rows[r]): contents[r] or f"record {r}" for r in records if rows[r] >= 0
            }
            order = sorted(content_of)
            try:
                kind = detector.adapted(features[order], [content_of[row] for row in order])
            except NotAdaptableError as error:
                reporter.warn(f"data set {name} is scored as it is: {error}")
                kind = Adapted(detector, lambda part: part, 0)
            self._kinds[name] = kind
        self.num_images = {name: kind.num_images for name, kind in self._kinds.items()}

    def score(self, pairs: PairSet, *, dense: bool) -> NDArray[np.float64]:
        """Score pairs within data sets, as ``Embedded.score`` does."""
        whole = self._embedded
        scores = np.full(len(pairs), np.nan)
        for number, name in enumerate(pairs.names):
            own = pairs.dataset == number
            part = pairs.select(own)
            used = np.unique(whole.rows[np.concatenate([part.first, part.second])])
            used = used[used >= 0]
            place = np.where(whole.rows < 0, -1, np.searchsorted(used, whole.rows))
            kind = self._kinds[name]
            moved = Embedded(features=kind.convert(whole.features[used]), rows=place, unreadable=())
            scores[own] = moved.score(kind.detector, part, dense=dense)
        return scores


def fit_rates(
    scores: ArrayLike,
    labels: NDArray[np.int64],
    rates: Iterable[tuple[FitRule, float]],
    *,
    num_distinct: int,
    fingerprint: str,
    fitted_on: str,
) -> Fitted:
    """Fit the thresholds that the pairs support; for the others return the reason.

    Args:
        scores: ``[n]``.
        labels: ``[n]`` 1 where both images show one identity, else 0.
        rates: kind and rate of each threshold, see ``fit_threshold``.
        num_distinct: different negative pairs among them: repetitions support no smaller rate.
        fingerprint: of the detector that made the scores.
        fitted_on: the data, in words.
    """
    thresholds: dict[tuple[FitRule, float], Threshold] = {}
    reasons: dict[tuple[FitRule, float], str] = {}
    for kind, rate in rates:
        if kind == "recall" and not labels.any():
            reasons[kind, rate] = "no positive pairs"
        elif kind == "fpr" and num_distinct < (needed := required_negatives(rate)):
            lacking = f"{num_distinct} different negative pairs; a rate of {rate:g} needs {needed}"
            reasons[kind, rate] = lacking
        else:
            thresholds[kind, rate] = fit_threshold(
                scores, labels, kind=kind, rate=rate, fingerprint=fingerprint, fitted_on=fitted_on
            )
    return thresholds, reasons


def fit_on_split(
    scores: NDArray[np.float64],
    pairs: PairSet,
    rates: Iterable[tuple[FitRule, float]],
    *,
    fingerprint: str,
    split: str,
    what: str = "pairs",
) -> Fitted:
    """Fit thresholds on the pairs of a split, as ``fit_rates`` does.

    Args:
        scores: ``[n]``.
        pairs: of the split.
        rates: see ``fit_rates``.
        fingerprint: see ``fit_rates``.
        split: its name.
        what: the pairs are, in words.
    """
    num_distinct = pairs.num_distinct(0)
    return fit_rates(
        scores,
        pairs.labels,
        rates,
        num_distinct=num_distinct,
        fingerprint=fingerprint,
        fitted_on=(
            f"{split}: {pairs.num_positives} positive and {pairs.num_negatives} negative {what} "
            f"({num_distinct} different) of {len(np.unique(pairs.dataset))} data set(s)"
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """Measures scores of pairs of some records, with intervals over their identities.

    Attributes:
        records: that the pairs hold rows of.
        replicates: of the bootstrap.
        seed: of the bootstrap.
        target_recall: of the ``_atR`` metrics.
        thresholds: fitted on other pairs.
        reasons: by false-positive rate, why there is no threshold for it.
    """

    records: Sequence[Record]
    replicates: int
    seed: int = 0
    target_recall: float = DEFAULT_TARGET_RECALL
    thresholds: Sequence[Threshold] = ()
    reasons: Mapping[float, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _identities(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return identity_numbers(self.records)

    def __call__(self, scores: NDArray[np.float64], pairs: PairSet) -> SetResult:
        """Return the numbers of one data set, or of several together."""
        identity, strata = self._identities
        intervals: dict[str, tuple[float, float] | None] = {}
        metrics, problem = None, None
        try:
            metrics = pair_metrics(scores, pairs.labels, target_recall=self.target_recall)
            intervals = bootstrap_intervals(
                scores,
                pairs.labels,
                np.stack([identity[pairs.first], identity[pairs.second]], axis=1),
                strata=strata,
                thresholds={threshold.name: threshold.value for threshold in self.thresholds},
                target_recall=self.target_recall,
                replicates=self.replicates,
                seed=self.seed,
            )
        except InputError as error:  # one class only
            problem = str(error)
        at_fpr = [RateAtThreshold(rate=rate, reason=text) for rate, text in self.reasons.items()]
        for threshold in self.thresholds:
            tpr, fpr = rates_at(scores, pairs.labels, threshold.value)
            at = RateAtThreshold(
                rate=threshold.rate,
                threshold=threshold.value,
                tpr=tpr,
                fpr=fpr,
                tpr_interval=intervals.get(f"tpr_{threshold.name}"),
                fpr_interval=intervals.get(f"fpr_{threshold.name}"),
            )
            at_fpr.append(at)
        return SetResult(
            num_pairs=len(pairs),
            num_positives=pairs.num_positives,
            num_negatives=pairs.num_negatives,
            num_duplicates=pairs.num_duplicates,
            metrics=metrics,
            intervals={key: intervals.get(key) for key in INTERVAL_KEYS},
            at_fpr=tuple(sorted(at_fpr, key=lambda item: -item.rate)),
            problem=problem,
        )
