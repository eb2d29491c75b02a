"""An index: the features of a training set on disk, to be searched again and again.

Append-only: an addition appends its features to one file, which is read as a memory map, and then
writes a segment file that lists the images. What a killed process appended without a segment is
cut off by the next addition. Bound to the fingerprint of the detector that made the features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.errors import CorruptFileError, FingerprintMismatchError, InputError
from lcmem_cli.engine.files import dump_json, naming_target, sha256_bytes, write_json
from lcmem_cli.engine.results import Result
from lcmem_cli.engine.store.search import TopK

FORMAT_VERSION = 1
META_NAME, FEATURES_NAME, SEGMENT_FOLDER = "index.json", "features.bin", "segments"
_READ_BYTES = 1 << 24


class Searcher(Protocol):
    """What an index needs of a detector."""

    name: str
    fingerprint: str

    def embed(self, images: Any) -> NDArray[Any]:
        """Embed images to ``[n, d]``."""

    def top_k(self, queries: NDArray[Any], bank: NDArray[Any], k: int) -> TopK:
        """Search a bank of features."""


class Entry(NamedTuple):
    """An image of the index; images of equal content share a row of features."""

    path: str
    id: str
    content_hash: str
    row: int
    ds_name: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexMatch(Result):
    """A match of a query.

    Attributes:
        path: file of the indexed image.
        id: its identity.
        score: of the detector.
        row: its row of features.
    """

    path: str
    id: str
    score: float
    row: int


class Index:
    """Features of a set of images, memory-mapped.

    Attributes:
        folder: where it is.
        detector: name of the detector that made the features.
        fingerprint: of that detector.
        entries: all images, in the order of addition.
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.detector = str(meta["detector"])
        self.fingerprint = str(meta["fingerprint"])
        self.entries: list[Entry] = []
        self._first_entry: dict[int, Entry] = {}
        self._row_of: dict[str, int] = {}
        self._dtype = np.dtype(np.float32)
        self._num_features = 0
        self._num_segments = 0
        for number in range(len(list((folder / SEGMENT_FOLDER).glob("[!.]*.json")))):
            self._open_segment(number)

    @classmethod
    def create(cls, folder: Path, *, detector: str, fingerprint: str) -> Index:
        """Make an empty index, or open the one that is there if it is this detector's.

        Raises:
            FingerprintMismatchError: the folder holds an index of another detector.
        """
        if not (folder / META_NAME).is_file():
            write_json(
                folder / META_NAME,
                {"format": FORMAT_VERSION, "detector": detector, "fingerprint": fingerprint},
            )
        index = cls.open(folder)
        index.check(fingerprint)
        return index

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Open an index.

        Raises:
            InputError: there is none.
            CorruptFileError: a segment is damaged; it is named.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / META_NAME).read_text(encoding="utf-8"))
            if meta["format"] != FORMAT_VERSION:
                raise InputError(f"{folder}: index format {meta['format']} is not known")
            return cls(folder, meta)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{folder}: no index there; make one with: lcmem index build"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{folder / META_NAME}: damaged: {error}") from error

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.entries)

    @property
    def num_rows(self) -> int:
        """Distinct images."""
        return len(self._row_of)

    @property
    def features(self) -> NDArray[Any]:
        """All features ``[num_rows, d]``, memory-mapped."""
        shape = (self.num_rows, self._num_features)
        if not self.num_rows:
            return np.zeros(shape, dtype=self._dtype)
        return np.memmap(self._features_path, dtype=self._dtype, mode="r", shape=shape)

    def check(self, fingerprint: str) -> None:
        """Refuse another detector.

        Args:
            fingerprint: of the detector that is to be used with this index.

        Raises:
            FingerprintMismatchError: its fingerprint is another.
        """
        if fingerprint != self.fingerprint:
            raise FingerprintMismatchError(
                f"{self.folder}: made by detector {self.detector} ({self.fingerprint[:12]}), not "
                f"by {fingerprint[:12]}: features of two detectors cannot be compared; use that "
                "detector, or build an index with this one"
            )

    def __contains__(self, content_hash: object) -> bool:
        """Return whether features of this content are in the index."""
        return content_hash in self._row_of

    def append(
        self,
        images: Sequence[tuple[str, str, str, str | None]],
        new_hashes: Sequence[str],
        features: NDArray[Any],
    ) -> None:
        """Add images as one segment; the caller holds the folder's lock.

        Args:
            images: ``(path, id, content hash, data set)`` of each; the contents are known or new.
            new_hashes: contents that are not in the index yet.
            features: ``[len(new_hashes), d]``.

        Raises:
            InputError: features of another length or type than those of the index.
            WriteError: the disk is full, or the folder cannot be written.
        """
        features = np.ascontiguousarray(features)
        if not self.num_rows:
            self._dtype, self._num_features = features.dtype, features.shape[1]
        if len(features) and (features.dtype, features.shape[1]) != (
            self._dtype,
            self._num_features,
        ):
            raise InputError(
                f"{self.folder}: holds {self._dtype} features of {self._num_features} numbers, "
                f"not {features.dtype} of {features.shape[1]}"
            )
        new_rows = {content: self.num_rows + place for place, content in enumerate(new_hashes)}
        data = features.tobytes()
        mode = "r+b" if self._features_path.exists() else "w+b"
        with naming_target(self._features_path), self._features_path.open(mode) as file:
            file.truncate(self.num_rows * self._row_bytes)
            file.seek(0, os.SEEK_END)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        listed = {
            "dtype": self._dtype.name,
            "num_features": self._num_features,
            "sha256": hashlib.sha256(data).hexdigest(),
            "hashes": list(new_hashes),
            "entries": [
                [path, identity, content, new_rows.get(content, self._row_of.get(content)), ds_name]
                for path, identity, content, ds_name in images
            ],
        }
        write_json(  # last, so that a listed segment is complete
            self._segment_path(self._num_segments), {**listed, "checksum": _checksum(listed)}
        )
        self._open_segment(self._num_segments)

    def search(self, detector: Searcher, features: NDArray[Any], k: int) -> list[list[IndexMatch]]:
        """Return the ``k`` best distinct images for each row of ``features``, exactly.

        Raises:
            FingerprintMismatchError: the detector is another.
            InputError: the index is empty.
        """
        return self.matches(self.top_k(detector, features, k))

    def top_k(self, detector: Searcher, features: NDArray[Any], k: int) -> TopK:
        """Search as ``search`` does and return scores and rows, with the recall.

        Raises:
            FingerprintMismatchError: the detector is another.
            InputError: the index is empty.
        """
        self.check(detector.fingerprint)
        if not self.num_rows:
            raise InputError(f"{self.folder}: the index is empty")
        return detector.top_k(features, self.features, k)

    def matches(self, found: TopK) -> list[list[IndexMatch]]:
        """Return which images stand in the rows that were found."""
        return [
            [
                IndexMatch(
                    path=self._first_entry[int(row)].path,
                    id=self._first_entry[int(row)].id,
                    score=float(score),
                    row=int(row),
                )
                for row, score in zip(rows, scores, strict=True)
            ]
            for rows, scores in zip(found.rows, found.scores, strict=True)
        ]

    def best_match(self, detector: Searcher, image: Any) -> IndexMatch:
        """Return the indexed image most like one image (PIL image, path, or tensor ``[3, H, W]``).

        Example:
            >>> while index.best_match(detector, image := sample()).score >= threshold.value:
            ...     pass  # too close to a training image: sample again
        """
        images = image[None] if hasattr(image, "ndim") and image.ndim == 3 else [image]
        return self.search(detector, detector.embed(images), 1)[0][0]

    @property
    def _features_path(self) -> Path:
        return self.folder / FEATURES_NAME

    @property
    def _row_bytes(self) -> int:
        return self._num_features * self._dtype.itemsize

    def _segment_path(self, number: int) -> Path:
        return self.folder / SEGMENT_FOLDER / f"{number:08d}.json"

    def _open_segment(self, number: int) -> None:
        path = self._segment_path(number)
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            checksum = listed.pop("checksum", None)
            if checksum is not None and checksum != _checksum(listed):
                raise ValueError("its content does not match its checksum")
            self._dtype = np.dtype(listed["dtype"])
            self._num_features = int(listed["num_features"])
            hashes = [str(content) for content in listed["hashes"]]
            entries = [Entry(*entry) for entry in listed["entries"]]
            known = self.num_rows + len(hashes)
            if not all(0 <= entry.row < known for entry in entries):
                raise ValueError("an image without features")
            if self._sha256(self.num_rows, len(hashes)) != listed["sha256"]:
                raise CorruptFileError(
                    f"{self._features_path}: the features of {path.name} do not match their "
                    f"checksum; remove {path.name} and every later segment, and run the same "
                    "lcmem index command again"
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(
                f"{path}: missing or damaged ({error}); remove it and every later segment, and "
                "run the same lcmem index command again"
            ) from error
        for content in hashes:
            self._row_of[content] = len(self._row_of)
        for entry in entries:
            self._first_entry.setdefault(entry.row, entry)
        self.entries.extend(entries)
        self._num_segments = number + 1

    def _sha256(self, first: int, count: int) -> str:
        """Return the checksum of some rows; a shorter one where the file ends before them."""
        digest = hashlib.sha256()
        left = count * self._row_bytes
        if left:
            with self._features_path.open("rb") as file:
                file.seek(first * self._row_bytes)
                while left and (data := file.read(min(left, _READ_BYTES))):
                    digest.update(data)
                    left -= len(data)
        return digest.hexdigest()


def _checksum(listed: dict[str, Any]) -> str:
    return sha256_bytes(dump_json(listed).encode())


def is_index(path: Path) -> bool:
    """Return whether a path is the folder of an index."""
    return (path / META_NAME).is_file()
