"""Tables with a column of images: Parquet, and Arrow files as Hugging Face's datasets keep them.

The column holds the bytes of files, or structures of ``bytes`` and ``path``. A row whose image is
only a path is not followed: the path is another machine's.
"""

from __future__ import annotations

import bisect
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcmem_cli.engine.data.sources.base import SourceError, check_size, is_safe, numbered
from lcmem_cli.engine.errors import ManifestError, first_line

_MAX_GROUP_BYTES = 1 << 30
_GROUPS_HELD = 3
_NAMES = ("image", "img", "jpg", "png", "pixel_values", "photo", "picture")
_FILELIST = {"path", "id"}


def image_column(schema: Any) -> str | None:
    """Return the column of images of an Arrow schema; ``None`` where it is a list of paths.

    Args:
        schema: a ``pyarrow.Schema``.
    """
    if {name.casefold() for name in schema.names} >= _FILELIST:
        return None
    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = told.get("info", {}).get("features", {})
    candidates = [field.name for field in schema if _holds_images(field.type)]
    for name in candidates:
        if isinstance(features.get(name), dict) and features[name].get("_type") == "Image":
            return str(name)
    named = [name for name in candidates if name.casefold() in _NAMES]
    return str([*named, *candidates][0]) if candidates else None


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


class _Rows:
    """What Parquet and Arrow files have in common: rows under names, read by number."""

    def __init__(self, path: Path, schema: Any, paths: Sequence[str | None] | None) -> None:
        column = image_column(schema)
        if column is None:
            raise ManifestError(f"{path}: no column of images among {', '.join(schema.names)}")
        self.path = path
        self.column = column
        self.others = [field.name for field in schema if not _holds_images(field.type)]
        self._paths = paths

    def _name(self, count: int) -> None:
        """Name the rows by the paths they were made of, where these name them all, else number."""
        paths = self._paths or ()
        usable = len(paths) == count and all(path and is_safe(path) for path in paths)
        if usable and len(set(paths)) == count:
            self._names = [str(path) for path in paths]
        else:
            self._names = numbered(count)
        self._numbers = {name: number for number, name in enumerate(self._names)}

    @property
    def names(self) -> Sequence[str]:
        """The paths that the rows were made of, or their numbers."""
        return self._names

    def read(self, name: str) -> bytes:
        """Return the image of a row; see ``Source``."""
        value = self._cell(self._numbers[name], self.column)
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            where = value.get("path") if isinstance(value, dict) else None
            only = f", only the path {where!r}, which is not followed" if where else ""
            raise SourceError(f"the row holds no image{only}")
        check_size(len(data))
        return data

    def metadata(self, name: str) -> Mapping[str, str]:
        """Return the other cells of a row."""
        row = self._numbers[name]
        return {column: str(self._cell(row, column)) for column in self.others}

    def _cell(self, row: int, column: str) -> Any:
        raise NotImplementedError


class ParquetFile(_Rows):
    """A Parquet file; of its row groups the last few are held.

    Raises:
        ManifestError: it is damaged, or a row group is too large to be held.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(path)
            schema, metadata = self._file.schema_arrow, self._file.metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            super().__init__(path, schema, None)
            kind = schema.field(self.column).type
            if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                column = self._file.read([f"{self.column}.path"]).column(self.column)
                self._paths = [(value or {}).get("path") for value in column.to_pylist()]
        except (pa.ArrowException, ValueError, KeyError) as error:
            raise ManifestError(f"{path}: not readable ({first_line(error)})") from error
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > _MAX_GROUP_BYTES:
            raise ManifestError(
                f"{path}: a row group of {largest:,} bytes, more than the limit of "
                f"{_MAX_GROUP_BYTES:,}; write it with smaller row groups"
            )
        self._starts = [0]
        for group in groups:
            self._starts.append(self._starts[-1] + group.num_rows)
        self._held: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._lock = threading.Lock()
        self._name(self._starts[-1])

    def _cell(self, row: int, column: str) -> Any:
        import pyarrow as pa

        group = bisect.bisect_right(self._starts, row) - 1
        with self._lock:
            if (group, column) not in self._held:
                try:
                    table = self._file.read_row_group(group, columns=[column])
                except (pa.ArrowException, OSError) as error:
                    raise SourceError(f"damaged in the table ({first_line(error)})") from None
                self._held[group, column] = table.column(column)
                while len(self._held) > _GROUPS_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end((group, column))
            cells = self._held[group, column]
        return cells[row - self._starts[group]].as_py()


class ArrowFile(_Rows):
    """An Arrow file, of the kind for streams or for files; the system reads what is asked for.

    Raises:
        ManifestError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            mapped = pa.memory_map(str(path))
            try:
                self._table = pa.ipc.open_stream(mapped).read_all()
            except pa.ArrowInvalid:
                self._table = pa.ipc.open_file(mapped).read_all()
            schema = self._table.schema
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ManifestError(
                f"{path}: not a readable Arrow file ({first_line(error)})"
            ) from error
        super().__init__(path, schema, None)
        column = self._table.column(self.column)
        if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
            self._paths = pc.struct_field(column, "path").to_pylist()
        self._name(self._table.num_rows)

    def _cell(self, row: int, column: str) -> Any:
        return self._table.column(column)[row].as_py()
