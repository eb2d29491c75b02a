"""``lcmem info``, ``convert`` and ``calibrate``: what a file is, and converting or fitting one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    AnyUnreadableOption,
    BasedirOption,
    Device,
    DeviceOption,
    FilelistOption,
    InputRange,
    JsonOption,
    SeedOption,
    WorkersOption,
)


def info(
    path: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="Checkpoint or latent store (default: the embedded model)."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every shard with its checksum.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print what a checkpoint or a latent store is."""
    from lcmem_cli.engine.describe import describe

    described = describe(path, verify=verify)

    def show(values: dict[str, object], indent: str = "") -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                render.line(f"{indent}{key}")
                show(value, indent + "  ")
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                for item in value:
                    render.line(f"{indent}{key}")
                    show(item, indent + "  ")
            else:
                render.line(f"{indent}{key:<18} {value}")

    render.emit(described, as_json=as_json, human=lambda: show(described))


def convert(
    source: Annotated[Path, typer.Argument(help="The authors' .pth file.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    codec: Annotated[
        str, typer.Option(help="Hub id or folder of the VAE it was trained with.")
    ] = "stabilityai/sd-vae-ft-mse",
    size: Annotated[int, typer.Option(min=16, help="Image side in pixels.")] = 512,
    input_range: Annotated[
        InputRange, typer.Option(help="What its VAE was fed.")
    ] = InputRange.UNIT,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint of the published code, strictly: nothing missing, nothing left over."""
    from lcmem_cli.engine.models.convert import convert_reference

    checkpoint = convert_reference(
        source, target, codec=codec, image_size=size, input_range=input_range.value
    )

    def human() -> None:
        render.line(f"wrote {target}")
        render.line(f"backbone    {checkpoint.network.backbone}, fingerprint")
        render.line(f"            {checkpoint.fingerprint}")
        render.line("thresholds  none; fit some with: lcmem calibrate")

    render.emit(checkpoint.summary(), as_json=as_json, human=human)


def calibrate(
    checkpoint: Annotated[str, typer.Argument(help="An lcmem checkpoint.")],
    filelist: FilelistOption,
    output: Annotated[Path, typer.Option("--output", "-o", help=".safetensors file to write.")],
    basedir: BasedirOption = None,
    half: Annotated[
        bool, typer.Option("--half", help="Store the network in float16, before fitting.")
    ] = False,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Side in pixels to use images at from now on, e.g. a fifth more than in training.",
            show_default="the trained one",
        ),
    ] = None,
    adapt: Annotated[
        bool,
        typer.Option(
            "--adapt",
            help="Adapt the last layer to the TRAIN images, for a list of one kind of images; "
            "identities are not used.",
        ),
    ] = False,
    whiten: Annotated[
        bool,
        typer.Option(
            "--whiten",
            help="Fit the last layer to the TRAIN images: whitened principal components, in which "
            "edits, and differences between images of one identity, count less.",
        ),
    ] = False,
    bands: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=16,
            help="With --whiten, for a network with network.inner_stride: also read so many "
            "horizontal bands.",
            show_default="as the checkpoint",
        ),
    ] = None,
    seed: SeedOption = 0,
    max_unreadable: AnyUnreadableOption = None,
    workers: WorkersOption = -1,
    device: DeviceOption = Device.AUTO,
    as_json: JsonOption = False,
) -> None:
    """Fit a checkpoint to your data: thresholds on VAL pairs; if asked, size and last layer."""
    from lcmem_cli.engine.compute import Compute
    from lcmem_cli.engine.evaluation.recalibrate import CalibrationRequest, recalibrate
    from lcmem_cli.engine.results import named_thresholds

    request = CalibrationRequest(
        checkpoint=checkpoint,
        filelist=filelist,
        output=output,
        basedir=basedir,
        half=half,
        size=size,
        adapted=adapt,
        whitened=whiten,
        inner_bands=bands,
        seed=seed,
        max_unreadable=max_unreadable,
    )
    compute = Compute(device=device.value, workers=workers, reporter=render.reporter())
    result = recalibrate(request, compute)

    def human() -> None:
        named = named_thresholds(result.thresholds, result.adapted_thresholds)
        rows = [
            (
                name,
                f"{t.value:.6f}",
                "?" if t.achieved_fpr is None else f"{t.achieved_fpr:.3%}",
                "?" if t.achieved_recall is None else f"{t.achieved_recall:.2%}",
                f"{t.num_positives:,}",
                f"{t.num_negatives:,}",
            )
            for name, t in named
        ]
        columns = ["threshold", "score >=", "VAL FPR", "VAL recall", "positives", "negatives"]
        if rows:
            render.table(columns, rows)
        for name, values in result.test_auc.items():
            render.line(f"TEST AUC {name:<18} {values['auc']:.4f}")
        render.unreadable(result.unreadable)
        render.line(f"wrote {output} ({result.num_bytes / 1e6:.1f} MB)")

    render.emit(result, as_json=as_json, human=human)
