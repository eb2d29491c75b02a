"""Images in memory, as sampling code has them: arrays, tensors, and iterables of these.

Each becomes the 8-bit RGB image that would be read if it were saved as PNG, so a score does not
tell where an image came from. Values between two levels go to the nearest one.

- A tensor has its channels first, ``[n, C, H, W]`` or ``[C, H, W]``; an array has them last,
  ``[n, H, W, C]``, ``[H, W, C]`` or ``[H, W]``. ``C`` is 1 (grey), 3 (RGB) or 4 (RGB and alpha).
- An iterable gives images or batches of them. Of a tuple, and of a list that begins with a batch,
  only the first element is used: labels follow. Of a dictionary, as an item of a
  ``datasets.Dataset``, the value under one of ``IMAGE_KEYS`` is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lcmem_cli.engine.data.images import upright_rgb
from lcmem_cli.engine.data.sources.arrays import to_bytes
from lcmem_cli.engine.errors import InputError

Images = Image.Image | str | Path | NDArray[Any] | torch.Tensor | Iterable[Any]
"""What is taken for images: one, several, or batches of them; see the module's text."""
ValueRange = tuple[float, float]
UNIT_RANGE: ValueRange = (0.0, 1.0)
IMAGE_KEYS = ("image", "images", "img", "pixel_values", "jpg", "jpeg", "png", "webp")
_CHANNELS = (1, 3, 4)
_ROUNDING = 1e-4


def iter_pictures(
    images: Images, *, value_range: ValueRange = UNIT_RANGE
) -> Iterator[Path | Image.Image]:
    """Return images one by one; what is made of each does not depend on how they are given.

    Args:
        images: see the module's text; strings are paths of image files.
        value_range: black and white of floating-point values; 8-bit values have their own.

    Yields:
        Paths as they are, and everything else as an upright RGB image.

    Raises:
        InputError: something is no image, or has another shape, type or range.
    """
    low, high = value_range
    if not low < high:
        raise InputError(f"value_range must be black and white, such as (-1, 1), not {value_range}")
    if isinstance(images, (str, os.PathLike)):
        yield Path(images)
    elif isinstance(images, Image.Image):
        yield upright_rgb(images)
    elif isinstance(images, torch.Tensor):
        yield from _pictures_of(_channels_last(images), value_range)
    elif isinstance(images, np.ndarray):
        yield from _pictures_of(images, value_range)
    elif isinstance(images, Mapping):
        yield from iter_pictures(_image_of(images), value_range=value_range)
    elif isinstance(images, Iterable) and not isinstance(images, bytes):
        for item in images:
            yield from iter_pictures(_without_labels(item), value_range=value_range)
    else:
        raise InputError(
            "expected images: PIL images, paths, arrays [n, H, W, C], tensors [n, C, H, W], or an "
            f"iterable of these, not {type(images).__name__}"
        )


def _channels_last(images: torch.Tensor) -> NDArray[Any]:
    """Return ``[n, C, H, W]`` or ``[C, H, W]`` as an array with its channels last."""
    if images.ndim not in (3, 4) or images.shape[-3] not in _CHANNELS:
        raise InputError(
            f"a tensor of images must have the shape [n, 3, H, W], not {list(images.shape)}"
        )
    images = images.detach().cpu()
    if images.is_floating_point():  # numpy has no bfloat16
        images = images.to(torch.float32)
    values: NDArray[Any] = images.movedim(-3, -1).numpy()
    return values


def _pictures_of(values: NDArray[Any], value_range: ValueRange) -> Iterator[Image.Image]:
    """Return the images of an array with its channels last."""
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim not in (3, 4) or values.shape[-1] not in _CHANNELS:
        raise InputError(
            f"an array of images must have the shape [n, H, W, 3], not {list(values.shape)}; "
            "where channels come first, pass torch.from_numpy(array)"
        )
    for image in values if values.ndim == 4 else values[None]:
        levels = image if image.dtype == np.uint8 else _levels(image, value_range)
        yield upright_rgb(Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels))


def _levels(image: NDArray[Any], value_range: ValueRange) -> NDArray[np.uint8]:
    """Check ``[H, W, C]`` and bring its values to 8 bits."""
    if not np.issubdtype(image.dtype, np.floating):
        raise InputError(f"images must be uint8 or floating point, not {image.dtype}")
    low, high = value_range
    darkest, brightest = (float(image.min()), float(image.max())) if image.size else value_range
    margin = _ROUNDING * (high - low)
    if not (low - margin <= darkest and brightest <= high + margin):  # also false for NaN
        raise InputError(
            f"image values must lie in [{low:g}, {high:g}], not [{darkest:.4g}, {brightest:.4g}]; "
            "clamp them, or tell black and white, such as value_range=(-1, 1)"
        )
    return to_bytes(image, value_range)


def _image_of(item: Mapping[str, Any]) -> Any:
    for key in IMAGE_KEYS:
        if key in item:
            return item[key]
    raise InputError(
        f"a dictionary needs its image under one of {', '.join(IMAGE_KEYS)}; it has "
        f"{', '.join(map(str, item))}"
    )


def _without_labels(item: Any) -> Any:
    """Return the images of what a DataLoader or a data set gives."""
    is_batch = isinstance(item, list) and bool(item) and getattr(item[0], "ndim", 0) == 4
    return item[0] if is_batch or (isinstance(item, tuple) and item) else item
