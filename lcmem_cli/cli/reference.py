"""Prints ``docs/cli.md``, the help of every command: ``python -m lcmem_cli.cli.reference``."""

from __future__ import annotations

import sys
from typing import Any

import typer
import typer.main

from lcmem_cli.cli.app import app
from lcmem_cli.cli.commands import summary

WIDTH = 78
_HEAD = """\
# Command line

The help of every command, as `lcmem COMMAND --help` prints it. This page is generated: after a
change, run `python -m lcmem_cli.cli.reference > docs/cli.md`.

- Results go to standard output; progress, warnings and errors go to standard error.
- Options under "Everywhere" may stand before or behind the command.
- Exit codes: 0 done; 1 could not finish; 2 wrong arguments, config or input; 3 finished, and the
  gate that was asked for failed.
- A closed stream (`>&-`, `2>&-`) takes nothing, and that is no error.
"""


def reference() -> str:
    """Return the page as Markdown."""
    root: Any = typer.main.get_command(app)
    settings = {**root.context_settings, "terminal_width": WIDTH, "color": False}
    with typer.Context(root, info_name="lcmem", **settings) as context:
        pages = _pages(root, context)
    names = [f"- [{name}](#{name.replace(' ', '-')}): {text}" for name, text, _ in pages[1:]]
    parts = [_HEAD, "\n".join(names) + "\n"]
    parts += [f"## {name}\n\n```text\n{help_text}\n```\n" for name, _, help_text in pages]
    return "\n".join(parts)


def _pages(command: Any, context: Any) -> list[tuple[str, str, str]]:
    """Return name, first sentence and help of a command and of all that stand under it."""
    pages = [(context.command_path, summary(command), command.get_help(context).strip())]
    for name, inner in getattr(command, "commands", {}).items():
        with typer.Context(
            inner, info_name=name, parent=context, help_option_names=context.help_option_names
        ) as below:
            pages += _pages(inner, below)
    return pages


if __name__ == "__main__":
    sys.stdout.write(reference())
