"""Formats that Pillow does not read, or not with all their bits, each by a library made for it.

Tried on the same files: Pillow drops the low byte of 16-bit colour, takes the planes of a planar
TIFF for one picture and wraps 32-bit and signed values. OpenCV reads most TIFFs right, but
returns what it could read of a damaged file and knows fewer kinds of compression. tifffile with
imagecodecs read all of them right and refuse what is damaged; both are released every few months
and are under the BSD licence.
"""

from __future__ import annotations

import dataclasses
import io
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lcmem_cli.engine.data.formats import HEIC, JPEG_2000, JPEG_XL
from lcmem_cli.engine.data.memory import room_for
from lcmem_cli.engine.data.pixels import from_image, from_values, scale_of
from lcmem_cli.engine.errors import UnreadableImageError, first_line

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

ORIENTATION_TAG = 0x0112
_PNG_MARK_BYTES = 8
_PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
"""By the type of colour: grey, RGB, and both with alpha."""
_TIFF_GREY, _TIFF_RGB, _TIFF_PALETTE, _TIFF_CMYK, _TIFF_YCBCR = (0, 1), 2, 3, 5, 6
_TIFF_WHITE_IS_ZERO = 0
_TIFF_JPEG = 7
_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA = 1, 2
_GAP = rb"(?:\s|#[^\n]*\n)+"
_PPM_HEADER = re.compile(rb"P6" + 3 * (_GAP + rb"(\d+)") + rb"\s")
"""Width, height and highest value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to read of a file.

    Attributes:
        path: for messages.
        frame: which of its images, counted from 0.
        size: side of the copy that will be made of it, see ``pixels.from_values``.
        max_pixels: more are refused.
    """

    path: Path
    frame: int
    size: int | None
    max_pixels: int

    def check(self, width: int, height: int) -> None:
        """Refuse an image without pixels, or with too many.

        Raises:
            UnreadableImageError: it is one.
        """
        if width < 1 or height < 1:
            raise UnreadableImageError(self.path, f"has no pixels ({width} x {height})")
        if width * height > self.max_pixels:
            raise UnreadableImageError(
                self.path,
                f"{width} x {height} pixels, more than the limit of {self.max_pixels:,}",
            )

    def check_frame(self, count: int) -> None:
        """Refuse the number of an image that the file does not have.

        Raises:
            UnreadableImageError: it has fewer.
        """
        if self.frame >= count:
            raise UnreadableImageError(
                self.path, f"has no image number {self.frame + 1}, but {count}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A decoded image of mode L or RGB, not turned upright.

    Attributes:
        image: the pixels.
        orientation: of EXIF.
        note: what had to be guessed of its depth.
        frames: images that the file holds.
    """

    image: Image.Image
    orientation: int | None = None
    note: str | None = None
    frames: int = 1


def read_tiff(file: BinaryIO, wanted: Wanted) -> Picture:
    """Decode a TIFF of any depth, sample format, layout and compression.

    Raises:
        UnreadableImageError: a kind without a meaning as a picture.
    """
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        wanted.check_frame(len(tiff.pages))
        page: Any = tiff.pages[wanted.frame]
        wanted.check(page.imagewidth, page.imagelength)
        _check_tiff(page, wanted.path)
        with room_for(page.nbytes):
            image, note = _tiff_image(page, wanted)
        orientation = page.tags.get(ORIENTATION_TAG)
        return Picture(
            image=image,
            orientation=None if orientation is None else int(orientation.value),
            note=note,
            frames=len(_whole_pages(tiff)),
        )


def tiff_frames(file: BinaryIO) -> list[int]:
    """Return the numbers of the pages of a TIFF that are no smaller copies of others."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        return _whole_pages(tiff)


def _whole_pages(tiff: TiffFile) -> list[int]:
    pages: Any = tiff.pages
    return [number for number, page in enumerate(pages) if not page.is_reduced]


def _check_tiff(page: TiffPage, path: Path) -> None:
    colours = page.samplesperpixel - len(page.extrasamples)
    expected = {_TIFF_RGB: 3, _TIFF_PALETTE: 1, _TIFF_CMYK: 4, _TIFF_YCBCR: 3}
    expected.update(dict.fromkeys(_TIFF_GREY, 1))
    kind = getattr(page.photometric, "name", page.photometric)
    is_alpha = page.extrasamples in ((), (_ASSOCIATED_ALPHA,), (_UNASSOCIATED_ALPHA,))
    is_read = (
        colours == expected.get(int(page.photometric))
        and (is_alpha or (page.photometric == _TIFF_RGB and len(page.extrasamples) == 1))
        and (page.photometric != _TIFF_YCBCR or page.compression == _TIFF_JPEG)
    )
    if not is_read or page.dtype is None or page.dtype.kind not in "buif" or page.imagedepth > 1:
        raise UnreadableImageError(
            path,
            f"a kind of TIFF that is not read ({kind}, {page.samplesperpixel} sample(s) of "
            f"{page.dtype or 'an unknown type'} a pixel)",
        )


def _tiff_image(page: TiffPage, wanted: Wanted) -> tuple[Image.Image, str | None]:
    values = np.asarray(page.asarray(maxworkers=1))
    if page.axes.startswith("S"):  # one plane per colour
        values = np.moveaxis(values, 0, -1)
    if page.photometric == _TIFF_PALETTE:
        table = np.asarray(page.colormap).T
        scale = scale_of(table)
        return from_values(scale.to_bytes(table)[values], size=wanted.size)[0], scale.note
    bits = page.bitspersample
    is_packed = values.dtype.kind == "u" and bits != 8 * values.dtype.itemsize
    limit = 2**bits - 1 if is_packed else None
    if page.photometric == _TIFF_CMYK:
        scale = scale_of(values[..., :4], limit=limit)
        ink = Image.fromarray(scale.to_bytes(values[..., :4]), mode="CMYK")
        return from_image(ink, size=wanted.size), scale.note
    extra = page.extrasamples[0] if page.extrasamples else 0
    has_alpha = extra in (_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA)
    if page.extrasamples:
        colours = page.samplesperpixel - len(page.extrasamples)
        values = values[..., : colours + has_alpha]
    if extra == _ASSOCIATED_ALPHA:
        values = _divided_by_alpha(values)
    return from_values(
        values,
        has_alpha=has_alpha,
        white_is_zero=page.photometric == _TIFF_WHITE_IS_ZERO,
        limit=limit,
        size=wanted.size,
    )


def _divided_by_alpha(values: NDArray[Any]) -> NDArray[Any]:
    """Undo the multiplication by alpha, which hides what colour thin parts have."""
    alpha = values[..., -1:]
    highest = float(alpha.max()) or 1.0
    colour = values[..., :-1] * (highest / np.maximum(alpha, np.finfo(np.float64).tiny))
    colour = np.where(alpha > 0, colour.clip(0, highest), 0)
    return np.concatenate([colour.astype(values.dtype), alpha], axis=-1)


def read_png(file: BinaryIO, wanted: Wanted) -> Picture:
    """Decode a PNG of 16 bits a channel."""
    import imagecodecs

    data = file.read()
    chunks = dict(png_chunks(data))
    width, height, _, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    wanted.check(width, height)
    wanted.check_frame(1)  # of an animation of 16 bits the first image is read
    exif = Image.Exif()
    if b"eXIf" in chunks:
        exif.load(b"Exif\0\0" + chunks[b"eXIf"])
    frames = int.from_bytes(chunks[b"acTL"][:4], "big") if b"acTL" in chunks else 1
    with room_for(2 * width * height * _PNG_CHANNELS.get(kind, 4)):
        image, note = _from_array(imagecodecs.png_decode, data, wanted)
    return Picture(image=image, orientation=exif.get(ORIENTATION_TAG), note=note, frames=frames)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and content of each chunk of a PNG, of which the pixels' are left empty."""
    place = _PNG_MARK_BYTES
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        kind = data[place + 4 : place + 8]
        yield kind, b"" if kind == b"IDAT" else data[place + 8 : place + 8 + length]
        place += 12 + length


def without_text(data: bytes) -> bytes:
    """Return a PNG without its texts and its colour profile, which do not change the pixels."""
    kept = [data[:_PNG_MARK_BYTES]]
    place = _PNG_MARK_BYTES
    while place + 8 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def is_deep_png(head: bytes) -> bool:
    """Return whether a PNG has 16 bits a channel; the depth is the 25th byte."""
    return head[24:25] == b"\x10"


def read_ppm(file: BinaryIO, wanted: Wanted) -> Picture:
    """Decode a colour PPM of 16 bits a channel."""
    data = file.read()
    header = _PPM_HEADER.match(data)
    assert header is not None, "is_deep_ppm has matched it"
    width, height, highest = (int(number) for number in header.groups())
    wanted.check(width, height)
    wanted.check_frame(1)
    values = np.frombuffer(data, ">u2", width * height * 3, header.end()).astype(np.uint16)
    image, note = from_values(
        values.reshape(height, width, 3),
        limit=None if highest == np.iinfo(np.uint16).max else highest,
        size=wanted.size,
    )
    return Picture(image=image, note=note)


def is_deep_ppm(head: bytes) -> bool:
    """Return whether a file is a colour PPM of 16 bits a channel."""
    header = _PPM_HEADER.match(head)
    return header is not None and int(header[3]) > np.iinfo(np.uint8).max


def _read_jpeg_xl(file: BinaryIO, wanted: Wanted) -> Picture:
    import imagecodecs

    wanted.check_frame(1)
    image, note = _from_array(imagecodecs.jpegxl_decode, file.read(), wanted, index=0)
    return Picture(image=image, note=note)


def _read_jpeg_2000(file: BinaryIO, wanted: Wanted) -> Picture:
    import imagecodecs

    wanted.check_frame(1)
    data = file.read()
    with Image.open(io.BytesIO(data), formats=["JPEG2000"]) as header:
        wanted.check(*header.size)
        num_values = header.width * header.height * len(header.getbands())
    with room_for(2 * num_values):
        image, note = _from_array(imagecodecs.jpeg2k_decode, data, wanted)
    return Picture(image=image, note=note)


def _from_array(
    decode: Callable[..., NDArray[Any]], data: bytes, wanted: Wanted, **options: Any
) -> tuple[Image.Image, str | None]:
    values = np.asarray(decode(data, **options))
    channels = 1 if values.ndim == 2 else values.shape[2]
    wanted.check(values.shape[1], values.shape[0])
    return from_values(values, has_alpha=channels in (2, 4), size=wanted.size)


def _read_heic(file: BinaryIO, wanted: Wanted) -> Picture:
    try:
        import pillow_heif
    except ImportError:
        raise UnreadableImageError(wanted.path, "HEIC needs the extra [formats]") from None
    wanted.check_frame(1)
    try:
        opened = pillow_heif.open_heif(file)
        wanted.check(*opened.size)
        with room_for(4 * opened.size[0] * opened.size[1]):
            return Picture(image=from_image(opened.to_pillow(), size=wanted.size))
    except (ValueError, RuntimeError, OSError, EOFError) as error:
        raise UnreadableImageError(
            wanted.path, f"HEIC that cannot be decoded ({first_line(error)})"
        ) from error


READERS: Mapping[str, Callable[[BinaryIO, Wanted], Picture]] = {
    HEIC: _read_heic,
    JPEG_XL: _read_jpeg_xl,
    JPEG_2000: _read_jpeg_2000,
}
"""Of the formats of which Pillow reads nothing."""
