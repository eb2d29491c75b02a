"""Small pictures and small detectors for the tests of the audit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from conftest import random_checkpoint
from PIL import Image

from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.models.checkpoint import Checkpoint
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.siamese import NetworkSpec

SIDE = 32


class SmallCorrelation(Detector):
    """Correlation of 8 x 8 pixels; counts the images that it embeds."""

    name = "small-correlation"
    fingerprint = "5" * 64
    input_size = SIDE
    num_features = 3 * 8 * 8

    def __init__(self) -> None:
        self.num_embedded = 0

    def embed_batch(self, batch: torch.Tensor) -> np.ndarray:
        self.num_embedded += len(batch)
        pixels = torch.nn.functional.avg_pool2d(batch, SIDE // 8).flatten(1)
        pixels = pixels - pixels.mean(dim=1, keepdim=True)
        return (pixels / pixels.norm(dim=1, keepdim=True).clamp(min=1e-6)).numpy()

    def score_features(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) * b).sum(axis=1)

    def score_matrix(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a.astype(np.float64) @ b.astype(np.float64).T


def small_network() -> Checkpoint:
    """A network on pixels with random weights, but the more alike features the higher the score."""
    spec = NetworkSpec(
        backbone="test_resnet", in_channels=3, num_features=8, input_size=SIDE,
        normalisation="sample", feature_rms=1.5,
    )  # fmt: skip
    checkpoint = random_checkpoint(spec, load_codec("none"), image_size=SIDE)
    state = dict(checkpoint.network_state)
    state["head.weight"] = -state["head.weight"].abs()
    return checkpoint.changed(network_state=state)


def picture(seed: int, *, side: int = 48) -> Image.Image:
    """A smooth random colour pattern."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC)


def altered(image: Image.Image) -> Image.Image:
    """The picture darker, with less contrast."""
    return Image.fromarray((np.asarray(image) * 0.6 + 20).astype(np.uint8))


def save_all(folder: Path, seeds: Sequence[int]) -> Path:
    """Save ``picture(seed)`` as ``<seed>.png`` for every seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        picture(seed).save(folder / f"{seed:05d}.png")
    return folder
