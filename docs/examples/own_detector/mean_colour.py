"""A detector of another package: compares the mean colours of two images."""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli import Detector
from lcmem_cli.engine.detectors.registry import DetectorKind, Request


class MeanColour(Detector):
    """The nearer the mean colours, the higher the score; 0 is the same colour."""

    input_size = 64  # images are resized to this square
    num_features = 3
    # Change it whenever a score would change: caches and thresholds belong to a fingerprint.
    fingerprint = hashlib.sha256(b"mean-colour 1").hexdigest()

    def embed_batch(self, batch: torch.Tensor) -> NDArray[np.float32]:
        """Embed images ``[n, 3, 64, 64]`` in [0, 1] to ``[n, 3]``."""
        return batch.mean(dim=(2, 3)).numpy()

    def score_features(self, a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
        """Score row i of ``a`` with row i of ``b``, ``[n, 3], [n, 3] -> [n]``."""
        return -np.abs(a - b).sum(axis=1, dtype=np.float64)


def build(request: Request) -> MeanColour:
    """Make the detector that a name asks for."""
    return MeanColour()


KIND = DetectorKind(
    name="mean-colour",
    summary="difference of mean colours",
    weights="none",
    licence="none",
    build=build,
)
