"""The robustness study (method.md section 6, arXiv 2512.14421): do edited copies still match?

The second image of each pair is edited; thresholds come from unedited pairs of another split, by
one rule for every detector. Recall always stands beside the false-positive rate.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.data.loading import hash_files
from lcmem_cli.engine.data.manifest import Record, load_manifest
from lcmem_cli.engine.data.pairs import PairSet, identity_pairs, same_image_pairs
from lcmem_cli.engine.data.perturb import (
    EXTENDED_SUITE,
    REFERENCE_SUITE,
    VAE_ROUND_TRIP,
    RoundTrip,
    Setting,
    perturb,
)
from lcmem_cli.engine.detectors.base import Detector, score_listed
from lcmem_cli.engine.detectors.embedding import EmbeddedFiles, embed_perturbed
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import InputError, UnreadableImageError
from lcmem_cli.engine.evaluation.calibration import fit_threshold, required_negatives
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
    pack_unreadable,
    refuse_adapted_to,
    unpack_unreadable,
)
from lcmem_cli.engine.files import write_csv, write_json
from lcmem_cli.engine.models.codec import EMBEDDED, PIXELS, Codec, load_codec
from lcmem_cli.engine.report.plots import plot_strengths, plot_transforms
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Threshold, Unreadable
from lcmem_cli.engine.store.features import FeatureCaches

JSON_NAME = "robustness_results.json"
CSV_NAME = "robustness_results.csv"
RECALL_NAME = "robustness_recall"
FPR_NAME = "robustness_fpr"
GRID_NAME = "robustness_transforms"
COLUMNS = (
    "Detector",
    "Transform",
    "Strength",
    "Recall",
    "Precision",
    "Accuracy",
    "F1",
    "FPR",
    "TP",
    "FP",
    "TN",
    "FN",
    "Threshold",
    "Fit",
)
DEFAULT_RATES: Mapping[str, float] = {"fpr": 0.01, "recall": 0.95}
_MAX_PICTURE = 256
_RESULT_FILES = (
    JSON_NAME,
    CSV_NAME,
    THRESHOLDS_NAME,
    *(
        f"{name}{suffix}"
        for name in (RECALL_NAME, FPR_NAME, GRID_NAME)
        for suffix in (".png", ".pdf")
    ),
)

FitRule = Literal["fpr", "recall"]
Suite = Literal["reference", "extended"]
SUITES: Mapping[str, tuple[Setting, ...]] = {
    "reference": REFERENCE_SUITE,
    "extended": EXTENDED_SUITE,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a threshold says about pairs: counts, and the rates that follow.

    Attributes:
        true_positives: positives at or above the threshold.
        false_positives: negatives at or above it.
        true_negatives: negatives below it.
        false_negatives: positives below it.
    """

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @property
    def recall(self) -> float | None:
        """Share of the positives that were found."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def fpr(self) -> float | None:
        """Share of the negatives that were called positive."""
        return _ratio(self.false_positives, self.false_positives + self.true_negatives)

    @property
    def precision(self) -> float | None:
        """Share of the called that are positive; not known without negatives."""
        return self._with_negatives(self.true_positives, self.true_positives + self.false_positives)

    @property
    def accuracy(self) -> float | None:
        """Share of the pairs that were called rightly; not known without negatives."""
        right = self.true_positives + self.true_negatives
        return self._with_negatives(right, right + self.false_positives + self.false_negatives)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; not known without negatives."""
        wrong = self.false_positives + self.false_negatives
        return self._with_negatives(2 * self.true_positives, 2 * self.true_positives + wrong)

    def to_dict(self) -> dict[str, Any]:
        """Return counts and rates."""
        rates = {
            "recall": self.recall,
            "precision": self.precision,
            "accuracy": self.accuracy,
            "f1": self.f1,
            "fpr": self.fpr,
        }
        return {**rates, **dataclasses.asdict(self)}

    def _with_negatives(self, part: int, whole: int) -> float | None:
        return _ratio(part, whole) if self.false_positives + self.true_negatives else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingResult:
    """A detector at one setting.

    Attributes:
        transform: the edit.
        strength: in its own unit.
        outcomes: by rule of the threshold.
    """

    transform: str
    strength: float
    outcomes: dict[str, Outcome]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustnessOfDetector:
    """Everything about one detector.

    Attributes:
        name: as the user named it.
        fingerprint: of what was run.
        thresholds: by rule.
        reasons: by rule, why it has no threshold.
        unedited: the judged pairs without an edit, by rule.
        settings: in the order of the suite.
    """

    name: str
    fingerprint: str
    thresholds: dict[str, Threshold]
    reasons: dict[str, str]
    unedited: dict[str, Outcome]
    settings: tuple[SettingResult, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustnessResult(Result):
    """A finished robustness study.

    Attributes:
        detectors: in the order asked for.
        skipped: detectors that could not run.
        suite: which settings.
        same_image: each image with its own edited copy, instead of pairs within identities.
        only_positives: no negative pairs were made.
        fit: rule of the thresholds in the table; the other rule is reported beside it.
        fit_rate: its rate.
        split: that was judged.
        fit_split: that thresholds were fitted on.
        seed: of negatives and edits.
        input_size: side in pixels at which images are edited.
        num_images: images of both splits.
        num_pairs: pairs of the split, before unreadable images were dropped.
        num_dropped: pairs dropped because an image was unreadable.
        num_fit_pairs: pairs that thresholds were fitted on.
        unreadable: images that could not be used.
        digest: SHA-256 over the images and settings that scores depend on.
    """

    detectors: tuple[RobustnessOfDetector, ...]
    skipped: tuple[Skipped, ...]
    suite: Suite
    same_image: bool
    only_positives: bool
    fit: FitRule
    fit_rate: float
    split: str
    fit_split: str
    seed: int
    input_size: int
    num_images: int
    num_pairs: int
    num_dropped: int
    num_fit_pairs: int
    unreadable: tuple[Unreadable, ...]
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; detectors by name, rates beside the counts."""
        values = super().to_dict()
        values["detectors"] = {
            item.name: {
                "fingerprint": item.fingerprint,
                "thresholds": {k: dataclasses.asdict(t) for k, t in item.thresholds.items()},
                "reasons": item.reasons,
                "unedited": {rule: out.to_dict() for rule, out in item.unedited.items()},
                "settings": [
                    {
                        "transform": at.transform,
                        "strength": at.strength,
                        **{rule: outcome.to_dict() for rule, outcome in at.outcomes.items()},
                    }
                    for at in item.settings
                ],
            }
            for item in self.detectors
        }
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Study:
    """Images and pairs of both splits; rows point into ``records``."""

    records: tuple[Record, ...]
    num_judged: int
    basedir: Path
    test: PairSet
    fit: PairSet
    settings: tuple[Setting, ...]
    input_size: int
    seed: int
    round_trip: RoundTrip | None

    def paths(self, rows: Sequence[int] | NDArray[np.int64]) -> list[Path]:
        return [self.basedir / self.records[row].path for row in rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """How to embed with one detector."""

    compute: Compute


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scored:
    """A detector's scores; NaN where an image is unreadable."""

    name: str
    fingerprint: str
    fit: NDArray[np.float64]
    unedited: NDArray[np.float64]
    edited: dict[Setting, NDArray[np.float64]]
    unreadable: list[Unreadable]


def robustness(
    filelist: Path,
    *,
    output: Path,
    basedir: Path | None = None,
    detectors: Sequence[str] = DEFAULT_DETECTORS,
    ds_names: Sequence[str] | None = None,
    suite: Suite = "reference",
    same_image: bool = False,
    only_positives: bool = False,
    fit: FitRule = "fpr",
    fit_rate: float | None = None,
    split: str = "TEST",
    fit_split: str = "VAL",
    seed: int = 42,
    input_size: int = 512,
    round_trip: str | None = None,
    strict: bool = False,
    cache: bool = True,
    overwrite: bool = False,
    max_unreadable: int | None = None,
    device: str = "auto",
    batch_size: int = 32,
    workers: int = -1,
    reporter: Reporter = SILENT,
) -> RobustnessResult:
    """Run the robustness study and write its table and plots.

    Args:
        filelist: images with identities and splits; a split is made where there is none.
        output: folder for ``robustness_results.csv`` and ``.json``, ``thresholds.json`` and plots.
            Finished parts are kept there, so that a killed run continues.
        basedir: folder that paths start from.
        detectors: names, see ``registry.load_detector``.
        ds_names: data sets to use; all by default.
        suite: the published 24 settings, or harder ones too.
        same_image: pair each image with its own edited copy (copy detection).
        only_positives: make no negative pairs of the judged split.
        fit: what the thresholds hold: a false-positive rate, or a recall on unedited pairs.
        fit_rate: that rate, by default ``DEFAULT_RATES``. The other rule is reported beside it at
            its default rate.
        split: to judge.
        fit_split: to fit thresholds on.
        seed: of the negatives and of what is random in the edits.
        input_size: side in pixels at which images are edited, and of the pixel measures.
        round_trip: codec with a decoder (a diffusers folder or hub id), for a setting of the
            extended suite that encodes and decodes images.
        strict: fail where a detector's weights cannot be had, instead of leaving it out.
        cache: keep features in the user's cache.
        overwrite: replace the results of another study in ``output``.
        max_unreadable: unreadable images to tolerate; ``None``: any number.
        device: where to compute.
        batch_size: images per network call; scores change by rounding at most.
        workers: decoding threads; -1 from the CPUs.
        reporter: receives progress and warnings.

    Raises:
        InputError: an argument is wrong, the fitting split supports no such threshold, or
            ``output`` holds another study.
        WeightsUnavailableError: no detector can run, or one cannot and ``strict`` is set.
        UnreadableLimitError: more images than ``max_unreadable`` could not be read.
        FolderBusyError: another process writes to ``output``.

    Example:
        >>> result = robustness(Path("filelist.csv"), output=Path("out"), detectors=["ncc"])
        >>> result.detectors[0].settings[0].outcomes["fpr"].recall
    """
    rates = _check_arguments(fit, fit_rate, same_image, split, fit_split, suite, round_trip)
    check_names(detectors)
    compute = Compute.start(
        device=device,
        batch_size=batch_size,
        workers=workers,
        reporter=reporter,
        cache=FeatureCaches.of_user() if cache else None,
    )
    ranks, reporter = compute.ranks, compute.reporter
    codec = None if round_trip is None else _load_round_trip(round_trip, device, input_size)
    study = _make_study(
        filelist,
        basedir=basedir,
        ds_names=ds_names,
        splits=(split, fit_split),
        same_image=same_image,
        only_positives=only_positives,
        settings=SUITES[suite] + ((Setting(VAE_ROUND_TRIP, 1.0),) if codec is not None else ()),
        input_size=input_size,
        seed=seed,
        codec=codec,
        max_missing=max_unreadable,
        reporter=reporter,
    )
    _check_support(study, fit, rates[fit], fit_split)
    available = find_detectors(
        detectors, device=device, input_size=input_size, strict=strict, reporter=reporter
    )
    contents = hash_files([study.basedir / record.path for record in study.records], compute)[0]
    inputs = {
        "command": "robustness",
        "images_digest": content_digest(study.records, contents),
        "same_image": same_image,
        "only_positives": only_positives,
        "pairs_digest": study.test.digest,
        "fit_pairs_digest": study.fit.digest,
        "split": split,
        "fit_split": fit_split,
        "seed": seed,
        "input_size": input_size,
        "round_trip_digest": None if codec is None else codec.spec.weights_hash,
    }
    config = {
        **inputs,
        "filelist": filelist,
        "basedir": study.basedir,
        "detectors": list(detectors),
        "ds_names": list(ds_names) if ds_names else None,
        "suite": suite,
        "fit": fit,
        "fit_rate": rates[fit],
        "round_trip": round_trip,
    }
    result: RobustnessResult | None = None
    with open_results(
        output,
        inputs,
        available.fingerprints,
        config=config,
        results=_RESULT_FILES,
        overwrite=overwrite,
        ranks=ranks,
    ) as folder:
        scored: list[_Scored] = []
        for name, fingerprint in available.fingerprints.items():
            missing = ranks.broadcast(_missing_parts(folder, study, name, fingerprint))
            if missing:
                detector = available.take(name)
                refuse_adapted_to(detector, study.records, contents)
                run = _Run(
                    compute=compute,
                )
                _score(detector, study, missing, folder, run)
                del detector
            if folder is not None:
                scored.append(_load_scored(folder, study, name, fingerprint))
        if folder is not None:
            result = _conclude(
                study,
                scored,
                available.skipped,
                limit=max_unreadable,
                rates=rates,
                options={
                    "suite": suite,
                    "same_image": same_image,
                    "only_positives": only_positives,
                    "fit": fit,
                    "fit_rate": rates[fit],
                    "split": split,
                    "fit_split": fit_split,
                    "seed": seed,
                    "input_size": input_size,
                    "digest": folder.digest,
                },
                folder=output,
                reporter=reporter,
            )
        result = ranks.broadcast(result)
    assert result is not None
    return result


def _check_arguments(
    fit: FitRule,
    fit_rate: float | None,
    same_image: bool,
    split: str,
    fit_split: str,
    suite: Suite,
    round_trip: str | None,
) -> dict[str, float]:
    """Return the rate of each rule."""
    if fit_rate is not None and not 0 < fit_rate < 1:
        raise InputError(f"--fit-rate must lie in (0, 1), not {fit_rate:g}; for example 0.01")
    if same_image and fit == "recall":
        raise InputError(
            "--fit recall means nothing with --same-image: the unedited pairs that it is fitted "
            "on are identical images, which every detector finds; use --fit fpr"
        )
    check_splits(split, fit_split)
    if round_trip is not None and suite != "extended":
        raise InputError("--round-trip has no effect in the reference suite: --suite extended")
    return {**DEFAULT_RATES, fit: DEFAULT_RATES[fit] if fit_rate is None else fit_rate}


def _make_study(
    filelist: Path,
    *,
    basedir: Path | None,
    ds_names: Sequence[str] | None,
    splits: tuple[str, str],
    same_image: bool,
    only_positives: bool,
    settings: tuple[Setting, ...],
    input_size: int,
    seed: int,
    codec: Codec | None,
    max_missing: int | None,
    reporter: Reporter,
) -> _Study:
    manifest = load_manifest(filelist, basedir=basedir, max_missing=max_missing)
    column = [record.id for record in manifest.records]
    make = same_image_pairs if same_image else identity_pairs
    judged = manifest.select(splits[0], ds_names).records
    test = make(judged, seed, column=column, negatives=not only_positives)
    if not test.num_positives:
        raise InputError(
            f"{filelist}: no positive pairs can be made of the {len(judged):,} image(s) of "
            f"{splits[0]}; identities need two images, or use --same-image"
        )
    fit_from = fit_records(manifest.select(splits[1], ds_names), reporter)
    fit = make(fit_from, seed, column=column).shifted(len(judged))
    return _Study(
        records=(*judged, *fit_from),
        num_judged=len(judged),
        basedir=manifest.basedir,
        test=test,
        fit=fit,
        settings=settings,
        input_size=input_size,
        seed=seed,
        round_trip=None if codec is None else _round_trip(codec),
    )


def _check_support(study: _Study, fit: FitRule, rate: float, fit_split: str) -> None:
    """Refuse, before any work, a threshold that the fitting split cannot support."""
    if fit == "recall" and not study.fit.num_positives:
        raise InputError(f"{fit_split} has no positive pairs to fit a threshold on")
    distinct = study.fit.num_distinct(0)
    if fit == "fpr" and distinct < required_negatives(rate):
        raise InputError(
            f"{fit_split} has {distinct} different negative pairs; a threshold for a "
            f"false-positive rate of {rate:g} needs {required_negatives(rate)}: use more images "
            "or a larger --fit-rate"
        )


def _load_round_trip(name: str, device: str, input_size: int) -> Codec:
    if name in (EMBEDDED, PIXELS):
        raise InputError(
            f"--round-trip {name}: no decoder there; pass a diffusers folder or hub id"
        )
    codec = load_codec(name, device=resolve_device(device))
    if input_size % codec.spec.downsampling:
        raise InputError(
            f"--input-size {input_size} is not divisible by the codec's downsampling "
            f"{codec.spec.downsampling}"
        )
    return codec


def _round_trip(codec: Codec) -> RoundTrip:
    """Return a function that encodes and decodes images ``[1, 3, H, W]`` in [0, 1]."""
    model: Any = codec.model

    @torch.inference_mode()
    def apply(images: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = model.decode(codec.encode(images)).sample
        return (decoded + 1) / 2 if codec.spec.input_range == "symmetric" else decoded

    return apply


def _missing_parts(
    folder: ResultsFolder | None, study: _Study, name: str, fingerprint: str
) -> list[Setting | None]:
    """Return the settings that are still to be scored; ``None`` stands for the unedited pairs."""
    if folder is None:
        return []
    return [
        setting
        for setting in (None, *study.settings)
        if not folder.has(name, fingerprint, _part(setting), basedir=study.basedir)
    ]


def _part(setting: Setting | None) -> str:
    return "unedited" if setting is None else f"{setting.transform} {setting.strength!r}"


def _score(
    detector: Detector,
    study: _Study,
    missing: Sequence[Setting | None],
    folder: ResultsFolder | None,
    run: _Run,
) -> None:
    """Score what is missing: each unedited image is embedded once, each edited one once."""
    ends = [end for pairs in (study.test, study.fit) for end in (pairs.first, pairs.second)]
    needed = np.unique(np.concatenate(ends))
    plain = _embed(detector, study, needed, None, run)
    rows = _rows(study, needed, plain)
    edited_rows = np.unique(study.test.second)
    with run.compute.reporter.task(
        f"settings ({detector.name})", len(missing), unit="setting"
    ) as task:
        for setting in missing:
            if setting is None:
                arrays: dict[str, NDArray[Any]] = {
                    "test": _pairs(detector, study.test, plain, rows),
                    "fit": _pairs(detector, study.fit, plain, rows),
                    "unreadable": _unreadable(study, needed, plain),
                }
            else:
                edited = _embed(detector, study, edited_rows, setting, run)
                edited_at = _rows(study, edited_rows, edited)
                arrays = {
                    "test": score_listed(
                        detector,
                        plain.features,
                        rows[study.test.first],
                        edited_at[study.test.second],
                        edited.features,
                    ),
                    "unreadable": _unreadable(study, edited_rows, edited),
                }
            if folder is not None:
                folder.save(arrays, detector.name, detector.fingerprint, _part(setting))
            run.compute.ranks.barrier()
            task.advance()


def _embed(
    detector: Detector,
    study: _Study,
    chosen: NDArray[np.int64],
    setting: Setting | None,
    run: _Run,
) -> EmbeddedFiles:
    embedded = embed_perturbed(
        detector,
        study.paths(chosen),
        setting,
        working_size=study.input_size,
        seed=study.seed,
        round_trip=study.round_trip if setting and setting.transform == VAE_ROUND_TRIP else None,
        compute=run.compute,
    )
    run.compute.reporter.event(
        "embedded",
        detector=detector.name,
        setting=_part(setting),
        images=len(chosen),
        distinct=len(embedded.features),
        encoder_passes=embedded.encoder_passes,
    )
    return embedded


def _rows(study: _Study, chosen: NDArray[np.int64], embedded: EmbeddedFiles) -> NDArray[np.int64]:
    rows = np.full(len(study.records), -1, dtype=np.int64)
    rows[chosen] = embedded.rows
    return rows


def _pairs(
    detector: Detector, pairs: PairSet, embedded: EmbeddedFiles, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    return score_listed(detector, embedded.features, rows[pairs.first], rows[pairs.second])


def _unreadable(
    study: _Study, chosen: NDArray[np.int64], embedded: EmbeddedFiles
) -> NDArray[np.uint8]:
    records = [study.records[row] for row in chosen]
    return pack_unreadable(named_unreadable(records, study.basedir, embedded.unreadable))


def _load_scored(folder: ResultsFolder, study: _Study, name: str, fingerprint: str) -> _Scored:
    def load(setting: Setting | None) -> dict[str, NDArray[Any]]:
        arrays = folder.load(name, fingerprint, _part(setting))
        assert arrays is not None
        return arrays

    plain = load(None)
    edited = {setting: load(setting) for setting in study.settings}
    return _Scored(
        name=name,
        fingerprint=fingerprint,
        fit=plain["fit"],
        unedited=plain["test"],
        edited={setting: arrays["test"] for setting, arrays in edited.items()},
        unreadable=[
            item
            for arrays in (plain, *edited.values())
            for item in unpack_unreadable(arrays["unreadable"])
        ],
    )


def _conclude(
    study: _Study,
    scored: Sequence[_Scored],
    skipped: tuple[Skipped, ...],
    *,
    limit: int | None,
    rates: Mapping[str, float],
    options: dict[str, Any],
    folder: Path,
    reporter: Reporter,
) -> RobustnessResult:
    """Drop the pairs that some detector could not score, apply the thresholds, write everything."""
    unreadable = all_unreadable([part.unreadable for part in scored], limit, reporter)
    lost = [np.isnan(s) for part in scored for s in (part.unedited, *part.edited.values())]
    keep = ~np.any(lost, axis=0)
    fit_keep = ~np.any([np.isnan(part.fit) for part in scored], axis=0)
    test, fit = study.test.select(keep), study.fit.select(fit_keep)
    if not test.num_positives:
        raise InputError("no positive pair is left: each holds an image that could not be read")
    results = []
    for part in scored:
        thresholds, reasons = _fit(part, part.fit[fit_keep], fit, rates, options)
        results.append(
            RobustnessOfDetector(
                name=part.name,
                fingerprint=part.fingerprint,
                thresholds=thresholds,
                reasons=reasons,
                unedited=_outcomes(part.unedited[keep], test.labels, thresholds),
                settings=tuple(
                    SettingResult(
                        transform=setting.transform,
                        strength=setting.strength,
                        outcomes=_outcomes(scores[keep], test.labels, thresholds),
                    )
                    for setting, scores in part.edited.items()
                ),
            )
        )
    result = RobustnessResult(
        detectors=tuple(results),
        skipped=skipped,
        num_images=len(study.records),
        num_pairs=len(study.test),
        num_dropped=int((~keep).sum()),
        num_fit_pairs=len(fit),
        unreadable=unreadable,
        **options,
    )
    _write(folder, result, study)
    return result


def _fit(
    part: _Scored,
    scores: NDArray[np.float64],
    pairs: PairSet,
    rates: Mapping[str, float],
    options: Mapping[str, Any],
) -> tuple[dict[str, Threshold], dict[str, str]]:
    """Fit both rules; the one that was not asked for may fail."""
    distinct = pairs.num_distinct(0)
    fitted_on = (
        f"{options['fit_split']}: {pairs.num_positives} positive and {pairs.num_negatives} "
        f"negative unedited pairs ({distinct} different) of {len(np.unique(pairs.dataset))} "
        "data set(s)"
    )
    thresholds: dict[str, Threshold] = {}
    reasons: dict[str, str] = {}
    rules: tuple[FitRule, ...] = ("fpr", "recall")
    for rule in rules:
        rate = rates[rule]
        if rule == "recall" and options["same_image"]:
            reasons[rule] = "the unedited positive pairs are identical images"
        elif rule == "recall" and not pairs.num_positives:
            reasons[rule] = "no positive pairs"
        elif rule == "fpr" and distinct < required_negatives(rate):
            reasons[rule] = (
                f"{distinct} different negative pairs; a rate of {rate:g} needs "
                f"{required_negatives(rate)}"
            )
        else:
            thresholds[rule] = fit_threshold(
                scores,
                pairs.labels,
                kind=rule,
                rate=rate,
                fingerprint=part.fingerprint,
                fitted_on=fitted_on,
            )
    if options["fit"] not in thresholds:
        raise InputError(
            f"no threshold for {part.name}: {reasons[options['fit']]} among the readable images "
            f"of {options['fit_split']}"
        )
    return thresholds, reasons


def _outcomes(
    scores: NDArray[np.float64], labels: NDArray[np.int64], thresholds: Mapping[str, Threshold]
) -> dict[str, Outcome]:
    outcomes = {}
    positive = labels == 1
    for rule, threshold in thresholds.items():
        called = scores >= threshold.value
        outcomes[rule] = Outcome(
            true_positives=int((called & positive).sum()),
            false_positives=int((called & ~positive).sum()),
            true_negatives=int((~called & ~positive).sum()),
            false_negatives=int((~called & positive).sum()),
        )
    return outcomes


def _write(folder: Path, result: RobustnessResult, study: _Study) -> None:
    """Write everything; the JSON file last, so that where it stands the rest does too."""
    (folder / JSON_NAME).unlink(missing_ok=True)
    write_csv(folder / CSV_NAME, COLUMNS, _table(result))
    write_json(
        folder / THRESHOLDS_NAME,
        {
            item.name: [dataclasses.asdict(threshold) for threshold in item.thresholds.values()]
            for item in result.detectors
        },
    )
    plots: list[tuple[Literal["recall", "fpr"], str, str]] = [("recall", "recall", RECALL_NAME)]
    if not result.only_positives:
        plots.append(("fpr", "false-positive rate", FPR_NAME))
    for rate, label, name in plots:
        curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
        start: dict[str, float] = {}
        for item in result.detectors:
            start[item.name] = _rate(item.unedited[result.fit], rate)
            for at in item.settings:
                panel = curves.setdefault(at.transform, {})
                value = _rate(at.outcomes[result.fit], rate)
                panel.setdefault(item.name, []).append((at.strength, value))
        plot_strengths(curves, folder / name, ylabel=label, untransformed=start)
    _plot_grid(folder, study)
    write_json(folder / JSON_NAME, result.to_dict())


def _rate(outcome: Outcome, rate: Literal["recall", "fpr"]) -> float:
    value = outcome.recall if rate == "recall" else outcome.fpr
    return math.nan if value is None else value


def _table(result: RobustnessResult) -> list[list[str]]:
    rows = []
    for item in result.detectors:
        threshold = item.thresholds[result.fit]
        for at in item.settings:
            out = at.outcomes[result.fit]
            cells = [
                *(out.recall, out.precision, out.accuracy, out.f1, out.fpr),
                *(out.true_positives, out.false_positives),
                *(out.true_negatives, out.false_negatives),
                threshold.value,
                threshold.name,
            ]
            shown = ("" if cell is None else str(cell) for cell in cells)
            rows.append([item.name, at.transform, f"{at.strength:g}", *shown])
    return rows


def _plot_grid(folder: Path, study: _Study) -> None:
    """Show the edits on the first readable image that was judged."""
    image = None
    for path in study.paths(range(study.num_judged)):
        try:
            image = to_tensor(load_image(path), study.input_size)
        except UnreadableImageError:
            continue
        break
    if image is None:
        return
    step = max(1, study.input_size // _MAX_PICTURE)

    def picture(tensor: torch.Tensor) -> NDArray[Any]:
        shown: NDArray[Any] = tensor[:, ::step, ::step].permute(1, 2, 0).numpy()
        return shown

    edits = {
        transform: [
            (
                str(setting),
                picture(
                    perturb(
                        image,
                        setting.transform,
                        setting.strength,
                        seed=study.seed,
                        round_trip=study.round_trip,
                    )
                ),
            )
            for setting in group
        ]
        for transform, group in itertools.groupby(
            sorted(study.settings, key=lambda s: _first_place(study.settings, s.transform)),
            key=lambda setting: setting.transform,
        )
    }
    plot_transforms(picture(image), edits, folder / GRID_NAME)


def _first_place(settings: Sequence[Setting], transform: str) -> int:
    return next(i for i, setting in enumerate(settings) if setting.transform == transform)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
