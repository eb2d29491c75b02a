"""Tables that users write, CSV or Parquet: filelists and lists of pairs, read by one set of rules.

Column names are taken in any case and with spaces around them; other columns are ignored. A byte
order mark is skipped; text must be UTF-8, but a name may hold bytes that are not. A row with
another number of cells than the header is refused with its line. A CSV may be compressed by gzip.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import difflib
import gzip
import io
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lcmem_cli.engine.data.formats import IMAGE_SUFFIXES
from lcmem_cli.engine.errors import InputError, ManifestError
from lcmem_cli.engine.files import unguarded

PARQUET_SUFFIXES = (".parquet", ".pq")
TAB_SUFFIXES = (".tsv", ".tab")
MAX_BYTES = 2 * 2**30
_MAX_LINE = 1 << 20
PAIR_COLUMNS = ("path_a", "path_b")
_SHOWN = 5
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_GZIP_MARK = b"\x1f\x8b"
_MISSPELT = 0.75
"""Likeness from which on an unknown column is a misspelt one; 'dx' is no misspelt 'id'."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListColumns:
    """What a filelist calls its columns, where it does not call them as ``manifest.COLUMNS`` does.

    Attributes:
        path: column of the image files.
        id: column of the identities.
        split: column of the split.
        dataset: column of the data set.
        sep: what separates the cells of a CSV, one character or ``tab``; by default a comma, and a
            tab in ``.tsv`` and ``.tab``.

    Raises:
        InputError: ``sep`` is no single character.
    """

    path: str | None = None
    id: str | None = None
    split: str | None = None
    dataset: str | None = None
    sep: str | None = None

    def __post_init__(self) -> None:
        """Check the separator."""
        if self.sep is not None and len(self.separator or "") != 1:
            raise InputError(f"--sep must be one character, or tab; not {self.sep!r}")

    @property
    def separator(self) -> str | None:
        """The character that separates cells; ``None`` where the file's name tells it."""
        return "\t" if self.sep in ("tab", "\\t") else self.sep


STANDARD = ListColumns()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns a kind of table has.

    Attributes:
        what: the kind of table, in messages.
        required: names that must be there.
        optional: names that may be.
        named: what this file calls some of them; those it must hold.
        options: the option that says what a file calls a column, in messages.
        separator: of a CSV's cells; ``None``: what its name tells.
    """

    what: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    named: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    separator: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.required, *self.optional)

    def in_file(self, name: str) -> str:
        """Return what the file calls a column."""
        return self.named.get(name, name)


PAIRS = Columns(what="list of pairs", required=PAIR_COLUMNS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The cells of the known columns as text.

    Attributes:
        cells: of each known column that is there.
        lines: what a row is called in messages: ``line`` of a CSV, or ``row`` of a Parquet file.
        numbers: the number of each row's line.
    """

    cells: Mapping[str, Sequence[str]]
    lines: str
    numbers: Sequence[int]

    def at(self, rows: Sequence[int]) -> str:
        """Return where rows stand in the file, the first few of them."""
        return some(f"{self.lines} {self.numbers[row]}" for row in rows[: _SHOWN + 1])


def read_table(source: Path, columns: Columns) -> Table:
    """Read a table.

    Args:
        source: CSV, or Parquet by its content or name.
        columns: what it may hold.

    Raises:
        ManifestError: it cannot be read, or a required column is missing; the message holds every
            problem found.
    """
    if not source.is_file():
        raise ManifestError(f"{source}: neither a folder nor a regular file")
    try:
        with source.open("rb") as file:
            mark = file.read(4)
        _check_size(source, source.stat().st_size, "bytes", columns)
        if mark == b"PAR1" or source.suffix.lower() in PARQUET_SUFFIXES:
            return _read_parquet(source, columns)
        with _opened_csv(source, mark, columns) as file:
            return _read_csv(source, file, columns)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ManifestError(f"{source}: cannot be read ({reason})") from error


def read_header(source: Path, *, what: str) -> list[str]:
    """Return the names of a CSV's columns.

    Args:
        source: the file.
        what: the kind of table, in messages.

    Raises:
        ManifestError: see ``read_table``.
    """
    first = next(read_lines(source, what=what), "")
    return next(csv.reader([first], delimiter=_separator(source)), [])


def read_lines(source: Path, *, what: str) -> Iterator[str]:
    """Yield the lines of a text, perhaps compressed by gzip, that are not blank.

    Args:
        source: the file.
        what: what it is, in messages.

    Raises:
        ManifestError: it cannot be read, or is larger than a table may be.
    """
    columns = Columns(what=what, required=())
    try:
        _check_size(source, source.stat().st_size, "bytes", columns)
        with source.open("rb") as file:
            mark = file.read(4)
        with _opened_csv(source, mark, columns) as text:
            for line in _lines(source, text, columns):
                if line.strip():
                    yield line.rstrip("\r\n")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ManifestError(f"{source}: cannot be read ({reason})") from error


def read_pairs(path: Path) -> list[tuple[Path, Path]]:
    """Read ``path_a,path_b`` rows; relative paths start from the file's folder.

    Raises:
        ManifestError: see ``read_table``; or no row, or a row without one of the paths.
    """
    table = read_table(path, PAIRS)
    rows = list(zip(*(table.cells[name] for name in PAIR_COLUMNS), strict=True))
    empty = [number for number, row in enumerate(rows) if not all(cell.strip() for cell in row)]
    if empty:
        raise ManifestError(f"{path}, {table.at(empty)}: path_a or path_b is empty")
    if not rows:
        raise ManifestError(f"{path}: no pairs")
    folder = path.parent
    return [(folder / as_named(a, folder), folder / as_named(b, folder)) for a, b in rows]


def as_named(path: str, folder: Path) -> str:
    """Return a listed path, without the spaces around it where only so there is such a file."""
    plain = path.strip()
    if plain == path or (folder / path).exists() or not (folder / plain).exists():
        return path
    return plain


def _check_size(source: Path, num_bytes: int, unit: str, columns: Columns) -> None:
    if num_bytes > MAX_BYTES:
        raise ManifestError(
            f"{source}: {num_bytes:,} {unit}, more than the limit of {MAX_BYTES:,} for a "
            f"{columns.what}; split it"
        )


def _opened_csv(source: Path, mark: bytes, columns: Columns) -> TextIO:
    if source.suffix.lower() in IMAGE_SUFFIXES:
        raise ManifestError(f"{source}: this is an image; expected a CSV or Parquet {columns.what}")
    if mark[:2] == _GZIP_MARK:
        return io.TextIOWrapper(
            gzip.open(source), encoding="utf-8-sig", errors="surrogateescape", newline=""
        )
    if mark[:2] in _UTF_16_MARKS or b"\0" in mark:
        raise ManifestError(f"{source}: encoded as UTF-16; save it as CSV in UTF-8")
    return source.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _lines(source: Path, file: TextIO, columns: Columns) -> Iterator[str]:
    """Yield the lines of a text, which may be packed, so that nothing larger is ever held.

    Raises:
        ManifestError: it holds more than a table may.
    """
    num_bytes = 0
    while line := file.readline(_MAX_LINE):
        num_bytes += len(line)
        if len(line) == _MAX_LINE:
            raise ManifestError(f"{source}: a line of {_MAX_LINE:,} characters or more")
        _check_size(source, num_bytes, "characters", columns)
        yield line


def _separator(source: Path) -> str:
    """Return what separates cells, by a file's name."""
    return "\t" if source.suffix.lower() in TAB_SUFFIXES else ","


def _read_csv(source: Path, file: TextIO, columns: Columns) -> Table:
    separator = columns.separator or _separator(source)
    rows: list[Sequence[str]] = []
    numbers: list[int] = []
    uneven: list[str] = []
    reader = csv.reader(_lines(source, file, columns), delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        for row in reader:
            if len(row) == len(header):
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
            f"{len(header)}: {some(uneven)}; put a cell that holds a comma in quotes"
        )
    places = _find(source, header, columns, separator)
    cells = {name: [row[place] for row in rows] for name, place in places.items()}
    return Table(cells=cells, lines="line", numbers=numbers)


def _read_parquet(source: Path, columns: Columns) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if columns.separator is not None:
        raise ManifestError(f"{source}: --sep has no effect on a Parquet file; leave it out")
    unit = "bytes unpacked"
    try:
        file = pq.ParquetFile(source)
        header = [str(name) for name in file.schema_arrow.names]
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        _check_size(source, sum(group.total_byte_size for group in groups), unit, columns)
        places = _find(source, header, columns)
        used = {name: header[place] for name, place in places.items()}
        types = dict(zip(header, file.schema_arrow.types, strict=True))
        texts = [column for column in used.values() if pa.types.is_string(types[column])]
        # A cell that is repeated is stored once, and stays so until its copies are counted.
        table = pq.ParquetFile(source, read_dictionary=texts).read(list(used.values()))
        _check_size(source, sum(map(_unpacked_bytes, table.columns)), unit, columns)
        cells = {
            name: [_cell_text(value) for value in table.column(column).to_pylist()]
            for name, column in used.items()
        }
    except (pa.ArrowException, ValueError, OverflowError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ManifestError(f"{source}: not a readable Parquet file ({reason})") from error
    return Table(cells=cells, lines="row", numbers=range(1, table.num_rows + 1))


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


def _cell_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return str(value)


def _find(
    source: Path, header: Sequence[str], columns: Columns, separator: str = ","
) -> dict[str, int]:
    """Return the place of each known column.

    Raises:
        ManifestError: one is missing, occurs twice, or seems to be misspelt.
    """
    plain = [column.strip().casefold() for column in header]
    sought = {name: columns.in_file(name).strip().casefold() for name in columns.names}
    counts = collections.Counter(plain)
    problems = [
        f"column '{columns.in_file(name)}' occurs {counts[found]} times"
        for name, found in sought.items()
        if counts[found] > 1
    ]
    missing = [name for name, found in sought.items() if not counts[found]]
    needed = [name for name in missing if name in columns.required or name in columns.named]
    for name in needed:
        held = ", ".join(repr(column) for column in header[:20]) or "nothing"
        text = f"no column '{columns.in_file(name)}' in the first line; it holds {held[:300]}"
        if name in columns.options and name not in columns.named:
            text += f"; name the one that is meant with {columns.options[name]}"
        problems.append(text)
    if needed and len(header) == 1:
        others = [mark for mark in ";\t|," if mark in header[0] and mark != separator]
        if others:
            problems.append(f"cells seem to be separated by {others[0]!r}; expected {separator!r}")
    guessed = [sought[name] for name in missing if name not in columns.named]
    for column, name in zip(header, plain, strict=True):
        if name not in sought.values():
            for guess in difflib.get_close_matches(name, guessed, n=1, cutoff=_MISSPELT):
                problems.append(f"column {column[:80]!r} is not known; did you mean '{guess}'?")
    if problems:
        raise problems_error(source, problems)
    return {name: plain.index(found) for name, found in sought.items() if counts[found]}


def problems_error(source: Path, problems: Sequence[str]) -> ManifestError:
    """Return an error that holds every problem of a table."""
    lines = "\n".join(f"  {problem}" for problem in problems)
    return ManifestError(f"{source}: {len(problems)} problem(s)\n{lines}", problems)


def some(texts: Iterable[str]) -> str:
    """Return the first few texts, and an ellipsis if there are more."""
    shown = [text[:200] for text in itertools.islice(texts, _SHOWN + 1)]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
