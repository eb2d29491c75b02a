"""Bytes at any place of a file, plain or compressed, for several threads at once."""

from __future__ import annotations

import bisect
import os
import threading
import zlib
from pathlib import Path
from typing import Any, Protocol

from lcmem_cli.engine.data.sources.base import SourceError

GZIP_BITS, RAW_BITS = 31, -15
"""The framing of a compressed stream, as zlib names it: of gzip, and of a member of a zip."""
GZIP_MARK = b"\x1f\x8b"
_BLOCK = 1 << 16
_MOST_POINTS = 256
_FIRST_SPACING = 1 << 20


class Access(Protocol):
    """Bytes by their place."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes from a place on; fewer where the end comes first.

        Raises:
            SourceError: they are damaged.
        """
        ...


class Plain:
    """The bytes of a file, from a place in it on.

    Args:
        path: the file.
        start: place that counts as 0.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self._file = path.open("rb")
        self._start = start
        self._lock = threading.Lock()

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes from a place on."""
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, self._start + offset)
        with self._lock:  # there is no pread on Windows
            self._file.seek(self._start + offset)
            return self._file.read(size)


class Inflated:
    """The unpacked bytes of a compressed stream, without unpacking it to memory or disk.

    Unpacking has to begin at the beginning. So the unpacker's state is kept at up to
    ``_MOST_POINTS`` places, 50 KB each, from which a later reading goes on: what is read costs
    unpacking from the last place before it. The places are spread over what has been read.

    Args:
        path: the file.
        bits: ``GZIP_BITS`` or ``RAW_BITS``.
        start: place in the file where the stream begins.
    """

    def __init__(self, path: Path, bits: int, start: int = 0) -> None:
        self._packed = Plain(path, start)
        self._bits = bits
        self._lock = threading.Lock()
        self._spacing = _FIRST_SPACING
        self._places = [0]
        self._states: list[tuple[int, Any]] = [(0, zlib.decompressobj(bits))]
        self._next: tuple[int, int, Any] = (0, 0, zlib.decompressobj(bits))

    def read_at(self, offset: int, size: int) -> bytes:
        """Return unpacked bytes from a place on; see ``Access``."""
        position, at, unpacker = self._state_before(offset)
        parts: list[bytes] = []
        try:
            while position < offset + size:
                block, at, unpacker = self._unpack(at, unpacker)
                if not block:
                    break
                if position + len(block) > offset:
                    parts.append(block[max(0, offset - position) : offset + size - position])
                position += len(block)
                self._keep(position, at, unpacker)
        except zlib.error as error:
            raise SourceError(f"damaged compressed data ({error})") from None
        with self._lock:
            self._next = (position, at, unpacker)
        return b"".join(parts)

    def _state_before(self, offset: int) -> tuple[int, int, Any]:
        """Return the nearest known state: unpacked place, packed place, a copy of the unpacker."""
        with self._lock:
            number = bisect.bisect_right(self._places, offset) - 1
            place, (at, unpacker) = self._places[number], self._states[number]
            if place < self._next[0] <= offset:  # to go on where the last reading ended
                place, at, unpacker = self._next
            return place, at, unpacker.copy()

    def _unpack(self, at: int, unpacker: Any) -> tuple[bytes, int, Any]:
        """Return the next unpacked bytes, at most ``_BLOCK``, and where the next ones begin."""
        while True:
            packed = unpacker.unconsumed_tail or self._packed.read_at(at, _BLOCK)
            if not unpacker.unconsumed_tail:
                at += len(packed)
            if unpacker.eof:
                following = unpacker.unused_data + packed
                if self._bits != GZIP_BITS or not following.startswith(GZIP_MARK):
                    return b"", at, unpacker
                # gzip files may be joined; what was read too much begins the next one.
                at -= len(following)
                unpacker = zlib.decompressobj(self._bits)
                continue
            if not packed:
                raise SourceError("compressed data end too early")
            block = unpacker.decompress(packed, _BLOCK)
            if block:
                return block, at, unpacker

    def _keep(self, position: int, at: int, unpacker: Any) -> None:
        with self._lock:
            if position < self._places[-1] + self._spacing or unpacker.eof:
                return
            self._places.append(position)
            self._states.append((at, unpacker.copy()))
            if len(self._places) > _MOST_POINTS:
                del self._places[1::2], self._states[1::2]
                self._spacing *= 2
