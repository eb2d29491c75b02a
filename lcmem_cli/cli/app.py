"""Assembles the commands, the global options and the handling of errors."""

from __future__ import annotations

import contextlib
import itertools
import sys
import traceback
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lcmem_cli import __version__
from lcmem_cli.cli import interrupts, render
from lcmem_cli.cli.audit import audit_command
from lcmem_cli.cli.benchmark import benchmark_command
from lcmem_cli.cli.check import check
from lcmem_cli.cli.checkpoints import calibrate, convert, info
from lcmem_cli.cli.config import config_app
from lcmem_cli.cli.demo import demo
from lcmem_cli.cli.detectors import detectors
from lcmem_cli.cli.export import export
from lcmem_cli.cli.filter import filter_command
from lcmem_cli.cli.hub import pull, push
from lcmem_cli.cli.index import index_app
from lcmem_cli.cli.infer import infer
from lcmem_cli.cli.latents import latents
from lcmem_cli.cli.manifest import manifest
from lcmem_cli.cli.processes import IN_PROCESSES, require_one_process
from lcmem_cli.cli.robustness import robustness_command
from lcmem_cli.cli.train import finetune, train_codec, train_stage1
from lcmem_cli.engine.errors import LcmemError


class ErrorHandlingGroup(TyperGroup):
    """Turns engine errors into a message on stderr and an exit code, without a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the global options; ``--log-format json`` also holds for errors among them."""
        if "--log-format=json" in args or ("--log-format", "json") in itertools.pairwise(args):
            render.configure(quiet=False, debug=False, log_format=render.LogFormat.JSON)
        with _usage_errors_as_json():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            with _usage_errors_as_json():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            stopped = interrupts.exit_code(error)
            if stopped is not None:
                render.error(interrupts.message())
                raise typer.Exit(stopped) from None
            code = _explain(error)
            if code is None:
                raise
            raise typer.Exit(code) from error


def _explain(error: BaseException) -> int | None:
    """Say on stderr what went wrong; return the exit code, or nothing for a defect of ours."""
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
        return 1
    if render.settings.debug and isinstance(error, (LcmemError, OSError)):
        traceback.print_exception(error)
    if isinstance(error, LcmemError):
        render.error(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        render.error(f"{where}{error.strerror or error}")
        return 1
    return None


@contextlib.contextmanager
def _usage_errors_as_json() -> Iterator[None]:
    """Log what Typer would draw a box around, where stderr holds JSON lines."""
    try:
        yield
    except Exception as caught:
        error: Any = caught  # Typer does not export the class of usage errors
        is_usage_error = hasattr(error, "format_message") and hasattr(error, "exit_code")
        if not is_usage_error or render.settings.log_format is not render.LogFormat.JSON:
            raise
        render.error(error.format_message() or "no command is given; see --help")
        raise typer.Exit(error.exit_code) from caught


app = typer.Typer(
    name="lcmem",
    cls=ErrorHandlingGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Find out whether a generative image model reproduces its training images: "
        "re-identification and copy detection with LCMem (arXiv 2512.14421)."
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
        render.LogFormat, typer.Option(help="How progress and events are written to stderr.")
    ] = render.LogFormat.TEXT,
) -> None:
    """Set what holds for every command."""
    render.configure(quiet=quiet, debug=debug, log_format=log_format)
    if context.invoked_subcommand not in IN_PROCESSES:
        require_one_process(context.invoked_subcommand or "lcmem")


app.command("demo")(demo)
app.command("check")(check)
app.command("infer")(infer)
app.command("manifest")(manifest)
app.command("latents")(latents)
app.command("train-codec")(train_codec)
app.command("train-stage1")(train_stage1)
app.command("finetune")(finetune)
app.command("calibrate")(calibrate)
app.command("convert")(convert)
app.command("info")(info)
app.command("export")(export)
app.command("push")(push)
app.command("pull")(pull)
app.command("detectors")(detectors)
app.add_typer(index_app, name="index")
app.add_typer(config_app, name="config")
app.command("benchmark")(benchmark_command)
app.command("robustness")(robustness_command)
app.command("audit")(audit_command)
app.command("filter")(filter_command)
