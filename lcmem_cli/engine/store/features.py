"""Features that were computed before, found again by image content and detector."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.data.images import DECODING_VERSION
from lcmem_cli.engine.data.remarks import Remarks, no_remarks
from lcmem_cli.engine.files import atomic_path
from lcmem_cli.engine.store.integrity import row_checksums

MAX_CACHED_FEATURES = 16_384
SETTLED_SECONDS = 60.0
"""How long before a run a file must have changed last, for clocks tell times apart coarsely."""
_SUFFIX = ".safetensors"
_STATE_BYTES = 16


class _Shard(NamedTuple):
    features: Any
    checksums: NDArray[np.uint32]
    remarks: Remarks


class _Place(NamedTuple):
    shard: int
    row: int


class FeatureCaches:
    """The caches of all detectors in one folder; each is opened once.

    Args:
        folder: shared by all detectors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[str, FeatureCache] = {}

    @classmethod
    def of_user(cls) -> FeatureCaches:
        """Return those in the user's cache folder, or where ``LCMEM_CACHE`` says."""
        from platformdirs import user_cache_dir

        folder = Path(os.environ.get("LCMEM_CACHE") or user_cache_dir("lcmem"))
        return cls(folder / f"features-{DECODING_VERSION}")

    def open(self, fingerprint: str, num_features: int) -> FeatureCache | None:
        """Return the cache of a detector, with what other processes have added by now.

        ``None`` where its features are as large as the images: decoding again costs no more.

        Args:
            fingerprint: of the detector.
            num_features: columns of its features.
        """
        if num_features > MAX_CACHED_FEATURES:
            return None
        if fingerprint in self._opened:
            self._opened[fingerprint].refresh()
        else:
            self._opened[fingerprint] = FeatureCache(self.folder, fingerprint)
        return self._opened[fingerprint]


class FeatureCache:
    """Append-only features of one detector, keyed by the SHA-256 of the image file.

    Every write makes one new file with features, keys and a checksum a row, under a name that its
    content gives. So a killed process leaves nothing half-written, any number of processes may
    read and write at once, and a damaged row is noticed when it is asked for: it counts as unknown
    and is computed again.

    Args:
        folder: shared by all detectors.
        fingerprint: of the detector; another detector's features are never returned.

    Attributes:
        is_kept: whether new features are written; off once that has failed.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder / fingerprint[:32]
        self.fingerprint = fingerprint
        self.is_kept = True
        self._shards: list[_Shard] = []
        self._places: dict[str, list[_Place]] = {}
        self._content_of: dict[bytes, str] = {}
        self._checked: set[_Place] = set()
        self._names: set[str] = set()
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Take in the files that are there, and were not when it was done before."""
        for path in sorted(self.folder.glob(f"[!.]*{_SUFFIX}")):
            self._open(path)

    def __len__(self) -> int:
        """Return the number of images known."""
        return len(self._places)

    def __contains__(self, content_hash: object) -> bool:
        """Return whether the features of an image are known and undamaged."""
        return isinstance(content_hash, str) and self._find(content_hash) is not None

    def get_many(self, hashes: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return the features of the known ones among some images.

        Args:
            hashes: SHA-256 of each image file, in hexadecimal.

        Returns:
            Rows of the known ones in order ``[k, d]``, and which are known ``[n]``.
        """
        places = [self._find(content) for content in hashes]
        rows = [self._read(place) for place in places if place is not None]
        found = np.asarray([place is not None for place in places], dtype=bool)
        return (np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)), found

    def remarks(self, hashes: Sequence[str]) -> Remarks:
        """Return what is to be known of some images, ``[n, 7]``; of unknown ones nothing."""
        result = no_remarks(len(hashes))
        for row, place in enumerate(map(self._find, hashes)):
            if place is not None:
                result[row] = self._shards[place.shard].remarks[place.row]
        return result

    def content_of(self, path: Path) -> str | None:
        """Return the SHA-256 of a file that is as it was when its features were kept.

        ``None`` where it is not, or the features are unknown or damaged.
        """
        if not self._content_of:
            return None
        content = self._content_of.get(file_state(path))
        return content if content in self else None

    def put_many(
        self,
        hashes: Sequence[str],
        features: NDArray[Any],
        remarks: Remarks | None = None,
        states: Sequence[bytes] = (),
    ) -> None:
        """Keep features of images.

        Args:
            hashes: SHA-256 of each image file, in hexadecimal.
            features: ``[n, d]``, float32 or uint8.
            remarks: ``[n, 7]``, see ``data.remarks``; ``None``: nothing to be known.
            states: of the files, see ``file_state``; none where they are not to be known by them.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        from safetensors.numpy import save_file

        if not len(hashes):
            return
        features = np.ascontiguousarray(features)
        keys = np.asarray([list(bytes.fromhex(content)) for content in hashes], dtype=np.uint8)
        sums = row_checksums(keys, features)
        if remarks is None:
            remarks = no_remarks(len(keys))
        name = hashlib.sha256(keys.tobytes() + sums.tobytes()).hexdigest()[:32]
        path = self.folder / f"{name}{_SUFFIX}"
        tensors = {"keys": keys, "checksums": sums, "features": features, "remarks": remarks}
        if states:
            padded = b"".join(state.ljust(_STATE_BYTES, b"\0") for state in states)
            tensors["states"] = np.frombuffer(padded, np.uint8).reshape(-1, _STATE_BYTES)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"fingerprint": self.fingerprint})
        self._names.discard(path.name)  # one that was damaged is written anew
        self._open(path)

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if path.name in self._names:
            return
        self._names.add(path.name)
        try:
            shard: Any = safe_open(path, framework="numpy")
            if shard.metadata().get("fingerprint") != self.fingerprint:
                return
            keys, sums = shard.get_tensor("keys"), shard.get_tensor("checksums")
            rows, remarks = shard.get_slice("features"), shard.get_tensor("remarks")
            states = shard.get_tensor("states") if "states" in shard.keys() else ()
        except (OSError, SafetensorError, AttributeError):  # cut short, or not such a file
            return
        with self._lock:
            number = len(self._shards)
            self._shards.append(_Shard(rows, sums, remarks))
            contents = [key.tobytes().hex() for key in keys]
            for row, content in enumerate(contents):
                self._places.setdefault(content, []).append(_Place(number, row))
            self._content_of |= zip((state.tobytes() for state in states), contents, strict=False)

    def _read(self, place: _Place) -> NDArray[Any]:
        row: NDArray[Any] = self._shards[place.shard].features[place.row : place.row + 1]
        return row

    def _find(self, content: str) -> _Place | None:
        """Return the first undamaged place of an image; damaged ones are forgotten."""
        with self._lock:  # threads that decode ask while another one adds
            return self._find_alone(content)

    def _find_alone(self, content: str) -> _Place | None:
        places = self._places.get(content, [])
        while places:
            place = places[0]
            if place not in self._checked:
                key = np.frombuffer(bytes.fromhex(content), dtype=np.uint8)
                expected = self._shards[place.shard].checksums[place.row]
                if row_checksums(key[None], self._read(place))[0] != expected:
                    places.pop(0)
                    continue
                self._checked.add(place)
            return place
        self._places.pop(content, None)
        return None


def file_state(path: Path, changed_before: float = math.inf) -> bytes:
    """Return what differs once a file has changed, 16 bytes; nothing where that cannot be told.

    The time of the last change of a file's entry is in it, which no program can set back. Windows
    has no such time.

    Args:
        path: the file; there is no state of a member of an archive.
        changed_before: a file that changed at this time or later, in seconds, has none.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return b""
    if os.name != "posix" or max(status.st_mtime, status.st_ctime) >= changed_before:
        return b""
    state = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    text = f"{os.path.abspath(path)}\0{state}".encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).digest()[:_STATE_BYTES]
