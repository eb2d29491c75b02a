"""Alignments of two pictures: affine maps that may turn, mirror, scale, stretch and shift.

Two ways find them. Keypoints: each pair of like descriptors is one guess of turn, scale and shift,
all of them are tried, and the one that most other pairs agree with is fitted to these. So nothing
is drawn at random. Correlation: where there is too little texture for keypoints, or it drowns in
noise, small pictures are correlated at all shifts for a grid of turns and scales, mirrored too.
Both are refined by maximising the correlation (Evangelidis and Psarakis 2008).

A map is a matrix ``[2, 3]`` that takes pixels ``(x, y, 1)`` of the query's picture to pixels of the
training image's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.verification.features import UNIT, LocalFeatures

Matrix = NDArray[np.float64]

RATIO = 0.92
"""Highest distance of a descriptor to its nearest, relative to its second nearest."""
FEWEST_INLIERS = 4
MAX_STRETCH = 2.2
MIN_SCALE, MAX_SCALE = 0.2, 5.0
_VOTE_REACH = 8.0
_VOTE_SCALE = 0.6
_VOTE_COSINE = 0.8
_TOLERANCES = (6.0, 4.0, 3.0, 2.5)
_NUM_VOTES = 2
_GRID = 48
_COARSE_SIDE = 32
_SCALES = (0.7, 1.0, 1.4)
_TURNS = tuple(range(0, 360, 15))
_REFINED_SHARE = 0.5
_REFINE_STEPS = 20
_REFINE_BLUR = 3
_FEWEST_PIXELS = 100


class KeypointAlignment(NamedTuple):
    """A map and the number of keypoint pairs that agree on it."""

    matrix: Matrix
    inliers: int


@dataclasses.dataclass(frozen=True)
class Query:
    """A query made ready to be aligned with many training images.

    Attributes:
        features: of the query.
        points: ``[2 k, 4]`` its keypoints, then those of the mirrored picture.
        descriptors: ``[2 k, 128]`` float32, likewise.
    """

    features: LocalFeatures
    points: NDArray[np.float32]
    descriptors: NDArray[np.float32]

    @functools.cached_property
    def templates(self) -> Templates:
        """What is correlated with training images: made once, for most queries never."""
        return _templates(self.features)


class Templates(NamedTuple):
    """A query's small picture, turned, scaled and mirrored.

    Attributes:
        maps: ``[t, 2, 3]`` from the small picture to the grid.
        spectra: ``[t, g, g / 2 + 1]`` conjugate Fourier transforms of the pictures there.
        lengths: ``[t]`` roots of their sums of squares.
        to_small: map from the query's picture to the small one.
    """

    maps: Matrix
    spectra: NDArray[np.complex64]
    lengths: NDArray[np.float32]
    to_small: Matrix


def prepared(features: LocalFeatures) -> Query:
    """Make a query ready to be aligned."""
    mirrored = features.mirrored()
    return Query(
        features=features,
        points=np.concatenate([features.points, mirrored.points]),
        descriptors=np.concatenate([features.descriptors, mirrored.descriptors]).astype(np.float32),
    )


def _templates(features: LocalFeatures) -> Templates:
    from scipy import fft

    small, to_small = _small(features)
    height, width = small.shape
    maps = _template_maps(width, height)
    pictures = np.stack([cv2.warpAffine(small, matrix, (_GRID, _GRID)) for matrix in maps])
    lengths = np.sqrt(np.square(pictures).sum(axis=(1, 2)))
    return Templates(maps, np.conj(fft.rfft2(pictures)), lengths, to_small)


def keypoint_alignment(query: Query, training: LocalFeatures) -> KeypointAlignment | None:
    """Return the map that most pairs of keypoints agree on, or ``None`` where few do."""
    number = len(query.features.points)
    if min(number, len(training.points)) < FEWEST_INLIERS:
        return None
    products = query.descriptors @ training.descriptors.astype(np.float32).T  # whole: exact
    best = None
    for is_mirrored in (False, True):
        part = slice(number, None) if is_mirrored else slice(number)
        rows, columns = _matches(products[part])
        found = _vote(query.points[part][rows], training.points[columns])
        if found is not None and (best is None or found.inliers > best.inliers):
            best = found
            if is_mirrored:
                best = found._replace(matrix=found.matrix @ _square(_mirror(query.features)))
    return best


def coarse_alignment(query: Query, training: LocalFeatures) -> tuple[Matrix, float]:
    """Return the map of the grid at which small pictures correlate most, and the correlation."""
    from scipy import fft

    templates = query.templates
    small, to_small = _small(training)
    height, width = small.shape
    left, top = (_GRID - width) // 2, (_GRID - height) // 2
    grid = np.zeros((_GRID, _GRID), np.float32)
    grid[top : top + height, left : left + width] = small
    products = templates.spectra * fft.rfft2(grid)
    shifts = fft.irfft2(products, s=(_GRID, _GRID)).reshape(len(products), -1)
    peaks = shifts.argmax(axis=1)
    norms = templates.lengths * float(np.linalg.norm(grid)) + 1.0
    values = shifts[np.arange(len(peaks)), peaks] / norms
    best = int(values.argmax())
    down, right = (
        int(step) - _GRID * (int(step) > _GRID // 2) for step in divmod(int(peaks[best]), _GRID)
    )
    matrix = templates.maps[best].copy()
    matrix[:, 2] += (right - left, down - top)
    back = _inverse(to_small)
    return back @ _square(matrix) @ _square(templates.to_small), float(values[best])


def refined(matrix: Matrix, query: LocalFeatures, training: LocalFeatures) -> Matrix | None:
    """Return the map at which both pictures, at half their size, correlate most nearby.

    ``None`` where the search does not end or leaves what is plausible.
    """
    scaling = _scaling(_REFINED_SHARE)
    first, second = _half(training.picture), _half(query.picture)
    inverse = (scaling @ _square(_inverse(matrix)) @ np.linalg.inv(_square(scaling))).astype(
        np.float32
    )
    shape = first.shape[::-1]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    covered = cv2.warpAffine(np.ones_like(second), inverse, shape, flags=flags) > 0.99
    if covered.sum() < _FEWEST_PIXELS:
        return None
    everywhere = np.ones(first.shape, np.uint8)
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, _REFINE_STEPS, 1e-3)
    try:
        _, moved = cv2.findTransformECC(
            first, second, inverse, cv2.MOTION_AFFINE, criteria, everywhere, _REFINE_BLUR
        )
    except cv2.error:  # the pictures do not correlate where it began
        return None
    if not np.isfinite(moved).all() or not is_plausible(moved):
        return None
    result = _inverse(scaling) @ _square(_inverse(moved.astype(np.float64))) @ _square(scaling)
    return result if is_plausible(result) else None


def is_plausible(matrix: NDArray[Any]) -> bool:
    """Return whether a map neither stretches nor scales beyond what edits do."""
    if not np.isfinite(matrix).all():
        return False
    large, small = np.linalg.svd(matrix[:, :2], compute_uv=False)
    return bool(small > MIN_SCALE and large < MAX_SCALE and large < MAX_STRETCH * small)


def _matches(products: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and columns that are each other's nearest, and much nearer than the next one.

    Args:
        products: ``[n, m]`` of the descriptors of two pictures; changed.
    """
    rows = np.arange(len(products))
    nearest = products.argmax(axis=1)
    mutual = products.argmax(axis=0)[nearest] == rows
    best = products[rows, nearest]
    products[rows, nearest] = -1
    squares = 2 * np.maximum(UNIT**2 - np.stack([best, products.max(axis=1)]), 0)
    kept = mutual & (squares[0] < RATIO**2 * squares[1])
    return rows[kept], nearest[kept]


def _vote(query: NDArray[np.float32], training: NDArray[np.float32]) -> KeypointAlignment | None:
    """Fit an affine map to pairs of keypoints ``[m, 4]``, most of which may be wrong."""
    if len(query) < FEWEST_INLIERS:
        return None
    places = query[:, 0] + 1j * query[:, 1]
    targets = training[:, 0] + 1j * training[:, 1]
    scales = np.log(training[:, 2] / query[:, 2])
    turns = np.exp(1j * np.deg2rad(training[:, 3] - query[:, 3]))
    factors = np.exp(scales) * turns
    shifts = targets - factors * places
    misses = np.abs(factors[:, None] * places + (shifts[:, None] - targets))
    agree = misses < _VOTE_REACH
    agree &= np.abs(scales[:, None] - scales) < _VOTE_SCALE
    agree &= (turns[:, None] * turns.conj()).real > _VOTE_COSINE
    votes = agree.sum(axis=1)
    best = None
    for guess in np.argsort(-votes, kind="stable")[:_NUM_VOTES]:
        found = _fit(query, training, agree[guess])
        if found is not None and (best is None or found.inliers > best.inliers):
            best = found
    return best


def _fit(
    query: NDArray[np.float32], training: NDArray[np.float32], inside: NDArray[np.bool_]
) -> KeypointAlignment | None:
    """Fit by least squares to pairs that agree, and to those that agree with the fit, again."""
    places = np.column_stack([query[:, :2], np.ones(len(query))]).astype(np.float64)
    targets = training[:, :2].astype(np.float64)
    for tolerance in _TOLERANCES:
        if inside.sum() < FEWEST_INLIERS:
            return None
        chosen = places[inside]
        try:
            solution = np.linalg.solve(chosen.T @ chosen, chosen.T @ targets[inside])
        except np.linalg.LinAlgError:  # they lie on one line
            return None
        inside = np.hypot(*(places @ solution - targets).T) < tolerance
    matrix = np.ascontiguousarray(solution.T)
    inliers = len(np.unique(np.round(targets[inside]), axis=0))
    if inliers < FEWEST_INLIERS or not is_plausible(matrix):
        return None
    return KeypointAlignment(matrix, inliers)


def _small(features: LocalFeatures) -> tuple[NDArray[np.float32], Matrix]:
    """Return a small picture without its slow changes of shade, and the map to it."""
    factor = _COARSE_SIDE / max(features.picture.shape)
    height, width = (max(4, round(side * factor)) for side in features.picture.shape)
    small = cv2.resize(features.picture, (width, height), interpolation=cv2.INTER_AREA)
    even = small.astype(np.float32)
    flat = cv2.GaussianBlur(even, (0, 0), 1.0) - cv2.GaussianBlur(even, (0, 0), 5.0)
    return flat, _scaling(factor)


@functools.lru_cache(maxsize=64)
def _template_maps(width: int, height: int) -> Matrix:
    """Return maps ``[t, 2, 3]`` of a picture to the middle of the grid."""
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    middle = (_GRID - 1) / 2
    maps = []
    for mirror in (1.0, -1.0):
        for scale in _SCALES:
            for turn in np.deg2rad(_TURNS):
                cosine, sine = scale * np.cos(turn), scale * np.sin(turn)
                linear = np.array([[cosine * mirror, -sine], [sine * mirror, cosine]])
                maps.append(np.column_stack([linear, middle - linear @ centre]))
    return np.stack(maps)


def _half(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    height, width = (max(1, round(side * _REFINED_SHARE)) for side in picture.shape)
    small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)


def _scaling(factor: float) -> Matrix:
    """Return the map of pixels, whose middles have whole numbers, to those of a resized picture."""
    offset = 0.5 * factor - 0.5
    return np.array([[factor, 0, offset], [0, factor, offset]])


def _mirror(features: LocalFeatures) -> Matrix:
    return np.array([[-1.0, 0, features.picture.shape[1] - 1], [0, 1, 0]])


def _square(matrix: NDArray[Any]) -> Matrix:
    return np.vstack([matrix, [0, 0, 1]])


def _inverse(matrix: NDArray[Any]) -> Matrix:
    return np.asarray(np.linalg.inv(_square(matrix))[:2], np.float64)
