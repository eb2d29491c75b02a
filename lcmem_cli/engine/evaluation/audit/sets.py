"""The sets that an audit compares: listed, embedded once per content, summarised."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.manifest import Record, load_manifest, tells_identities
from lcmem_cli.engine.detectors.base import Detector, FloatArray
from lcmem_cli.engine.detectors.embedding import allocate_features, embed_files
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.result import SetSummary
from lcmem_cli.engine.results import Unreadable
from lcmem_cli.engine.store.index import Index, is_index

_COPIED_ROWS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Readable images of one set; images of equal content share a feature row.

    Attributes:
        summary: sizes, duplicates and unreadable images.
        names: ``[n]`` paths as listed, relative to the set's folder.
        files: ``[n]`` paths to open.
        ids: ``[n]`` identity labels.
        identities: ``[n]`` data set and label, which together name an identity.
        rows: ``[n]`` feature row of each image.
        features: ``[d, k]``, one row per distinct content.
        hashes: ``[d]`` content hashes.
    """

    summary: SetSummary
    names: tuple[str, ...]
    files: tuple[Path, ...]
    ids: tuple[str, ...]
    identities: tuple[tuple[str, str], ...]
    rows: NDArray[np.int64]
    features: FloatArray
    hashes: tuple[str, ...]

    @property
    def num_distinct(self) -> int:
        """Number of feature rows."""
        return len(self.hashes)

    def features_of(self, rows: NDArray[np.int64]) -> FloatArray:
        """Return features of distinct rows in ascending order; no copy where they are all.

        A copy that is large goes to a temporary file, as the features themselves do.
        """
        if len(rows) == self.num_distinct:
            return self.features
        chosen = allocate_features((len(rows), self.features.shape[1]), self.features.dtype.type)
        for start in range(0, len(rows), _COPIED_ROWS):
            part = slice(start, start + _COPIED_ROWS)
            chosen[part] = self.features[rows[part]]
        return chosen

    @cached_property
    def first_image(self) -> NDArray[np.int64]:
        """``[d]`` first image with each content."""
        first = np.full(self.num_distinct, -1, dtype=np.int64)
        first[self.rows[::-1]] = np.arange(len(self.rows))[::-1]
        return first

    @property
    def labelled(self) -> bool:
        """Whether labels come from a filelist, so that those of two sets can be compared."""
        return Path(self.summary.source).is_file()

    @cached_property
    def file_of(self) -> dict[str, Path]:
        """The file behind each name."""
        return dict(zip(self.names, self.files, strict=True))

    def name_of(self, row: int) -> str:
        """Return the name of the first image with the content of a feature row."""
        return self.names[int(self.first_image[row])]

    def id_of(self, row: int) -> str:
        """Return the identity of the first image with the content of a feature row."""
        return self.ids[int(self.first_image[row])]

    def identity_of(self, row: int) -> tuple[str, str]:
        """Return the data set and label of the first image with a feature row's content."""
        return self.identities[int(self.first_image[row])]

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """``[d]`` identity number of each content; identities that share a content are one."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        numbers = {key: number for number, key in enumerate(dict.fromkeys(self.identities))}
        id_nodes = self.num_distinct + np.array([numbers[key] for key in self.identities])
        size = self.num_distinct + len(numbers)
        edges = coo_array((np.ones(len(self.rows)), (self.rows, id_nodes)), shape=(size, size))
        groups: NDArray[np.int64] = connected_components(edges, directed=False)[1]
        return groups[: self.num_distinct].astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of one set, not opened yet.

    Attributes:
        what: name of the set in messages.
        source: as the user named it.
        folder: that the records' paths are relative to.
        records: paths and identities.
        files: paths to open.
        index: where the features already are, for a saved index.
    """

    what: str
    source: str
    folder: Path
    records: Sequence[Record]
    files: Sequence[Path]
    index: Index | None = None


def list_set(
    source: str | Path | Index,
    *,
    what: str,
    basedir: Path | None = None,
    max_missing: int | None = None,
) -> Listing:
    """List a folder, a filelist or a saved index.

    Args:
        source: path, or an open index.
        what: name of the set in messages.
        basedir: folder that the paths of a filelist are relative to.
        max_missing: files of a filelist that may be missing and become unreadable ones; ``None``:
            any number.

    Raises:
        InputError: nothing there, or no images.
    """
    if not isinstance(source, Index) and is_index(Path(source)):
        source = Index.open(Path(source))
    if isinstance(source, Index):
        entries = source.entries
        listing = Listing(
            what=what,
            source=str(source.folder),
            folder=Path("/"),
            records=[Record(path=e.path, id=e.id, ds_name=e.ds_name) for e in entries],
            files=[Path(entry.path) for entry in entries],
            index=source,
        )
    else:
        path = Path(source)
        manifest = load_manifest(
            path,
            basedir=None if path.is_dir() else basedir,
            need_split=False,
            max_missing=max_missing,
        )
        listing = Listing(
            what=what,
            source=str(source),
            folder=Path(manifest.basedir),
            records=manifest.records,
            files=manifest.paths(),
        )
    if not listing.records:
        raise InputError(f"{listing.source}: the {what} set holds no images")
    return listing


def embed_set(
    listing: Listing,
    detector: Detector,
    compute: Compute,
) -> ImageSet:
    """Embed every distinct image of a set; the features of an index are used as they are.

    Args:
        listing: the images.
        detector: the one that an index was made with, which the caller checks.
        compute: how it is done.

    Raises:
        InputError: not one image is readable.
    """
    if listing.index is not None:
        entries = listing.index.entries
        return _assemble(
            listing,
            rows=np.array([entry.row for entry in entries], dtype=np.int64),
            hashes=[entry.content_hash for entry in entries],
            features=listing.index.features,
            guessed=None,
            unreadable=(),
        )
    embedded = embed_files(detector, listing.files, compute)
    names = {
        str(path): record.path for path, record in zip(listing.files, listing.records, strict=True)
    }
    return _assemble(
        listing,
        rows=embedded.rows,
        hashes=embedded.content_hashes,
        features=embedded.features,
        guessed=embedded.guessed,
        unreadable=tuple(
            Unreadable(path=names.get(item.path, item.path), reason=item.reason)
            for item in embedded.unreadable
        ),
    )


def _num_identities(listing: Listing, records: Sequence[Record]) -> int | None:
    identities = {record.identity for record in records}
    known = len(identities) < len(records) or (
        listing.index is None and tells_identities(Path(listing.source), records)
    )
    return len(identities) if known else None


def _assemble(
    listing: Listing,
    *,
    rows: NDArray[np.int64],
    hashes: Sequence[str | None],
    features: FloatArray,
    guessed: NDArray[np.bool_] | None,
    unreadable: tuple[Unreadable, ...],
) -> ImageSet:
    records, files = listing.records, listing.files
    readable = [index for index in range(len(records)) if rows[index] >= 0]
    if not readable:
        reasons = "".join(f"\n  {item.path}: {item.reason}" for item in unreadable[:5])
        raise InputError(
            f"{listing.source}: not one image of the {listing.what} set can be read{reasons}"
        )
    by_row: dict[int, list[int]] = {}
    for index in readable:
        by_row.setdefault(int(rows[index]), []).append(index)
    row_hashes = [""] * len(features)
    for row, members in by_row.items():
        row_hashes[row] = str(hashes[members[0]])
    return ImageSet(
        summary=SetSummary(
            source=listing.source,
            folder=str(listing.folder.absolute()),
            num_images=len(records),
            num_distinct=len(by_row),
            num_identities=_num_identities(listing, [records[index] for index in readable]),
            duplicates=tuple(
                tuple(records[index].path for index in members)
                for members in by_row.values()
                if len(members) > 1
            ),
            unreadable=unreadable,
            num_guessed=None if guessed is None else int(guessed[rows[readable]].sum()),
        ),
        names=tuple(records[index].path for index in readable),
        files=tuple(files[index] for index in readable),
        ids=tuple(records[index].id for index in readable),
        identities=tuple(records[index].identity for index in readable),
        rows=np.asarray([rows[index] for index in readable], dtype=np.int64),
        features=features,
        hashes=tuple(row_hashes),
    )
