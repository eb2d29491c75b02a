"""Local features of a picture: what is needed to align it with others, without its file.

A picture is turned grey, its longer side brought to ``SIDE`` pixels, its contrast evened out. SIFT
finds its keypoints (Lowe 2004); their descriptors are root-normalised (Arandjelovic and Zisserman
2012) and rounded to bytes, so that their products are whole numbers, the same in any order of
summation. A small grey picture stands beside them: it is correlated after the alignment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import ThreadpoolController

from lcmem_cli.engine.files import sha256_bytes

SIDE = 256
"""Longer side in pixels of the picture that keypoints are found in."""
PICTURE_SIDE = 128
"""Longer side in pixels of the small picture, whose pixels are the unit of all places."""
NUM_KEYPOINTS = 400
DESCRIPTOR = 128
"""Values of a descriptor."""
ROW_BYTES = 6 + NUM_KEYPOINTS * (8 + DESCRIPTOR) + PICTURE_SIDE**2
"""Size of one picture's packed features: 70,790 bytes."""
FINGERPRINT = sha256_bytes(f"local features 1/{cv2.__version__.split('.')[0]}/{ROW_BYTES}".encode())
"""Of everything that changes local features."""
_CONTRAST = 0.02
UNIT = 512
"""Length of a descriptor, as rounded to bytes; the dot product of two is exact in float32."""


@dataclasses.dataclass(frozen=True)
class LocalFeatures:
    """What verification keeps of a picture.

    Attributes:
        points: ``[k, 4]`` float32: x, y and size of each keypoint in pixels of ``picture``, and its
            angle in degrees.
        descriptors: ``[k, 128]`` uint8.
        picture: ``[h, w]`` uint8, grey, the longer side ``PICTURE_SIDE`` pixels.
    """

    points: NDArray[np.float32]
    descriptors: NDArray[np.uint8]
    picture: NDArray[np.uint8]

    def packed(self) -> NDArray[np.uint8]:
        """Return everything as ``[ROW_BYTES]`` bytes, from which ``unpacked`` restores it."""
        row = np.zeros(ROW_BYTES, np.uint8)
        parts = (
            np.array([len(self.points), *self.picture.shape], np.int16),
            self.points.astype(np.float16),
            self.descriptors,
            self.picture,
        )
        content = np.concatenate(
            [np.ascontiguousarray(part).view(np.uint8).ravel() for part in parts]
        )
        row[: len(content)] = content
        return row

    def mirrored(self) -> LocalFeatures:
        """Return the features of the picture with left and right exchanged, exactly."""
        points = self.points.copy()
        points[:, 0] = self.picture.shape[1] - 1 - points[:, 0]
        points[:, 3] = (180 - points[:, 3]) % 360
        cells = self.descriptors.reshape(-1, 4, 4, 8)[:, ::-1]
        turned = cells[..., [0, 7, 6, 5, 4, 3, 2, 1]].reshape(-1, DESCRIPTOR)
        return LocalFeatures(points, turned, self.picture[:, ::-1])


def unpacked(row: NDArray[np.uint8]) -> LocalFeatures | None:
    """Return the features that ``LocalFeatures.packed`` made ``[ROW_BYTES]`` bytes of.

    ``None`` for a row of zeros, which stands for an image that could not be read.
    """
    count, height, width = (int(number) for number in row[:6].view(np.int16))
    if not height:
        return None
    ends = np.cumsum([6, count * 8, count * DESCRIPTOR, height * width])
    points, descriptors, picture = (row[start:end] for start, end in itertools.pairwise(ends))
    return LocalFeatures(
        points.view(np.float16).reshape(count, 4).astype(np.float32),
        descriptors.reshape(count, DESCRIPTOR),
        picture.reshape(height, width),
    )


def local_features(image: Image.Image) -> LocalFeatures:
    """Return the local features of a picture.

    Args:
        image: upright, any mode and size.
    """
    grey = np.asarray(image.convert("L"))
    large = _resized(grey, SIDE)
    even = cv2.createCLAHE(2.0, (8, 8)).apply(large)
    found, rows = cv2.SIFT.create(NUM_KEYPOINTS, contrastThreshold=_CONTRAST).detectAndCompute(
        even, None
    )
    picture = _resized(grey, PICTURE_SIDE)
    if rows is None:
        empty = np.zeros((0, DESCRIPTOR), np.uint8)
        return LocalFeatures(np.zeros((0, 4), np.float32), empty, picture)
    keypoints, values = found[:NUM_KEYPOINTS], np.asarray(rows[:NUM_KEYPOINTS], np.float64)
    scale = np.divide(picture.shape[::-1], large.shape[::-1])
    points = np.array(
        [
            (
                (point.pt[0] + 0.5) * scale[0] - 0.5,
                (point.pt[1] + 0.5) * scale[1] - 0.5,
                point.size * scale[0],
                point.angle,
            )
            for point in keypoints
        ],
        np.float16,
    ).astype(np.float32)  # as they are kept
    sums = np.maximum(values.sum(axis=1, keepdims=True), 1)
    descriptors = np.rint(np.sqrt(values / sums) * UNIT).clip(0, 255).astype(np.uint8)
    return LocalFeatures(points, descriptors, picture)


def _resized(grey: NDArray[Any], side: int) -> NDArray[np.uint8]:
    """Bring the longer side to a number of pixels, by area where it shrinks."""
    height, width = grey.shape
    factor = side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(grey, size, interpolation=method), np.uint8)


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Keep OpenCV and BLAS from starting threads: pictures are shared out to threads instead.

    Those of BLAS also go on waiting for work on a core of their own after each product.
    """
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with _loaded_libraries().limit(limits=1, user_api="blas"):
            yield
    finally:
        cv2.setNumThreads(before)


@functools.cache
def _loaded_libraries() -> ThreadpoolController:
    return ThreadpoolController()
