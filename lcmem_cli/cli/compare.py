"""``lcmem compare``: finished audits side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.audit import EXIT_GATE_FAILED, SHARE_HEADINGS, share_cells
from lcmem_cli.cli.options import JUDGING, OUTPUT, JsonOptions, argument, option

if TYPE_CHECKING:
    from lcmem_cli.engine.evaluation.compare import Compared, CompareResult


class CompareOptions(JsonOptions):
    """What a comparison is asked for."""

    audits: list[Path] = argument("Output folders of lcmem audit; the first is compared with.")
    fail_if_worse: bool = option(
        JUDGING,
        "Exit 3 if more is flagged or copied in one than in the first, by Fisher's exact test at "
        "5 % over all tests.",
        False,
    )
    output: Path | None = option(OUTPUT, "Folder to write to.", None, flags="--output -o")


def compare_command(options: CompareOptions) -> None:
    """Set finished audits of one training set side by side: generators, checkpoints, weeks.

    Writes compare.json, compare.csv and a plot. Audits of other training sets, detectors or rates
    are refused.

    Examples:
        lcmem compare audit-last-week audit-this-week --fail-if-worse
        lcmem compare audit-gan audit-diffusion audit-vae -o compared
    """
    from lcmem_cli.engine.evaluation.compare import compare_audits

    result = compare_audits(
        options.audits, fail_if_worse=options.fail_if_worse, output=options.output
    )
    for warning in result.warnings:
        render.reporter().warn(warning)
    render.emit(result, as_json=options.as_json, human=lambda: _show(result, options.output))
    if result.line is not None:
        (render.note if options.as_json else render.line)(result.line)
    if result.gate in ("failed", "undecided"):
        raise typer.Exit(EXIT_GATE_FAILED)


def _show(result: CompareResult, output: Path | None) -> None:
    render.line(result.statement)
    render.table(
        ["audit", *SHARE_HEADINGS, "exposed", "p (more)"],
        [_row(one) for one in result.audits],
    )
    if output is not None:
        render.line(f"See {output / 'compare.png'}")


def _row(one: Compared) -> list[str]:
    return [
        *share_cells(one),
        f"{one.num_exposed_images:,}",
        "-" if one.than_first is None else f"{one.than_first.p_flagged:.3g}",
    ]
