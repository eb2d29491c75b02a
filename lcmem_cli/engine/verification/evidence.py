"""What the alignment of two pictures shows, as a value and in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.verification.agreement import Agreement, Shades, agreement
from lcmem_cli.engine.verification.alignment import (
    Matrix,
    Query,
    coarse_alignment,
    keypoint_alignment,
    prepared,
    refined,
)
from lcmem_cli.engine.verification.features import LocalFeatures

SAME_PICTURE = 3.0
"""Value from which on two images are said to show the same picture."""
_HIGHEST = 0.98
_MANY_INLIERS = 15
SURELY_SAME = 25.0
"""Evidence of a copy beyond doubt.

Of the 180 closest pairs of different identities in 30 data sets the strongest had 10. Nine of ten
mirrored copies, and three of four JPEGs of quality 75, had more than 25.
"""
_SURE = 8.0
_CORRELATED = 6
_SMALLEST_SHARE = 0.02
_IN_PART = 0.7
_BRIGHTER = 0.03
"""Least difference that is told. This limit and the next three lie beyond what ten pictures of five
kinds had when they were only turned, mirrored, cropped or compressed."""
_MORE_CONTRAST = 1.2
_BLURRED = 0.7
_NOISY = 1.6

WEIGHTS = np.array(
    [
        [-1.08, 0.62, -0.29, 1.59, 5.24, 3.08, 1.79, 1.04, -0.2, 0.54, 8.03, 4.7],
        [-1.47, -0.13, -0.38, 1.14, 11.57, 3.77, 2.15, -0.43, -0.3, 1.33, 2.39, 3.04],
    ]
)
CONSTANTS = np.array([-7.03, -5.58])
"""Log-odds that two aligned pictures are one, by two ways of seeing it, of which the larger counts.

Weights of ``measurements``, by logistic regression on altered copies and on look-alikes. The first:
copies of whole pictures in a pool of many kinds, where overlap says most. The second: single kinds,
parts of pictures and changed colours among the copies, where fine structure says most
(``tests/benchmarks/fit_evidence.py``); its constant is lower by 3, so that both raise alarms alike
seldom."""


class Found(NamedTuple):
    """An alignment and how well it is supported.

    Attributes:
        value: log-odds that both show the same picture.
        matrix: from pixels of the query's picture to those of the training image's.
        inliers: pairs of keypoints that agree on it; 0 if correlation found it.
        correlation: of the grey values where both overlap.
        shades: how these differ.
        extent: of the part that agrees, see ``Agreement``.
        query: height and width of the query's picture in pixels.
        training: height and width of the training image's picture in pixels.
    """

    value: float
    matrix: Matrix
    inliers: int
    correlation: float
    shades: Shades
    extent: tuple[float, float, float, float] | None
    query: tuple[int, int]
    training: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What alignment found for a query and one training image.

    Attributes:
        value: how strongly both show the same picture, altered or not: log-odds on one scale for
            all images.
        same_picture: whether ``value`` reaches ``SAME_PICTURE``.
        mirrored: whether the query is mirrored.
        turn: degrees by which the query is turned counter-clockwise, in (-180, 180], after it was
            mirrored left and right if it was.
        scale: size of what is shown in the query relative to the training image, each measured by
            its longer side.
        share_of_training: share of the training image's area that was copied.
        share_of_query: share of the query's area that shows it.
        outline: corners ``(x, y)`` of the copied part in the training image, as shares of its width
            and height.
        correlation: of the grey values where both overlap after alignment, in [-1, 1].
        brightness: by how much the query is brighter there, as a share of the range from black to
            white.
        contrast: its standard deviation there relative to the training image's.
        sharpness: the same of the finest details of ``PICTURE_SIDE`` pixels.
        inliers: pairs of keypoints that agree on the alignment.
        matrix: ``((a, b, c), (d, e, f))`` that takes places of the query (x and y as shares of its
            width and height) to places of the training image.
    """

    value: float
    same_picture: bool
    mirrored: bool
    turn: float
    scale: float
    share_of_training: float
    share_of_query: float
    outline: tuple[tuple[float, float], ...]
    correlation: float
    brightness: float
    contrast: float
    sharpness: float
    inliers: int
    matrix: tuple[tuple[float, float, float], tuple[float, float, float]]

    def text(self, original: str = "training image") -> str:
        """Say what was done: "mirrored, turned by 12 degrees, 61 % of the training image".

        Args:
            original: what the other image is.
        """
        parts = []
        if self.mirrored:
            parts.append("mirrored")
        if abs(self.turn) >= 2:
            parts.append(f"turned by {round(self.turn)} degrees")
        if self.share_of_training < 0.95:
            parts.append(f"{_percent(self.share_of_training)} of the {original}")
        if self.share_of_query < 0.9:
            parts.append(f"on {_percent(self.share_of_query)} of the copy")
        return ", ".join([*(parts or ["in place"]), *self._shades()])

    def _shades(self) -> list[str]:
        """Say how the grey values were altered where that is plain."""
        detail = self.sharpness / self.contrast
        is_blurred = detail < _BLURRED and self.scale > _IN_PART  # enlarged parts are soft anyway
        parts = []
        if abs(self.brightness) >= _BRIGHTER:
            parts.append("brighter" if self.brightness > 0 else "darker")
        if self.contrast > _MORE_CONTRAST:
            parts.append("more contrast")
        elif self.contrast < 1 / _MORE_CONTRAST and not is_blurred:  # blur takes some by itself
            parts.append("less contrast")
        if is_blurred:
            parts.append("blurred")
        elif detail > _NOISY:
            parts.append("noise or sharpened")
        return parts

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON-ready values, with the text."""
        return {**dataclasses.asdict(self), "text": self.text()}


def find_alignments(
    features: LocalFeatures,
    candidates: Sequence[LocalFeatures | None],
    each: Callable[..., Iterable[Any]] = map,
) -> list[Found | None]:
    """Align a query with each of its candidates.

    Args:
        features: of the query.
        candidates: of training images, the likeliest first; ``None`` where one is unreadable.
        each: does as ``map`` does, perhaps by threads.

    Returns:
        The best supported alignment of each, ``None`` where no alignment was found. Correlation is
        tried for the likeliest where keypoints leave doubt, and for none beside a sure copy.
    """
    query = prepared(features)
    found = list(each(lambda t: None if t is None else by_keypoints(query, t), candidates))
    if max((pair.value for pair in found if pair is not None), default=0) >= SURELY_SAME:
        return found

    def correlated(known: Found | None, training: LocalFeatures | None) -> Found | None:
        if training is None or (known is not None and known.value >= _SURE):
            return known
        other = by_correlation(query, training)
        if other is None or (known is not None and other.value <= known.value):
            return known
        return other

    found[:_CORRELATED] = each(correlated, found[:_CORRELATED], candidates[:_CORRELATED])
    return found


def by_keypoints(query: Query, training: LocalFeatures) -> Found | None:
    """Return the alignment that most keypoints agree on, refined if that is better."""
    start = keypoint_alignment(query, training)
    if start is None:
        return None
    moved = refined(start.matrix, query.features, training)
    return _better(start.matrix, moved, start.inliers, query.features, training)


def by_correlation(query: Query, training: LocalFeatures) -> Found | None:
    """Return the alignment at which both pictures correlate most, for little texture or noise."""
    start, _ = coarse_alignment(query, training)
    moved = refined(start, query.features, training)
    return _better(None if moved is not None else start, moved, 0, query.features, training)


def _better(
    first: Matrix | None,
    second: Matrix | None,
    inliers: int,
    query: LocalFeatures,
    training: LocalFeatures,
) -> Found | None:
    """Return the better supported of two alignments, the first where both are alike."""
    tried = [
        measure(matrix, inliers, query, training)
        for matrix in (first, second)
        if matrix is not None
    ]
    return max(
        (found for found in tried if found is not None), key=lambda found: found.value, default=None
    )


def measure(
    matrix: Matrix, inliers: int, query: LocalFeatures, training: LocalFeatures
) -> Found | None:
    """Return how well an alignment is supported, ``None`` where the pictures hardly overlap."""
    seen = agreement(matrix, query, training)
    if seen is None:
        return None
    value = float((CONSTANTS + WEIGHTS @ measurements(inliers, seen)).max())
    height, width = query.picture.shape
    return Found(
        value=value,
        matrix=matrix,
        inliers=inliers,
        correlation=seen.correlation,
        shades=seen.shades,
        extent=seen.extent,
        query=(height, width),
        training=(training.picture.shape[0], training.picture.shape[1]),
    )


def measurements(inliers: int, seen: Agreement) -> NDArray[np.float64]:
    """Return what the weights belong to, ``[2 * OCTAVES + 4]``.

    Per octave, finest first, the logarithm of 1 + the number of patches that agree; likewise
    Fisher's z of the mean correlation of the patches; the logarithm of 1 + the number of keypoint
    pairs; the root of how many more than ``_MANY_INLIERS`` there are; and the logarithms of the
    share of the training image that is covered and of the share of the query that covers it.
    """
    return np.concatenate(
        [
            np.log1p(seen.patches),
            np.arctanh(np.clip(seen.correlations, -_HIGHEST, _HIGHEST)),
            [
                math.log1p(inliers),
                math.sqrt(max(0, inliers - _MANY_INLIERS)),
                math.log(max(seen.overlap, _SMALLEST_SHARE)),
                math.log(max(seen.query_share, _SMALLEST_SHARE)),
            ],
        ]
    )


def describe(found: Found) -> Evidence:
    """Put an alignment into terms of what was done to the training image."""
    linear = found.matrix[:, :2]
    mirrored = bool(np.linalg.det(linear) < 0)
    outline, share_of_training, share_of_query = _copied_part(found)
    height, width = found.training
    return Evidence(
        value=found.value,
        same_picture=found.value >= SAME_PICTURE,
        mirrored=mirrored,
        turn=_turn(np.diag([-1.0, 1.0]) @ linear if mirrored else linear),
        scale=1 / math.sqrt(abs(float(np.linalg.det(linear)))),
        share_of_training=share_of_training,
        share_of_query=share_of_query,
        outline=tuple(((float(x) + 0.5) / width, (float(y) + 0.5) / height) for x, y in outline),
        correlation=found.correlation,
        **found.shades._asdict(),
        inliers=found.inliers,
        matrix=_in_shares(found),
    )


def _copied_part(found: Found) -> tuple[NDArray[np.float64], float, float]:
    """Return the corners of what was copied, and its shares of training image and query.

    It is where both overlap, or, where they agree in a part of that only, a box about this part.
    """
    moved = _corners(*found.query) @ found.matrix[:, :2].T + found.matrix[:, 2]
    part, area = _clipped(moved, _corners(*found.training))
    if found.extent is not None:
        left, top, right, bottom = (side - 0.5 for side in found.extent)
        box = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
        smaller, smaller_area = _clipped(part, box)
        if smaller_area < _IN_PART * area:
            part, area = smaller, smaller_area
    scale = abs(float(np.linalg.det(found.matrix[:, :2])))
    of_training = area / (found.training[0] * found.training[1])
    of_query = area / (scale * found.query[0] * found.query[1])
    return part, min(1.0, of_training), min(1.0, of_query)


def _corners(height: int, width: int) -> NDArray[np.float64]:
    right, bottom = width - 0.5, height - 0.5
    return np.array([[-0.5, -0.5], [right, -0.5], [right, bottom], [-0.5, bottom]])


def _clipped(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Return the corners ``[k, 2]`` of what two convex polygons share, and its area."""
    area, corners = cv2.intersectConvexConvex(first.astype(np.float32), second.astype(np.float32))
    if corners is None or area <= 0:
        return np.zeros((0, 2)), 0.0
    return np.asarray(corners, np.float64).reshape(-1, 2), float(area)


def _turn(linear: Matrix) -> float:
    """Return by how many degrees the query was turned counter-clockwise, in (-180, 180]."""
    left, _, right = np.linalg.svd(linear)
    turn = left @ right  # the nearest rotation, of the query to the training image
    degrees = math.degrees(math.atan2(turn[1, 0], turn[0, 0]))
    return 180.0 if round(degrees, 6) == -180 else degrees


def _in_shares(found: Found) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the map of pixels, whose middles have whole numbers, as one of shares of the sides."""
    matrix, query, training = found.matrix, found.query, found.training
    to_pixels = np.array([[query[1], 0, -0.5], [0, query[0], -0.5], [0, 0, 1]])
    to_shares = np.array(
        [[1 / training[1], 0, 0.5 / training[1]], [0, 1 / training[0], 0.5 / training[0]]]
    )
    (a, b, c), (d, e, f) = (to_shares @ np.vstack([matrix, [0, 0, 1]]) @ to_pixels).tolist()
    return (a, b, c), (d, e, f)


def _percent(share: float) -> str:
    return f"{max(1, round(100 * share))} %"
