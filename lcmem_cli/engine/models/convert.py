"""Reading the authors' checkpoints: torchvision's ConvNeXt names, strictly.

Layouts (method: arXiv 2512.14421): flat or under ``state_dict``, perhaps with ``module.``
prefixes; network under ``model.``, head ``fc_end.``, and in stage-2 files the codec under ``vae.``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from lcmem_cli.engine.errors import CheckpointError, InputError
from lcmem_cli.engine.files import check_writable
from lcmem_cli.engine.models.checkpoint import SUFFIX, Checkpoint, save_checkpoint
from lcmem_cli.engine.models.codec import CodecSpec
from lcmem_cli.engine.models.siamese import NetworkSpec, SiameseNetwork, load_strictly
from lcmem_cli.engine.models.weights import read_state_dict

DEFAULT_CODEC = "stabilityai/sd-vae-ft-mse"
_CODEC_DOWNSAMPLING = 8
_WIDTHS = {
    96: ("convnext_tiny", "convnext_small"),
    128: ("convnext_base",),
    192: ("convnext_large",),
}
_DEEP = 27
_BLOCK = {"0": "conv_dw", "2": "norm", "3": "mlp.fc1", "5": "mlp.fc2"}


def convert_reference(
    source: Path,
    target: Path,
    *,
    codec: str = DEFAULT_CODEC,
    image_size: int = 512,
    input_range: Literal["unit", "symmetric"] = "unit",
) -> Checkpoint:
    """Convert a checkpoint of the published code to lcmem's format.

    Args:
        source: ``.pth`` file; loaded without executing anything in it.
        target: ``.safetensors`` file to write.
        codec: id or folder of the VAE that it was trained with.
        image_size: side in pixels that it was trained at.
        input_range: what its VAE was fed; the published code feeds [0, 1].

    Returns:
        What was written.

    Raises:
        InputError: no such file, ``target`` is no ``.safetensors`` file, or a size that the codec
            does not divide.
        CheckpointError: a key is missing or unknown; each is named.
    """
    check_writable(target, suffix=SUFFIX)
    if image_size % _CODEC_DOWNSAMPLING:
        raise InputError(f"--size {image_size} is not divisible by {_CODEC_DOWNSAMPLING}")
    renamed = _read_renamed(source)
    spec = _spec_of(renamed, input_size=image_size // _CODEC_DOWNSAMPLING, source=source)
    network = SiameseNetwork(spec)
    load_strictly(network, renamed, source=str(source))
    checkpoint = Checkpoint(
        stage="converted",
        network=spec,
        network_state={k: v.detach().clone() for k, v in network.state_dict().items()},
        codec=CodecSpec(
            name=codec,
            revision=None,
            class_name="AutoencoderKL",
            input_range=input_range,
            posterior="mean",
            latent_channels=spec.in_channels,
            downsampling=_CODEC_DOWNSAMPLING,
            weights_hash="",
        ),
        codec_config=None,
        codec_state=None,
        image_size=image_size,
        training={"converted_from": source.name},
    )
    return save_checkpoint(target, checkpoint)


def _read_renamed(source: Path) -> dict[str, torch.Tensor]:
    """Read the network's weights under our names."""
    renamed = {
        rename(key, source): value
        for key, value in read_state_dict(source).items()
        if not key.startswith("vae.")  # frozen, and found by its name
    }
    return {k: v.reshape(-1) if k.endswith(".gamma") else v for k, v in renamed.items()}


def _spec_of(renamed: Mapping[str, torch.Tensor], *, input_size: int, source: Path) -> NetworkSpec:
    """Tell from the shapes which ConvNeXt it is."""
    try:
        width, channels = renamed["backbone.stem.0.weight"].shape[:2]
        num_features = renamed["backbone.head.fc.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{source}: not a checkpoint of the published code: model.features.0.0.weight or "
            "model.classifier.2.weight is missing"
        ) from error
    if width not in _WIDTHS:
        raise CheckpointError(f"{source}: no ConvNeXt has a first layer of {width} channels")
    depth = len({k for k in renamed if re.fullmatch(r"backbone\.stages\.2\.blocks\.\d+\.gamma", k)})
    names = _WIDTHS[width]
    return NetworkSpec(
        backbone=names[-1] if depth == _DEEP else names[0],
        in_channels=channels,
        num_features=num_features,
        input_size=input_size,
        normalisation="sample",  # as the published code infers
    )


def rename(key: str, source: Path | str) -> str:
    """Return our name of a key of the published code.

    Raises:
        CheckpointError: the key has no place in the network.
    """
    if match := re.fullmatch(r"fc_end\.(weight|bias)", key):
        return f"head.{match[1]}"
    if match := re.fullmatch(r"model\.features\.0\.([01])\.(weight|bias)", key):
        return f"backbone.stem.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"model\.features\.([246])\.([01])\.(weight|bias)", key):
        return f"backbone.stages.{int(match[1]) // 2}.downsample.{match[2]}.{match[3]}"
    if match := re.fullmatch(
        r"model\.features\.([1357])\.(\d+)\.block\.([0235])\.(weight|bias)", key
    ):
        stage = (int(match[1]) - 1) // 2
        return f"backbone.stages.{stage}.blocks.{match[2]}.{_BLOCK[match[3]]}.{match[4]}"
    if match := re.fullmatch(r"model\.features\.([1357])\.(\d+)\.layer_scale", key):
        return f"backbone.stages.{(int(match[1]) - 1) // 2}.blocks.{match[2]}.gamma"
    if match := re.fullmatch(r"model\.classifier\.([02])\.(weight|bias)", key):
        return f"backbone.head.{'norm' if match[1] == '0' else 'fc'}.{match[2]}"
    raise CheckpointError(
        f"{source}: unexpected weight '{key}': not a ConvNeXt checkpoint of the published code"
    )
