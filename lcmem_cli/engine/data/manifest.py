"""Lists of images: read from CSV, Parquet or a folder, checked in one pass, split by identity."""

from __future__ import annotations

import collections
import csv
import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lcmem_cli.engine.data.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES, begins_as_image
from lcmem_cli.engine.errors import InputError, ManifestError, nearest
from lcmem_cli.engine.files import atomic_path, unguarded, write_csv
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result

SPLITS = ("TRAIN", "VAL", "TEST")
SPLIT_SHARES = (0.60, 0.15, 0.25)
COLUMNS = ("path", "id", "Split", "ds_name")
REQUIRED_COLUMNS = ("path", "id")
PARQUET_SUFFIXES = (".parquet", ".pq")
MAX_BYTES = 2 * 2**30
_SHOWN = 5


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
    """

    records: tuple[Record, ...]
    basedir: Path
    source: Path
    digest: str = ""

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


def load_manifest(
    source: Path,
    *,
    basedir: Path | None = None,
    need_split: bool = True,
    max_missing: int | None = 0,
) -> Manifest:
    """Read and check a list of images.

    Args:
        source: CSV or Parquet with the columns ``path, id[, Split][, ds_name]`` (names in any
            case, others are ignored), or a folder: a subfolder is an identity with everything
            below it, and an image that lies in the folder itself is its own identity.
        basedir: folder that relative paths start from; by default the filelist's folder.
        need_split: make an identity-disjoint split where there is none; otherwise the records'
            ``split`` stays ``None``.
        max_missing: listed files that may be missing, to be found unreadable later; ``None``: any
            number.

    Raises:
        ManifestError: the list is unusable; the message holds every problem found, with counts.
    """
    manifest, problems = _load(
        Path(source), basedir, need_split=need_split, max_missing=max_missing
    )
    if problems:
        raise _manifest_error(manifest.source, problems)
    return manifest


def inspect_manifest(
    source: Path, *, basedir: Path | None = None
) -> tuple[Manifest | None, tuple[str, ...]]:
    """Read a list of images as ``load_manifest`` does, and return what is wrong with it.

    Returns:
        The list as it stands, problems and all, or ``None`` where it cannot be read; and the
        problems that ``load_manifest`` would raise.
    """
    try:
        return _load(Path(source), basedir, need_split=True, max_missing=0)
    except ManifestError as error:
        return None, error.problems


def _load(
    source: Path,
    basedir: Path | None,
    *,
    need_split: bool,
    max_missing: int | None,
) -> tuple[Manifest, tuple[str, ...]]:
    problems: list[str] = []
    _check_exists(source)
    if source.is_dir():
        if basedir is not None:
            raise ManifestError(
                f"--basedir has no effect with a folder ({source}); leave it out or pass a filelist"
            )
        base = source
        records = _scan_folder(source)
    else:
        base = source.parent if basedir is None else Path(basedir)
        if not base.is_dir():
            raise ManifestError(f"--basedir: {_no_such(base, 'folder')}")
        records, problems = _read_filelist(source, base, max_missing=max_missing)
    if need_split and records and records[0].split is None:
        records = split_by_identity(records)
    return Manifest(tuple(records), base, source), tuple(problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSize:
    """How many images and identities a split has."""

    images: int
    identities: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilelistResult(Result):
    """A filelist that was written.

    Attributes:
        output: the file.
        basedir: folder that its paths are relative to.
        kept_split: whether the source had a split, which was kept.
        splits: size of ``TRAIN``, ``VAL`` and ``TEST``.
    """

    output: str
    basedir: str
    kept_split: bool
    splits: dict[str, SplitSize]


def make_filelist(
    source: Path,
    output: Path,
    *,
    basedir: Path | None = None,
    id_regex: str | None = None,
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> FilelistResult:
    """Write the filelist of a folder, or of a list without a split, with a split by identity.

    Args:
        source: see ``load_manifest``.
        output: CSV or Parquet file to write.
        basedir: see ``load_manifest``.
        id_regex: regular expression that is searched for in each path; the first of its groups that
            is found, or all of it where it has none, is the identity.
        seed: of the split.
        reporter: warned of what the split cannot keep apart.

    Raises:
        InputError: the expression does not fit, or would change the identities of a given split.
        ManifestError: see ``load_manifest``.
    """
    listed = load_manifest(source, basedir=basedir, need_split=False)
    kept_split = listed.records[0].split is not None
    records = list(listed.records)
    if id_regex is not None:
        if kept_split:
            raise InputError(f"--id-regex: {source} has a split, made for the ids that it lists")
        records = _named_by(records, id_regex)
    if not kept_split:
        records = split_by_identity(records, seed=seed)
    manifest = Manifest(tuple(records), listed.basedir, listed.source)
    write_manifest(manifest, output)
    if id_regex is None and len(records) > 1 and not tells_identities(source, records):
        reporter.warn(
            "every image counts as an identity of its own, so pictures of one person or object may "
            "be in several splits; put those of each into a folder, or tell them by --id-regex"
        )
    splits = {}
    for name in SPLITS:
        part = manifest.select(name).records
        splits[name] = SplitSize(images=len(part), identities=len({r.identity for r in part}))
    empty = [name for name, size in splits.items() if not size.images]
    if empty:
        reporter.warn(f"no image in {' and '.join(empty)}: too few identities to split")
    return FilelistResult(
        output=str(output), basedir=str(manifest.basedir), kept_split=kept_split, splits=splits
    )


def _named_by(records: Sequence[Record], id_regex: str) -> list[Record]:
    try:
        pattern = re.compile(id_regex)
    except re.error as error:
        raise InputError(f"--id-regex {id_regex!r} is no regular expression: {error}") from None
    named = []
    for record in records:
        found = pattern.search(record.path)
        groups = (found.groups() or (found[0],)) if found else ()
        name = next(filter(None, groups), None)
        if name is None:
            raise InputError(f"--id-regex {id_regex!r} finds no id in {record.path!r}")
        named.append(record._replace(id=name))
    return named


def tells_identities(source: Path, records: Sequence[Record]) -> bool:
    """Return whether ids were given: by a filelist, or by subfolders and not by file names."""
    return source.is_file() or any("/" in record.path for record in records)


def is_filelist(path: Path) -> bool:
    """Return whether a file's name is that of a filelist."""
    return path.suffix.lower() in (".csv", *PARQUET_SUFFIXES)


def split_by_identity(records: Sequence[Record], *, seed: int = 0) -> list[Record]:
    """Assign TRAIN, VAL and TEST (60, 15 and 25 % of the identities) so that none is in two.

    Identities are drawn separately within each data set, and separately for identities with one
    image and with several. The draw depends on the seed and the ids only, not on their order.

    Args:
        records: images without a split (an existing one is replaced).
        seed: of the draw.

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
        sizes = _split_sizes(len(names))
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
    columns = list(REQUIRED_COLUMNS)
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


def _split_sizes(count: int) -> tuple[int, int, int]:
    """Divide a number of identities by largest remainder; from 3 on, every split gets one."""
    quotas = [share * count for share in SPLIT_SHARES]
    sizes = [int(quota + 1e-9) for quota in quotas]
    by_remainder = sorted(range(3), key=lambda i: sizes[i] - quotas[i])
    for index in by_remainder[: count - sum(sizes)]:
        sizes[index] += 1
    if count >= 3:
        for index in range(3):
            if sizes[index] == 0:
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


def _scan_folder(folder: Path) -> list[Record]:
    """List the images of a folder tree; hidden files and folders are left out."""
    records: list[Record] = []
    unreadable: list[str] = []
    num_others = 0
    seen: set[str] = set()
    walk = os.walk(
        folder, followlinks=True, onerror=lambda error: unreadable.append(str(error.filename))
    )
    for parent, folders, files in walk:
        real = os.path.realpath(parent)
        if real in seen:  # a link back up the tree
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if _is_listed(name))
        relative = os.path.relpath(parent, folder)
        for name in files:
            if not _is_listed(name):
                continue
            if not _is_image(parent, name):
                num_others += 1
                continue
            path = name if relative == os.curdir else f"{relative}{os.sep}{name}"
            path = path.replace(os.sep, "/")
            records.append(Record(path, path.partition("/")[0]))
    if unreadable:
        raise ManifestError(f"{folder}: cannot list {_named('folder', unreadable)}")
    if not records:
        others = f" among its {num_others:,} files" if num_others else ""
        raise ManifestError(
            f"{folder}: no images{others}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}, and "
            "images without a suffix"
        )
    return sorted(records, key=lambda record: _encode(record.path))


def _is_image(parent: str, name: str) -> bool:
    """Tell images by their suffix, and files without one, as of DICOM, by how they begin."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES or suffix in UNREAD_SUFFIXES:
        return True
    # The last number of a UID looks like a suffix; a DICOMDIR lists the images beside it.
    if (suffix and not suffix[1:].isdigit()) or name.upper() == "DICOMDIR":
        return False
    path = Path(parent, name)
    try:
        return path.is_file() and begins_as_image(path)
    except OSError:
        return False


def _is_listed(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _read_filelist(
    source: Path, basedir: Path, *, max_missing: int | None
) -> tuple[list[Record], list[str]]:
    if not source.is_file():
        raise ManifestError(f"{source}: neither a folder nor a regular file")
    table = _read_table(source)
    problems = _check_columns(table.header)
    columns = {name: _find(table.header, name) for name in COLUMNS}
    if problems:
        raise _manifest_error(source, problems)
    if not table.rows:
        raise ManifestError(f"{source}: no images, only a header")
    cells = {
        name: [row[index] for row in table.rows]
        for name, index in columns.items()
        if index is not None
    }
    if "Split" in cells:
        cells["Split"] = [cell.strip().upper() for cell in cells["Split"]]
    blank: Sequence[None] = [None] * len(table.rows)
    records = [
        Record(*row)
        for row in zip(
            cells["path"],
            cells["id"],
            cells.get("Split", blank),
            cells.get("ds_name", blank),
            strict=True,
        )
    ]
    problems = _check_cells(table, cells)
    problems += _check_identities(records) if "Split" in cells else []
    problems += _check_paths(records, source, basedir, max_missing=max_missing)
    return records, problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Table:
    """The cells of a filelist as text.

    Attributes:
        header: column names.
        rows: cells, as many in each row as there are columns.
        lines: what a row is called in messages: ``line`` of a CSV, or ``row`` of a Parquet file.
        numbers: the number of each row's line.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: str
    numbers: Sequence[int]


def _read_table(source: Path) -> _Table:
    try:
        with source.open("rb") as file:
            magic = file.read(4)
        size = source.stat().st_size
        if size > MAX_BYTES:
            raise ManifestError(
                f"{source}: {size:,} bytes, more than the limit of {MAX_BYTES:,} for a filelist; "
                "split it"
            )
        if magic == b"PAR1" or source.suffix.lower() in PARQUET_SUFFIXES:
            return _read_parquet(source)
        return _read_csv(source, magic)
    except OSError as error:
        raise ManifestError(f"{source}: cannot be read ({error.strerror or error})") from error


def _read_csv(source: Path, magic: bytes) -> _Table:
    if source.suffix.lower() in IMAGE_SUFFIXES:
        raise ManifestError(
            f"{source}: this is an image; expected a CSV or Parquet filelist, or a folder of images"
        )
    if magic[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ManifestError(f"{source}: encoded as UTF-16; save it as CSV in UTF-8")
    rows: list[Sequence[str]] = []
    numbers: list[int] = []
    with source.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            width = len(header)
            uneven: list[str] = []
            for row in reader:
                if len(row) == width:
                    rows.append([unguarded(cell) for cell in row])
                    numbers.append(reader.line_num)
                elif row:  # not a blank line
                    uneven.append(f"line {reader.line_num}: {len(row)} cells")
        except csv.Error as error:
            raise ManifestError(
                f"{source}, line {reader.line_num}: not valid CSV ({error}); "
                'write a quote inside a quoted cell twice ("")'
            ) from error
    if uneven:
        raise ManifestError(
            f"{source}: {len(uneven):,} line(s) with another number of cells than the header's "
            f"{width}: {_some(uneven)}; put a cell that holds a comma in quotes"
        )
    return _Table(header=header, rows=rows, lines="line", numbers=numbers)


def _unpacked_bytes(column: Any) -> int:
    """Return the bytes of a column's cells, each copy of a cell counted."""
    import pyarrow as pa
    import pyarrow.compute as pc

    total = 0
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type) and pa.types.is_string(chunk.type.value_type):
            lengths = pc.binary_length(chunk.dictionary).cast(pa.int64())
            total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
        else:
            total += chunk.nbytes
    return total


def _read_parquet(source: Path) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source)
        header = [str(name) for name in file.schema_arrow.names]
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        unpacked = sum(group.total_byte_size for group in groups)
        if unpacked > MAX_BYTES:
            raise ManifestError(
                f"{source}: {unpacked:,} bytes unpacked, more than the limit of {MAX_BYTES:,} for "
                "a filelist; split it"
            )
        used = [index for name in COLUMNS if (index := _find(header, name)) is not None]
        texts = [header[i] for i in used if pa.types.is_string(file.schema_arrow.types[i])]
        # A cell that is repeated is stored once, and stays so until its copies are counted.
        table = pq.ParquetFile(source, read_dictionary=texts).read([header[i] for i in used])
        unpacked = sum(_unpacked_bytes(column) for column in table.columns)
        if unpacked > MAX_BYTES:
            raise ManifestError(
                f"{source}: {unpacked:,} bytes unpacked, more than the limit of {MAX_BYTES:,} for "
                "a filelist; split it"
            )
        columns = [
            [_cell_text(value) for value in table.column(header[index]).to_pylist()]
            for index in used
        ]
    except (pa.ArrowException, ValueError, OverflowError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ManifestError(f"{source}: not a readable Parquet file ({reason})") from error
    names = [header[index] for index in used]
    # Names that are not used are kept in the header: one of them may be a misspelling.
    others = [name for index, name in enumerate(header) if index not in used]
    rows = [(*cells, *itertools.repeat("", len(others))) for cells in zip(*columns, strict=True)]
    return _Table(header=names + others, rows=rows, lines="row", numbers=range(1, len(rows) + 1))


def _cell_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return str(value)


def _find(header: Sequence[str], name: str) -> int | None:
    """Return the index of a column, whatever the case of its name."""
    for index, column in enumerate(header):
        if column.strip().casefold() == name.casefold():
            return index
    return None


def _check_columns(header: Sequence[str]) -> list[str]:
    plain = [column.strip().casefold() for column in header]
    known = {name.casefold(): name for name in COLUMNS}
    problems = [
        f"column '{known[name]}' occurs {count} times"
        for name, count in collections.Counter(plain).items()
        if count > 1 and name in known
    ]
    missing = [name for name in COLUMNS if name.casefold() not in plain]
    others = [column for column in header if column.strip().casefold() not in known]
    required = [name for name in missing if name in REQUIRED_COLUMNS]
    for name in required:
        found = ", ".join(repr(column) for column in header[:20]) or "nothing"
        problems.append(f"no column '{name}' in the first line; it holds {found[:300]}")
    if required and len(header) == 1 and (marks := [m for m in ";\t|" if m in header[0]]):
        problems.append(f"cells seem to be separated by {marks[0]!r}; expected ','")
    for column in others:
        guess = nearest(column.strip().casefold(), [name.casefold() for name in missing])
        if guess.startswith("did"):
            problems.append(f"column {column[:80]!r} is not known; {guess}")
    return problems


def _check_cells(table: _Table, cells: dict[str, list[str]]) -> list[str]:
    problems = []
    for name, column in cells.items():
        empty = [i for i, cell in enumerate(column) if not cell.strip()]
        if empty:
            problems.append(f"{len(empty):,} empty cell(s) in column '{name}': {_at(table, empty)}")
        broken = [i for i, cell in enumerate(column) if "\0" in cell]
        if broken:
            problems.append(
                f"{len(broken):,} cell(s) in column '{name}' hold a NUL character: "
                f"{_at(table, broken)}"
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


def _check_identities(records: Sequence[Record]) -> list[str]:
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
    return [f"{len(mixed):,} identities in more than one split: {_some(shown)}"]


def _check_paths(
    records: Sequence[Record], source: Path, basedir: Path, *, max_missing: int | None
) -> list[str]:
    paths = [_normalised(record.path) for record in records if _is_usable(record.path)]
    problems = []
    repeated = [path for path, count in collections.Counter(paths).items() if count > 1]
    if repeated:
        problems.append(f"{len(repeated):,} duplicate path(s): {_some(map(repr, repeated))}")
    listed = [record.path for record in records if _is_usable(record.path)]
    outside = paths_outside(listed, basedir)
    if outside:
        problems.append(
            f"{len(outside):,} path(s) leave the base folder {basedir}: "
            f"{_some(map(repr, outside))}; set --basedir to the folder that holds all images"
        )
    refused = set(outside)
    missing = _missing([path for path in listed if path not in refused], basedir)
    if max_missing is not None and len(missing) > max_missing:
        text = (
            f"{len(missing):,} of {len(records):,} file(s) missing under {basedir}: "
            f"{_some(map(repr, missing))}"
        )
        if basedir != source.parent and (source.parent / missing[0]).exists():
            text += f"; they are there relative to {source.parent}: leave out --basedir"
        elif len(missing) == len(records):
            text += "; set --basedir to the folder that the paths start from"
        problems.append(text)
    return problems


def _is_usable(path: str) -> bool:
    return bool(path.strip()) and "\0" not in path


def _normalised(path: str) -> str:
    """Return one spelling of a path; ``..`` is kept, because a link may stand before it."""
    if "//" not in path and "./" not in path and not path.endswith(("/", "/.")):
        return path
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return ("/" if path.startswith("/") else "") + "/".join(parts)


def paths_outside(paths: Iterable[str], basedir: Path) -> list[str]:
    """Return the paths that end outside of a folder.

    A link inside the folder may point anywhere: it was put there on purpose. What is refused is an
    absolute path, or a ``..``, by which the list itself leaves the folder.
    """
    suspects = [path for path in paths if os.path.isabs(path) or ".." in path]
    lexical, real = os.path.abspath(basedir), os.path.realpath(basedir)
    outside = []
    for path in suspects:
        if ".." in path.replace(os.sep, "/").split("/"):
            inside = _is_below(os.path.realpath(os.path.join(basedir, path)), real)
        elif os.path.isabs(path):
            inside = _is_below(path, lexical) or _is_below(os.path.realpath(path), real)
        else:
            inside = True
        if not inside:
            outside.append(path)
    return outside


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)


def _missing(paths: Iterable[str], basedir: Path) -> list[str]:
    """Return the paths without a file, listing each folder once instead of asking for each file."""
    by_folder: dict[str, list[str]] = collections.defaultdict(list)
    for path in paths:
        by_folder[os.path.dirname(path)].append(path)
    missing = []
    for folder, members in by_folder.items():
        try:
            present = set(os.listdir(os.path.join(basedir, folder)))
        except (OSError, ValueError):
            present = set()
        missing += [
            path
            for path in members
            if os.path.basename(path) not in present
            # Names may be compared without regard to case or Unicode form on this file system.
            and not os.path.exists(os.path.join(basedir, path))
        ]
    return missing


def _manifest_error(source: Path, problems: Sequence[str]) -> ManifestError:
    lines = "\n".join(f"  {problem}" for problem in problems)
    return ManifestError(f"{source}: {len(problems)} problem(s)\n{lines}", problems)


def _at(table: _Table, rows: Sequence[int]) -> str:
    return _some(f"{table.lines} {table.numbers[row]}" for row in rows[: _SHOWN + 1])


def _named(what: str, names: Sequence[str]) -> str:
    return f"{len(names):,} {what}(s): {_some(map(repr, names))}"


def _some(texts: Iterable[str]) -> str:
    """Return the first few texts, and an ellipsis if there are more."""
    shown = [text[:200] for text in itertools.islice(texts, _SHOWN + 1)]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
