"""``lcmem config``: list, show, copy and check configs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import JsonOption, SetOption, complete_config

config_app = typer.Typer(
    no_args_is_help=True, help="List, show, copy and check the TOML configs of the trainings."
)


@config_app.command("ls")
def list_configs(as_json: JsonOption = False) -> None:
    """List the shipped configs."""
    from lcmem_cli.engine.config import describe_config, shipped_configs

    described = {name: describe_config(path) for name, path in shipped_configs().items()}
    rows = [(name, kind, text) for name, (kind, text) in described.items()]

    def human() -> None:
        render.table(["config", "kind", "purpose"], rows, align_left=True)

    names = [{"name": name, "kind": kind, "purpose": text} for name, kind, text in rows]
    render.emit({"configs": names}, as_json=as_json, human=human)


@config_app.command("show")
def show_config(
    name: Annotated[
        str, typer.Argument(help="Shipped name or path.", autocompletion=complete_config)
    ],
    overrides: SetOption = None,
) -> None:
    """Print a config as it resolves: every key, defaults and overrides included."""
    from lcmem_cli.engine.config import apply_overrides, find_config, read_toml, to_toml, validate

    path = find_config(name)
    config = validate(apply_overrides(read_toml(path), overrides or []), source=str(path))
    render.line(to_toml(config).rstrip())


@config_app.command("cp")
def copy_config(
    name: Annotated[str, typer.Argument(help="Shipped name.", autocompletion=complete_config)],
    target: Annotated[Path, typer.Argument(help="File to write; must not exist.")],
) -> None:
    """Copy a shipped config to a file, comments included, to be edited."""
    from lcmem_cli.engine.config import find_config
    from lcmem_cli.engine.errors import InputError

    source = find_config(name)
    if target.exists():
        raise InputError(f"{target}: exists already; choose another name or remove it first")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder")
    shutil.copyfile(source, target)
    render.note(f"wrote {target}")


@config_app.command("check")
def check_config(
    path: Annotated[
        str, typer.Argument(help="TOML file or shipped name.", autocompletion=complete_config)
    ],
    overrides: SetOption = None,
) -> None:
    """Validate a config and report every problem at once (exit 2 if there is one)."""
    from lcmem_cli.engine.config import apply_overrides, find_config, read_toml, validate

    found = find_config(path)
    config = validate(apply_overrides(read_toml(found), overrides or []), source=str(found))
    render.line(f"{found}: valid {config.kind} config")
