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


class Together(Reporter):
    """Shows tasks that follow each other as one, so that the time left is that of all.

    Args:
        reporter: told the rest.
        whole: the task that they are steps of.
    """

    def __init__(self, reporter: Reporter, whole: Task) -> None:
        self._reporter, self._whole = reporter, whole

    def task(self, description: str, total: int | None = None, *, unit: str = "") -> Task:
        """Start a part of the whole."""
        return _Part(self._whole)

    def warn(self, message: str) -> None:
        """Pass a warning on."""
        self._reporter.warn(message)

    def event(self, name: str, **fields: object) -> None:
        """Pass an event on."""
        self._reporter.event(name, **fields)


class _Part(Task):
    def __init__(self, whole: Task) -> None:
        self._whole = whole

    def advance(self, steps: int = 1, **fields: object) -> None:
        self._whole.advance(steps, **fields)


SILENT = Reporter()
