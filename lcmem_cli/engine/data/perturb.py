"""Edits of an image: one set of transforms for the robustness study and for training.

The first six transforms and their strengths are those of arXiv 2512.14421 (``REFERENCE_SUITE``);
the others are edits that copies of images undergo in practice. All of them take and return
``[3, H, W]`` images in [0, 1] of the same size.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from lcmem_cli.engine.errors import InputError, nearest

BLUR_KERNEL = 9
VAE_ROUND_TRIP = "VAERoundTrip"
_JPEG = "JPEGCompression"

Apply = Callable[[torch.Tensor, float, np.random.Generator], torch.Tensor]
RoundTrip = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True, order=True)
class Setting:
    """A transform at one strength.

    Attributes:
        transform: a key of ``TRANSFORMS``, or ``VAE_ROUND_TRIP``.
        strength: in the transform's own unit; 1 for those that are either done or not.
    """

    transform: str
    strength: float

    def __str__(self) -> str:
        """Return it as people write it, such as ``Rotation 30`` or ``JPEG quality 10``."""
        if self.transform == _JPEG:
            return f"JPEG quality {shown_strength(self.transform, self.strength)}"
        return f"{self.transform} {self.strength:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """A kind of edit.

    Attributes:
        apply: takes an image ``[3, H, W]`` in [0, 1], a strength and a source of randomness; the
            result may leave [0, 1].
        low: smallest strength.
        high: largest strength.
        meaning: what the strength says, with its unit.
        two_sided: whether smaller and larger strengths may both be harsher.
    """

    apply: Apply
    low: float
    high: float
    meaning: str
    two_sided: bool = False


def perturb(
    image: torch.Tensor,
    transform: str,
    strength: float,
    *,
    seed: int = 0,
    round_trip: RoundTrip | None = None,
) -> torch.Tensor:
    """Apply one setting to one image.

    What is random (noise, the place of a crop or an occlusion) is derived from the seed, the
    image's content and the setting, so it depends on no other image and on no order of work.

    Args:
        image: ``[3, H, W]``, floating point in [0, 1].
        transform: a key of ``TRANSFORMS``, or ``"VAERoundTrip"``.
        strength: in the transform's unit; see ``TRANSFORMS[transform].meaning``.
        seed: any integer.
        round_trip: for ``"VAERoundTrip"``: encodes and decodes images ``[1, 3, H, W]`` in [0, 1].

    Returns:
        ``[3, H, W]`` float32, clamped to [0, 1].

    Raises:
        InputError: unknown transform, strength out of range, or not such an image.

    Example:
        >>> turned = perturb(torch.rand(3, 64, 64), "Rotation", 10)
    """
    setting = Setting(transform, float(strength))
    check_setting(setting)
    _check_image(image)
    image = image.to(torch.float32)
    if transform == VAE_ROUND_TRIP:
        if round_trip is None:
            raise InputError(
                f"{VAE_ROUND_TRIP} needs a codec that can decode; the embedded one is an encoder "
                "only, so pass a full autoencoder or leave this setting out"
            )
        return round_trip(image[None])[0].to(image).clamp(0, 1)
    rng = generator(perturb_seed(seed, _content_hash(image), setting))
    return TRANSFORMS[transform].apply(image, setting.strength, rng).clamp(0, 1)


def perturb_seed(seed: int, content_hash: str, setting: Setting) -> int:
    """Return a 64-bit seed that depends on the three arguments only, in every process alike."""
    text = f"{seed}\0{content_hash}\0{setting.transform}\0{setting.strength!r}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def generator(seed: int) -> np.random.Generator:
    """Return a source of randomness whose numbers are the same on every machine."""
    return np.random.Generator(np.random.Philox(seed % 2**64))


def check_setting(setting: Setting) -> None:
    """Refuse a setting that cannot be applied.

    Raises:
        InputError: unknown transform, or strength out of range.
    """
    if setting.transform == VAE_ROUND_TRIP:
        return
    if setting.transform not in TRANSFORMS:
        raise InputError(
            f"no transform '{setting.transform}'; "
            f"{nearest(setting.transform, [*TRANSFORMS, VAE_ROUND_TRIP])}"
        )
    known = TRANSFORMS[setting.transform]
    if not known.low <= setting.strength <= known.high:
        raise InputError(
            f"{setting.transform}: strength {setting.strength:g} is not in "
            f"[{known.low:g}, {known.high:g}] ({known.meaning})"
        )


def gaussian_blur(image: torch.Tensor, sigma: float, _: np.random.Generator) -> torch.Tensor:
    """Blur with a kernel of nine pixels, which cuts off a sigma above about two."""
    return blur(image, sigma, BLUR_KERNEL)


def blur(image: torch.Tensor, sigma: float, kernel: int) -> torch.Tensor:
    """Blur with an odd number of pixels, fewer where the image is not larger than half of them."""
    reach = min(kernel // 2, image.shape[-2] - 1, image.shape[-1] - 1)  # borders are reflected
    if sigma == 0 or reach == 0:
        return image
    result: torch.Tensor = tv.gaussian_blur(image, [2 * reach + 1] * 2, [sigma] * 2)
    return result


def noise(image: torch.Tensor, std: float, rng: np.random.Generator) -> torch.Tensor:
    """Add independent Gaussian noise to every value."""
    values = rng.standard_normal(tuple(image.shape), dtype=np.float32)
    return image + std * torch.from_numpy(values).to(image.device)


def rotation(image: torch.Tensor, degrees: float, _: np.random.Generator) -> torch.Tensor:
    """Turn counter-clockwise about the centre: nearest neighbour, zeros outside, size kept."""
    result: torch.Tensor = tv.rotate(image, degrees, InterpolationMode.NEAREST, fill=[0.0])
    return result


def brightness(image: torch.Tensor, factor: float, _: np.random.Generator) -> torch.Tensor:
    """Multiply."""
    result: torch.Tensor = tv.adjust_brightness(image, factor)
    return result


def contrast(image: torch.Tensor, factor: float, _: np.random.Generator) -> torch.Tensor:
    """Multiply the distance from the mean of the grey image."""
    result: torch.Tensor = tv.adjust_contrast(image, factor)
    return result


def jpeg_compression(image: torch.Tensor, strength: float, _: np.random.Generator) -> torch.Tensor:
    """Compress with quality ``100 - strength`` and decompress."""
    device = image.device
    eight_bit = (image.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    decoded: torch.Tensor = tv.jpeg(eight_bit, round(100 - strength))
    return decoded.to(device, torch.float32) / 255


def horizontal_flip(image: torch.Tensor, _: float, __: np.random.Generator) -> torch.Tensor:
    """Mirror left and right."""
    return image.flip(-1)


def vertical_flip(image: torch.Tensor, _: float, __: np.random.Generator) -> torch.Tensor:
    """Mirror top and bottom."""
    return image.flip(-2)


def crop_resize(image: torch.Tensor, area: float, rng: np.random.Generator) -> torch.Tensor:
    """Cut out a part of the same shape at a random place and enlarge it to the image's size."""
    height, width = image.shape[-2:]
    top, left, rows, columns = _random_box(height, width, area, rng)
    return resize(image[:, top : top + rows, left : left + columns], height, width)


def stretch(image: torch.Tensor, factor: float, _: np.random.Generator) -> torch.Tensor:
    """Scale the width about the centre: above 1 the sides are cut off, below 1 black is added."""
    height, width = image.shape[-2:]
    if factor >= 1:
        columns = max(1, round(width / factor))
        left = (width - columns) // 2
        return resize(image[:, :, left : left + columns], height, width)
    columns = max(1, round(width * factor))
    left = (width - columns) // 2
    return torch.nn.functional.pad(resize(image, height, columns), (left, width - columns - left))


def occlusion(image: torch.Tensor, area: float, rng: np.random.Generator) -> torch.Tensor:
    """Cover a part of the image's shape, at a random place, with grey."""
    height, width = image.shape[-2:]
    top, left, rows, columns = _random_box(height, width, area, rng)
    result = image.clone()
    result[:, top : top + rows, left : left + columns] = 0.5
    return result


def caption(image: torch.Tensor, share: float, rng: np.random.Generator) -> torch.Tensor:
    """Cover the bottom with a bar of text, black on white or white on black."""
    height, width = image.shape[-2:]
    rows = max(1, round(share * height))
    letters = rng.integers(ord("a"), ord("z") + 1, size=4 * width // rows + 1)
    text = "".join(" " if letter % 6 == 0 else chr(letter) for letter in letters)
    bar = torch.from_numpy(_text_bar(rows, width, text)).to(image)
    if rng.random() < 0.5:
        bar = 1 - bar
    result = image.clone()
    result[:, height - rows :] = bar
    return result


def grayscale(image: torch.Tensor, _: float, __: np.random.Generator) -> torch.Tensor:
    """Take the colour away."""
    result: torch.Tensor = tv.rgb_to_grayscale(image, num_output_channels=3)
    return result


def hue(image: torch.Tensor, turn: float, _: np.random.Generator) -> torch.Tensor:
    """Turn every colour on the colour circle."""
    result: torch.Tensor = tv.adjust_hue(image, turn)
    return result


def low_resolution(image: torch.Tensor, factor: float, _: np.random.Generator) -> torch.Tensor:
    """Shrink and enlarge again."""
    height, width = image.shape[-2:]
    small = resize(image, max(1, round(height / factor)), max(1, round(width / factor)))
    return resize(small, height, width)


def combination(image: torch.Tensor, degree: float, rng: np.random.Generator) -> torch.Tensor:
    """Rotate by 10 degrees, brighten by 0.3, blur by 1 pixel and compress by 50, each times it."""
    image = rotation(image, 10 * degree, rng)
    image = brightness(image, 1 + 0.3 * degree, rng).clamp(0, 1)
    image = gaussian_blur(image, degree, rng)
    return jpeg_compression(image, 50 * degree, rng)


TRANSFORMS: Mapping[str, Transform] = {
    "GaussianBlur": Transform(apply=gaussian_blur, low=0, high=100, meaning="sigma in pixels"),
    "Noise": Transform(apply=noise, low=0, high=10, meaning="standard deviation"),
    "Rotation": Transform(apply=rotation, low=-360, high=360, meaning="degrees counter-clockwise"),
    "Brightness": Transform(apply=brightness, low=0, high=100, meaning="factor"),
    "Contrast": Transform(apply=contrast, low=0, high=100, meaning="factor"),
    "JPEGCompression": Transform(
        apply=jpeg_compression, low=0, high=99, meaning="100 minus the quality"
    ),
    "HorizontalFlip": Transform(apply=horizontal_flip, low=1, high=1, meaning="done or not"),
    "VerticalFlip": Transform(apply=vertical_flip, low=1, high=1, meaning="done or not"),
    "CropResize": Transform(apply=crop_resize, low=0.01, high=1, meaning="share of the area kept"),
    "Stretch": Transform(
        apply=stretch, low=0.1, high=10, meaning="factor of the width", two_sided=True
    ),
    "Occlusion": Transform(apply=occlusion, low=0, high=1, meaning="share of the area covered"),
    "Caption": Transform(apply=caption, low=0, high=1, meaning="share of the height covered"),
    "Grayscale": Transform(apply=grayscale, low=1, high=1, meaning="done or not"),
    "Hue": Transform(apply=hue, low=-0.5, high=0.5, meaning="share of a full turn"),
    "LowResolution": Transform(
        apply=low_resolution, low=1, high=1000, meaning="factor of the side"
    ),
    "Combination": Transform(
        apply=combination, low=0, high=1.9, meaning="multiple of the single edits"
    ),
}


def _settings(strengths: Mapping[str, tuple[float, ...]]) -> tuple[Setting, ...]:
    return tuple(Setting(name, value) for name, values in strengths.items() for value in values)


def strength_axis(transform: str) -> str:
    """Return what an axis of a transform's strengths is called: unit, and where it is harsher."""
    if transform == _JPEG:
        return "quality (harsher to the right)"
    if transform not in TRANSFORMS:
        return "strength"
    kind = TRANSFORMS[transform]
    return kind.meaning if kind.two_sided else f"{kind.meaning} (harsher to the right)"


def shown_strength(transform: str, strength: float) -> str:
    """Return a strength as an axis shows it: JPEG by its quality, as everyone knows it."""
    return f"{100 - strength if transform == _JPEG else strength:g}"


REFERENCE_SUITE = _settings(
    {
        "GaussianBlur": (0.1, 1.0, 2.0, 6.0),
        "Noise": (0.01, 0.1, 0.2, 0.3),
        "Rotation": (5.0, 10.0, 20.0, 30.0),
        "Brightness": (1.1, 1.3, 1.6, 2.0),
        "Contrast": (1.1, 1.3, 1.6, 2.0),
        "JPEGCompression": (5.0, 30.0, 60.0, 90.0),
    }
)
"""The 24 settings of arXiv 2512.14421."""

EXTENDED_SUITE = REFERENCE_SUITE + _settings(
    {
        "HorizontalFlip": (1.0,),
        "VerticalFlip": (1.0,),
        "CropResize": (0.75, 0.5),
        "Rotation": (45.0, 90.0, 180.0),
        "Stretch": (0.67, 1.5),
        "Occlusion": (0.25,),
        "Caption": (0.15,),
        "Grayscale": (1.0,),
        "Hue": (0.1, 0.25),
        "LowResolution": (6.0,),
        "Combination": (1.0, 1.5),
    }
)
"""The reference's settings and harder ones. A VAE round trip needs a decoder: add
``Setting(VAE_ROUND_TRIP, 1.0)`` where there is one."""


def _check_image(image: torch.Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3:
        raise InputError(f"an image must have the shape [3, H, W], not {list(image.shape)}")
    if not image.is_floating_point():
        raise InputError(f"an image must be floating point in [0, 1], not {image.dtype}")
    if not image.numel():
        raise InputError(f"an image must have pixels, not the shape {list(image.shape)}")
    low, high = (float(value) for value in torch.aminmax(image))
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # also refuses NaN
        raise InputError(f"image values must lie in [0, 1], not [{low:.4g}, {high:.4g}]")


def _content_hash(image: torch.Tensor) -> str:
    eight_bit = (image * 255).round().to("cpu", torch.uint8).contiguous().numpy()
    return hashlib.blake2b(eight_bit.tobytes(), digest_size=16).hexdigest()


def _random_box(
    height: int, width: int, area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a box of the image's shape with a share of its area."""
    side = math.sqrt(area)
    rows, columns = max(1, round(side * height)), max(1, round(side * width))
    if area == 0:
        rows = columns = 0
    top = int(rng.integers(height - rows + 1))
    left = int(rng.integers(width - columns + 1))
    return top, left, rows, columns


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize ``[3, H, W]`` bilinearly, with antialias where it shrinks."""
    return torch.nn.functional.interpolate(
        image[None], size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )[0]


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _text_bar(height: int, width: int, text: str) -> NDArray[np.float32]:
    """Draw black text on white: ``[height, width]`` in [0, 1]."""
    bar = Image.new("L", (width, height), 255)
    size = max(6, round(height * 0.6))
    ImageDraw.Draw(bar).text((height * 0.2, height * 0.1), text, fill=0, font=_font(size))
    shades: NDArray[np.float32] = np.divide(np.asarray(bar), 255, dtype=np.float32)
    return shades
