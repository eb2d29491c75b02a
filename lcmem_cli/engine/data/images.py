"""Decoding: every supported file becomes an upright 8-bit RGB image, or an error with a reason.

What a file is, its content says; its name only where the content does not. The rules that change
pixel values stand in ``pixels`` (depth, background of what is transparent) and ``dicom`` (windows).
Beside them:

- Of a file of several images one is read: the first, or the one that a name such as
  ``scan.tif#3`` asks for, see ``frames``.
- A colour profile does not change the stored values.
- A JPEG of more than ``memory.LARGE_PIXELS`` of which a small copy is wanted is decoded at half, a
  quarter or an eighth of its size; other large images are shrunk in blocks of rows.

``image.info`` says what a reader should be told: ``DEPTH_NOTE``, ``FRAMES_NOTE``, and
``pixels.ON_WHITE_NOTE``.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lcmem_cli.engine.data import decoders, dicom
from lcmem_cli.engine.data.decoders import ORIENTATION_TAG, Picture, Wanted
from lcmem_cli.engine.data.formats import DICOM, HEAD_BYTES, NO_FORMAT, format_of
from lcmem_cli.engine.data.frames import split_frame
from lcmem_cli.engine.data.memory import LARGE_PIXELS, room_for
from lcmem_cli.engine.data.pixels import UnusableValuesError, from_image, from_values
from lcmem_cli.engine.data.reading import EMPTY, open_image, why_unread
from lcmem_cli.engine.errors import UnreadableImageError

# Pillow refuses more than this when it opens a file, before it decodes.
MAX_PIXELS = 2 * 89_478_485
DECODING_VERSION = 2
"""Raised where a rule changes the pixels of files that could be read before."""
DEPTH_NOTE = "lcmem_depth"
"""Key of ``image.info``: what had to be guessed of the depth."""
FRAMES_NOTE = "lcmem_frames"
"""Key of ``image.info``: how many images the file holds, where the first of several was read
without being asked for."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PHOTOMETRIC_TAG, _BITS_TAG, _SAMPLE_FORMAT_TAG, _COLOUR_MAP_TAG = 262, 258, 339, 320
_SUBFILE_TAG = 254
_WHITE_IS_ZERO, _UNSIGNED, _REDUCED = 0, 1, 1
_SEVERAL = frozenset({"AVIF", "GIF", "PNG", "TIFF", "WEBP"})
"""Of a JPEG the further images are previews, depth and gain maps of the same picture."""
_DRAFT_SIDES = 2
_DECODED_BYTES = 4

# The limit below is stricter and raises; Pillow's warning at half its own limit adds nothing.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def load_image(
    path: Path,
    *,
    data: bytes | None = None,
    size: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode an image file; see the module's text for the rules.

    Args:
        path: JPEG, PNG, WebP, AVIF, TIFF, BMP, GIF, PNM, TGA, JPEG XL, JPEG 2000, and with their
            extras DICOM and HEIC; perhaps with the number of one of its images, ``scan.tif#3``.
        data: the file's bytes, where they have been read already.
        size: side of the copy that is wanted of the image: a very large one may then be returned
            smaller, and takes less memory.
        max_pixels: a file that declares more is refused before it is decoded. Values above the
            default have no effect, because Pillow refuses those files itself.

    Returns:
        A loaded RGB image, turned upright by its EXIF tag.

    Raises:
        UnreadableImageError: missing, empty, truncated, too large, no image, or an optional
            dependency is missing.
    """
    path = Path(path)
    try:
        picture = _read(path, data, size, max_pixels)
        image = _upright(picture)
    except UnreadableImageError:
        raise
    except UnusableValuesError as error:
        raise UnreadableImageError(path, str(error)) from error
    except Exception as error:  # decoders raise anything at all on damaged files
        raise UnreadableImageError(path, _reason(error, path)) from error
    if picture.note:
        image.info[DEPTH_NOTE] = picture.note
    if picture.frames > 1 and split_frame(path)[0] == path:
        image.info[FRAMES_NOTE] = picture.frames
    return image


def is_readable(path: Path) -> bool:
    """Return whether ``load_image`` can decode a file here."""
    try:
        load_image(path)
    except UnreadableImageError:
        return False
    return True


def list_frames(path: Path) -> list[int]:
    """Return the numbers, from 0, of the images that a file holds; ``[0]`` where it says none.

    Copies of smaller size, which a TIFF may hold besides, are left out.
    """
    wanted = Wanted(path=path, frame=0, size=None, max_pixels=MAX_PIXELS)
    try:
        with open_image(path) as file:
            format_name = _format(file, path)
            if format_name == DICOM:
                return list(range(dicom.count_frames(file, wanted)))
            if format_name == "TIFF":
                return decoders.tiff_frames(file)
            if format_name not in _SEVERAL:
                return [0]
            with Image.open(file, formats=[format_name]) as image:
                return list(range(_num_frames(image)))
    except Exception:  # what is wrong with it is told when it is decoded
        return [0]


def upright_rgb(image: Image.Image, path: Path = Path("image")) -> Image.Image:
    """Bring an opened image of any mode to RGB by the rules for files, upright by its EXIF tag.

    Args:
        image: as Pillow opened or made it.
        path: for messages.

    Raises:
        UnreadableImageError: it holds values that are not finite.
    """
    try:
        picture = _from_pillow(image, None)
    except UnusableValuesError as error:
        raise UnreadableImageError(path, str(error)) from error
    return _upright(picture)


def to_tensor(image: Image.Image, size: int) -> torch.Tensor:
    """Resize an RGB image to a square and scale it to [0, 1].

    Args:
        image: any size; the aspect ratio is not kept (arXiv 2512.14421).
        size: side of the result in pixels.

    Returns:
        ``[3, size, size]`` float32 in [0, 1]; bilinear with antialias.
    """
    return pixels_to_tensor(resized_pixels(image, size))


def resized_pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resize an RGB image to ``[size, size, 3]`` uint8, bilinear with antialias."""
    square = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(square, dtype=np.uint8)


def pixels_to_tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Turn ``[..., H, W, 3]`` uint8 into ``[..., 3, H, W]`` float32 in [0, 1]."""
    channels_first = np.moveaxis(pixels, -1, -3)
    return torch.from_numpy(np.divide(channels_first, 255, dtype=np.float32, order="C"))


def _reason(error: BaseException, path: Path) -> str:
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.strerror):
        return why_unread(error, path)
    text = " ".join(str(error).split())
    return f"cannot be decoded ({text[:160] or type(error).__name__})"


def _format(file: BinaryIO, path: Path) -> str | None:
    head = file.read(HEAD_BYTES)
    file.seek(0)
    return format_of(head, path.suffix)


def _read(path: Path, data: bytes | None, size: int | None, max_pixels: int) -> Picture:
    """Decode a file with the library that reads all its bits."""
    if data == b"":
        raise UnreadableImageError(path, EMPTY)
    named, frame = split_frame(path)
    wanted = Wanted(path=path, frame=frame, size=size, max_pixels=max_pixels)
    with open_image(named) if data is None else io.BytesIO(data) as file:
        format_name = _format(file, named)
        if format_name is None:
            raise UnreadableImageError(path, NO_FORMAT)
        if format_name == DICOM:
            return dicom.read_dicom(file, wanted)
        if format_name in decoders.READERS:
            return decoders.READERS[format_name](file, wanted)
        if format_name == "TIFF":
            return _read_tiff(file, wanted)
        head = file.read(HEAD_BYTES)
        file.seek(0)
        if format_name == "PNG" and decoders.is_deep_png(head):
            return decoders.read_png(file, wanted)
        if format_name == "PPM" and decoders.is_deep_ppm(head):
            return decoders.read_ppm(file, wanted)
        try:
            return _read_with_pillow(file, format_name, wanted)
        except ValueError:
            if format_name != "PNG":
                raise
        # Pillow reads no PNG with more than a megabyte of text or colour profile.
        file.seek(0)
        lean = io.BytesIO(decoders.without_text(file.read()))
        return _read_with_pillow(lean, format_name, wanted)


def _read_tiff(file: BinaryIO, wanted: Wanted) -> Picture:
    """Decode a TIFF with Pillow where it has 8 bits or less, all else with tifffile."""
    try:
        with Image.open(file, formats=["TIFF"]) as image:
            if wanted.frame == 0 and _is_plain_tiff(image):
                return _decoded(image, wanted)
    except (UnidentifiedImageError, OSError, SyntaxError):
        pass  # Pillow does not know the kind, or its library not the compression
    file.seek(0)
    return decoders.read_tiff(file, wanted)


def _is_plain_tiff(image: Image.Image) -> bool:
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    table = tags.get(_COLOUR_MAP_TAG, (0xFFFF,))
    return (
        all(bits <= 8 for bits in tags.get(_BITS_TAG, (1,)))
        and all(kind == _UNSIGNED for kind in tags.get(_SAMPLE_FORMAT_TAG, (_UNSIGNED,)))
        and max(table) > 0xFF  # a palette of 8-bit values, which Pillow shows black
    )


def _read_with_pillow(file: BinaryIO, format_name: str, wanted: Wanted) -> Picture:
    try:
        with Image.open(file, formats=[format_name]) as image:
            return _decoded(image, wanted)
    except UnidentifiedImageError:
        raise UnreadableImageError(
            wanted.path, f"begins as {format_name} does, and cannot be decoded"
        ) from None


def _decoded(image: Image.Image, wanted: Wanted) -> Picture:
    """Decode what Pillow has opened."""
    wanted.check(*image.size)
    frames = _num_frames(image)
    if wanted.frame:
        wanted.check_frame(frames)
        image.seek(wanted.frame)
    if wanted.size is not None and image.width * image.height > LARGE_PIXELS:
        image.draft(image.mode, (_DRAFT_SIDES * wanted.size,) * 2)  # does nothing but for a JPEG
    with room_for(_DECODED_BYTES * image.width * image.height):
        image.load()
        picture = _from_pillow(image, wanted.size)
    return Picture(
        image=picture.image, orientation=picture.orientation, note=picture.note, frames=frames
    )


def _from_pillow(image: Image.Image, size: int | None) -> Picture:
    orientation = _orientation(image)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        tags: Any = getattr(image, "tag_v2", {})
        rgb, note = from_values(
            np.asarray(image),
            white_is_zero=tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO,
            size=size,
        )
        return Picture(image=rgb, orientation=orientation, note=note)
    return Picture(image=from_image(image, size=size), orientation=orientation)


def _upright(picture: Picture) -> Image.Image:
    image = picture.image if picture.image.mode == "RGB" else picture.image.convert("RGB")
    method = None if picture.orientation is None else _UPRIGHT.get(picture.orientation)
    return image if method is None else image.transpose(method)


def _num_frames(image: Image.Image) -> int:
    if image.format not in _SEVERAL:
        return 1
    try:
        count = int(getattr(image, "n_frames", 1))
        if image.format != "TIFF" or count == 1:
            return count
        whole = 0
        for number in range(count):
            image.seek(number)
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            whole += not tags.get(_SUBFILE_TAG, 0) & _REDUCED
        image.seek(0)
        return max(1, whole)
    except Exception:  # damage in later images does not make the first one unusable
        image.seek(0)
        return 1


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation of a loaded image (Pillow has turned a TIFF already)."""
    try:
        value = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # damaged metadata do not make the pixels unusable
        return None
    return value if isinstance(value, int) else None
