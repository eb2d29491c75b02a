"""``lcmem manifest``: write the filelist of a folder."""

from __future__ import annotations

from pathlib import Path

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    BASEDIR,
    FRAMES,
    INPUT,
    OUTPUT,
    Frames,
    JsonOptions,
    argument,
    option,
    seed_option,
)


class ManifestOptions(JsonOptions):
    """What a filelist is made of."""

    source: Path = argument("Folder (a subfolder = an id), or a filelist without Split.")
    output: Path = option(OUTPUT, "CSV or Parquet file to write.", flags="--output -o")
    basedir: Path | None = BASEDIR
    frames: Frames = FRAMES
    id_regex: str | None = option(
        INPUT, "Find the id in each path, for example '^([0-9]+)_' (its group).", None
    )
    seed: int = seed_option()


def manifest(options: ManifestOptions) -> None:
    """Write a filelist with an identity-disjoint, seeded TRAIN/VAL/TEST split.

    Examples:
        lcmem manifest images -o list.csv
        lcmem manifest images -o list.csv --id-regex '^([0-9]+)_'
    """
    from lcmem_cli.engine.data.filelist import make_filelist

    result = make_filelist(**options.arguments(), reporter=render.reporter())

    def human() -> None:
        rows = [(s, f"{c.images:,}", f"{c.identities:,}") for s, c in result.splits.items()]
        render.table(["split", "images", "identities"], rows)
        if result.kept_split:
            render.line("The list has a split already, which is kept.")
        render.line(f"wrote {options.output}; paths are relative to {result.basedir}")

    render.emit(result, as_json=options.as_json, human=human)
