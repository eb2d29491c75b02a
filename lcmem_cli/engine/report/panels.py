"""Pictures of a match: the query laid onto the training image, and where both differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Places = Sequence[tuple[float, float]]
BEYOND = (128, 128, 128)
"""Colour where the query does not reach."""
_LINE = (220, 60, 40)


def laid_over(query: Image, size: tuple[int, int], matrix: Sequence[Sequence[float]]) -> Image:
    """Return a query in the frame of a training image.

    Args:
        query: RGB.
        size: width and height of the training image.
        matrix: ``[2, 3]`` from places of the query to those of the training image, in shares of
            their sides, as ``Evidence.matrix``.
    """
    from PIL import Image as images

    linear, shift = np.array(matrix)[:, :2], np.array(matrix)[:, 2]
    training = np.diag(np.array(size, dtype=np.float64))
    area = abs(float(np.linalg.det(training @ linear)))  # that the query will cover, in pixels
    shrunk = min(1.0, (area / (query.width * query.height)) ** 0.5)
    sides = [max(1, round(side * shrunk)) for side in query.size]
    query = query.resize((sides[0], sides[1]), images.Resampling.LANCZOS)
    back = np.diag(query.size) @ np.linalg.inv(linear)
    (a, b), (d, e) = (back @ np.linalg.inv(training)).tolist()
    c, f = (-back @ shift).tolist()
    return query.transform(
        size,
        images.Transform.AFFINE,
        (a, b, c, d, e, f),
        resample=images.Resampling.BICUBIC,
        fillcolor=BEYOND,
    )


def outlined(image: Image, outline: Places) -> Image:
    """Return an image with a line about a part of it.

    Args:
        image: RGB.
        outline: corners of the part, in shares of the image's sides.
    """
    from PIL import ImageDraw

    drawn = image.copy()
    corners = _corners(outline, image.size)
    if corners:
        ImageDraw.Draw(drawn).line([*corners, corners[0]], fill=_LINE, width=3)
    return drawn


def difference(first: Image, second: Image, outline: Places) -> Image:
    """Return the absolute difference of two images of one size within an outline."""
    from PIL import Image as images
    from PIL import ImageChops, ImageDraw

    mask = images.new("L", second.size)
    if outline:
        ImageDraw.Draw(mask).polygon(_corners(outline, second.size), fill=255)
    beyond = images.new("RGB", second.size, BEYOND)
    return images.composite(ImageChops.difference(first, second), beyond, mask)


def _corners(outline: Places, size: tuple[int, int]) -> list[tuple[float, float]]:
    return [(x * size[0], y * size[1]) for x, y in outline]
