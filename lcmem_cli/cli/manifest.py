"""``lcmem manifest``: write the filelist of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import BasedirOption, Frames, FramesOption, JsonOption, SeedOption


def manifest(
    source: Annotated[
        Path, typer.Argument(help="Folder (a subfolder = an id), or a filelist without Split.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV or Parquet file to write.")],
    basedir: BasedirOption = None,
    id_regex: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--id-regex",
            help="Find the id in each path, for example '^([0-9]+)_' (its group).",
        ),
    ] = None,
    seed: SeedOption = 0,
    frames: FramesOption = Frames.FIRST,
    as_json: JsonOption = False,
) -> None:
    """Write a filelist with an identity-disjoint, seeded TRAIN/VAL/TEST split."""
    from lcmem_cli.engine.data.filelist import make_filelist

    result = make_filelist(
        source,
        output,
        basedir=basedir,
        id_regex=id_regex,
        seed=seed,
        frames=frames.value,
        reporter=render.reporter(),
    )

    def human() -> None:
        rows = [(s, f"{c.images:,}", f"{c.identities:,}") for s, c in result.splits.items()]
        render.table(["split", "images", "identities"], rows)
        if result.kept_split:
            render.line("The list has a split already, which is kept.")
        render.line(f"wrote {output}; paths are relative to {result.basedir}")

    render.emit(result, as_json=as_json, human=human)
