"""Errors that the engine raises. Each message says what, where, what was expected, what to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class LcmemError(Exception):
    """The work could not be finished."""

    exit_code = 1


class InputError(LcmemError):
    """An argument, a config or an input file is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A config does not validate; carries every problem that was found.

    Attributes:
        problems: one line each, with the key that it is about.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{source}: {len(self.problems)} problem(s)\n{lines}")


class ManifestError(InputError):
    """A filelist or image folder does not describe a usable set of images.

    Attributes:
        problems: one line each; a single one is the whole message.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems) or (message,)
        super().__init__(message)


class CheckpointError(InputError):
    """A checkpoint is damaged, incomplete or not what was expected."""


class WeightsUnavailableError(LcmemError):
    """Weights of an external model are not on this machine and could not be fetched."""


class WeightsFileNeededError(InputError):
    """A detector has no weights of its own, and no file of them was named."""


class HubError(LcmemError):
    """The hub could not be reached, or it refused what was asked."""


class FingerprintMismatchError(InputError):
    """Something made by one detector was used with another."""


class NotAdaptableError(InputError):
    """A detector cannot be adapted to a kind of images, or not to so few of them."""


class CorruptFileError(LcmemError):
    """A file written by lcmem no longer matches its checksum or layout."""


class UnreadableLimitError(LcmemError):
    """More images could not be read than the user allowed."""


class WriteError(LcmemError, OSError):
    """A file could not be written: no space, no permission, or its folder is gone."""


class ProcessLostError(LcmemError):
    """Another process of the same job ended, so the work cannot go on."""


class FolderBusyError(LcmemError):
    """Another lcmem process is writing to the same folder."""


class TrainingDivergedError(LcmemError):
    """The loss became NaN or infinite."""


class NotFiniteError(LcmemError):
    """A network returned NaN or infinity, for at least one of the images of a batch."""


class MissingExtraError(InputError):
    """An optional dependency is needed and not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency; {install_line(extra)}")


class UnreadableImageError(LcmemError):
    """A file could not be turned into an image.

    Attributes:
        path: the file.
        reason: why, in a few words, without the path. Where an optional dependency is missing it
            names the extra; how to install that is told once for all files, see
            ``results.install_hints``.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}")


def install_line(extra: str) -> str:
    """Return how to install an optional dependency."""
    return f"install it with: pip install 'lcmem[{extra}]'"


_MOST_NAMES = 30
_MOST_GUESSES = 3


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return a sentence that names the valid choices nearest to a mistyped name.

    Args:
        name: what the user wrote.
        choices: all valid names.

    Returns:
        For example ``"did you mean 'ncc'?"``, or the list, cut where it is long, if nothing is
        near.
    """
    names = sorted(choices)
    close = difflib.get_close_matches(name, names, n=_MOST_GUESSES, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    more = f", … ({len(names):,} in all)" if len(names) > _MOST_NAMES else ""
    return "valid: " + ", ".join(names[:_MOST_NAMES]) + more


def first_line(error: BaseException) -> str:
    """Return the first line of what another library's error says, at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
