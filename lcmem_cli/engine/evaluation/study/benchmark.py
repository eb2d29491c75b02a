"""The published benchmark: how well detectors tell pairs of one identity from pairs of two.

Pairs, metrics and conventions are those of method.md section 5 (arXiv 2512.14421). Each distinct
image is embedded once per detector, whatever the number of pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.batching import Batching
from lcmem_cli.engine.data.loading import LoadedBatch, hash_files
from lcmem_cli.engine.data.manifest import Record, load_manifest
from lcmem_cli.engine.data.pairs import (
    PairSet,
    all_pairs,
    dataset_name,
    identity_numbers,
    reference_pairs,
)
from lcmem_cli.engine.detectors.adapted import some_images
from lcmem_cli.engine.detectors.base import Detector, score_listed
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.errors import InputError, NotAdaptableError
from lcmem_cli.engine.evaluation.calibration import fit_threshold, required_negatives
from lcmem_cli.engine.evaluation.metrics import (
    DEFAULT_TARGET_RECALL,
    INTERVAL_KEYS,
    METRIC_KEYS,
    bootstrap_intervals,
    check_target_recall,
    pair_metrics,
    rates_at,
    roc_curve,
)
from lcmem_cli.engine.evaluation.study.adapted_sets import AdaptedToSets
from lcmem_cli.engine.evaluation.study.folder import (
    DEFAULT_DETECTORS,
    THRESHOLDS_NAME,
    ResultsFolder,
    Skipped,
    all_unreadable,
    check_names,
    check_splits,
    content_digest,
    find_detectors,
    fit_records,
    named_unreadable,
    open_results,
    pack_json,
    pack_unreadable,
    refuse_adapted_to,
    score_dense,
    unpack_json,
    unpack_unreadable,
)
from lcmem_cli.engine.files import sha256_bytes, write_csv, write_json
from lcmem_cli.engine.report.plots import Bar, plot_bars, plot_roc
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Threshold, Unreadable
from lcmem_cli.engine.store.features import FeatureCaches
from lcmem_cli.engine.store.latents import LatentStore

JSON_NAME = "benchmark_results.json"
CSV_NAME = "benchmark_results.csv"
SCORES_NAME = "scores.csv"
ROC_NAME = "roc"
BARS_NAME = "bars"
OVERALL = "overall"
FPR_RATES = (0.01, 0.001)
RECALL_RATE = 0.95
FIT_NEGATIVES_PER_ANCHOR = 10
MAX_REPLICATES = 1000
MIN_REPLICATES = 100
_REPLICATE_CELLS = 500_000_000
_RESULT_FILES = (
    JSON_NAME,
    CSV_NAME,
    SCORES_NAME,
    THRESHOLDS_NAME,
    *(f"{name}{suffix}" for name in (ROC_NAME, BARS_NAME) for suffix in (".png", ".pdf")),
)
TEST_SCORES_NOTE = (
    "threshold_bestF1 and threshold_atR are picked on the scores that they are judged on, as in "
    "the published table"
)
FIT_NOTE = (
    "the rates at a false-positive rate use thresholds fitted on {fit_split}; the false-positive "
    "rate that they reach here is another (fpr_at in benchmark_results.csv)"
)
ADAPTED_NOTE = (
    "(adapted): each data set's pairs are scored by the detector adapted to its TRAIN images, "
    "whose identities are not used"
)

PairMode = Literal["reference", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateAtThreshold:
    """What a threshold from the fitting split does on the split that is judged.

    Attributes:
        rate: false-positive rate that the threshold was fitted for.
        threshold: its value; ``None`` where there were too few negatives to fit it.
        tpr: share of positives at or above it.
        fpr: share of negatives at or above it, which may differ from ``rate``.
        tpr_interval: bootstrap interval over identities.
        fpr_interval: the same for ``fpr``.
        reason: why there is no threshold.
    """

    rate: float
    threshold: float | None = None
    tpr: float | None = None
    fpr: float | None = None
    tpr_interval: tuple[float, float] | None = None
    fpr_interval: tuple[float, float] | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetResult:
    """A detector's numbers on one data set, or on all together.

    Attributes:
        num_pairs: pairs scored.
        num_positives: of one identity.
        num_negatives: of two.
        num_duplicates: pairs that repeat an earlier one.
        metrics: by ``metrics.METRIC_KEYS``; ``None`` with ``problem`` set.
        intervals: 95 % bootstrap intervals over identities by key.
        at_fpr: rates at thresholds from the fitting split.
        problem: why there are no metrics.
    """

    num_pairs: int
    num_positives: int
    num_negatives: int
    num_duplicates: int
    metrics: dict[str, float] | None
    intervals: dict[str, tuple[float, float] | None]
    at_fpr: tuple[RateAtThreshold, ...]
    problem: str | None = None

    def to_flat(self) -> dict[str, Any]:
        """Return the metrics beside the counts, all keys present."""
        values = dataclasses.asdict(self)
        metrics = values.pop("metrics") or dict.fromkeys(METRIC_KEYS)
        return {**metrics, **values}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorResult:
    """Everything about one detector.

    Attributes:
        name: as the user named it.
        fingerprint: of what was run.
        overall: over all pairs.
        per_dataset: by data set, sorted by name.
        thresholds: fitted on the fitting split.
        adapted_to: by data set, to how many of its TRAIN images the detector was adapted (0: it
            scored as it is); ``None``: to none of any.
    """

    name: str
    fingerprint: str
    overall: SetResult
    per_dataset: dict[str, SetResult]
    thresholds: tuple[Threshold, ...]
    adapted_to: dict[str, int] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkResult(Result):
    """A finished benchmark.

    Attributes:
        detectors: in the order asked for.
        skipped: detectors that could not run.
        split: that was judged.
        fit_split: that thresholds were fitted on; ``None``: none was asked for.
        pairs: how pairs were made.
        seed: of the pairs and the bootstrap.
        target_recall: of the ``_atR`` metrics.
        replicates: of the bootstrap.
        num_images: images that the pairs of both splits are made of, or that are adapted to.
        num_pairs: pairs of the split, before unreadable images were dropped.
        num_duplicates: pairs that repeat an earlier one.
        num_dropped: pairs dropped because an image was unreadable.
        num_fit_pairs: pairs that thresholds were fitted on.
        unreadable: images that could not be used.
        digest: SHA-256 over everything that the numbers depend on, except the detectors.
        notes: how the numbers are to be read.
    """

    detectors: tuple[DetectorResult, ...]
    skipped: tuple[Skipped, ...]
    split: str
    fit_split: str | None
    pairs: PairMode
    seed: int
    target_recall: float
    replicates: int
    num_images: int
    num_pairs: int
    num_duplicates: int
    num_dropped: int
    num_fit_pairs: int
    unreadable: tuple[Unreadable, ...]
    digest: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; detectors by name, each with ``overall`` and data sets."""
        values = super().to_dict()
        values["detectors"] = {
            item.name: {
                "fingerprint": item.fingerprint,
                OVERALL: item.overall.to_flat(),
                "per_dataset": {name: part.to_flat() for name, part in item.per_dataset.items()},
                "thresholds": [dataclasses.asdict(threshold) for threshold in item.thresholds],
                "adapted_to": item.adapted_to,
            }
            for item in self.detectors
        }
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Study:
    """Images and pairs of both splits; rows point into ``records``."""

    records: tuple[Record, ...]
    paired: tuple[Record, ...]
    basedir: Path
    test: PairSet
    fit: PairSet | None
    train: dict[str, list[int]]
    dense: bool
    fit_reason: str | None

    def score(
        self, detector: Detector, features: NDArray[Any], rows: NDArray[np.int64], pairs: PairSet
    ) -> NDArray[np.float64]:
        """Score pairs by the rows of features that each record has."""
        first, second = rows[pairs.first], rows[pairs.second]
        if self.dense:
            return score_dense(detector, features, first, second, pairs.dataset)
        return score_listed(detector, features, first, second)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scored:
    """A detector's scores; NaN where an image is unreadable."""

    name: str
    fingerprint: str
    test: NDArray[np.float64]
    fit: NDArray[np.float64]
    unreadable: list[Unreadable]
    adapted_to: dict[str, int] | None


def benchmark(
    filelist: Path,
    *,
    output: Path,
    basedir: Path | None = None,
    detectors: Sequence[str] = DEFAULT_DETECTORS,
    ds_names: Sequence[str] | None = None,
    pairs: PairMode = "reference",
    split: str = "TEST",
    fit_split: str | None = "VAL",
    seed: int = 42,
    target_recall: float = DEFAULT_TARGET_RECALL,
    input_size: int = 512,
    latents: Path | None = None,
    adapt: bool = False,
    strict: bool = False,
    cache: bool = True,
    overwrite: bool = False,
    max_unreadable: int | None = None,
    device: str = "auto",
    batch_size: int = 32,
    workers: int = -1,
    reporter: Reporter = SILENT,
) -> BenchmarkResult:
    """Run the benchmark and write its tables and plots.

    Args:
        filelist: images with identities and splits; a split is made where there is none.
        output: folder for ``benchmark_results.json``, ``benchmark_results.csv``, ``scores.csv``,
            ``thresholds.json`` and plots. Finished parts are kept there, so that a killed run
            continues.
        basedir: folder that paths start from.
        detectors: names, see ``registry.load_detector``.
        ds_names: data sets to use; all by default.
        pairs: the published ones, or every pair within each data set.
        split: to judge.
        fit_split: to fit thresholds on, by the same rule of pairing (the published one with
            ``FIT_NEGATIVES_PER_ANCHOR`` negatives an image, for want of negatives); ``None``:
            fit none.
        seed: of the pairs and the bootstrap.
        target_recall: of the ``_atR`` metrics, in (0, 1].
        input_size: side in pixels for the pixel measures.
        latents: a latent store; LCMem detectors take stored latents instead of images.
        adapt: also score with each detector that can be adapted to the TRAIN images of each data
            set (``detectors.adapted``), as ``NAME (adapted)``.
        strict: fail where a detector's weights cannot be had, instead of leaving it out.
        cache: keep features in the user's cache, so that other runs need no encoder pass.
        overwrite: replace the results of another study in ``output``.
        max_unreadable: unreadable images to tolerate, with ``adapt`` those of TRAIN as well;
            ``None``: any number.
        device: where to compute.
        batch_size: images per network call; scores change by rounding at most.
        workers: decoding threads; -1 from the CPUs.
        reporter: receives progress and warnings.

    Raises:
        InputError: an argument is wrong, no pairs can be made, ``output`` holds another study, or
            the stored latents are not the detector's.
        NotAdaptableError: ``adapt`` is asked for, and no detector can be adapted.
        WeightsUnavailableError: no detector can run, or one cannot and ``strict`` is set.
        UnreadableLimitError: more images than ``max_unreadable`` could not be read.
        FolderBusyError: another process writes to ``output``.

    Example:
        >>> result = benchmark(Path("filelist.csv"), output=Path("out"), detectors=["mse"])
        >>> result.detectors[0].overall.metrics["auc"]
    """
    check_target_recall(target_recall)
    check_names(detectors)
    check_splits(split, fit_split)
    if adapt and "TRAIN" in (split, fit_split):
        raise InputError("--adapt: TRAIN is adapted to, so it cannot be judged or fitted on")
    compute = Compute.start(
        device=device,
        batch_size=batch_size,
        workers=workers,
        reporter=reporter,
        cache=FeatureCaches.of_user() if cache else None,
    )
    ranks, reporter = compute.ranks, compute.reporter
    store = None if latents is None else LatentStore.open(latents)
    study = _make_study(
        filelist,
        basedir=basedir,
        ds_names=ds_names,
        splits=(split, fit_split),
        pairs=pairs,
        seed=seed,
        adapt=adapt,
        max_missing=None if store is not None else max_unreadable,
        reporter=reporter,
    )
    available = find_detectors(
        detectors, device=device, input_size=input_size, strict=strict, reporter=reporter
    )
    if adapt and not available.adaptable:
        raise NotAdaptableError(
            "--adapt: none of the detectors can be adapted; only LCMem networks, and joint, can be"
        )
    contents = hash_files([study.basedir / record.path for record in study.records], compute)[0]
    if store is not None:
        listed = [record.path for record in study.records]
        store.check_unchanged(dict(zip(listed, contents, strict=True)))
    inputs = {
        "command": "benchmark",
        "images_digest": content_digest(study.records, contents),
        "latents_digest": store.manifest_digest if store is not None else None,
        "pairs": pairs,
        "pairs_digest": study.test.digest,
        "fit_pairs_digest": None if study.fit is None else study.fit.digest,
        "split": split,
        "fit_split": fit_split,
        "seed": seed,
        "target_recall": target_recall,
        "adapt": adapt,
    }
    config = {
        **inputs,
        "filelist": filelist,
        "basedir": study.basedir,
        "detectors": list(detectors),
        "ds_names": list(ds_names) if ds_names else None,
        "input_size": input_size,
        "latents": latents,
    }
    fingerprints: dict[str, str] = {}
    variants: dict[str, list[str]] = {}
    for name, fingerprint in available.fingerprints.items():
        fingerprints[name], variants[name] = fingerprint, [name]
        if adapt and name in available.adaptable:
            adapted = f"{name} (adapted)"
            fingerprints[adapted] = sha256_bytes(f"adapted to sets/{fingerprint}".encode())
            variants[name].append(adapted)
    result: BenchmarkResult | None = None
    with open_results(
        output,
        inputs,
        fingerprints,
        config=config,
        results=_RESULT_FILES,
        overwrite=overwrite,
        ranks=ranks,
    ) as folder:
        scored: list[_Scored] = []
        for name, asked in variants.items():
            # What a latent store lacks, it lacks whether or not the image can be read by now.
            base = study.basedir if store is None else None
            is_done = folder is not None and all(
                folder.has(variant, fingerprints[variant], basedir=base) for variant in asked
            )
            if not ranks.broadcast(is_done):
                detector = available.take(name)
                refuse_adapted_to(detector, study.paired, contents[: len(study.paired)])
                made = _score(
                    detector,
                    study,
                    contents,
                    store if isinstance(detector, LCMemDetector) else None,
                    adapted=len(asked) > 1,
                    compute=compute,
                )
                if folder is not None:
                    for variant, arrays in zip(asked, made, strict=True):
                        folder.save(arrays, variant, fingerprints[variant])
                del detector
            if folder is not None:
                scored += [_load_scored(folder, v, fingerprints[v]) for v in asked]
        if folder is not None:
            result = _conclude(
                study,
                scored,
                available.skipped,
                limit=max_unreadable,
                options={
                    "pairs": pairs,
                    "split": split,
                    "fit_split": fit_split,
                    "seed": seed,
                    "target_recall": target_recall,
                    "digest": folder.digest,
                },
                folder=output,
                reporter=reporter,
            )
        result = ranks.broadcast(result)
    assert result is not None
    return result


def make_pairs(
    records: Sequence[Record],
    mode: PairMode,
    *,
    seed: int,
    column: Iterable[str],
    negatives_per_anchor: int = 1,
) -> PairSet:
    """Return the pairs of a benchmark; see ``pairs.reference_pairs`` and ``pairs.all_pairs``."""
    if mode == "all":
        return all_pairs(records)
    return reference_pairs(records, seed, column=column, negatives_per_anchor=negatives_per_anchor)


def _make_study(
    filelist: Path,
    *,
    basedir: Path | None,
    ds_names: Sequence[str] | None,
    splits: tuple[str, str | None],
    pairs: PairMode,
    seed: int,
    adapt: bool,
    max_missing: int | None,
    reporter: Reporter,
) -> _Study:
    manifest = load_manifest(filelist, basedir=basedir, max_missing=max_missing)
    column = [record.id for record in manifest.records]
    judged = manifest.select(splits[0], ds_names)
    if not judged.records:
        raise InputError(f"{filelist}: no image has the split {splits[0]}")
    test = make_pairs(judged.records, pairs, seed=seed, column=column)
    if not len(test):
        raise InputError(
            f"{filelist}: no pairs can be made of the {len(judged):,} image(s) of {splits[0]}: "
            "no identity has two images"
        )
    fit: PairSet | None = None
    fit_from: tuple[Record, ...] = ()
    if splits[1] is not None:
        fit_from = fit_records(manifest.select(splits[1], ds_names), reporter)
    if fit_from:
        made = make_pairs(
            fit_from,
            pairs,
            seed=seed,
            column=column,
            negatives_per_anchor=FIT_NEGATIVES_PER_ANCHOR,
        )
        fit = made.shifted(len(judged.records))
    if fit is not None and not (fit.num_positives and fit.num_negatives):
        fit = None
    reason = None if splits[1] is not None else "no split to fit thresholds on was asked for"
    if fit is None and splits[1] is not None:
        reason = f"{splits[1]} holds no positive and negative pairs to fit a threshold on"
        reporter.warn(f"no rates at fixed false-positive rates: {reason}")
    records = [*judged.records, *fit_from]
    train: dict[str, list[int]] = {}
    if adapt:
        for name in dict.fromkeys(dataset_name(record) for record in records):
            own = [r for r in manifest.select("TRAIN").records if dataset_name(r) == name]
            chosen = some_images(own)
            train[name] = list(range(len(records), len(records) + len(chosen)))
            records += chosen
    return _Study(
        records=tuple(records),
        paired=(*judged.records, *fit_from),
        basedir=manifest.basedir,
        test=test,
        fit=fit,
        train=train,
        dense=pairs == "all",
        fit_reason=reason,
    )


def _score(
    detector: Detector,
    study: _Study,
    contents: Sequence[str | None],
    store: LatentStore | None,
    *,
    adapted: bool,
    compute: Compute,
) -> list[dict[str, NDArray[Any]]]:
    """Embed every image that is needed, once, and score the pairs of both splits.

    Returns:
        In the first process what ``_Scored`` holds, as arrays: of the detector as it is, and if
        asked for, of the one adapted to each data set.
    """
    pair_sets = [study.test] if study.fit is None else [study.test, study.fit]
    ends = [end for pairs in pair_sets for end in (pairs.first, pairs.second)]
    if adapted:
        ends += [np.asarray(records, dtype=np.int64) for records in study.train.values()]
    needed = np.unique(np.concatenate(ends))
    rows = np.full(len(study.records), -1, dtype=np.int64)
    if store is not None:
        assert isinstance(detector, LCMemDetector)
        features, rows[needed], unreadable = _embed_stored(detector, study, needed, store, compute)
    else:
        chosen = [study.records[row] for row in needed]
        embedded = embed_files(
            detector,
            [study.basedir / record.path for record in chosen],
            compute,
        )
        features, rows[needed] = embedded.features, embedded.rows
        unreadable = named_unreadable(chosen, study.basedir, embedded.unreadable)
        compute.reporter.event(
            "embedded",
            detector=detector.name,
            images=len(needed),
            distinct=len(features),
            encoder_passes=embedded.encoder_passes,
        )
    if not compute.ranks.is_main:
        return []
    scores = [[study.score(detector, features, rows, pairs) for pairs in pair_sets]]
    adapted_to: list[dict[str, int] | None] = [None]
    if adapted:
        paired = {content for content in contents[: len(study.paired)] if content is not None}
        train = {
            name: [row for row in own if contents[row] not in paired]
            for name, own in study.train.items()
        }
        kinds = AdaptedToSets(detector, features, rows, contents, train, reporter=compute.reporter)
        scores.append([kinds.scores(pairs, study.score) for pairs in pair_sets])
        adapted_to.append(kinds.num_images)
    return [
        {
            "test": test,
            "fit": fit[0] if fit else np.zeros(0),
            "unreadable": pack_unreadable(unreadable),
            "adapted_to": pack_json(counts),
        }
        for (test, *fit), counts in zip(scores, adapted_to, strict=True)
    ]


def _embed_stored(
    detector: LCMemDetector,
    study: _Study,
    needed: NDArray[np.int64],
    store: LatentStore,
    compute: Compute,
) -> tuple[NDArray[Any], NDArray[np.int64], list[Unreadable]]:
    """Embed stored latents; left-out images, and those without finite features, are unreadable."""
    check_latents(detector, store)
    known = {record.path: row for row, record in enumerate(store.records)}
    left_out = {item.path: item.reason for item in store.unreadable}
    paths = [study.records[row].path for row in needed]
    unreadable = [
        Unreadable(path=path, reason=left_out[path])
        for path in paths
        if path not in known and path in left_out
    ]
    missing = [path for path in paths if path not in known and path not in left_out]
    if missing:
        raise InputError(
            f"{store.folder}: has no latents of {len(missing):,} of {len(paths):,} images, the "
            f"first is {missing[0]!r}; make them with lcmem latents on the same filelist"
        )
    present = [position for position, path in enumerate(paths) if path in known]
    mine = list(compute.ranks.share(present))
    batching = Batching(compute.batch_size, detector.device, reporter=compute.reporter)
    parts: list[NDArray[Any]] = []
    kept: list[int] = []
    failed: list[tuple[int, str]] = []
    with compute.reporter.task(
        f"embedding latents ({detector.name})", len(mine), unit="image"
    ) as task:
        for start in range(0, len(mine), batching.loaded):
            numbers = mine[start : start + batching.loaded]
            latents = store.latents([known[paths[number]] for number in numbers])
            indices, pieces, bad = batching.embed(
                detector.embed_latents,
                LoadedBatch(indices=numbers, images=latents, unreadable=[]),
            )
            kept += indices
            parts += pieces
            failed += bad
            task.advance(len(numbers))
    features = np.zeros((len(present), detector.num_features), dtype=np.float32)
    row_of = np.full(len(paths), -1, dtype=np.int64)
    used = 0
    for numbers, rows, bad in compute.ranks.gather((kept, parts, failed)):
        if numbers:
            row_of[numbers] = np.arange(used, used + len(numbers))
            features[row_of[numbers]] = np.concatenate(rows)
            used += len(numbers)
        unreadable += [Unreadable(path=paths[number], reason=reason) for number, reason in bad]
    return features[:used], row_of, unreadable


def check_latents(detector: LCMemDetector, store: LatentStore) -> None:
    """Refuse latents that another codec made than the one the detector was trained with.

    Raises:
        InputError: another codec, another way of feeding it, or another image size.
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


def _load_scored(folder: ResultsFolder, name: str, fingerprint: str) -> _Scored:
    arrays = folder.load(name, fingerprint)
    assert arrays is not None
    return _Scored(
        name=name,
        fingerprint=fingerprint,
        test=arrays["test"],
        fit=arrays["fit"],
        unreadable=unpack_unreadable(arrays["unreadable"]),
        adapted_to=unpack_json(arrays["adapted_to"]),
    )


def _conclude(
    study: _Study,
    scored: Sequence[_Scored],
    skipped: tuple[Skipped, ...],
    *,
    limit: int | None,
    options: dict[str, Any],
    folder: Path,
    reporter: Reporter,
) -> BenchmarkResult:
    """Drop the pairs that any detector could not score, compute everything, and write it."""
    unreadable = all_unreadable([part.unreadable for part in scored], limit, reporter)
    keep = ~np.any([np.isnan(part.test) for part in scored], axis=0)
    test = study.test.select(keep)
    if not len(test):
        raise InputError("no pair is left: each holds an image that could not be read")
    fit = study.fit
    fit_keep = np.zeros(0, dtype=np.bool_)
    if fit is not None:
        fit_keep = ~np.any([np.isnan(part.fit) for part in scored], axis=0)
        fit = fit.select(fit_keep)
    replicates = int(np.clip(_REPLICATE_CELLS // len(test), MIN_REPLICATES, MAX_REPLICATES))
    results: list[DetectorResult] = []
    judged = [(part, part.test[keep]) for part in scored]
    with reporter.task("metrics", len(judged), unit="detector") as task:
        for part, scores in judged:
            results.append(
                _judge(
                    part,
                    scores,
                    test,
                    study,
                    fit_scores=part.fit[fit_keep],
                    fit=fit,
                    options=options,
                    replicates=replicates,
                )
            )
            task.advance()
    notes = [TEST_SCORES_NOTE]
    if options["fit_split"] is not None:
        notes.append(FIT_NOTE.format(fit_split=options["fit_split"]))
    if any(part.adapted_to is not None for part in scored):
        notes.append(ADAPTED_NOTE)
    result = BenchmarkResult(
        detectors=tuple(results),
        skipped=skipped,
        replicates=replicates,
        num_images=len(study.records),
        num_pairs=len(study.test),
        num_duplicates=study.test.num_duplicates,
        num_dropped=int((~keep).sum()),
        num_fit_pairs=0 if fit is None else len(fit),
        unreadable=unreadable,
        notes=tuple(notes),
        **options,
    )
    _write(folder, result, study, test, judged)
    return result


def _judge(
    part: _Scored,
    scores: NDArray[np.float64],
    test: PairSet,
    study: _Study,
    *,
    fit_scores: NDArray[np.float64],
    fit: PairSet | None,
    options: Mapping[str, Any],
    replicates: int,
) -> DetectorResult:
    thresholds, reasons = _fit(part, fit_scores, fit, study, options["fit_split"])
    identity, strata = identity_numbers(study.records)

    def judge(chosen: NDArray[np.bool_] | None) -> SetResult:
        pairs = test if chosen is None else test.select(chosen)
        values = scores if chosen is None else scores[chosen]
        return _measure(
            values,
            pairs,
            identity,
            strata,
            thresholds=[t for t in thresholds if t.kind == "fpr"],
            reasons=reasons,
            target_recall=options["target_recall"],
            replicates=replicates,
            seed=options["seed"],
        )

    numbers = {name: number for number, name in enumerate(test.names)}
    present = set(np.unique(study.test.dataset).tolist())
    return DetectorResult(
        name=part.name,
        fingerprint=part.fingerprint,
        overall=judge(None),
        per_dataset={
            name: judge(test.dataset == numbers[name])
            for name in sorted(numbers)
            if numbers[name] in present
        },
        thresholds=tuple(thresholds),
        adapted_to=part.adapted_to,
    )


def _fit(
    part: _Scored,
    scores: NDArray[np.float64],
    pairs: PairSet | None,
    study: _Study,
    split: str | None,
) -> tuple[list[Threshold], dict[float, str]]:
    """Fit what the number of different pairs supports; say why not for the other rates."""
    if pairs is None or not (pairs.num_positives and pairs.num_negatives):
        reason = study.fit_reason or f"no readable positive and negative pairs in {split}"
        return [], dict.fromkeys(FPR_RATES, reason)
    distinct = pairs.num_distinct(0)
    fitted_on = (
        f"{split}: {pairs.num_positives} positive and {pairs.num_negatives} negative pairs "
        f"({distinct} different) of {len(np.unique(pairs.dataset))} data set(s)"
    )
    kinds: list[tuple[Literal["fpr", "recall"], float]] = [("fpr", rate) for rate in FPR_RATES]
    thresholds: list[Threshold] = []
    reasons: dict[float, str] = {}
    for kind, rate in [*kinds, ("recall", RECALL_RATE)]:
        if kind == "fpr" and distinct < required_negatives(rate):
            reasons[rate] = (
                f"{split} has {distinct} different negative pairs; a rate of {rate:g} needs "
                f"{required_negatives(rate)}"
            )
            continue
        thresholds.append(
            fit_threshold(
                scores,
                pairs.labels,
                kind=kind,
                rate=rate,
                fingerprint=part.fingerprint,
                fitted_on=fitted_on,
            )
        )
    return thresholds, reasons


def _measure(
    scores: NDArray[np.float64],
    pairs: PairSet,
    identity: NDArray[np.int64],
    strata: NDArray[np.int64],
    *,
    thresholds: Sequence[Threshold],
    reasons: Mapping[float, str],
    target_recall: float,
    replicates: int,
    seed: int,
) -> SetResult:
    cuts = {threshold.name: threshold.value for threshold in thresholds}
    intervals: dict[str, tuple[float, float] | None] = {}
    metrics, problem = None, None
    try:
        metrics = pair_metrics(scores, pairs.labels, target_recall=target_recall)
        intervals = bootstrap_intervals(
            scores,
            pairs.labels,
            identity[pairs.first],
            identity[pairs.second],
            strata=strata,
            thresholds=cuts,
            target_recall=target_recall,
            replicates=replicates,
            seed=seed,
        )
    except InputError as error:  # one class only
        problem = str(error)
    at_fpr = [RateAtThreshold(rate=rate, reason=reason) for rate, reason in reasons.items()]
    for threshold in thresholds:
        tpr, fpr = rates_at(scores, pairs.labels, threshold.value)
        at_fpr.append(
            RateAtThreshold(
                rate=threshold.rate,
                threshold=threshold.value,
                tpr=tpr,
                fpr=fpr,
                tpr_interval=intervals.get(f"tpr_{threshold.name}"),
                fpr_interval=intervals.get(f"fpr_{threshold.name}"),
            )
        )
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


def _write(
    folder: Path,
    result: BenchmarkResult,
    study: _Study,
    test: PairSet,
    judged: Sequence[tuple[_Scored, NDArray[np.float64]]],
) -> None:
    """Write everything; the JSON file last, so that where it stands the rest does too."""
    (folder / JSON_NAME).unlink(missing_ok=True)
    write_csv(
        folder / SCORES_NAME,
        ("path_a", "path_b", "label", "ds_name", *(part.name for part, _ in judged)),
        _score_rows(study, test, [scores for _, scores in judged]),
    )
    columns, rows = _table(result)
    write_csv(folder / CSV_NAME, columns, rows)
    write_json(
        folder / THRESHOLDS_NAME,
        {item.name: [dataclasses.asdict(t) for t in item.thresholds] for item in result.detectors},
    )
    curves = {}
    for item, (_, scores) in zip(result.detectors, judged, strict=True):
        if item.overall.metrics is not None:
            fpr, tpr, _ = roc_curve(scores, test.labels)
            curves[item.name] = (fpr, tpr, item.overall.metrics["auc"])
    if curves:
        plot_roc(curves, folder / ROC_NAME)
        plot_bars(_bars(result), folder / BARS_NAME)
    write_json(folder / JSON_NAME, result.to_dict())


def _score_rows(
    study: _Study, test: PairSet, scores: Sequence[NDArray[np.float64]]
) -> Iterator[tuple[str, ...]]:
    for number in range(len(test)):
        first, second = (study.records[rows[number]] for rows in (test.first, test.second))
        yield (
            first.path,
            second.path,
            str(int(test.labels[number])),
            dataset_name(first),
            *(repr(float(column[number])) for column in scores),
        )


def _table(result: BenchmarkResult) -> tuple[list[str], list[list[str]]]:
    rates = [f"fpr{rate:g}" for rate in FPR_RATES]
    columns = [
        "detector",
        "ds_name",
        *METRIC_KEYS,
        *(f"{key}_{end}" for key in INTERVAL_KEYS for end in ("low", "high")),
        *(
            f"{what}_{name}"
            for name in rates
            for what in ("threshold", "tpr_at", "fpr_at", "tpr_low", "tpr_high")
        ),
        "num_positives",
        "num_negatives",
        "num_duplicates",
    ]
    rows = []
    for item in result.detectors:
        for name, part in [(OVERALL, item.overall), *item.per_dataset.items()]:
            metrics: Mapping[str, float | None] = part.metrics or {}
            cells: list[Any] = [metrics.get(key) for key in METRIC_KEYS]
            for key in INTERVAL_KEYS:
                cells += part.intervals.get(key) or (None, None)
            for at in part.at_fpr:
                cells += [at.threshold, at.tpr, at.fpr, *(at.tpr_interval or (None, None))]
            cells += [part.num_positives, part.num_negatives, part.num_duplicates]
            rows.append([item.name, name, *("" if c is None else str(c) for c in cells)])
    return columns, rows


def _bars(result: BenchmarkResult) -> dict[str, dict[str, Bar | None]]:
    panels: dict[str, dict[str, Bar | None]] = {"AUC": {}}
    for item in result.detectors:
        metrics = item.overall.metrics
        if metrics is not None:
            ends = item.overall.intervals.get("auc") or (None, None)
            panels["AUC"][item.name] = (metrics["auc"], *ends)
        for at in item.overall.at_fpr:
            panel = panels.setdefault(f"TPR at {100 * at.rate:g} % FPR of {result.fit_split}", {})
            ends = at.tpr_interval or (None, None)
            panel[item.name] = None if at.tpr is None else (at.tpr, *ends)
    return panels
