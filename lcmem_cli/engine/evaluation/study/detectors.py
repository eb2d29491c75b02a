"""The detectors of a study: which can run here, and loading one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.errors import (
    InputError,
    MissingExtraError,
    WeightsFileNeededError,
    WeightsUnavailableError,
)
from lcmem_cli.engine.evaluation.study.request import StudyRequest
from lcmem_cli.engine.evaluation.study.results import Skipped
from lcmem_cli.engine.precision import AskedPrecision


@dataclasses.dataclass(kw_only=True)
class Available:
    """Detectors that can run here.

    Attributes:
        names: to load them by, by what they are shown as.
        device: where they compute.
        input_size: of the pixel measures.
        precision: what they compute in; a study with one that takes none is refused.
        fingerprints: by what they are shown as, in the order asked for.
        skipped: those that cannot run.
        adaptable: those that can be adapted to a kind of images.
    """

    names: dict[str, str]
    device: str
    input_size: int
    precision: AskedPrecision | None
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    adaptable: set[str] = dataclasses.field(default_factory=set)
    _kept: dict[str, Detector] = dataclasses.field(default_factory=dict, init=False)

    def load(self, name: str) -> None:
        """Load a detector and note what it is.

        Raises:
            WeightsUnavailableError: its weights cannot be had.
            WeightsFileNeededError: no file of them was named.
            MissingExtraError: a library that it needs is not installed.
            InputError: a checkpoint that is named is not there, or not one.
        """
        detector = self._load(name)
        # To bound memory only the one that is used first is kept, and such as cost much to load.
        if not self.fingerprints or detector.adapted_to:
            self._kept[name] = detector
        self.fingerprints[name] = detector.fingerprint
        if detector.is_adaptable:
            self.adaptable.add(name)

    def take(self, name: str) -> Detector:
        """Return a detector; it is not held here any more, to save memory."""
        return self._kept.pop(name, None) or self._load(name)

    def _load(self, name: str) -> Detector:
        detector = load_detector(
            self.names[name],
            device=self.device,
            input_size=self.input_size,
            precision=self.precision,
        )
        detector.name = name
        return detector


def find_detectors(request: StudyRequest, compute: Compute) -> Available:
    """Find out which of the detectors asked for can run.

    Raises:
        WeightsUnavailableError: one cannot and ``strict`` is set, or none is left.
        WeightsFileNeededError: the same, for want of a file.
        MissingExtraError: the same, for want of a library.
        InputError: a checkpoint that is named is not there, or not one.
    """
    found = Available(
        names=request.named,
        device=compute.device,
        input_size=request.input_size,
        precision=compute.precision,
    )
    for name in found.names:
        try:
            found.load(name)
        except (WeightsUnavailableError, MissingExtraError, WeightsFileNeededError) as error:
            if request.strict:
                raise
            found.skipped.append(Skipped(name=name, reason=str(error)))
            compute.reporter.warn(f"detector '{name}' is left out: {error}")
    if not found.fingerprints:
        reasons = "\n".join(f"  {item.name}: {item.reason}" for item in found.skipped)
        raise WeightsUnavailableError(f"none of the detectors can run here:\n{reasons}")
    return found


def refuse_adapted_to(
    detector: Detector, records: Sequence[Record], contents: Iterable[str | None]
) -> None:
    """Refuse a detector that was adapted to images that it is to be judged on.

    Args:
        detector: to be judged.
        records: what it is judged on.
        contents: SHA-256 of the file of each.

    Raises:
        InputError: there are such images.
    """
    used = [r for r, c in zip(records, contents, strict=True) if c in detector.adapted_to]
    if used:
        raise InputError(
            f"{detector.name} was adapted to {len(used):,} of the images that it would be judged "
            f"on or that its thresholds would be fitted on, {used[0].path!r} first; adapt it to "
            "others, such as those of TRAIN"
        )
