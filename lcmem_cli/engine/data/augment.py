"""Random edits of the second image of a training pair, drawn from the transforms of ``perturb``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from lcmem_cli.engine.data.perturb import TRANSFORMS, Apply, generator
from lcmem_cli.engine.errors import InputError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """One transform with the range that its strength is drawn from.

    Attributes:
        transform: a key of ``perturb.TRANSFORMS``, or ``FilledRotation``.
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

    def __call__(self, image: torch.Tensor, *, seed: int) -> torch.Tensor:
        """Alter an image; the result is a function of the image and the seed.

        Args:
            image: ``[3, H, W]`` float32 in [0, 1]; more than four pixels on each side.
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


_APPLY: Mapping[str, Apply] = {
    **{name: transform.apply for name, transform in TRANSFORMS.items()},
    "FilledRotation": _filled_rotation,
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
        Edit(transform="HorizontalFlip", probability=0.3),
        Edit(transform="VerticalFlip", probability=0.05),
        Edit(transform="CropResize", probability=0.4, low=0.3, high=1),
        Edit(transform="Aspect", probability=0.2, low=0.6, high=1.7, spread="log"),
        Edit(transform="Rotation", probability=0.25, low=-35, high=35),
        Edit(transform="Rotation", probability=0.1, low=-180, high=180),
        Edit(transform="Rotation", probability=0.1, low=90, high=270, spread="step", step=90),
        Edit(transform="Occlusion", probability=0.15, low=0.05, high=0.35),
        Edit(transform="Caption", probability=0.15, low=0.08, high=0.25),
        Edit(transform="Grayscale", probability=0.1),
        Edit(transform="Hue", probability=0.12, low=-0.5, high=0.5),
        Edit(transform="Brightness", probability=0.25, low=0.5, high=2.2, spread="log"),
        Edit(transform="Contrast", probability=0.25, low=0.5, high=2.2, spread="log"),
        Edit(transform="GaussianBlur", probability=0.25, low=0.3, high=8, spread="log"),
        Edit(transform="LowResolution", probability=0.12, low=1.5, high=8, spread="log"),
        Edit(transform="Noise", probability=0.25, low=0.01, high=0.35),
        Edit(transform="JPEGCompression", probability=0.3, low=5, high=95),
    ),
)
"""Real ranges for every family of edits; all combinations occur."""

PRESETS: Mapping[str, Augmentation] = {a.name: a for a in (NONE, REFERENCE, STRONG)}
