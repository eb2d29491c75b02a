"""Everything a person sees. The only module that imports rich.

Results go to stdout, everything else (progress, warnings, errors, log lines) to stderr. With
``--log-format json`` every line on stderr is a JSON object with the keys ``time``, ``level`` and
``event``, also what libraries write there.
"""

from __future__ import annotations

import atexit
import dataclasses
import io
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

import typer

from lcmem_cli.engine.distributed import launched
from lcmem_cli.engine.files import dump_json, jsonable
from lcmem_cli.engine.reporter import Reporter, Task
from lcmem_cli.engine.results import Result, Unreadable, install_hints

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console
    from rich.progress import Progress


LogFormat = Literal["text", "json"]


@dataclasses.dataclass
class Settings:
    """What the global options say."""

    quiet: bool = False
    debug: bool = False
    log_format: LogFormat = "text"


settings = Settings()
_NAME_WIDTH = 9
"""Columns that a table's first one keeps, whatever the others need."""
_WIDE = 100
_LONGEST_NAME = 28
_COLUMN_EDGE = 3
_STDERR = 2
_SECONDS_FOR_THE_REST = 2.0
_SHOWN_UNREADABLE = 10


def configure(*, quiet: bool, debug: bool, log_format: LogFormat) -> None:
    """Apply the global options."""
    settings.quiet, settings.debug, settings.log_format = quiet, debug, log_format
    if log_format == "json" and not isinstance(sys.stderr, _JsonStream):
        sys.stderr = _JsonStream(_take_over_descriptor(sys.stderr))
        warnings.showwarning = _log_python_warning


def extend(*, quiet: bool, debug: bool, log_format: LogFormat) -> None:
    """Apply global options that stand behind the command, besides those before it."""
    configure(
        quiet=settings.quiet or quiet,
        debug=settings.debug or debug,
        log_format="json" if log_format == "json" else settings.log_format,
    )


def error(message: str) -> None:
    """Show an error on stderr."""
    if settings.log_format == "json":
        _log_line("error", "error", message=message)
    else:
        _say("error: ", message, fg=typer.colors.RED, bold=True)


def _say(label: str, message: str, **style: Any) -> None:
    """Write a message to stderr behind a coloured label."""
    typer.secho(label, nl=False, err=True, color=None if may_color() else False, **style)
    typer.echo(_printable(message), err=True)


def note(message: str) -> None:
    """Show a remark on stderr."""
    if not settings.quiet:
        if settings.log_format == "json":
            _log_line("info", "note", message=message)
        else:
            typer.echo(_printable(message), err=True)


def emit(result: Result | Mapping[str, Any], *, as_json: bool, human: Callable[[], None]) -> None:
    """Print a result to stdout: one JSON document, or what ``human`` prints.

    Of several processes that share a command, the first prints.
    """
    rank, _ = launched()
    if rank > 0:
        return
    if as_json:
        values = result.to_dict() if isinstance(result, Result) else result
        sys.stdout.write(dump_json(values))
    else:
        human()


def line(text: str = "") -> None:
    """Print one line of a result."""
    typer.echo(_printable(text))


def unreadable(items: Sequence[Unreadable], *, listed_in: str | None = None) -> None:
    """Print a line for each image that was left out.

    Args:
        items: the images.
        listed_in: file that has them all; only the first few are printed.
    """
    shown = items if listed_in is None else items[:_SHOWN_UNREADABLE]
    for item in shown:
        line(f"unreadable {item.path}: {item.reason}")
    if len(items) > len(shown):
        line(f"unreadable {len(items) - len(shown):,} more, listed in {listed_in}")
    for hint in install_hints(items):
        note(hint)


BEST_NOTE = "* the best of its column"


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    best: Mapping[int, int] | None = None,
    align_left: bool = False,
) -> None:
    """Print a table.

    Args:
        columns: headings.
        rows: cells as text.
        title: shown above.
        best: per column index, the row index whose cell is set in bold with a star (``BEST_NOTE``).
        align_left: all columns hold words; otherwise all but the first are right-aligned.
    """
    from rich.table import Table
    from rich.text import Text

    best = best or {}
    view = Table(title=title, title_justify="left")
    names = max((len(row[0]) for row in rows), default=0)
    for index, column in enumerate(columns):
        view.add_column(
            Text(_printable(column)),
            justify="left" if align_left or index == 0 else "right",
            overflow="fold",
            min_width=min(names, _NAME_WIDTH) if index == 0 else None,
        )
    for row_index, row in enumerate(rows):
        cells = []
        for column_index, cell in enumerate(row):
            is_best = best.get(column_index) == row_index
            cells.append(
                Text(_printable(cell) + ("*" if is_best else ""), style="bold" if is_best else "")
            )
        view.add_row(*cells)
    _console(sys.stdout).print(view)


def fitting_tables(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str,
    best: Mapping[int, int] | None = None,
) -> None:
    """Print a table of numbers, in several parts where it is wider than the terminal.

    Each part begins with the first column, in which long names are shortened.

    Args:
        columns: see ``table``.
        rows: see ``table``.
        title: stands above each part.
        best: see ``table``.
    """
    best = best or {}
    rows = [[_shortened(row[0]), *row[1:]] for row in rows]
    widths = [
        max(len(column), *(len(row[index]) + (index in best) for row in rows)) + _COLUMN_EDGE
        for index, column in enumerate(columns)
    ]
    room = _console(sys.stdout).width - 1
    part = [0]
    for index in range(1, len(columns) + 1):
        if index == len(columns) or (
            len(part) > 1 and sum(widths[i] for i in part) + widths[index] > room
        ):
            table(
                [columns[i] for i in part],
                [[row[i] for i in part] for row in rows],
                title=title,
                best={place: best[i] for place, i in enumerate(part) if i in best},
            )
            part = [0]
        part.append(index)


def _shortened(name: str) -> str:
    """Return a name whose ends are kept where it is too long for a table."""
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:8]}…{name[9 - _LONGEST_NAME :]}"


def is_wide() -> bool:
    """Return whether results may take so many columns that tables can show all they have."""
    return _console(sys.stdout).width >= _WIDE


def reporter() -> Reporter:
    """Return the reporter that the global options and the terminal call for."""
    if settings.log_format == "json":
        return _QuietJsonReporter() if settings.quiet else _JsonReporter()
    if settings.quiet:
        return _WarningsOnly()
    return _RichReporter() if sys.stderr.isatty() else _PlainReporter()


def show_progress() -> Reporter:
    """Return a reporter for Python: bars, warnings and events, in a terminal or a notebook.

    A notebook needs ``ipywidgets`` for bars.

    Example:
        >>> from lcmem_cli import audit, show_progress
        >>> result = audit("generated", "training", reporter=show_progress())  # doctest: +SKIP
    """
    return _RichReporter()


def may_color() -> bool:
    """Return whether a terminal may be sent colours; some users want none (no-color.org)."""
    return not os.environ.get("NO_COLOR")


def _printable(text: str) -> str:
    """Escape what a terminal must not be sent: control characters and unpaired surrogates."""
    safe = "".join(
        c if c in "\n\t" or (c.isprintable() or c == " ") else c.encode("unicode_escape").decode()
        for c in text
    )
    return safe.encode("utf-8", "backslashreplace").decode("utf-8")


def _console(stream: Any) -> Console:
    from rich.console import Console

    terminal = stream.isatty()
    return Console(file=stream, width=None if terminal else 120, highlight=False, soft_wrap=False)


_LOG_LOCK = threading.Lock()


def _log_line(level: str, event: str, /, **fields: object) -> None:
    record = {"time": round(time.time(), 3), "level": level, "event": event, **fields}
    stream = sys.stderr.stream if isinstance(sys.stderr, _JsonStream) else sys.stderr
    text = json.dumps(jsonable(record), allow_nan=False) + "\n"
    with _LOG_LOCK:
        stream.write(text)
        stream.flush()


def _take_over_descriptor(stderr: TextIO) -> TextIO:
    """Turn what C libraries write to the process's stderr into events, too.

    They know only the number of the descriptor, which is led into a pipe; a thread reads it.

    Args:
        stderr: where it is not the process's own, as in a test, nothing is done.

    Returns:
        What writes to where the descriptor led.
    """
    try:
        if stderr.fileno() != _STDERR:
            return stderr
    except (OSError, ValueError):  # no file
        return stderr
    stderr.flush()
    real = os.dup(_STDERR)
    reading, writing = os.pipe()
    os.dup2(writing, _STDERR)
    os.close(writing)

    def log() -> None:
        with open(reading, encoding="utf-8", errors="backslashreplace") as pipe:
            for text in pipe:
                if text.strip():
                    _log_line("info", "output", message=text.rstrip("\n"))

    reader = threading.Thread(target=log, daemon=True, name="lcmem-stderr")
    reader.start()

    def give_back() -> None:
        os.dup2(real, _STDERR)  # which ends the pipe, unless a child process still holds it
        reader.join(timeout=_SECONDS_FOR_THE_REST)

    atexit.register(give_back)
    return open(real, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _log_python_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _log_line(
        "warning",
        "python-warning",
        message=str(message),
        category=category.__name__,
        where=f"{filename}:{lineno}",
    )


class _JsonStream(io.TextIOBase):
    """Stands in for stderr: what is written to it by anybody else becomes JSON lines.

    Args:
        stream: the real stderr.
    """

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.rest = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).replace("\r", "\n").split("\n")
        for shown in lines:
            self._log(shown)
        return len(text)

    def close(self) -> None:
        if not self.closed:
            self._log(self.rest)
        super().close()

    def _log(self, text: str) -> None:
        if text.strip():
            _log_line("info", "output", message=text)


class _WarningsOnly(Reporter):
    """Warnings are part of the truth of a result, so ``--quiet`` keeps them."""

    def warn(self, message: str) -> None:
        _say("warning: ", message, fg=typer.colors.YELLOW)


class _PlainReporter(_WarningsOnly):
    """No bars: stderr is a file or a pipe."""

    def event(self, name: str, **fields: object) -> None:
        typer.echo(_printable(_event_text(name, fields)), err=True)


class _QuietJsonReporter(Reporter):
    def warn(self, message: str) -> None:
        _log_line("warning", "warning", message=message)


class _JsonReporter(_QuietJsonReporter):
    def task(self, description: str, total: int | None = None, *, unit: str = "") -> Task:
        return _JsonTask(description, total, unit)

    def event(self, name: str, **fields: object) -> None:
        _log_line("info", name, **fields)


class _JsonTask(Task):
    """Writes at most one line every few seconds, so that logs stay small."""

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = self.fresh = 0
        self.began = self.last = time.monotonic()

    def __enter__(self) -> _JsonTask:
        _log_line("info", "task-started", task=self.description, total=self.total, unit=self.unit)
        return self

    def advance(self, steps: int = 1, **fields: object) -> None:
        self.done += steps
        self.fresh += steps
        seconds = time.monotonic() - self.last
        if seconds >= self.SECONDS_BETWEEN_LINES:
            left = None if self.total is None else self.total - self.done
            _log_line(
                "info",
                "progress",
                task=self.description,
                done=self.done,
                total=self.total,
                # By the latest pace: what an earlier run left done goes by much faster.
                seconds_left=None if left is None else round(left * seconds / max(self.fresh, 1)),
                **fields,
            )
            self.last, self.fresh = time.monotonic(), 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _log_line(
            "info",
            "task-ended",
            task=self.description,
            done=self.done,
            total=self.total,
            seconds=round(time.monotonic() - self.began, 3),
            failed=kind is not None,
        )


class _RichReporter(_PlainReporter):
    """Draws progress bars; warnings and events are printed above them."""

    def __init__(self) -> None:
        self.console = _console(sys.stderr)
        self.progress: Progress | None = None
        self.open_tasks = 0

    def warn(self, message: str) -> None:
        from rich.text import Text

        self.console.print(Text("warning: ", style="yellow") + Text(_printable(message)))

    def event(self, name: str, **fields: object) -> None:
        from rich.text import Text

        self.console.print(Text(_printable(_event_text(name, fields))))

    def task(self, description: str, total: int | None = None, *, unit: str = "") -> Task:
        if total == 0:  # all of it was there already
            return Task()
        return _RichTask(self, description, total, unit)


class _RichTask(Task):
    def __init__(self, owner: _RichReporter, description: str, total: int | None, unit: str):
        self.owner, self.description, self.total, self.unit = owner, description, total, unit

    def __enter__(self) -> _RichTask:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if self.owner.progress is None:
            self.owner.progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}", markup=False),
                console=self.owner.console,
                transient=True,
            )
            self.owner.progress.start()
        self.owner.open_tasks += 1
        self.began, self.done = time.monotonic(), 0
        self.id = self.owner.progress.add_task(
            _printable(self.description), total=self.total, shown="", rate=""
        )
        return self

    def advance(self, steps: int = 1, **fields: object) -> None:
        assert self.owner.progress is not None
        self.done += steps
        rate = self.done / max(time.monotonic() - self.began, 1e-9)
        self.owner.progress.update(
            self.id,
            advance=steps,
            rate=f"{rate:,.1f} {self.unit or 'it'}/s",
            shown=_fields_text(fields),
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.owner.progress is not None
        self.owner.progress.remove_task(self.id)
        self.owner.open_tasks -= 1
        if self.owner.open_tasks == 0:
            self.owner.progress.stop()
            self.owner.progress = None


def _event_text(name: str, fields: Mapping[str, object]) -> str:
    return f"{name}  {_fields_text(fields)}"


def _fields_text(fields: Mapping[str, object]) -> str:
    return "  ".join(f"{key} {_short(value)}" for key, value in fields.items())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
