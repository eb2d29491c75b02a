"""``lcmem filter``: lists of generated images to keep and to reject."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import JsonOption, OutputOption


def filter_command(
    audit_folder: Annotated[Path, typer.Argument(help="Output folder of lcmem audit.")],
    output: OutputOption,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the kept images to OUTPUT/kept.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Link to the kept images from OUTPUT/kept.")
    ] = False,
    reject_over: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--reject-over", help="Reject scores above this, not what is flagged."),
    ] = None,
    reject_p: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--reject-p", help="Reject p-values of at most this, not what is flagged."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write keep.csv, reject.csv and unreadable.csv from an audit; originals are only read."""
    if copy and link:
        raise typer.BadParameter("--copy and --link exclude each other: give one of them")

    from lcmem_cli.engine.evaluation.audit.filter import Transfer, filter_audit

    transfer: Transfer = "copy" if copy else "link" if link else "none"
    result = filter_audit(
        audit_folder,
        output,
        transfer=transfer,
        reject_over=reject_over,
        reject_p=reject_p,
        reporter=render.reporter(),
    )

    def human() -> None:
        render.line(f"{result.num_kept:,} kept, {result.num_rejected:,} rejected ({result.rule}).")
        if result.unreadable:
            render.line(
                f"{len(result.unreadable):,} could not be read by the audit: neither kept nor "
                "rejected, see unreadable.csv."
            )
        if result.transfer != "none":
            done = "copied" if result.transfer == "copy" else "linked"
            render.line(f"{result.num_transferred:,} {done} to {output / 'kept'}.")
        render.line(f"See {output / 'keep.csv'} and {output / 'reject.csv'}")
        render.line(f"As a filelist: {output / 'keep.csv'} with --basedir {result.basedir}")

    render.emit(result, as_json=as_json, human=human)
