"""Random edits of the second image of a training pair, drawn from the transforms of ``perturb``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from lcmem_cli.engine.data.perturb import TRANSFORMS, Apply, blur, generator, resize
from lcmem_cli.engine.errors import InputError, nearest

# Of height to width of a freely shaped box, relative to the image's.
_MAX_RATIO = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """One transform with the range that its strength is drawn from.

    Attributes:
        transform: a key of ``perturb.TRANSFORMS``, or one of this module's own variants:
            ``FilledRotation`` (degrees), ``FreeCrop`` (share of the area), ``Cover`` (share of the
            area), ``WideBlur`` (sigma as a share of the side).
        probability: that it is applied at all.
        low: smallest strength, in the transform's unit.
        high: largest strength.
        spread: ``uniform``; ``log``: uniform in the logarithm; ``step``: one of ``low``,
            ``low + step`` and so on up to ``high``.
        step: distance of the strengths of ``spread="step"``.
    """

    transform: str
    probability: float
    low: float = 1.0
    high: float = 1.0
    spread: Literal["uniform", "log", "step"] = "uniform"
    step: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what could not be drawn."""
        if self.transform not in _APPLY:
            raise InputError(f"no transform '{self.transform}'; {nearest(self.transform, _APPLY)}")
        if not 0 <= self.probability <= 1:
            raise InputError(f"{self.transform}: probability {self.probability} is not in [0, 1]")
        if self.low > self.high or (self.spread == "log" and self.low <= 0):
            raise InputError(f"{self.transform}: [{self.low}, {self.high}] is no usable range")

    def draw(self, rng: np.random.Generator) -> float:
        """Draw a strength."""
        if self.spread == "log":
            return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        if self.spread == "step":
            return self.low + self.step * int(
                rng.integers(int((self.high - self.low) / self.step + 1e-9) + 1)
            )
        return float(rng.uniform(self.low, self.high))


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A sequence of random edits.

    Attributes:
        name: of the preset, recorded with a training.
        edits: in the order in which they are applied, each independently of the others.
    """

    name: str
    edits: tuple[Edit, ...]

    @staticmethod
    def from_preset(name: str) -> Augmentation:
        """Return a preset: ``none``, ``reference`` or ``strong``.

        Raises:
            InputError: no such preset.
        """
        if name not in PRESETS:
            raise InputError(f"no augmentation preset '{name}'; {nearest(name, PRESETS)}")
        return PRESETS[name]

    def drawn(self, count: int, seed: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Return a transform of images and their positions below ``count``.

        Each position has a seed of its own, so that an edit depends on no other image.
        """
        seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed))
        return lambda image, position: self(image, seed=int(seeds[position]))

    def __call__(self, image: torch.Tensor, *, seed: int) -> torch.Tensor:
        """Alter an image; the result is a function of the image and the seed.

        Args:
            image: ``[3, H, W]`` float32 in [0, 1].
            seed: any integer.

        Returns:
            ``[3, H, W]`` float32 in [0, 1]; the image itself where no edit was drawn.
        """
        rng = generator(seed)
        for edit in self.edits:
            if rng.random() < edit.probability:
                image = _APPLY[edit.transform](image, edit.draw(rng), rng).clamp(0, 1)
        return image


def _filled_rotation(image: torch.Tensor, degrees: float, _: np.random.Generator) -> torch.Tensor:
    """Turn counter-clockwise about the centre: bilinear, outside is the image's minimum."""
    fill = [float(image.min())]
    result: torch.Tensor = tv.rotate(image, degrees, InterpolationMode.BILINEAR, fill=fill)
    return result


def _free_crop(image: torch.Tensor, area: float, rng: np.random.Generator) -> torch.Tensor:
    """Cut out a part of any shape at a random place and enlarge it to the image's size."""
    top, left, rows, columns = _free_box(image, area, rng)
    return resize(image[:, top : top + rows, left : left + columns], *image.shape[-2:])


def _cover(image: torch.Tensor, area: float, rng: np.random.Generator) -> torch.Tensor:
    """Cover a part of any shape, at a random place, with black, grey, white or a colour."""
    top, left, rows, columns = _free_box(image, area, rng)
    colour = [rng.choice((0.0, 0.5, 1.0))] * 3 if rng.random() < 0.6 else rng.random(3).tolist()
    result = image.clone()
    result[:, top : top + rows, left : left + columns] = image.new_tensor(colour)[:, None, None]
    return result


def _wide_blur(image: torch.Tensor, share: float, _: np.random.Generator) -> torch.Tensor:
    """Blur by a share of the image's side, with a kernel that is wide enough for it."""
    sigma = share * min(image.shape[-2:])
    return blur(image, sigma, 2 * math.ceil(2 * sigma) + 1)


def _free_box(
    image: torch.Tensor, area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a box with a share of the area."""
    height, width = image.shape[-2:]
    ratio = math.exp(rng.uniform(-0.5, 0.5) * math.log(_MAX_RATIO))
    rows = min(height, max(1, round(height * math.sqrt(area) * ratio)))
    columns = min(width, max(1, round(width * math.sqrt(area) / ratio)))
    return (
        int(rng.integers(height - rows + 1)),
        int(rng.integers(width - columns + 1)),
        rows,
        columns,
    )


_APPLY: Mapping[str, Apply] = {
    **{name: transform.apply for name, transform in TRANSFORMS.items()},
    "FilledRotation": _filled_rotation,
    "FreeCrop": _free_crop,
    "Cover": _cover,
    "WideBlur": _wide_blur,
}

NONE = Augmentation("none", ())

REFERENCE = Augmentation(
    "reference",
    (
        Edit(transform="FilledRotation", probability=0.5, low=-20, high=20),
        Edit(transform="HorizontalFlip", probability=0.5),
        Edit(transform="GaussianBlur", probability=1, low=0, high=0.2),
        Edit(transform="Noise", probability=1, low=0.05, high=0.05),
        Edit(transform="JPEGCompression", probability=0.5, low=5, high=90),
    ),
)
"""What training in arXiv 2512.14421 effectively does. Its brightness and contrast changes have the
range [1, 1], so they do nothing and are left out; its blur is too small to be seen."""

STRONG = Augmentation(
    "strong",
    (
        Edit(transform="FreeCrop", probability=0.45, low=0.35, high=1),
        Edit(transform="Stretch", probability=0.08, low=0.5, high=1, spread="log"),
        Edit(transform="HorizontalFlip", probability=0.3),
        Edit(transform="VerticalFlip", probability=0.06),
        Edit(transform="Rotation", probability=0.18, low=90, high=270, spread="step", step=90),
        Edit(transform="Rotation", probability=0.18, low=-35, high=35),
        Edit(transform="Rotation", probability=0.18, low=-180, high=180),
        Edit(transform="Brightness", probability=0.2, low=0.5, high=2.2, spread="log"),
        Edit(transform="Contrast", probability=0.2, low=0.5, high=2.2, spread="log"),
        Edit(transform="Hue", probability=0.12, low=-0.5, high=0.5),
        Edit(transform="Grayscale", probability=0.1),
        Edit(transform="Cover", probability=0.18, low=0.05, high=0.35),
        Edit(transform="Caption", probability=0.12, low=0.08, high=0.28),
        Edit(transform="GaussianBlur", probability=0.1, low=0.3, high=8, spread="log"),
        Edit(transform="WideBlur", probability=0.08, low=0.001, high=0.018, spread="log"),
        Edit(transform="LowResolution", probability=0.12, low=1.5, high=8),
        Edit(transform="Noise", probability=0.2, low=0.01, high=0.35),
        Edit(transform="JPEGCompression", probability=0.2, low=5, high=95),
    ),
)
"""Real ranges for every family of edits, three on average; all combinations occur."""

PRESETS: Mapping[str, Augmentation] = {a.name: a for a in (NONE, REFERENCE, STRONG)}
