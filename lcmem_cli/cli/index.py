"""``lcmem index``: features of a training set on disk, to be asked again and again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    AnyUnreadableOption,
    ApproximateOption,
    BasedirOption,
    BatchSizeOption,
    Device,
    DeviceOption,
    JsonOption,
    MaxUnreadableOption,
    WorkersOption,
)
from lcmem_cli.cli.processes import require_one_process

if TYPE_CHECKING:
    from lcmem_cli.engine.evaluation.indexing import IndexingResult

index_app = typer.Typer(
    no_args_is_help=True, help="Keep the features of a training set on disk, and search them."
)
IndexArgument = Annotated[Path, typer.Argument(help="Folder of the index.")]
SourceArgument = Annotated[Path, typer.Argument(help="Folder or filelist of images.")]
DetectorOption = Annotated[
    str, typer.Option("--detector", help="What embeds the images; audits by themselves take joint.")
]


@index_app.command("build")
def build(
    source: SourceArgument,
    index: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new index.")],
    detector: DetectorOption = "lcmem",
    basedir: BasedirOption = None,
    batch_size: BatchSizeOption = 32,
    workers: WorkersOption = -1,
    device: DeviceOption = Device.AUTO,
    max_unreadable: MaxUnreadableOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Make an index, or continue one of the same images that was interrupted."""
    _add(
        index,
        source,
        detector=detector,
        basedir=basedir,
        batch_size=batch_size,
        workers=workers,
        device=device,
        max_unreadable=max_unreadable,
        as_json=as_json,
        only_listed=True,
    )


@index_app.command("add")
def add(
    index: IndexArgument,
    source: SourceArgument,
    basedir: BasedirOption = None,
    batch_size: BatchSizeOption = 32,
    workers: WorkersOption = -1,
    device: DeviceOption = Device.AUTO,
    max_unreadable: MaxUnreadableOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Add images to an index with the detector that it was made with."""
    from lcmem_cli.engine.store.index import detector_of_index

    detector = detector_of_index(index)
    _add(
        index,
        source,
        detector=detector,
        basedir=basedir,
        batch_size=batch_size,
        workers=workers,
        device=device,
        max_unreadable=max_unreadable,
        as_json=as_json,
        only_listed=False,
    )


@index_app.command("info")
def info(index: IndexArgument, as_json: JsonOption = False) -> None:
    """Print what an index holds."""
    _describe(index, verify=False, as_json=as_json)


@index_app.command("check")
def check(index: IndexArgument, as_json: JsonOption = False) -> None:
    """Compare all of an index with its checksums; exit code 1 if it is damaged."""
    _describe(index, verify=True, as_json=as_json)


def _describe(index: Path, *, verify: bool, as_json: bool) -> None:
    from lcmem_cli.engine.store.index import Index

    require_one_process("index check" if verify else "index info")
    opened = Index.open(index)
    if verify:
        opened.verify()
    values = {
        "folder": str(index),
        "detector": opened.detector,
        "fingerprint": opened.fingerprint,
        "num_images": len(opened),
        "num_distinct": opened.num_rows,
        **({"verified": True} if verify else {}),
    }

    def human() -> None:
        for key, value in values.items():
            render.line(f"{key:<13} {value}")

    render.emit(values, as_json=as_json, human=human)


@index_app.command("query")
def query(
    index: IndexArgument,
    image: Annotated[Path, typer.Argument(help="Image, folder or filelist to ask about.")],
    top_k: Annotated[int, typer.Option(min=1, help="Matches per image.")] = 5,
    approximate: ApproximateOption = False,
    basedir: BasedirOption = None,
    max_unreadable: AnyUnreadableOption = None,
    batch_size: BatchSizeOption = 32,
    workers: WorkersOption = -1,
    device: DeviceOption = Device.AUTO,
    as_json: JsonOption = False,
) -> None:
    """Find the indexed images most like one image, or like each image of a folder."""
    from lcmem_cli.engine.compute import Compute
    from lcmem_cli.engine.detectors.registry import load_detector
    from lcmem_cli.engine.evaluation.indexing import query_index
    from lcmem_cli.engine.store.index import detector_of_index

    require_one_process("index query")
    result = query_index(
        index,
        image,
        load_detector(detector_of_index(index), device=device.value),
        top_k=top_k,
        approximate=approximate,
        basedir=basedir,
        max_unreadable=max_unreadable,
        compute=Compute(
            device=device.value,
            batch_size=batch_size,
            workers=workers,
            reporter=render.reporter(),
        ),
    )

    def human() -> None:
        rows = [
            (asked if rank == 0 else "", f"{match.score:.6f}", match.id, match.path)
            for asked, matches in result.matches.items()
            for rank, match in enumerate(matches)
        ]
        render.table(["query", "score", "id", "match"], rows, align_left=True)
        render.unreadable(result.unreadable)
        if approximate:
            render.line(f"approximate search, best match found for {result.search_recall:.1%}")

    render.emit(result, as_json=as_json, human=human)


def _add(
    index: Path,
    source: Path,
    *,
    detector: str,
    basedir: Path | None,
    batch_size: int,
    workers: int,
    device: Device,
    max_unreadable: int,
    as_json: bool,
    only_listed: bool,
) -> None:
    from lcmem_cli.engine.compute import Compute
    from lcmem_cli.engine.detectors.registry import load_detector
    from lcmem_cli.engine.evaluation.indexing import add_to_index

    compute = Compute.start(
        device=device.value, batch_size=batch_size, workers=workers, reporter=render.reporter()
    )
    ranks = compute.ranks
    result: IndexingResult = add_to_index(
        source,
        index,
        load_detector(detector, device=device.value),
        basedir=basedir,
        max_unreadable=max_unreadable,
        only_listed=only_listed,
        compute=compute,
    )

    def human() -> None:
        render.line(f"{result.num_images:,} images ({result.num_distinct:,} distinct) in {index}")
        render.line(f"added {result.num_added:,}, known already {result.num_known:,}")
        render.unreadable(result.unreadable)

    if ranks.is_main:
        render.emit(result, as_json=as_json, human=human)
