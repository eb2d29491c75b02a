"""The sets that an audit compares: listed, embedded once per content, summarised."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.arrays import Images, ValueRange
from lcmem_cli.engine.data.folders import FoldersAre, meant
from lcmem_cli.engine.data.manifest import (
    DEFAULT_READING,
    Reading,
    Record,
    is_list,
    names_identities,
    tells_identities,
)
from lcmem_cli.engine.data.sources.in_memory import placed
from lcmem_cli.engine.data.sources.opened import has_metadata
from lcmem_cli.engine.data.tables import STANDARD
from lcmem_cli.engine.detectors.base import Detector, FloatArray
from lcmem_cli.engine.detectors.embedding import allocate_features, embed_files
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.result import BlankImage, SetSummary
from lcmem_cli.engine.evaluation.components import components
from lcmem_cli.engine.files import sha256_bytes
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Unreadable
from lcmem_cli.engine.store.index import Index, is_index

_COPIED_ROWS = 4096

Source = str | Path | Index
Given = Source | Images
"""What a user may give for a set: images in memory, too; ``as_source`` makes a place of them."""
Item = TypeVar("Item")
Other = TypeVar("Other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sets(Generic[Item]):
    """One thing for each set of an audit: its source, its listing, its images.

    Attributes:
        generated: of the generated images.
        training: of the training images.
        held_out: of the held-out real images; ``None`` where there are none.
    """

    generated: Item
    training: Item
    held_out: Item | None

    def named(self) -> list[tuple[str, Item]]:
        """Return those there are, each with its name in messages."""
        named = [("generated", self.generated), ("training", self.training)]
        return named if self.held_out is None else [*named, ("held-out", self.held_out)]

    def map(self, change: Callable[[str, Item], Other]) -> Sets[Other]:
        """Return what a function makes of each, given its name."""
        made = {name: change(name, item) for name, item in self.named()}
        return Sets(
            generated=made["generated"], training=made["training"], held_out=made.get("held-out")
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Readable images of one set; images of equal content share a feature row.

    Attributes:
        summary: sizes, duplicates and unreadable images.
        records: ``[n]`` path as listed, relative to the set's folder, and identity of each image.
        files: ``[n]`` paths to open.
        rows: ``[n]`` feature row of each image.
        features: ``[d, k]``, one row per distinct content.
        hashes: ``[d]`` content hashes.
    """

    summary: SetSummary
    records: tuple[Record, ...]
    files: tuple[Path, ...]
    rows: NDArray[np.int64]
    features: FloatArray
    hashes: tuple[str, ...]

    @property
    def is_index(self) -> bool:
        """Whether the features were made before, perhaps of files that have changed since."""
        return self.summary.num_guessed is None

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

    def converted(self, convert: Callable[[FloatArray], FloatArray]) -> ImageSet:
        """Return the set with other features, made of these some rows at a time."""
        features = allocate_features(self.features.shape, self.features.dtype.type)
        for start in range(0, len(features), _COPIED_ROWS):
            part = slice(start, start + _COPIED_ROWS)
            features[part] = convert(self.features[part])
        return dataclasses.replace(self, features=features)

    @cached_property
    def first_image(self) -> NDArray[np.int64]:
        """``[d]`` first image with each content."""
        first = np.full(self.num_distinct, -1, dtype=np.int64)
        first[self.rows[::-1]] = np.arange(len(self.rows))[::-1]  # the last one written stays
        return first

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The feature row of each content."""
        return {content: row for row, content in enumerate(self.hashes)}

    @cached_property
    def file_of(self) -> dict[str, Path]:
        """The file behind each name."""
        names = (record.path for record in self.records)
        return dict(zip(names, self.files, strict=True))

    @cached_property
    def _record_named(self) -> dict[str, Record]:
        return {record.path: record for record in self.records}

    def record_named(self, name: str) -> Record:
        """Return an image by its name."""
        return self._record_named[name]

    @cached_property
    def identities(self) -> frozenset[tuple[str, str]]:
        """All identities."""
        return frozenset(record.identity for record in self.records)

    def record_of(self, row: int | np.integer) -> Record:
        """Return the first image with the content of a feature row."""
        return self.records[int(self.first_image[row])]

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """``[d]`` identity number of each content; identities that share a content are one."""
        # A graph of contents and identities with an edge per image: what hangs together is one.
        keys = [record.identity for record in self.records]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        id_nodes = self.num_distinct + np.array([numbers[key] for key in keys])
        size = self.num_distinct + len(numbers)
        return components(np.stack([self.rows, id_nodes], axis=1), size)[: self.num_distinct]

    @property
    def labelled(self) -> bool:
        """Whether labels come from columns, so that those of two sets can be compared."""
        return names_identities(Path(self.summary.source), self.records)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded:
    """The sets of an audit as one detector sees them.

    Attributes:
        detector: what made the features, and scores them.
        sets: the images.
        compute: how further work is done.
        adapted_to: training images that the detector was adapted to; ``None`` where it was not.
        convert: makes its features of those of the detector before; ``None`` where it was not.
        before: the sets as that detector saw them.
    """

    detector: Detector
    sets: Sets[ImageSet]
    compute: Compute
    adapted_to: int | None = None
    convert: Callable[[FloatArray], FloatArray] | None = None
    before: Embedded | None = None

    @property
    def knows_both_identities(self) -> bool:
        """Whether labels of the training and the held-out set can be compared."""
        held_out = self.sets.held_out
        return held_out is not None and held_out.labelled and self.sets.training.labelled

    @property
    def shared_with_queries(self) -> frozenset[tuple[str, str]] | None:
        """Identities in both generated and training set; ``None`` where they are no columns."""
        generated, training = self.sets.generated, self.sets.training
        if not (generated.labelled and training.labelled):
            return None
        return generated.identities & training.identities


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
        folders_are: what subfolders were taken for; ``None`` where there are none.
    """

    what: str
    source: str
    folder: Path
    records: Sequence[Record]
    files: Sequence[Path]
    index: Index | None = None
    folders_are: Literal["identities", "classes"] | None = None


def as_source(
    given: Given, *, what: str, value_range: ValueRange, stack: contextlib.ExitStack
) -> Source:
    """Return what a user gave as a path or an index; see ``placed``.

    Args:
        given: a set.
        what: its name.
        value_range: of images in memory.
        stack: forgets images in memory when it is closed.
    """
    return given if isinstance(given, Index) else placed(given, what, value_range, stack)


def list_set(
    source: Source,
    *,
    what: str,
    reading: Reading = DEFAULT_READING,
    folders_are: FoldersAre = "auto",
    reporter: Reporter = SILENT,
) -> Listing:
    """List a folder, a filelist, a source of images or a saved index.

    Args:
        source: path, or an open index.
        what: name of the set in messages.
        reading: how; what is about filelists has no effect on another source.
        folders_are: what the subfolders of a folder stand for.
        reporter: told of files of a folder that are no images.

    Raises:
        InputError: nothing there, or no images.
    """
    if not isinstance(source, Index) and is_index(Path(source)):
        source = Index.open(Path(source))
        source.verify()  # an audit compares with every row
    if isinstance(source, Index):
        listing = Listing(
            what=what,
            source=str(source.folder),
            folder=Path("/"),
            records=[Record(path=e.path, id=e.id, ds_name=e.ds_name) for e in source.entries],
            files=[Path(entry.path) for entry in source.entries],
            index=source,
        )
    else:
        path = Path(source)
        if not is_list(path):
            columns = reading.columns if has_metadata(path) else STANDARD
            reading = dataclasses.replace(reading, basedir=None, columns=columns)
        manifest = reading.load(path, reporter=reporter)
        records, taken_for = manifest.records, None
        if path.is_dir() and any("/" in record.path for record in records):
            taken_for = meant([record.path for record in records], folders_are)
        if taken_for == "classes":
            records = tuple(record._replace(id=record.path) for record in records)
            reporter.warn(f"{path}: subfolders are classes; each image is an identity of its own")
        listing = Listing(
            what=what,
            source=str(source),
            folder=Path(manifest.basedir),
            records=records,
            files=manifest.paths(),
            folders_are=taken_for,
        )
    if not listing.records:
        raise InputError(f"{listing.source}: the {what} set holds no images")
    return listing


def embed_set(listing: Listing, detector: Detector, compute: Compute) -> ImageSet:
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
        return assemble(
            listing,
            rows=np.array([entry.row for entry in entries], dtype=np.int64),
            hashes=[entry.content_hash for entry in entries],
            features=listing.index.features,
        )
    embedded = embed_files(detector, listing.files, compute, with_blank=False)
    name_of = {
        str(path): record.path for path, record in zip(listing.files, listing.records, strict=True)
    }
    return assemble(
        listing,
        rows=embedded.rows,
        hashes=embedded.content_hashes,
        features=embedded.features,
        guessed=embedded.guessed,
        unreadable=tuple(
            Unreadable(path=name_of.get(item.path, item.path), reason=item.reason)
            for item in embedded.unreadable
        ),
        blank=tuple(
            BlankImage(path=name_of.get(str(path), str(path)), colour=f"#{colour:06x}")
            for path, colour in embedded.left_out
        ),
    )


def assemble(
    listing: Listing,
    *,
    rows: NDArray[np.int64],
    hashes: Sequence[str | None],
    features: FloatArray,
    guessed: NDArray[np.bool_] | None = None,
    unreadable: tuple[Unreadable, ...] = (),
    blank: tuple[BlankImage, ...] = (),
) -> ImageSet:
    """Make a set of the images that have features.

    Args:
        listing: all images.
        rows: ``[n]`` feature row of each, or -1.
        hashes: ``[n]`` content of each.
        features: ``[d, k]``.
        guessed: ``[d]`` whether a bit depth was guessed; ``None``: not known.
        unreadable: images without features, with reasons.
        blank: images that were left out.

    Raises:
        InputError: not one image has features.
    """
    readable = np.flatnonzero(rows >= 0).tolist()
    if not readable:
        reasons = "".join(f"\n  {item.path}: {item.reason}" for item in unreadable[:5])
        raise InputError(
            f"{listing.source}: not one image of the {listing.what} set can be read{reasons}"
            + (f"\n  {len(blank):,} show nothing but one colour" if blank else "")
        )
    records = tuple(listing.records[index] for index in readable)
    rows = rows[readable]
    row_hashes = [""] * len(features)
    members: dict[int, list[str]] = {}
    for index, record, row in zip(readable, records, rows.tolist(), strict=True):
        row_hashes[row] = str(hashes[index])
        members.setdefault(row, []).append(record.path)
    return ImageSet(
        summary=SetSummary(
            source=listing.source,
            folder=str(listing.folder.resolve()),
            num_images=len(listing.records),
            num_distinct=len(members),
            num_identities=_num_identities(listing, records),
            duplicates=tuple(tuple(paths) for paths in members.values() if len(paths) > 1),
            unreadable=unreadable,
            num_guessed=None if guessed is None else int(guessed[rows].sum()),
            digest=sha256_bytes("".join(sorted(row_hashes)).encode("ascii")),
            blank=blank,
            folders_are=listing.folders_are,
        ),
        records=records,
        files=tuple(listing.files[index] for index in readable),
        rows=rows,
        features=features,
        hashes=tuple(row_hashes),
    )


def _num_identities(listing: Listing, records: Sequence[Record]) -> int | None:
    identities = {record.identity for record in records}
    known = len(identities) < len(records) or (
        listing.index is None and tells_identities(Path(listing.source), records)
    )
    return len(identities) if known else None
