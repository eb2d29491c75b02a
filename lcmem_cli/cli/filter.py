"""``lcmem filter``: lists of generated images to keep and to reject."""

from __future__ import annotations

from pathlib import Path

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import FOLDER, JUDGING, OUTPUT, JsonOptions, argument, option


class FilterOptions(JsonOptions):
    """What a filter is asked for."""

    audit_folder: Path = argument("Output folder of lcmem audit.")
    output: Path = FOLDER
    copy: bool = option(OUTPUT, "Copy the kept images to OUTPUT/kept.", False)
    link: bool = option(OUTPUT, "Link to the kept images from OUTPUT/kept.", False)
    reject_over: float | None = option(
        JUDGING, "Reject scores above this, not what is flagged.", None
    )
    reject_p: float | None = option(
        JUDGING, "Reject p-values of at most this, not what is flagged.", None
    )


def filter_command(options: FilterOptions) -> None:
    """Write keep.csv, reject.csv and unreadable.csv from an audit; originals are only read.

    Examples:
        lcmem filter audit -o filtered
        lcmem filter audit -o filtered --copy --reject-p 0.05
    """
    if options.copy and options.link:
        raise typer.BadParameter("--copy and --link exclude each other: give one of them")

    from lcmem_cli.engine.evaluation.audit.filter import Transfer, filter_audit

    transfer: Transfer = "copy" if options.copy else "link" if options.link else "none"
    output = options.output
    result = filter_audit(
        options.audit_folder,
        output,
        transfer=transfer,
        reject_over=options.reject_over,
        reject_p=options.reject_p,
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

    render.emit(result, as_json=options.as_json, human=human)
