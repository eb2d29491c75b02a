"""``lcmem config``: list, show, copy and check configs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lcmem_cli.cli import render
from lcmem_cli.cli.options import OVERRIDES, JsonOptions, Options, argument, complete_config

if TYPE_CHECKING:
    from lcmem_cli.engine.config import AnyConfig

_NAME = argument("Shipped name or TOML file.", autocompletion=complete_config)


class ConfigOptions(Options):
    """Which config is to be resolved."""

    name: str = _NAME
    overrides: list[str] | None = OVERRIDES


class CopyOptions(Options):
    """Which config is to be copied."""

    name: str = _NAME
    target: Path = argument("File to write; must not exist.")


def list_configs(options: JsonOptions) -> None:
    """List the shipped configs.

    Examples:
        lcmem config ls
    """
    from lcmem_cli.engine.config import describe_config, shipped_configs

    described = {name: describe_config(path) for name, path in shipped_configs().items()}
    rows = [(name, kind, text) for name, (kind, text) in described.items()]

    def human() -> None:
        render.table(["config", "kind", "purpose"], rows, align_left=True)

    names = [{"name": name, "kind": kind, "purpose": text} for name, kind, text in rows]
    render.emit({"configs": names}, as_json=options.as_json, human=human)


def show_config(options: ConfigOptions) -> None:
    """Print a config as it resolves: every key, defaults and overrides included.

    Examples:
        lcmem config show stage1 --set schedule.epochs=20
    """
    from lcmem_cli.engine.config import to_toml

    _, config = _resolve(options)
    render.line(to_toml(config).rstrip())


def copy_config(options: CopyOptions) -> None:
    """Copy a shipped config to a file, comments included, to be edited.

    Examples:
        lcmem config cp stage1 mine.toml
    """
    from lcmem_cli.engine.config import find_config
    from lcmem_cli.engine.errors import InputError

    source, target = find_config(options.name), options.target
    if target.exists():
        raise InputError(f"{target}: exists already; choose another name or remove it first")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder")
    shutil.copyfile(source, target)
    render.note(f"wrote {target}")


def check_config(options: ConfigOptions) -> None:
    """Validate a config and report every problem at once (exit 2 if there is one).

    Examples:
        lcmem config check mine.toml
    """
    path, config = _resolve(options)
    render.line(f"{path}: valid {config.kind} config")


def _resolve(options: ConfigOptions) -> tuple[Path, AnyConfig]:
    from lcmem_cli.engine.config import apply_overrides, find_config, read_toml, validate

    path = find_config(options.name)
    return path, validate(
        apply_overrides(read_toml(path), options.overrides or []), source=str(path)
    )
