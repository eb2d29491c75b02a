"""One ``.safetensors`` file that holds everything needed to rebuild a detector and to score."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import TypeAdapter
from torch import nn

from lcmem_cli.engine.errors import CheckpointError, CorruptFileError, InputError
from lcmem_cli.engine.files import atomic_path
from lcmem_cli.engine.models.codec import CodecSpec, build_model, hash_encoder
from lcmem_cli.engine.models.siamese import (
    NetworkSpec,
    SiameseNetwork,
    build_network,
    check_fit,
    load_strictly,
)
from lcmem_cli.engine.results import Threshold

FORMAT_VERSION = 1
HEADER_KEY = "lcmem"
SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 16 << 20
MAX_HEADER_DEPTH = 64
MAX_SIDE, MAX_CHANNELS, MAX_FEATURE_RMS = 65_536, 4096, 10
MAX_EMBEDDED_CODEC_BYTES = 32 << 20
_NETWORK, _CODEC, _ADAPTED_TO = "network.", "codec.", "adapted_to"
_DIGEST_BYTES = 32
Stage = Literal["stage1", "finetune", "converted"]
_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "stage": str,
    "codec_config": (dict, type(None)),
    "image_size": int,
    "thresholds": list,
    "training": dict,
    "fingerprint": str,
}


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
        if self.codec.weights_hash not in ("", hash_encoder(model)):
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
    network = dataclasses.asdict(checkpoint.network)
    # Files made before there were these stay valid.
    for field in ("inner_stride", "inner_bands", "feature_rms"):
        if network[field] is None:
            network.pop(field)
    header = {
        "network": network,
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
    header = {
        "format": FORMAT_VERSION,
        "stage": checkpoint.stage,
        "network": dataclasses.asdict(checkpoint.network),
        "codec": dataclasses.asdict(checkpoint.codec),
        "codec_config": checkpoint.codec_config,
        "image_size": checkpoint.image_size,
        "thresholds": [dataclasses.asdict(t) for t in checkpoint.thresholds],
        "adapted_thresholds": [dataclasses.asdict(t) for t in checkpoint.adapted_thresholds],
        "training": checkpoint.training,
        "fingerprint": checkpoint.fingerprint,
    }
    text = json.dumps(header, sort_keys=True)
    try:
        _check_header(json.loads(text))
        if _is_deeper_than(header, MAX_HEADER_DEPTH) or len(text) > MAX_HEADER_BYTES // 4:
            raise ValueError("what it tells of its training is too long")
    except ValueError as error:  # before the work is lost in a file that cannot be read
        raise CheckpointError(f"{path}: not written: {error}") from error
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={HEADER_KEY: text})
    return checkpoint


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. Nothing in the file is ever executed.

    Raises:
        InputError: no such file.
        CheckpointError: not an lcmem checkpoint, or of a newer format.
        CorruptFileError: the content does not match the fingerprint in its header.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    try:
        if header["format"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: checkpoint format {header['format']!r}; this version of lcmem reads "
                f"format {FORMAT_VERSION}: install a version that matches"
            )
        _check_header(header)
        tensors = load_file(path)
        codec_state = {k[len(_CODEC) :]: v for k, v in tensors.items() if k.startswith(_CODEC)}
        shape: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in header["network"].items()
        }
        checkpoint = Checkpoint(
            stage=header["stage"],
            network=NetworkSpec(**shape),
            network_state={
                k[len(_NETWORK) :]: v for k, v in tensors.items() if k.startswith(_NETWORK)
            },
            codec=CodecSpec(**header["codec"]),
            codec_config=header["codec_config"],
            codec_state=codec_state or None,
            image_size=header["image_size"],
            thresholds=tuple(Threshold.from_dict(t) for t in header["thresholds"]),
            adapted_thresholds=tuple(
                Threshold.from_dict(t) for t in header.get("adapted_thresholds", ())
            ),
            training=header["training"],
            adapted_to=_digests(tensors.get(_ADAPTED_TO)),
            fingerprint=header["fingerprint"],
        )
        found = compute_fingerprint(checkpoint)
    except (
        KeyError, TypeError, ValueError, AttributeError, OSError, SafetensorError
    ) as error:  # fmt: skip
        raise CheckpointError(f"{path}: not a complete lcmem checkpoint: {error}") from error
    if found != checkpoint.fingerprint:
        raise CorruptFileError(
            f"{path}: content does not match its fingerprint ({found[:12]} instead of "
            f"{str(checkpoint.fingerprint)[:12]}): the file is damaged or was edited; get it again"
        )
    return checkpoint


def read_header(path: Path) -> dict[str, Any]:
    """Read the lcmem header of a checkpoint without its weights.

    Raises:
        InputError: no such file.
        CheckpointError: not an lcmem checkpoint.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: not a safetensors file (header of {length} bytes); for the authors' "
                    ".pth files see: lcmem convert"
                )
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(json.loads(raw)["__metadata__"][HEADER_KEY])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: a safetensors file, but not an lcmem checkpoint; convert it with: "
            "lcmem convert"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its lcmem header is not an object")
    if _is_deeper_than(header, MAX_HEADER_DEPTH):
        raise CheckpointError(f"{path}: its lcmem header is nested over {MAX_HEADER_DEPTH} deep")
    return header


def _check_header(header: dict[str, Any]) -> None:
    """Check types and ranges, so that whatever is built of the header is what it says.

    Raises:
        ValueError: naming the field (also as pydantic's ``ValidationError``).
        KeyError: a field is missing.
        TypeError: an entry is not an object.
    """
    for name, kind in (("network", NetworkSpec), ("codec", CodecSpec)):
        # A file name need not be UTF-8, which pydantic insists on; its type is all that counts.
        text = json.dumps(dict(header[name]), ensure_ascii=False).encode("utf-8", "replace")
        TypeAdapter(kind).validate_json(text, strict=True)
    for name, wanted in _FIELD_TYPES.items():
        if not isinstance(header[name], wanted) or isinstance(header[name], bool):
            raise ValueError(f"{name} is not of the type that it must have")
    if header["stage"] not in get_args(Stage):
        raise ValueError(f"stage must be one of {', '.join(get_args(Stage))}")
    for thresholds in (header["thresholds"], header.get("adapted_thresholds", [])):
        text = json.dumps(thresholds).encode()
        TypeAdapter(list[Threshold]).validate_json(text, strict=True)
    network, codec = header["network"], header["codec"]
    for name, value, highest in (
        ("image_size", header["image_size"], MAX_SIDE),
        ("network.input_size", network["input_size"], MAX_SIDE),
        ("network.in_channels", network["in_channels"], MAX_CHANNELS),
        ("network.num_features", network["num_features"], MAX_SIDE),
        ("network.stem_stride", network.get("stem_stride") or 1, MAX_CHANNELS),
        ("network.inner_stride", network.get("inner_stride") or 1, MAX_CHANNELS),
        ("network.inner_bands", network.get("inner_bands") or 1, MAX_CHANNELS),
        ("codec.latent_channels", codec["latent_channels"], MAX_CHANNELS),
        ("codec.downsampling", codec["downsampling"], MAX_CHANNELS),
    ):
        if not 1 <= value <= highest:
            raise ValueError(f"{name} must lie in 1 to {highest:,}")
    feature_rms = network.get("feature_rms")
    if feature_rms is not None and not 0 < feature_rms <= MAX_FEATURE_RMS:
        raise ValueError(f"network.feature_rms must lie above 0, to {MAX_FEATURE_RMS}")
    for name in ("mean", "std"):
        values = network.get(name)
        if values is None and network["normalisation"] != "dataset":
            continue
        if values is None or len(values) != network["in_channels"]:
            raise ValueError(f"network.{name} must hold a number for each channel")
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"network.{name} holds values that are not finite")


def _is_deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return bool(level)


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
