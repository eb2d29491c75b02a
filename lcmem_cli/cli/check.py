"""``lcmem check``: everything that would fail, before hours are spent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    BasedirOption,
    Device,
    DeviceOption,
    JsonOption,
    OptionalConfigOption,
    SetOption,
)

ALL = "all"


def _image_count(text: str) -> str:
    if text != ALL and not (text.isascii() and text.isdecimal()):
        raise typer.BadParameter(f"'{text}': expected a number, 0 for none, or '{ALL}'")
    return text


def check(
    config: OptionalConfigOption = None,
    filelist: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--filelist", help="Image list or folder that the run will read."),
    ] = None,
    basedir: BasedirOption = None,
    checkpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--checkpoint", help="What fine-tuning starts from, or what scores."),
    ] = None,
    latents: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--latents", help="Latent store that the run will read."),
    ] = None,
    detectors: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--detectors", help="Names separated by commas (lcmem detectors)."),
    ] = None,
    images: Annotated[
        str,
        typer.Option(
            "--images",
            callback=_image_count,
            metavar="N|all",
            help="Images to decode and latents to read, of a seeded draw; 0: none.",
        ),
    ] = "64",
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Folder that the run will write to."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="The run in --output is to be continued.")
    ] = False,
    overrides: SetOption = None,
    device: DeviceOption = Device.AUTO,
    as_json: JsonOption = False,
) -> None:
    """Check config, data, weights, device and disk of a run; exit code 2 if it would fail."""
    from lcmem_cli.engine.check import CheckRequest, check_run
    from lcmem_cli.engine.detectors.options import split_names

    request = CheckRequest(
        config=config,
        overrides=overrides or [],
        filelist=filelist,
        basedir=basedir,
        checkpoint=checkpoint,
        latents=latents,
        detectors=split_names(detectors or ""),
        num_images=None if images == ALL else int(images),
        output=output,
        resume=resume,
        device=device.value,
    )
    result = check_run(request, render.reporter())

    def human() -> None:
        rows = [(f.group, f.level, f.what, f.remedy) for f in result.findings]
        render.table(["about", "is", "found", "what to do"], rows, align_left=True)
        render.line(f"{result.num_problems} problem(s), {result.num_warnings} warning(s)")

    render.emit(result, as_json=as_json, human=human)
    if result.num_problems:
        raise typer.Exit(2)
