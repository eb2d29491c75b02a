"""An index: the features of a training set on disk, to be searched again and again.

Append-only: every addition is a segment of features and a side file that lists its images. Bound
to the fingerprint of the detector that made the features.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.errors import CorruptFileError, FingerprintMismatchError, InputError
from lcmem_cli.engine.files import atomic_path, sha256_file, write_json
from lcmem_cli.engine.results import Result
from lcmem_cli.engine.store.search import TopK, merge_top_k

FORMAT_VERSION = 1
META_NAME, SEGMENT_FOLDER = "index.json", "segments"


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
        self._segments: list[NDArray[Any]] = []
        self._first_entry: dict[int, Entry] = {}
        self._row_of: dict[str, int] = {}
        self._num_rows = 0
        for side in sorted((folder / SEGMENT_FOLDER).glob("*.json")):
            self._open(side)

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
        except FileNotFoundError:
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
        return self._num_rows

    @property
    def features(self) -> NDArray[Any]:
        """All features ``[num_rows, d]``; a memory map where there is one segment."""
        if len(self._segments) == 1:
            return self._segments[0]
        return np.concatenate(self._segments) if self._segments else np.zeros((0, 0), np.float32)

    def check(self, fingerprint: str) -> None:
        """Refuse another detector.

        Raises:
            FingerprintMismatchError: its fingerprint is another.
        """
        if fingerprint != self.fingerprint:
            raise FingerprintMismatchError(
                f"{self.folder}: made by detector {self.detector} ({self.fingerprint[:12]}), not "
                f"by {fingerprint[:12]}: features of two detectors cannot be compared; use that "
                "detector, or build an index with this one"
            )

    def known_rows(self) -> dict[str, int]:
        """Return the row of each content hash in the index."""
        return dict(self._row_of)

    def append(
        self, images: Sequence[tuple[str, str, str]], new_hashes: Sequence[str], features: Any
    ) -> None:
        """Add images as one segment.

        Args:
            images: ``(path, id, content hash)`` of each; the contents are known or new.
            new_hashes: contents that are not in the index yet.
            features: ``[len(new_hashes), d]``.
        """
        rows = dict(self._row_of)
        for offset, content in enumerate(new_hashes):
            rows[content] = self._num_rows + offset
        number = len(list((self.folder / SEGMENT_FOLDER).glob("*.json")))
        path = self.folder / SEGMENT_FOLDER / f"{number:08d}.npy"
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.asarray(features), allow_pickle=False)
        side = path.with_suffix(".json")
        write_json(
            side,
            {
                "sha256": sha256_file(path),
                "hashes": list(new_hashes),
                "entries": [[p, i, h, rows[h]] for p, i, h in images],
            },
        )
        self._open(side)

    def search(self, detector: Searcher, features: NDArray[Any], k: int) -> list[list[IndexMatch]]:
        """Return the ``k`` best distinct images for each row of ``features``, exactly.

        Raises:
            FingerprintMismatchError: the detector is another.
            InputError: the index is empty.
        """
        self.check(detector.fingerprint)
        if not self._num_rows:
            raise InputError(f"{self.folder}: the index is empty")
        offsets = np.cumsum([0, *(len(s) for s in self._segments)])[:-1].tolist()
        used = [(s, o) for s, o in zip(self._segments, offsets, strict=True) if len(s)]
        found = merge_top_k(
            [detector.top_k(features, segment, k) for segment, _ in used],
            [offset for _, offset in used],
            k,
        )
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
        """Return the indexed image most like one image (PIL image, path, or ``[3, H, W]``).

        Example:
            >>> while index.best_match(detector, image := sample()).score >= threshold.value:
            ...     pass  # too close to a training image: sample again
        """
        images = image[None] if hasattr(image, "ndim") and image.ndim == 3 else [image]
        return self.search(detector, detector.embed(images), 1)[0][0]

    def _open(self, side: Path) -> None:
        path = side.with_suffix(".npy")
        try:
            listed = json.loads(side.read_text(encoding="utf-8"))
            if sha256_file(path) != listed["sha256"]:
                raise ValueError("content does not match its checksum")
            segment: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
            entries = [Entry(*entry) for entry in listed["entries"]]
            hashes = listed["hashes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(
                f"{path}: missing or damaged ({error}); remove it with its .json and every later "
                "segment, and add these images again"
            ) from error
        for offset, content in enumerate(hashes):
            self._row_of[content] = self._num_rows + offset
        for entry in entries:
            self._first_entry.setdefault(entry.row, entry)
        self._segments.append(segment)
        self._num_rows += len(segment)
        self.entries.extend(entries)


def is_index(path: Path) -> bool:
    """Return whether a path is the folder of an index."""
    return (path / META_NAME).is_file()
