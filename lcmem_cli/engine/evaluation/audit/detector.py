"""The detector of an audit: chosen, adapted to the training set, and had again afterwards."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.detectors.base import Adapted, Detector
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.errors import InputError, NotAdaptableError
from lcmem_cli.engine.evaluation.audit.files import AuditDocument, read_audit, read_settings
from lcmem_cli.engine.evaluation.audit.null import split_rows
from lcmem_cli.engine.evaluation.audit.request import AuditRequest, AuditSettings
from lcmem_cli.engine.evaluation.audit.result import NullKind
from lcmem_cli.engine.evaluation.audit.sets import (
    Embedded,
    ImageSet,
    Listing,
    Sets,
    embed_set,
    list_set,
)
from lcmem_cli.engine.results import Threshold
from lcmem_cli.engine.store.features import FeatureCaches

DEFAULT_DETECTOR = "joint"
DEFAULT_SIZE = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditThreshold(Threshold):
    """The threshold of an audit.

    Attributes:
        fused: whether it applies to scores fused with the evidence, because the audit verified its
            candidates.
    """

    fused: bool


def choose_detector(request: AuditRequest, listings: Sets[Listing], compute: Compute) -> Detector:
    """Load the detector asked for, or that of an index among the sets, or the usual one.

    Raises:
        InputError: unknown, or it cannot do what is asked.
        NotAdaptableError: it is to be adapted and cannot be.
        FingerprintMismatchError: an index is another detector's.
    """
    indexes = [listing.index for _, listing in listings.named() if listing.index is not None]
    detector, size = request.detector, request.input_size
    if detector is None:
        detector = indexes[0].detector if indexes else DEFAULT_DETECTOR
    if isinstance(detector, str):
        detector = load_detector(
            detector,
            device=compute.device,
            input_size=size or DEFAULT_SIZE,
            precision=compute.precision,
        )
    if size is not None and detector.input_size != size:
        raise InputError(
            f"--input-size {size} has no effect: detector {detector.name} takes images of "
            f"{detector.input_size} px; leave it out"
        )
    if request.adapt and not detector.is_adaptable:
        why = "is adapted already" if detector.adapted_to else "only LCMem networks, and joint, can"
        raise NotAdaptableError(f"--adapt: {detector.name} cannot be adapted: {why}")
    if request.approximate:
        detector = detector.approximate()
    for index in indexes:
        index.check(detector.fingerprint)
    return detector


def adapt_if_asked(embedded: Embedded, request: AuditRequest) -> Embedded:
    """Return the sets as the adapted detector sees them, where the audit adapts its detector.

    Raises:
        NotAdaptableError: ``adapt`` is asked for, and there are too few images.
    """
    can_hold = request.null_kind != "leave-one-out" and embedded.detector.is_adaptable
    if request.adapt is False or not can_hold:
        return embedded
    try:
        detector, convert, num_images = _adapt(
            embedded.detector,
            embedded.sets.training,
            null=request.null_kind,
            rate=request.fpr,
            seed=request.seed,
        )
    except NotAdaptableError:
        if request.adapt:
            raise
        return embedded  # by default only where it can be
    return dataclasses.replace(
        embedded,
        detector=detector,
        sets=embedded.sets.map(lambda _, images: images.converted(convert)),
        adapted_to=num_images,
        convert=convert,
        before=embedded,
    )


def _adapt(
    detector: Detector, training: ImageSet, *, null: NullKind, rate: float, seed: int
) -> Adapted:
    """Adapt a detector to the training images that an audit searches.

    The rate holds, because neither generated images nor those of the null have a part in it; of a
    split training set only the bank has. It would not with leave-one-out, where the null's images
    had: what an identity shows would count less for them than for images of identities that are not
    there, of which 7 % then passed a rate of 2 % (11 data sets, one at a time).
    """
    bank = np.arange(training.num_distinct)
    if null == "split":
        bank = split_rows(training, rate=rate, seed=seed)[1]
    return detector.adapted(training.features_of(bank), [training.hashes[row] for row in bank])


def detector_of(folder: Path, compute: Compute = DEFAULT_COMPUTE) -> Detector:
    """Return the detector of a finished audit, with the audit's threshold as its only one.

    So a single pair can be judged as the audit judged each generated image and its best match.
    Where the detector was adapted, the training images are embedded again, or found in the cache.

    Args:
        folder: output of ``audit``.
        compute: how the training images are embedded.

    Raises:
        InputError: no finished audit there, none of a rate per image, or the detector or the
            training images are not those of the audit any more.
        FingerprintMismatchError: the training set is an index, of another detector by now.
        CorruptFileError: its files were damaged, or written by another version.
    """
    return reopen(folder, compute, with_training=False).detector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reopened:
    """What a finished audit compared with.

    Attributes:
        document: ``audit.json``.
        settings: what was asked.
        detector: see ``detector_of``.
        training: the training set as the detector sees it; ``None`` where it is not needed.
    """

    document: AuditDocument
    settings: AuditSettings
    detector: Detector
    training: ImageSet | None


def reopen(folder: Path, compute: Compute, *, with_training: bool = True) -> Reopened:
    """Have the detector, the threshold and the training set of a finished audit again.

    Args:
        folder: output of ``audit``.
        compute: how the training images are embedded.
        with_training: embed them, even where the detector was not adapted to them.

    Raises:
        InputError: see ``detector_of``.
        FingerprintMismatchError: see ``detector_of``.
        CorruptFileError: see ``detector_of``.
    """
    document, settings = read_audit(folder), read_settings(folder)
    rule, num_real = document.rule, document.null.num_scores
    if rule.kind != "fpr" or rule.threshold is None:
        raise InputError(
            f"{folder}: the audit held a false-discovery rate, which gives no threshold for "
            "single images; run one without --bh"
        )
    is_adapted = document.adapted_to is not None
    detector = load_detector(
        settings.detector, device=compute.device, input_size=settings.input_size
    )
    if settings.approximate:
        detector = detector.approximate()
    training = None
    if is_adapted or with_training:
        training = _training_set(settings, detector, compute)
    if training is not None and is_adapted:
        detector, convert, _ = _adapt(
            detector, training, null=document.null.kind, rate=rule.rate, seed=settings.seed
        )
        training = training.converted(convert)
    if detector.fingerprint != document.fingerprint:
        raise InputError(
            f"{folder}: the detector is not that of the audit any more: its weights"
            + (", or the training images," if is_adapted else "")
            + " have changed; run the audit again"
        )
    detector.thresholds = (
        AuditThreshold(
            value=math.nextafter(rule.threshold, math.inf),  # an audit flags what exceeds it
            kind="fpr",
            rate=rule.rate,
            fingerprint=document.fingerprint,
            fitted_on=f"the best matches of {num_real:,} real images ({document.null.kind}) in the "
            f"audit {folder}",
            num_positives=0,
            num_negatives=num_real,
            fused=document.verified,
        ),
    )
    return Reopened(document=document, settings=settings, detector=detector, training=training)


def _training_set(settings: AuditSettings, detector: Detector, compute: Compute) -> ImageSet:
    """Embed the training set of an audit, or find its features in the cache or the index."""
    listing = list_set(
        Path(settings.training),
        what="training",
        reading=settings.reading,
        folders_are=settings.folders_are,
    )
    if listing.index is not None:
        listing.index.check(detector.fingerprint)
    cache = FeatureCaches.of_user() if settings.cache else None
    return embed_set(listing, detector, dataclasses.replace(compute, cache=cache))
