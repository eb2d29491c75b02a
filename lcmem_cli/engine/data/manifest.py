"""Lists of images: read from CSV, Parquet or a folder, checked in one pass, split by identity.

Identities: an id is stripped of white space; a cell that is empty, or holds what a program writes
for a missing value (``MISSING``), names nobody and is refused. So images of unknown people are
never taken for one person.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from lcmem_cli.engine.data.folders import left_out_text, scan_folder
from lcmem_cli.engine.data.formats import IMAGE_SUFFIXES
from lcmem_cli.engine.data.frames import name_frame, split_frame
from lcmem_cli.engine.data.images import list_frames
from lcmem_cli.engine.data.paths import check_paths
from lcmem_cli.engine.data.sources.base import Source, inner_name
from lcmem_cli.engine.data.sources.opened import find_shards, name_member, open_source
from lcmem_cli.engine.data.tables import (
    PARQUET_SUFFIXES,
    STANDARD,
    TAB_SUFFIXES,
    Columns,
    ListColumns,
    Table,
    as_named,
    problems_error,
    read_lines,
    read_table,
    some,
)
from lcmem_cli.engine.errors import InputError, ManifestError, nearest
from lcmem_cli.engine.files import atomic_path, write_csv
from lcmem_cli.engine.reporter import SILENT, Reporter

SPLITS = ("TRAIN", "VAL", "TEST")
SPLIT_SHARES = (0.60, 0.15, 0.25)
OPTIONS = {
    "path": "--path-column",
    "id": "--id-column",
    "Split": "--split-column",
    "ds_name": "--dataset-column",
}
COLUMNS = Columns(
    what="filelist", required=("path", "id"), optional=("Split", "ds_name"), options=OPTIONS
)
MISSING = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>", "nat"})
"""What stands for a missing value in tables that pandas, numpy and databases write, in any case."""
_SPLIT_NAMES = {
    "TRAINING": "TRAIN", "VALID": "VAL", "VALIDATE": "VAL", "VALIDATION": "VAL", "DEV": "VAL",
    "DEVELOPMENT": "VAL", "TESTING": "TEST",
}  # fmt: skip
"""Other words for the splits, as publishers write them."""
TEXT_SUFFIX = ".txt"
"""Of a file that names an image a line."""
_SHOWN = 5
_OPENING_THREADS = 8

Frames = Literal["first", "all"]


class Record(NamedTuple):
    """One image.

    Attributes:
        path: as listed; relative to the manifest's base folder, or absolute inside it.
        id: identity, unique within a data set.
        split: ``TRAIN``, ``VAL``, ``TEST``, or ``None`` where there is no split.
        ds_name: data set, or ``None`` where the list names none.
    """

    path: str
    id: str
    split: str | None = None
    ds_name: str | None = None

    @property
    def identity(self) -> tuple[str, str]:
        """The data set and the id, which together name an identity."""
        return (self.ds_name or "", self.id)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A checked list of images.

    Attributes:
        records: the images, in the order of the file.
        basedir: folder that relative paths start from.
        source: file or folder that the list was read from.
        digest: SHA-256 over all rows; by default computed from them.
        left_out: files of a folder that are no images, relative to it.
    """

    records: tuple[Record, ...]
    basedir: Path
    source: Path
    digest: str = ""
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Compute the digest where none is given."""
        if not self.digest:
            object.__setattr__(self, "digest", _digest(self.records))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.records)

    @property
    def ds_names(self) -> tuple[str, ...]:
        """Data sets in order of first appearance; empty where the list names none."""
        return tuple(dict.fromkeys(r.ds_name for r in self.records if r.ds_name is not None))

    def paths(self) -> list[Path]:
        """Return the file of each record."""
        return [self.basedir / record.path for record in self.records]

    def select(self, split: str | None = None, ds_names: Collection[str] | None = None) -> Manifest:
        """Return the records of one split and of some data sets, in the same order.

        Args:
            split: ``TRAIN``, ``VAL`` or ``TEST``; ``None`` takes all.
            ds_names: data sets to keep; ``None`` takes all.

        Raises:
            InputError: no such split or data set.
        """
        if split is not None and split not in SPLITS:
            raise InputError(f"no split '{split}'; {nearest(split, SPLITS)}")
        known = self.ds_names
        for name in ds_names or ():
            if name not in known:
                raise InputError(f"{self.source}: no data set '{name}'; {nearest(name, known)}")
        records = tuple(
            record
            for record in self.records
            if (split is None or record.split == split)
            and (ds_names is None or record.ds_name in ds_names)
        )
        return Manifest(records, self.basedir, self.source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How lists of images are read; see ``load_manifest``.

    Attributes:
        basedir: folder that relative paths start from.
        columns: what filelists call their columns.
        frames: ``all`` lists each image of a file of several by itself.
        max_unreadable: images that may be missing or unreadable; ``None``: any number.
    """

    basedir: Path | None = None
    columns: ListColumns = STANDARD
    frames: Frames = "first"
    max_unreadable: int | None = None

    def load(
        self, source: Path, *, need_split: bool = False, reporter: Reporter = SILENT
    ) -> Manifest:
        """Read a list; see ``load_manifest``.

        Args:
            source: see there.
            need_split: see there.
            reporter: see there.
        """
        return load_manifest(
            source,
            basedir=self.basedir,
            columns=self.columns,
            need_split=need_split,
            max_missing=self.max_unreadable,
            frames=self.frames,
            reporter=reporter,
        )


DEFAULT_READING = Reading()
"""Filelists with the standard columns, of which any file may be unreadable."""
STRICT_READING = Reading(max_unreadable=0)


def load_manifest(
    source: Path,
    *,
    basedir: Path | None = None,
    columns: ListColumns = STANDARD,
    need_split: bool = True,
    max_missing: int | None = 0,
    frames: Frames = "first",
    reporter: Reporter = SILENT,
) -> Manifest:
    """Read and check a list of images.

    Args:
        source: CSV or Parquet with the columns ``path, id[, Split][, ds_name]`` (names in any
            case, others are ignored), or a folder: a subfolder is an identity with everything
            below it, and an image that lies in the folder itself is its own identity. Archives,
            arrays and tables of images (``sources``) count as folders. A ``.txt`` names an image a
            line, each its own identity.
        basedir: folder that relative paths start from; by default the filelist's folder.
        columns: what the filelist calls its columns; or of a source, its metadata.
        need_split: make an identity-disjoint split where there is none; otherwise the records'
            ``split`` stays ``None``.
        max_missing: listed files that may be missing, to be found unreadable later; ``None``: any
            number.
        frames: ``all`` lists each image of a file of several by itself, as ``scan.tif#3``, under
            the identity of the file.
        reporter: told of files of a folder that are no images.

    Raises:
        ManifestError: the list is unusable; the message holds every problem found, with counts.
    """
    with reporter.task(f"listing {source}"):
        manifest, problems = _load(
            Path(source),
            basedir,
            columns,
            need_split=need_split,
            max_missing=max_missing,
            frames=frames,
        )
    if problems:
        raise problems_error(manifest.source, problems)
    if manifest.left_out:
        reporter.warn(left_out_text(manifest.source, list(manifest.left_out)))
    return manifest


def inspect_manifest(
    source: Path, *, basedir: Path | None = None, columns: ListColumns = STANDARD
) -> tuple[Manifest | None, tuple[str, ...]]:
    """Read a list of images as ``load_manifest`` does, and return what is wrong with it.

    Returns:
        The list as it stands, problems and all, or ``None`` where it cannot be read; and the
        problems that ``load_manifest`` would raise.
    """
    try:
        return _load(Path(source), basedir, columns, need_split=True, max_missing=0, frames="first")
    except ManifestError as error:
        return None, error.problems


def _load(
    source: Path,
    basedir: Path | None,
    columns: ListColumns,
    *,
    need_split: bool,
    max_missing: int | None,
    frames: Frames,
) -> tuple[Manifest, tuple[str, ...]]:
    problems: list[str] = []
    left_out: list[str] = []
    shards = find_shards(source)
    if not shards:
        _check_exists(source)
    if shards:
        if basedir is not None:
            raise ManifestError(f"--basedir has no effect with {source}; leave it out")
        base = source if source.is_dir() else source.parent
        records = _read_sources(shards, base, columns)
    elif source.is_dir():
        if basedir is not None:
            raise ManifestError(
                f"--basedir has no effect with a folder ({source}); leave it out or pass a filelist"
            )
        if columns != STANDARD:
            raise ManifestError(
                f"{source} is a folder, which has no columns; leave --path-column and the like out"
            )
        base = source
        records, left_out = _read_folder(source)
    else:
        base = source.parent if basedir is None else Path(basedir)
        if not base.is_dir():
            raise ManifestError(f"--basedir: {_no_such(base, 'folder')}")
        if _is_text_list(source, columns):
            records, problems = _read_paths(source, base, max_missing=max_missing)
        else:
            records, problems = _read_filelist(source, base, columns, max_missing=max_missing)
    if frames == "all":
        records = _each_frame(records, base)
    if need_split and records and records[0].split is None:
        records = split_by_identity(records)
    manifest = Manifest(tuple(records), base, source, left_out=tuple(left_out))
    return manifest, tuple(problems)


def is_list(source: Path) -> bool:
    """Return whether a source is a filelist: no folder, archive or other source of images."""
    return source.is_file() and not find_shards(source)


def tells_identities(source: Path, records: Sequence[Record]) -> bool:
    """Return whether ids were given: by a filelist, or by subfolders and not by file names."""
    if is_list(source) and source.suffix.lower() != TEXT_SUFFIX:
        return True
    return any(record.id not in (record.path, inner_name(record.path)) for record in records)


def names_identities(source: Path, records: Sequence[Record]) -> bool:
    """Return whether ids come from columns, so that those of two sets can be compared."""
    if is_list(source):
        return source.suffix.lower() != TEXT_SUFFIX
    return any(
        record.id not in (record.path, inner_name(record.path).partition("/")[0])
        for record in records
    )


def is_filelist(path: Path) -> bool:
    """Return whether a file's name is that of a filelist."""
    suffix = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    return suffix.lower() in (".csv", TEXT_SUFFIX, *TAB_SUFFIXES, *PARQUET_SUFFIXES)


def split_by_identity(
    records: Sequence[Record],
    *,
    seed: int = 0,
    shares: tuple[float, float, float] = SPLIT_SHARES,
) -> list[Record]:
    """Assign TRAIN, VAL and TEST (60, 15 and 25 % of the identities) so that none is in two.

    Identities are drawn separately within each data set, and separately for identities with one
    image and with several. The draw depends on the seed and the ids only, not on their order.

    Args:
        records: images without a split (an existing one is replaced).
        seed: of the draw.
        shares: of the identities for each split.

    Returns:
        The records in the same order, with ``split`` set.
    """
    import numpy as np

    counts = collections.Counter(record.identity for record in records)
    strata: dict[tuple[str, bool], list[str]] = collections.defaultdict(list)
    for (ds_name, name), count in counts.items():
        strata[ds_name, count > 1].append(name)
    assigned: dict[tuple[str, str], str] = {}
    for (ds_name, several), names in strata.items():
        names.sort()
        key = hashlib.sha256(_encode(f"{seed}\0{ds_name}\0{several}")).digest()[:16]
        order = np.random.default_rng(int.from_bytes(key, "little")).permutation(len(names))
        sizes = _split_sizes(len(names), shares)
        labels = itertools.chain.from_iterable(
            itertools.repeat(split, size) for split, size in zip(SPLITS, sizes, strict=True)
        )
        for position, split in zip(order, labels, strict=True):
            assigned[ds_name, names[position]] = split
    return [record._replace(split=assigned[record.identity]) for record in records]


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest as CSV, or as Parquet where the name ends so; atomically.

    The columns Split and ds_name are written only where some record has them.

    Raises:
        InputError: a Parquet file cannot hold a path that is not UTF-8.
    """
    columns = list(COLUMNS.required)
    if any(record.split is not None for record in manifest.records):
        columns.append("Split")
    if any(record.ds_name is not None for record in manifest.records):
        columns.append("ds_name")
    rows = (_row(record, columns) for record in manifest.records)
    if path.suffix.lower() in PARQUET_SUFFIXES:
        with atomic_path(path) as temporary:
            _write_parquet(temporary, columns, rows, target=path)
    else:
        write_csv(path, columns, rows)


def _row(record: Record, columns: Collection[str]) -> list[str]:
    row = [record.path, record.id]
    if "Split" in columns:
        row.append(record.split or "")
    if "ds_name" in columns:
        row.append(record.ds_name or "")
    return row


def _write_parquet(
    temporary: Path, columns: Sequence[str], rows: Iterable[Sequence[str]], *, target: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = list(zip(*rows, strict=True)) or [()] * len(columns)
    try:
        arrays = [pa.array(column, pa.string()) for column in values]
    except UnicodeEncodeError as error:
        raise InputError(
            f"{target}: Parquet text must be UTF-8, and {error.object!r} is not; write .csv instead"
        ) from None
    pq.write_table(pa.table(arrays, names=list(columns)), temporary)


def _split_sizes(count: int, shares: tuple[float, float, float]) -> tuple[int, int, int]:
    """Divide a number of identities by largest remainder; from 3 on, every split gets one."""
    quotas = [share * count for share in shares]
    sizes = [int(quota + 1e-9) for quota in quotas]
    by_remainder = sorted(range(3), key=lambda i: sizes[i] - quotas[i])
    for index in by_remainder[: count - sum(sizes)]:
        sizes[index] += 1
    if count >= 3:
        for index in range(3):
            if sizes[index] == 0 and shares[index]:
                sizes[index] += 1
                sizes[0] -= 1
    return sizes[0], sizes[1], sizes[2]


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _digest(records: Iterable[Record]) -> str:
    digest = hashlib.sha256()
    rows = iter(records)
    while part := list(itertools.islice(rows, 100_000)):
        cells = itertools.chain.from_iterable(part)
        digest.update(_encode("\0".join([cell or "" for cell in cells])) + b"\0")
    return digest.hexdigest()


def _no_such(path: Path, what: str) -> str:
    parent = path.absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    text = f"no such {what}: {path}; the nearest folder that exists is {parent}"
    try:
        close = nearest(path.name, os.listdir(parent)) if parent == path.absolute().parent else ""
    except OSError:
        close = ""
    return f"{text}; {close}" if close.startswith("did") else text


def _check_exists(source: Path) -> None:
    try:
        if source.exists():
            return
    except (OSError, ValueError) as error:  # a name that is too long, or holds NUL
        raise ManifestError(f"cannot look up {str(source)[:200]!r}: {error}") from None
    what = "file" if is_filelist(source) else "folder"
    raise ManifestError(_no_such(source, what))


def _read_folder(folder: Path) -> tuple[list[Record], list[str]]:
    scan = scan_folder(folder)
    if not scan.images:
        others = f" among its {len(scan.others):,} files" if scan.others else ""
        raise ManifestError(
            f"{folder}: no images{others}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}, and "
            "files of other names that begin as images do"
        )
    return [Record(path, path.partition("/")[0]) for path in scan.images], scan.others


def _read_sources(shards: Sequence[Path], base: Path, names: ListColumns) -> list[Record]:
    """List the images of archives and the like; ids as in a folder, or from their metadata."""
    if names.path is not None or names.sep is not None:
        raise ManifestError(f"{shards[0]}: --path-column and --sep have no effect; leave them out")
    records = []
    for shard in shards:
        source = open_source(shard)
        place = shard.relative_to(base).as_posix()
        for name in source.names:
            path = name_member(place, name)
            # Shards may number their images alike.
            own = path if len(shards) > 1 and "/" not in name else name.partition("/")[0]
            record = Record(path, own)
            records.append(record if names == STANDARD else _told(record, source, name, names))
    if not records:
        raise ManifestError(f"{shards[0]}: no images")
    return records


def _told(record: Record, source: Source, name: str, names: ListColumns) -> Record:
    """Return a record with what the metadata say under the given names."""
    known = source.metadata(name)
    wanted = {"id": names.id, "split": names.split, "ds_name": names.dataset}
    found: dict[str, str] = {}
    for field, column in wanted.items():
        if column is None:
            continue
        cell = known.get(column, "").strip()
        if cell.casefold() in MISSING:
            there = ", ".join(map(repr, known)) or "nothing"
            raise ManifestError(f"{record.path}: no {column!r} in its metadata, which hold {there}")
        found[field] = _split_name(cell) if field == "split" else cell
    if found.get("split", "TRAIN") not in SPLITS:
        raise ManifestError(f"{record.path}: unknown split {found['split']!r}")
    return record._replace(**found)


def _read_paths(
    source: Path, basedir: Path, *, max_missing: int | None
) -> tuple[list[Record], list[str]]:
    """Read a text with a path a line; each image is an identity of its own."""
    paths = [as_named(line, basedir) for line in read_lines(source, what="list of paths")]
    problems = check_paths(paths, source, basedir, max_missing=max_missing)
    return [Record(path, path) for path in paths], problems


def _is_text_list(source: Path, columns: ListColumns) -> bool:
    """Return whether a list has a path a line, and not the header of a CSV."""
    if source.suffix.lower() != TEXT_SUFFIX or columns != STANDARD:
        return False
    header = next(read_lines(source, what="list of paths"), "").casefold()
    return not {"path", "id"} <= {cell.strip() for cell in re.split("[,;\t|]", header)}


def _split_name(word: str) -> str:
    word = word.upper()
    return _SPLIT_NAMES.get(word, word)


def _each_frame(records: Sequence[Record], basedir: Path) -> list[Record]:
    """List each image of a file of several; one that is named with its number stays alone."""

    def frames(record: Record) -> list[int]:
        path = basedir / record.path
        return list_frames(path) if split_frame(path)[0] == path else [0]

    with ThreadPoolExecutor(_OPENING_THREADS) as pool:
        found = list(pool.map(frames, records))
    return [
        record if len(numbers) == 1 else record._replace(path=name_frame(record.path, number))
        for record, numbers in zip(records, found, strict=True)
        for number in numbers
    ]


def _columns(names: ListColumns) -> Columns:
    """Return a filelist's columns under the names that the user gave."""
    own = {"path": names.path, "id": names.id, "Split": names.split, "ds_name": names.dataset}
    named = {name: given for name, given in own.items() if given is not None}
    return dataclasses.replace(COLUMNS, named=named, separator=names.separator)


def _read_filelist(
    source: Path, basedir: Path, names: ListColumns, *, max_missing: int | None
) -> tuple[list[Record], list[str]]:
    table = read_table(source, _columns(names))
    if not table.numbers:
        raise ManifestError(f"{source}: no images, only a header")
    cells = {name: list(column) for name, column in table.cells.items()}
    cells["path"] = [as_named(cell, basedir) for cell in cells["path"]]
    for name in ("id", "ds_name"):
        if name in cells:
            cells[name] = [cell.strip() for cell in cells[name]]
    if "Split" in cells:
        cells["Split"] = [_split_name(cell.strip()) for cell in cells["Split"]]
    blank: Sequence[None] = [None] * len(table.numbers)
    columns = (cells["path"], cells["id"], cells.get("Split", blank), cells.get("ds_name", blank))
    records = [Record(*row) for row in zip(*columns, strict=True)]
    problems = _check_cells(table, cells)
    problems += check_identities(records) if "Split" in cells else []
    problems += check_paths(cells["path"], source, basedir, max_missing=max_missing)
    return records, problems


def _check_cells(table: Table, cells: dict[str, list[str]]) -> list[str]:
    problems = []
    for name, column in cells.items():
        missing = MISSING if name in ("id", "ds_name") else {""}
        empty = [i for i, cell in enumerate(column) if cell.strip().casefold() in missing]
        if empty:
            text = f"{len(empty):,} empty cell(s) in column '{name}': {table.at(empty)}"
            written = sorted({column[i] for i in empty} - {""})
            if written:
                text += f" ({some(map(repr, written))} names nothing)"
            if name == "id":
                text += "; an image of which nobody is known needs an id of its own, as its path"
            problems.append(text)
        broken = [i for i, cell in enumerate(column) if "\0" in cell]
        if broken:
            problems.append(
                f"{len(broken):,} cell(s) in column '{name}' hold a NUL character: "
                f"{table.at(broken)}"
            )
    unknown = collections.Counter(
        split for split in cells.get("Split", ()) if split and split not in SPLITS
    )
    for split, count in itertools.islice(unknown.most_common(), _SHOWN):
        problems.append(
            f"unknown Split {split[:80]!r} in {count:,} row(s); {nearest(split, SPLITS)}"
        )
    if len(unknown) > _SHOWN:
        problems.append(f"{len(unknown) - _SHOWN:,} more unknown Splits")
    return problems


def check_identities(records: Sequence[Record]) -> list[str]:
    """Return as a problem the identities that are in more than one split."""
    first: dict[tuple[str, str], str | None] = {}
    mixed: dict[tuple[str, str], set[str]] = {}
    for record in records:
        if first.setdefault(record.identity, record.split) != record.split:
            splits = mixed.setdefault(record.identity, {str(first[record.identity])})
            splits.add(str(record.split))
    if not mixed:
        return []
    shown = [
        f"'{name}'{f' of {ds_name}' if ds_name else ''} in {' and '.join(sorted(splits))}"
        for (ds_name, name), splits in mixed.items()
    ]
    return [f"{len(mixed):,} identities in more than one split: {some(shown)}"]
