"""The detector of an audit: adapted to the training set, and had again from a finished audit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.detectors.base import Adapted, Detector
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.errors import CorruptFileError, InputError
from lcmem_cli.engine.evaluation.audit.files import read_audit
from lcmem_cli.engine.evaluation.audit.null import split_rows
from lcmem_cli.engine.evaluation.audit.result import NullKind
from lcmem_cli.engine.evaluation.audit.sets import ImageSet, embed_set, list_set
from lcmem_cli.engine.results import Threshold
from lcmem_cli.engine.runs import read_run_config
from lcmem_cli.engine.store.features import FeatureCaches


def adapt_detector(
    detector: Detector, training: ImageSet, *, null: NullKind, rate: float, seed: int
) -> Adapted:
    """Adapt a detector to the training images that an audit searches.

    The rate holds, because neither generated images nor those of the null have a part in it; of a
    split training set only the bank has. It would not with leave-one-out, where the null's images
    had: what an identity shows would count less for them than for images of identities that are not
    there, of which 7 % then passed a rate of 2 % (11 data sets, one at a time).

    Args:
        detector: what made the features of the set.
        training: the training set.
        null: where the real images come from.
        rate: of the audit, on which the size of a split depends.
        seed: of the split.

    Raises:
        NotAdaptableError: the detector cannot be adapted to them.
    """
    bank = np.arange(training.num_distinct)
    if null == "split":
        bank = split_rows(training, rate=rate, seed=seed)[1]
    return detector.adapted(training.features_of(bank), [training.hashes[row] for row in bank])


def detector_of(
    folder: Path,
    compute: Compute = DEFAULT_COMPUTE,
) -> Detector:
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
        CorruptFileError: its files were damaged, or written by an earlier version.
    """
    document, _ = read_audit(folder)
    asked = read_run_config(folder)
    try:
        rule, kind, fingerprint = (
            document["rule"],
            document["null"]["kind"],
            document["fingerprint"],
        )
        num_real, is_adapted = document["null"]["num_scores"], document["adapted_to"] is not None
        name, size, source = asked["detector"], asked["input_size"], Path(asked["training"])
        seed, keeps_features = asked["seed"], asked["cache"]
        is_fpr, rate, limit = rule["kind"] == "fpr", rule["rate"], rule["threshold"]
    except (KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{folder}: was written by an earlier version of lcmem, or damaged ({error!r}); run "
            "the audit again with --overwrite"
        ) from error
    if not is_fpr:
        raise InputError(
            f"{folder}: the audit held a false-discovery rate, which gives no threshold for "
            "single images; run one without --bh"
        )
    detector = load_detector(name, device=compute.device, input_size=size)
    if is_adapted:
        base = Path(asked["basedir"]) if "basedir" in asked else None
        listing = list_set(source, what="training", basedir=base)
        if listing.index is not None:
            listing.index.check(detector.fingerprint)
        training = embed_set(
            listing,
            detector,
            dataclasses.replace(compute, cache=FeatureCaches.of_user() if keeps_features else None),
        )
        detector = adapt_detector(detector, training, null=kind, rate=rate, seed=seed).detector
    if detector.fingerprint != fingerprint:
        raise InputError(
            f"{folder}: the detector is not that of the audit any more: its weights"
            + (", or the training images," if is_adapted else "")
            + " have changed; run the audit again"
        )
    threshold = Threshold(
        value=math.nextafter(limit, math.inf),  # an audit flags what exceeds it
        kind="fpr",
        rate=rate,
        fingerprint=fingerprint,
        fitted_on=f"the best matches of {num_real:,} real images ({kind}) in the audit {folder}",
        num_positives=0,
        num_negatives=num_real,
    )
    detector.thresholds = (threshold,)
    return detector
