"""The bytes of an image: every read of them goes through ``open_image``.

An image is a file, or lies in a source such as an archive (``sources``); nothing else needs to
know.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lcmem_cli.engine.data.formats import HEAD_BYTES, NO_FORMAT, format_of
from lcmem_cli.engine.data.frames import split_frame
from lcmem_cli.engine.data.sources.opened import read_member
from lcmem_cli.engine.errors import UnreadableImageError
from lcmem_cli.engine.files import sha256_bytes

MAX_BYTES_AT_ONCE = 256 << 20
"""Larger files are not held in memory as a whole."""
EMPTY = "empty file"
_BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[BinaryIO]:
    """Open what holds an image, at its beginning.

    Args:
        path: its name, without the number of a frame.

    Yields:
        A file that can be read from any place.

    Raises:
        UnreadableImageError: missing, not permitted, empty, a folder, or no regular file.
    """
    data = read_member(path)
    if data is not None:
        if not data:
            raise UnreadableImageError(path, EMPTY)
        yield io.BytesIO(data)
        return
    try:
        status = path.stat()  # before it is opened: to open a pipe would wait for ever
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableImageError(path, "is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImageError(path, "is not a regular file")
        if not status.st_size:
            raise UnreadableImageError(path, EMPTY)
        file = path.open("rb")
    except OSError as error:
        raise UnreadableImageError(path, why_unread(error, path)) from error
    with file:
        yield file


def read_bytes(path: Path, *, limit: int | None = MAX_BYTES_AT_ONCE) -> tuple[bytes | None, str]:
    """Read an image once, and return its bytes and the SHA-256 of these very bytes.

    A file may be replaced between two readings. What is kept under a content's hash has to be made
    of the bytes that were hashed, so they are read once for both. What is no image by its first
    bytes is not read to its end: it may be huge, or have no end, as some files of the system.

    Args:
        path: its name; with the number of a frame, the hash is of the bytes and the number.
        limit: bytes from which on they are hashed, but not returned; ``None``: none.

    Returns:
        The bytes, ``None`` for those of a larger file; and the SHA-256 in hexadecimal.

    Raises:
        UnreadableImageError: it cannot be read, or is no image.
    """
    name, frame = split_frame(path)
    digest = hashlib.sha256()
    blocks: list[bytes] | None = []
    num_bytes = 0
    try:
        with open_image(name) as file:
            block = file.read(_BLOCK_BYTES)
            if format_of(block[:HEAD_BYTES], name.suffix) is None:
                raise UnreadableImageError(path, NO_FORMAT)
            while block:
                digest.update(block)
                num_bytes += len(block)
                if limit is not None and num_bytes > limit:
                    blocks = None
                if blocks is not None:
                    blocks.append(block)
                block = file.read(_BLOCK_BYTES)
    except OSError as error:
        raise UnreadableImageError(path, why_unread(error, name)) from error
    data = None if blocks is None else blocks[0] if len(blocks) == 1 else b"".join(blocks)
    content = digest.hexdigest()
    return data, sha256_bytes(f"{content}#{frame + 1}".encode()) if frame else content


def content_hash(path: Path) -> str:
    """Return the hash that ``read_bytes`` gives, and hold none of the bytes."""
    return read_bytes(path, limit=0)[1]


def why_unread(error: OSError, path: Path) -> str:
    """Return in words why a file could not be read."""
    if isinstance(error, FileNotFoundError):
        odd = why_missing(path)
        return f"no such file; {odd}" if odd else "no such file"
    return (error.strerror or str(error) or type(error).__name__).lower()


def why_missing(path: Path) -> str:
    """Return what is odd about the name of a file that is not there; empty where nothing is."""
    if "\\" in str(path):
        return "the name holds backslashes, as Windows writes paths; write '/'"
    form = unicodedata.normalize("NFC", path.name)
    try:
        others = os.listdir(path.parent)
    except OSError:
        return ""
    if any(unicodedata.normalize("NFC", other) == form for other in others):
        return "the folder holds the same name in another Unicode normal form"
    return ""
