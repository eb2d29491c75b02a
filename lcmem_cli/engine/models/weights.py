"""Reading weights that others saved, without ever executing what is in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lcmem_cli.engine.errors import CheckpointError, InputError

LEVELS = ("state_dict", "model")
_HUB_SECONDS = 10.0


def hub_answers(repo_id: str) -> bool:
    """Ask the hub once, which fails sooner and more quietly than a download does.

    Args:
        repo_id: what to ask for; whether there is such a repository makes no difference.

    Returns:
        Whether it can be reached.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repo_id, timeout=_HUB_SECONDS)
    except Exception as error:  # the errors of the network's library differ between its versions
        return getattr(error, "response", None) is not None
    return True


def cached_weights(hub_id: str) -> Path | None:
    """Return the weights file of a hub model, if it is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors"):
        found = try_to_load_from_cache(hub_id, file)
        if isinstance(found, str):
            return Path(found)
    return None


def rename_by_order(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Give tensors the names of a model's, where they have the same shapes in the same order.

    Args:
        state: weights, perhaps under another program's names.
        expected: the model's own state dict.

    Returns:
        The weights, under their own names where the shapes or their order differ.
    """
    shapes = [value.shape for value in state.values()]
    if set(state) != set(expected) and shapes == [value.shape for value in expected.values()]:
        return dict(zip(expected, state.values(), strict=True))
    return dict(state)


def read_state_dict(path: Path, *, levels: Sequence[str] = LEVELS) -> dict[str, torch.Tensor]:
    """Read a state dict from ``.safetensors`` or a PyTorch file, never executing code from it.

    Prefixes that wrappers add (``module.``, ``_orig_mod.``) are removed.

    Args:
        path: the file.
        levels: keys under which the state dict may lie; each that is there is entered in turn.

    Raises:
        InputError: no such file.
        CheckpointError: not a file of tensors, or it holds objects that would have to be executed.
    """
    import pickle

    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it holds more than tensors, and loading it would execute code from "
            f"the file. Save its plain state dict instead. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        raise CheckpointError(f"{path}: not a readable weights file: {error}") from error
    for level in levels:
        if isinstance(state, dict) and isinstance(state.get(level), dict):
            state = state[level]
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: holds no state dict")
    result: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: entry {key!r} is no tensor")
        for prefix in ("module.", "_orig_mod."):
            key = key.removeprefix(prefix)
        result[key] = value
    return result
