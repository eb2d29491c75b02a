"""The LCMem detector: codec, Siamese network, head on the absolute feature difference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.detectors.adapted import some_images
from lcmem_cli.engine.detectors.base import Detector, FloatArray, check_features
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.detectors.head import HeadDetector
from lcmem_cli.engine.detectors.kinds import Request
from lcmem_cli.engine.detectors.vectors import VectorDetector
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.files import sha256_bytes
from lcmem_cli.engine.models.checkpoint import Checkpoint, load_checkpoint
from lcmem_cli.engine.models.codec import Codec
from lcmem_cli.engine.models.codec_loading import load_codec_of
from lcmem_cli.engine.models.hub import locate_checkpoint
from lcmem_cli.engine.models.siamese import optimise_for_inference
from lcmem_cli.engine.precision import (
    CHANNELS_LAST,
    Precision,
    computing_in,
    fingerprint_in,
    to_device,
)

_TOGETHER, _TOGETHER_PIXELS = 8, 8 * 256 * 256
"""Images, and their pixels, that the codec takes in one call on a CPU."""


class LCMemDetector(HeadDetector):
    """Scores ``sigmoid(w · |f1 - f2| + b)`` with ``f = sigmoid(backbone(codec(image)))``.

    Args:
        checkpoint: what to run.
        name: how the user named it.
        codec: folder or hub id that replaces the recorded codec's name; its weights must be the
            recorded ones where the checkpoint knows them.
        device: torch device string.
        precision: what codec and network compute in. In another than single precision scores are
            others, so the detector has a fingerprint of its own and no thresholds.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str,
        codec: str | None = None,
        device: str = "cpu",
        precision: Precision = "fp32",
    ) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self.device = torch.device(device)
        self.precision = precision
        self.fingerprint = fingerprint_in(precision, checkpoint.fingerprint)
        self.input_size = checkpoint.image_size
        self.num_features = checkpoint.network.num_features
        self.adapted_to = frozenset(checkpoint.adapted_to)
        if precision == "fp32":
            self.thresholds = checkpoint.thresholds
            self.adapted_thresholds = checkpoint.adapted_thresholds
        network = checkpoint.build(source=name).to(self.device).requires_grad_(False)
        self.network = optimise_for_inference(network)
        if self.device.type in CHANNELS_LAST:
            self.network = self.network.to(memory_format=torch.channels_last)
        head = self.network.head
        self.weight: NDArray[np.float32] = head.weight.detach().cpu().numpy().reshape(-1).copy()
        self.bias = float(head.bias.detach())
        self._codec_name = codec
        self._codec: Codec | None = None

    @property
    def codec(self) -> Codec:
        """The codec, loaded when first needed.

        Raises:
            InputError: the codec that was found is not the one that the network was trained with.
            WeightsUnavailableError: its weights are not on this machine.
        """
        if self._codec is None:
            self._codec = load_codec_of(
                self.checkpoint, source=self.name, codec=self._codec_name, device=self.device
            )
        return self._codec

    def embed_batch(self, batch: torch.Tensor) -> FloatArray:
        """Embed ``[n, 3, input_size, input_size]`` in [0, 1] to float32 ``[n, num_features]``."""
        together = min(_TOGETHER, max(1, _TOGETHER_PIXELS // self.input_size**2))
        with computing_in(self.precision, self.device):
            latents = self.codec.encode(to_device(batch, self.device), together=together)
        return self.embed_latents(latents)

    @torch.inference_mode()
    def embed_latents(self, latents: torch.Tensor) -> NDArray[np.float32]:
        """Embed raw latents; they are normalised inside.

        Args:
            latents: ``[n, C, h, w]`` float32, as the codec makes them. Convolutional backbones take
                any ``h, w``; scores are only meant for the size of the training.

        Returns:
            float32 ``[n, num_features]`` in [0, 1].

        Raises:
            InputError: wrong number of dimensions or channels.
            NotFiniteError: values that are not finite.
        """
        channels = self.checkpoint.network.in_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise InputError(
                f"latents must have the shape [n, {channels}, h, w], not {list(latents.shape)}"
            )
        latents = latents.to(self.device, torch.float32)
        with computing_in(self.precision, self.device):
            features = self.network(latents)
        return check_features(features, len(latents), self.num_features, source=self.name)


class SiameseCorrelation(VectorDetector):
    """An lcmem network whose feature vectors are compared by correlation instead of its head.

    This is how arXiv 2512.14421 scores the baselines trained with NT-Xent only, whose head has
    learnt nothing. Thresholds of the checkpoint belong to its head and are left out.

    Args:
        detector: what embeds.
        name: how the user named it.
    """

    likeness = "correlation"

    def __init__(self, detector: LCMemDetector, *, name: str) -> None:
        self.detector = detector
        self.device, self.adapted_to = detector.device, detector.adapted_to
        self.name = name
        self.fingerprint = sha256_bytes(f"correlation/{detector.fingerprint}".encode())
        self.input_size = detector.input_size
        self.num_features = detector.num_features

    def embed_batch(self, batch: torch.Tensor) -> FloatArray:
        """Embed ``[n, 3, input_size, input_size]`` in [0, 1] to float32 ``[n, num_features]``."""
        return self.detector.embed_batch(batch)


def load_lcmem(
    checkpoint: str | Path | None = None,
    *,
    codec: str | None = None,
    device: str = "auto",
    precision: Precision = "fp32",
) -> LCMemDetector:
    """Load a detector from a checkpoint, by default the embedded one.

    Args:
        checkpoint: its name, see ``locate_checkpoint``.
        codec: where to find the codec if its weights are not in the checkpoint.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        precision: see ``LCMemDetector``.

    Raises:
        InputError: no such file.
        CheckpointError: not a checkpoint.
        WeightsUnavailableError: it cannot be had from the hub.
    """
    path = locate_checkpoint(checkpoint)
    name = "lcmem" if checkpoint is None else f"lcmem:{checkpoint}"
    return LCMemDetector(
        load_checkpoint(path),
        name=name,
        codec=codec,
        device=resolve_device(device),
        precision=precision,
    )


def build(request: Request) -> Detector:
    """Build the detector that a name asks for, adapted if it says so."""
    return adapt_as_asked(load_asked(request), request)


def build_correlation(request: Request) -> Detector:
    """Build the detector that compares a checkpoint's features by correlation."""
    return SiameseCorrelation(load_asked(request), name=request.name)


def load_asked(request: Request) -> LCMemDetector:
    """Load the network that a name asks for."""
    return load_lcmem(
        request.target or None,
        codec=request.options.get("codec"),
        device=request.device,
        precision=request.options.get("precision", "fp32"),
    )


def adapt_as_asked(detector: Detector, request: Request) -> Detector:
    """Adapt a detector to the images of the option ``adapt`` (of a list with splits, to TRAIN)."""
    source = request.options.get("adapt")
    if source is None:
        return detector
    listed = load_manifest(Path(source), need_split=False)
    if any(record.split == "TRAIN" for record in listed.records):
        listed = listed.select("TRAIN")
    found = embed_files(detector, some_images(listed.paths()))
    for bad in found.unreadable:
        raise InputError(f"detector '{request.name}': {bad.path}: {bad.reason}")
    contents = {
        int(row): str(content)
        for row, content in zip(found.rows, found.content_hashes, strict=True)
    }
    return detector.adapted(found.features, [contents[row] for row in sorted(contents)]).detector
