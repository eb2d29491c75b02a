"""Embedding many files: each is read once, each distinct content decoded and embedded once."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.data.batching import Batching
from lcmem_cli.engine.data.loading import IsKnown, LoadedBatch, hash_files, iter_images
from lcmem_cli.engine.data.perturb import RoundTrip, Setting, check_setting, perturb
from lcmem_cli.engine.data.remarks import BLANK, GUESSED, Remarks, no_remarks, remarks_texts
from lcmem_cli.engine.detectors.base import Detector, resize_batch
from lcmem_cli.engine.errors import LcmemError, WriteError
from lcmem_cli.engine.reporter import Task
from lcmem_cli.engine.results import Unreadable
from lcmem_cli.engine.store import features as store

MAX_BYTES_IN_MEMORY = 256 << 20
_PART_FILES = 8192
_ROUND_IMAGES = 512
_ROUND_BYTES = 64 << 20
_PICTURE_BYTES = 256 << 20

Expected = Sequence[str | None]
Load = Callable[[Sequence[Path], Expected, IsKnown], Iterator[LoadedBatch]]


@dataclasses.dataclass(frozen=True)
class EmbeddedFiles:
    """Features of a list of files.

    Attributes:
        features: ``[d, n]``, one row a distinct readable content, in order of first appearance.
            Where they are large, a memory map of a temporary file that vanishes with it.
        rows: ``[files]`` row of each file, or -1 where it is unreadable.
        content_hashes: SHA-256 of each file, ``None`` where it cannot be read at all.
        unreadable: files that were left out, with reasons.
        left_out: files that show nothing but one colour, with it (``0xRRGGBB``), where they were to
            be left out; their rows are -1.
        remarks: ``[d, 7]`` what to know of each content, see ``data.remarks``.
        encoder_passes: images that the detector embedded now, over all processes.
    """

    features: NDArray[Any]
    rows: NDArray[np.int64]
    content_hashes: list[str | None]
    unreadable: tuple[Unreadable, ...]
    left_out: tuple[tuple[Path, int], ...]
    remarks: Remarks
    encoder_passes: int

    @property
    def guessed(self) -> NDArray[np.bool_]:
        """``[d]`` whether a bit depth was guessed, see the text of ``data.pixels``."""
        guessed: NDArray[np.bool_] = self.remarks[:, GUESSED] > 0
        return guessed

    @property
    def blank(self) -> NDArray[np.int32]:
        """``[d]`` colour of a content that shows nothing else, otherwise -1; see ``data.looks``.

        Two of them match where ``looks.same_blank`` says so, and match nothing besides.
        """
        return self.remarks[:, BLANK]


def embed_files(
    detector: Detector,
    paths: Sequence[Path],
    compute: Compute = DEFAULT_COMPUTE,
    *,
    contents: Expected | None = None,
    known: Container[str] = (),
    with_blank: bool = True,
) -> EmbeddedFiles:
    """Embed files; equal contents, and contents in the cache, are read and hashed only.

    Those that have not changed since the cache got their features are not even read.

    Files that cannot be read, or that the network gives no finite features for, are listed, never
    skipped silently. Memory holds one round of images and the features, which go to a temporary
    file where they are large. Each file is read once, so features are kept under the hash of the
    very bytes that they were made of, whatever becomes of the file.

    Args:
        detector: what embeds.
        paths: image files, in any number of copies.
        compute: how it is done. Features change by rounding at most with the batch size. The cache
            is filled as the work goes on, so that a killed run continues. Each process embeds its
            share of the files and gets the whole result.
        contents: SHA-256 of each file, where it is known, so that it need not be read for that; a
            file that has another by now is listed as unreadable.
        known: SHA-256 of contents that no features are wanted of; their rows are -1.
        with_blank: keep images that show nothing but one colour; otherwise ``left_out`` lists them.

    Raises:
        LcmemError: no room for the features.
        NotFiniteError: the network has no finite features for any image so far.
    """
    batching = Batching(compute.batch_size, detector.device, reporter=compute.reporter)

    def load(files: Sequence[Path], expected: Expected, is_known: IsKnown) -> Iterator[LoadedBatch]:
        return iter_images(
            files,
            detector.input_size,
            workers=compute.num_workers,
            batch_size=batching.loaded,
            expected=expected,
            is_known=is_known,
        )

    way = _Way(
        load=load,
        key=lambda content: content,
        batching=batching,
        description=f"embedding ({detector.name})",
        tells=True,
    )
    (found,) = _embed(
        [detector], paths, [way], compute, contents=contents, known=known, with_blank=with_blank
    )
    return found


# Long by its arguments and what is said of each.
def embed_perturbed(
    detectors: Sequence[Detector],
    paths: Sequence[Path],
    setting: Setting | None,
    *,
    working_size: int,
    seed: int = 0,
    round_trip: RoundTrip | None = None,
    contents: Expected | None = None,
    compute: Compute = DEFAULT_COMPUTE,
) -> list[EmbeddedFiles]:
    """Embed edited images: resized to the working size, edited, resized to a detector's size.

    What is random in an edit depends on seed, image and setting only, so every detector sees the
    same picture; it is decoded and edited once for all of them.

    Args:
        detectors: what embeds.
        paths: image files, in any number of copies.
        setting: the edit; ``None`` leaves the image as it is.
        working_size: side in pixels at which the edit is made.
        seed: of the edit's randomness.
        round_trip: see ``perturb``; such features are not cached: what made them has no name.
        contents: see ``embed_files``.
        compute: see ``embed_files``.

    Returns:
        What each detector made of them.

    Raises:
        InputError: unknown transform, or strength out of range.
        LcmemError: see ``embed_files``.
    """
    if setting is not None:
        check_setting(setting)

    def edit(image: torch.Tensor, _: int) -> torch.Tensor:
        assert setting is not None
        return perturb(image, setting.transform, setting.strength, seed=seed, round_trip=round_trip)

    def make(
        files: Sequence[Path], expected: Expected, is_known: IsKnown | None, batch_size: int
    ) -> Iterator[LoadedBatch]:
        return iter_images(
            files,
            working_size,
            workers=compute.num_workers,
            batch_size=batch_size,
            transform=None if setting is None else edit,
            expected=expected,
            is_known=is_known,
        )

    pictures = _Pictures(make, max(1, _PICTURE_BYTES // (12 * working_size**2)))

    def way_of(detector: Detector) -> _Way:
        batching = Batching(compute.batch_size, detector.device, reporter=compute.reporter)
        source = pictures.load if len(detectors) > 1 else make

        def load(
            files: Sequence[Path], expected: Expected, is_known: IsKnown
        ) -> Iterator[LoadedBatch]:
            for batch in source(files, expected, is_known, batching.loaded):
                if batch.indices:
                    images = resize_batch(batch.images, detector.input_size)
                    batch = dataclasses.replace(batch, images=images)
                yield batch

        names = detectors[0].name if len(detectors) == 1 else f"{len(detectors)} detectors"
        return _Way(
            load=load,
            key=key,
            batching=batching,
            description=f"embedding ({names}, {setting or 'unedited'})",
            # The same images are edited in many ways, and seen by all detectors.
            tells=setting is None and detector is detectors[0],
        )

    def key(content: str) -> str:
        edited = "" if setting is None else f"{setting.transform}\0{setting.strength!r}\0{seed}"
        return hashlib.sha256(f"{content}\0{working_size}\0{edited}".encode()).hexdigest()

    if round_trip is not None:
        compute = dataclasses.replace(compute, cache=None)
    return _embed(
        detectors,
        paths,
        [way_of(detector) for detector in detectors],
        compute,
        contents=contents,
        shared=pictures if len(detectors) > 1 else None,
    )


class _Pictures:
    """Pictures that several detectors take one after the other; each is made once.

    Args:
        make: makes those of some files, in batches of some size.
        room: files whose pictures are held at a time.
    """

    def __init__(
        self,
        make: Callable[[Sequence[Path], Expected, IsKnown | None, int], Iterator[LoadedBatch]],
        room: int,
    ) -> None:
        self._make, self.room = make, room
        self._made: dict[Path, tuple[torch.Tensor, NDArray[np.int32], str] | str] = {}

    def forget(self) -> None:
        """Make room."""
        self._made.clear()

    def load(
        self, files: Sequence[Path], expected: Expected, is_known: IsKnown, batch_size: int
    ) -> Iterator[LoadedBatch]:
        """Yield the pictures of some files as ``iter_images`` does; those that lack are made."""
        hashes = {index: content for index, content in enumerate(expected) if content is not None}
        first: dict[str, int] = {}
        for index, content in hashes.items():
            first.setdefault(content, index)
        is_needed = {index for content, index in first.items() if not is_known(content)}
        wanted = [index for index in range(len(files)) if index in is_needed or index not in hashes]
        yield LoadedBatch(
            indices=[],
            images=torch.zeros(0, 3, 1, 1),
            unreadable=[],
            hashes={index: content for index, content in hashes.items() if index not in is_needed},
        )
        lacking = [index for index in wanted if files[index] not in self._made]
        lacking_files = [files[index] for index in lacking]
        making = self._make(lacking_files, [expected[i] for i in lacking], None, batch_size)
        for start in range(0, len(wanted), batch_size):
            part = wanted[start : start + batch_size]
            while any(files[index] not in self._made for index in part):
                self._take(lacking_files, next(making))
            found = [(index, self._made[files[index]]) for index in part]
            good = [(index, item) for index, item in found if not isinstance(item, str)]
            yield LoadedBatch(
                indices=[index for index, _ in good],
                images=torch.stack([item[0] for _, item in good])
                if good
                else torch.zeros(0, 3, 1, 1),
                unreadable=[(index, item) for index, item in found if isinstance(item, str)],
                hashes={index: hashes[index] for index in part if index in hashes}
                | {index: item[2] for index, item in good},
                remarks=np.stack([item[1] for _, item in good]) if good else no_remarks(0),
            )

    def _take(self, files: Sequence[Path], batch: LoadedBatch) -> None:
        for index, image, remark in zip(batch.indices, batch.images, batch.remarks, strict=True):
            self._made[files[index]] = (image, remark, batch.hashes[index])
        for index, reason in batch.unreadable:
            self._made[files[index]] = reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Way:
    """How files become features.

    Attributes:
        load: decodes them, and perhaps edits them.
        key: of the cache, for the content of a file.
        batching: how many images go into a network call.
        description: of the task.
        tells: whether remarks about the images are warned of.
    """

    load: Load
    key: Callable[[str], str]
    batching: Batching
    description: str
    tells: bool


def _embed(
    detectors: Sequence[Detector],
    paths: Sequence[Path],
    ways: Sequence[_Way],
    compute: Compute,
    *,
    contents: Expected | None = None,
    known: Container[str] = (),
    with_blank: bool = True,
    shared: _Pictures | None = None,
) -> list[EmbeddedFiles]:
    """Embed files with several detectors.

    Args:
        detectors: what embeds.
        paths: files.
        ways: of each detector.
        compute: how it is done.
        contents: see ``embed_files``.
        known: see ``embed_files``.
        with_blank: see ``embed_files``.
        shared: pictures that all take; ``None``: each has its own.
    """
    if contents is None and shared is not None:  # to choose which to make, all have to be known
        contents = hash_files(paths, compute)[0]
    works = [
        _Work(detector, paths, way, compute, known, contents)
        for detector, way in zip(detectors, ways, strict=True)
    ]
    count = sum(len(compute.ranks.share(range(len(paths)))) for _ in works)
    with compute.reporter.task(ways[0].description, count, unit="image") as task:
        for part in _parts(len(paths), _PART_FILES if shared is None else shared.room):
            for work in works:
                work.embed(part, task)
            if shared is not None:
                shared.forget()
    return [_result(work, way, with_blank) for work, way in zip(works, ways, strict=True)]


def _parts(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _result(work: _Work, way: _Way, with_blank: bool) -> EmbeddedFiles:
    """Bring what a detector made of distinct contents to the files that were asked for."""
    paths, hashes = work.paths, work.hashes
    work.share_cached()
    first = work.first_positions()
    used = {content: index for content, index in first.items() if index not in work.failed}
    if way.tells:
        told = list(used.values())
        for text in remarks_texts([paths[index] for index in told], work.remarks[told]):
            work.reporter.warn(text)
    colours: dict[str, int] = {}
    if not with_blank:
        blank = {content: int(work.remarks[index, BLANK]) for content, index in used.items()}
        colours = {content: colour for content, colour in blank.items() if colour >= 0}
    kept = [content for content in used if content not in colours]
    features, remarks = work.close_gaps([used[content] for content in kept])
    row_of = {content: row for row, content in enumerate(kept)}
    reasons = [
        work.failed.get(index if content is None else first.get(content, -1))
        for index, content in enumerate(hashes)
    ]
    return EmbeddedFiles(
        features=features,
        rows=np.asarray([-1 if c is None else row_of.get(c, -1) for c in hashes], dtype=np.int64),
        content_hashes=hashes,
        unreadable=tuple(
            Unreadable(path=str(path), reason=reason)
            for path, reason in zip(paths, reasons, strict=True)
            if reason is not None
        ),
        left_out=tuple(
            (path, colours[content])
            for path, content in zip(paths, hashes, strict=True)
            if content in colours
        ),
        remarks=remarks,
        encoder_passes=work.passes,
    )


class _Made(NamedTuple):
    """What one process made in a round.

    Attributes:
        rows: positions of the files that ``features`` are of.
        features: ``[len(rows), d]``; ``None``: of none.
        remarks: ``[len(rows), 7]``.
        failed: reason for each position without features.
        is_last: whether the process has come to its end.
    """

    rows: list[int]
    features: NDArray[Any] | None
    remarks: Remarks
    failed: dict[int, str]
    is_last: bool


class _Work:
    """Embeds files in rounds, with what the cache has of them.

    What a content's first file gives stands in that file's row; ``close_gaps`` ends that. With
    several processes each knows and fills the rows of its share only, until they are gathered. Two
    that meet copies of one content both embed it; what the first file gave counts.

    Args:
        detector: what embeds.
        paths: all files.
        way: how they are embedded.
        compute: its cache is asked and filled by each process for its share.
        known: contents that are not wanted.
        contents: of each file, where it is known before.

    Attributes:
        passes: images embedded so far, over all processes.
        hashes: content of each file that could be read.
        failed: reason for each position that gave no features and should have.
        features: ``[files, d]``.
        remarks: ``[files, 7]``.
    """

    def __init__(
        self,
        detector: Detector,
        paths: Sequence[Path],
        way: _Way,
        compute: Compute,
        known: Container[str],
        contents: Expected | None,
    ) -> None:
        self._detector, self.paths, self._way, self._known = detector, paths, way, known
        self._ranks, self.reporter = compute.ranks, compute.reporter
        self.passes, self._settled = 0, time.time() - store.SETTLED_SECONDS
        self._cache: store.FeatureCache | None = None
        if compute.cache is not None:
            self._cache = compute.cache.open(detector.fingerprint, detector.num_features)
        self._cached: list[int] = []
        self._done: set[str] = set()
        self._expected = [None] * len(paths) if contents is None else list(contents)
        self.hashes: list[str | None] = [None] * len(paths)
        self.failed: dict[int, str] = {}
        self.remarks = no_remarks(len(paths))
        row_bytes = detector.num_features * np.dtype(detector.feature_dtype).itemsize
        self._round_images = max(1, min(_ROUND_IMAGES, _ROUND_BYTES // row_bytes))
        self.features = allocate_features(
            (len(paths), detector.num_features), detector.feature_dtype
        )

    def embed(self, part: range, task: Task) -> None:
        """Read some files, and embed what has to be; then all processes hold what any has made."""
        mine = list(self._ranks.share(part))
        batches = self._way.load(
            [self.paths[index] for index in mine],
            [self._expected[index] or self._remembered(index) for index in mine],
            self._need_not,
        )
        per_round = max(1, self._round_images // self._way.batching.loaded)
        is_last = False
        while not is_last:
            made = self._round(batches, per_round, mine, task)
            if made.features is not None:
                self._keep(made)
            gathered = self._ranks.gather(made)
            for one in gathered:
                self.failed.update(one.failed)
                if one.features is not None:
                    self.features[one.rows] = one.features
                    self.remarks[one.rows] = one.remarks
                    self.passes += len(one.rows)
            is_last = all(one.is_last for one in gathered)
        own = {index: self.hashes[index] for index in mine}
        self._done.update(content for content in own.values() if content is not None)
        for others in self._ranks.gather(own):
            for index, content in others.items():
                self.hashes[index] = content

    def _remembered(self, index: int) -> str | None:
        """Return the content of a file that has not changed since the cache got it."""
        return None if self._cache is None else self._cache.content_of(self.paths[index])

    def _need_not(self, content: str) -> bool:
        """Return whether a content need not be decoded; asked by many threads."""
        if content in self._known or content in self._done:
            return True
        return self._cache is not None and self._way.key(content) in self._cache

    def _round(
        self, batches: Iterator[LoadedBatch], per_round: int, mine: Sequence[int], task: Task
    ) -> _Made:
        rows: list[int] = []
        values: list[NDArray[Any]] = []
        remarks: list[Remarks] = []
        failed: dict[int, str] = {}
        num_batches = 0
        for batch in itertools.islice(batches, per_round):
            num_batches += 1
            failed.update({mine[i]: reason for i, reason in batch.unreadable})
            for i, content in batch.hashes.items():
                self.hashes[mine[i]] = content
            self._take_cached({mine[i]: batch.hashes[i] for i in batch.skipped})
            if batch.indices:
                indices, features, bad = self._way.batching.embed(self._detector.embed_batch, batch)
                failed.update({mine[i]: reason for i, reason in bad})
                rows += [mine[i] for i in indices]
                values += features
                remarks.append(batch.remarks[np.isin(batch.indices, indices)])
            task.advance(len(batch))
        return _Made(
            rows=rows,
            features=np.concatenate(values) if values else None,
            remarks=np.concatenate([no_remarks(0), *remarks]),
            failed=failed,
            is_last=num_batches < per_round,
        )

    def _take_cached(self, skipped: Mapping[int, str]) -> None:
        """Copy from the cache what it has of files that were not decoded."""
        rows = [
            index
            for index, content in skipped.items()
            if content not in self._known and content not in self._done
        ]
        if self._cache is None or not rows:
            return
        keys = [self._way.key(skipped[index]) for index in rows]
        found, is_cached = self._cache.get_many(keys)
        rows = [index for index, cached in zip(rows, is_cached, strict=True) if cached]
        if rows:
            self.features[rows] = found
            self.remarks[rows] = self._cache.remarks(keys)[is_cached]
        self._cached += rows

    def _keep(self, made: _Made) -> None:
        """Put what was made into the cache, before another process may look for it there."""
        if self._cache is None or not self._cache.is_kept:
            return
        contents = [str(self.hashes[index]) for index in made.rows]
        keys = [self._way.key(content) for content in contents]
        states: list[bytes] = []
        if keys == contents:  # what has not changed since before this run is what was read
            states = [store.file_state(self.paths[i], self._settled) for i in made.rows]
        try:
            self._cache.put_many(keys, np.asarray(made.features), made.remarks, states)
        except OSError as error:
            cause = error.__cause__ if isinstance(error, WriteError) else error
            self.reporter.warn(
                f"{self._cache.folder}: features cannot be kept "
                f"({getattr(cause, 'strerror', None) or cause}); going on without"
            )
            self._cache.is_kept = False

    def share_cached(self) -> None:
        """Give the other processes what this one had in its cache."""
        if self._ranks.size == 1:
            return
        most = max(self._ranks.gather(len(self._cached)))
        for start in range(0, most, self._round_images):
            rows = self._cached[start : start + self._round_images]
            for others, features, remarks in self._ranks.gather(
                (rows, self.features[rows], self.remarks[rows])
            ):
                self.features[others] = features
                self.remarks[others] = remarks

    def first_positions(self) -> dict[str, int]:
        """Return the position of the first file of each wanted content, in their order."""
        first: dict[str, int] = {}
        for index, content in enumerate(self.hashes):
            if content is not None and content not in self._known:
                first.setdefault(content, index)
        return first

    def close_gaps(self, positions: Sequence[int]) -> tuple[NDArray[Any], Remarks]:
        """Move the rows at some ascending positions up; return the features and remarks of them."""
        for row, index in enumerate(positions):
            if row != index:
                self.features[row] = self.features[index]
                self.remarks[row] = self.remarks[index]
        return self.features[: len(positions)], self.remarks[: len(positions)]


def allocate_features(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Return room for the features: in memory, or in a temporary file where it is much.

    Raises:
        LcmemError: the temporary folder has not enough room.
    """
    num_bytes = shape[0] * shape[1] * np.dtype(dtype).itemsize
    if num_bytes <= MAX_BYTES_IN_MEMORY:
        return np.zeros(shape, dtype=dtype)
    file = tempfile.TemporaryFile(prefix="lcmem-")
    try:
        if hasattr(os, "posix_fallocate"):  # writing to a map without room kills the process
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        return np.memmap(file, dtype=dtype, mode="r+", shape=shape)
    except OSError as error:
        raise LcmemError(
            f"{tempfile.gettempdir()}: no room for {num_bytes / 2**30:.1f} GiB of image data "
            f"({error.strerror or error}); set TMPDIR to a folder on a larger disk, or use a "
            "smaller --input-size"
        ) from error
