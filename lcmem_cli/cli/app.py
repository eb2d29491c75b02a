"""Assembles the commands, the global options and the handling of errors."""

from __future__ import annotations

import contextlib
import itertools
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from lcmem_cli import __version__
from lcmem_cli.cli import interrupts, render
from lcmem_cli.cli.audit import audit_command
from lcmem_cli.cli.benchmark import benchmark_command
from lcmem_cli.cli.check import check
from lcmem_cli.cli.checkpoints import calibrate, convert, info
from lcmem_cli.cli.commands import Command, Group, flat
from lcmem_cli.cli.compare import compare_command
from lcmem_cli.cli.config import check_config, copy_config, list_configs, show_config
from lcmem_cli.cli.demo import demo
from lcmem_cli.cli.detectors import detectors
from lcmem_cli.cli.duplicates import duplicates_command
from lcmem_cli.cli.export import export
from lcmem_cli.cli.filter import filter_command
from lcmem_cli.cli.hub import pull, push
from lcmem_cli.cli.index import add_to_index, build_index, check_index, index_info, query_index
from lcmem_cli.cli.infer import infer
from lcmem_cli.cli.latents import latents
from lcmem_cli.cli.leaks import leaks_command
from lcmem_cli.cli.manifest import manifest
from lcmem_cli.cli.processes import IN_PROCESSES, require_one_process
from lcmem_cli.cli.robustness import robustness_command
from lcmem_cli.cli.train import finetune, train_codec, train_stage1
from lcmem_cli.engine.errors import LcmemError, first_line

Commands = dict[str, Callable[..., None]]
COMMANDS: dict[str, Commands] = {
    "Audit a set": {
        "audit": audit_command,
        "compare": compare_command,
        "filter": filter_command,
        "leaks": leaks_command,
        "duplicates": duplicates_command,
        "demo": demo,
    },
    "Compare pairs and detectors": {
        "infer": infer,
        "benchmark": benchmark_command,
        "robustness": robustness_command,
        "detectors": detectors,
    },
    "Train": {
        "latents": latents,
        "train-codec": train_codec,
        "train-stage1": train_stage1,
        "finetune": finetune,
        "calibrate": calibrate,
    },
    "Models": {"info": info, "convert": convert, "export": export, "push": push, "pull": pull},
    "Tools": {"manifest": manifest, "check": check},
}
"""Commands by the panels of ``lcmem --help``."""
INDEX_COMMANDS: Commands = {
    "build": build_index,
    "add": add_to_index,
    "info": index_info,
    "check": check_index,
    "query": query_index,
}
CONFIG_COMMANDS: Commands = {
    "ls": list_configs,
    "show": show_config,
    "cp": copy_config,
    "check": check_config,
}
_ENOUGH_ROOM = 6 << 30
"""Bytes of address space; a build of PyTorch for CUDA takes about 4 GiB before any work."""
_NO_MEMORY = re.compile(
    "out of memory|not enough memory|allocate memory|start new thread|failed to map segment"
)
"""How libraries say so in errors that are not a ``MemoryError``."""


class Root(Group):
    """Turns errors into a message on stderr and an exit code, without a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the global options; ``--log-format json`` also holds for errors among them."""
        if "--log-format=json" in args or ("--log-format", "json") in itertools.pairwise(args):
            render.configure(quiet=False, debug=False, log_format="json")
        with _errors_explained():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        with _errors_explained():
            return super().invoke(ctx)


@contextlib.contextmanager
def _errors_explained() -> Iterator[None]:
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except (Exception, KeyboardInterrupt) as error:
        code = _explain(error)
        if code is None:
            raise
        raise typer.Exit(code) from error


def _explain(error: BaseException) -> int | None:
    """Say on stderr what went wrong; return the exit code, or nothing for a defect of ours."""
    stopped = interrupts.exit_code(error)
    if stopped is not None:
        render.error(interrupts.message())
        return stopped
    if isinstance(error, BrokenPipeError):  # the reader has what it wanted
        return 1
    if render.settings.debug and isinstance(error, (LcmemError, OSError, MemoryError)):
        traceback.print_exception(error)
    if isinstance(error, LcmemError):
        render.error(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        render.error(f"{where}{error.strerror or error}")
        return 1
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        render.error(
            f"not enough memory ({first_line(error)}); try a smaller --batch-size or fewer "
            "--workers, and look for a limit on this process (ulimit -v, a container's)"
        )
        return 1
    return _explain_usage(error)


def _explain_usage(error: Any) -> int | None:
    """Explain an error of the command line itself, whose class Typer does not export."""
    if not (hasattr(error, "format_message") and hasattr(error, "ctx")):
        return None
    is_help = type(error).__name__ == "NoArgsIsHelpError"
    if is_help and render.settings.log_format == "text":
        typer.echo(error.format_message(), err=True)
    else:
        message = "no command is given" if is_help else error.format_message()
        command = error.ctx.command_path if error.ctx else "lcmem"
        render.error(f"{message}\nsee {command} --help")
    return int(error.exit_code)


app = typer.Typer(
    name="lcmem",
    cls=Root,
    no_args_is_help=True,
    rich_markup_mode=None,  # help is laid out by ``commands``, errors by ``render``
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help=(
        "Find out whether a generative image model reproduces its training images: "
        "re-identification and copy detection with LCMem (arXiv 2512.14421)."
    ),
    epilog=(
        "  lcmem demo\n"
        "  lcmem audit generated --against training --held-out real -o audit\n"
        "  lcmem infer a.png b.png"
    ),
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lcmem {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    log_format: Annotated[
        render.LogFormat,
        typer.Option(metavar="text|json", help="How progress and events are written to stderr."),
    ] = "text",
) -> None:
    """Set what holds for every command."""
    render.configure(quiet=quiet, debug=debug, log_format=log_format)
    _warn_of_little_room()
    if context.invoked_subcommand not in IN_PROCESSES:
        require_one_process(context.invoked_subcommand or "lcmem")


def _warn_of_little_room() -> None:
    """Tell of a limit under which a library may hang or end without a word when it is loaded."""
    try:
        import resource
    except ImportError:  # there is no such limit on Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _ENOUGH_ROOM:
        render.reporter().warn(
            f"this process may use {limit / 2**30:.1f} GiB of addresses (ulimit -v), which may be "
            "too little to load PyTorch; it should be unlimited"
        )


def _add_group(name: str, panel: str, help: str, commands: Commands) -> None:
    group = typer.Typer(cls=Group, no_args_is_help=True, help=help)
    for command, function in commands.items():
        group.command(command, cls=Command)(flat(function))
    app.add_typer(group, name=name, rich_help_panel=panel)


for _panel, _commands in COMMANDS.items():
    for _name, _function in _commands.items():
        app.command(_name, cls=Command, rich_help_panel=_panel)(flat(_function))
_add_group(
    "index",
    "Audit a set",
    "Keep the features of a training set on disk, and search them.",
    INDEX_COMMANDS,
)
_add_group(
    "config",
    "Tools",
    "List, show, copy and check the TOML configs of the trainings.",
    CONFIG_COMMANDS,
)
