"""Local features of many files: each is read once, kept by its content, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.data.loading import load_once
from lcmem_cli.engine.detectors.embedding import allocate_features
from lcmem_cli.engine.errors import MissingExtraError, UnreadableImageError, WriteError
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


def read_bank(
    files: Sequence[Path],
    hashes: Sequence[str],
    compute: Compute = DEFAULT_COMPUTE,
    *,
    numbers: Sequence[int] | None = None,
) -> FeatureBank:
    """Find the local features of images; those in the cache cost no decoding.

    Args:
        files: image files.
        hashes: SHA-256 of each.
        compute: threads, processes, progress and cache; none of it changes the result.
        numbers: of the images that will be asked for; all by default.

    Raises:
        LcmemError: no room for the features.
    """
    wanted = list(range(len(files))) if numbers is None else [int(number) for number in numbers]
    rows = allocate_features((len(wanted), ROW_BYTES), np.uint8)
    cache = None if compute.cache is None else FeatureCache(compute.cache.folder, FINGERPRINT)
    ranks = compute.ranks
    with (
        single_threaded(),
        ThreadPoolExecutor(max(1, compute.num_workers)) as pool,
        compute.reporter.task("finding keypoints", len(wanted), unit="image") as task,
    ):
        for start in range(0, len(wanted), _ROUND_IMAGES):
            part = range(start, min(start + _ROUND_IMAGES, len(wanted)))
            mine = list(ranks.share(part))
            keys = [hashes[wanted[row]] for row in mine]
            new = [row for row, key in zip(mine, keys, strict=True) if not (cache and key in cache)]
            numbers_of = [wanted[row] for row in new]
            values = pool.map(
                _read, [files[n] for n in numbers_of], [hashes[n] for n in numbers_of]
            )
            made = dict(zip(new, values, strict=True))
            _keep(cache, [(hashes[wanted[row]], values) for row, values in made.items()], compute)
            for row, key in zip(mine, keys, strict=True):
                if row not in made and cache is not None:
                    made[row] = cache.get_many([key])[0][0]
            for others in ranks.gather(made):
                for row, values in others.items():
                    rows[row] = values
            task.advance(len(part))
    positions = None if numbers is None else {number: row for row, number in enumerate(wanted)}
    return FeatureBank(rows, positions)


def _read(path: Path, content: str) -> NDArray[np.uint8]:
    """Return the packed features of a file; zeros if it cannot be read, or has another content."""
    try:
        return local_features(load_once(path, content, size=SIDE)[0]).packed()
    except (UnreadableImageError, MissingExtraError):
        return np.zeros(ROW_BYTES, np.uint8)


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
