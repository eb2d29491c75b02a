"""What a file is, told by how it begins; its name decides only where the content says nothing."""

from __future__ import annotations

import re
from pathlib import Path

HEAD_BYTES = 132
DICOM = "DICOM"
HEIC = "HEIC"
JPEG_XL = "JPEG XL"
JPEG_2000 = "JPEG 2000"
NO_FORMAT = (
    "not an image in a known format (JPEG, PNG, WebP, AVIF, TIFF, BMP, GIF, PNM, TGA, JPEG XL, "
    "JPEG 2000, HEIC, DICOM)"
)
"""Why such a file gives no image."""
DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
_BY_SUFFIX = {".tga": "TGA", ".icb": "TGA", ".vda": "TGA", ".vst": "TGA", ".dib": "DIB"}
"""Formats without a mark of their own."""
IMAGE_SUFFIXES = DICOM_SUFFIXES | _BY_SUFFIX.keys() | {
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe",
    ".jpeg", ".jpg", ".jpx", ".jxl", ".mpo", ".pbm", ".pgm", ".pjp", ".pjpeg", ".png", ".pnm",
    ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
"""Files named so are listed without being opened; a folder may hold millions."""

_MARKS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # with 64-bit offsets
    b"MM\0+": "TIFF",
    b"\xff\x0a": JPEG_XL,
    b"\0\0\0\x0cJXL \r\n\x87\n": JPEG_XL,
    b"\xff\x4f\xff\x51": JPEG_2000,
    b"\0\0\0\x0cjP  \r\n\x87\n": JPEG_2000,
}
_BMP_HEADER_BYTES = (12, 40, 52, 56, 64, 108, 124)
_PNM_START = re.compile(rb"P[1-6]\s+[\d#]")
_HEIC_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"miaf"}
)


def format_of(head: bytes, suffix: str = "") -> str | None:
    """Return the format of an image file, ``None`` where it is none that is known.

    Args:
        head: the first ``HEAD_BYTES`` of the file.
        suffix: of its name, with the dot.

    Returns:
        Pillow's name of the format, or one of this module's.
    """
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    if head[128:] == b"DICM":
        return DICOM
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    if _PNM_START.match(head):
        return "PPM"
    if head[4:8] == b"ftyp":
        return _by_brands(head)
    suffix = suffix.lower()
    return DICOM if suffix in DICOM_SUFFIXES else _BY_SUFFIX.get(suffix)


def is_image(path: Path) -> bool:
    """Return whether a file is to be listed as an image: by a usual suffix, else by its content.

    Raises:
        OSError: it cannot be read.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    if path.name.upper() == "DICOMDIR" or not path.is_file():  # a DICOMDIR lists those beside it
        return False
    with path.open("rb") as file:
        return format_of(file.read(HEAD_BYTES)) is not None


def _by_brands(head: bytes) -> str | None:
    """Tell the kinds of the ISO container apart, which also holds films."""
    length = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[start : start + 4] for start in (8, *range(16, length, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return HEIC if brands & _HEIC_BRANDS else None
