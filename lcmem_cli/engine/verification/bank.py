"""Local features of many files: each is read once, kept by its content, in bounded memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.data.frames import has_file
from lcmem_cli.engine.data.loading import CHANGED, hash_files, load_once
from lcmem_cli.engine.detectors.embedding import allocate_features
from lcmem_cli.engine.errors import (
    CorruptFileError,
    MissingExtraError,
    UnreadableImageError,
    WriteError,
)
from lcmem_cli.engine.store.features import FeatureCache
from lcmem_cli.engine.verification.features import (
    FINGERPRINT,
    ROW_BYTES,
    SIDE,
    LocalFeatures,
    local_features,
    single_threaded,
    unpacked,
)

_ROUND_IMAGES = 512
_INDEX_FOLDER = "keypoints"


class FeatureBank:
    """Local features of some images, packed.

    Args:
        rows: ``[m, ROW_BYTES]`` uint8, perhaps a memory map; zeros where an image is unreadable.
        positions: row of each image number that can be asked for; ``None``: its own.
    """

    def __init__(self, rows: NDArray[Any], positions: dict[int, int] | None = None) -> None:
        self.rows = rows
        self._positions = positions

    def __getitem__(self, number: int) -> LocalFeatures | None:
        """Return the features of an image, ``None`` if it could not be read."""
        position = number if self._positions is None else self._positions[number]
        return unpacked(np.asarray(self.rows[position]))

    def numbered(self, numbers: Iterable[int]) -> FeatureBank:
        """Return the bank with other numbers to ask by, one for each row in order."""
        return FeatureBank(self.rows, {int(number): row for row, number in enumerate(numbers)})


class IndexKeypoints:
    """Local features that an index holds of its images, so that their files need not be there.

    Args:
        folder: of the index.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / _INDEX_FOLDER

    @property
    def are_kept(self) -> bool:
        """Whether the index is to hold them."""
        return self._folder.is_dir()

    @functools.cached_property
    def store(self) -> FeatureCache:
        """Where they are; what is damaged there counts as missing."""
        return FeatureCache(self._folder, FINGERPRINT)

    def keep(
        self, files: Sequence[Path], hashes: Sequence[str], compute: Compute = DEFAULT_COMPUTE
    ) -> None:
        """Find and keep those that the index lacks; the first process writes.

        Args:
            files: of the index.
            hashes: SHA-256 of each.
            compute: threads, processes, progress and cache.

        Raises:
            OSError: they cannot be written.
        """
        if compute.ranks.is_main:
            self._folder.mkdir(exist_ok=True)
        compute.ranks.barrier()
        path_of = dict(zip(hashes, files, strict=True))
        lacking = [content for content in path_of if content not in self.store]
        lacking = compute.ranks.broadcast(lacking)  # only the first process sees what it writes
        for start in range(0, len(lacking), _ROUND_IMAGES):
            part = lacking[start : start + _ROUND_IMAGES]
            rows = read_bank([path_of[content] for content in part], part, compute).rows
            if compute.ranks.is_main:
                there = np.flatnonzero(rows.any(axis=1))
                self.store.put_many([part[row] for row in there], np.asarray(rows[there]))
        compute.ranks.barrier()

    def check(self, hashes: Iterable[str]) -> None:
        """Compare all of them with their checksums.

        Args:
            hashes: SHA-256 of each image of the index.

        Raises:
            CorruptFileError: some are damaged or missing.
        """
        if lacking := [content for content in hashes if content not in self.store]:
            raise CorruptFileError(
                f"{self._folder}: the keypoints of {len(lacking):,} images are damaged or missing; "
                "run the same lcmem index command again while the images are there"
            )


def unchanged_files(
    files: Sequence[Path], hashes: Sequence[str], compute: Compute = DEFAULT_COMPUTE
) -> list[Path | None]:
    """Return the files of an index that still are what it found, ``None`` in place of others.

    Args:
        files: image files.
        hashes: SHA-256 of each when it was indexed.
        compute: threads and processes.
    """
    now, _ = hash_files(files, compute)
    return [
        file if content == known else None
        for file, content, known in zip(files, now, hashes, strict=True)
    ]


def read_indexed(
    folder: Path,
    files: Sequence[Path],
    hashes: Sequence[str],
    compute: Compute = DEFAULT_COMPUTE,
) -> FeatureBank:
    """Find the local features of indexed images.

    Features in the cache belong to the content that was indexed. So files are compared even where
    none would have to be read: what lies there now is what a page shows. A file with another
    content has no features; one that is gone has those that the index holds.

    Args:
        folder: the index.
        files: image files.
        hashes: SHA-256 of each when it was indexed.
        compute: threads, processes, progress and cache.
    """
    keypoints = IndexKeypoints(folder)
    unchanged = unchanged_files(files, hashes, compute)
    is_gone = compute.ranks.broadcast([not has_file(file) for file in files])
    return read_bank(
        unchanged,
        [
            known if file is not None or gone else ""
            for known, file, gone in zip(hashes, unchanged, is_gone, strict=True)
        ],
        compute,
        keypoints.store if keypoints.are_kept else None,
    )


def read_bank(
    files: Sequence[Path | None],
    hashes: Sequence[str],
    compute: Compute = DEFAULT_COMPUTE,
    kept: FeatureCache | None = None,
) -> FeatureBank:
    """Find the local features of images; those in the cache cost no decoding.

    Args:
        files: image files; ``None`` has only what is kept.
        hashes: SHA-256 of each.
        compute: threads, processes, progress and cache; none of it changes the result.
        kept: features that were found before, looked at first.

    Raises:
        LcmemError: no room for the features.
    """
    rows = allocate_features((len(files), ROW_BYTES), np.uint8)
    cache = None if compute.cache is None else FeatureCache(compute.cache.folder, FINGERPRINT)
    is_kept = [kept is not None and content in kept for content in hashes]
    wanted = [row for row, file in enumerate(files) if file is not None or is_kept[row]]
    ranks = compute.ranks
    changed: list[int] = []
    with (
        single_threaded(),
        ThreadPoolExecutor(max(1, compute.num_workers)) as pool,
        compute.reporter.task("finding keypoints", len(wanted), unit="image") as task,
    ):
        for start in range(0, len(wanted), _ROUND_IMAGES):
            part = wanted[start : start + _ROUND_IMAGES]
            mine = ranks.share(part)
            stores = {row: kept if is_kept[row] else cache for row in mine}
            known = {row: store for row, store in stores.items() if store and hashes[row] in store}
            new = [row for row in mine if row not in known]
            read = pool.map(_read, [files[row] for row in new], [hashes[row] for row in new])
            made = {}
            for row, (values, reason) in zip(new, read, strict=True):
                made[row] = values
                if reason == CHANGED:
                    changed.append(row)
            _keep(cache, [(hashes[row], values) for row, values in made.items()], compute)
            for row, store in known.items():
                made[row] = store.get_many([hashes[row]])[0][0]
            for others in ranks.gather(made):
                for row, values in others.items():
                    rows[row] = values
            task.advance(len(part))
    if replaced := sorted(row for rank in ranks.gather(changed) for row in rank):
        compute.reporter.warn(
            f"{files[replaced[0]]} has changed since it was embedded"
            + (f", as have {len(replaced) - 1:,} others" if replaced[1:] else "")
            + ": no evidence is sought in what stands there now. Run the same command again"
        )
    return FeatureBank(rows)


def _read(path: Path | None, content: str) -> tuple[NDArray[np.uint8], str]:
    """Return the packed features of a file; zeros and the reason where it has none."""
    assert path is not None
    try:
        return local_features(load_once(path, content, size=SIDE)[0]).packed(), ""
    except UnreadableImageError as error:
        return np.zeros(ROW_BYTES, np.uint8), error.reason
    except MissingExtraError as error:
        return np.zeros(ROW_BYTES, np.uint8), str(error)


def _keep(
    cache: FeatureCache | None, made: list[tuple[str, NDArray[np.uint8]]], compute: Compute
) -> None:
    readable = [(key, values) for key, values in made if values.any()]
    if cache is None or not cache.is_kept or not readable:
        return
    try:
        cache.put_many([key for key, _ in readable], np.stack([values for _, values in readable]))
    except (OSError, WriteError) as error:
        compute.reporter.warn(f"{cache.folder}: keypoints cannot be kept ({error}); going on")
        cache.is_kept = False
