"""Embedding many files: each distinct content is decoded once and embedded once."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.data.batching import Batching
from lcmem_cli.engine.data.loading import LoadedBatch, hash_files, iter_images
from lcmem_cli.engine.data.perturb import RoundTrip, Setting, check_setting, perturb
from lcmem_cli.engine.data.remarks import BLANK, GUESSED, Remarks, no_remarks, remarks_texts
from lcmem_cli.engine.detectors.base import Detector, resize_batch
from lcmem_cli.engine.errors import LcmemError, WriteError
from lcmem_cli.engine.reporter import Task
from lcmem_cli.engine.results import Unreadable
from lcmem_cli.engine.store.features import FeatureCache

MAX_BYTES_IN_MEMORY = 256 << 20
_ROUND_IMAGES = 512
_ROUND_BYTES = 64 << 20
_PICTURE_BYTES = 256 << 20

Load = Callable[[Sequence[Path], Sequence[str]], Iterator[LoadedBatch]]


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
    contents: Sequence[str | None] | None = None,
    with_blank: bool = True,
) -> EmbeddedFiles:
    """Embed files; equal contents, and contents in the cache, cost nothing more.

    Files that cannot be read, or that the network gives no finite features for, are listed, never
    skipped silently. Memory holds one round of images and the features, which go to a temporary
    file where they are large. Features are kept under the hash of the very bytes that they were
    made of: a file that was replaced between hashing and decoding is listed, too.

    Args:
        detector: what embeds.
        paths: image files, in any number of copies.
        compute: how it is done. Features change by rounding at most with the batch size. The cache
            is filled as the work goes on, so that a killed run continues; each process gets the
            whole result, and the first one's cache is used for all.
        contents: SHA-256 of each file, where they are known; ``None`` for those that are not.
        with_blank: keep images that show nothing but one colour; otherwise ``left_out`` lists them.

    Raises:
        LcmemError: no room for the features.
        NotFiniteError: the network has no finite features for any image so far.
    """
    batching = Batching(compute.batch_size, detector.device, reporter=compute.reporter)

    def load(files: Sequence[Path], expected: Sequence[str]) -> Iterator[LoadedBatch]:
        return iter_images(
            files,
            detector.input_size,
            workers=compute.num_workers,
            batch_size=batching.loaded,
            expected=expected,
        )

    way = _Way(
        load=load,
        key=lambda content: content,
        batching=batching,
        description=f"embedding ({detector.name})",
        tells=True,
    )
    (found,) = _embed([detector], paths, [way], compute, contents=contents, with_blank=with_blank)
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
    contents: Sequence[str | None] | None = None,
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
        files: Sequence[Path], expected: Sequence[str], batch_size: int
    ) -> Iterator[LoadedBatch]:
        return iter_images(
            files,
            working_size,
            workers=compute.num_workers,
            batch_size=batch_size,
            transform=None if setting is None else edit,
            expected=expected,
        )

    pictures = _Pictures(make)

    def way_of(detector: Detector) -> _Way:
        batching = Batching(compute.batch_size, detector.device, reporter=compute.reporter)
        source = pictures.load if len(detectors) > 1 else make

        def load(files: Sequence[Path], expected: Sequence[str]) -> Iterator[LoadedBatch]:
            for batch in source(files, expected, batching.loaded):
                images = resize_batch(batch.images, detector.input_size)
                yield dataclasses.replace(batch, images=images)

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
        together=max(1, _PICTURE_BYTES // (12 * working_size**2)),
    )


class _Pictures:
    """Pictures that several detectors take one after the other; each is made once.

    Args:
        make: makes those of some files, in batches of some size.
    """

    def __init__(
        self, make: Callable[[Sequence[Path], Sequence[str], int], Iterator[LoadedBatch]]
    ) -> None:
        self._make = make
        self._made: dict[Path, tuple[torch.Tensor, str, NDArray[np.int32]] | str] = {}

    def forget(self) -> None:
        """Make room."""
        self._made.clear()

    def load(
        self, files: Sequence[Path], expected: Sequence[str], batch_size: int
    ) -> Iterator[LoadedBatch]:
        """Yield the pictures of some files, in order; those that lack are made meanwhile."""
        lacking = [index for index, file in enumerate(files) if file not in self._made]
        making = self._make([files[i] for i in lacking], [expected[i] for i in lacking], batch_size)
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            while any(file not in self._made for file in part):
                self._take([files[i] for i in lacking], next(making))
            found = [(start + place, self._made[file]) for place, file in enumerate(part)]
            good = [(index, item) for index, item in found if not isinstance(item, str)]
            yield LoadedBatch(
                indices=[index for index, _ in good],
                images=torch.stack([item[0] for _, item in good])
                if good
                else torch.zeros(0, 3, 1, 1),
                unreadable=[(index, item) for index, item in found if isinstance(item, str)],
                contents=[item[1] for _, item in good],
                remarks=np.stack([item[2] for _, item in good]) if good else no_remarks(0),
            )

    def _take(self, files: Sequence[Path], batch: LoadedBatch) -> None:
        for index, image, content, remark in zip(
            batch.indices, batch.images, batch.contents, batch.remarks, strict=True
        ):
            self._made[files[index]] = (image, content, remark)
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
    with_blank: bool = True,
    contents: Sequence[str | None] | None = None,
    shared: _Pictures | None = None,
    together: int = 1,
) -> list[EmbeddedFiles]:
    """Embed files with several detectors.

    Args:
        detectors: what embeds.
        paths: files.
        ways: of each detector.
        compute: how it is done.
        with_blank: see ``embed_files``.
        contents: see ``embed_files``.
        shared: pictures that all take; ``None``: each has its own.
        together: distinct contents that ``shared`` has room for.
    """
    hashes: list[str | None] = [None] * len(paths) if contents is None else list(contents)
    unknown = [index for index, content in enumerate(hashes) if content is None]
    found, failed = hash_files([paths[index] for index in unknown], compute)
    for index, content in zip(unknown, found, strict=True):
        hashes[index] = content
    failed_files = {unknown[place]: reason for place, reason in failed.items()}
    first: dict[str, int] = {}
    for index, content in enumerate(hashes):
        if content is not None:
            first.setdefault(content, index)
    files = {row: (paths[index], content) for row, (content, index) in enumerate(first.items())}
    works = [
        _Features(detector, [way.key(content) for content in first], compute)
        for detector, way in zip(detectors, ways, strict=True)
    ]
    todo = [work.fill_from_cache() for work in works]
    count = sum(len(compute.ranks.share(rows)) for rows in todo)
    with compute.reporter.task(ways[0].description, count, unit="image") as task:
        for part in _parts(len(files), None if shared is None else together):
            for work, way, rows in zip(works, ways, todo, strict=True):
                work.compute([row for row in rows if row in part], files, way, task)
            if shared is not None:
                shared.forget()
    return [
        _result(work, way, paths, hashes, failed_files, files, with_blank, compute)
        for work, way in zip(works, ways, strict=True)
    ]


def _parts(count: int, size: int | None) -> list[range]:
    size = size or max(count, 1)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _result(
    work: _Features,
    way: _Way,
    paths: Sequence[Path],
    hashes: list[str | None],
    failed_files: Mapping[int, str],
    files: Mapping[int, tuple[Path, str]],
    with_blank: bool,
    compute: Compute,
) -> EmbeddedFiles:
    """Bring a detector's rows of distinct contents to the files that were asked for."""
    first = [content for _, content in files.values()]
    if way.tells:
        used = [row for row in range(len(files)) if row not in work.failed]
        for text in remarks_texts([files[row][0] for row in used], work.remarks[used]):
            compute.reporter.warn(text)
    blank = {} if with_blank else work.take_out_blank()
    row_of = dict(zip(first, work.close_gaps(), strict=True))
    colours = dict(zip(first, (blank.get(i) for i in range(len(first))), strict=True))
    reasons = dict(zip(first, (work.failed.get(i) for i in range(len(first))), strict=True))
    return EmbeddedFiles(
        features=work.features,
        rows=np.asarray([-1 if c is None else row_of[c] for c in hashes], dtype=np.int64),
        content_hashes=hashes,
        unreadable=tuple(
            Unreadable(path=str(path), reason=reason)
            for index, (path, content) in enumerate(zip(paths, hashes, strict=True))
            if (reason := failed_files[index] if content is None else reasons[content])
        ),
        left_out=tuple(
            (path, colour)
            for path, content in zip(paths, hashes, strict=True)
            if content is not None and (colour := colours[content]) is not None
        ),
        remarks=work.remarks,
        encoder_passes=work.passes,
    )


class _Features:
    """The rows of all distinct contents, filled from the cache and by the detector.

    Args:
        detector: what embeds.
        keys: cache key of each row.
        compute: its cache is used in the first process only, which has the features sent to the
            others; each process fills its own copy of all rows.
    """

    def __init__(self, detector: Detector, keys: Sequence[str], compute: Compute) -> None:
        self.detector = detector
        self.keys = keys
        self.ranks = compute.ranks
        self.reporter = compute.reporter
        self.cache: FeatureCache | None = None
        if compute.cache is not None and self.ranks.is_main:
            self.cache = compute.cache.open(detector.fingerprint, detector.num_features)
        self.passes = 0
        self.failed: dict[int, str] = {}
        self.taken_out: set[int] = set()
        self.remarks = no_remarks(len(keys))
        row_bytes = detector.num_features * np.dtype(detector.feature_dtype).itemsize
        self.round_images = max(1, min(_ROUND_IMAGES, _ROUND_BYTES // row_bytes))
        self.features = allocate_features(
            (len(keys), detector.num_features), detector.feature_dtype
        )

    def fill_from_cache(self) -> list[int]:
        """Copy the known rows and return the numbers of the others."""
        known = [
            row for row, key in enumerate(self.keys) if self.cache is not None and key in self.cache
        ]
        known = self.ranks.broadcast(known)
        for start in range(0, len(known), self.round_images):
            part = known[start : start + self.round_images]
            found = None
            if self.cache is not None:
                keys = [self.keys[row] for row in part]
                found = self.cache.get_many(keys)[0], self.cache.remarks(keys)
            self.features[part], self.remarks[part] = self.ranks.broadcast(found)
        left_out = set(known)
        return [row for row in range(len(self.keys)) if row not in left_out]

    def compute(
        self,
        todo: Sequence[int],
        files: Mapping[int, tuple[Path, str]],
        way: _Way,
        task: Task,
    ) -> None:
        """Embed rows in rounds; after each, all processes hold the rows of all.

        Args:
            todo: rows to embed.
            files: file and content of each row.
            way: how they are embedded.
            task: told of the progress.
        """
        mine, batching = list(self.ranks.share(todo)), way.batching
        batches = way.load([files[row][0] for row in mine], [files[row][1] for row in mine])
        per_round = max(1, self.round_images // batching.loaded)
        most = -(-len(todo) // self.ranks.size)
        num_rounds = -(-most // (per_round * batching.loaded))
        for _ in range(num_rounds):
            rows: list[int] = []
            values: list[NDArray[Any]] = []
            remarks: dict[int, NDArray[np.int32]] = {}
            bad: dict[int, str] = {}
            for batch in itertools.islice(batches, per_round):
                bad.update({mine[i]: reason for i, reason in batch.unreadable})
                remarks.update(
                    (mine[i], remark)
                    for i, remark in zip(batch.indices, batch.remarks, strict=True)
                )
                if batch.indices:
                    indices, features, failed = batching.embed(self.detector.embed_batch, batch)
                    bad.update({mine[i]: reason for i, reason in failed})
                    rows += [mine[i] for i in indices]
                    values += features
                task.advance(len(batch.indices) + len(batch.unreadable))
            made = (rows, np.concatenate(values) if values else None, remarks, bad)
            for part in self.ranks.gather(made):
                self.passes += self._take(*part)

    def _take(
        self,
        rows: list[int],
        values: NDArray[Any] | None,
        remarks: dict[int, NDArray[np.int32]],
        bad: dict[int, str],
    ) -> int:
        self.failed.update(bad)
        if values is None:
            return 0
        self.features[rows] = values
        self.remarks[rows] = [remarks[row] for row in rows]
        if self.cache is not None and self.cache.is_kept:
            try:
                self.cache.put_many([self.keys[row] for row in rows], values, self.remarks[rows])
            except OSError as error:
                cause = error.__cause__ if isinstance(error, WriteError) else error
                self.reporter.warn(
                    f"{self.cache.folder}: features cannot be kept "
                    f"({getattr(cause, 'strerror', None) or cause}); going on without"
                )
                self.cache.is_kept = False
        return len(rows)

    def take_out_blank(self) -> dict[int, int]:
        """Leave out the contents that show nothing; return the colour of each, by its row."""
        blank = {
            int(row): int(self.remarks[row, BLANK])
            for row in np.flatnonzero(self.remarks[:, BLANK] >= 0)
        }
        self.taken_out.update(blank)
        return blank

    def close_gaps(self) -> list[int]:
        """Move the rows up over those that are not used; return each content's row, or -1."""
        numbers: list[int] = []
        used = 0
        for row in range(len(self.keys)):
            if row in self.failed or row in self.taken_out:
                numbers.append(-1)
                continue
            if used != row:
                self.features[used] = self.features[row]
                self.remarks[used] = self.remarks[row]
            numbers.append(used)
            used += 1
        self.features, self.remarks = self.features[:used], self.remarks[:used]
        return numbers


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
