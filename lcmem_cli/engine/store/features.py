"""Features that were computed before, found again by image content and detector."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.files import atomic_path, sha256_file, write_json


class FeatureCache:
    """Append-only features of one detector, keyed by the SHA-256 of the image file.

    Every write makes one new shard and then its side file, so a killed process leaves at most a
    shard that is not listed. A shard whose checksum fails is left out: its images are embedded
    again.

    Args:
        folder: shared by all detectors.
        fingerprint: of the detector; another detector's features are never returned.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder / fingerprint[:32]
        self._places: dict[str, tuple[int, int]] = {}
        self._shards: list[NDArray[Any]] = []
        self._next = 0
        for side in sorted(self.folder.glob("*.json")):
            self._next = max(self._next, int(side.stem) + 1)
            self._open(side)

    @classmethod
    def default_folder(cls) -> Path:
        """Return the user's cache folder, or what ``LCMEM_CACHE`` says."""
        from platformdirs import user_cache_dir

        return Path(os.environ.get("LCMEM_CACHE") or user_cache_dir("lcmem")) / "features"

    def __len__(self) -> int:
        """Return the number of images known."""
        return len(self._places)

    def __contains__(self, content_hash: object) -> bool:
        """Return whether the features of an image are known."""
        return content_hash in self._places

    def get_many(self, hashes: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return the features of the known ones among some images.

        Returns:
            Rows of the known ones in order ``[k, d]``, and which are known ``[n]``.
        """
        found = np.asarray([h in self._places for h in hashes], dtype=bool)
        rows = [
            self._shards[shard][row]
            for shard, row in (self._places[h] for h in hashes if h in self._places)
        ]
        return (np.stack(rows) if rows else np.zeros((0, 0), np.float32)), found

    def put_many(self, hashes: Sequence[str], features: NDArray[Any]) -> None:
        """Add features ``[n, d]`` of images that are not known yet."""
        if not len(hashes):
            return
        path = self.folder / f"{self._next:08d}.npy"
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, features, allow_pickle=False)
        side = path.with_suffix(".json")
        write_json(side, {"hashes": list(hashes), "sha256": sha256_file(path)})
        self._next += 1
        self._open(side)

    def _open(self, side: Path) -> None:
        try:
            listed = json.loads(side.read_text(encoding="utf-8"))
            path = side.with_suffix(".npy")
            if sha256_file(path) != listed["sha256"]:
                return
            shard: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
            places = {h: (len(self._shards), row) for row, h in enumerate(listed["hashes"])}
        except (OSError, ValueError, KeyError, TypeError):
            return
        self._shards.append(shard)
        self._places.update(places)
