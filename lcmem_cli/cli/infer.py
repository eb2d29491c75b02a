"""``lcmem infer``: do two images show the same, or is one a copy of the other?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    CODEC,
    INPUT,
    JUDGING,
    MAX_UNREADABLE,
    OUTPUT,
    VERIFY,
    ComputeOptions,
    argument,
    option,
)
from lcmem_cli.engine.data.frames import split_frame
from lcmem_cli.engine.data.sources.opened import is_there

if TYPE_CHECKING:
    from lcmem_cli.engine.evaluation.inference import InferenceResult


class InferOptions(ComputeOptions):
    """What the scoring of pairs is asked for."""

    image_a: Path | None = argument("First image.", None)
    image_b: Path | None = argument("Second image.", None)
    pairs: Path | None = option(
        INPUT, "CSV or Parquet with path_a,path_b, instead of two images.", None
    )
    checkpoint: str | None = option(
        INPUT,
        "An lcmem .safetensors file or hf:REPO_ID@REVISION (default: the embedded model).",
        None,
    )
    codec: str | None = CODEC
    max_unreadable: int = MAX_UNREADABLE
    detector: str | None = option(
        JUDGING, "Another detector than a checkpoint's, such as joint.", None
    )
    audit: Path | None = option(
        JUDGING, "Folder of an audit: judge by its detector, as adapted, and threshold.", None
    )
    threshold: str | None = option(
        JUDGING, "One of the checkpoint's, such as fpr0.01, fpr0.001.", None
    )
    verify: bool | None = VERIFY
    save: Path | None = option(OUTPUT, "Write a side-by-side picture (.png) of two images.", None)


def infer(options: InferOptions) -> None:
    """Score two images, or a CSV of pairs: same person, patient, object, or an altered copy?

    Examples:
        lcmem infer a.png b.png
        lcmem infer a.png b.png --audit audit --save pair.png
        lcmem infer --pairs pairs.csv --detector joint --json
    """
    wanted = _check(options)

    from lcmem_cli.engine.evaluation.inference import Judge
    from lcmem_cli.engine.evaluation.inference import infer as score

    result = score(
        wanted,
        Judge(
            audit=options.audit,
            detector=options.detector,
            checkpoint=options.checkpoint,
            codec=options.codec,
        ),
        threshold=options.threshold,
        verify=options.verify is not False,
        save=options.save,
        max_unreadable=options.max_unreadable,
        compute=options.compute(),
    )
    render.emit(result, as_json=options.as_json, human=lambda: _show(result, options))


def _check(options: InferOptions) -> tuple[Path, Path] | Path:
    """Return the two images or the list of pairs, or refuse what does not go together."""
    images = [image for image in (options.image_a, options.image_b) if image is not None]
    if len(images) != (2 if options.pairs is None else 0):
        raise typer.BadParameter("give two images, or --pairs FILE, and not both")
    for image in (split_frame(named)[0] for named in images):
        if image.is_dir() or not is_there(image):
            raise typer.BadParameter(
                f"{image}: {'is a folder' if image.is_dir() else 'no such file'}"
            )
    by_file = options.checkpoint or options.codec
    if options.save is not None and options.pairs is not None:
        raise typer.BadParameter("--save draws two images; it does not go with --pairs")
    if options.detector is not None and by_file:
        raise typer.BadParameter("--detector does not go with --checkpoint or --codec")
    if options.audit is not None and (
        by_file or options.detector or options.threshold or options.precision
    ):
        raise typer.BadParameter(
            "--audit brings detector and threshold; it does not go with --checkpoint, --codec, "
            "--detector, --precision or --threshold"
        )
    if options.audit is not None and options.verify is not None:
        raise typer.BadParameter("--audit verifies as the audit did; leave --verify out")
    return options.pairs or (images[0], images[1])


def _show(result: InferenceResult, options: InferOptions) -> None:
    from lcmem_cli.engine.evaluation.inference import finding_text, verdict_text

    if len(result.pairs) == 1 and result.pairs[0].score is not None:
        render.line(f"score      {result.pairs[0].score:.6f}")
        render.line(f"verdict    {verdict_text(result.pairs[0])}")
        if result.pairs[0].form is not None:
            render.line(f"           compared {result.pairs[0].form}")
        if finding_text(result.pairs[0]):
            render.line(f"           {finding_text(result.pairs[0])}")
    else:
        rows = [
            (
                p.path_a,
                p.path_b,
                "-" if p.score is None else f"{p.score:.6f}",
                verdict_text(p),
                finding_text(p),
            )
            for p in result.pairs
        ]
        render.table(["image a", "image b", "score", "verdict", "found"], rows)
    if result.threshold is None:
        render.line(f"threshold  none: {result.detector} brings none")
        ways = "lcmem audit and lcmem benchmark fit one to their own images"
        if options.detector is None:
            ways = "lcmem calibrate fits some"
        render.line(f"           {ways}")
    else:
        t = result.threshold
        render.line(f"threshold  {t.value:.6f} ({t.name}), fitted on {t.fitted_on}")
        if options.audit is None:
            render.line(
                f"           {t.num_positives:,} positive and {t.num_negatives:,} negative "
                f"pairs; there it accepts {_percent(t.achieved_recall)} of the positives and "
                f"{_percent(t.achieved_fpr)} of the negatives"
            )
        if t.transfer:
            render.line(f"           {t.transfer}")
    render.unreadable(result.unreadable)
    if options.save is not None:
        drawn = result.pairs[0].score is not None
        render.line(f"picture    {options.save if drawn else 'none: an image cannot be read'}")


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.2%}"
