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
    config_option,
    option,
    seed_option,
)


class LatentsOptions(ListOptions, ComputeOptions):
    """What an encoding is asked for."""

    frames: Frames = FRAMES
    config: str = config_option("stage1")
    codec: str | None = option(
        INPUT,
        "'embedded', a diffusers folder, or a hub id (AutoencoderKL or Tiny), in place of the "
        "config's.",
        None,
    )
    revision: str | None = option(INPUT, "Branch, tag or commit of a hub id.", None)
    size: int | None = option(
        JUDGING, "Side in pixels that images are resized to (default: the config's).", None, min=16
    )
    input_range: InputRange | None = option(
        JUDGING, "Feed the codec [-1, 1] or [0, 1] (default: the config's).", None
    )
    posterior: Literal["mean", "sample"] | None = option(
        JUDGING, "Mean of the posterior (repeatable) or a seeded sample.", None
    )
    seed: int = seed_option()
    max_unreadable: int = MAX_UNREADABLE
    batch_size: int = batch_option(16)
    output: Path = FOLDER
    package: bool = option(OUTPUT, "Also write OUTPUT.tar.gz of this store's files.", False)


def latents(options: LatentsOptions) -> None:
    """Encode every image of a list to VAE latents; continues where it stopped.

    Codec and size are those of the training config that the latents are for.

    Examples:
        lcmem latents --filelist list.csv --config stage1 -o latents
        lcmem latents --filelist list.csv --codec codec --size 256 -o latents
    """
    from lcmem_cli.engine.config import Stage1Config, load_config
    from lcmem_cli.engine.distributed import resolve_device
    from lcmem_cli.engine.models.codec_loading import load_codec
    from lcmem_cli.engine.store.latents import encode_latents
    from lcmem_cli.engine.training.inputs import as_options, overrides_for

    compute = options.compute()
    config = load_config(options.config, Stage1Config)
    result = encode_latents(
        options.reading(options.max_unreadable, options.frames).load(
            options.filelist, need_split=True, reporter=compute.reporter
        ),
        load_codec(
            options.codec or config.codec.name,
            revision=options.revision or (None if options.codec else config.codec.revision),
            input_range=options.input_range or config.codec.input_range,
            posterior=options.posterior or config.codec.posterior,
            device=resolve_device(options.device),
        ),
        options.output,
        compute,
        image_size=options.size or config.image.size,
        seed=options.seed,
        max_unreadable=options.max_unreadable,
        package=options.package,
    )

    def human() -> None:
        render.line(f"{result.num_images:,} latents in {result.folder}")
        render.line(f"codec       {result.codec.describe()}")
        if result.precision != "fp32":
            render.line(f"precision   {result.precision}")
        render.line(f"image size  {result.image_size} px")
        render.line("mean        " + " ".join(f"{v:.4f}" for v in result.mean))
        render.line("std         " + " ".join(f"{v:.4f}" for v in result.std))
        render.unreadable(result.unreadable)
        if result.package:
            render.line(f"package     {result.package}")
        more = as_options(overrides_for(config, result.codec, result.image_size))
        command = f"lcmem train-stage1 --config {options.config} --latents {result.folder} {more}"
        render.line(f"next        {command.strip()} -o stage1")

    render.emit(result, as_json=options.as_json, human=human)
