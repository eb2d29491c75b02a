"""An audit of features that any model has made: the same search, null, calibration and sentences.

There are no files, so candidates are not verified, equal pixels are not looked for, and no feature
counts as an identical file. Held-out images whose features are a training image's leave the null.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.detectors.base import FloatArray, check_features
from lcmem_cli.engine.detectors.vectors import Likeness, VectorDetector
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.conclude import conclude, flag
from lcmem_cli.engine.evaluation.audit.conditions import check_conditions
from lcmem_cli.engine.evaluation.audit.null import independent, make_null
from lcmem_cli.engine.evaluation.audit.request import AuditRequest
from lcmem_cli.engine.evaluation.audit.result import AuditResult, Sensitivity
from lcmem_cli.engine.evaluation.audit.search import best_matches
from lcmem_cli.engine.evaluation.audit.sets import Embedded, ImageSet, Listing, Sets, assemble
from lcmem_cli.engine.files import sha256_bytes
from lcmem_cli.engine.reporter import SILENT, Reporter


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Features of some images, with what is known of them.

    Attributes:
        features: ``[n, d]``, array or tensor.
        names: of the images, such as their paths; by default their positions.
        ids: identities; by default each image is its own. Of each identity one image counts in the
            null.
    """

    features: FloatArray | torch.Tensor
    names: Sequence[str] | None = None
    ids: Sequence[str] | None = None


Given = FeatureSet | FloatArray | torch.Tensor


def audit_features(
    *,
    generated: Given,
    training: Given,
    held_out: Given | None = None,
    score: Likeness = "cosine",
    fpr: float = 0.01,
    confidence: float | None = None,
    top_k: int = 5,
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> AuditResult:
    """Audit features of any model, such as DINOv2 or SSCD, as ``audit`` does images.

    Args:
        generated: features ``[n, d]`` of generated images, or a ``FeatureSet`` with names.
        training: ``[m, d]`` of the generator's training set.
        held_out: ``[h, d]`` of real images that the generator never saw; ``None``: each training
            image is searched among the others, see ``audit.null``.
        score: ``cosine``, ``correlation``, or ``euclidean`` (the negative distance).
        fpr: chance of flagging an image that copies nothing, in (0, 1).
        confidence: that the rate holds, see ``audit``.
        top_k: matches to list per generated image.
        seed: see ``audit``.
        reporter: told progress and warnings.

    Raises:
        InputError: features of different lengths or that are not finite, an empty set, or too few
            real images for the rate.

    Example:
        >>> result = audit_features(generated=a, training=b, held_out=c)
        >>> print(result.statement)
    """
    started = datetime.datetime.now(datetime.timezone.utc)
    if score not in ("cosine", "correlation", "euclidean"):
        raise InputError(f"score must be cosine, correlation or euclidean, not '{score}'")
    given = Sets(generated=generated, training=training, held_out=held_out)
    request = AuditRequest(
        sources=given.map(lambda what, _: f"{what} features"),
        fpr=fpr,
        adapt=False,
        verify=False,
        top_k=top_k,
        confidence=confidence,
        seed=seed,
    )
    sets = given.map(_image_set)
    widths = {what: images.features.shape[1] for what, images in sets.named()}
    if len(set(widths.values())) > 1:
        raise InputError(f"features of different lengths cannot be compared: {widths}")
    embedded = Embedded(
        detector=_Given(score, widths["training"]), sets=sets, compute=Compute(reporter=reporter)
    )
    conditions = check_conditions(embedded, seed=seed)
    null = independent(make_null(embedded, request), embedded, request)
    found = best_matches(embedded, null.bank, max(2, top_k))
    found, flags = flag(embedded, null, found, request)
    sensitivity = Sensitivity.unknown("there are no files to plant altered copies of")
    result = conclude(request, embedded, null, found, flags, conditions, sensitivity, started)
    for warning in result.warnings:
        reporter.warn(warning)
    return result


class _Given(VectorDetector):
    """Scores features that are there already."""

    def __init__(self, likeness: Likeness, num_features: int) -> None:
        self.likeness = likeness
        self.name = f"features ({likeness})"
        self.fingerprint = sha256_bytes(f"{self.name}/{num_features}".encode())
        self.input_size = 0
        self.num_features = num_features

    def embed_batch(self, batch: torch.Tensor) -> FloatArray:
        """Refuse: what made the features is not known.

        Raises:
            InputError: always.
        """
        raise InputError("these features were given; images cannot be compared with them")


def _image_set(what: str, given: Given) -> ImageSet:
    """Return features as the set of an audit; those that are equal share a row."""
    known = given if isinstance(given, FeatureSet) else FeatureSet(features=given)
    features = check_features(
        known.features, len(known.features), None, source=f"the {what} features"
    )
    count = len(features)
    names = _labels(known.names, count, what=f"names of the {what} features")
    ids = names if known.ids is None else _labels(known.ids, count, what=f"ids of the {what} set")
    # No generated image is taken for the file of another.
    prefix = b"generated" if what == "generated" else b""
    hashes = [sha256_bytes(prefix + row.tobytes()) for row in features]
    first: dict[str, int] = {}
    for place, content in enumerate(hashes):
        first.setdefault(content, place)
    row_of = {content: row for row, content in enumerate(first)}
    records = [Record(path=name, id=identity) for name, identity in zip(names, ids, strict=True)]
    listing = Listing(
        what=what,
        source=f"{what} features",
        folder=Path(),
        records=records,
        files=[Path(name) for name in names],
    )
    if not records:
        raise InputError(f"the {what} set holds no features")
    images = assemble(
        listing,
        rows=np.array([row_of[content] for content in hashes], dtype=np.int64),
        hashes=hashes,
        features=features[list(first.values())] if len(first) < count else features,
        guessed=np.zeros(len(first), dtype=np.bool_),
    )
    # Names with folders in them are names, and do not tell identities.
    num_identities = None if known.ids is None else len(set(ids))
    summary = dataclasses.replace(images.summary, num_identities=num_identities)
    return dataclasses.replace(images, summary=summary)


def _labels(given: Sequence[Any] | None, count: int, *, what: str) -> list[str]:
    if given is None:
        return [str(number) for number in range(count)]
    if len(given) != count:
        raise InputError(f"{len(given):,} {what} for {count:,} rows; give one for each")
    return [str(name) for name in given]
