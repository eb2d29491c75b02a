"""The robustness study (method.md section 6, arXiv 2512.14421): do edited copies still match?

The second image of each pair is edited; thresholds come from unedited pairs of another split, by
one rule for every detector. Recall always stands beside the false-positive rate.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.data.loading import hash_files
from lcmem_cli.engine.data.manifest import Reading, Record
from lcmem_cli.engine.data.pairs import (
    PairSet,
    identity_numbers,
    identity_pairs,
    same_image_pairs,
)
from lcmem_cli.engine.data.perturb import (
    EXTENDED_SUITE,
    REFERENCE_SUITE,
    VAE_ROUND_TRIP,
    RoundTrip,
    Setting,
    perturb,
)
from lcmem_cli.engine.data.tables import STANDARD, ListColumns
from lcmem_cli.engine.detectors.base import Detector, score_listed
from lcmem_cli.engine.detectors.embedding import embed_perturbed
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import InputError, UnreadableImageError
from lcmem_cli.engine.evaluation.calibration import required_negatives
from lcmem_cli.engine.evaluation.metrics import bootstrap_intervals
from lcmem_cli.engine.evaluation.study.detectors import find_detectors
from lcmem_cli.engine.evaluation.study.files import ROBUSTNESS_FILES, Example, write_robustness
from lcmem_cli.engine.evaluation.study.folder import Part, PartKey
from lcmem_cli.engine.evaluation.study.pairs import StudyImages, pair_images
from lcmem_cli.engine.evaluation.study.request import DEFAULT_DETECTORS, StudyRequest
from lcmem_cli.engine.evaluation.study.results import (
    FitRule,
    Outcome,
    RobustnessOfDetector,
    RobustnessResult,
    SettingResult,
    Suite,
)
from lcmem_cli.engine.evaluation.study.runner import Scored, ScoredDetector, Study, run_study
from lcmem_cli.engine.evaluation.study.scoring import (
    Embedded,
    embed_listed,
    fit_on_split,
    listed_files,
)
from lcmem_cli.engine.models.codec import EMBEDDED, PIXELS, Codec
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.precision import AskedPrecision
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Threshold

DEFAULT_RATES: Mapping[FitRule, float] = {"fpr": 0.01, "recall": 0.95}
SUITES: Mapping[str, tuple[Setting, ...]] = {
    "reference": REFERENCE_SUITE,
    "extended": EXTENDED_SUITE,
}
_UNEDITED = "unedited"
# Detectors that share decoded and edited pictures, and so are held at once: six networks of the
# size of ViT-B take 2 GB.
_TOGETHER = 6
_REPLICATES = 200
_MAX_PICTURE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustnessRequest(StudyRequest):
    """The arguments of ``robustness``, which explains them."""

    fit_split: str
    suite: Suite
    same_image: bool
    only_positives: bool
    fit: FitRule
    fit_rate: float | None
    round_trip: str | None

    def __post_init__(self) -> None:
        """Refuse what can be refused before any work."""
        if self.fit_rate is not None and not 0 < self.fit_rate < 1:
            raise InputError(
                f"--fit-rate must lie in (0, 1), not {self.fit_rate:g}; for example 0.01"
            )
        if self.same_image and self.fit == "recall":
            raise InputError(
                "--fit recall means nothing with --same-image: the unedited pairs that it is "
                "fitted on are identical images, which every detector finds; use --fit fpr"
            )
        if self.round_trip is not None and self.suite != "extended":
            raise InputError("--round-trip has no effect in the reference suite: --suite extended")
        super().__post_init__()

    @property
    def rates(self) -> dict[FitRule, float]:
        """The rate of each rule."""
        asked = DEFAULT_RATES[self.fit] if self.fit_rate is None else self.fit_rate
        return {**DEFAULT_RATES, self.fit: asked}

    def make_pairs(
        self, records: Sequence[Record], *, column: Sequence[str], fitting: bool
    ) -> PairSet:
        """Return the pairs of one split, see ``StudyRequest``."""
        make = same_image_pairs if self.same_image else identity_pairs
        negatives = fitting or not self.only_positives
        return make(records, self.seed, column=column, negatives=negatives)


# Long by its arguments and what is said of each: the public signature stays flat.
def robustness(
    filelist: Path,
    *,
    output: Path,
    basedir: Path | None = None,
    columns: ListColumns = STANDARD,
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
    precision: AskedPrecision | None = None,
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
        columns: what the filelist calls its columns.
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
        precision: what all detectors compute in, see ``registry.at_precision``.
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
    request = RobustnessRequest(
        filelist=filelist,
        output=output,
        reading=Reading(basedir=basedir, columns=columns, max_unreadable=max_unreadable),
        detectors=detectors,
        ds_names=ds_names,
        suite=suite,
        same_image=same_image,
        only_positives=only_positives,
        fit=fit,
        fit_rate=fit_rate,
        split=split,
        fit_split=fit_split,
        seed=seed,
        input_size=input_size,
        round_trip=round_trip,
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
    return run_study(Robustness.prepare(request, compute), compute)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robustness(Study[RobustnessResult]):
    """A robustness study whose images, pairs and detectors are known.

    Attributes:
        suite: the settings by the names of their parts; ``None`` stands for the unedited pairs.
        codec: of the setting that encodes and decodes images.
        note: what the small number of pairs means for the rate; perhaps empty.
    """

    command = "robustness"
    together = _TOGETHER
    result_files = ROBUSTNESS_FILES
    request: RobustnessRequest
    suite: dict[str, Setting | None]
    codec: Codec | None
    note: str

    @classmethod
    def prepare(cls, request: RobustnessRequest, compute: Compute) -> Robustness:
        """Make the pairs and find the detectors; see ``robustness`` for the errors."""
        codec = None
        settings = SUITES[request.suite]
        if request.round_trip is not None:
            codec = _load_round_trip(request.round_trip, compute.device, request.input_size)
            settings += (Setting(VAE_ROUND_TRIP, 1.0),)
        manifest = request.reading.load(request.filelist, need_split=True)
        images = pair_images(manifest, request, compute.reporter)
        request, note = _with_support(images, request)
        available = find_detectors(request, compute)
        names = {f"{setting.transform} {setting.strength!r}": setting for setting in settings}
        return cls(
            request=request,
            images=images,
            contents=hash_files(images.paths(), compute)[0],
            available=available,
            suite={_UNEDITED: None, **names},
            codec=codec,
            note=note,
        )

    @property
    def settings(self) -> list[Setting]:
        """The settings, in the order of the suite."""
        return [setting for setting in self.suite.values() if setting is not None]

    def keys(self, name: str, fingerprint: str) -> list[PartKey]:
        """Return a part for the unedited pairs, and one for each setting."""
        return [PartKey(name, fingerprint, part) for part in self.suite]

    def inputs(self) -> dict[str, Any]:
        """Return what the scores depend on."""
        request, images = self.request, self.images
        assert images.fit is not None
        return {
            "same_image": request.same_image,
            "only_positives": request.only_positives,
            "pairs_digest": images.test.digest,
            "fit_pairs_digest": images.fit.digest,
            "split": request.split,
            "fit_split": request.fit_split,
            "seed": request.seed,
            "input_size": request.input_size,
            "round_trip_digest": None if self.codec is None else self.codec.spec.weights_hash,
        }

    def config(self) -> dict[str, Any]:
        """Return the options that thresholds and the number of parts depend on."""
        request = self.request
        return {
            "suite": request.suite,
            "fit": request.fit,
            "fit_rate": request.rates[request.fit],
            "round_trip": request.round_trip,
        }

    def score(
        self, missing: Sequence[tuple[Detector, Sequence[PartKey]]], compute: Compute
    ) -> Iterator[tuple[PartKey, Part]]:
        """Embed each unedited image once, and each edited one once, with all that lack it."""
        test, fit = self.images.test, self.images.fit
        assert fit is not None
        detectors = [detector for detector, _ in missing]
        plain = self._embed(detectors, self.images.rows_in_pairs, _UNEDITED, compute)
        by_setting = {
            name: [
                (place, k)
                for place, (_, keys) in enumerate(missing)
                for k in keys
                if k.setting == name
            ]
            for name in self.suite
        }
        total = sum(map(len, by_setting.values()))
        with compute.reporter.task("settings", total, unit="setting") as task:
            for name, lacking in by_setting.items():
                edited = [plain[place] for place, _ in lacking]
                if name != _UNEDITED and lacking:
                    those = [detectors[place] for place, _ in lacking]
                    edited = self._embed(those, np.unique(test.second), name, compute)
                for (place, key), found in zip(lacking, edited, strict=True):
                    detector, unedited = detectors[place], plain[place]
                    if compute.ranks.is_main:
                        part = Part(
                            test=score_listed(
                                detector,
                                unedited.features,
                                unedited.rows[test.first],
                                found.rows[test.second],
                                found.features,
                            ),
                            fit=unedited.score(detector, fit) if found is unedited else None,
                            unreadable=found.unreadable,
                        )
                        yield key, part
                    task.advance()

    def _embed(
        self, detectors: Sequence[Detector], needed: NDArray[np.int64], name: str, compute: Compute
    ) -> list[Embedded]:
        images, setting, rows = self.images, self.suite[name], needed.tolist()
        uses_codec = setting is not None and setting.transform == VAE_ROUND_TRIP
        made = embed_perturbed(
            detectors,
            listed_files(images.records, images.basedir, rows),
            setting,
            working_size=self.request.input_size,
            seed=self.request.seed,
            round_trip=self._round_trip() if uses_codec else None,
            contents=[self.contents[row] for row in rows],
            compute=compute,
        )
        return [
            embed_listed(
                images.records,
                images.basedir,
                rows,
                found,
                compute.reporter,
                detector=detector.name,
                setting=name,
            )
            for detector, found in zip(detectors, made, strict=True)
        ]

    def _round_trip(self) -> RoundTrip | None:
        """Return a function that encodes and decodes images ``[1, 3, H, W]`` in [0, 1]."""
        codec = self.codec
        if codec is None:
            return None
        model: Any = codec.model

        @torch.inference_mode()
        def apply(images: torch.Tensor) -> torch.Tensor:
            decoded: torch.Tensor = model.decode(codec.encode(images)).sample
            return (decoded + 1) / 2 if codec.spec.input_range == "symmetric" else decoded

        return apply

    def conclude(self, scored: Scored, reporter: Reporter) -> RobustnessResult:
        """Fit the thresholds, apply them to every setting, and write table and plots."""
        if not scored.test.num_positives:
            raise InputError("no positive pair is left: each holds an image that could not be read")
        request = self.request
        result = RobustnessResult(
            detectors=tuple(self._judge(item, scored) for item in scored.detectors),
            suite=request.suite,
            same_image=request.same_image,
            only_positives=request.only_positives,
            fit=request.fit,
            fit_rate=request.rates[request.fit],
            input_size=request.input_size,
            notes=(self.note,) if self.note else (),
            **scored.common,
        )
        write_robustness(request.output, result, self._example())
        return result

    def _judge(self, item: ScoredDetector, scored: Scored) -> RobustnessOfDetector:
        thresholds, reasons = self._fit(item, scored.fit)
        identity, strata = identity_numbers(self.images.records)
        pairs = scored.test
        ends = np.stack([identity[pairs.first], identity[pairs.second]], axis=1)

        def outcomes(setting: str) -> dict[str, Outcome]:
            scores = item.parts[setting].test
            intervals: dict[str, tuple[float, float] | None] = {}
            if pairs.num_positives and pairs.num_negatives:
                intervals = bootstrap_intervals(
                    scores,
                    pairs.labels,
                    ends,
                    strata=strata,
                    thresholds={rule: threshold.value for rule, threshold in thresholds.items()},
                    replicates=_REPLICATES,
                    seed=self.request.seed,
                )
            return {
                rule: dataclasses.replace(
                    Outcome.of(scores >= threshold.value, pairs.labels == 1),
                    recall_interval=intervals.get(f"tpr_{rule}"),
                    fpr_interval=intervals.get(f"fpr_{rule}"),
                )
                for rule, threshold in thresholds.items()
            }

        settings = tuple(
            SettingResult(
                transform=setting.transform, strength=setting.strength, outcomes=outcomes(name)
            )
            for name, setting in self.suite.items()
            if setting is not None
        )
        return RobustnessOfDetector(
            name=item.name,
            fingerprint=item.fingerprint,
            thresholds=thresholds,
            reasons=reasons,
            unedited=outcomes(_UNEDITED),
            settings=settings,
        )

    def _fit(
        self, item: ScoredDetector, pairs: PairSet | None
    ) -> tuple[dict[str, Threshold], dict[str, str]]:
        """Fit both rules; the one that was not asked for may fail."""
        request, scores = self.request, item.parts[_UNEDITED].fit
        assert pairs is not None and scores is not None
        fitted, lacking = fit_on_split(
            scores,
            pairs,
            [
                (r, rate)
                for r, rate in request.rates.items()
                if r == "fpr" or not request.same_image
            ],
            fingerprint=item.fingerprint,
            split=request.fit_split,
            what="unedited pairs",
        )
        thresholds: dict[str, Threshold] = {
            rule: threshold for (rule, _), threshold in fitted.items()
        }
        reasons: dict[str, str] = {rule: why for (rule, _), why in lacking.items()}
        if request.same_image:
            reasons["recall"] = "the unedited positive pairs are identical images"
        if request.fit not in thresholds:
            raise InputError(
                f"no threshold for {item.name}: {reasons[request.fit]} among the readable images "
                f"of {request.fit_split}"
            )
        return thresholds, reasons

    def _example(self) -> Example | None:
        """Return the edits of the first readable image that was judged."""
        image = _first_readable(self.images, self.request.input_size)
        if image is None:
            return None
        step = max(1, self.request.input_size // _MAX_PICTURE)

        def picture(tensor: torch.Tensor) -> NDArray[Any]:
            shown: NDArray[Any] = tensor[:, ::step, ::step].permute(1, 2, 0).numpy()
            return shown

        edits: dict[str, list[tuple[str, NDArray[Any]]]] = {}
        for setting in self.settings:
            edited = perturb(
                image,
                setting.transform,
                setting.strength,
                seed=self.request.seed,
                round_trip=self._round_trip(),
            )
            edits.setdefault(setting.transform, []).append((str(setting), picture(edited)))
        return picture(image), edits


def _with_support(images: StudyImages, request: RobustnessRequest) -> tuple[RobustnessRequest, str]:
    """Return what the pairs can tell: the smallest rate where none was asked for, and say so.

    Raises:
        InputError: nothing can be judged or fitted on them, or not at the rate asked for.
    """
    if not images.test.num_positives:
        raise InputError(
            f"{request.filelist}: no positive pairs can be made of the {images.num_judged:,} "
            f"image(s) of {request.split}; identities need two images, or use --same-image"
        )
    assert images.fit is not None
    if request.fit == "recall" and not images.fit.num_positives:
        raise InputError(f"{request.fit_split} has no positive pairs to fit a threshold on")
    distinct, rate = images.fit.num_distinct(0), request.rates[request.fit]
    if request.fit == "recall" or distinct >= required_negatives(rate):
        return request, ""
    lacking = (
        f"{request.fit_split} has {distinct} different negative pairs; a threshold for a "
        f"false-positive rate of {rate:g} needs {required_negatives(rate)}"
    )
    smallest = math.ceil(1000 / distinct) / 1000 if distinct else 1.0
    if request.fit_rate is not None or smallest >= 1:
        raise InputError(
            f"{lacking}: use more images"
            + (f", or --fit-rate {smallest:g} at least" if smallest < 1 else "")
        )
    return (
        dataclasses.replace(request, fit_rate=smallest),
        f"{lacking}, so that the thresholds hold {smallest:g}, the smallest rate that they can",
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


def _first_readable(images: StudyImages, size: int) -> torch.Tensor | None:
    for path in itertools.islice(images.paths(), images.num_judged):
        try:
            return to_tensor(load_image(path), size)
        except UnreadableImageError:
            continue
    return None
