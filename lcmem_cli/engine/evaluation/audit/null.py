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
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.data.images import load_pixels
from lcmem_cli.engine.detectors.base import Detector, FloatArray
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.errors import InputError, LcmemError
from lcmem_cli.engine.evaluation.audit.result import (
    NullKind,
    SharedPicture,
    counted,
    fewest_flagged,
    percent,
)
from lcmem_cli.engine.evaluation.audit.sets import ImageSet
from lcmem_cli.engine.evaluation.calibration import required_null_size
from lcmem_cli.engine.store.search import TopK, merge_top_k

SPLIT_SHARE = 0.25
MAX_LEAVE_ONE_OUT = 10_000
SAME_PICTURE_CORRELATION = 0.999
MAX_PICTURE_CHECKS = 1000
_PICTURE_SIZE = 16
_FIRST_NEIGHBOURS = 8
_MOST_NEIGHBOURS = 128
"""Beyond these, an image is searched among those of other identities alone."""
_BANK_BYTES = 256 << 20
_PAIR_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Null:
    """Real images and their best matches.

    Attributes:
        kind: the construction.
        bank: ``[b]`` rows of the training set that are searched, ascending.
        images: the set that the null's images are from.
        rows: ``[m]`` rows of ``images``.
        matches: ``[m]`` row of the training set that each matches best.
        scores: ``[m, 2]`` best and second-best score in the bank; the second is NaN where there is
            none.
        removed: images that are also in the training set.
        num_mixed_up: images taken out because they are among the generated ones.
    """

    kind: NullKind
    bank: NDArray[np.int64]
    images: ImageSet
    rows: NDArray[np.int64]
    matches: NDArray[np.int64]
    scores: NDArray[np.float64]
    removed: tuple[SharedPicture, ...]
    num_mixed_up: int = 0

    @property
    def num_identities(self) -> int:
        """Identities among its images."""
        return len(np.unique(self.images.groups[self.rows]))


def search(detector: Detector, queries: FloatArray, bank: FloatArray, k: int, ranks: Ranks) -> TopK:
    """Find the ``k`` best rows of the bank; every process searches its part of it.

    The matches found are scored once more pair by pair. Matrix products round differently with the
    number of rows; so the result is the same to the last bit for any number of processes.
    """
    k = min(k, len(bank))
    if not len(queries):
        return TopK(np.zeros((0, k)), np.zeros((0, k), dtype=np.int64))
    bounds = [len(bank) * part // ranks.size for part in range(ranks.size + 1)]
    low, high = bounds[ranks.rank], bounds[ranks.rank + 1]
    found = detector.top_k(queries, bank[low:high], k) if high > low else None
    parts = {
        offset: part for offset, part in zip(bounds, ranks.gather(found), strict=False) if part
    }
    merged = merge_top_k(list(parts.values()), list(parts), k)
    rows = merged.rows
    scores = np.empty(rows.shape)
    block = max(1, _PAIR_BYTES // (k * queries[:1].nbytes))
    for start in range(0, len(rows), block):
        part_rows = rows[start : start + block]
        left = np.repeat(queries[start : start + block], k, axis=0)
        pairs = detector.score_features(left, bank[part_rows.ravel()])
        scores[start : start + block] = pairs.reshape(-1, k)
    order = np.lexsort((rows, -scores), axis=1)
    return TopK(
        np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1), merged.recall
    )


def held_out_null(
    detector: Detector,
    training: ImageSet,
    held_out: ImageSet,
    generated: ImageSet,
    ranks: Ranks,
) -> Null:
    """Search held-out real images in the training set.

    Images whose content is in the training set, or that show the picture of their best match saved
    anew, are taken out: they would raise the null and hide copies. So are images that are among
    the generated ones, each of which would be compared with itself.

    Raises:
        InputError: all of them are.
    """
    known = {digest: row for row, digest in enumerate(training.hashes)}
    exact = {row: known[digest] for row, digest in enumerate(held_out.hashes) if digest in known}
    mixed_up = set(held_out.hashes) & set(generated.hashes) - known.keys()
    if mixed_up.issuperset(held_out.hashes):
        raise InputError(
            f"{held_out.summary.source}: every held-out image is among the generated ones; give "
            "real images that the generator never saw"
        )
    taken_out = known.keys() | mixed_up
    listed = [row for row, digest in enumerate(held_out.hashes) if digest not in taken_out]
    rows = np.array(listed, dtype=np.int64)
    found = search(detector, held_out.features_of(rows), training.features, 2, ranks)
    null = Null(
        kind="held-out",
        bank=np.arange(training.num_distinct),
        images=held_out,
        rows=rows,
        matches=found.rows[:, 0],
        scores=_two_columns(found.scores),
        removed=tuple(
            _shared(held_out, row, training, match, "exact") for row, match in exact.items()
        ),
        num_mixed_up=len(mixed_up),
    )
    return without_same_pictures(null, training, ranks)


def split_rows(
    training: ImageSet, *, rate: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw identities to be taken out of the training set.

    A quarter of the images, or as many as the rate needs, but at most half.

    Returns:
        Rows that are taken out, and those of the bank that is left.
    """
    groups = training.groups
    sizes = np.bincount(groups)
    most = len(groups) // 2
    wanted = min(max(math.ceil(SPLIT_SHARE * len(groups)), required_null_size(rate)), most)
    drawn: list[int] = []
    count = 0
    for group in np.random.default_rng(seed).permutation(np.unique(groups)):
        if count < wanted and count + sizes[group] <= most:
            drawn.append(group)
            count += sizes[group]
    chosen = np.isin(groups, drawn)
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def split_null(
    detector: Detector, training: ImageSet, *, rate: float, seed: int, ranks: Ranks
) -> Null:
    """Take identities out of the training set, see ``split_rows``, and search them in the rest."""
    rows, bank = split_rows(training, rate=rate, seed=seed)
    found = search(detector, training.features_of(rows), training.features_of(bank), 2, ranks)
    null = Null(
        kind="split",
        bank=bank,
        images=training,
        rows=rows,
        matches=bank[found.rows[:, 0]],
        scores=_two_columns(found.scores),
        removed=(),
    )
    return without_same_pictures(null, training, ranks)


def leave_one_out_null(detector: Detector, training: ImageSet, *, seed: int, ranks: Ranks) -> Null:
    """Search training images among those of other identities.

    Of more than ``MAX_LEAVE_ONE_OUT`` images a seeded sample is used.
    """
    count = training.num_distinct
    sample = np.arange(count)
    if count > MAX_LEAVE_ONE_OUT:
        rng = np.random.default_rng(seed)
        sample = np.sort(rng.choice(count, MAX_LEAVE_ONE_OUT, replace=False))
    matches = np.full(len(sample), -1, dtype=np.int64)
    scores = np.full((len(sample), 2), np.nan)
    pending = np.arange(len(sample))
    k = min(count, _FIRST_NEIGHBOURS)
    while len(pending) and k <= _MOST_NEIGHBOURS:
        queries = training.features_of(sample[pending])
        found = search(detector, queries, training.features, k, ranks)
        other = training.groups[found.rows] != training.groups[sample[pending]][:, None]
        settled = (other.sum(axis=1) >= 2) | (k == count)
        for position in np.flatnonzero(settled):
            best = np.flatnonzero(other[position])[:2]
            if len(best):
                matches[pending[position]] = found.rows[position, best[0]]
            scores[pending[position], : len(best)] = found.scores[position, best]
        pending = pending[~settled]
        k = min(count, 4 * k)
    groups = training.groups[sample[pending]]
    for group in np.unique(groups):  # many images of one identity: search among the others
        own = pending[groups == group]
        found = _search_without(detector, training, sample[own], int(group), ranks)
        if found.rows.shape[1]:
            matches[own] = found.rows[:, 0]
            scores[own, : found.scores.shape[1]] = found.scores
    usable = matches >= 0
    null = Null(
        kind="leave-one-out",
        bank=np.arange(count),
        images=training,
        rows=sample[usable],
        matches=matches[usable],
        scores=scores[usable],
        removed=(),
    )
    return without_same_pictures(null, training, ranks)


def _search_without(
    detector: Detector, training: ImageSet, rows: NDArray[np.int64], group: int, ranks: Ranks
) -> TopK:
    """Find the two best matches of training images among those of other identities."""
    queries = training.features_of(rows)
    parts: list[TopK] = []
    block = max(1, _BANK_BYTES // training.features[:1].nbytes)
    for start in range(0, training.num_distinct, block):
        others = start + np.flatnonzero(training.groups[start : start + block] != group)
        if len(others):
            found = search(detector, queries, training.features[others], 2, ranks)
            parts.append(TopK(found.scores, others[found.rows]))
    if not parts:
        return TopK(np.zeros((len(rows), 0)), np.zeros((len(rows), 0), dtype=np.int64))
    return merge_top_k(parts, [0] * len(parts), 2)


def without_same_pictures(null: Null, training: ImageSet, ranks: Ranks) -> Null:
    """Take out images that show the same picture as their best match, saved anew.

    Compared are 16 x 16 grey pixels, too few to show what compression does to a small image; a
    correlation of at least 0.999 counts as the same. The limit is strict on purpose: a copy that
    stays in the null makes the threshold too high, whereas a real image taken out by mistake would
    make it too low. (Over 13 data sets, no two images of different identities came above 0.987, and
    JPEGs of quality 75 not below 0.9996.) Checked are the thousand images with the highest scores:
    the others do not move a threshold.
    """
    order = np.argsort(-null.scores[:, 0], kind="stable")[:MAX_PICTURE_CHECKS]
    same: list[int] = []
    if ranks.is_main:
        for position in order:
            image = null.images.files[null.images.first_image[null.rows[position]]]
            match = training.files[training.first_image[null.matches[position]]]
            if same_picture(image, match):
                same.append(int(position))
    same = sorted(ranks.broadcast(same))
    if not same:
        return null
    keep = np.ones(len(null.rows), dtype=bool)
    keep[same] = False
    removed = tuple(
        _shared(null.images, int(null.rows[p]), training, int(null.matches[p]), "resaved")
        for p in same
    )
    return dataclasses.replace(
        null,
        rows=null.rows[keep],
        matches=null.matches[keep],
        scores=null.scores[keep],
        removed=null.removed + removed,
    )


def same_picture(
    a: Path, b: Path, load: Callable[[Path, int], NDArray[np.uint8]] = load_pixels
) -> bool:
    """Return whether two files show the same picture, one perhaps saved anew or resized.

    False where one of them cannot be read.
    """
    try:
        grey = [load(path, _PICTURE_SIZE).mean(axis=2).ravel() for path in (a, b)]
    except (LcmemError, OSError):
        return False
    x, y = (pixels - pixels.mean() for pixels in grey)
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    if norm < 1e-9:  # at least one is a plain surface
        return bool(np.abs(grey[0] - grey[1]).max() < 1)
    return float(x @ y) / norm >= SAME_PICTURE_CORRELATION


def check_size(
    count: int, rate: float, *, kind: NullKind, source: str, num_removed: int = 0
) -> None:
    """Refuse a rate for which the null is too small.

    Args:
        count: different real images.
        rate: false positives per image.
        kind: construction of the null.
        source: where they come from.
        num_removed: images taken out because they are in the training set.

    Raises:
        InputError: says how many images are needed, and which rate these allow.
    """
    needed = required_null_size(rate)
    if count >= needed:
        return
    gives = {
        "held-out": f"{source} gives {count} held-out images",
        "split": f"splitting {source} gives {count} real images",
        "leave-one-out": f"{source} gives {count} images to leave out",
    }[kind]
    lost = f" ({num_removed} more are in the training set)" if num_removed else ""
    smallest = smallest_rate(count)
    allows = f"these allow --fpr {smallest:g} or more" if smallest < 1 else "these allow no rate"
    raise InputError(
        f"a false-positive rate of {percent(rate)} per image needs at least {needed:,} different "
        f"real images, {gives}{lost}; {allows}; give more real images with --held-out, or accept "
        "a larger rate"
    )


def check_gate(
    fail_over: float, rate: float, *, num_queries: int, num_exact: int, num_null: int
) -> None:
    """Refuse a gate that Benjamini-Hochberg cannot fail where the rate per image could.

    Args:
        fail_over: share of flagged images over which the gate fails.
        rate: false-discovery rate.
        num_queries: generated images.
        num_exact: those that are byte for byte a training image, which are always flagged.
        num_null: real images.

    Raises:
        InputError: so few flagged images as would fail the gate cannot be flagged.
    """
    fails_at = math.floor(fail_over * num_queries + 1e-9) + 1
    fewest = fewest_flagged(rate, num_queries, num_null)
    if num_exact < fails_at < fewest:
        needed = math.ceil(num_queries / (rate * fails_at) - 1e-9) - 1
        raise InputError(
            f"--fail-over {fail_over:g} is to fail at {counted(fails_at, 'flagged image')}, but "
            f"with {counted(num_null, 'real image')} --bh can only flag {fewest:,} or more at "
            f"once beside identical files; give {needed:,} held-out images, or leave --bh out"
        )


def smallest_rate(count: int) -> float:
    """Return the smallest rate that ``count`` null scores allow, rounded up to four digits."""
    exact = 1 / (count + 1)
    scale = 10.0 ** (3 - math.floor(math.log10(exact)))
    return float(math.ceil(exact * scale - 1e-9) / scale)


def _two_columns(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    if scores.shape[1] >= 2:
        return scores[:, :2]
    return np.column_stack([scores, np.full(len(scores), np.nan)])


def _shared(images: ImageSet, row: int, training: ImageSet, match: int, kind: str) -> SharedPicture:
    return SharedPicture(
        path=images.name_of(row),
        match=training.name_of(match),
        kind="exact" if kind == "exact" else "resaved",
    )
