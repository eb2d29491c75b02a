"""How well two pictures agree once they are aligned, octave by octave and patch by patch.

Every patch counts alike, whatever its contrast, so one strong edge that both share (a frame, the
rim of a scan) decides nothing, and a caption or a pasted object spoils only its own patches. The
sign of the contrast counts, its strength does not.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.verification.alignment import Matrix
from lcmem_cli.engine.verification.features import LocalFeatures

Picture = NDArray[Any]

OCTAVES = 4
PATCH = 8
"""Side of a patch in pixels of its octave; each octave has half the pixels of the one before."""
AGREES = 0.5
"""Correlation from which on a patch agrees."""
_FEWEST_PIXELS = 300
_WITHIN = 0.6
_BLUR = 1.2
_ROUNDING = 0.3
_TEXTURE = 4.0
_QUERY_TEXTURE = 1.0
_PLACED_OCTAVES = 3
_TEXTURED = 0.5
_FAR = 10_000


class Shades(NamedTuple):
    """How the grey values of an aligned query differ from those of a training image.

    Attributes:
        brightness: difference of the means, as a share of the range from black to white.
        contrast: ratio of the standard deviations.
        sharpness: ratio of those of the finest octave; blur lowers it, noise raises it.
    """

    brightness: float
    contrast: float
    sharpness: float


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What a map of a query's picture onto a training image's shows.

    Attributes:
        correlations: ``[OCTAVES]`` mean over the patches, finest first; 0 without texture.
        patches: ``[OCTAVES]`` number of patches that agree, by how much texture they have.
        overlap: share of the training image that the query covers.
        query_share: share of the query within the training image.
        correlation: of the grey values where both overlap.
        shades: how the query's grey values differ there, see ``Shades``.
        extent: ``(left, top, right, bottom)`` of the patches that agree, in pixels, far outside
            where none beyond them disagrees; ``None`` if none agrees.
    """

    correlations: NDArray[np.float64]
    patches: NDArray[np.float64]
    overlap: float
    query_share: float
    correlation: float
    shades: Shades
    extent: tuple[float, float, float, float] | None


def agreement(matrix: Matrix, query: LocalFeatures, training: LocalFeatures) -> Agreement | None:
    """Warp a query onto a training image and compare both; ``None`` where they hardly overlap."""
    first, covered = warped(matrix, query, training)
    second: Picture = training.picture.astype(np.float32)
    total = float(covered.sum())
    if total < _FEWEST_PIXELS:
        return None
    overlap = total / covered.size
    area = abs(float(np.linalg.det(matrix[:, :2])))
    inside = covered > 0
    correlation = _correlation(first[inside], second[inside])
    shades = _shades(first, second, inside)
    correlations, patches = np.zeros(OCTAVES), np.zeros(OCTAVES)
    disagreeing: list[NDArray[np.int64]] = []
    agreeing: list[NDArray[np.int64]] = []
    for octave in range(OCTAVES):
        smooth_first = cv2.GaussianBlur(first, (0, 0), _BLUR)
        smooth_second = cv2.GaussianBlur(second, (0, 0), _BLUR)
        is_last = octave == OCTAVES - 1
        values, weights, places = _patch_correlations(
            first if is_last else first - smooth_first,
            second if is_last else second - smooth_second,
            covered,
        )
        if len(values):
            agrees = values > AGREES
            correlations[octave] = (values * weights[0]).sum() / max(weights[0].sum(), 1e-6)
            patches[octave] = weights[1][agrees].sum()
            if octave < _PLACED_OCTAVES:
                side = PATCH << octave
                agreed = places[agrees & (weights[1] > _TEXTURED)]
                agreeing += [agreed * side, (agreed + 1) * side]
                others = places[~agrees & (weights[2] > _TEXTURED)]
                disagreeing += [others * side, (others + 1) * side]
        size = tuple((side + 1) // 2 for side in first.shape[::-1])
        first = cv2.resize(smooth_first, size, interpolation=cv2.INTER_AREA)
        second = cv2.resize(smooth_second, size, interpolation=cv2.INTER_AREA)
        covered = (cv2.resize(covered, size, interpolation=cv2.INTER_AREA) > 0.9).astype(np.float32)
        if min(first.shape) < PATCH:
            break
    return Agreement(
        correlations=correlations,
        patches=patches,
        overlap=overlap,
        query_share=min(1.0, total / (area * query.picture.size)),
        correlation=correlation,
        shades=shades,
        extent=_extent(agreeing, disagreeing),
    )


def _extent(
    agreeing: list[NDArray[np.int64]], disagreeing: list[NDArray[np.int64]]
) -> tuple[float, float, float, float] | None:
    """Return the box about the patches that agree, open where no others lie beyond them."""
    if not sum(map(len, agreeing)):
        return None
    agreed, every = np.concatenate(agreeing), np.concatenate(agreeing + disagreeing)
    low, high = agreed.min(axis=0), agreed.max(axis=0)
    left, top = np.where(low > every.min(axis=0), low, -_FAR)
    right, bottom = np.where(high < every.max(axis=0), high, _FAR)
    return float(left), float(top), float(right), float(bottom)


def warped(
    matrix: Matrix, query: LocalFeatures, training: LocalFeatures
) -> tuple[Picture, Picture]:
    """Return the query's picture in the training image's frame, and where it lies (0 or 1)."""
    size = training.picture.shape[::-1]
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    picture: Picture = query.picture.astype(np.float32)
    if scale < 0.75:
        picture = cv2.GaussianBlur(picture, (0, 0), 0.5 * float(np.sqrt(scale**-2 - 1)))
    first = cv2.warpAffine(
        picture, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    inside = cv2.warpAffine(np.ones_like(picture), matrix, size, flags=cv2.INTER_LINEAR)
    return first, (inside > 0.99).astype(np.float32)


def _patch_correlations(
    first: Picture, second: Picture, covered: Picture
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    """Correlate two pictures patch by patch.

    Returns:
        Correlations ``[p]`` of the patches that are covered; three weights for each ``[3, p]``: how
        much texture the second picture has there, both have, and at least one has; places
        ``[p, 2]`` as column, row.
    """
    rows, columns = (side // PATCH for side in first.shape)

    def patches(picture: Picture) -> Picture:
        cut = picture[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH)
        return np.asarray(cut.transpose(0, 2, 1, 3).reshape(-1, PATCH * PATCH))

    inside = patches(covered)
    kept = inside.mean(axis=1) > _WITHIN
    inside = inside[kept]
    number = inside.sum(axis=1, keepdims=True)

    def centred(picture: Picture) -> Picture:
        values = patches(picture)[kept]
        values = values - (values * inside).sum(axis=1, keepdims=True) / number
        return np.asarray(values * inside)

    a, b = centred(first), centred(second)
    count = number[:, 0]
    variance_a, variance_b = (a * a).sum(axis=1) / count, (b * b).sum(axis=1) / count
    product = (a * b).sum(axis=1) / count
    values = product / np.sqrt((variance_a + _ROUNDING) * (variance_b + _ROUNDING))
    texture = variance_b / (variance_b + _TEXTURE)
    both = texture * variance_a / (variance_a + _QUERY_TEXTURE)
    either = np.maximum(texture, variance_a / (variance_a + _TEXTURE))
    places = np.stack(np.divmod(np.flatnonzero(kept), columns)[::-1], axis=1)
    return values, np.stack([texture, both, either]), places


def _shades(first: Picture, second: Picture, inside: NDArray[np.bool_]) -> Shades:
    fine = [
        (picture - cv2.GaussianBlur(picture, (0, 0), _BLUR))[inside] for picture in (first, second)
    ]
    a, b = first[inside], second[inside]
    return Shades(
        brightness=float(a.mean() - b.mean()) / 255,
        contrast=(float(a.std()) + _ROUNDING) / (float(b.std()) + _ROUNDING),
        sharpness=(float(fine[0].std()) + _ROUNDING) / (float(fine[1].std()) + _ROUNDING),
    )


def _correlation(first: Picture, second: Picture) -> float:
    first, second = first - first.mean(), second - second.mean()
    lengths = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    if lengths < len(first):  # less than one shade of deviation: a picture of one colour
        return 0.0
    return float((first * second).sum()) / lengths
