"""Detectors that compare two feature vectors by a fixed measure of likeness."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.base import Detector, FloatArray, check_features
from lcmem_cli.engine.models.siamese import IMAGENET_MEAN, IMAGENET_STD
from lcmem_cli.engine.store import device_search
from lcmem_cli.engine.store.search import TopK

Likeness = Literal["cosine", "correlation", "euclidean"]

_BLOCK_ROWS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image in [0, 1] becomes a network's input.

    Attributes:
        size: side in pixels of the square that images are resized to.
        mean: subtracted, per channel in RGB order.
        std: divided by, per channel in RGB order.
        channels: order in which the network takes them.
    """

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channels: Literal["rgb", "bgr"] = "rgb"

    def apply(self, batch: torch.Tensor) -> torch.Tensor:
        """Normalise ``[n, 3, size, size]`` in [0, 1] on the batch's device."""
        mean = batch.new_tensor(self.mean)[:, None, None]
        std = batch.new_tensor(self.std)[:, None, None]
        inputs = (batch - mean) / std
        return inputs.flip(1) if self.channels == "bgr" else inputs


class VectorDetector(Detector):
    """Scores rows of features by ``likeness``.

    ``cosine`` and ``correlation`` (the cosine of the vectors less their own means) lie in [-1, 1],
    and a vector without length scores 0; ``euclidean`` is the negative distance.
    """

    likeness: Likeness = "cosine"

    def score_features(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score row i of ``a`` with row i of ``b``: ``[n]``."""
        scores = np.empty(len(a))
        for start in range(0, len(a), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            x, y = self._prepare(a[part]), self._prepare(b[part])
            if self.likeness == "euclidean":
                scores[part] = 0.0 - np.sqrt(np.square(x - y).sum(axis=1))
            else:
                scores[part] = np.einsum("nd,nd->n", x, y).clip(-1, 1)
        return scores

    def score_matrix(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Score every row of ``a`` with every row of ``b``: ``[n, m]``."""
        x, y = self._prepare(a), self._prepare(b)
        if self.likeness == "euclidean":
            from scipy.spatial.distance import cdist

            return 0.0 - np.asarray(cdist(x, y), dtype=np.float64)
        scores: NDArray[np.float64] = (x @ y.T).clip(-1, 1)
        return scores

    def top_k(self, queries: FloatArray, bank: FloatArray, k: int) -> TopK:
        """Find each query's ``k`` best rows of the bank, see ``Detector.top_k``."""
        if self.likeness == "euclidean":
            return super().top_k(queries, bank, k)
        is_centred = self.likeness == "correlation"
        return device_search.top_k(
            lambda: device_search.cosine(bank.shape[1], centred=is_centred),
            self.score_matrix,
            super().top_k,
            queries,
            bank,
            k,
            self.device,
        )

    def _prepare(self, features: FloatArray) -> NDArray[np.float64]:
        values = np.asarray(features, dtype=np.float64)
        if self.likeness == "euclidean":
            return values
        if self.likeness == "correlation":
            values = values - values.mean(axis=1, keepdims=True)
        length = np.sqrt(np.square(values).sum(axis=1, keepdims=True))
        unit: NDArray[np.float64] = np.divide(
            values, length, out=np.zeros_like(values), where=length > 1e-12
        )
        return unit


class NetworkDetector(VectorDetector):
    """A network, what it is fed, and how its outputs are compared.

    Args:
        name: how the user named it.
        fingerprint: SHA-256 over all that changes a score.
        preprocessing: of the input.
        num_features: columns of the network's output.
        likeness: see ``VectorDetector``.
    """

    def __init__(
        self,
        *,
        name: str,
        fingerprint: str,
        preprocessing: Preprocessing,
        num_features: int,
        likeness: Likeness = "cosine",
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.preprocessing = preprocessing
        self.input_size = preprocessing.size
        self.num_features = num_features
        self.likeness = likeness

    @abc.abstractmethod
    def forward(self, batch: torch.Tensor) -> Any:
        """Run the network: ``[n, 3, size, size]`` in [0, 1] to ``[n, num_features]``."""

    def embed_batch(self, batch: torch.Tensor) -> FloatArray:
        """Return float32 features ``[n, num_features]`` of images ``[n, 3, size, size]``.

        Raises:
            InputError: the network returned another shape.
            NotFiniteError: it returned values that are not finite.
        """
        if not len(batch):
            return np.zeros((0, self.num_features), dtype=np.float32)
        return check_features(
            self.forward(batch), len(batch), self.num_features, source=f"detector '{self.name}'"
        )
