"""Decoding: every supported file becomes an upright 8-bit RGB image, or an error with a reason.

Rules that change pixel values, in one place:

- Transparency is composited over black.
- Integer data of more than 8 bits are divided by the smallest of 255, 4095 and 65535 that their
  maximum fits in, so that 8 or 12 bits kept in a 16-bit file are neither black nor clipped to
  white; signed data and data of more than 16 bits are stretched from minimum to maximum.
- Floating-point data within [0, 1] are taken as they are, others are stretched from minimum to
  maximum.
- DICOM: modality lookup table or rescale, then the file's first window (without one: minimum to
  maximum), MONOCHROME1 inverted, first frame only.
- Of an animation or a file of several pages the first image is used.

Where a rule had to guess a scale, ``image.info[DEPTH_NOTE]`` says so.
"""

from __future__ import annotations

import io
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from lcmem_cli.engine.errors import LcmemError, MissingExtraError
from lcmem_cli.engine.files import sha256_bytes, sha256_file

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Pillow refuses more than this when it opens a file, before it decodes.
MAX_PIXELS = 2 * 89_478_485
MAX_BYTES_AT_ONCE = 256 << 20
DEPTH_NOTE = "lcmem_depth"
DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
IMAGE_SUFFIXES = DICOM_SUFFIXES | {
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
}  # fmt: skip
UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".hif", ".j2k", ".jp2", ".jxl"})
"""Images that no decoder here reads; in a folder they are listed, so that they are not missed."""
_FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"]  # MPO counts as JPEG
if "avif" in features.modules and features.check_module("avif"):  # from Pillow 11.3 on
    _FORMATS.append("AVIF")
_MARKS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
_HEAD_BYTES = 132
_DICOM_MARK = b"DICM"  # after 128 bytes of anything
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PHOTOMETRIC_TAG = 262
_WHITE_IS_ZERO = 0
_DEPTHS = ((255, 8), (4095, 12), (65535, 16))

# The limit below is stricter and raises; Pillow's warning at half its own limit adds nothing.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class UnreadableImageError(LcmemError):
    """A file could not be turned into an image.

    Attributes:
        path: the file.
        reason: why, in a few words, without the path.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}")


def load_image(
    path: Path, *, data: bytes | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image file; see the module's text for the rules.

    Args:
        path: JPEG, PNG, WebP, AVIF, TIFF, BMP, GIF, PPM, or DICOM.
        data: the file's bytes, where they have been read already.
        max_pixels: a file that declares more is refused before it is decoded. Values above the
            default have no effect, because Pillow refuses those files itself.

    Returns:
        A loaded RGB image, turned upright by its EXIF tag.

    Raises:
        UnreadableImageError: missing, empty, truncated, too large, or no image.
        MissingExtraError: a DICOM file, and pydicom is not installed.
    """
    path = Path(path)
    try:
        opened = path if data is None else io.BytesIO(data)
        if _is_dicom(path, data):
            return _load_dicom(path, opened, max_pixels)
        with Image.open(opened, formats=_FORMATS) as image:
            _check_pixels(path, image.width, image.height, max_pixels)
            image.load()
            return upright_rgb(image, path)
    except (UnreadableImageError, MissingExtraError):
        raise
    except UnidentifiedImageError:
        suffix = path.suffix.lower()
        if suffix in UNREAD_SUFFIXES:
            raise UnreadableImageError(path, f"{suffix} is not read; convert it to PNG") from None
        raise UnreadableImageError(
            path, f"not an image in a known format ({', '.join(_FORMATS)}, DICOM)"
        ) from None
    except Exception as error:  # decoders raise anything at all on damaged files
        raise UnreadableImageError(path, _reason(error)) from error


def is_readable(path: Path) -> bool:
    """Return whether ``load_image`` can decode a file here."""
    try:
        load_image(path)
    except (UnreadableImageError, MissingExtraError):
        return False
    return True


def upright_rgb(image: Image.Image, path: Path = Path("image")) -> Image.Image:
    """Bring an opened image of any mode to RGB by the rules for files, upright by its EXIF tag.

    Args:
        image: as Pillow opened or made it.
        path: for messages.

    Raises:
        UnreadableImageError: it holds values that are not finite.
    """
    method = _UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(path, image)
    return rgb if method is None else rgb.transpose(method)


def guesses_text(count: int) -> str:
    """Return what to tell about images of which ``DEPTH_NOTE`` says that a scale was guessed."""
    return (
        f"{count:,} image(s) of more than 8 bits without a stated range: their brightness was "
        "guessed from their values"
    )


def to_tensor(image: Image.Image, size: int) -> torch.Tensor:
    """Resize an RGB image to a square and scale it to [0, 1].

    Args:
        image: any size; the aspect ratio is not kept (arXiv 2512.14421).
        size: side of the result in pixels.

    Returns:
        ``[3, size, size]`` float32 in [0, 1]; bilinear with antialias.
    """
    return pixels_to_tensor(resized_pixels(image, size))


def load_pixels(path: Path, size: int) -> NDArray[np.uint8]:
    """Decode an image file and resize it as ``to_tensor`` does.

    Returns:
        ``[size, size, 3]`` uint8; divided by 255 it is what ``to_tensor`` returns.

    Raises:
        UnreadableImageError: see ``load_image``.
        MissingExtraError: see ``load_image``.
    """
    return resized_pixels(load_image(path), size)


def resized_pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resize an RGB image to ``[size, size, 3]`` uint8, bilinear with antialias."""
    square = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(square, dtype=np.uint8)


def pixels_to_tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Turn ``[..., H, W, 3]`` uint8 into ``[..., 3, H, W]`` float32 in [0, 1]."""
    channels_first = np.moveaxis(pixels, -1, -3)
    return torch.from_numpy(np.divide(channels_first, 255, dtype=np.float32, order="C"))


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal.

    Raises:
        UnreadableImageError: the file cannot be read.
    """
    try:
        _check_regular(path)
        return sha256_file(path)
    except OSError as error:
        raise UnreadableImageError(path, _reason(error)) from error


def read_once(path: Path) -> tuple[bytes | None, str]:
    """Return a file's bytes and ``content_hash`` of these very bytes.

    A file may be replaced between two readings. What is kept under a content's hash has to be made
    of the bytes that were hashed, so they are read once for both.

    Returns:
        ``None`` for the bytes of a file of more than ``MAX_BYTES_AT_ONCE``.

    Raises:
        UnreadableImageError: the file cannot be read.
    """
    try:
        if _check_regular(path) > MAX_BYTES_AT_ONCE:
            return None, content_hash(path)
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(path, _reason(error)) from error
    return data, sha256_bytes(data)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = " ".join(str(error).split())
    return f"cannot be decoded ({text[:160] or type(error).__name__})"


def _check_regular(path: Path) -> int:
    """Return the size of a regular file; opening a pipe would wait for ever."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise UnreadableImageError(path, "is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImageError(path, "is not a regular file")
    return status.st_size


def _check_pixels(path: Path, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise UnreadableImageError(path, f"has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise UnreadableImageError(
            path, f"{width} x {height} pixels, more than the limit of {max_pixels:,}"
        )


def _is_dicom(path: Path, data: bytes | None) -> bool:
    if (_check_regular(path) if data is None else len(data)) == 0:
        raise UnreadableImageError(path, "empty file")
    head = _head(path) if data is None else data[:_HEAD_BYTES]
    return path.suffix.lower() in DICOM_SUFFIXES or head[128:] == _DICOM_MARK


def begins_as_image(path: Path) -> bool:
    """Return whether a file begins as an image of a usual format does, whatever its name is.

    Raises:
        OSError: it cannot be read.
    """
    head = _head(path)
    return head.startswith(_MARKS) or head[8:12] == b"WEBP" or head[128:] == _DICOM_MARK


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _orientation(image: Image.Image) -> Any:
    """Return the EXIF orientation of a loaded image (Pillow has turned a TIFF already)."""
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged metadata do not make the pixels unusable
        return None


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        pixels, note = _scale(path, np.asarray(image))
        tags: Any = getattr(image, "tag_v2", {})
        if tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
            pixels = 255 - pixels
        return _noted(Image.fromarray(pixels).convert("RGB"), note)
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _scale(path: Path, values: NDArray[Any]) -> tuple[NDArray[np.uint8], str | None]:
    """Bring grey values of any type to 8 bits; also return what was guessed, if anything."""
    if not np.isfinite(values).all():
        raise UnreadableImageError(path, "holds values that are not finite")
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.floating):
        if low >= 0 and high <= 1:
            return _to_bytes(values, 0, 1), None
        return _to_bytes(values, low, high), "floating-point values stretched to their range"
    for limit, bits in _DEPTHS:
        if low >= 0 and high <= limit:
            note = None if bits == 16 else f"{bits}-bit values in a 16-bit file"
            return _to_bytes(values, 0, limit), note
    return _to_bytes(values, low, high), "wide or signed integers stretched to their range"


def _to_bytes(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    if high <= low:
        return np.zeros(values.shape, dtype=np.uint8)
    unit = (values.astype(np.float64) - low) / (high - low)
    shades: NDArray[np.uint8] = np.rint(unit.clip(0, 1) * 255).astype(np.uint8)
    return shades


def _load_dicom(path: Path, opened: Path | io.BytesIO, max_pixels: int) -> Image.Image:
    try:
        import pydicom
        from pydicom.pixels import pixel_array
    except ImportError:
        raise MissingExtraError(f"{path}: reading DICOM", "dicom") from None
    data = pydicom.dcmread(opened, force=True)
    if "Rows" not in data or "Columns" not in data:
        raise UnreadableImageError(path, "not a DICOM image (no rows and columns)")
    _check_pixels(path, int(data.Columns), int(data.Rows), max_pixels)
    values = pixel_array(data, index=0)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        values = pydicom.pixels.apply_color_lut(values, data)
        return Image.fromarray(_to_bytes(values, 0, np.iinfo(values.dtype).max))
    if values.ndim == 3:
        return Image.fromarray(_to_bytes(values, 0, 2 ** int(data.BitsStored) - 1))
    grey, note = _dicom_grey(path, data, values)
    return _noted(Image.fromarray(_to_bytes(grey, 0, 1)).convert("RGB"), note)


def _noted(image: Image.Image, note: str | None) -> Image.Image:
    if note:
        image.info[DEPTH_NOTE] = note
    return image


def _dicom_grey(
    path: Path, data: Dataset, stored: NDArray[Any]
) -> tuple[NDArray[np.float64], str | None]:
    """Return a grey DICOM image as it is meant to be shown, black 0 and white 1.

    And what had to be guessed for that, if anything.
    """
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = np.asarray(apply_modality_lut(stored, data))
    if not np.isfinite(values).all():
        raise UnreadableImageError(path, "holds values that are not finite")
    note = None
    if "VOILUTSequence" in data:
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        unit = np.asarray(apply_voi(values, data), dtype=np.float64) / (2**bits - 1)
    elif "WindowCenter" in data and "WindowWidth" in data:
        unit = _window(
            values.astype(np.float64),
            _first(data.WindowCenter),
            _first(data.WindowWidth),
            str(data.get("VOILUTFunction") or "LINEAR"),
        )
    else:
        shown = values
        if "PixelPaddingValue" in data and (stored != data.PixelPaddingValue).any():
            shown = values[stored != data.PixelPaddingValue]
        low, high = float(shown.min()), float(shown.max())
        note = "values of a DICOM without a window stretched to their range"
        unit = (values.astype(np.float64) - low) / max(high - low, 1e-12)
    shown_unit: NDArray[np.float64] = unit.clip(0, 1)
    is_inverted = data.PhotometricInterpretation == "MONOCHROME1"
    return 1 - shown_unit if is_inverted else shown_unit, note


def _window(
    values: NDArray[np.float64], centre: float, width: float, function: str
) -> NDArray[np.float64]:
    """Apply a window as DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3 define it, to the range [0, 1]."""
    if function == "SIGMOID":
        logistic: NDArray[np.float64] = 1 / (1 + np.exp(-4 * (values - centre) / max(width, 1e-12)))
        return logistic
    if function == "LINEAR_EXACT":
        return (values - centre) / max(width, 1e-12) + 0.5
    if width <= 1:  # a step
        return np.asarray(values > centre - 0.5, dtype=np.float64)
    return (values - (centre - 0.5)) / (width - 1) + 0.5


def _first(value: Any) -> float:
    """Return a DICOM number, or the first of several."""
    try:
        return float(value)
    except TypeError:
        return float(value[0])
