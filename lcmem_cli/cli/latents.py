"""``lcmem latents``: encode an image list to latents."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    FOLDER,
    FRAMES,
    INPUT,
    JUDGING,
    MAX_UNREADABLE,
    OUTPUT,
    ComputeOptions,
    Frames,
    InputRange,
    ListOptions,
    batch_option,
    option,
    seed_option,
)


class LatentsOptions(ListOptions, ComputeOptions):
    """What an encoding is asked for."""

    frames: Frames = FRAMES
    codec: str = option(
        INPUT, "'embedded', a diffusers folder, or a hub id (AutoencoderKL or Tiny).", "embedded"
    )
    revision: str | None = option(INPUT, "Branch, tag or commit of a hub id.", None)
    size: int = option(JUDGING, "Side in pixels that images are resized to.", 512, min=16)
    input_range: InputRange = option(JUDGING, "Feed the codec [-1, 1] or [0, 1].", "symmetric")
    posterior: Literal["mean", "sample"] = option(
        JUDGING, "Mean of the posterior (repeatable) or a seeded sample.", "mean"
    )
    seed: int = seed_option()
    max_unreadable: int = MAX_UNREADABLE
    batch_size: int = batch_option(16)
    output: Path = FOLDER
    package: bool = option(OUTPUT, "Also write OUTPUT.tar.gz of this store's files.", False)


def latents(options: LatentsOptions) -> None:
    """Encode every image of a list to VAE latents; continues where it stopped.

    Examples:
        lcmem latents --filelist list.csv -o latents
        lcmem latents --filelist list.csv --codec codec --size 256 -o latents
    """
    from lcmem_cli.engine.data.manifest import load_manifest
    from lcmem_cli.engine.distributed import resolve_device
    from lcmem_cli.engine.models.codec_loading import load_codec
    from lcmem_cli.engine.store.latents import encode_latents

    compute = options.compute()
    result = encode_latents(
        load_manifest(
            options.filelist,
            basedir=options.basedir,
            max_missing=options.max_unreadable,
            frames=options.frames,
            reporter=compute.reporter,
        ),
        load_codec(
            options.codec,
            revision=options.revision,
            input_range=options.input_range,
            posterior=options.posterior,
            device=resolve_device(options.device),
        ),
        options.output,
        compute,
        image_size=options.size,
        seed=options.seed,
        max_unreadable=options.max_unreadable,
        package=options.package,
    )

    def human() -> None:
        render.line(f"{result.num_images:,} latents in {result.folder}")
        render.line(f"codec       {result.codec.describe()}")
        render.line(f"image size  {result.image_size} px")
        render.line("mean        " + " ".join(f"{v:.4f}" for v in result.mean))
        render.line("std         " + " ".join(f"{v:.4f}" for v in result.std))
        render.unreadable(result.unreadable)
        if result.package:
            render.line(f"package     {result.package}")

    render.emit(result, as_json=options.as_json, human=human)
