"""``lcmem check``: everything that would fail, before hours are spent."""

from __future__ import annotations

from pathlib import Path

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    INPUT,
    JUDGING,
    OUTPUT,
    OVERRIDES,
    DeviceOptions,
    TableOptions,
    config_option,
    option,
)

ALL = "all"


def _image_count(text: str) -> str:
    if text != ALL and not (text.isascii() and text.isdecimal()):
        raise typer.BadParameter(f"'{text}': expected a number, 0 for none, or '{ALL}'")
    return text


class CheckOptions(TableOptions, DeviceOptions):
    """What a run is going to be asked for."""

    config: str | None = config_option(None)
    filelist: Path | None = option(INPUT, "Image list or folder that the run will read.", None)
    checkpoint: str | None = option(INPUT, "What fine-tuning starts from, or what scores.", None)
    latents: Path | None = option(INPUT, "Latent store that the run will read.", None)
    detectors: str | None = option(INPUT, "Names separated by commas (lcmem detectors).", None)
    images: str = option(
        JUDGING,
        "Images to decode and latents to read, of a seeded draw; 0: none.",
        "64",
        callback=_image_count,
        metavar="N|all",
    )
    output: Path | None = option(
        OUTPUT, "Folder that the run will write to.", None, flags="--output -o"
    )
    resume: bool = option(OUTPUT, "The run in --output is to be continued.", False)
    overrides: list[str] | None = OVERRIDES


def check(options: CheckOptions) -> None:
    """Check config, data, weights, device and disk of a run; exit code 2 if it would fail.

    Examples:
        lcmem check --config stage1 --latents latents -o run
        lcmem check --filelist list.csv --detectors lcmem,byol --images all
    """
    from lcmem_cli.engine.check import CheckRequest, check_run
    from lcmem_cli.engine.detectors.options import split_names

    values = options.arguments()
    images, reporter = values.pop("images"), values.pop("reporter")
    values |= {
        "overrides": options.overrides or [],
        "detectors": split_names(options.detectors or ""),
        "num_images": None if images == ALL else int(images),
    }
    result = check_run(CheckRequest(**values), reporter)

    def human() -> None:
        rows = [(f.group, f.level, f.what, f.remedy) for f in result.findings]
        render.table(["about", "is", "found", "what to do"], rows, align_left=True)
        render.line(f"{result.num_problems} problem(s), {result.num_warnings} warning(s)")

    render.emit(result, as_json=options.as_json, human=human)
    if result.num_problems:
        raise typer.Exit(2)
