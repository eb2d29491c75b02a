"""Tables that users write, CSV or Parquet: filelists and lists of pairs, read by one set of rules.

Column names are taken in any case and with spaces around them; other columns are ignored. A byte
order mark is skipped; text must be UTF-8, but a name may hold bytes that are not. A row with
another number of cells than the header is refused with its line.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcmem_cli.engine.data.formats import IMAGE_SUFFIXES
from lcmem_cli.engine.errors import ManifestError, nearest
from lcmem_cli.engine.files import unguarded

PARQUET_SUFFIXES = (".parquet", ".pq")
MAX_BYTES = 2 * 2**30
PAIR_COLUMNS = ("path_a", "path_b")
_SHOWN = 5
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns a kind of table has.

    Attributes:
        what: the kind of table, in messages.
        required: names that must be there.
        optional: names that may be.
    """

    what: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.required, *self.optional)


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
        return _read_csv(source, mark, columns)
    except OSError as error:
        raise ManifestError(f"{source}: cannot be read ({error.strerror or error})") from error


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


def _read_csv(source: Path, mark: bytes, columns: Columns) -> Table:
    if source.suffix.lower() in IMAGE_SUFFIXES:
        raise ManifestError(f"{source}: this is an image; expected a CSV or Parquet {columns.what}")
    if mark[:2] in _UTF_16_MARKS or b"\0" in mark:
        raise ManifestError(f"{source}: encoded as UTF-16; save it as CSV in UTF-8")
    rows: list[Sequence[str]] = []
    numbers: list[int] = []
    uneven: list[str] = []
    with source.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
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
    places = _find(source, header, columns)
    cells = {name: [row[place] for row in rows] for name, place in places.items()}
    return Table(cells=cells, lines="line", numbers=numbers)


def _read_parquet(source: Path, columns: Columns) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

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


def _find(source: Path, header: Sequence[str], columns: Columns) -> dict[str, int]:
    """Return the place of each known column.

    Raises:
        ManifestError: one is missing, occurs twice, or seems to be misspelt.
    """
    plain = [column.strip().casefold() for column in header]
    known = {name.casefold(): name for name in columns.names}
    problems = [
        f"column '{known[name]}' occurs {count} times"
        for name, count in collections.Counter(plain).items()
        if count > 1 and name in known
    ]
    missing = [name for name in columns.names if name.casefold() not in plain]
    required = [name for name in missing if name in columns.required]
    for name in required:
        found = ", ".join(repr(column) for column in header[:20]) or "nothing"
        problems.append(f"no column '{name}' in the first line; it holds {found[:300]}")
    if required and len(header) == 1 and (marks := [m for m in ";\t|" if m in header[0]]):
        problems.append(f"cells seem to be separated by {marks[0]!r}; expected ','")
    for column, name in zip(header, plain, strict=True):
        guess = "" if name in known else nearest(name, [each.casefold() for each in missing])
        if guess.startswith("did"):
            problems.append(f"column {column[:80]!r} is not known; {guess}")
    if problems:
        raise problems_error(source, problems)
    return {known[name]: place for place, name in enumerate(plain) if name in known}


def problems_error(source: Path, problems: Sequence[str]) -> ManifestError:
    """Return an error that holds every problem of a table."""
    lines = "\n".join(f"  {problem}" for problem in problems)
    return ManifestError(f"{source}: {len(problems)} problem(s)\n{lines}", problems)


def some(texts: Iterable[str]) -> str:
    """Return the first few texts, and an ellipsis if there are more."""
    shown = [text[:200] for text in itertools.islice(texts, _SHOWN + 1)]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
