"""Images in memory as a source, so that they go the way of files wherever files are taken."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lcmem_cli.engine.data.arrays import UNIT_RANGE, Images, ValueRange, iter_pictures
from lcmem_cli.engine.data.reading import open_image
from lcmem_cli.engine.data.sources.arrays import encoded
from lcmem_cli.engine.data.sources.base import numbered
from lcmem_cli.engine.data.sources.opened import mount, unmount
from lcmem_cli.engine.errors import InputError


class ImagesInMemory:
    """A source of images that lie in no file; see ``Source``.

    Args:
        images: see ``data.arrays``; of paths the files are read. All are held, as 8-bit pixels.
        names: of the images, such as ``patient-1/scan.png``; by default their numbers.
        value_range: black and white of floating-point values.

    Raises:
        InputError: names and images differ in number, or something is no image.
        UnreadableImageError: a path cannot be read.
    """

    def __init__(
        self,
        images: Images,
        *,
        names: Sequence[str] | None = None,
        value_range: ValueRange = UNIT_RANGE,
    ) -> None:
        files = [
            _bytes_of(picture) if isinstance(picture, Path) else encoded(np.asarray(picture))
            for picture in iter_pictures(images, value_range=value_range)
        ]
        if names is not None and len(names) != len(files):
            raise InputError(f"{len(names):,} names for {len(files):,} images; give one for each")
        self._names = numbered(len(files)) if names is None else [str(name) for name in names]
        self._files = dict(zip(self._names, files, strict=True))

    @property
    def names(self) -> Sequence[str]:
        """The names of all images."""
        return self._names

    def read(self, name: str) -> bytes:
        """Return an image as the bytes of a file."""
        return self._files[name]

    def metadata(self, name: str) -> Mapping[str, str]:
        """Return nothing: there is only the name."""
        return {}


def in_memory(
    images: Images,
    *,
    names: Sequence[str] | None = None,
    value_range: ValueRange = UNIT_RANGE,
    name: str = "images",
) -> Path:
    """Make images in memory known under a place that stands for them wherever a path is taken.

    They are held until the process ends. Where a function takes images themselves, that is simpler;
    this is for images with names, or that are used again.

    Args:
        images: PIL images, arrays, tensors, or an iterable of these, such as a DataLoader.
        names: of the images; by default their numbers. The first of several folders in a name is
            the identity.
        value_range: black and white of floating-point values, such as ``(-1, 1)``.
        name: what results call them together.

    Example:
        >>> place = in_memory(batch, value_range=(-1, 1), names=prompts)
        >>> result = audit(place, "training/", held_out="held-out/")
    """
    return mount(name, ImagesInMemory(images, names=names, value_range=value_range))


def _bytes_of(path: Path) -> bytes:
    with open_image(path) as file:
        return file.read()


def placed(
    source: str | Path | Images, name: str, value_range: ValueRange, stack: contextlib.ExitStack
) -> str | Path:
    """Return a path as it is, and a place for images in memory, which the stack forgets.

    Args:
        source: either.
        name: what results call the images.
        value_range: of the images.
        stack: forgets the place when it is closed.
    """
    if isinstance(source, (str, Path)):
        return source
    place = mount(name, ImagesInMemory(source, value_range=value_range))
    stack.callback(unmount, place)
    return place
