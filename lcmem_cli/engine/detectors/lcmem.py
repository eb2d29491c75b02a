"""The LCMem detector: codec, Siamese network, head on the absolute feature difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.adapted import AdaptedHead
from lcmem_cli.engine.detectors.base import Detector, FloatArray
from lcmem_cli.engine.detectors.head import HeadDetector
from lcmem_cli.engine.detectors.vectors import check_features
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.models.checkpoint import Checkpoint, load_checkpoint
from lcmem_cli.engine.models.codec import Codec, load_codec
from lcmem_cli.engine.models.hub import locate_checkpoint
from lcmem_cli.engine.models.siamese import optimise_for_inference
from lcmem_cli.engine.store.search import TopK, approximate_top_k

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
    """

    def __init__(
        self, checkpoint: Checkpoint, *, name: str, codec: str | None = None, device: str = "cpu"
    ) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self.device = torch.device(device)
        self.fingerprint = checkpoint.fingerprint
        self.input_size = checkpoint.image_size
        self.num_features = checkpoint.network.num_features
        self.adapted_to = frozenset(checkpoint.adapted_to)
        self.thresholds = checkpoint.thresholds
        self.adapted_thresholds = checkpoint.adapted_thresholds
        network = checkpoint.build(source=name).to(self.device).requires_grad_(False)
        self.network = optimise_for_inference(network)
        if self.device.type == "cpu":
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
        return self.embed_latents(self.codec.encode(batch, together=together))

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
        return check_features(
            self.network(latents), len(latents), self.num_features, source=self.name
        )

    def approximate(self) -> ApproximateLCMem:
        """Return this detector with a search that is approximate; its scores are the same."""
        copy = ApproximateLCMem.__new__(ApproximateLCMem)
        copy.__dict__.update(self.__dict__)
        return copy


class ApproximateLCMem(LCMemDetector):
    """Finds candidates with an inverted file and scores them exactly; see ``approximate_top_k``."""

    def top_k(self, queries: FloatArray, bank: FloatArray, k: int) -> TopK:
        """Find each query's ``k`` best rows of the bank, perhaps missing some.

        Raises:
            MissingExtraError: faiss is not installed.
        """
        found, recall = approximate_top_k(queries, bank, self.weight, k)
        self.search_recall = min(self.search_recall, recall)
        return TopK(self._probability(found.scores), found.rows)


def approximate_search(detector: Detector) -> HeadDetector:
    """Return the detector with an approximate search.

    Raises:
        InputError: not an LCMem detector.
    """
    if isinstance(detector, LCMemDetector):
        return detector.approximate()
    if isinstance(detector, AdaptedHead) and isinstance(detector.network, LCMemDetector):
        return AdaptedHead(detector.network.approximate(), detector.adaptation)
    raise InputError(
        f"--approximate has no effect with {detector.name}: only LCMem detectors have an "
        "approximate search; leave it out"
    )


def load_codec_of(
    checkpoint: Checkpoint,
    *,
    source: str,
    codec: str | None = None,
    device: str | torch.device = "cpu",
) -> Codec:
    """Load the codec that a checkpoint's network was trained with.

    Args:
        checkpoint: what needs it.
        source: its name in messages.
        codec: folder or hub id that replaces the recorded codec's name.
        device: torch device.

    Raises:
        InputError: the codec that was found is another one.
        WeightsUnavailableError: its weights are not on this machine.
    """
    spec = checkpoint.codec
    options: dict[str, Any] = {"input_range": spec.input_range, "device": device}
    model = checkpoint.codec_model()
    if model is not None and codec is None:
        return Codec(model, name=spec.name, revision=spec.revision, **options)
    name = codec or spec.name
    found = load_codec(name, revision=spec.revision if name == spec.name else None, **options)
    if spec.weights_hash and found.spec.weights_hash != spec.weights_hash:
        raise InputError(
            f"{source} was trained on latents of another codec: it needs {spec.describe()}, "
            f"this is {found.spec.describe()}; pass the right one with --codec"
        )
    if found.spec.latent_channels != checkpoint.network.in_channels:
        raise InputError(
            f"{source} takes latents of {checkpoint.network.in_channels} channels, "
            f"codec {name} makes {found.spec.latent_channels}"
        )
    return found


def load_lcmem(
    checkpoint: str | Path | None = None, *, codec: str | None = None, device: str = "auto"
) -> LCMemDetector:
    """Load a detector from a checkpoint, by default the embedded one.

    Args:
        checkpoint: its name, see ``locate_checkpoint``.
        codec: where to find the codec if its weights are not in the checkpoint.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Raises:
        InputError: no such file.
        CheckpointError: not a checkpoint.
        WeightsUnavailableError: it cannot be had from the hub.
    """
    path = locate_checkpoint(checkpoint)
    name = "lcmem" if checkpoint is None else f"lcmem:{checkpoint}"
    return LCMemDetector(
        load_checkpoint(path), name=name, codec=codec, device=resolve_device(device)
    )
