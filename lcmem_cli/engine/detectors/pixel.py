"""Measures on pixels: the baselines that need no weights.

Their features are the 8-bit values of the resized images themselves. Sums over these are whole
numbers and therefore exact, so that a score depends neither on the order of work nor on how much is
computed at once.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.base import Detector, FloatArray
from lcmem_cli.engine.detectors.kinds import Request
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.files import sha256_bytes

MAX_SIDE = 1984  # 64-bit sums stay exact up to here
_VERSION = 2
_LEVELS = 255
_BLOCK_ROWS = 64
_BLOCK_COLUMNS = 1 << 16
_HASH_SIDE = 8
_SSIM_BLOCK_ROWS = 8
_SSIM_REACH = 5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2


class PixelDetector(Detector):
    """A detector whose features are ``uint8 [3 * input_size * input_size]``.

    Args:
        input_size: side in pixels that images are resized to.

    Raises:
        InputError: the side is out of range.
    """

    kind: str
    min_side = 1
    feature_dtype = np.uint8

    def __init__(self, input_size: int = 512) -> None:
        if not self.min_side <= input_size <= MAX_SIDE:
            raise InputError(
                f"{self.kind}: the input size must lie in [{self.min_side}, {MAX_SIDE}] pixels, "
                f"not {input_size}"
            )
        self.name = self.kind
        self.input_size = input_size
        self.num_features = 3 * input_size * input_size
        self.fingerprint = sha256_bytes(f"{self.kind}/{input_size}/{_VERSION}".encode())

    def embed_batch(self, batch: torch.Tensor) -> FloatArray:
        """Return images ``[n, 3, H, W]`` in [0, 1] as rows of 8-bit values."""
        pixels: NDArray[Any] = _to_levels(batch).flatten(1).numpy()
        return pixels

    def score_features(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score row i of ``a`` with row i of ``b``: ``[n]``."""
        _check_widths(a, b)
        return np.fromiter(
            (self._pair(x, y) for x, y in zip(a, b, strict=True)), dtype=np.float64, count=len(a)
        )

    def score_matrix(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score every row of ``a`` with every row of ``b``: ``[n, m]``."""
        _check_widths(a, b)
        result = np.empty((len(a), len(b)))
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                result[i, j] = self._pair(x, y)
        return result

    @abc.abstractmethod
    def _pair(self, x: NDArray[Any], y: NDArray[Any]) -> float:
        """Score two rows."""


class _SumsDetector(PixelDetector):
    """A measure that is a function of the sums of x, y, x², y² and xy."""

    def score_matrix(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score every row of ``a`` with every row of ``b``: ``[n, m]``."""
        _check_widths(a, b)
        width = a.shape[1]
        result = np.empty((len(a), len(b)))
        moments_b = [_moments(b[columns]) for columns in _blocks(len(b))]
        for rows in _blocks(len(a)):
            moments_a = _moments(a[rows])
            for columns, moments in zip(_blocks(len(b)), moments_b, strict=True):
                result[rows, columns] = self._from_sums(
                    width,
                    _Moments(moments_a.total[:, None], moments_a.squares[:, None]),
                    moments,
                    _products(a[rows], b[columns]),
                )
        return result

    def _pair(self, x: NDArray[Any], y: NDArray[Any]) -> float:
        product = _products(x[None], y[None])[0]
        return float(self._from_sums(len(x), _moments(x[None]), _moments(y[None]), product).item())

    @abc.abstractmethod
    def _from_sums(
        self, width: int, x: _Moments, y: _Moments, products: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Score from exact sums that broadcast with each other."""


class MSE(_SumsDetector):
    """Negative mean squared difference of pixels in [0, 1]; identical images score 0."""

    kind = "mse"

    def _from_sums(
        self, width: int, x: _Moments, y: _Moments, products: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        squares = x.squares + y.squares - 2 * products
        scores: NDArray[np.float64] = 0.0 - squares / (_LEVELS**2 * width)
        return scores


class NCC(_SumsDetector):
    """Normalised cross-correlation, centred over channels and pixels; in [-1, 1].

    A constant image correlates with nothing and scores 0.
    """

    kind = "ncc"

    def _from_sums(
        self, width: int, x: _Moments, y: _Moments, products: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        covariance = (width * products - x.total * y.total).astype(np.float64)
        variances = [
            (width * part.squares - np.square(part.total)).astype(np.float64) for part in (x, y)
        ]
        norm = np.sqrt(variances[0] * variances[1])
        scores: NDArray[np.float64] = np.divide(
            covariance, norm, out=np.zeros_like(covariance), where=norm > 0
        )
        return scores.clip(-1, 1)


class _Window(NamedTuple):
    """An image, its local mean and its local variance, each ``[3, H, W]``."""

    image: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


class SSIM(PixelDetector):
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004); in [-1, 1].

    Gaussian window of 11 pixels and standard deviation 1.5, K1 = 0.01, K2 = 0.03, data range 1,
    borders mirrored, averaged over channels and pixels: the numbers that torchmetrics 1.9 gives,
    but in float64, with scipy's separable filter, and with what concerns one image computed once:
    a third to a tenth of its time.
    """

    kind = "ssim"
    min_side = _SSIM_REACH + 1

    def score_features(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score row i of ``a`` with row i of ``b``: ``[n]``."""
        _check_widths(a, b)

        @functools.lru_cache(maxsize=_SSIM_BLOCK_ROWS)  # an image mostly comes several times
        def window(content: bytes) -> _Window:
            return self._window(np.frombuffer(content, dtype=np.uint8))

        return np.array(
            [_ssim(window(x.tobytes()), window(y.tobytes())) for x, y in zip(a, b, strict=True)],
            dtype=np.float64,
        )

    def score_matrix(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score every row of ``a`` with every row of ``b``: ``[n, m]``."""
        _check_widths(a, b)
        result = np.empty((len(a), len(b)))
        for start in range(0, len(b), _SSIM_BLOCK_ROWS):
            bank = [self._window(row) for row in b[start : start + _SSIM_BLOCK_ROWS]]
            for i, row in enumerate(a):
                window = self._window(row)
                result[i, start : start + len(bank)] = [_ssim(window, other) for other in bank]
        return result

    def _pair(self, x: NDArray[Any], y: NDArray[Any]) -> float:
        return _ssim(self._window(x), self._window(y))

    def _window(self, row: NDArray[Any]) -> _Window:
        side = round((len(row) / 3) ** 0.5)
        image = (row.astype(np.float64) / _LEVELS).reshape(3, side, side)
        mean = _smooth(image)
        return _Window(image, mean, _smooth(image * image) - mean * mean)


class PHash(PixelDetector):
    """Perceptual hash (imagehash): share of equal bits, in [0, 1]."""

    kind = "phash"

    def __init__(self, input_size: int = 512) -> None:
        super().__init__(input_size)
        self.num_features = _HASH_SIDE**2

    def embed_batch(self, batch: torch.Tensor) -> FloatArray:
        """Return the bits of each image's hash as 0 and 1: uint8 ``[n, 64]``."""
        import imagehash
        from PIL import Image

        pixels = _to_levels(batch).permute(0, 2, 3, 1).numpy()
        bits: NDArray[Any] = np.zeros((len(pixels), self.num_features), dtype=np.uint8)
        for row, image in zip(bits, pixels, strict=True):
            row[:] = imagehash.phash(Image.fromarray(image), hash_size=_HASH_SIDE).hash.ravel()
        return bits

    def score_matrix(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score every row of ``a`` with every row of ``b``: ``[n, m]``."""
        _check_widths(a, b)
        x, y = a.astype(np.float64), b.astype(np.float64)
        scores: NDArray[np.float64] = (x @ y.T + (1 - x) @ (1 - y).T) / self.num_features
        return scores

    def _pair(self, x: NDArray[Any], y: NDArray[Any]) -> float:
        return float((x == y).mean())


class _Moments(NamedTuple):
    """Exact sums of each row's values and of their squares, int64 ``[n]`` or ``[n, 1]``."""

    total: NDArray[np.int64]
    squares: NDArray[np.int64]


def _moments(rows: NDArray[Any]) -> _Moments:
    total = np.zeros(len(rows), dtype=np.int64)
    squares = np.zeros(len(rows), dtype=np.int64)
    for start in range(0, rows.shape[1], _BLOCK_COLUMNS):
        part = rows[:, start : start + _BLOCK_COLUMNS].astype(np.float64)
        total += part.sum(axis=1).astype(np.int64)
        squares += np.einsum("nd,nd->n", part, part).astype(np.int64)
    return _Moments(total, squares)


def _products(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.int64]:
    """Return the exact scalar products of all rows of two blocks of 8-bit values."""
    result = np.zeros((len(a), len(b)), dtype=np.int64)
    for start in range(0, a.shape[1], _BLOCK_COLUMNS):
        part = slice(start, start + _BLOCK_COLUMNS)
        product = a[:, part].astype(np.float64) @ b[:, part].astype(np.float64).T
        result += product.astype(np.int64)
    return result


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK_ROWS):
        yield slice(start, min(start + _BLOCK_ROWS, count))


def _to_levels(batch: torch.Tensor) -> torch.Tensor:
    return (batch * _LEVELS).round().to("cpu", torch.uint8)


def _check_widths(a: FloatArray, b: FloatArray) -> None:
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"images of different sizes cannot be compared pixel by pixel: rows of {a.shape[1]} "
            f"and of {b.shape[1]} values"
        )


def _smooth(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average ``[C, H, W]`` with the window around each pixel, borders mirrored."""
    from scipy.ndimage import correlate1d

    offsets = np.arange(-_SSIM_REACH, _SSIM_REACH + 1)
    weights = np.exp(-np.square(offsets / 1.5) / 2)
    for axis in (1, 2):  # the window is a product, so each axis can be averaged on its own
        maps = correlate1d(maps, weights / weights.sum(), axis=axis, mode="mirror")
    return maps


def _ssim(x: _Window, y: _Window) -> float:
    # Of an image with itself these are twice its variance and its variance twice, bit for bit, so
    # that it scores 1.
    product = x.mean * y.mean
    covariance = _smooth(x.image * y.image) - product
    similarity = ((2 * product + _SSIM_C1) * (2 * covariance + _SSIM_C2)) / (
        (x.mean * x.mean + y.mean * y.mean + _SSIM_C1) * (x.variance + y.variance + _SSIM_C2)
    )
    return float(similarity.mean())


_MEASURES: Mapping[str, type[PixelDetector]] = {
    measure.kind: measure for measure in (MSE, NCC, SSIM, PHash)
}


def build(request: Request) -> PixelDetector:
    """Build the measure that a name asks for."""
    return _MEASURES[request.kind](request.input_size)
