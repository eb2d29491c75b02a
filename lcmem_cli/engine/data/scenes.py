"""Drawn scenes: licence-free pictures for the demonstration, any number of them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_SHAPES = ("ellipse", "rectangle", "polygon")


def draw_scene(seed: int, *, side: int = 192) -> Image.Image:
    """Draw a picture of coloured shapes on a shaded ground.

    Args:
        seed: the picture is a function of it and of ``side``.
        side: in pixels.

    Returns:
        RGB, ``side`` x ``side``.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    angle = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + 0.5 * np.sin(rng.uniform(1, 6) * (x * np.cos(angle) + y * np.sin(angle)) + angle)
    low, high = rng.uniform(0, 255, (2, 3))
    ground = low + ramp[..., None] * (high - low)
    image = Image.fromarray(ground.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(5, 12))):
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        centre, size = rng.uniform(0.05, 0.95, 2) * side, rng.uniform(0.06, 0.3, 2) * side
        box = [*(centre - size / 2), *(centre + size / 2)]
        shape = _SHAPES[int(rng.integers(len(_SHAPES)))]
        if shape == "ellipse":
            draw.ellipse(box, fill=colour)
        elif shape == "rectangle":
            draw.rectangle(box, fill=colour)
        else:
            turns = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 8))))
            points = centre + np.stack([np.cos(turns), np.sin(turns)], 1) * size
            draw.polygon([tuple(point) for point in points], fill=colour)
    return image.filter(ImageFilter.GaussianBlur(0.6))
