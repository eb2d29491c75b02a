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
from lcmem_cli.engine.data.frames import has_file
from lcmem_cli.engine.detectors.base import Detector, FloatArray, score_listed
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.null import Null
from lcmem_cli.engine.evaluation.audit.request import AuditRequest
from lcmem_cli.engine.evaluation.audit.search import Found
from lcmem_cli.engine.evaluation.audit.sets import Embedded, ImageSet, Listing, Sets
from lcmem_cli.engine.verification.bank import FeatureBank, IndexKeypoints, read_bank, read_indexed
from lcmem_cli.engine.verification.candidates import PictureSearch, merged
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
            file
            for _, listing in listings.named()
            if listing.index is not None and not IndexKeypoints(listing.index.folder).are_kept
            for file in listing.files
        ]
        missing = sum(not has_file(file) for file in files)
        if missing := max(compute.ranks.gather(missing)):
            reason = (
                f"{missing:,} files are not where their index found them, and it holds no keypoints"
            )
            if request.verify is None:
                compute.reporter.warn(f"Candidates are not verified: {reason}")
    if reason and request.verify:
        raise InputError(f"--verify is not possible: {reason}; leave it out")
    return reason is None


def verify_candidates(
    embedded: Embedded, by_picture: ByPicture, null: Null, found: Found
) -> tuple[Null, Found]:
    """Align the best candidates of the null and of the generated images; order them anew.

    Real images whose file is gone leave the null, as they cannot be verified.
    """
    compute = embedded.compute
    searched_null, searched = null, found
    null = by_picture.with_null(null)
    found = by_picture.with_found(found, embedded.sets.generated.features)
    real_rows = np.where(null.matches < 0, null.matches[:, :1], null.matches)[:, :NUM_CANDIDATES]
    wanted = np.unique(np.concatenate([found.rows[:, :NUM_CANDIDATES].ravel(), real_rows.ravel()]))
    training = features_of(embedded.sets.training, wanted, compute).numbered(wanted)
    real = features_of(null.images, null.rows, compute)
    real_values = verify(real, training, real_rows, compute).values
    real_values[null.matches[:, :NUM_CANDIDATES] < 0] = -np.inf
    gone = [position for position in range(len(null.rows)) if real[position] is None]
    null = _ordered_null(null, real_values, searched_null).without(gone)
    return null, _verified(embedded, found, training, searched)


def verify_found(embedded: Embedded, by_picture: ByPicture, found: Found) -> Found:
    """Align the best candidates of the generated images alone; order them anew."""
    searched, found = found, by_picture.with_found(found, embedded.sets.generated.features)
    wanted = np.unique(found.rows[:, :NUM_CANDIDATES])
    training = features_of(embedded.sets.training, wanted, embedded.compute).numbered(wanted)
    return _verified(embedded, found, training, searched)


def _verified(embedded: Embedded, found: Found, training: FeatureBank, searched: Found) -> Found:
    generated, compute = embedded.sets.generated, embedded.compute
    queries = features_of(generated, np.arange(generated.num_distinct), compute)
    verification = verify(queries, training, found.rows[:, :NUM_CANDIDATES], compute)
    return with_evidence(found, verification, searched)


@dataclasses.dataclass(frozen=True)
class ByPicture:
    """Gives some of the candidates' places to training images that are alike by picture.

    Null and generated images get as many. A real image of the training set finds none of its own
    identity.

    Attributes:
        embedded: the sets.
        bank: rows of the training set that are searched.
        groups: identities of the training set, where the null is of it.
        search: of these rows; ``None`` where features hold no pictures.
    """

    embedded: Embedded
    bank: NDArray[np.int64]
    groups: NDArray[np.int64] | None
    search: PictureSearch | None

    @classmethod
    def beside(cls, embedded: Embedded, null: Null) -> ByPicture:
        """Search what the null's images are searched in."""
        is_own = null.kind == "leave-one-out"  # then the bank is all of the training set
        return cls.of(embedded, null.bank, embedded.sets.training.groups if is_own else None)

    @classmethod
    def of(
        cls, embedded: Embedded, bank: NDArray[np.int64], groups: NDArray[np.int64] | None = None
    ) -> ByPicture:
        """Search rows of the training set."""
        detector, features = embedded.detector, embedded.sets.training.features_of(bank)
        search = None
        if detector.pictures(features[:1]) is not None:
            search = PictureSearch(
                lambda rows: _pictures(detector, features[rows]), len(bank), groups
            )
        return cls(embedded, bank, groups, search)

    def with_null(self, null: Null) -> Null:
        """Return the null with these matches too."""
        queries = null.images.features_of(null.rows)
        own = None if self.groups is None else self.groups[null.rows]
        matches, scores = self._mixed(queries, null.matches, null.scores, own)
        return dataclasses.replace(null, matches=matches, scores=scores)

    def with_found(self, found: Found, queries: FloatArray) -> Found:
        """Return the matches of images of some features with these too."""
        rows, scores = self._mixed(queries, found.rows, found.scores)
        return dataclasses.replace(found, rows=rows, scores=scores)

    def _mixed(
        self,
        queries: FloatArray,
        rows: NDArray[np.int64],
        scores: NDArray[np.float64],
        groups: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return candidates ``[n, k]`` and their scores; the processes share the queries."""
        if self.search is None or not len(queries):
            return rows, scores
        detector, ranks = self.embedded.detector, self.embedded.compute.ranks
        mine = np.array_split(np.arange(len(queries)), ranks.size)[ranks.rank]
        own = None if groups is None else groups[mine]
        alike = self.search.nearest(_pictures(detector, queries[mine]), NUM_CANDIDATES, own)
        alike = alike._replace(rows=self.bank[alike.rows])
        mixed = np.concatenate(ranks.gather(merged(rows[mine], alike, NUM_CANDIDATES)))
        same = mixed[:, :, None] == rows[:, None, :]
        mixed_scores = np.take_along_axis(scores, same.argmax(axis=2), 1)
        query, place = np.nonzero(~same.any(axis=2))
        features = self.embedded.sets.training.features
        mixed_scores[query, place] = score_listed(
            detector, queries, query, mixed[query, place], features
        )
        return mixed, mixed_scores


def _pictures(detector: Detector, features: FloatArray) -> FloatArray:
    pictures = detector.pictures(features)
    assert pictures is not None
    return pictures


def _ordered_null(null: Null, values: NDArray[np.float64], searched: Null) -> Null:
    values = _padded(values, null.scores.shape[1])
    scores = fuse(null.scores, values)
    order = np.lexsort((null.matches, -values, -scores), axis=1)
    return dataclasses.replace(
        null,
        matches=np.take_along_axis(null.matches, order, 1),
        scores=np.take_along_axis(scores, order, 1),
        values=np.take_along_axis(values, order, 1),
        searched=searched,
    )


def with_evidence(found: Found, verification: Verification, searched: Found) -> Found:
    """Return the matches with what aligning their first ones found, in order of both together.

    Args:
        found: matches of which the first are verified.
        verification: of these.
        searched: the matches as the detector's scores alone order them.
    """
    values = _padded(verification.values, found.scores.shape[1])
    scores = fuse(found.scores, values)
    order = np.lexsort((found.rows, -values, -scores, ~found.identical), axis=1)
    fused = dataclasses.replace(
        found,
        scores=scores,
        best=np.maximum(found.best, scores.max(axis=1)),
        values=values,
        verification=verification,
        searched=searched,
    )
    return fused.reordered(order)


def _padded(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return values of more candidates than were verified: of the others nothing is known."""
    padded = np.full((len(values), width), -np.inf)
    padded[:, : values.shape[1]] = values
    return padded


def features_of(images: ImageSet, rows: NDArray[np.int64], compute: Compute) -> FeatureBank:
    """Return local features of some contents of a set, numbered from 0."""
    files = [images.files[image] for image in images.first_image[rows]]
    hashes = [images.hashes[row] for row in rows]
    if images.is_index:
        return read_indexed(Path(images.summary.source), files, hashes, compute)
    return read_bank(files, hashes, compute)
