"""Finding a codec by its name: inside the package or a checkpoint, in a folder, or on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from lcmem_cli.engine.errors import InputError, WeightsUnavailableError
from lcmem_cli.engine.models.checkpoint import Checkpoint, embedded_checkpoint, load_checkpoint
from lcmem_cli.engine.models.codec import CODEC_CLASSES, EMBEDDED, PIXELS, Codec
from lcmem_cli.engine.models.weights import hub_answers

_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def load_codec(
    name: str = EMBEDDED,
    *,
    revision: str | None = None,
    input_range: Literal["symmetric", "unit"] = "symmetric",
    posterior: Literal["mean", "sample"] = "mean",
    device: str | torch.device = "cpu",
) -> Codec:
    """Load a codec by name.

    Args:
        name: ``embedded`` (the one inside the default checkpoint), ``none`` (pixels), a diffusers
            folder, or a hub id such as ``stabilityai/sd-vae-ft-mse``.
        revision: of a hub id.
        input_range: what range the VAE is fed.
        posterior: mean or sample.
        device: torch device.

    Raises:
        InputError: a folder that is no diffusers autoencoder.
        WeightsUnavailableError: a hub id that is neither cached nor reachable.
    """
    options: dict[str, Any] = {
        "revision": revision,
        "input_range": input_range,
        "posterior": posterior,
        "device": device,
    }
    if name == PIXELS:
        return Codec(None, name=name, **options)
    if name == EMBEDDED:
        checkpoint = load_checkpoint(embedded_checkpoint())
        model = checkpoint.codec_model()
        assert model is not None
        return Codec(model, name=name, **options)
    folder = Path(name)
    if folder.is_dir():
        return Codec(_from_pretrained(name, folder=folder, revision=None), name=name, **options)
    if not _is_hub_id(name):
        raise InputError(
            f"codec '{name}': no such folder, and not a hub id like stabilityai/sd-vae-ft-mse"
        )
    return Codec(_from_pretrained(name, folder=None, revision=revision), name=name, **options)


def needs_download(name: str, revision: str | None = None) -> bool:
    """Return whether ``load_codec`` would have to ask the hub for weights."""
    from huggingface_hub import try_to_load_from_cache

    if name in (EMBEDDED, PIXELS) or Path(name).is_dir() or not _is_hub_id(name):
        return False
    return not all(
        isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in _FILES
    )


def _is_hub_id(name: str) -> bool:
    return not Path(name).is_absolute() and not name.startswith(".") and name.count("/") == 1


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


def _from_pretrained(name: str, *, folder: Path | None, revision: str | None) -> torch.nn.Module:
    import diffusers

    class_name = "AutoencoderKL"
    if folder is not None:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            class_name = str(config["_class_name"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"codec '{name}': no diffusers autoencoder there (config.json with _class_name)"
            ) from error
        if class_name not in CODEC_CLASSES:
            raise InputError(
                f"codec '{name}': {class_name} is not one of {', '.join(CODEC_CLASSES)}"
            )
    elif "tae" in name.lower():
        class_name = "AutoencoderTiny"
    is_here = folder is not None or not needs_download(name, revision)
    try:
        model: torch.nn.Module
        model, info = getattr(diffusers, class_name).from_pretrained(
            name,
            revision=revision,
            use_safetensors=True,
            local_files_only=is_here or not hub_answers(name),
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        if folder is not None:
            raise InputError(f"codec '{name}': cannot be loaded: {error}") from error
        raise WeightsUnavailableError(
            f"codec '{name}': not in the local cache, and the hub could not be reached.\n"
            f"On a machine with internet run: hf download {name}\n"
            "then copy the folder here and pass its path, or set HF_HOME to a copy of its cache. "
            "Offline, --codec embedded always works."
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"codec '{name}': {len(missing)} of its weights are missing, {missing[0]} first; copy "
            "the whole file"
        )
    return model
