"""What an audit is asked, as one value, and how it is written beside the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from lcmem_cli.engine.data.folders import FoldersAre
from lcmem_cli.engine.data.manifest import DEFAULT_READING, Frames, Reading
from lcmem_cli.engine.data.tables import STANDARD, ListColumns
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.documents import FileName
from lcmem_cli.engine.errors import InputError, NotAdaptableError
from lcmem_cli.engine.evaluation.audit.result import AuditResult, GateRule, NullKind, Task
from lcmem_cli.engine.evaluation.audit.sets import Sets, Source

_PATHS = ("generated", "training", "held_out", "basedir")
"""Settings that name files; ``config.toml`` has them as seen from its folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """The arguments of ``audit``, where each is explained, but those of ``Compute``.

    Raises:
        InputError: one is out of range, or has no effect beside another.
        NotAdaptableError: ``adapt`` is asked for with the leave-one-out null.
    """

    sources: Sets[Source]
    fpr: float
    reading: Reading = DEFAULT_READING
    folders_are: FoldersAre = "auto"
    null: str | None = None
    bh: bool = False
    detector: str | Detector | None = None
    input_size: int | None = None
    approximate: bool = False
    adapt: bool | None = None
    verify: bool | None = None
    top_k: int = 1
    confidence: float | None = None
    sensitivity: int | None = None
    fail_on: GateRule | None = None
    seed: int = 0
    output: Path | None = None
    overwrite: bool = False
    absolute_paths: bool = False
    task: Task = "audit"
    group_by: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without looking at a file."""
        if not 0 < self.fpr < 1:
            raise InputError(f"--fpr must lie in (0, 1), not {self.fpr:g}; for example 0.01")
        if self.null not in (None, "split", "leave-one-out"):
            raise InputError(f"--null must be split or leave-one-out, not '{self.null}'")
        if self.null is not None and self.sources.held_out is not None:
            raise InputError("--null has no effect with --held-out: leave one of the two out")
        if self.adapt and self.null_kind == "leave-one-out":
            raise NotAdaptableError(
                "--adapt does not go with the leave-one-out null, whose images would be adapted to "
                "and those of the generated set not; give --held-out, or --null split"
            )
        if self.top_k < 1:
            raise InputError(f"--top-k must be at least 1, not {self.top_k}")
        if self.sensitivity is not None and self.sensitivity < 0:
            raise InputError(
                f"--sensitivity is a number of copies, 0 or more, not {self.sensitivity}"
            )
        if self.confidence is not None:
            self._check_confidence(self.confidence)
        if self.fail_on == "altered" and self.verify is False:
            raise InputError("--fail-on altered needs --verify, which tells altered copies")

    def _check_confidence(self, confidence: float) -> None:
        if not 0.5 <= confidence < 1:
            raise InputError(
                f"--confidence must lie in [0.5, 1), not {confidence:g}; for example 0.95"
            )
        if self.bh:
            raise InputError("--confidence has no effect with --bh: leave one of the two out")
        if self.null_kind == "leave-one-out":
            raise InputError(
                "--confidence needs scores that are independent of each other, which those of the "
                "leave-one-out null are not; give --held-out, or --null split"
            )

    @property
    def null_kind(self) -> NullKind:
        """Where the real images come from."""
        if self.sources.held_out is not None:
            return "held-out"
        return "split" if self.null == "split" else "leave-one-out"


class AuditSettings(BaseModel):
    """``config.toml`` of an audit: what was asked, resolved, and what came of it."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    generated: FileName
    training: FileName
    held_out: FileName | None = Field(
        None, validation_alias="held-out", serialization_alias="held-out"
    )
    basedir: FileName | None = None
    columns: ListColumns = STANDARD
    frames: Frames = "first"
    folders_are: FoldersAre = "auto"
    null: NullKind
    fpr: float
    bh: bool
    detector: FileName
    input_size: int
    adapt: bool | None = None
    verify: bool
    approximate: bool
    seed: int
    top_k: int
    confidence: float | None = None
    sensitivity: int | None = None
    fail_on: GateRule | None = None
    group_by: str | None = None
    task: Task = "audit"
    cache: bool
    fingerprint: str
    adapted_to: int | None = None

    @property
    def reading(self) -> Reading:
        """How the sets were read."""
        basedir = None if self.basedir is None else Path(self.basedir)
        return Reading(basedir=basedir, columns=self.columns, frames=self.frames)

    def with_paths(self, change: Callable[[str], str]) -> AuditSettings:
        """Return the settings with each path of a set changed."""
        paths = {name: getattr(self, name) for name in _PATHS}
        return self.model_copy(
            update={name: change(path) for name, path in paths.items() if path is not None}
        )

    def of(self, result: AuditResult) -> AuditSettings:
        """Return the settings with what the audit made of the detector."""
        made = {"fingerprint": result.fingerprint, "adapted_to": result.adapted_to}
        return self.model_copy(update=made)
