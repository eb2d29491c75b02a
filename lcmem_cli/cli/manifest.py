"""``lcmem manifest``: write the filelist of a folder or of a published data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    FRAMES,
    INPUT,
    OUTPUT,
    Frames,
    TableOptions,
    argument,
    option,
    seed_option,
)

Publisher = Literal[
    "nih-cxr14", "celeba", "isic", "ham10000", "mimic-cxr-jpg", "cxr-lt", "ct-rate", "imagenet",
    "cifar10",
]  # fmt: skip


class ManifestOptions(TableOptions):
    """What a filelist is made of."""

    source: list[Path] = argument(
        "Folder or archive (a subfolder = an id), or a filelist without Split; with --from the "
        "publisher's tables."
    )
    output: Path = option(OUTPUT, "CSV or Parquet file to write.", flags="--output -o")
    publisher: Publisher | None = option(
        INPUT,
        f"Read identities and official split from a publisher's tables: "
        f"{', '.join(get_args(Publisher))}.",
        None,
        flags="--from",
        metavar="NAME",
    )
    frames: Frames = FRAMES
    id_regex: str | None = option(
        INPUT, "Find the id in each path, for example '^([0-9]+)_' (its group).", None
    )
    seed: int = seed_option()


def _refuse_without_effect(values: dict[str, Any]) -> None:
    """Take out what the tables of a publisher tell, and refuse it where it was given."""
    from lcmem_cli.engine.data.tables import STANDARD

    given = {
        "--frames": values.pop("frames") != "first",
        "--id-regex": values.pop("id_regex") is not None,
        "--path-column and the like": values.pop("columns") != STANDARD,
    }
    for name, is_given in given.items():
        if is_given:
            raise typer.BadParameter(f"{name} has no effect with --from; leave it out")


def manifest(options: ManifestOptions) -> None:
    """Write a filelist with an identity-disjoint, seeded TRAIN/VAL/TEST split.

    Examples:
        lcmem manifest images -o list.csv
        lcmem manifest images -o list.csv --id-regex '^([0-9]+)_'
        lcmem manifest --from celeba identity_CelebA.txt -o list.csv
    """
    from lcmem_cli.engine.data.filelist import (
        make_cifar_filelist,
        make_filelist,
        make_publisher_filelist,
    )

    values = options.arguments()
    sources, publisher = values.pop("source"), values.pop("publisher")
    if publisher is not None:
        _refuse_without_effect(values)
        if publisher == "cifar10":
            if values.pop("basedir") is not None:
                raise typer.BadParameter(
                    "--basedir has no effect with --from cifar10; leave it out"
                )
            result = make_cifar_filelist(sources, **values, reporter=render.reporter())
        else:
            result = make_publisher_filelist(
                publisher, sources, **values, reporter=render.reporter()
            )
    elif len(sources) > 1:
        raise typer.BadParameter("one folder or filelist, or several tables with --from")
    else:
        result = make_filelist(sources[0], **values, reporter=render.reporter())

    def human() -> None:
        rows = [(s, f"{c.images:,}", f"{c.identities:,}") for s, c in result.splits.items()]
        render.table(["split", "images", "identities"], rows)
        if result.kept_split:
            render.line("The list has a split already, which is kept.")
        render.line(f"wrote {options.output}; paths are relative to {result.basedir}")

    render.emit(result, as_json=options.as_json, human=human)
