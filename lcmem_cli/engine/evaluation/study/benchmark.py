"""The published benchmark: how well detectors tell pairs of one identity from pairs of two.

Pairs, metrics and conventions are those of method.md section 5 (arXiv 2512.14421). Each distinct
image is embedded once per detector, whatever the number of pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.loading import hash_files
from lcmem_cli.engine.data.manifest import Manifest, Reading, Record
from lcmem_cli.engine.data.pairs import PairSet, all_pairs, dataset_name, reference_pairs
from lcmem_cli.engine.data.tables import STANDARD, ListColumns
from lcmem_cli.engine.detectors.adapted import some_images
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.errors import InputError, NotAdaptableError
from lcmem_cli.engine.evaluation.metrics import DEFAULT_TARGET_RECALL, check_target_recall
from lcmem_cli.engine.evaluation.study.detectors import find_detectors
from lcmem_cli.engine.evaluation.study.files import BENCHMARK_FILES, write_benchmark
from lcmem_cli.engine.evaluation.study.folder import Part, PartKey
from lcmem_cli.engine.evaluation.study.pairs import StudyImages, pair_images
from lcmem_cli.engine.evaluation.study.request import DEFAULT_DETECTORS, StudyRequest
from lcmem_cli.engine.evaluation.study.results import (
    BenchmarkResult,
    DetectorResult,
    FitRule,
    PairMode,
    SetResult,
)
from lcmem_cli.engine.evaluation.study.runner import Scored, ScoredDetector, Study, run_study
from lcmem_cli.engine.evaluation.study.scoring import (
    AdaptedToSets,
    Embedded,
    Measure,
    check_latents,
    embed_listed,
    embed_stored,
    fit_on_split,
    listed_files,
)
from lcmem_cli.engine.files import sha256_bytes
from lcmem_cli.engine.precision import AskedPrecision
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Threshold
from lcmem_cli.engine.store.latents import LatentStore

FPR_RATES = (0.01, 0.001)
RECALL_RATE = 0.95
FIT_NEGATIVES_PER_ANCHOR = 10
MAX_REPLICATES = 1000
MIN_REPLICATES = 100
FEW_IDENTITIES = 30
_REPLICATE_CELLS = 500_000_000
TEST_SCORES_NOTE = (
    "threshold_bestF1 and threshold_atR are picked on the scores that they are judged on, as in "
    "the published table"
)
FIT_NOTE = (
    "the rates at a false-positive rate use thresholds fitted on {fit_split}; the false-positive "
    "rate that they reach here is another (fpr_at in benchmark_results.csv)"
)
FEW_NOTE = "{count} identities are few: intervals by bootstrap are rough, however wide"
ADAPTED_NOTE = (
    "(adapted): each data set's pairs are scored by the detector adapted to its TRAIN images, "
    "whose identities are not used"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkRequest(StudyRequest):
    """The arguments of ``benchmark``, which explains them."""

    pairs: PairMode
    target_recall: float
    latents: Path | None
    adapt: bool
    latex: bool

    def __post_init__(self) -> None:
        """Refuse what can be refused before any work."""
        check_target_recall(self.target_recall)
        super().__post_init__()
        if self.adapt and "TRAIN" in (self.split, self.fit_split):
            raise InputError("--adapt: TRAIN is adapted to, so it cannot be judged or fitted on")

    def make_pairs(
        self, records: Sequence[Record], *, column: Sequence[str], fitting: bool
    ) -> PairSet:
        """Return the pairs of one split, see ``StudyRequest``."""
        if self.pairs == "all":
            return all_pairs(records)
        count = FIT_NEGATIVES_PER_ANCHOR if fitting else 1
        return reference_pairs(records, self.seed, column=column, negatives_per_anchor=count)


# Long by its arguments and what is said of each: the public signature stays flat.
def benchmark(
    filelist: Path,
    *,
    output: Path,
    basedir: Path | None = None,
    columns: ListColumns = STANDARD,
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
    latex: bool = False,
    strict: bool = False,
    cache: bool = True,
    overwrite: bool = False,
    max_unreadable: int | None = None,
    device: str = "auto",
    precision: AskedPrecision | None = None,
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
        columns: what the filelist calls its columns.
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
        latex: also write the tables as ``benchmark_results.tex``.
        strict: fail where a detector's weights cannot be had, instead of leaving it out.
        cache: keep features in the user's cache, so that other runs need no encoder pass.
        overwrite: replace the results of another study in ``output``.
        max_unreadable: unreadable images to tolerate, with ``adapt`` those of TRAIN as well;
            ``None``: any number.
        device: where to compute.
        precision: what all detectors compute in, see ``registry.at_precision``.
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
    request = BenchmarkRequest(
        filelist=filelist,
        output=output,
        reading=Reading(basedir=basedir, columns=columns, max_unreadable=max_unreadable),
        detectors=detectors,
        ds_names=ds_names,
        pairs=pairs,
        split=split,
        fit_split=fit_split,
        seed=seed,
        target_recall=target_recall,
        input_size=input_size,
        latents=latents,
        adapt=adapt,
        latex=latex,
        strict=strict,
        overwrite=overwrite,
    )
    compute = Compute.start(
        device=device,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
        reporter=reporter,
        cache=cache,
    )
    return run_study(Benchmark.prepare(request, compute), compute)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(Study[BenchmarkResult]):
    """A benchmark whose images, pairs and detectors are known.

    Attributes:
        store: latents that LCMem detectors take instead of images.
        train: rows of the records that a detector is adapted to, by data set.
        no_fit: why no thresholds are fitted; empty where they are.
    """

    command = "benchmark"
    result_files = BENCHMARK_FILES
    request: BenchmarkRequest
    store: LatentStore | None
    train: dict[str, list[int]]
    no_fit: str

    @classmethod
    def prepare(cls, request: BenchmarkRequest, compute: Compute) -> Benchmark:
        """Make the pairs and find the detectors; see ``benchmark`` for the errors."""
        store = None if request.latents is None else LatentStore.open(request.latents)
        reading = request.reading
        if store is not None:  # where latents are stored, the files may have gone
            reading = dataclasses.replace(reading, max_unreadable=None)
        manifest = reading.load(request.filelist, need_split=True)
        images = pair_images(manifest, request, compute.reporter)
        if not len(images.test):
            raise InputError(
                f"{request.filelist}: no pairs can be made of the {images.num_judged:,} image(s) "
                f"of {request.split}: no identity has two images"
            )
        images, no_fit = _checked_fit(images, request, compute.reporter)
        train: dict[str, list[int]] = {}
        if request.adapt:
            images, train = _with_train(images, manifest)
        available = find_detectors(request, compute)
        if request.adapt and not available.adaptable:
            raise NotAdaptableError(
                "--adapt: none of the detectors can be adapted; only LCMem networks, and joint, "
                "can be"
            )
        contents = hash_files(images.paths(), compute)[0]
        if store is not None:
            listed = [record.path for record in images.records]
            store.check_unchanged(dict(zip(listed, contents, strict=True)))
        return cls(
            request=request,
            images=images,
            contents=contents,
            available=available,
            store=store,
            train=train,
            no_fit=no_fit,
        )

    @property
    def reads_images(self) -> bool:
        """What a latent store lacks, it lacks whether or not the image can be read by now."""
        return self.store is None

    def keys(self, name: str, fingerprint: str) -> list[PartKey]:
        """Return the detector as it is and, if asked for, adapted to each data set."""
        keys = [PartKey(name, fingerprint)]
        if self.request.adapt and name in self.available.adaptable:
            adapted = sha256_bytes(f"adapted to sets/{fingerprint}".encode())
            keys.append(PartKey(f"{name} (adapted)", adapted))
        return keys

    def inputs(self) -> dict[str, Any]:
        """Return what the scores and metrics depend on."""
        request, images = self.request, self.images
        return {
            "latents_digest": None if self.store is None else self.store.manifest_digest,
            "pairs": request.pairs,
            "pairs_digest": images.test.digest,
            "fit_pairs_digest": None if images.fit is None else images.fit.digest,
            "split": request.split,
            "fit_split": request.fit_split,
            "seed": request.seed,
            "target_recall": request.target_recall,
            "adapt": request.adapt,
        }

    def config(self) -> dict[str, Any]:
        """Return the other options."""
        return {"input_size": self.request.input_size, "latents": self.request.latents}

    def score(
        self, missing: Sequence[tuple[Detector, Sequence[PartKey]]], compute: Compute
    ) -> Iterator[tuple[PartKey, Part]]:
        """Embed every image that is needed, once, and score the pairs of both splits."""
        for detector, keys in missing:
            yield from self._score(detector, keys, compute)

    def _score(
        self, detector: Detector, missing: Sequence[PartKey], compute: Compute
    ) -> Iterator[tuple[PartKey, Part]]:
        adapts = any(key.fingerprint != detector.fingerprint for key in missing)
        embedded = self._embed(detector, adapts, compute)
        if not compute.ranks.is_main:
            return
        dense = self.request.pairs == "all"
        for key in missing:
            if key.fingerprint == detector.fingerprint:
                counts = None
                test, *fit = (
                    embedded.score(detector, pairs, dense=dense) for pairs in self.images.pair_sets
                )
            else:
                kinds = AdaptedToSets(
                    detector, embedded, self.contents, self._strangers(), reporter=compute.reporter
                )
                counts = kinds.num_images
                test, *fit = (kinds.score(pairs, dense=dense) for pairs in self.images.pair_sets)
            yield (
                key,
                Part(
                    test=test,
                    fit=fit[0] if fit else None,
                    unreadable=embedded.unreadable,
                    adapted_to=counts,
                ),
            )

    def _embed(self, detector: Detector, adapts: bool, compute: Compute) -> Embedded:
        images = self.images
        needed = set(images.rows_in_pairs.tolist())
        if adapts:
            needed.update(*self.train.values())
        rows = sorted(needed)
        if self.store is not None and isinstance(detector, LCMemDetector):
            check_latents(detector, self.store)
            return embed_stored(detector, self.store, images.records, rows, compute)
        made = embed_files(
            detector,
            listed_files(images.records, images.basedir, rows),
            compute,
            contents=[self.contents[row] for row in rows],
        )
        return embed_listed(
            images.records, images.basedir, rows, made, compute.reporter, detector=detector.name
        )

    def _strangers(self) -> dict[str, list[int]]:
        """Return what to adapt to: no image that is judged, under whatever name."""
        paired = set(self.contents[: self.images.num_paired]) - {None}
        return {
            name: [row for row in rows if self.contents[row] not in paired]
            for name, rows in self.train.items()
        }

    def conclude(self, scored: Scored, reporter: Reporter) -> BenchmarkResult:
        """Fit thresholds, measure, and write tables and plots."""
        if not len(scored.test):
            raise InputError("no pair is left: each holds an image that could not be read")
        request = self.request
        replicates = int(
            np.clip(_REPLICATE_CELLS // len(scored.test), MIN_REPLICATES, MAX_REPLICATES)
        )
        results = []
        with reporter.task("metrics", len(scored.detectors), unit="detector") as task:
            for item in scored.detectors:
                results.append(self._judge(item, scored, replicates))
                task.advance()
        notes = [TEST_SCORES_NOTE]
        if request.fit_split is not None:
            notes.append(FIT_NOTE.format(fit_split=request.fit_split))
        if any(item.adapted_to is not None for item in results):
            notes.append(ADAPTED_NOTE)
        rows = np.unique(np.concatenate([scored.test.first, scored.test.second]))
        identities = len({self.images.records[row].identity for row in rows})
        if identities < FEW_IDENTITIES:
            notes.append(FEW_NOTE.format(count=identities))
        result = BenchmarkResult(
            detectors=tuple(results),
            pairs=request.pairs,
            target_recall=request.target_recall,
            replicates=replicates,
            num_duplicates=self.images.test.num_duplicates,
            notes=tuple(notes),
            **scored.common,
        )
        write_benchmark(request.output, result, scored, self.images.records, latex=request.latex)
        return result

    def _judge(self, item: ScoredDetector, scored: Scored, replicates: int) -> DetectorResult:
        part, test = item.parts[""], scored.test
        thresholds, reasons = self._fit(item, scored.fit)
        measure = Measure(
            records=self.images.records,
            replicates=replicates,
            seed=self.request.seed,
            target_recall=self.request.target_recall,
            thresholds=[threshold for threshold in thresholds if threshold.kind == "fpr"],
            reasons=reasons,
        )
        present = set(np.unique(self.images.test.dataset).tolist())
        per_dataset: dict[str, SetResult] = {}
        for name, number in sorted((name, n) for n, name in enumerate(test.names)):
            if number in present:
                own = test.dataset == number
                per_dataset[name] = measure(part.test[own], test.select(own))
        return DetectorResult(
            name=item.name,
            fingerprint=item.fingerprint,
            overall=measure(part.test, test),
            per_dataset=per_dataset,
            thresholds=thresholds,
            adapted_to=part.adapted_to,
        )

    def _fit(
        self, item: ScoredDetector, pairs: PairSet | None
    ) -> tuple[tuple[Threshold, ...], Mapping[float, str]]:
        """Return the thresholds that the pairs support, and why not the other rates."""
        split, scores = self.request.fit_split, item.parts[""].fit
        if pairs is None or not (pairs.num_positives and pairs.num_negatives):
            lacking = self.no_fit or f"no readable positive and negative pairs in {split}"
            return (), dict.fromkeys(FPR_RATES, lacking)
        assert split is not None and scores is not None
        kinds: list[tuple[FitRule, float]] = [("fpr", rate) for rate in FPR_RATES]
        kinds.append(("recall", RECALL_RATE))
        thresholds, reasons = fit_on_split(
            scores, pairs, kinds, fingerprint=item.fingerprint, split=split
        )
        lacking_rates = {rate: f"{split} has {why}" for (_, rate), why in reasons.items()}
        return tuple(thresholds.values()), lacking_rates


def _checked_fit(
    images: StudyImages, request: BenchmarkRequest, reporter: Reporter
) -> tuple[StudyImages, str]:
    """Drop pairs to fit on that hold one class only; return why there are none."""
    if request.fit_split is None:
        return images, "no split to fit thresholds on was asked for"
    if images.fit is not None and images.fit.num_positives and images.fit.num_negatives:
        return images, ""
    reason = f"{request.fit_split} holds no positive and negative pairs to fit a threshold on"
    reporter.warn(f"no rates at fixed false-positive rates: {reason}")
    return dataclasses.replace(images, fit=None), reason


def _with_train(
    images: StudyImages, manifest: Manifest
) -> tuple[StudyImages, dict[str, list[int]]]:
    """Add TRAIN images of each data set, to adapt to; return their rows too."""
    records = list(images.records)
    train: dict[str, list[int]] = {}
    candidates = manifest.select("TRAIN").records
    for name in dict.fromkeys(dataset_name(record) for record in images.records):
        chosen = some_images([r for r in candidates if dataset_name(r) == name])
        train[name] = list(range(len(records), len(records) + len(chosen)))
        records += chosen
    return dataclasses.replace(images, records=tuple(records)), train
