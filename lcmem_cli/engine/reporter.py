"""How the engine tells what it is doing, without knowing who listens."""

from __future__ import annotations

from types import TracebackType


class Task:
    """One piece of work with a known or unknown number of steps. This one says nothing."""

    def advance(self, steps: int = 1, **fields: object) -> None:
        """Record finished steps; ``fields`` are shown beside the bar (loss parts, for example)."""

    def __enter__(self) -> Task:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the task."""


class Reporter:
    """Receives progress, warnings and events. The base class is silent.

    The command line passes one that draws rich progress bars or JSON log lines on stderr.
    """

    def task(self, description: str, total: int | None = None, *, unit: str = "") -> Task:
        """Start a task of ``total`` steps (``None``: unknown)."""
        return Task()

    def warn(self, message: str) -> None:
        """Tell that a result is weakened or an option has no effect."""

    def event(self, name: str, **fields: object) -> None:
        """Record something worth a log line (an epoch's losses, a resumed run)."""


SILENT = Reporter()
