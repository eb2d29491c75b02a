"""One ``.safetensors`` file that holds everything needed to rebuild a detector and to score."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lcmem_cli.engine.errors import CheckpointError, CorruptFileError, InputError
from lcmem_cli.engine.files import atomic_path
from lcmem_cli.engine.models.codec import CodecSpec, build_model, hash_encoder
from lcmem_cli.engine.models.header import (
    HEADER_KEY,
    Header,
    Stage,
    check_header,
    check_sum,
    read_header,
)
from lcmem_cli.engine.models.siamese import (
    MAX_SIDE,
    NetworkSpec,
    SiameseNetwork,
    build_network,
    check_fit,
    load_strictly,
)
from lcmem_cli.engine.results import Threshold

SUFFIX = ".safetensors"
MAX_EMBEDDED_CODEC_BYTES = 32 << 20
_NETWORK, _CODEC, _ADAPTED_TO = "network.", "codec.", "adapted_to"
_DIGEST_BYTES = 32
_FIELDS = tuple(name for name in Header.model_fields if name not in ("format", "checksum"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A detector at rest.

    Attributes:
        stage: ``stage1``, ``finetune`` or ``converted``.
        network: shape of the network.
        network_state: its weights, by the names of ``SiameseNetwork.state_dict``.
        codec: what made the latents that the network was trained on.
        codec_config: diffusers config, if the codec's weights are inside.
        codec_state: encoder weights, if they are inside.
        image_size: side in pixels that images are resized to before the codec.
        thresholds: fitted decision thresholds.
        adapted_thresholds: for the same network adapted to a kind of images that it does not know,
            see ``detectors.adapted``.
        training: resolved config, data digests and results of the training, for people.
        adapted_to: SHA-256 of the files of the images that the last layer was adapted to, sorted.
        fingerprint: SHA-256 over all of the above that changes a score; set when saved or loaded.
    """

    stage: Stage
    network: NetworkSpec
    network_state: dict[str, torch.Tensor]
    codec: CodecSpec
    codec_config: dict[str, Any] | None
    codec_state: dict[str, torch.Tensor] | None
    image_size: int
    thresholds: tuple[Threshold, ...] = ()
    adapted_thresholds: tuple[Threshold, ...] = ()
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapted_to: tuple[str, ...] = ()
    fingerprint: str = ""

    def build(self, *, source: str = "checkpoint") -> SiameseNetwork:
        """Return the network with its weights, in evaluation mode, float32."""
        state = {
            key: value.to(torch.float32) if value.is_floating_point() else value
            for key, value in self.network_state.items()
        }
        return build_network(self.network, state, source=source)

    def at_size(self, size: int) -> Checkpoint:
        """Return the same weights for images of another side, without thresholds.

        Raises:
            InputError: the codec cannot halve the side so often.
        """
        factor = self.codec.downsampling
        if size % factor or not 0 < size <= MAX_SIDE:
            raise InputError(
                f"image size {size}: it must be a multiple of the codec's downsampling {factor}, "
                f"at most {MAX_SIDE}"
            )
        network = dataclasses.replace(self.network, input_size=size // factor)
        return self.changed(network=network, image_size=size)

    def changed(self, **fields: Any) -> Checkpoint:
        """Return a copy that scores otherwise: with its own fingerprint, without thresholds."""
        copy = dataclasses.replace(self, thresholds=(), adapted_thresholds=(), **fields)
        return copy.with_fingerprint()

    def codec_model(self) -> nn.Module | None:
        """Return the autoencoder that is inside the file (encoder only), or ``None``.

        Raises:
            CorruptFileError: it is not the one that the network was trained with.
        """
        if self.codec_config is None or self.codec_state is None:
            return None
        source = "codec inside the checkpoint"
        with torch.device("meta"):  # a config that asks for more than the weights is not built
            check_fit(self._encoder(), self.codec_state, source=source)
        model = self._encoder()
        state = {key: value.to(torch.float32) for key, value in self.codec_state.items()}
        load_strictly(model, state, source=source)
        if self.codec.weights_hash != hash_encoder(model):
            raise CorruptFileError(
                f"{source}: its weights do not match their recorded hash: the file is damaged or "
                "was edited; get it again"
            )
        return model

    def _encoder(self) -> nn.Module:
        model: Any = build_model(self.codec.class_name, self.codec_config or {})
        model.decoder = nn.Identity()
        if hasattr(model, "post_quant_conv"):
            model.post_quant_conv = None
        built: nn.Module = model
        return built

    def with_fingerprint(self) -> Checkpoint:
        """Return a copy whose fingerprint is computed from its content."""
        return dataclasses.replace(self, fingerprint=compute_fingerprint(self))

    def summary(self) -> dict[str, Any]:
        """Return the header as plain values, with counts in place of the weights."""
        return {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "image_size": self.image_size,
            "network": dataclasses.asdict(self.network),
            "num_parameters": sum(v.numel() for v in self.network_state.values()),
            "codec": dataclasses.asdict(self.codec),
            "codec_inside": self.codec_state is not None,
            "thresholds": [{"name": t.name, **dataclasses.asdict(t)} for t in self.thresholds],
            "adapted_thresholds": [
                {"name": t.name, **dataclasses.asdict(t)} for t in self.adapted_thresholds
            ],
            "num_adapted_to": len(self.adapted_to),
            "training": self.training,
        }


def compute_fingerprint(checkpoint: Checkpoint) -> str:
    """Hash everything that changes a score: weights, shapes, codec, preprocessing."""
    codec = dataclasses.asdict(checkpoint.codec)
    for label in ("name", "revision"):  # what it is called does not change what it computes
        codec.pop(label)
    header = {
        "network": dataclasses.asdict(checkpoint.network),
        "codec": codec,
        "image_size": checkpoint.image_size,
    }
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key, value in sorted(checkpoint.network_state.items()):
        digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Write a checkpoint atomically and return it with its fingerprint.

    Args:
        path: target, by convention ``*.safetensors``.
        checkpoint: what to write; its fingerprint is computed here.

    Raises:
        CheckpointError: ``load_checkpoint`` would refuse it.
    """
    from safetensors.torch import save_file

    checkpoint = checkpoint.with_fingerprint()
    tensors = {_NETWORK + k: _dense(v) for k, v in checkpoint.network_state.items()}
    if checkpoint.codec_state is not None:
        tensors |= {_CODEC + k: _dense(v) for k, v in checkpoint.codec_state.items()}
    if checkpoint.adapted_to:  # too much for a header where there are many images
        raw = bytes.fromhex("".join(checkpoint.adapted_to))
        tensors[_ADAPTED_TO] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    try:
        header = Header.model_validate({name: getattr(checkpoint, name) for name in _FIELDS})
        text = header.to_json(checkpoint.adapted_to)
    except ValueError as error:  # before the work is lost in a file that cannot be read
        raise CheckpointError(f"{path}: not written: {error}") from error
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={HEADER_KEY: text})
    return checkpoint


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. Nothing in the file is ever executed.

    Raises:
        InputError: no such file, or of another format.
        CheckpointError: not an lcmem checkpoint.
        CorruptFileError: a value in its header is missing or out of its bounds, or the content
            does not match its fingerprint or its checksum.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    values = read_header(path)
    header = check_header(values, source=str(path))
    try:
        tensors = load_file(path)
        adapted_to = _digests(tensors.get(_ADAPTED_TO))
    except (ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a complete lcmem checkpoint: {error}") from error
    check_sum(values, adapted_to, source=str(path))
    checkpoint = Checkpoint(
        **{name: getattr(header, name) for name in _FIELDS},
        network_state=_below(_NETWORK, tensors),
        codec_state=_below(_CODEC, tensors) or None,
        adapted_to=adapted_to,
    )
    found = compute_fingerprint(checkpoint)
    if found != checkpoint.fingerprint:
        raise CorruptFileError(
            f"{path}: content does not match its fingerprint ({found[:12]} instead of "
            f"{checkpoint.fingerprint[:12]}): the file is damaged or was edited; get it again"
        )
    return checkpoint


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key[len(prefix) :]: v for key, v in tensors.items() if key.startswith(prefix)}


def embedded_checkpoint() -> Path:
    """Return the path of the checkpoint that ships with the package."""
    return Path(__file__).resolve().parents[2] / "assets" / "default" / "lcmem-default.safetensors"


def halve(checkpoint: Checkpoint) -> Checkpoint:
    """Return a copy whose network weights are stored in float16; computing stays in float32.

    Thresholds are dropped: they belong to the unrounded weights.
    """
    state = {
        k: v.to(torch.float16) if v.dtype == torch.float32 else v
        for k, v in checkpoint.network_state.items()
    }
    return checkpoint.changed(network_state=state)


def _digests(packed: torch.Tensor | None) -> tuple[str, ...]:
    """Return SHA-256 digests that stand one behind the other.

    Raises:
        ValueError: it is something else.
    """
    if packed is None:
        return ()
    if packed.dtype != torch.uint8 or packed.numel() % _DIGEST_BYTES:
        raise ValueError(f"{_ADAPTED_TO} holds no digests")
    text = _bytes(packed).hex()
    width = 2 * _DIGEST_BYTES
    return tuple(text[start : start + width] for start in range(0, len(text), width))


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().numpy().tobytes()  # in logical order, whatever the strides
