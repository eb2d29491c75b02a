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

_CONFIG, _WEIGHTS, _SUFFIX = "config.json", "diffusion_pytorch_model", ".safetensors"
_FILES = (_CONFIG, f"{_WEIGHTS}{_SUFFIX}")
_IN_PIPELINE = "vae"


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
        name: ``embedded`` (the one inside the default checkpoint), ``none`` (pixels), a hub id such
            as ``stabilityai/sd-vae-ft-mse``, or a diffusers folder: an autoencoder's, that of a
            pipeline with one in ``vae``, or the ``.safetensors`` file in it.
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
    if Path(name).exists():
        return Codec(_from_folder(name), name=name, **options)
    if not _is_hub_id(name):
        raise InputError(
            f"codec '{name}': no such folder, and not a hub id like stabilityai/sd-vae-ft-mse"
        )
    return Codec(_from_hub(name, revision), name=name, **options)


def needs_download(name: str, revision: str | None = None) -> bool:
    """Return whether ``load_codec`` would have to ask the hub for weights."""
    from huggingface_hub import try_to_load_from_cache

    if name in (EMBEDDED, PIXELS) or Path(name).exists() or not _is_hub_id(name):
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


def _from_folder(name: str) -> torch.nn.Module:
    """Load the autoencoder of a folder, in half precision where it has no other weights."""
    path = Path(name)
    folder = path.parent if path.is_file() else path
    if not (folder / _CONFIG).is_file() and (folder / _IN_PIPELINE / _CONFIG).is_file():
        folder = folder / _IN_PIPELINE
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        class_name = str(config["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"codec '{name}': no diffusers autoencoder there ({_CONFIG} with _class_name, beside "
            f"the weights or in {_IN_PIPELINE}/)"
        ) from error
    if class_name not in CODEC_CLASSES:
        raise InputError(f"codec '{name}': {class_name} is not one of {', '.join(CODEC_CLASSES)}")
    try:
        return _from_pretrained(
            str(folder), class_name, name=name, variant=_variant(path, folder), is_here=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"codec '{name}': cannot be loaded: {error}") from error


def _variant(path: Path, folder: Path) -> str | None:
    """Return which variant of the weights to take, such as ``fp16``; ``None``: the usual ones.

    Args:
        path: as it was named: the folder, or the file that is wanted in it.
        folder: of the autoencoder.

    Raises:
        InputError: the file has not the name that diffusers gives to weights.
    """
    found = [path] if path.is_file() else sorted(folder.glob(f"{_WEIGHTS}*{_SUFFIX}"))
    variants = {file: file.name.removeprefix(_WEIGHTS).removesuffix(_SUFFIX) for file in found}
    if path.is_file() and (f"{_WEIGHTS}{variants[path]}{_SUFFIX}" != path.name):
        raise InputError(
            f"codec '{path}': expected {_FILES[1]} with its {_CONFIG} beside it; a checkpoint that "
            "is one file has to be converted to a diffusers folder"
        )
    names = list(variants.values())
    return names[0].removeprefix(".") or None if names and "" not in names else None


def _from_hub(name: str, revision: str | None) -> torch.nn.Module:
    class_name = "AutoencoderTiny" if "tae" in name.lower() else "AutoencoderKL"
    is_here = not needs_download(name, revision) or not hub_answers(name)
    try:
        return _from_pretrained(name, class_name, name=name, revision=revision, is_here=is_here)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsUnavailableError(
            f"codec '{name}': not in the local cache, and the hub could not be reached.\n"
            f"On a machine with internet run: hf download {name}\n"
            "then copy the folder here and pass its path, or set HF_HOME to a copy of its cache. "
            "Offline, --codec embedded always works."
        ) from error


def _from_pretrained(
    source: str,
    class_name: str,
    *,
    name: str,
    is_here: bool,
    revision: str | None = None,
    variant: str | None = None,
) -> torch.nn.Module:
    import diffusers

    model: torch.nn.Module
    model, info = getattr(diffusers, class_name).from_pretrained(
        source,
        revision=revision,
        variant=variant,
        use_safetensors=True,
        local_files_only=is_here,
        torch_dtype=torch.float32,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"codec '{name}': {len(missing)} of its weights are missing, {missing[0]} first; copy "
            "the whole file"
        )
    return model
