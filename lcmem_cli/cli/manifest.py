"""``lcmem manifest``: write the filelist of a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import BasedirOption, JsonOption, SeedOption


def manifest(
    source: Annotated[
        Path, typer.Argument(help="Folder (a subfolder = an id), or a filelist without Split.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV or Parquet file to write.")],
    basedir: BasedirOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a filelist with an identity-disjoint, seeded TRAIN/VAL/TEST split."""
    from lcmem_cli.engine.data.manifest import load_manifest, split_by_identity, write_manifest

    listed = load_manifest(source, basedir=basedir, need_split=False)
    has_split = listed.records[0].split is not None
    if not has_split:
        records = split_by_identity(listed.records, seed=seed)
        listed = dataclasses.replace(listed, records=tuple(records))
    write_manifest(listed, output)
    counts = {
        split: {
            "images": len(part),
            "identities": len({record.identity for record in part.records}),
        }
        for split in ("TRAIN", "VAL", "TEST")
        for part in [listed.select(split)]
    }

    def human() -> None:
        rows = [(s, f"{c['images']:,}", f"{c['identities']:,}") for s, c in counts.items()]
        render.table(["split", "images", "identities"], rows)
        if has_split:
            render.line("The list has a split already, which is kept.")
        render.line(f"wrote {output}; paths are relative to {listed.basedir}")

    values = {"output": str(output), "basedir": str(listed.basedir), "splits": counts}
    render.emit(values, as_json=as_json, human=human)
