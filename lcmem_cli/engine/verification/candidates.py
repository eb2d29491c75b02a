"""Candidates by picture: training images that look like a query, however far it was turned.

A network that judges whole pictures puts look-alikes that stand upright before the source of a
turned copy. Here small grey pictures are sampled along rings about their middle. Turning a picture
shifts what stands on a ring, mirroring reverses it, and both leave the magnitudes of its Fourier
coefficients as they are. Standardised over the training set, these are compared by their cosine,
rounded so that sums are of whole numbers: the same in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.embedding import allocate_features
from lcmem_cli.engine.store.search import TopK, inner_products, top_k_blocked

NUM_BY_PICTURE = 3
"""Candidates of an image by picture, beside those by score."""
_RINGS, _ANGLES, _FREQUENCIES = 10, 64, 12
NUM_VALUES = _RINGS * _FREQUENCIES
_UNIT = 2000
"""Length of a row as rounded; the dot product of two is exact in float32."""
_MOST_STATISTICS = 10_000

Rows = NDArray[Any]
Pictures = Callable[[slice], NDArray[Any]]


class PictureSearch:
    """Training images to be searched by picture.

    Args:
        pictures: gives the small grey pictures ``[b, s, s]`` of some rows.
        count: number of rows.
        groups: ``[count]`` identities, where a query must not find those of its own.
    """

    def __init__(
        self, pictures: Pictures, count: int, groups: NDArray[np.int64] | None = None
    ) -> None:
        step = -(-count // _MOST_STATISTICS)
        sample = ring_spectra(pictures(slice(0, None, step))).astype(np.float64)
        self._mean, deviation = sample.mean(axis=0), sample.std(axis=0)
        self._deviation = deviation + 1e-3 * deviation.mean() + 1e-12
        self._bank = allocate_features((count, NUM_VALUES + 1), np.float32)
        for start in range(0, count, 1024):
            part = slice(start, min(start + 1024, count))
            own = np.full(part.stop - start, -1) if groups is None else groups[part]
            self._bank[part] = self._rows(pictures(part), own)

    def nearest(
        self, pictures: NDArray[Any], k: int, groups: NDArray[np.int64] | None = None
    ) -> TopK:
        """Return the ``k`` rows whose pictures are most alike.

        Args:
            pictures: ``[n, s, s]`` of the queries.
            k: rows of each.
            groups: ``[n]`` identities, none of which a query finds; scores there are -inf.
        """
        queries = self._rows(pictures, np.full(len(pictures), -2) if groups is None else groups)
        return top_k_blocked(_products, queries, self._bank, k)

    def _rows(self, pictures: NDArray[Any], groups: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return ``[n, NUM_VALUES + 1]``: what is compared, and the group."""
        values = (ring_spectra(pictures) - self._mean) / self._deviation
        lengths = np.linalg.norm(values, axis=1, keepdims=True)
        whole = np.rint(values * (_UNIT / np.maximum(lengths, 1e-12)))
        return np.column_stack([whole, groups]).astype(np.float32)


def ring_spectra(pictures: NDArray[Any]) -> NDArray[np.float64]:
    """Return magnitudes ``[n, NUM_VALUES]`` of square pictures ``[n, s, s]`` along rings."""
    side = pictures.shape[1]
    middle = (side - 1) / 2
    radii = middle * (np.arange(_RINGS) + 1) / (_RINGS + 0.4)
    angles = 2 * np.pi * np.arange(_ANGLES) / _ANGLES
    across = (middle + radii[:, None] * np.cos(angles)).ravel()
    down = (middle + radii[:, None] * np.sin(angles)).ravel()
    left, top = np.floor(across).astype(int), np.floor(down).astype(int)
    x, y = across - left, down - top
    flat = pictures.reshape(len(pictures), -1).astype(np.float64)
    samples = np.zeros((len(pictures), len(x)))
    for row, column, weight in (
        (top, left, (1 - y) * (1 - x)),
        (top, left + 1, (1 - y) * x),
        (top + 1, left, y * (1 - x)),
        (top + 1, left + 1, y * x),
    ):
        samples += weight * flat[:, row * side + column]
    samples -= samples.mean(axis=1, keepdims=True)
    samples /= samples.std(axis=1, keepdims=True) + 1e-6
    spectra = np.fft.rfft(samples.reshape(len(pictures), _RINGS, _ANGLES), axis=2)
    return np.abs(spectra[..., :_FREQUENCIES]).reshape(len(pictures), NUM_VALUES)


def merged(by_score: Rows, by_picture: TopK, num_first: int) -> Rows:
    """Return candidates ``[n, k]``, the likeliest first: by score and by picture in turn.

    Args:
        by_score: ``[n, k]`` rows, best first; -1 where there is none.
        by_picture: others, of which up to ``NUM_BY_PICTURE`` are taken into the first ``num_first``
            candidates.
        num_first: candidates that are verified.
    """
    result = by_score.copy()
    usable = np.isfinite(by_picture.scores)
    for place, row in enumerate(by_score):
        first = row[: num_first - NUM_BY_PICTURE].tolist()
        new = [r for r in by_picture.rows[place][usable[place]].tolist() if r not in first]
        new = new[:NUM_BY_PICTURE] if -1 not in first else []  # then it has all there are
        both = [r for pair in zip(first, new, strict=False) for r in pair] + first[len(new) :]
        both += [r for r in row.tolist() if r not in both]
        result[place, : len(both)] = both[: len(row)]
    return result


def _products(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    products: NDArray[np.float64] = inner_products(a[:, :-1], b[:, :-1]).astype(np.float64)
    products[a[:, -1:] == b[:, -1]] = -np.inf
    return products
