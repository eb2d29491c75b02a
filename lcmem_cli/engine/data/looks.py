"""What a decoded picture looks like to a detector: blank, without colour, in a frame, a page.

Each is told from 8-bit RGB pixels. A picture of one colour shows nothing, so it matches only its
equal. A copy in grey, or in a frame of bars, is compared in a second form as well, see
``evaluation.inference``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BLANK_LEVELS = 4
"""Levels of 256 that the pixels of one colour may differ by: the noise of a lossy format."""
_BAR_LEVELS = 12
_GREY_LEVELS = 8
_END_OF_BAR = 0.5
"""Share of a line that must leave the colour of the bars for the picture to begin there."""
_SMALLEST_SHARE = 0.1
_PAPER = 200
_PAPER_LEVELS = 24
_PAGE_SHARE = 0.5
_STEP = 4
"""Every so many pixels a side are looked at first; that is enough but for what is blank."""


class Look(NamedTuple):
    """What a picture looks like.

    Attributes:
        blank: its colour, ``0xRRGGBB``, where it shows nothing else; otherwise -1.
        is_grey: whether it has no colour, but what a lossy format adds.
        has_bars: whether a side of it is of one colour; ``without_bars`` looks closer.
        is_page: whether most of it is white ground, as of a page of text or a drawing.
    """

    blank: int
    is_grey: bool
    has_bars: bool
    is_page: bool


def look_at(pixels: NDArray[np.uint8]) -> Look:
    """Look at the pixels ``[H, W, 3]`` that a detector will see.

    It is done for every image that is decoded, so it takes a small part of the decoding's time.
    """
    red, green, blue = np.ascontiguousarray(np.moveaxis(pixels[::_STEP, ::_STEP], -1, 0))
    low = np.minimum(np.minimum(red, green), blue)
    high = np.maximum(np.maximum(red, green), blue)
    return Look(
        blank=-1 if _spread(high) > BLANK_LEVELS else _blank_colour(pixels),
        is_grey=bool((high - low).max() <= _GREY_LEVELS),
        has_bars=_has_bars(pixels),
        is_page=_is_page(low),
    )


def _blank_colour(pixels: NDArray[np.uint8]) -> int:
    if max(_spread(pixels[..., channel]) for channel in range(3)) > BLANK_LEVELS:
        return -1
    red, green, blue = (round(float(mean)) for mean in pixels.mean(axis=(0, 1)))
    return red << 16 | green << 8 | blue


def _has_bars(pixels: NDArray[np.uint8]) -> bool:
    """Return whether a side is of one colour; most are not at three points of them already."""
    height, width = pixels.shape[:2]
    rows, columns = (0, height // 2, height - 1), (0, width // 2, width - 1)
    points = pixels[rows, :][:, columns].astype(np.int16)
    for side, ends in (
        (pixels[0], points[0]),
        (pixels[-1], points[2]),
        (pixels[:, 0], points[:, 0]),
        (pixels[:, -1], points[:, 2]),
    ):
        first, middle, last = ends.tolist()
        looks_plain = all(
            max(levels) - min(levels) <= _BAR_LEVELS
            for levels in zip(first, middle, last, strict=True)
        )
        if looks_plain and max(_spread(side[:, c]) for c in range(3)) <= _BAR_LEVELS:
            return True
    return False


def _is_page(darkest: NDArray[np.uint8]) -> bool:
    """Judge by the darkest channel of each pixel ``[H, W]``: white has none that is dark."""
    paper = darkest >= _PAPER
    if np.count_nonzero(paper) < _PAGE_SHARE * paper.size:
        return False
    ground = darkest[paper].astype(np.int16)
    near = np.abs(ground - np.median(ground)) <= _PAPER_LEVELS
    return bool(np.count_nonzero(near) >= _PAGE_SHARE * paper.size)


def same_blank(first: int, second: int) -> bool:
    """Return whether two images without content are of one colour, as ``look_at`` gives it."""
    if first < 0 or second < 0:
        return False
    shifts = (16, 8, 0)
    return all(abs((first >> s & 255) - (second >> s & 255)) <= BLANK_LEVELS for s in shifts)


def without_bars(image: Image.Image) -> Image.Image | None:
    """Cut bars of one colour off the sides of an image.

    A bar ends where at least half of a line leaves its colour. So a thing on plain ground, of which
    the outermost point ends the ground, is left as it is.

    Args:
        image: RGB.

    Returns:
        What the bars surround; ``None`` where there are none, or little is left.
    """
    pixels = np.asarray(image)
    top, bottom = _bars(pixels)
    left, right = _bars(pixels[top : len(pixels) - bottom].swapaxes(0, 1))
    height, width = pixels.shape[0] - top - bottom, pixels.shape[1] - left - right
    is_small = min(height / pixels.shape[0], width / pixels.shape[1]) < _SMALLEST_SHARE
    if is_small or not (top or bottom or left or right):
        return None
    return image.crop((left, top, left + width, top + height))


def _bars(pixels: NDArray[np.uint8]) -> tuple[int, int]:
    """Return how many lines of one colour stand at the start and at the end."""
    found = []
    for lines in (pixels, pixels[::-1]):
        colour = np.median(lines[0], axis=0)
        off = np.abs(lines.astype(np.int16) - colour).max(axis=2) > _BAR_LEVELS
        share = off.mean(axis=1)
        first = int(np.argmax(share > 0)) if (share > 0).any() else len(share)
        # A soft edge takes a few lines from the first stray pixel to the picture.
        soft = share[first : first + 1 + len(share) // 64]
        is_sharp = first < len(share) and bool((soft >= _END_OF_BAR).any())
        found.append(first + int(np.argmax(soft >= _END_OF_BAR)) if is_sharp and first else 0)
    return found[0], found[1]


def _spread(values: NDArray[np.uint8]) -> int:
    return int(values.max()) - int(values.min())
