"""``lcmem duplicates``: near-duplicates within one set."""

from __future__ import annotations

from pathlib import Path

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    ANY_UNREADABLE,
    CACHE,
    FOLDER,
    FRAMES,
    JUDGING,
    OVERWRITE,
    ComputeOptions,
    Frames,
    TableOptions,
    argument,
    option,
)

_SHOWN = 20


class DuplicatesOptions(TableOptions, ComputeOptions):
    """What a search for near-duplicates is asked for."""

    images: Path = argument("A set: a folder, filelist, archive, array or saved index.")
    frames: Frames = FRAMES
    detector: str = option(JUDGING, "What proposes candidates, which are then aligned.", "joint")
    max_unreadable: int | None = ANY_UNREADABLE
    cache: bool = CACHE
    output: Path = FOLDER
    overwrite: bool = OVERWRITE


def duplicates_command(options: DuplicatesOptions) -> None:
    """Find images of one set that show one picture, and list the set without them.

    Writes duplicates.csv, keep.csv (a filelist) and duplicates.json; images are only read.

    Examples:
        lcmem duplicates training -o duplicates
        lcmem duplicates list.csv --basedir images -o duplicates --json
    """
    from lcmem_cli.engine.evaluation.audit.wording import counted
    from lcmem_cli.engine.evaluation.duplicates import find_duplicates

    result = find_duplicates(
        options.images,
        reading=options.reading(options.max_unreadable, options.frames),
        detector=options.detector,
        compute=options.compute(cache=options.cache),
        output=options.output,
        overwrite=options.overwrite,
    )

    def human() -> None:
        others = len(result.duplicates)
        groups = counted(result.num_groups, "group")
        render.line(
            f"{others:,} of {counted(result.num_images, 'image')} show what another one shows, in "
            f"{groups}; {result.num_kept:,} are kept."
        )
        render.unreadable(result.unreadable, listed_in="duplicates.json")
        if others:
            shown = result.duplicates[:_SHOWN]
            render.table(
                ["group", "duplicate", "kept", "what is known"],
                [[f"{one.group:,}", one.path, one.kept, one.edit or one.relation] for one in shown],
                title=f"Duplicates ({len(shown)} of {others:,})",
            )
        render.line(f"As a filelist: {options.output / 'keep.csv'} with --basedir {result.folder}")

    render.emit(result, as_json=options.as_json, human=human)
