"""``lcmem index``: features of a training set on disk, to be asked again and again."""

from __future__ import annotations

from pathlib import Path

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    ANY_UNREADABLE,
    APPROXIMATE,
    FRAMES,
    JUDGING,
    MAX_UNREADABLE,
    OUTPUT,
    VERIFY,
    ComputeOptions,
    Frames,
    JsonOptions,
    TableOptions,
    argument,
    option,
)
from lcmem_cli.cli.processes import require_one_process

_INDEX = argument("Folder of the index.")
_SOURCE = argument("Folder, filelist, archive or array of images.")


class FillOptions(TableOptions, ComputeOptions):
    """What new images of an index are asked for."""

    index: Path
    source: Path
    frames: Frames = FRAMES
    max_unreadable: int = MAX_UNREADABLE


class BuildOptions(FillOptions):
    """What a new index is asked for."""

    source: Path = _SOURCE
    index: Path = option(OUTPUT, "Folder of the new index.", flags="--output -o")
    detector: str = option(
        JUDGING, "What embeds the images; audits by themselves take joint.", "lcmem"
    )
    keypoints: bool = option(
        OUTPUT,
        "Keep what verification needs, 71 kB an image, so that the images need not be there later.",
        False,
        flags="--keypoints",
    )


class AddOptions(FillOptions):
    """What is added to an index."""

    index: Path = _INDEX
    source: Path = _SOURCE


class IndexInfoOptions(JsonOptions):
    """What the description of an index is asked for."""

    index: Path = _INDEX


class QueryOptions(TableOptions, ComputeOptions):
    """What an index is asked for."""

    index: Path = _INDEX
    image: Path = argument("Image, folder, filelist or archive to ask about.")
    top_k: int = option(OUTPUT, "Matches per image.", 5, min=1)
    approximate: bool = APPROXIMATE
    verify: bool | None = VERIFY
    max_unreadable: int | None = ANY_UNREADABLE


def build_index(options: BuildOptions) -> None:
    """Make an index, or continue one of the same images that was interrupted.

    Examples:
        lcmem index build training -o index
        lcmem index build list.csv --detector joint --keypoints -o index
    """
    _fill(options, options.detector, only_listed=True, keypoints=options.keypoints)


def add_to_index(options: AddOptions) -> None:
    """Add images to an index with the detector that it was made with.

    Examples:
        lcmem index add index more-images
    """
    from lcmem_cli.engine.store.index import detector_of_index

    _fill(options, detector_of_index(options.index), only_listed=False)


def index_info(options: IndexInfoOptions) -> None:
    """Print what an index holds.

    Examples:
        lcmem index info index
    """
    _describe(options, verify=False)


def check_index(options: IndexInfoOptions) -> None:
    """Compare all of an index with its checksums; exit code 1 if it is damaged.

    Examples:
        lcmem index check index
    """
    _describe(options, verify=True)


def _describe(options: IndexInfoOptions, *, verify: bool) -> None:
    from lcmem_cli.engine.store.index import Index
    from lcmem_cli.engine.verification.bank import IndexKeypoints

    require_one_process("index check" if verify else "index info")
    opened = Index.open(options.index)
    keypoints = IndexKeypoints(options.index)
    if verify:
        opened.verify()
        if keypoints.are_kept:
            keypoints.check({entry.content_hash for entry in opened.entries})
    values = {
        "folder": str(options.index),
        "detector": opened.detector,
        "fingerprint": opened.fingerprint,
        "num_images": len(opened),
        "num_distinct": opened.num_rows,
        "keypoints": keypoints.are_kept,
        **({"verified": True} if verify else {}),
    }

    def human() -> None:
        for key, value in values.items():
            render.line(f"{key:<13} {value}")

    render.emit(values, as_json=options.as_json, human=human)


def query_index(options: QueryOptions) -> None:
    """Find the indexed images most like one image, or like each image of a folder.

    Examples:
        lcmem index query index image.png
        lcmem index query index generated --top-k 1 --json
    """
    from lcmem_cli.engine.detectors.registry import load_detector
    from lcmem_cli.engine.evaluation.indexing import query_index
    from lcmem_cli.engine.store.index import detector_of_index

    require_one_process("index query")
    result = query_index(
        options.index,
        options.image,
        load_detector(
            detector_of_index(options.index), device=options.device, precision=options.precision
        ),
        top_k=options.top_k,
        approximate=options.approximate,
        verify=options.verify is not False,
        reading=options.reading(options.max_unreadable),
        compute=options.compute(),
    )

    def human() -> None:
        rows = [
            (asked if rank == 0 else "", f"{match.score:.6f}", match.id, match.path, match.edit)
            for asked, matches in result.matches.items()
            for rank, match in enumerate(matches)
        ]
        render.table(["query", "score", "id", "match", "same picture"], rows, align_left=True)
        render.unreadable(result.unreadable)
        if options.approximate:
            render.line(f"approximate search, best match found for {result.search_recall:.1%}")

    render.emit(result, as_json=options.as_json, human=human)


def _fill(
    options: FillOptions, detector: str, *, only_listed: bool, keypoints: bool = False
) -> None:
    from lcmem_cli.engine.detectors.registry import load_detector
    from lcmem_cli.engine.evaluation.indexing import add_to_index

    compute = options.compute()
    result = add_to_index(
        options.source,
        options.index,
        load_detector(detector, device=options.device, precision=options.precision),
        reading=options.reading(options.max_unreadable, options.frames),
        only_listed=only_listed,
        keypoints=keypoints,
        compute=compute,
    )

    def human() -> None:
        render.line(
            f"{result.num_images:,} images ({result.num_distinct:,} distinct) in {options.index}"
        )
        render.line(f"added {result.num_added:,}, known already {result.num_known:,}")
        if result.keypoint_bytes:
            size = result.keypoint_bytes * result.num_distinct
            render.line(
                f"keypoints: {result.keypoint_bytes:,} bytes for each distinct image, {size:,} in "
                "all"
            )
        render.unreadable(result.unreadable)

    render.emit(result, as_json=options.as_json, human=human)
