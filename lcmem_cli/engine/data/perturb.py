"""One set of image perturbations, for measuring robustness and for training.

The reference suite is that of arXiv 2512.14421 (24 settings); the extended suite adds the edits
that copies really undergo.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable

import torch
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from lcmem_cli.engine.errors import InputError, nearest

BLUR_KERNEL = 9
CAPTION_TEXT = "sample caption"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A transform at one strength."""

    transform: str
    strength: float

    def __str__(self) -> str:
        """Return for example ``Rotation 30``."""
        return f"{self.transform} {self.strength:g}"


REFERENCE_SUITE: tuple[Setting, ...] = tuple(
    Setting(transform, strength)
    for transform, strengths in (
        ("GaussianBlur", (0.1, 1.0, 2.0, 6.0)),
        ("Noise", (0.01, 0.1, 0.2, 0.3)),
        ("Rotation", (5.0, 10.0, 20.0, 30.0)),
        ("Brightness", (1.1, 1.3, 1.6, 2.0)),
        ("Contrast", (1.1, 1.3, 1.6, 2.0)),
        ("JPEGCompression", (5.0, 30.0, 60.0, 90.0)),
    )
    for strength in strengths
)

EXTENDED_SUITE: tuple[Setting, ...] = (
    *REFERENCE_SUITE,
    Setting("Rotation", 45.0),
    Setting("Rotation", 90.0),
    Setting("Rotation", 180.0),
    Setting("HorizontalFlip", 1.0),
    Setting("VerticalFlip", 1.0),
    Setting("CropResize", 0.75),
    Setting("CropResize", 0.5),
    Setting("Stretch", 1.5),
    Setting("Occlusion", 0.25),
    Setting("Caption", 0.15),
    Setting("Grayscale", 1.0),
    Setting("Hue", 0.25),
    Setting("LowResolution", 6.0),
    Setting("Combination", 1.0),
)


def perturb(
    image: torch.Tensor,
    transform: str,
    strength: float,
    *,
    seed: int = 0,
    round_trip: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Apply one perturbation.

    Args:
        image: ``[3, H, W]`` float in [0, 1].
        transform: a name of ``TRANSFORMS``.
        strength: ``GaussianBlur`` sigma in pixels (kernel 9), ``Noise`` standard deviation,
            ``Rotation`` degrees counter-clockwise about the centre (nearest neighbour, zero fill),
            ``Brightness`` and ``Contrast`` factor (contrast about the mean of the grey image),
            ``JPEGCompression`` 100 minus the quality, ``CropResize`` share of the area kept (the
            centre, resized back), ``Stretch`` factor of the width (centre crop), ``Occlusion``
            share of the area covered, ``Caption`` share of the height taken by a text bar,
            ``Hue`` shift in turns, ``LowResolution`` factor of shrinking. ``HorizontalFlip``,
            ``VerticalFlip``, ``Grayscale`` take 1; ``Combination`` 1 is rotation by 10 degrees,
            brightness 1.3, blur 1 and JPEG quality 50, other strengths scale these;
            ``VAERoundTrip`` takes 1 and needs ``round_trip``.
        seed: of the noise and of the occluded place.
        round_trip: decodes what it encodes, ``[1, 3, H, W] -> [1, 3, H, W]``.

    Returns:
        ``[3, H, W]`` float32, clamped to [0, 1].

    Raises:
        InputError: unknown transform, strength out of range, or not an image tensor.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise InputError(
            f"image must be a float tensor [3, H, W], not {image.dtype} {list(image.shape)}"
        )
    image = image.to(torch.float32)
    if transform == "VAERoundTrip":
        if round_trip is None:
            raise InputError("VAERoundTrip needs a codec with its decoder (a diffusers folder)")
        return round_trip(image[None])[0].clamp(0, 1)
    if transform not in TRANSFORMS:
        raise InputError(f"unknown transform '{transform}'; {nearest(transform, TRANSFORMS)}")
    low, high, apply = TRANSFORMS[transform]
    if not low <= strength <= high:
        raise InputError(f"{transform}: strength {strength:g} is not within {low:g} to {high:g}")
    return apply(image, strength, seed).clamp(0, 1)


def perturb_seed(seed: int, content_hash: str, setting: Setting) -> int:
    """Return the seed of one (image, setting): independent of order, batches and workers."""
    text = f"{seed}/{content_hash}/{setting.transform}/{setting.strength!r}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def blur(image: torch.Tensor, sigma: float, *, kernel: int = BLUR_KERNEL) -> torch.Tensor:
    """Blur with a Gaussian truncated to ``kernel`` pixels; sigma 0 leaves the image."""
    if sigma <= 0:
        return image
    # Reflection needs a side larger than half the kernel.
    kernel = min(kernel, 2 * ((min(image.shape[-2:]) - 1) // 2) + 1)
    return TF.gaussian_blur(image, [kernel, kernel], [sigma, sigma])


def add_noise(image: torch.Tensor, std: float, seed: int) -> torch.Tensor:
    """Add seeded Gaussian noise."""
    generator = torch.Generator().manual_seed(seed)
    return image + std * torch.randn(image.shape, generator=generator)


def rotate(image: torch.Tensor, degrees: float) -> torch.Tensor:
    """Rotate counter-clockwise about the centre: nearest neighbour, zero fill, size kept."""
    return TF.rotate(image, degrees, interpolation=InterpolationMode.NEAREST, fill=[0.0])


def brighten(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply by a factor."""
    return (image * factor).clamp(0, 1)


def change_contrast(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Scale about the mean of the grey image, as torchvision does."""
    return TF.adjust_contrast(image, factor)


def jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """Compress to JPEG and back; quality from 1 to 100."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    decoded = decode_jpeg(encode_jpeg(pixels, quality=quality), mode=ImageReadMode.RGB)
    return decoded.to(torch.float32) / 255


def crop_resize(image: torch.Tensor, area: float) -> torch.Tensor:
    """Keep the central share of the area and resize it back."""
    height, width = image.shape[-2:]
    side = math.sqrt(area)
    kept = [max(1, round(height * side)), max(1, round(width * side))]
    return TF.resize(TF.center_crop(image, kept), [height, width], antialias=True)


def stretch(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Widen by a factor and cut the centre out."""
    height, width = image.shape[-2:]
    wide = TF.resize(image, [height, max(width, round(width * factor))], antialias=True)
    return TF.center_crop(wide, [height, width])


def occlude(image: torch.Tensor, area: float, seed: int) -> torch.Tensor:
    """Cover a rectangle of the image's shape with grey, at a seeded place."""
    height, width = image.shape[-2:]
    side = math.sqrt(area)
    tall, wide = round(height * side), round(width * side)
    generator = torch.Generator().manual_seed(seed)
    top = int(torch.randint(0, height - tall + 1, (1,), generator=generator))
    left = int(torch.randint(0, width - wide + 1, (1,), generator=generator))
    image = image.clone()
    image[:, top : top + tall, left : left + wide] = 0.5
    return image


def caption(image: torch.Tensor, share: float, text: str = CAPTION_TEXT) -> torch.Tensor:
    """Lay a black bar with white text over the bottom of the image."""
    from PIL import Image, ImageDraw

    height, width = image.shape[-2:]
    bar = max(1, round(height * share))
    drawing = Image.new("L", (width, bar))
    size = max(6, round(bar * 0.6))
    ImageDraw.Draw(drawing).text((width // 20, bar // 6), text, fill=255, font_size=size)
    image = image.clone()
    image[:, height - bar :] = TF.pil_to_tensor(drawing).to(torch.float32) / 255
    return image


def grayscale(image: torch.Tensor) -> torch.Tensor:
    """Remove the colour."""
    return TF.rgb_to_grayscale(image, num_output_channels=3)


def shift_hue(image: torch.Tensor, turns: float) -> torch.Tensor:
    """Turn the colour wheel; from -0.5 to 0.5."""
    return TF.adjust_hue(image, turns)


def lower_resolution(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Shrink by a factor and enlarge again."""
    height, width = image.shape[-2:]
    small = [max(1, round(height / factor)), max(1, round(width / factor))]
    return TF.resize(TF.resize(image, small, antialias=True), [height, width], antialias=True)


def combine(image: torch.Tensor, strength: float) -> torch.Tensor:
    """Rotate, brighten, blur and compress, as one edit."""
    image = rotate(image, 10 * strength)
    image = brighten(image, 1 + 0.3 * strength)
    image = blur(image, strength)
    return jpeg(image, max(1, round(100 - 50 * strength)))


_Apply = Callable[[torch.Tensor, float, int], torch.Tensor]

TRANSFORMS: dict[str, tuple[float, float, _Apply]] = {
    "GaussianBlur": (0, 100, lambda image, s, _: blur(image, s)),
    "Noise": (0, 10, add_noise),
    "Rotation": (-360, 360, lambda image, s, _: rotate(image, s)),
    "Brightness": (0, 100, lambda image, s, _: brighten(image, s)),
    "Contrast": (0, 100, lambda image, s, _: change_contrast(image, s)),
    "JPEGCompression": (0, 99, lambda image, s, _: jpeg(image, round(100 - s))),
    "HorizontalFlip": (1, 1, lambda image, _s, _: image.flip(-1)),
    "VerticalFlip": (1, 1, lambda image, _s, _: image.flip(-2)),
    "CropResize": (0.01, 1, lambda image, s, _: crop_resize(image, s)),
    "Stretch": (1, 10, lambda image, s, _: stretch(image, s)),
    "Occlusion": (0, 1, occlude),
    "Caption": (0, 1, lambda image, s, _: caption(image, s)),
    "Grayscale": (1, 1, lambda image, _s, _: grayscale(image)),
    "Hue": (-0.5, 0.5, lambda image, s, _: shift_hue(image, s)),
    "LowResolution": (1, 64, lambda image, s, _: lower_resolution(image, s)),
    "Combination": (0, 1.9, lambda image, s, _: combine(image, s)),
}
