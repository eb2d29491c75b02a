"""The null of an audit: how well real images match a training set that does not hold them.

What must hold for the false-positive rate to be true: a generated image that copies nothing and a
real image of the null are alike before the training set, so that neither is more likely to have
the higher best match (they are exchangeable). Three constructions:

- ``held-out``: real images that the generator never saw, searched in the same bank as the
  generated ones. Exact.
- ``split``: identities are drawn from the training set and taken out of the bank, for the null
  AND for the generated images. The bank being the same for both, the rate is exact; but copies
  of the images taken out go unnoticed (unless the file is identical). Searching the generated
  images in the whole training set instead would be wrong: a larger bank gives higher best
  matches, so too many images would be flagged.
- ``leave-one-out``: each training image is searched among those of all other identities. The
  whole training set is searched for the generated images. The rate is approximate: the banks
  differ by one identity, and the scores depend on each other (two images can be each other's best
  match).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.data.loading import load_once
from lcmem_cli.engine.errors import InputError, LcmemError
from lcmem_cli.engine.evaluation.audit.request import AuditRequest
from lcmem_cli.engine.evaluation.audit.result import NullKind, SharedPicture
from lcmem_cli.engine.evaluation.audit.search import search_training
from lcmem_cli.engine.evaluation.audit.sets import Embedded, ImageSet
from lcmem_cli.engine.evaluation.audit.wording import percent
from lcmem_cli.engine.evaluation.calibration import (
    rank_from_above,
    required_null_size,
    required_scores,
)
from lcmem_cli.engine.verification.evidence import SAME_PICTURE, SURELY_SAME

SPLIT_SHARE = 0.25
MAX_LEAVE_ONE_OUT = 10_000
_SAME_FEATURES = 0.01
"""Largest distance, as a share of their length, of two features of the same pixels."""
_MORE_NEIGHBOURS = 6
_MOST_NEIGHBOURS = 128
"""Beyond these, an image is searched among those of other identities alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Null:
    """Real images and their best matches.

    Attributes:
        kind: the construction.
        bank: ``[b]`` rows of the training set that are searched, ascending.
        images: the set that the null's images are from.
        rows: ``[m]`` rows of ``images``.
        matches: ``[m, k]`` rows of the training set that each matches best; -1 where the bank has
            no more.
        scores: ``[m, k]`` of these, best first, fused with the evidence where candidates were
            verified; NaN where there is none.
        values: ``[m, k]`` evidence of each match; -inf where there is none.
        removed: images that are also in the training set.
        num_mixed_up: images taken out because they are among the generated ones.
        searched: the same before candidates were verified, if they were.
    """

    kind: NullKind
    bank: NDArray[np.int64]
    images: ImageSet
    rows: NDArray[np.int64]
    matches: NDArray[np.int64]
    scores: NDArray[np.float64]
    values: NDArray[np.float64]
    removed: tuple[SharedPicture, ...] = ()
    num_mixed_up: int = 0
    searched: Null | None = None

    @property
    def num_evident(self) -> int:
        """Images that evidence takes for altered copies of training images."""
        return int((self.values >= SAME_PICTURE).any(axis=1).sum())

    def without(self, positions: Sequence[int] | NDArray[np.int64]) -> Null:
        """Return the null with some of its images taken out."""
        names = ("rows", "matches", "scores", "values")
        kept = {name: np.delete(getattr(self, name), positions, axis=0) for name in names}
        searched = None if self.searched is None else self.searched.without(positions)
        return dataclasses.replace(self, **kept, searched=searched)


def make_null(embedded: Embedded, request: AuditRequest, k: int = 2) -> Null:
    """Search the real images that generated ones are compared with.

    Args:
        embedded: the sets.
        request: its kind of null, its rate and its seed.
        k: matches of each.

    Raises:
        InputError: there are none, or the detector was adapted to some of them.
    """
    kind, rate, seed = request.null_kind, request.fpr, request.seed
    if kind == "held-out":
        null = held_out_null(embedded, k)
    elif kind == "split":
        null = split_null(embedded, k, rate=rate, seed=seed)
    else:
        null = leave_one_out_null(embedded, k, seed=seed)
    detector, images = embedded.detector, null.images
    used = [row for row in null.rows if images.hashes[row] in detector.adapted_to]
    if used:  # they are nearer to each other, or farther apart, than images that are new to it
        raise InputError(
            f"{detector.name} was adapted to {len(used):,} of the {len(null.rows):,} real "
            "images that the generated ones are compared with, "
            f"{images.record_of(used[0]).path!r} first, so that no rate holds; give other images "
            "with --held-out, or a detector that is not adapted"
        )
    return null


def held_out_null(embedded: Embedded, k: int) -> Null:
    """Search held-out real images in the training set.

    Images whose content is in the training set are taken out: they would raise the null and hide
    copies. So are images that are among the generated ones, each of which would be compared with
    itself.

    Raises:
        InputError: all of them are among the generated ones.
    """
    training, held_out = embedded.sets.training, embedded.sets.held_out
    assert held_out is not None
    known = {digest: row for row, digest in enumerate(training.hashes)}
    exact = {row: known[digest] for row, digest in enumerate(held_out.hashes) if digest in known}
    mixed_up = set(held_out.hashes) & set(embedded.sets.generated.hashes) - known.keys()
    if mixed_up.issuperset(held_out.hashes):
        raise InputError(
            f"{held_out.summary.source}: every held-out image is among the generated ones; give "
            "real images that the generator never saw"
        )
    taken_out = known.keys() | mixed_up
    listed = [row for row, digest in enumerate(held_out.hashes) if digest not in taken_out]
    rows, bank = np.array(listed, dtype=np.int64), np.arange(training.num_distinct)
    null = _searched(embedded, "held-out", held_out, rows, bank, k)
    return dataclasses.replace(
        null,
        removed=tuple(
            _shared(held_out, row, training, match, "exact") for row, match in exact.items()
        ),
        num_mixed_up=len(mixed_up),
    )


def split_rows(
    training: ImageSet, *, rate: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw identities to be taken out of the training set.

    A quarter of the identities, or as many as the rate needs, but at most half of the images.

    Returns:
        Rows that are taken out, and those of the bank that is left.
    """
    groups = training.groups
    sizes = np.bincount(groups)
    identities = np.unique(groups)
    most = len(groups) // 2
    wanted = max(math.ceil(SPLIT_SHARE * len(identities)), required_null_size(rate))
    drawn: list[int] = []
    count = 0
    for group in np.random.default_rng(seed).permutation(identities):
        if len(drawn) < wanted and count + sizes[group] <= most:
            drawn.append(group)
            count += sizes[group]
    chosen = np.isin(groups, drawn)
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def split_null(embedded: Embedded, k: int, *, rate: float, seed: int) -> Null:
    """Take identities out of the training set, see ``split_rows``, and search them in the rest."""
    training = embedded.sets.training
    rows, bank = split_rows(training, rate=rate, seed=seed)
    return _searched(embedded, "split", training, rows, bank, k)


def _searched(
    embedded: Embedded,
    kind: NullKind,
    images: ImageSet,
    rows: NDArray[np.int64],
    bank: NDArray[np.int64],
    k: int,
) -> Null:
    """Search some rows of a set in a bank that holds none of their contents."""
    found = search_training(embedded, images.features_of(rows), bank, k)
    null = _empty_null(kind, bank, images, rows, k)
    null.matches[:, : found.rows.shape[1]] = found.rows
    null.scores[:, : found.scores.shape[1]] = found.scores
    return null


def _empty_null(
    kind: NullKind, bank: NDArray[np.int64], images: ImageSet, rows: NDArray[np.int64], k: int
) -> Null:
    return Null(
        kind=kind,
        bank=bank,
        images=images,
        rows=rows,
        matches=np.full((len(rows), k), -1, dtype=np.int64),
        scores=np.full((len(rows), k), np.nan),
        values=np.full((len(rows), k), -np.inf),
    )


def leave_one_out_null(embedded: Embedded, wanted: int, *, seed: int) -> Null:
    """Search training images among those of other identities.

    Of more than ``MAX_LEAVE_ONE_OUT`` images a seeded sample is used.
    """
    training = embedded.sets.training
    count, groups = training.num_distinct, training.groups
    everything = sample = np.arange(count)
    if count > MAX_LEAVE_ONE_OUT:
        rng = np.random.default_rng(seed)
        sample = np.sort(rng.choice(count, MAX_LEAVE_ONE_OUT, replace=False))
    null = _empty_null("leave-one-out", everything, training, sample, wanted)
    # An image's nearest neighbours are often of its own identity. So each search asks for more
    # neighbours than the last, of those images only that still lack some of another identity.
    pending = everything[: len(sample)]
    k = min(count, wanted + _MORE_NEIGHBOURS)
    while len(pending) and k <= _MOST_NEIGHBOURS:
        queries = sample[pending]
        found = search_training(embedded, training.features_of(queries), everything, k)
        other = groups[found.rows] != groups[queries][:, None]
        settled = (other.sum(axis=1) >= wanted) | (k == count)
        for position in np.flatnonzero(settled):
            best = np.flatnonzero(other[position])[:wanted]
            null.matches[pending[position], : len(best)] = found.rows[position, best]
            null.scores[pending[position], : len(best)] = found.scores[position, best]
        pending = pending[~settled]
        k = min(count, 4 * k)
    # What is left has many images of its own identity nearer than any other's.
    left_groups = groups[sample[pending]]
    for group in np.unique(left_groups):
        own, others = pending[left_groups == group], np.flatnonzero(groups != group)
        if len(others):
            found = search_training(embedded, training.features_of(sample[own]), others, wanted)
            null.matches[own, : found.rows.shape[1]] = found.rows
            null.scores[own, : found.scores.shape[1]] = found.scores
    return null.without(np.flatnonzero(null.matches[:, 0] < 0))  # a set of one identity: no other


def one_of_each_identity(null: Null) -> Null:
    """Keep the image of each identity that matches best.

    Images of one person or patient have like scores, so they do not count as independent. The best
    of several scores is higher than one of them, so the rate still holds.
    """
    order = np.lexsort((null.rows, -null.scores[:, 0]))
    _, first = np.unique(null.images.groups[null.rows[order]], return_index=True)
    return null.without(np.setdiff1d(np.arange(len(order)), order[first]))


def independent(null: Null, embedded: Embedded, request: AuditRequest) -> Null:
    """Take out what is also in the training set, keep one image of each identity, and count.

    Raises:
        InputError: there are too few for the rate.
    """
    null = one_of_each_identity(without_same_pictures(null, embedded))
    check_size(
        len(null.rows),
        request,
        source=null.images.summary.source,
        num_removed=len(null.removed),
    )
    return null


def without_same_pictures(null: Null, embedded: Embedded) -> Null:
    """Take out images that show the same picture as a training image.

    They have its pixels, or evidence of ``SURELY_SAME`` at least. The limit is strict on purpose: a
    copy that stays in the null makes the threshold too high, whereas a real image taken out by
    mistake would make it too low. What evidence merely suggests stays and is told.
    """
    training, ranks = embedded.sets.training, embedded.compute.ranks
    alike = np.zeros(len(null.rows), dtype=np.bool_)
    if ranks.is_main:  # files of an index may be on its machine alone, so all take its word
        alike = same_pixels(null.images, null.rows, training, null.matches[:, 0])
    alike = ranks.broadcast(alike)
    removed = [
        _shared(null.images, int(null.rows[p]), training, int(null.matches[p, 0]), "pixels")
        for p in np.flatnonzero(alike)
    ]
    best = null.values.argmax(axis=1)[:, None]
    sure = (np.take_along_axis(null.values, best, 1)[:, 0] >= SURELY_SAME) & ~alike
    matches = np.take_along_axis(null.matches, best, 1)[:, 0]
    removed += [
        _shared(null.images, int(null.rows[p]), training, int(matches[p]), "altered")
        for p in np.flatnonzero(sure)
    ]
    null = null.without(np.flatnonzero(alike | sure))
    return dataclasses.replace(null, removed=null.removed + tuple(removed))


def same_pixels(
    images: ImageSet, rows: NDArray[np.int64], training: ImageSet, matches: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which contents have the decoded pixels of a training image.

    Files are opened only where the features are the same up to rounding, as those of equal pixels
    are. One that has changed since it was embedded has not.

    Args:
        images: a set.
        rows: ``[n]`` of it.
        training: the training set.
        matches: ``[n]`` rows of it.
    """

    def is_same(row: int, match: int) -> bool:
        a, b = (
            np.asarray(part.features[number], np.float64)
            for part, number in ((images, row), (training, match))
        )
        if np.linalg.norm(a - b) > _SAME_FEATURES * np.linalg.norm(a):
            return False
        try:
            first, second = (
                load_once(part.files[part.first_image[number]], part.hashes[number])[0]
                for part, number in ((images, row), (training, match))
            )
        except LcmemError:
            return False
        return first.size == second.size and first.tobytes() == second.tobytes()

    pairs = zip(rows.tolist(), matches.tolist(), strict=True)
    return np.array([is_same(row, match) for row, match in pairs], dtype=np.bool_)


def allowed_of(count: int, kind: NullKind, request: AuditRequest) -> int:
    """Return how many of so many null scores may lie at or above the threshold; 0: too few."""
    return rank_from_above(
        count, request.fpr, in_pairs=kind == "leave-one-out", confidence=request.confidence
    )


def threshold_of(
    scores: NDArray[np.float64], kind: NullKind, request: AuditRequest
) -> float | None:
    """Return the threshold that null scores ``[m]`` give at a rate per image.

    ``None`` where they are too few, or where Benjamini-Hochberg makes the threshold.
    """
    allowed = allowed_of(len(scores), kind, request)
    return float(np.sort(scores)[-allowed]) if allowed and not request.bh else None


def check_size(count: int, request: AuditRequest, *, source: str, num_removed: int = 0) -> None:
    """Refuse a rate for which the null is too small.

    Args:
        count: real images of different identities.
        request: its rate, confidence and kind of null.
        source: where they come from.
        num_removed: images taken out because they are in the training set.

    Raises:
        InputError: says how many images are needed, and which rate these allow.
    """
    rate, kind, confidence = request.fpr, request.null_kind, request.confidence
    in_pairs = kind == "leave-one-out"
    needed = required_scores(rate, in_pairs=in_pairs, confidence=confidence)
    if count >= needed:
        return
    gives = {
        "held-out": f"{source} gives {count} held-out images",
        "split": f"splitting {source} gives {count} real images",
        "leave-one-out": f"{source} gives {count} images to leave out",
    }[kind]
    sure = "" if confidence is None else f", with a confidence of {percent(confidence)},"
    lost = f" ({num_removed} more are in the training set)" if num_removed else ""
    smallest = smallest_rate(count, in_pairs=in_pairs, confidence=confidence)
    allows = f"these allow --fpr {smallest:g} or more" if smallest < 1 else "these allow no rate"
    raise InputError(
        f"a false-positive rate of {percent(rate)} per image{sure} needs at least {needed:,} real "
        f"images of different identities, {gives}{lost}; {allows}; give more real images with "
        "--held-out, or accept a larger rate"
    )


def smallest_rate(count: int, *, in_pairs: bool = False, confidence: float | None = None) -> float:
    """Return the smallest rate that ``count`` null scores allow, rounded up to four digits."""
    if not count:
        return 1.0
    exact = (2 if in_pairs else 1) / (count + 1)
    if confidence is not None:
        exact = 1 - (1 - confidence) ** (1 / count)
    scale = 10.0 ** (3 - math.floor(math.log10(exact)))
    return float(math.ceil(exact * scale - 1e-9) / scale)


def _shared(
    images: ImageSet,
    row: int,
    training: ImageSet,
    match: int,
    kind: Literal["exact", "pixels", "altered"],
) -> SharedPicture:
    return SharedPicture(
        path=images.record_of(row).path, match=training.record_of(match).path, kind=kind
    )
