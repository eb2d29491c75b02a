"""What a kind of detector is, and what one of it is built from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

from lcmem_cli.engine.detectors.base import Detector

Status = Literal["ready", "needs a file", "needs a download", "needs an extra", "broken"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a detector is built from.

    Attributes:
        kind: name of the kind.
        name: as the user wrote it.
        target: what stands after the colon, or what the kind stands for; perhaps empty.
        options: from the name, checked and typed; see ``read_options``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        input_size: side in pixels for detectors that have none of their own.
    """

    kind: str
    name: str
    target: str
    options: Mapping[str, Any]
    device: str
    input_size: int


Build = Callable[[Request], Detector]


def _always() -> tuple[Status, str]:
    return "ready", ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorKind:
    """A kind of detector.

    Attributes:
        name: lower-case letters, digits and hyphens.
        summary: what it measures, in a few words.
        weights: where its weights come from.
        licence: of the weights, as far as it is known.
        build: makes one; a function, or ``"module:function"``, which is imported when needed.
        target: what stands after the colon, such as ``FILE``; empty if nothing may.
        target_needed: whether it must be there.
        stands_for: the target of a kind that takes none, such as the model that it is short for.
        options: keys that the name may carry; see ``read_options``.
        config_file: whether the options may also come from a TOML file (``config=``).
        status: whether it can run here, and why not.
    """

    name: str
    summary: str
    weights: str
    licence: str
    build: Build | str
    target: str = ""
    target_needed: bool = False
    stands_for: str = ""
    options: Sequence[str] = ()
    config_file: bool = False
    status: Callable[[], tuple[Status, str]] = _always

    @property
    def pattern(self) -> str:
        """How its name is written."""
        if not self.target:
            return self.name
        return (
            f"{self.name}:{self.target}" if self.target_needed else f"{self.name}[:{self.target}]"
        )

    @property
    def builder(self) -> Build:
        """The function that makes one, imported now if it was only named."""
        if not isinstance(self.build, str):
            return self.build
        module, _, function = self.build.partition(":")
        found: Build = getattr(import_module(module), function)
        return found
