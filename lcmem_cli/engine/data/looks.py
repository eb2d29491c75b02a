"""What a decoded picture looks like to a detector: blank, without colour, in a frame, a page.

Each is told from 8-bit RGB pixels. A picture of one colour shows nothing, so it matches only its
equal. A copy in grey, or in a frame of bars, is compared in a second form as well, see
``evaluation.inference``.
"""

from __future__ import annotations

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
_QUICK_STEP = 8


def blank_colour(pixels: NDArray[np.uint8]) -> int:
    """Return the colour of an image without content as ``0xRRGGBB``, otherwise -1."""
    if _spread(pixels[::_QUICK_STEP, ::_QUICK_STEP]) > BLANK_LEVELS:
        return -1
    if _spread(pixels) > BLANK_LEVELS:
        return -1
    red, green, blue = (round(float(mean)) for mean in pixels.mean(axis=(0, 1)))
    return red << 16 | green << 8 | blue


def same_blank(first: int, second: int) -> bool:
    """Return whether two images without content are of one colour, as ``blank_colour`` gives it."""
    if first < 0 or second < 0:
        return False
    shifts = (16, 8, 0)
    return all(abs((first >> s & 255) - (second >> s & 255)) <= BLANK_LEVELS for s in shifts)


def is_grey(pixels: NDArray[np.uint8]) -> bool:
    """Return whether an image ``[H, W, 3]`` has no colour but what a lossy format adds."""

    def colourful(part: NDArray[np.uint8]) -> bool:
        levels = part.astype(np.int16)
        return bool((levels.max(axis=2) - levels.min(axis=2)).max() > _GREY_LEVELS)

    return not colourful(pixels[::_QUICK_STEP, ::_QUICK_STEP]) and not colourful(pixels)


def is_page(pixels: NDArray[np.uint8]) -> bool:
    """Return whether most of an image is white ground, as of a page of text or a drawing."""
    paper = pixels[::2, ::2].min(axis=2) >= _PAPER
    if float(paper.mean()) < _PAGE_SHARE:
        return False
    ground = pixels[::2, ::2][paper]
    near = np.abs(ground.astype(np.int16) - np.median(ground, axis=0)).max(axis=1) <= _PAPER_LEVELS
    return bool(near.sum() >= _PAGE_SHARE * paper.size)


def has_bars(pixels: NDArray[np.uint8]) -> bool:
    """Return whether a side of an image is of one colour; ``without_bars`` looks closer."""
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    return any(_spread(edge[None]) <= _BAR_LEVELS for edge in edges)


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


def _spread(pixels: NDArray[np.uint8]) -> int:
    low, high = pixels.min(axis=(0, 1)), pixels.max(axis=(0, 1))
    return int((high.astype(np.int16) - low).max())
