"""What a source of images is, and the rules that hold for every one of them."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lcmem_cli.engine.data.tables import some
from lcmem_cli.engine.errors import InputError, ManifestError

MEMBER = "::"
"""Stands between a source and an image in it, as in ``archive.zip::inner/name.png``."""
MAX_MEMBER_BYTES = 256 << 20
"""An image of a source is held in memory while it is decoded."""
NUMBER_DIGITS = 6


class Source(Protocol):
    """Images that lie together, each under a name; read in place, from several threads at once.

    To bring in images of another kind, such as pictures in memory, write a class with these three
    members and hand an object to ``opened.mount``: what ``mount`` returns can then be given
    wherever a path is taken.

    Attributes:
        names: of the images, in order, each once; a name may have folders, as in ``p1/x.png``, and
            then the first is the identity, as in a folder.
    """

    @property
    def names(self) -> Sequence[str]:
        """The names of all images."""
        ...

    def read(self, name: str) -> bytes:
        """Return an image as the bytes of a file, such as a PNG; equal images as equal bytes.

        Pixels in memory are encoded by ``arrays.encoded``.

        Raises:
            KeyError: there is no such image.
            SourceError: it is damaged or too large; the message says which.
        """
        ...

    def metadata(self, name: str) -> Mapping[str, str]:
        """Return what else is known of an image, by column; perhaps nothing."""
        ...


class SourceError(InputError):
    """One image of a source cannot be read; the others may be."""


def check_names(source: Path, names: Sequence[str]) -> None:
    """Refuse names that are not safe to write, or that name two images.

    Raises:
        ManifestError: there are such.
    """
    unsafe = [name for name in names if not is_safe(name)]
    if unsafe:
        raise ManifestError(
            f"{source}: {len(unsafe):,} name(s) lead out of the archive: "
            f"{some(map(repr, unsafe))}; it may be hostile, and is not read"
        )
    counts = collections.Counter(names)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise ManifestError(
            f"{source}: {len(repeated):,} name(s) stand for several images: "
            f"{some(map(repr, repeated))}; give each image a name of its own"
        )


def inner_name(path: str) -> str:
    """Return the name of an image within its source, if it lies in one."""
    return path.rpartition(MEMBER)[2]


def is_safe(name: str) -> bool:
    """Return whether a name, joined to a folder, stays below it on every system."""
    parts = name.split("/")
    return (
        bool(name)
        and not any(mark in name for mark in ("\\", "\0", MEMBER))
        and not any(part in ("", ".", "..") for part in parts)
        and ":" not in parts[0]
    )


def check_size(num_bytes: int) -> None:
    """Refuse an image that would take too much memory.

    Raises:
        SourceError: it would.
    """
    if num_bytes > MAX_MEMBER_BYTES:
        raise SourceError(f"{num_bytes:,} bytes, more than the limit of {MAX_MEMBER_BYTES:,}")


def numbered(count: int) -> list[str]:
    """Return names for images that have none: their numbers, counted from 0."""
    return [f"{number:0{NUMBER_DIGITS}d}" for number in range(count)]
