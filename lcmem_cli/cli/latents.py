"""``lcmem latents``: encode an image list to latents."""

from __future__ import annotations

import enum
from typing import Annotated, Optional

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    BasedirOption,
    BatchSizeOption,
    Device,
    DeviceOption,
    FilelistOption,
    InputRange,
    JsonOption,
    MaxUnreadableOption,
    OutputOption,
    SeedOption,
    WorkersOption,
)


class Posterior(str, enum.Enum):
    """What is taken of the codec's posterior."""

    MEAN = "mean"
    SAMPLE = "sample"


def latents(
    filelist: FilelistOption,
    output: OutputOption,
    basedir: BasedirOption = None,
    codec: Annotated[
        str,
        typer.Option(help="'embedded', a diffusers folder, or a hub id (AutoencoderKL or Tiny)."),
    ] = "embedded",
    revision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Branch, tag or commit of a hub id."),
    ] = None,
    size: Annotated[
        int, typer.Option(min=16, help="Side in pixels that images are resized to.")
    ] = 512,
    input_range: Annotated[
        InputRange, typer.Option(help="Feed the codec [-1, 1] or [0, 1].")
    ] = InputRange.SYMMETRIC,
    posterior: Annotated[
        Posterior, typer.Option(help="Mean of the posterior (repeatable) or a seeded sample.")
    ] = Posterior.MEAN,
    package: Annotated[
        bool, typer.Option("--package", help="Also write OUTPUT.tar.gz of this store's files.")
    ] = False,
    batch_size: BatchSizeOption = 16,
    workers: WorkersOption = -1,
    device: DeviceOption = Device.AUTO,
    seed: SeedOption = 0,
    max_unreadable: MaxUnreadableOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Encode every image of a list to VAE latents; continues where it stopped."""
    from lcmem_cli.engine.compute import Compute
    from lcmem_cli.engine.data.manifest import load_manifest
    from lcmem_cli.engine.distributed import resolve_device
    from lcmem_cli.engine.models.codec_loading import load_codec
    from lcmem_cli.engine.store.latents import encode_latents

    compute = Compute.start(
        device=device.value, batch_size=batch_size, workers=workers, reporter=render.reporter()
    )
    result = encode_latents(
        load_manifest(filelist, basedir=basedir, max_missing=max_unreadable),
        load_codec(
            codec,
            revision=revision,
            input_range=input_range.value,
            posterior=posterior.value,
            device=resolve_device(device.value),
        ),
        output,
        compute,
        image_size=size,
        seed=seed,
        max_unreadable=max_unreadable,
        package=package,
    )
    if not compute.ranks.is_main:
        return

    def human() -> None:
        render.line(f"{result.num_images:,} latents in {result.folder}")
        render.line(f"codec       {result.codec.describe()}")
        render.line(f"image size  {result.image_size} px")
        render.line("mean        " + " ".join(f"{v:.4f}" for v in result.mean))
        render.line("std         " + " ".join(f"{v:.4f}" for v in result.std))
        render.unreadable(result.unreadable)
        if result.package:
            render.line(f"package     {result.package}")

    render.emit(result, as_json=as_json, human=human)
