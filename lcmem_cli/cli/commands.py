"""What every command has: its options, the global options in any place, and help in panels."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo

from lcmem_cli.cli import render
from lcmem_cli.cli.options import PANELS

_NAMES_WIDTH = 24
_EXAMPLES = "\nExamples:\n"
_GLOBAL = ("quiet", "debug", "log_format")
_NO_UPPER_LIMIT = re.compile(r"(; )?\bx>=-?\d+|  \[x>=-?\d+\]")
Panels = dict[str, list[tuple[str, str]]]
_METAVARS: dict[Any, str] = {Path: "PATH", int: "N", float: "X", str: "TEXT"}


def flat(command: Callable[[Any], None]) -> Callable[..., None]:
    """Return a function as Typer expects it: every argument and option is a parameter.

    Args:
        command: takes one object of a subclass of ``Options``.
    """
    kind = next(iter(get_type_hints(command).values()))
    keyword = inspect.Parameter.KEYWORD_ONLY
    hints = get_type_hints(kind)
    # A command's own options come before those that it shares.
    names = dict.fromkeys(name for base in kind.__mro__ for name in inspect.get_annotations(base))
    parameters = [
        inspect.Parameter(
            name, keyword, default=_named(name, kind, hints[name]), annotation=hints[name]
        )
        for name in names
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command(kind(**values))

    vars(run)["__signature__"] = inspect.Signature(parameters)
    return run


def _named(name: str, kind: type, hint: Any) -> Any:
    """Return what declares a field, with the names that command line and help give it."""
    declared = copy.copy(getattr(kind, name))
    if isinstance(declared, ArgumentInfo):
        declared.metavar = declared.metavar or name.upper()
        return declared
    declared.param_decls = declared.param_decls or (f"--{name.replace('_', '-')}",)
    wanted = hint
    if get_origin(hint) is not Literal:  # a union with None, if it is of several parts
        wanted = next((part for part in get_args(hint) if part is not NoneType), hint)
    choices = "|".join(get_args(wanted)) if get_origin(wanted) is Literal else None
    declared.metavar = declared.metavar or choices or _METAVARS.get(wanted)
    return declared


class _Help:
    """Help in two columns, which 80 characters are enough for, and in panels."""

    def collect_usage_pieces(self: Any, ctx: Any) -> list[str]:
        """Return the parts of the usage line, with arguments as the help names them."""
        return [re.sub("[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]  # type: ignore[misc]

    def format_options(self: Any, ctx: Any, formatter: Any) -> None:
        """Write the commands of a group, or arguments and options, in panels."""
        for panels in (_command_panels(self), _option_panels(self.get_params(ctx), ctx)):
            _write(formatter, panels, ctx)

    def format_epilog(self: Any, ctx: Any, formatter: Any) -> None:
        """Write the examples as they stand."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write(f"{_heading('Examples', ctx)}:\n{self.epilog}\n")


def summary(command: Any) -> str:
    """Return the first paragraph of a command's help, on one line."""
    return str(command.help).partition("\n\n")[0].replace("\n", " ")


def _command_panels(group: Any) -> Panels:
    panels: Panels = {}
    for name, command in getattr(group, "commands", {}).items():
        row = (name, summary(command))
        panels.setdefault(command.rich_help_panel or "Commands", []).append(row)
    return panels


def _option_panels(parameters: Sequence[Any], ctx: Any) -> Panels:
    panels: Panels = {panel: [] for panel in ("Arguments", *PANELS, "Everywhere")}
    for parameter in sorted(parameters, key=lambda each: not each.required):
        name, text = parameter.get_help_record(ctx)
        if parameter.param_type_name == "argument":
            name, panel = parameter.metavar, "Arguments"
        else:
            panel = parameter.rich_help_panel or "Everywhere"
        panels[panel].append((name, _NO_UPPER_LIMIT.sub("", text)))
    return panels


def _write(formatter: Any, panels: Panels, ctx: Any) -> None:
    names = [name for rows in panels.values() for name, _ in rows]
    width = max((len(name) for name in names if len(name) <= _NAMES_WIDTH), default=0)
    for panel, rows in panels.items():
        if rows:
            with formatter.section(_heading(panel, ctx)):
                rows = [(name.ljust(width), text) for name, text in rows]
                formatter.write_dl(rows, col_max=width)


def _heading(text: str, ctx: Any) -> str:
    return typer.style(text, bold=True) if render.may_color() and ctx.color is not False else text


class Command(_Help, TyperCommand):
    """A command that takes the global options too.

    Its help text is the function's docstring; what stands there under ``Examples:`` comes last.
    """

    def __init__(self, name: str | None, **settings: Any) -> None:
        text, _, examples = settings.pop("help").partition(_EXAMPLES)
        examples = textwrap.indent(textwrap.dedent(examples), "  ")
        super().__init__(name, **{**settings, "help": text.strip(), "epilog": examples})

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's parameters, the global options and ``--help``."""
        *own, help_option = super().get_params(ctx)
        shared = [p for p in ctx.find_root().command.params if p.name in _GLOBAL]
        return [*own, *shared, help_option]

    def invoke(self, ctx: Any) -> Any:
        """Apply the global options that stand behind the command, and run it."""
        render.extend(**{name: ctx.params.pop(name) for name in _GLOBAL})
        return super().invoke(ctx)


class Group(_Help, TyperGroup):
    """Commands under one name."""
