"""Carrying out a study, with whatever pairs, parts and conclusions it brings."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.batching import NOT_EMBEDDED
from lcmem_cli.engine.data.images import is_readable
from lcmem_cli.engine.data.pairs import PairSet
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.evaluation.study.detectors import Available, refuse_adapted_to
from lcmem_cli.engine.evaluation.study.folder import Part, PartKey, ResultsFolder, open_results
from lcmem_cli.engine.evaluation.study.pairs import StudyImages
from lcmem_cli.engine.evaluation.study.request import StudyRequest
from lcmem_cli.engine.reporter import Reporter
from lcmem_cli.engine.results import Unreadable, check_unreadable

Conclusion = TypeVar("Conclusion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredDetector:
    """The scores of a detector.

    Attributes:
        name: that it is shown under.
        fingerprint: of what was run.
        parts: by setting, in the order of ``Study.keys``.
    """

    name: str
    fingerprint: str
    parts: dict[str, Part]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """All scores of a study, without the pairs that some detector could not score.

    Attributes:
        detectors: in the order asked for.
        test: pairs that are judged.
        fit: pairs that thresholds are fitted on.
        common: the fields that the results of all studies have.
    """

    detectors: list[ScoredDetector]
    test: PairSet
    fit: PairSet | None
    common: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(abc.ABC, Generic[Conclusion]):
    """What sets one study apart from another.

    Attributes:
        command: its name.
        result_files: names of the files that it writes.
        together: detectors that are scored at once.
        request: what was asked for.
        images: that are needed, and the pairs of them.
        contents: SHA-256 of each image file, ``None`` where it cannot be read.
        available: the detectors that can run.
    """

    command: ClassVar[str]
    result_files: ClassVar[tuple[str, ...]]
    together: ClassVar[int] = 1
    request: StudyRequest
    images: StudyImages
    contents: Sequence[str | None]
    available: Available

    @property
    def reads_images(self) -> bool:
        """Whether images that were unreadable may be read by now."""
        return True

    @abc.abstractmethod
    def keys(self, name: str, fingerprint: str) -> list[PartKey]:
        """Return the parts that a detector's scores consist of."""

    @abc.abstractmethod
    def inputs(self) -> dict[str, Any]:
        """Return what the scores depend on, beside the images and detectors."""

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """Return what else is written to ``config.toml``."""

    @abc.abstractmethod
    def score(
        self, missing: Sequence[tuple[Detector, Sequence[PartKey]]], compute: Compute
    ) -> Iterator[tuple[PartKey, Part]]:
        """Make parts of detectors' scores: all processes embed, the first one yields.

        Args:
            missing: detectors, at most ``together``, with the parts that each lacks.
            compute: how it is done.
        """

    @abc.abstractmethod
    def conclude(self, scored: Scored, reporter: Reporter) -> Conclusion:
        """Compute what follows from the scores, and write it."""


def run_study(study: Study[Conclusion], compute: Compute) -> Conclusion:
    """Score what is missing, one detector after the other, and conclude.

    Each process returns what the first one concludes.

    Raises:
        InputError: ``output`` holds another study, or a detector was adapted to these images.
        UnreadableLimitError: more images than allowed could not be read.
        FolderBusyError: another process writes to ``output``.
    """
    keys = {
        name: study.keys(name, fingerprint)
        for name, fingerprint in study.available.fingerprints.items()
    }
    conclusion: Conclusion | None = None
    with contextlib.ExitStack() as stack:
        folder: ResultsFolder | None = None
        if compute.ranks.is_main:
            every = [key for of_detector in keys.values() for key in of_detector]
            folder = stack.enter_context(_open(study, every))
        parts: dict[PartKey, Part] = {}
        names = list(keys)
        for start in range(0, len(names), study.together):
            group = {name: keys[name] for name in names[start : start + study.together]}
            parts |= _complete(study, group, folder, compute)
        if folder is not None:
            parts |= _of_earlier_runs(study, folder, compute.reporter)
            scored = _without_unreadable(study, parts, folder.digest, compute.reporter)
            conclusion = study.conclude(scored, compute.reporter)
        conclusion = compute.ranks.broadcast(conclusion)
    assert conclusion is not None
    return conclusion


def _open(
    study: Study[Any], keys: Sequence[PartKey]
) -> contextlib.AbstractContextManager[ResultsFolder]:
    request, images = study.request, study.images
    inputs = {
        "command": study.command,
        "images_digest": images.digest(study.contents),
        **study.inputs(),
    }
    config = {
        **inputs,
        "filelist": request.filelist,
        "basedir": images.basedir,
        "detectors": list(request.detectors),
        "ds_names": list(request.ds_names) if request.ds_names else None,
        **study.config(),
    }
    return open_results(
        request.output,
        inputs,
        {key.detector: key.fingerprint for key in keys},
        config=config,
        results=study.result_files,
        overwrite=request.overwrite,
    )


def _complete(
    study: Study[Any],
    keys: Mapping[str, Sequence[PartKey]],
    folder: ResultsFolder | None,
    compute: Compute,
) -> dict[PartKey, Part]:
    """Return all parts of detectors in the first process; it loads, or all make and it keeps."""
    every = [key for of_detector in keys.values() for key in of_detector]
    found = {} if folder is None else _kept(study, folder, every)
    # The first process alone sees the folder; all have to embed the same images.
    lacking = {
        name: [key for key in of_detector if key not in found] for name, of_detector in keys.items()
    }
    missing: list[tuple[Detector, Sequence[PartKey]]] = []
    for name, of_detector in compute.ranks.broadcast(lacking).items():
        if of_detector:
            images, detector = study.images, study.available.take(name)
            count = images.num_paired
            refuse_adapted_to(detector, images.records[:count], study.contents[:count])
            missing.append((detector, of_detector))
    if missing:
        for key, part in study.score(missing, compute):
            assert folder is not None
            folder.save(key, part)
            found[key] = part
    return {key: found[key] for key in every if key in found}


def _kept(study: Study[Any], folder: ResultsFolder, keys: Sequence[PartKey]) -> dict[PartKey, Part]:
    """Return those parts that stand in the folder and need not be made anew."""
    loaded = {key: folder.load(key) for key in keys}
    return {key: part for key, part in loaded.items() if part and not _lacks(study, part)}


def _of_earlier_runs(
    study: Study[Any], folder: ResultsFolder, reporter: Reporter
) -> dict[PartKey, Part]:
    """Return the parts of detectors that stand in the folder and were not named now."""
    parts: dict[PartKey, Part] = {}
    for name, fingerprint in folder.others.items():
        keys = study.keys(name, fingerprint)
        found = _kept(study, folder, keys)
        if len(found) == len(keys):
            parts |= found
            reporter.event("kept from an earlier run", detector=name)
        else:
            reporter.warn(
                f"detector '{name}' of an earlier run is not in the results: its scores are "
                "incomplete; name it again"
            )
    return parts


def _lacks(study: Study[Any], part: Part) -> bool:
    """Return whether a part lacks an image that can be read by now."""
    return study.reads_images and any(
        is_readable(study.images.basedir / item.path)
        for item in part.unreadable
        if not item.reason.startswith(NOT_EMBEDDED)  # the same network gives the same again
    )


def _without_unreadable(
    study: Study[Any], parts: dict[PartKey, Part], digest: str, reporter: Reporter
) -> Scored:
    """Drop the pairs that some detector could not score, so that all are judged on the same."""
    request, images = study.request, study.images
    unreadable = _all_unreadable(parts.values(), request.reading.max_unreadable, reporter)
    keep = ~np.any([np.isnan(part.test) for part in parts.values()], axis=0)
    fits = [part.fit for part in parts.values() if part.fit is not None]
    keep_fit = ~np.any([np.isnan(scores) for scores in fits], axis=0)
    detectors: dict[str, ScoredDetector] = {}
    for (name, fingerprint, setting), part in parts.items():
        detectors.setdefault(name, ScoredDetector(name=name, fingerprint=fingerprint, parts={}))
        detectors[name].parts[setting] = dataclasses.replace(
            part, test=part.test[keep], fit=None if part.fit is None else part.fit[keep_fit]
        )
    fit = None if images.fit is None else images.fit.select(keep_fit)
    return Scored(
        detectors=list(detectors.values()),
        test=images.test.select(keep),
        fit=fit,
        common={
            "skipped": tuple(study.available.skipped),
            "split": request.split,
            "fit_split": request.fit_split,
            "seed": request.seed,
            "num_images": len(images.records),
            "num_pairs": len(images.test),
            "num_dropped": int((~keep).sum()),
            "num_fit_pairs": 0 if fit is None else len(fit),
            "unreadable": unreadable,
            "digest": digest,
        },
    )


def _all_unreadable(
    parts: Iterable[Part], limit: int | None, reporter: Reporter
) -> tuple[Unreadable, ...]:
    """Return the images that any detector could not use, each once."""
    unreadable = tuple({item.path: item for part in parts for item in part.unreadable}.values())
    check_unreadable(unreadable, limit)
    if unreadable:
        reporter.warn(
            f"{len(unreadable)} image(s) could not be read; they are left out, with their pairs"
        )
    return unreadable
