"""README names every command and flag, and the set-up commands stand at its top."""

from pathlib import Path

import pytest
import typer.main

from lcmem_cli.cli.app import app

README = Path(__file__).parents[1] / "README.md"


def commands():
    root = typer.main.get_command(app)
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            for inner, leaf in command.commands.items():
                yield f"{name} {inner}", leaf
        else:
            yield name, command


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_stands_in_readme(name):
    command = COMMANDS[name]
    assert command.help and len(command.help) > 20
    assert f"lcmem {name}" in README.read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_help_and_stands_in_readme(name):
    text = README.read_text()
    for parameter in COMMANDS[name].params:
        flags = [flag for flag in getattr(parameter, "opts", []) if flag.startswith("--")]
        if flags and flags != ["--help"]:
            assert parameter.help, f"{name} {flags} has no help"
            assert any(f"`{flag}" in text for flag in flags), f"README lacks {flags} of {name}"


def test_the_set_up_stands_on_the_first_screen():
    head = "\n".join(README.read_text().splitlines()[:60])
    assert "pip install" in head and "lcmem demo" in head and "pytest" in head
