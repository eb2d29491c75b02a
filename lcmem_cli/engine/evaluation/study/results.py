"""What the studies find: typed results, and how they are written as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.evaluation.metrics import METRIC_KEYS
from lcmem_cli.engine.results import Result, Threshold, Unreadable

OVERALL = "overall"
PairMode = Literal["reference", "all"]
FitRule = Literal["fpr", "recall"]
Suite = Literal["reference", "extended"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A detector that could not be run.

    Attributes:
        name: that it would be shown under.
        reason: why, and what to do about it.
    """

    name: str
    reason: str


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorResult:
    """Everything about one detector.

    Attributes:
        name: that it is shown under: its label, or as the user named it.
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
        detectors: in the order asked for, then those of earlier runs in the same folder.
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
        for item in values["detectors"]:
            item[OVERALL] = _flat(item[OVERALL])
            item["per_dataset"] = {name: _flat(part) for name, part in item["per_dataset"].items()}
        return _by_name(values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a threshold says about pairs: rates, ``None`` where they are not known, and counts.

    Attributes:
        recall: share of the positives that were found.
        precision: share of the called that are positive; not known without negatives.
        accuracy: share of the pairs that were called rightly; not known without negatives.
        f1: harmonic mean of precision and recall; not known without negatives.
        fpr: share of the negatives that were called positive.
        true_positives: positives at or above the threshold.
        false_positives: negatives at or above it.
        true_negatives: negatives below it.
        false_negatives: positives below it.
        recall_interval: 95 % interval by bootstrap over identities; ``None``: not known.
        fpr_interval: the same of the false-positive rate.
    """

    recall: float | None
    precision: float | None
    accuracy: float | None
    f1: float | None
    fpr: float | None
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    recall_interval: tuple[float, float] | None = None
    fpr_interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, called: NDArray[np.bool_], positive: NDArray[np.bool_]) -> Outcome:
        """Count which pairs ``[n]`` were called, and which of them are positive."""
        tp, fp = int((called & positive).sum()), int((called & ~positive).sum())
        fn, tn = int((~called & positive).sum()), int((~called & ~positive).sum())

        def ratio(part: int, whole: int) -> float | None:
            return part / whole if whole else None

        has_negatives = fp + tn > 0
        return cls(
            recall=ratio(tp, tp + fn),
            precision=ratio(tp, tp + fp) if has_negatives else None,
            accuracy=ratio(tp + tn, tp + tn + fp + fn) if has_negatives else None,
            f1=ratio(2 * tp, 2 * tp + fp + fn) if has_negatives else None,
            fpr=ratio(fp, fp + tn),
            true_positives=tp,
            false_positives=fp,
            true_negatives=tn,
            false_negatives=fn,
        )


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
        name: that it is shown under: its label, or as the user named it.
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
        detectors: in the order asked for, then those of earlier runs in the same folder.
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
        notes: how the numbers are to be read.
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
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; detectors by name, rates beside the counts."""
        values = super().to_dict()
        for item in values["detectors"]:
            for at in item["settings"]:
                at.update(at.pop("outcomes"))
        return _by_name(values)


def _by_name(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "detectors": {item.pop("name"): item for item in values["detectors"]}}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of a data set beside its counts, all keys present."""
    metrics = values.pop("metrics") or dict.fromkeys(METRIC_KEYS)
    return {**metrics, **values}
