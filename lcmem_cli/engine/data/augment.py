"""What training does to the second image of a pair.

``reference`` is the effective published set of arXiv 2512.14421: of its blur of at most 0.2 pixels
something remains, of its brightness and contrast factors of exactly 1 nothing, so these two are
left out. ``strong`` has real ranges for every family of edits that robustness is measured on.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from lcmem_cli.engine.data import perturb as edits
from lcmem_cli.engine.errors import InputError, nearest

PRESETS = ("none", "reference", "strong")
_LETTERS = "abcdefghijklmnopqrstuvwxyz     "


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrongRanges:
    """Ranges of the ``strong`` preset; lengths are relative to the image's side.

    Each edit happens with its own probability, so that most images get several.
    """

    geometry_probability: float = 0.75
    min_area: float = 0.3
    max_stretch: float = 1.6
    small_rotation_probability: float = 0.35
    small_rotation: float = 35.0
    quarter_turn_probability: float = 0.12
    any_rotation_probability: float = 0.15
    flip_probability: float = 0.35
    vertical_flip_probability: float = 0.08
    colour_probability: float = 0.5
    brightness: tuple[float, float] = (0.5, 2.2)
    contrast: tuple[float, float] = (0.5, 2.2)
    hue: float = 0.5
    hue_probability: float = 0.25
    grayscale_probability: float = 0.15
    occlusion_probability: float = 0.15
    occlusion_area: tuple[float, float] = (0.05, 0.35)
    caption_probability: float = 0.15
    caption_share: tuple[float, float] = (0.08, 0.28)
    blur_probability: float = 0.2
    blur_sigma: tuple[float, float] = (0.001, 0.018)
    low_resolution_probability: float = 0.15
    low_resolution: tuple[float, float] = (1.5, 7.0)
    noise_probability: float = 0.25
    noise_std: tuple[float, float] = (0.01, 0.35)
    jpeg_probability: float = 0.3
    jpeg_quality: tuple[int, int] = (5, 90)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A seeded change of one image.

    Attributes:
        preset: ``none``, ``reference`` or ``strong``.
        ranges: of ``strong``.
    """

    preset: Literal["none", "reference", "strong"]
    ranges: StrongRanges = StrongRanges()

    @classmethod
    def from_preset(cls, preset: str) -> Augmentation:
        """Return the augmentation of a preset.

        Raises:
            InputError: unknown preset.
        """
        for known in PRESETS:
            if preset == known:
                return cls(known)  # type: ignore[arg-type]
        raise InputError(f"unknown augmentation preset '{preset}'; {nearest(preset, PRESETS)}")

    def __call__(self, image: torch.Tensor, *, seed: int) -> torch.Tensor:
        """Alter an image.

        Args:
            image: ``[3, H, W]`` float in [0, 1].
            seed: the result is a function of the image and the seed alone.

        Returns:
            ``[3, H, W]`` float32 in [0, 1].
        """
        rng = np.random.default_rng(seed)
        if self.preset == "reference":
            image = _reference(image, rng)
        elif self.preset == "strong":
            image = _strong(image, rng, self.ranges)
        return image.clamp(0, 1)


def _reference(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    if rng.random() < 0.5:
        image = TF.rotate(
            image,
            rng.uniform(-20, 20),
            interpolation=InterpolationMode.BILINEAR,
            fill=[float(image.min())],
        )
    if rng.random() < 0.5:
        image = image.flip(-1)
    image = edits.blur(image, rng.uniform(0, 0.2))
    image = edits.add_noise(image, 0.05, int(rng.integers(2**62)))
    if rng.random() < 0.5:
        image = edits.jpeg(image, int(rng.integers(10, 96)))
    return image


def _strong(image: torch.Tensor, rng: np.random.Generator, r: StrongRanges) -> torch.Tensor:
    side = min(image.shape[-2:])
    image = _geometry(image, rng, r)
    if rng.random() < r.colour_probability:
        image = edits.brighten(image, _log_uniform(rng, r.brightness))
        image = edits.change_contrast(image, _log_uniform(rng, r.contrast)).clamp(0, 1)
    if rng.random() < r.hue_probability:
        image = edits.shift_hue(image, rng.uniform(-r.hue, r.hue))
    if rng.random() < r.grayscale_probability:
        image = edits.grayscale(image)
    if rng.random() < r.occlusion_probability:
        image = _cover(image, rng.uniform(*r.occlusion_area), rng)
    if rng.random() < r.caption_probability:
        letters = rng.integers(len(_LETTERS), size=int(rng.integers(4, 24)))
        image = edits.caption(
            image, rng.uniform(*r.caption_share), "".join(_LETTERS[i] for i in letters)
        )
    if rng.random() < r.blur_probability:
        sigma = _log_uniform(rng, r.blur_sigma) * side
        image = edits.blur(image, sigma, kernel=2 * math.ceil(2 * sigma) + 1)
    if rng.random() < r.low_resolution_probability:
        image = edits.lower_resolution(image, _log_uniform(rng, r.low_resolution))
    if rng.random() < r.noise_probability:
        std = _log_uniform(rng, r.noise_std)
        image = edits.add_noise(image, std, int(rng.integers(2**62))).clamp(0, 1)
    if rng.random() < r.jpeg_probability:
        image = edits.jpeg(image, int(rng.integers(r.jpeg_quality[0], r.jpeg_quality[1] + 1)))
    return image


def _geometry(image: torch.Tensor, rng: np.random.Generator, r: StrongRanges) -> torch.Tensor:
    """Crop, stretch, rotate and flip in one resampling."""
    scale_x = scale_y = 1.0
    shift_x = shift_y = angle = 0.0
    if rng.random() < r.geometry_probability:
        area = _log_uniform(rng, (r.min_area, 1.0))
        ratio = math.sqrt(_log_uniform(rng, (1 / r.max_stretch, r.max_stretch)))
        scale_x = min(1.0, math.sqrt(area) * ratio)
        scale_y = min(1.0, math.sqrt(area) / ratio)
        shift_x = rng.uniform(-1, 1) * (1 - scale_x)
        shift_y = rng.uniform(-1, 1) * (1 - scale_y)
    draw = rng.random()
    if draw < r.small_rotation_probability:
        angle = rng.uniform(-r.small_rotation, r.small_rotation)
    elif (draw := draw - r.small_rotation_probability) < r.quarter_turn_probability:
        angle = 90.0 * int(rng.integers(1, 4))
    elif draw - r.quarter_turn_probability < r.any_rotation_probability:
        angle = rng.uniform(-180, 180)
    flip_x = -1.0 if rng.random() < r.flip_probability else 1.0
    flip_y = -1.0 if rng.random() < r.vertical_flip_probability else 1.0
    if (scale_x, scale_y, angle, flip_x, flip_y) == (1.0, 1.0, 0.0, 1.0, 1.0):
        return image
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    matrix = torch.tensor(
        [
            [scale_x * flip_x * cos, -scale_x * flip_x * sin, shift_x],
            [scale_y * flip_y * sin, scale_y * flip_y * cos, shift_y],
        ],
        dtype=torch.float32,
    )
    grid = F.affine_grid(matrix[None], [1, *image.shape], align_corners=False)
    mode = "bilinear" if rng.random() < 0.7 else "nearest"
    return F.grid_sample(image[None], grid, mode=mode, align_corners=False)[0]


def _cover(image: torch.Tensor, area: float, rng: np.random.Generator) -> torch.Tensor:
    """Cover a rectangle with one colour or with noise."""
    height, width = image.shape[-2:]
    ratio = math.sqrt(_log_uniform(rng, (0.5, 2.0)))
    tall = min(height, max(1, round(height * math.sqrt(area) * ratio)))
    wide = min(width, max(1, round(width * math.sqrt(area) / ratio)))
    top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    image = image.clone()
    colour = rng.choice([0.0, 0.5, 1.0]) * np.ones(3) if rng.random() < 0.6 else rng.random(3)
    image[:, top : top + tall, left : left + wide] = torch.tensor(
        colour, dtype=torch.float32
    ).reshape(3, 1, 1)
    return image


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1])))
