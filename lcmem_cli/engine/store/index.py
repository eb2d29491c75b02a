"""An index: the features of a training set on disk, to be searched again and again.

Append-only: an addition appends its features to one file, which is read as a memory map, then lists
its images in a table, and at last writes a header that makes both count. What a killed process left
without a header is overwritten by the next addition. Bound to the fingerprint of the detector that
made the features.

Opening compares lists and headers with their checksums, and of the features some blocks spread over
all of them: reading a large index whole would take longer than a query. A search compares what it
returns. ``verify`` compares everything.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.distributed import available_cpus
from lcmem_cli.engine.documents import FileName, check_document, read_document
from lcmem_cli.engine.errors import FingerprintMismatchError, InputError
from lcmem_cli.engine.files import (
    atomic_path,
    dump_json,
    naming_target,
    sha256_bytes,
    sha256_file,
    write_json,
)
from lcmem_cli.engine.results import Result
from lcmem_cli.engine.store.integrity import check_file, naming_damage
from lcmem_cli.engine.store.search import TopK

FORMAT_VERSION: Literal[2] = 2
META_NAME, FEATURES_NAME, SEGMENT_FOLDER = "index.json", "features.bin", "segments"
_BLOCK_BYTES = 1 << 20
"""Features that share a checksum, in whole rows."""
_SAMPLED_BLOCKS = 48
_REMEDY_AFTER = "every later segment, and run the same lcmem index command again"
_REMEDY = f"remove it and {_REMEDY_AFTER}"


class Searcher(Protocol):
    """What an index needs of a detector."""

    name: str
    fingerprint: str

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
class _Meta:
    """What ``index.json`` says."""

    format: Literal[2]
    detector: FileName
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Segment:
    """What one addition has added.

    Attributes:
        dtype: of the features.
        num_features: numbers of a row.
        num_rows: that it added.
        num_images: that it lists.
        blocks: CRC-32 of each block of these rows.
        sha256: of the table of its images.
    """

    dtype: str
    num_features: int
    num_rows: int
    num_images: int
    blocks: list[int]
    sha256: str


class _Block(NamedTuple):
    """Some rows of features that share a checksum."""

    first: int
    num_rows: int
    checksum: int
    segment: int


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
        num_rows: distinct images.
    """

    def __init__(self, folder: Path, detector: str, fingerprint: str) -> None:
        self.folder, self.detector, self.fingerprint = folder, detector, fingerprint
        self.num_rows = self._num_images = 0
        self._dtype = np.dtype(np.float32)
        self._num_features = 0
        self._segments: list[_Segment] = []
        self._first_rows: list[int] = []
        self._listed: dict[int, list[Entry]] = {}
        self._blocks: list[_Block] = []
        self._verified: set[int] = set()
        for number in range(len(list((folder / SEGMENT_FOLDER).glob("[!.]*.json")))):
            self._open_segment(number)
        sampled = np.linspace(0, len(self._blocks) - 1, min(_SAMPLED_BLOCKS, len(self._blocks)))
        self._verify(sampled.astype(int).tolist())

    @classmethod
    def create(cls, folder: Path, *, detector: str, fingerprint: str) -> Index:
        """Make an empty index, or open the one that is there if it is this detector's.

        Raises:
            FingerprintMismatchError: the folder holds an index of another detector.
        """
        if not (folder / META_NAME).is_file():
            meta = _Meta(format=FORMAT_VERSION, detector=detector, fingerprint=fingerprint)
            write_json(folder / META_NAME, dataclasses.asdict(meta))
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
        meta = _read_meta(Path(folder))
        return cls(Path(folder), meta.detector, meta.fingerprint)

    @staticmethod
    def build(source: Any, folder: str | Path, **options: Any) -> Index:
        """Make an index of images, or add to one: see ``lcmem_cli.build_index``.

        Example:
            >>> index = Index.build("training/", "index", detector="joint")
        """
        from lcmem_cli import build_index  # what embeds is built on this file

        return build_index(source, folder, **options)

    def __len__(self) -> int:
        """Return the number of images."""
        return self._num_images

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """All images, in the order of addition; their tables are read when they are asked for."""
        return [entry for number in range(len(self._segments)) for entry in self._list(number)]

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {entry.content_hash: entry.row for entry in self.entries}

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
        self._write_features(data)
        entries = [
            Entry(
                path, identity, content, new_rows.get(content, self._row_of.get(content, -1)), name
            )
            for path, identity, content, name in images
        ]
        number = len(self._segments)
        table = self._segment_path(number, ".parquet")
        _write_entries(table, entries)
        step = self._block_rows * self._row_bytes
        segment = _Segment(
            dtype=self._dtype.name,
            num_features=self._num_features,
            num_rows=len(features),
            num_images=len(entries),
            blocks=[zlib.crc32(data[start : start + step]) for start in range(0, len(data), step)],
            sha256=sha256_file(table),
        )
        listed = dataclasses.asdict(segment)
        write_json(  # last, so that a segment with a header is complete
            self._segment_path(number), {**listed, "checksum": _checksum(listed)}
        )
        self.entries.extend(entries)
        self._row_of.update(new_rows)
        self._open_segment(number)

    def _write_features(self, data: bytes) -> None:
        """Write rows behind the listed ones, over what a killed process has left there."""
        mode = "r+b" if self._features_path.exists() else "w+b"
        with naming_target(self._features_path), self._features_path.open(mode) as file:
            file.truncate(self.num_rows * self._row_bytes)
            file.seek(0, os.SEEK_END)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def search(self, detector: Searcher, features: NDArray[Any], k: int) -> list[list[IndexMatch]]:
        """Return the ``k`` best distinct images for each row of ``features``, exactly.

        Raises:
            FingerprintMismatchError: the detector is another.
            InputError: the index is empty.
            CorruptFileError: what was found is damaged.
        """
        return self.matches(self.top_k(detector, features, k))

    def top_k(self, detector: Searcher, features: NDArray[Any], k: int) -> TopK:
        """Search as ``search`` does and return scores and rows, with the recall.

        Raises:
            FingerprintMismatchError: the detector is another.
            InputError: the index is empty.
            CorruptFileError: what was found is damaged.
        """
        self.check(detector.fingerprint)
        if not self.num_rows:
            raise InputError(f"{self.folder}: the index is empty")
        found = detector.top_k(features, self.features, k)
        self._verify_rows(np.unique(found.rows).tolist())
        return found

    def matches(self, found: TopK) -> list[list[IndexMatch]]:
        """Return which images stand in the rows that were found."""
        return [
            [
                IndexMatch(
                    path=self._entry_of(int(row)).path,
                    id=self._entry_of(int(row)).id,
                    score=float(score),
                    row=int(row),
                )
                for row, score in zip(rows, scores, strict=True)
            ]
            for rows, scores in zip(found.rows, found.scores, strict=True)
        ]

    @property
    def _features_path(self) -> Path:
        return self.folder / FEATURES_NAME

    @property
    def _row_bytes(self) -> int:
        return self._num_features * self._dtype.itemsize

    @property
    def _block_rows(self) -> int:
        return max(1, _BLOCK_BYTES // max(1, self._row_bytes))

    def _segment_path(self, number: int, suffix: str = ".json") -> Path:
        return self.folder / SEGMENT_FOLDER / f"{number:08d}{suffix}"

    def _open_segment(self, number: int) -> None:
        path = self._segment_path(number)
        with naming_damage(path, _REMEDY):
            listed = json.loads(path.read_text(encoding="utf-8"))
            if listed.pop("checksum") != _checksum(listed):
                raise ValueError("its content does not match its checksum")
            segment = check_document(listed, _Segment, source=str(path), remedy=_REMEDY)
        self._dtype, self._num_features = np.dtype(segment.dtype), segment.num_features
        step, first = self._block_rows, self.num_rows
        with naming_damage(path, _REMEDY):
            starts = range(0, segment.num_rows, step)
            self._blocks += [
                _Block(first + start, min(step, segment.num_rows - start), checksum, number)
                for start, checksum in zip(starts, segment.blocks, strict=True)
            ]
        self._segments.append(segment)
        self._first_rows.append(first)
        self.num_rows += segment.num_rows
        self._num_images += segment.num_images

    def _list(self, number: int) -> list[Entry]:
        """Return the images of a segment."""
        if number not in self._listed:
            path, segment = self._segment_path(number, ".parquet"), self._segments[number]
            known = self._first_rows[number] + segment.num_rows
            with naming_damage(path, _REMEDY):
                check_file(path, segment.sha256)
                entries = _read_entries(path)
                if not all(0 <= entry.row < known for entry in entries):
                    raise ValueError("an image without features")
            self._listed[number] = entries
        return self._listed[number]

    def _entry_of(self, row: int) -> Entry:
        """Return the image that a row was added for; others of its content came later."""
        number = bisect.bisect_right(self._first_rows, row) - 1
        return next(entry for entry in self._list(number) if entry.row == row)

    def verify(self) -> None:
        """Compare all features and all lists of images with their checksums.

        Raises:
            CorruptFileError: naming the first segment that differs.
        """
        for number in range(len(self._segments)):
            self._list(number)
        self._verify(range(len(self._blocks)))

    def _verify_rows(self, rows: Iterable[int]) -> None:
        firsts = [block.first for block in self._blocks]
        self._verify({bisect.bisect_right(firsts, row) - 1 for row in rows})

    def _verify(self, numbers: Iterable[int]) -> None:
        """Compare blocks of features with their checksums, each once, in threads."""
        blocks = [(number, self._blocks[number]) for number in {*numbers} - self._verified]

        def is_whole(item: tuple[int, _Block]) -> bool:
            block = item[1]
            with self._features_path.open("rb") as file:
                file.seek(block.first * self._row_bytes)
                return zlib.crc32(file.read(block.num_rows * self._row_bytes)) == block.checksum

        with ThreadPoolExecutor(available_cpus()) as pool:
            for (number, block), whole in zip(blocks, pool.map(is_whole, blocks), strict=True):
                name = self._segment_path(block.segment).name
                with naming_damage(self._features_path, f"remove {name} and {_REMEDY_AFTER}"):
                    if not whole:
                        raise ValueError(f"the features of {name} do not match their checksum")
                self._verified.add(number)


_COLUMNS = ("path", "id", "content", "ds_name")


def _write_entries(path: Path, entries: Sequence[Entry]) -> None:
    import pyarrow
    import pyarrow.parquet

    def binary(value: str | None) -> bytes | None:  # file names need not be text
        return None if value is None else value.encode("utf-8", "surrogateescape")

    values = {
        "path": [binary(entry.path) for entry in entries],
        "id": [binary(entry.id) for entry in entries],
        "content": [binary(entry.content_hash) for entry in entries],
        "ds_name": [binary(entry.ds_name) for entry in entries],
    }
    columns = {name: pyarrow.array(values[name], pyarrow.binary()) for name in _COLUMNS}
    columns["row"] = pyarrow.array([entry.row for entry in entries], pyarrow.int64())
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)


def _read_entries(path: Path) -> list[Entry]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)

    def texts(name: str) -> list[Any]:
        return [
            None if value is None else value.decode("utf-8", "surrogateescape")
            for value in table.column(name).to_pylist()
        ]

    paths, ids, contents, names = map(texts, _COLUMNS)
    rows = table.column("row").to_pylist()
    return list(map(Entry, paths, ids, contents, rows, names))


def _checksum(listed: dict[str, Any]) -> str:
    return sha256_bytes(dump_json(listed).encode())


def detector_of_index(folder: Path) -> str:
    """Return the name of the detector that an index was made with, without opening the rest.

    Raises:
        InputError: there is no index.
        CorruptFileError: its header is damaged.
    """
    return _read_meta(folder).detector


def _read_meta(folder: Path) -> _Meta:
    if not is_index(folder):
        raise InputError(f"{folder}: no index there; make one with: lcmem index build")
    return read_document(
        folder / META_NAME, _Meta, remedy="remove the folder and build the index again"
    )


def is_index(path: Path) -> bool:
    """Return whether a path is the folder of an index."""
    return (path / META_NAME).is_file()
