"""Measures on pixels: the baselines that need no weights.

Their features are the resized images themselves, as 8-bit values.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.base import Detector, FloatArray, resize_batch
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.files import sha256_bytes

if TYPE_CHECKING:
    from lcmem_cli.engine.detectors.base import Images

_VERSION = 1
_BLOCK = 64
_HASH_SIDE = 8


class PixelDetector(Detector):
    """A detector whose features are ``uint8 [3 * input_size * input_size]``.

    Args:
        input_size: side in pixels that images are resized to.
    """

    kind: str

    def __init__(self, input_size: int = 512) -> None:
        self.name = self.kind
        self.input_size = input_size
        self.num_features = self._width(input_size)
        self.fingerprint = sha256_bytes(f"{self.kind}/{input_size}/{_VERSION}".encode())

    def _width(self, side: int) -> int:
        return 3 * side * side

    def embed_batch(self, batch: torch.Tensor) -> NDArray[np.uint8]:
        """Return the images as rows of 8-bit values."""
        pixels: NDArray[np.uint8] = (batch * 255).round().to(torch.uint8).flatten(1).numpy()
        return pixels

    def embed(self, images: Images, *, batch_size: int = 32) -> FloatArray:
        """Embed images; a tensor is compared at its own size, which must be square."""
        if isinstance(images, torch.Tensor) and images.ndim == 4:
            if images.shape[-1] != images.shape[-2]:
                raise InputError(f"images must be square here, not {list(images.shape[-2:])}")
            return self.embed_batch(resize_batch(images, images.shape[-1]))
        return super().embed(images, batch_size=batch_size)

    def score_features(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score row i of ``a`` with row i of ``b``: ``[n]``."""
        if not len(a):
            return np.zeros(0)
        return np.concatenate(
            [self._pairs(a[i : i + _BLOCK], b[i : i + _BLOCK]) for i in range(0, len(a), _BLOCK)]
        )

    def score_matrix(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score every row of ``a`` with every row of ``b``: ``[n, m]``."""
        result = np.empty((len(a), len(b)))
        for i in range(0, len(a), _BLOCK):
            for j in range(0, len(b), _BLOCK):
                result[i : i + _BLOCK, j : j + _BLOCK] = self._block(
                    a[i : i + _BLOCK], b[j : j + _BLOCK]
                )
        return result

    @abc.abstractmethod
    def _pairs(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score row by row."""

    def _block(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score all with all; by default row after row."""
        return np.stack([self._pairs(np.broadcast_to(row, b.shape), b) for row in a])


class MSE(PixelDetector):
    """Negative mean squared difference of pixels in [0, 1]; identical images score 0."""

    kind = "mse"

    def _pairs(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        difference = a.astype(np.float64) - b
        scores: NDArray[np.float64] = 0.0 - np.square(difference).mean(axis=1) / 255**2
        return scores

    def _block(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        # Whole numbers below 2**53: the expansion is exact in float64.
        x, y = a.astype(np.float64), b.astype(np.float64)
        squares = np.square(x).sum(1)[:, None] - 2 * (x @ y.T) + np.square(y).sum(1)[None]
        scores: NDArray[np.float64] = 0.0 - squares / (255**2 * a.shape[1])
        return scores


class NCC(PixelDetector):
    """Normalised cross-correlation, centred over channels and pixels; in [-1, 1].

    A constant image correlates with nothing and scores 0.
    """

    kind = "ncc"

    def _pairs(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = np.einsum("nd,nd->n", _standardise(a), _standardise(b))
        return scores

    def _block(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = _standardise(a) @ _standardise(b).T
        return scores


class SSIM(PixelDetector):
    """Structural similarity (Wang et al. 2004) as torchmetrics computes it, data range 1."""

    kind = "ssim"

    def _pairs(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        from torchmetrics.functional.image import structural_similarity_index_measure

        side = round((a.shape[1] / 3) ** 0.5)
        x, y = (
            torch.from_numpy(np.array(v)).float().div(255).reshape(-1, 3, side, side)
            for v in (a, b)
        )
        scores: Any = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
        result: NDArray[np.float64] = scores.double().reshape(-1).numpy()
        return result


class PHash(PixelDetector):
    """Perceptual hash (imagehash): share of equal bits, in [0, 1]."""

    kind = "phash"

    def _width(self, side: int) -> int:
        return _HASH_SIDE * _HASH_SIDE

    def embed_batch(self, batch: torch.Tensor) -> NDArray[np.uint8]:
        """Return the bits of each image's hash as 0 and 1."""
        import imagehash
        from PIL import Image

        pixels = (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        bits = [imagehash.phash(Image.fromarray(p), hash_size=_HASH_SIDE).hash for p in pixels]
        return np.stack(bits).reshape(len(bits), -1).astype(np.uint8)

    def _pairs(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = (np.asarray(a) == np.asarray(b)).mean(axis=1)
        return scores


def _standardise(values: FloatArray) -> NDArray[np.float64]:
    real = values.astype(np.float64)
    real -= real.mean(axis=1, keepdims=True)
    norm = np.sqrt(np.square(real).sum(axis=1, keepdims=True))
    scaled: NDArray[np.float64] = np.divide(real, norm, out=np.zeros_like(real), where=norm > 1e-9)
    return scaled
