"""The saved state of a training: written whole, compared with its checksums, never executed."""

from __future__ import annotations

import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lcmem_cli.engine.errors import (
    CorruptFileError,
    InputError,
    TrainingDivergedError,
    first_line,
)
from lcmem_cli.engine.files import atomic_path

STATE_NAME = "state.pt"
SECONDS_BETWEEN_STATES = 60.0
_RUN = "run_digest"


class StateFile:
    """The saved state of one run, in the run's folder.

    Args:
        folder: of the run.
        run_digest: identifies config, data and initial weights; a state of another is refused.
        device: that tensors are read to.
    """

    def __init__(self, folder: Path, run_digest: str, device: torch.device) -> None:
        self.path = folder / STATE_NAME
        self.run_digest = run_digest
        self.device = device
        self._last_saved = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last state was saved long ago."""
        return time.monotonic() - self._last_saved > SECONDS_BETWEEN_STATES

    def save(self, payload: dict[str, Any]) -> None:
        """Write a state in the place of the last one."""
        write_state(self.path, {_RUN: self.run_digest, **payload})
        self._last_saved = time.monotonic()

    def restore(self, take: Callable[[dict[str, Any]], None]) -> bool:
        """Hand the saved state over, if there is one; return whether there was.

        Args:
            take: puts the values of a state to where they belong.

        Raises:
            InputError: it is of another run.
            CorruptFileError: it cannot be read, or does not fit.
        """
        if not self.path.is_file():
            return False
        try:
            payload = read_state(self.path, self.device)
            if payload[_RUN] != self.run_digest:
                raise InputError(
                    f"{self.path}: belongs to a run with another config, data or initial weights; "
                    "resume with what that run was started with, or choose another folder"
                )
            take(payload)
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise unreadable_state(self.path, error) from error
        return True

    def diverged(self, what: str, remedy: str) -> TrainingDivergedError:
        """Return the error for a loss or gradient that is not finite, naming the state to go on."""
        kept = "no good state was saved before"
        if self.path.is_file():
            kept = f"the last good state, of which --resume continues, is {self.path}"
        return TrainingDivergedError(f"{what}; {kept}. Try {remedy} in another folder")


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
    return CorruptFileError(
        f"{path}: not a readable training state ({first_line(error)}); remove it to start over"
    )
