"""What is left of the difference of two aligned pictures: tells copies from near look-alikes.

Evidence counts the patches that agree. Pictures of one person in one pose agree nearly everywhere
and reach as much of it as a compressed copy. But between them something small has moved, such as
eyes or lips, while a copy differs by as little everywhere. So here the largest difference counts.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.verification.agreement import warped
from lcmem_cli.engine.verification.alignment import Matrix
from lcmem_cli.engine.verification.evidence import Found
from lcmem_cli.engine.verification.features import LocalFeatures

COPY_EVIDENCE = 8.0
"""Evidence below which two pictures of one set are not called one."""
SURE_EVIDENCE = 40.0
"""Evidence that counts alone. Of two different pictures the strongest had 30: one face in one pose
under two lights."""
COPY_RESIDUAL = 0.125
"""Residual, in the frame of either, up to which they are called one. All of 60 altered copies of
small faces had less, and none of 232 pairs of different pictures of one face."""
_LARGEST = 99.8
_BLUR = 1.6
_STEPS = 30


def is_copy(found: Found, query: LocalFeatures, training: LocalFeatures) -> bool:
    """Return whether two aligned pictures of one set are one picture, altered or not.

    Args:
        found: the alignment, with at least ``COPY_EVIDENCE``.
        query: one of them.
        training: the other.
    """
    if found.value >= SURE_EVIDENCE:
        return True
    back = np.asarray(cv2.invertAffineTransform(found.matrix), np.float64)
    pairs = ((found.matrix, query, training), (back, training, query))
    return any(residual(*pair) <= COPY_RESIDUAL for pair in pairs)


def residual(matrix: Matrix, query: LocalFeatures, training: LocalFeatures) -> float:
    """Return the largest grey difference after alignment, in standard deviations of the picture.

    Brightness and contrast are matched first, one in 500 pixels may differ by more, and the
    alignment is made as fine as it can be: half a pixel off looks like a difference.
    """
    moved = _finer(matrix, query, training)
    return min(_residual(each, query, training) for each in (matrix, moved))


def _residual(matrix: Matrix, query: LocalFeatures, training: LocalFeatures) -> float:
    first, covered = warped(matrix, query, training)
    second = training.picture.astype(np.float32)
    inside = cv2.erode(covered, np.ones((3, 3)), borderValue=0) > 0
    if inside.sum() < 2:
        return float("inf")
    a, b = (cv2.GaussianBlur(part, (0, 0), _BLUR)[inside] for part in (first, second))
    slope = np.mean((a - a.mean()) * (b - b.mean())) / (b.var() + 1e-6)
    differences = np.abs(a - a.mean() - slope * (b - b.mean())) / (a.std() + 1)
    return float(np.percentile(differences, _LARGEST))


def _finer(matrix: Matrix, query: LocalFeatures, training: LocalFeatures) -> Matrix:
    """Return the map nearby at which both whole pictures correlate most."""
    inverse = cv2.invertAffineTransform(matrix).astype(np.float32)
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, _STEPS, 1e-5)
    everywhere: NDArray[np.uint8] = np.ones(query.picture.shape, np.uint8)
    try:
        _, moved = cv2.findTransformECC(
            training.picture, query.picture, inverse, cv2.MOTION_AFFINE, criteria, everywhere, 3
        )
        return np.asarray(cv2.invertAffineTransform(moved), np.float64)
    except cv2.error:  # the pictures do not correlate where it began
        return matrix
