"""The saved state of a training: written whole, compared with its checksums, never executed."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from lcmem_cli.engine.errors import CorruptFileError
from lcmem_cli.engine.files import atomic_path


def write_state(path: Path, payload: dict[str, Any]) -> None:
    """Write a state atomically; torch stores a CRC-32 of every tensor in the archive."""
    with atomic_path(path) as temporary:
        torch.save(payload, temporary)


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a state back, comparing it with the archive's checksums, which torch itself ignores.

    Raises:
        CorruptFileError: cut short, changed, or holding more than tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"{broken} does not match its checksum")
        payload = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(payload, dict):
            raise ValueError("it holds no state")
    except (
        OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile,
        pickle.UnpicklingError, NotImplementedError,
    ) as error:  # fmt: skip
        raise unreadable_state(path, error) from error
    return payload


def unreadable_state(path: Path, error: BaseException) -> CorruptFileError:
    """Return the error for a state that cannot be used."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return CorruptFileError(
        f"{path}: not a readable training state ({reason}); remove it to start over"
    )
