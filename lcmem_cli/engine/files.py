"""Writing files so that a reader never sees half of one, and locking folders."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lcmem_cli.engine.errors import FolderBusyError, InputError, LcmemError, WriteError

LOCK_NAME = ".lcmem.lock"
CSV_OPTIONS: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
"""How CSV files are opened: names that are not UTF-8 keep their bytes."""
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?", re.IGNORECASE)
_TEMPORARY = ".lcmem-"
_LITTLE_SPACE = 1 << 16
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def is_temporary(name: str) -> bool:
    """Return whether a file's name is one of ``atomic_path``, left by a killed process."""
    return name.startswith(_TEMPORARY) and name.endswith(".tmp")


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder and rename it to the target on success.

    The data is flushed to disk before the rename, so that after a crash the target is either
    the old file or the whole new one. On an exception the temporary file is removed.

    Args:
        target: the file to be written; its folder is made if missing.

    Raises:
        WriteError: it cannot be written; the message names it.
    """
    temporary: Path | None = None
    try:
        with naming_target(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(
                prefix=f"{_TEMPORARY}{target.name[:80]}.", suffix=".tmp", dir=target.parent
            )
            temporary = Path(name)
            os.close(handle)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(target)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def check_writable(target: Path, *, suffix: str = "") -> None:
    """Try to write beside a file that long work ends with, so that it fails at its start.

    Args:
        target: the file.
        suffix: that its name must have.

    Raises:
        InputError: its name has another.
        WriteError: nothing can be written there.
    """
    if not target.name.lower().endswith(suffix):
        raise InputError(f"{target}: expected a file name that ends in {suffix}")
    with naming_target(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass


@contextlib.contextmanager
def naming_target(target: Path) -> Iterator[None]:
    """Turn a failure to write into a ``WriteError`` that names the file.

    The system's own error names the temporary file or nothing at all, and the writers of torch
    and safetensors hide it behind errors of their own.

    Args:
        target: what is written inside; nothing else should be.
    """
    from safetensors import SafetensorError

    try:
        yield
    except LcmemError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _full(target) or str(error)
        raise WriteError(
            f"{target}: cannot be written ({reason}); put that right and run the same command "
            "again (a training with --resume): what was written before is whole"
        ) from error


def _full(target: Path) -> str:
    """Say so where the disk has no room left."""
    try:
        free = shutil.disk_usage(target.parent).free
    except OSError:
        return ""
    return os.strerror(errno.ENOSPC) if free < _LITTLE_SPACE else ""


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text atomically; characters that UTF-8 cannot hold are escaped."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV file atomically; names that are not UTF-8 keep their bytes."""
    with atomic_path(path) as temporary, temporary.open("w", **CSV_OPTIONS) as file:
        _write_csv_rows(file, itertools.chain([columns], rows))


def _write_csv_rows(file: TextIO, rows: Iterable[Sequence[str]]) -> None:
    """Write rows that any CSV reader reads back, also where a cell holds a carriage return.

    Before Python 3.13 the writer leaves such a cell unquoted, and readers end the row there.

    Args:
        file: opened with ``newline=""``.
        rows: cells as text.
    """
    plain = csv.writer(file, lineterminator="\n")
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        writer = quoted if any("\r" in cell for cell in row) else plain
        writer.writerow([guarded(cell) for cell in row])


def guarded(cell: str) -> str:
    """Return a cell of a CSV file that spreadsheets take for text, never for a formula.

    What would be a formula gets an apostrophe in front, as a person would write it there; numbers
    stay as they are. ``unguarded`` takes the apostrophe away.
    """
    is_formula = _FORMULA.match(cell) and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if is_formula else cell


def unguarded(cell: str) -> str:
    """Return what ``guarded`` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def jsonable(value: Any) -> Any:
    """Return a copy in which every number is valid JSON: NaN and infinities become ``None``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # numpy and torch scalars
        return jsonable(value.item())
    raise TypeError(f"not a JSON value: {type(value).__name__}")


def dump_json(value: Any) -> str:
    """Return indented JSON text with a final newline."""
    return json.dumps(jsonable(value), indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def write_json(target: Path, value: Any) -> None:
    """Write a JSON document atomically."""
    write_text(target, dump_json(value))


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder for one writer; a second lcmem process is refused at once.

    The lock is the operating system's and ends with the process, so a killed run leaves none. The
    temporary files that it may have left are removed.

    Raises:
        FolderBusyError: another process holds the folder.
        InputError: the folder cannot be made or written.
        WriteError: the disk is full.
    """
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK_NAME)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise FolderBusyError(
            f"{folder}: another lcmem process is writing here; wait for it or choose another folder"
        ) from None
    except OSError as error:
        kind = WriteError if error.errno in _NO_SPACE else InputError
        raise kind(f"{folder}: cannot write here ({error.strerror or error})") from error
    try:
        for pattern in (f"{_TEMPORARY}*.tmp", f"*/{_TEMPORARY}*.tmp"):
            for left in folder.glob(pattern):
                own = left.parent == folder or not (left.parent / LOCK_NAME).exists()
                if own:  # the writer of another folder may be at work
                    with contextlib.suppress(OSError):
                        left.unlink()
        yield
    finally:
        lock.release()


def seen_from(folder: Path, path: str | Path) -> str:
    """Return where a path is, seen from a folder, so that both can be moved together.

    Args:
        folder: a folder of results, which need not exist.
        path: a file or folder.

    Returns:
        A relative path, or the absolute one where the two share nothing but the root.
    """
    base, target = folder.resolve(), Path(path).resolve()
    if base.anchor != target.anchor or os.path.commonpath([base, target]) == base.anchor:
        return str(target)
    return os.path.relpath(target, base)


def found_from(folder: Path, path: str | Path) -> str:
    """Return the absolute path of what ``seen_from`` named."""
    return os.path.normpath(folder.resolve() / path)
