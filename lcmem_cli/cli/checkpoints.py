"""``lcmem info``, ``convert`` and ``calibrate``: what a file is, and converting or fitting one."""

from __future__ import annotations

from pathlib import Path

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    ANY_UNREADABLE,
    INPUT,
    JUDGING,
    OUTPUT,
    DecodeOptions,
    InputRange,
    JsonOptions,
    ListOptions,
    argument,
    option,
    seed_option,
)


class InfoOptions(JsonOptions):
    """What a description is asked for."""

    path: str | None = argument("Checkpoint or latent store (default: the embedded model).", None)
    verify: bool = option(JUDGING, "Compare every shard with its checksum.", False)


def info(options: InfoOptions) -> None:
    """Print what a checkpoint or a latent store is.

    Examples:
        lcmem info
        lcmem info run/checkpoint.safetensors --json
        lcmem info latents --verify
    """
    from lcmem_cli.engine.describe import describe

    described = describe(options.path, verify=options.verify)

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

    render.emit(described, as_json=options.as_json, human=lambda: show(described))


class ConvertOptions(JsonOptions):
    """What a conversion is asked for."""

    source: Path = argument("The authors' .pth file.")
    target: Path = argument("The .safetensors file to write.")
    codec: str = option(
        INPUT, "Hub id or folder of the VAE it was trained with.", "stabilityai/sd-vae-ft-mse"
    )
    image_size: int = option(INPUT, "Image side in pixels.", 512, flags="--size", min=16)
    input_range: InputRange = option(INPUT, "What its VAE was fed.", "unit")


def convert(options: ConvertOptions) -> None:
    """Convert a checkpoint of the published code, strictly: nothing missing, nothing left over.

    Examples:
        lcmem convert lcmem.pth lcmem.safetensors
    """
    from lcmem_cli.engine.models.convert import convert_reference

    checkpoint = convert_reference(**options.arguments())

    def human() -> None:
        render.line(f"wrote {options.target}")
        render.line(f"backbone    {checkpoint.network.backbone}, fingerprint")
        render.line(f"            {checkpoint.fingerprint}")
        render.line("thresholds  none; fit some with: lcmem calibrate")

    render.emit(checkpoint.summary(), as_json=options.as_json, human=human)


class CalibrateOptions(ListOptions, DecodeOptions):
    """What a fit is asked for."""

    checkpoint: str = argument("An lcmem checkpoint.")
    half: bool = option(JUDGING, "Store the network in float16, before fitting.", False)
    size: int | None = option(
        JUDGING,
        "Side in pixels to use images at from now on, e.g. a fifth more than in training "
        "(default: the trained one).",
        None,
        min=1,
    )
    adapted: bool = option(
        JUDGING,
        "Adapt the last layer to the TRAIN images, for a list of one kind of images; identities "
        "are not used.",
        False,
        flags="--adapt",
    )
    whitened: bool = option(
        JUDGING,
        "Fit the last layer to the TRAIN images: whitened principal components, in which edits, "
        "and differences between images of one identity, count less.",
        False,
        flags="--whiten",
    )
    inner_bands: int | None = option(
        JUDGING,
        "With --whiten, for a network with network.inner_stride: also read so many horizontal "
        "bands (default: as the checkpoint).",
        None,
        flags="--bands",
        min=2,
        max=16,
    )
    seed: int = seed_option()
    max_unreadable: int | None = ANY_UNREADABLE
    output: Path = option(OUTPUT, ".safetensors file to write.", flags="--output -o")


def calibrate(options: CalibrateOptions) -> None:
    """Fit a checkpoint to your data: thresholds on VAL pairs; if asked, size and last layer.

    Examples:
        lcmem calibrate model.safetensors --filelist list.csv -o my.safetensors
        lcmem calibrate embedded --filelist list.csv --adapt -o my.safetensors
    """
    from lcmem_cli.engine.compute import Compute
    from lcmem_cli.engine.evaluation.recalibrate import CalibrationRequest, recalibrate
    from lcmem_cli.engine.results import named_thresholds

    values = options.arguments()
    compute = Compute(**{name: values.pop(name) for name in ("device", "workers", "reporter")})
    result = recalibrate(CalibrationRequest(**values), compute)

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
        render.line(f"wrote {options.output} ({result.num_bytes / 1e6:.1f} MB)")

    render.emit(result, as_json=options.as_json, human=human)
