"""``lcmem infer``: do two images show the same, or is one a copy of the other?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    BatchSizeOption,
    CheckpointOption,
    CodecOption,
    Device,
    DeviceOption,
    JsonOption,
    MaxUnreadableOption,
    WorkersOption,
)


def infer(
    image_a: Annotated[Optional[Path], typer.Argument(help="First image.")] = None,  # noqa: UP045
    image_b: Annotated[Optional[Path], typer.Argument(help="Second image.")] = None,  # noqa: UP045
    pairs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--pairs", help="CSV with path_a,path_b, instead of two images."),
    ] = None,
    checkpoint: CheckpointOption = None,
    detector: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--detector", help="Another detector than a checkpoint's, such as joint."),
    ] = None,
    codec: CodecOption = None,
    audit: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--audit", help="Folder of an audit: judge by its detector, as adapted, and threshold."
        ),
    ] = None,
    threshold: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--threshold", help="One of the checkpoint's, such as fpr0.01, fpr0.001."),
    ] = None,
    save: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--save", help="Write a side-by-side picture (.png) of two images."),
    ] = None,
    batch_size: BatchSizeOption = 32,
    workers: WorkersOption = -1,
    device: DeviceOption = Device.AUTO,
    max_unreadable: MaxUnreadableOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Score two images, or a CSV of pairs: same person, patient, object, or an altered copy?"""
    images = [image for image in (image_a, image_b) if image is not None]
    if len(images) != (2 if pairs is None else 0):
        raise typer.BadParameter("give two images, or --pairs FILE, and not both")
    for image in images:
        if image.is_dir() or not image.exists():
            raise typer.BadParameter(
                f"{image}: {'is a folder' if image.is_dir() else 'no such file'}"
            )
    if save is not None and pairs is not None:
        raise typer.BadParameter("--save draws two images; it does not go with --pairs")

    if detector is not None and (checkpoint or codec):
        raise typer.BadParameter("--detector does not go with --checkpoint or --codec")
    if audit is not None and (checkpoint or codec or detector or threshold):
        raise typer.BadParameter(
            "--audit brings detector and threshold; it does not go with --checkpoint, --codec, "
            "--detector or --threshold"
        )

    from lcmem_cli.engine.compute import Compute
    from lcmem_cli.engine.evaluation.inference import Judge, verdict_text
    from lcmem_cli.engine.evaluation.inference import infer as score

    result = score(
        (image_a, image_b) if image_a and image_b else pairs or Path(),
        Judge(audit=audit, detector=detector, checkpoint=checkpoint, codec=codec),
        threshold=threshold,
        save=save,
        max_unreadable=max_unreadable,
        compute=Compute(
            device=device.value,
            batch_size=batch_size,
            workers=workers,
            reporter=render.reporter(),
        ),
    )

    def human() -> None:
        if len(result.pairs) == 1 and result.pairs[0].score is not None:
            render.line(f"score      {result.pairs[0].score:.6f}")
            render.line(f"verdict    {verdict_text(result.pairs[0])}")
            if result.pairs[0].identical:
                render.line("           both files are the same, byte for byte")
        else:
            rows = [
                (p.path_a, p.path_b, "-" if p.score is None else f"{p.score:.6f}", verdict_text(p))
                for p in result.pairs
            ]
            render.table(["image a", "image b", "score", "verdict"], rows)
        if result.threshold is None:
            render.line(f"threshold  none: {result.detector} brings none")
            ways = "lcmem audit and lcmem benchmark fit one to their own images"
            if detector is None:
                ways = "lcmem calibrate fits some"
            render.line(f"           {ways}")
        else:
            t = result.threshold
            render.line(f"threshold  {t.value:.6f} ({t.name}), fitted on {t.fitted_on}")
            if audit is None:
                render.line(
                    f"           {t.num_positives:,} positive and {t.num_negatives:,} negative "
                    f"pairs; there it accepts {_percent(t.achieved_recall)} of the positives and "
                    f"{_percent(t.achieved_fpr)} of the negatives"
                )
        render.unreadable(result.unreadable)
        if save is not None:
            drawn = result.pairs[0].score is not None
            render.line(f"picture    {save if drawn else 'none: an image cannot be read'}")

    render.emit(result, as_json=as_json, human=human)


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.2%}"
