"""From decoded values to 8-bit RGB: depth, background of transparent images, shrinking in blocks.

- **Depth.** Integers of more than 8 bits are divided by the depth that the file states. In a file
  of 16 bits that is 65535, or the smallest of 255, 1023, 4095 that no value exceeds: tools keep 8,
  10 or 12 bits in such files. Signed integers and those of more than 16 bits are stretched from
  minimum to maximum. Floating-point data within [0, 1] are taken as they are, others are stretched.
  Colour goes by the same rule as grey, with one range for all channels.
- **Background.** What is transparent becomes black, or white where what is opaque is dark
  (``DARK``), so that black ink stays visible.
- **Size.** Large images are brought to 8 bits in blocks of rows; where only a small copy is wanted,
  each block is shrunk at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lcmem_cli.engine.data.memory import LARGE_PIXELS

ON_WHITE_NOTE = "lcmem_on_white"
"""Key of ``image.info``: a transparent image was laid on white."""
DARK = 64.0
"""Mean brightness, of 255, below which the opaque part of an image is laid on white."""
_DEPTHS = ((255, 8), (1023, 10), (4095, 12), (65535, 16))
_BLACK, _WHITE = (0, 0, 0, 255), (255, 255, 255, 255)
_BLOCK_VALUES = 1 << 19
_TABLE_SIZE = 1 << 16
"""From so many values of 16 bits on, each is looked up instead of computed."""
_SAMPLES = 1 << 16
_REDUCED_SIDES = 2  # sides of the small copy that a shrunk image keeps, so that little is lost


class UnusableValuesError(ValueError):
    """The values of a file have no meaning as brightness."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Which values are black and white.

    Attributes:
        low: black.
        high: white.
        note: what had to be guessed, if anything.
    """

    low: float
    high: float
    note: str | None = None

    def to_bytes(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Bring values to 0 to 255."""
        if self.high <= self.low:
            return np.zeros(values.shape, dtype=np.uint8)
        if values.dtype == np.uint8 and (self.low, self.high) == (0, 255):
            return np.asarray(values, dtype=np.uint8)
        if values.dtype == np.uint16 and values.size > _TABLE_SIZE:
            table = self.to_bytes(np.arange(_TABLE_SIZE, dtype=np.uint16))
            return np.asarray(table[values], dtype=np.uint8)
        unit = (values.astype(np.float64) - self.low) / (self.high - self.low)
        shades: NDArray[np.uint8] = np.rint(unit.clip(0, 1) * 255).astype(np.uint8)
        return shades


def scale_of(values: NDArray[Any], *, limit: int | None = None) -> Scale:
    """Find what is black and what is white, by the rule of depth.

    Args:
        values: of any type and shape, not empty.
        limit: highest value by the depth that the file states, where it is not that of the type.

    Raises:
        UnusableValuesError: some are not finite.
    """
    if limit is not None:
        return Scale(0, limit)
    if values.dtype == np.bool_:
        return Scale(0, 1)
    if values.dtype == np.uint8:
        return Scale(0, 255)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UnusableValuesError("holds values that are not finite")
    if np.issubdtype(values.dtype, np.floating):
        if low >= 0 and high <= 1:
            return Scale(0, 1)
        return Scale(low, high, "floating-point values stretched to their range")
    for highest, depth in _DEPTHS:
        if low >= 0 and high <= highest:
            note = None if depth == 16 else f"{depth}-bit values in a file of more bits"
            return Scale(0, highest, note)
    return Scale(low, high, "wide or signed integers stretched to their range")


def from_values(
    values: NDArray[Any],
    *,
    has_alpha: bool = False,
    white_is_zero: bool = False,
    limit: int | None = None,
    size: int | None = None,
) -> tuple[Image.Image, str | None]:
    """Make an 8-bit image of decoded values.

    Args:
        values: ``[H, W]``, or ``[H, W, C]`` of grey or RGB, perhaps with alpha as the last.
        has_alpha: whether the last channel is alpha.
        white_is_zero: grey values are inverted.
        limit: see ``scale_of``.
        size: side of the copy that is wanted; a large image may be shrunk to some times of it.

    Returns:
        An image of mode L or RGB, and what had to be guessed of its depth.

    Raises:
        UnusableValuesError: values that are not finite.
    """
    if values.ndim == 2:
        values = values[..., None]
    colour = values[..., :-1] if has_alpha else values
    scale = scale_of(colour, limit=limit)
    alpha = scale_of(values[..., -1], limit=limit) if has_alpha else None

    def block(rows: slice) -> Image.Image:
        shades = scale.to_bytes(colour[rows])
        if white_is_zero:
            shades = 255 - shades
        if alpha is None:
            return Image.fromarray(shades[..., 0] if shades.shape[2] == 1 else shades)
        rgb = np.broadcast_to(shades, (*shades.shape[:2], 3))
        return Image.fromarray(np.dstack([rgb, alpha.to_bytes(values[rows][..., -1])]))

    def sample(step: int) -> Image.Image:
        rows = slice(None, None, step)
        return block(rows).resize(_thinned(values.shape[1], values.shape[0], step), _NEAREST)

    height, width = values.shape[:2]
    return _assemble(width, height, block, sample if has_alpha else None, size), scale.note


def from_image(image: Image.Image, *, size: int | None = None) -> Image.Image:
    """Bring a loaded image of 8 bits a channel to RGB.

    Args:
        image: of any of Pillow's modes but those of more than 8 bits.
        size: see ``from_values``.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    has_alpha = image.has_transparency_data
    mode = "RGBA" if has_alpha else "RGB"

    def block(rows: slice) -> Image.Image:
        part = image.crop((0, rows.start, image.width, min(rows.stop, image.height)))
        return part.convert(mode)

    def sample(step: int) -> Image.Image:
        return image.resize(_thinned(image.width, image.height, step), _NEAREST).convert("RGBA")

    return _assemble(image.width, image.height, block, sample if has_alpha else None, size)


_NEAREST = Image.Resampling.NEAREST


def _assemble(
    width: int,
    height: int,
    block: Callable[[slice], Image.Image],
    sample: Callable[[int], Image.Image] | None,
    size: int | None,
) -> Image.Image:
    """Put an image together from blocks of rows, of mode L, RGB, or RGBA to be laid on a ground.

    Args:
        width: of the whole image.
        height: likewise.
        block: makes some rows.
        sample: makes an image of every so many rows and columns, by which the ground is chosen;
            ``None`` where nothing is transparent.
        size: see ``from_values``.
    """
    ground = None
    if sample is not None:
        step = math.ceil(math.sqrt(max(1, width * height / _SAMPLES)))
        ground = _ground(sample(step))
    across, down = shrinking(width, height, size)
    rows = max(1, _BLOCK_VALUES // width // down) * down
    canvas: Image.Image | None = None
    for top in range(0, height, rows):
        part = block(slice(top, top + rows))
        if ground is not None:
            part = Image.alpha_composite(Image.new("RGBA", part.size, ground), part).convert("RGB")
        if (across, down) != (1, 1):
            part = part.reduce((across, down))
        if rows >= height:
            canvas = part
            break
        if canvas is None:
            canvas = Image.new(part.mode, (part.width, math.ceil(height / down)))
        canvas.paste(part, (0, top // down))
    assert canvas is not None
    if ground == _WHITE:
        canvas.info[ON_WHITE_NOTE] = True
    return canvas


def shrinking(width: int, height: int, size: int | None) -> tuple[int, int]:
    """Return by which whole factors a large image may be shrunk before it is resized."""
    if size is None or width * height <= LARGE_PIXELS:
        return 1, 1
    kept = _REDUCED_SIDES * size
    return max(1, width // kept), max(1, height // kept)


def _ground(sample: Image.Image) -> tuple[int, int, int, int]:
    """Choose black or white so that what is opaque stays visible."""
    alpha = np.asarray(sample.getchannel("A"), dtype=np.float64)
    brightness = np.asarray(sample.convert("RGB").convert("L"))
    is_dark = alpha.any() and float((brightness * alpha).sum() / alpha.sum()) < DARK
    return _WHITE if is_dark else _BLACK


def _thinned(width: int, height: int, step: int) -> tuple[int, int]:
    return math.ceil(width / step), math.ceil(height / step)
