"""Candidates of an audit, aligned and ordered anew: generated images and the null alike.

Both get the same number of candidates verified, and score and evidence are fused before anything
is flagged. So a real image is as likely to be lifted by its evidence as an image that copies
nothing, and the conformal rate holds whatever the evidence is.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.frames import split_frame
from lcmem_cli.engine.data.sources.opened import is_there
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.null import Null
from lcmem_cli.engine.evaluation.audit.request import AuditRequest
from lcmem_cli.engine.evaluation.audit.search import Found
from lcmem_cli.engine.evaluation.audit.sets import Embedded, ImageSet, Listing, Sets
from lcmem_cli.engine.verification.bank import FeatureBank, IndexKeypoints, read_bank, read_indexed
from lcmem_cli.engine.verification.verify import NUM_CANDIDATES, Verification, fuse, verify


def is_to_verify(
    request: AuditRequest, listings: Sets[Listing], detector: Detector, compute: Compute
) -> bool:
    """Return whether candidates are verified: by default where that is possible.

    Raises:
        InputError: it is asked for and not possible.
    """
    if request.verify is False:
        return False
    reason = None
    if not detector.gives_probability:
        reason = f"the scores of {detector.name} are not on the scale of probabilities"
    else:
        # Files of an index may be on one machine alone; the processes of all must read them.
        files = [
            split_frame(file)[0]
            for _, listing in listings.named()
            if listing.index is not None and not IndexKeypoints(listing.index.folder).are_kept
            for file in listing.files
        ]
        missing = sum(not is_there(file) for file in files)
        if missing := max(compute.ranks.gather(missing)):
            reason = (
                f"{missing:,} files are not where their index found them, and it holds no keypoints"
            )
            if request.verify is None:
                compute.reporter.warn(f"Candidates are not verified: {reason}")
    if reason and request.verify:
        raise InputError(f"--verify is not possible: {reason}; leave it out")
    return reason is None


def verify_candidates(embedded: Embedded, null: Null, found: Found) -> tuple[Null, Found]:
    """Align the best candidates of the null and of the generated images; order them anew.

    Real images whose file is gone leave the null, as they cannot be verified.
    """
    compute = embedded.compute
    real_rows = np.where(null.matches < 0, null.matches[:, :1], null.matches)[:, :NUM_CANDIDATES]
    wanted = np.unique(np.concatenate([found.rows[:, :NUM_CANDIDATES].ravel(), real_rows.ravel()]))
    training = _bank(embedded.sets.training, wanted, compute).numbered(wanted)
    real = _bank(null.images, null.rows, compute)
    real_values = verify(real, training, real_rows, compute).values
    real_values[null.matches[:, :NUM_CANDIDATES] < 0] = -np.inf
    gone = [position for position in range(len(null.rows)) if real[position] is None]
    return _ordered_null(null, real_values).without(gone), _verified(embedded, found, training)


def verify_found(embedded: Embedded, found: Found) -> Found:
    """Align the best candidates of the generated images alone; order them anew."""
    wanted = np.unique(found.rows[:, :NUM_CANDIDATES])
    training = _bank(embedded.sets.training, wanted, embedded.compute).numbered(wanted)
    return _verified(embedded, found, training)


def _verified(embedded: Embedded, found: Found, training: FeatureBank) -> Found:
    generated, compute = embedded.sets.generated, embedded.compute
    queries = _bank(generated, np.arange(generated.num_distinct), compute)
    return with_evidence(found, verify(queries, training, found.rows[:, :NUM_CANDIDATES], compute))


def _ordered_null(null: Null, values: NDArray[np.float64]) -> Null:
    values = _padded(values, null.scores.shape[1])
    scores = fuse(null.scores, values)
    order = np.lexsort((null.matches, -values, -scores), axis=1)
    return dataclasses.replace(
        null,
        matches=np.take_along_axis(null.matches, order, 1),
        scores=np.take_along_axis(scores, order, 1),
        values=np.take_along_axis(values, order, 1),
        searched=null,
    )


def with_evidence(found: Found, verification: Verification) -> Found:
    """Return the matches with what aligning their first ones found, in order of both together."""
    values = _padded(verification.values, found.scores.shape[1])
    scores = fuse(found.scores, values)
    order = np.lexsort((found.rows, -values, -scores, ~found.identical), axis=1)
    fused = dataclasses.replace(
        found,
        scores=scores,
        best=np.maximum(found.best, scores.max(axis=1)),
        values=values,
        verification=verification,
        searched=found,
    )
    return fused.reordered(order)


def _padded(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return values of more candidates than were verified: of the others nothing is known."""
    padded = np.full((len(values), width), -np.inf)
    padded[:, : values.shape[1]] = values
    return padded


def _bank(images: ImageSet, rows: NDArray[np.int64], compute: Compute) -> FeatureBank:
    """Return local features of some contents, numbered from 0."""
    files = [images.files[image] for image in images.first_image[rows]]
    hashes = [images.hashes[row] for row in rows]
    if images.is_index:
        return read_indexed(Path(images.summary.source), files, hashes, compute)
    return read_bank(files, hashes, compute)
