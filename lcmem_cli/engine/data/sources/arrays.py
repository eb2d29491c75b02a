"""Images in numpy files, ``.npy`` and ``.npz``: ``[N, H, W, C]``, read one image at a time.

Nothing of a file is run: an array of Python objects, which only unpickling could read, is refused.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lcmem_cli.engine.data.sources.access import RAW_BITS, Access, Inflated, Plain
from lcmem_cli.engine.data.sources.base import SourceError, check_size, numbered
from lcmem_cli.engine.errors import ManifestError

_LOCAL_HEADER = struct.Struct("<26xHH")
"""The lengths of the name and of the extra field, behind which a zip member's data begin."""
_LONGEST_HEADER = 1 << 16
_CIFAR_ROW = 1 + 3 * 32 * 32
_LOOKED_AT = 64
"""Images by which the range of floating-point values is told."""
_MAX_LABEL_BYTES = 256 << 20
_SAVED = "write it with numpy.savez(path, images)"


class _Array(NamedTuple):
    """An array in a file: what its header says, and where its values are."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    access: Access
    start: int


class ArrayFile:
    """A numpy file of images; in an ``.npz`` the one array of four dimensions.

    A one-dimensional array of as many values beside it, such as ``arr_1``, holds labels.

    Args:
        path: the file.

    Raises:
        ManifestError: it holds no such array, or several, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            arrays = _arrays(path)
        except (ValueError, EOFError, zipfile.BadZipFile, SourceError, struct.error) as error:
            raise ManifestError(f"{path}: not a readable numpy file ({error})") from error
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        images = [array for array in arrays.values() if len(array.shape) == 4]
        if len(images) != 1:
            raise ManifestError(
                f"{path}: expected one array of images [N, H, W, C]; it holds {shapes or 'nothing'}"
            )
        self._array = images[0]
        count, *_, channels = self._array.shape
        if channels not in (1, 3, 4) or not min(self._array.shape):
            raise ManifestError(
                f"{path}: expected [N, H, W, C] with 1, 3 or 4 channels, not {shapes}"
            )
        if self._array.dtype != np.uint8 and self._array.dtype.kind != "f":
            raise ManifestError(
                f"{path}: values of {self._array.dtype}; expected uint8, or floating point in "
                "[0, 1] or [-1, 1]"
            )
        self._names = numbered(count)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._labels = _labels(arrays, count)
        self._range = _range(path, self._pixels, count, self._array.dtype)

    @property
    def names(self) -> Sequence[str]:
        """The numbers of the images."""
        return self._names

    def read(self, name: str) -> bytes:
        """Return an image, encoded without loss; see ``Source``."""
        pixels = self._pixels(self._numbers[name])
        if self._range is None:
            return encoded(pixels)
        return encoded(to_bytes(pixels, self._range))

    def metadata(self, name: str) -> Mapping[str, str]:
        """Return the label."""
        number = self._numbers[name]
        return {} if self._labels is None else {"label": str(self._labels[number])}

    def _pixels(self, number: int) -> NDArray[Any]:
        shape, dtype = self._array.shape[1:], self._array.dtype
        num_bytes = math.prod(shape) * dtype.itemsize
        check_size(num_bytes)
        data = self._array.access.read_at(self._array.start + number * num_bytes, num_bytes)
        if len(data) < num_bytes:
            raise SourceError("the file ends in the middle of it")
        return np.frombuffer(data, dtype).reshape(shape)


class CifarFile:
    """A batch of CIFAR-10's binary version: rows of a label and 32 x 32 RGB values by channel.

    Args:
        path: ``data_batch_1.bin`` and the like.

    Raises:
        ManifestError: its size is not that of whole rows.
    """

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        if size % _CIFAR_ROW or not size:
            raise ManifestError(
                f"{path}: {size:,} bytes, no multiple of {_CIFAR_ROW:,}: not a batch of CIFAR-10's "
                "binary version"
            )
        self._access = Plain(path)
        self._names = numbered(size // _CIFAR_ROW)

    @property
    def names(self) -> Sequence[str]:
        """The numbers of the rows."""
        return self._names

    def read(self, name: str) -> bytes:
        """Return an image, encoded without loss; see ``Source``."""
        values = np.frombuffer(self._row(name)[1:], np.uint8)
        return encoded(values.reshape(3, 32, 32).transpose(1, 2, 0))

    def metadata(self, name: str) -> Mapping[str, str]:
        """Return the label."""
        return {"label": str(self._row(name)[0])}

    def _row(self, name: str) -> bytes:
        row = self._access.read_at(int(name) * _CIFAR_ROW, _CIFAR_ROW)
        if len(row) < _CIFAR_ROW:
            raise KeyError(name)
        return row


def encoded(pixels: NDArray[np.uint8]) -> bytes:
    """Return ``[H, W, C]`` uint8 of 1, 3 or 4 channels as a file without loss, quickly made."""
    height, width, channels = pixels.shape
    if channels != 4:
        mark = b"P6" if channels == 3 else b"P5"
        return mark + b"\n%d %d\n255\n" % (width, height) + pixels.tobytes()
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "PNG", compress_level=0)
    return file.getvalue()


def to_bytes(pixels: NDArray[Any], value_range: tuple[float, float]) -> NDArray[np.uint8]:
    """Return floating-point values of a range as uint8, rounded to the nearest.

    Raises:
        SourceError: some are not finite.
    """
    low, high = value_range
    if not np.isfinite(pixels).all():
        raise SourceError("holds values that are not finite")
    scaled = (pixels.astype(np.float64) - low) * (255 / (high - low))
    rounded: NDArray[np.uint8] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return rounded


def _range(path: Path, pixels: Any, count: int, dtype: np.dtype[Any]) -> tuple[float, float] | None:
    """Return the range of floating-point values, told by some images; ``None`` for uint8."""
    if dtype == np.uint8:
        return None
    looked_at = range(0, count, max(1, count // _LOOKED_AT))
    ends = [(float(np.nanmin(p)), float(np.nanmax(p))) for p in map(pixels, looked_at)]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if low < -1.05 or high > 1.05:
        raise ManifestError(
            f"{path}: values from {low:g} to {high:g}; expected [0, 1] or [-1, 1], or uint8"
        )
    return (-1.0, 1.0) if low < 0 else (0.0, 1.0)


def _arrays(path: Path) -> dict[str, _Array]:
    if path.suffix.lower() == ".npy":
        return {path.stem: _read_header(Plain(path))}
    found = {}
    with zipfile.ZipFile(path) as packed:
        for info in packed.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename:
                continue
            lengths = _LOCAL_HEADER.unpack(Plain(path, info.header_offset).read_at(0, 30))
            start = info.header_offset + 30 + sum(lengths)
            if info.compress_type == zipfile.ZIP_STORED:
                found[name] = _read_header(Plain(path, start))
            elif info.compress_type == zipfile.ZIP_DEFLATED:
                found[name] = _read_header(Inflated(path, RAW_BITS, start))
            else:
                raise ValueError(f"{info.filename} is compressed otherwise; {_SAVED}")
    return found


def _read_header(access: Access) -> _Array:
    file = io.BytesIO(access.read_at(0, _LONGEST_HEADER))
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"an array of Python objects, which is not read; {_SAVED}")
    if is_fortran and len(shape) > 1:
        raise ValueError(f"an array in Fortran's order; {_SAVED}")
    return _Array(shape, dtype, access, file.tell())


def _labels(arrays: Mapping[str, _Array], count: int) -> NDArray[Any] | None:
    for array in arrays.values():
        num_bytes = math.prod(array.shape) * array.dtype.itemsize
        if array.shape in ((count,), (count, 1)) and num_bytes <= _MAX_LABEL_BYTES:
            data = array.access.read_at(array.start, num_bytes)
            return np.frombuffer(data, array.dtype).reshape(count)
    return None
