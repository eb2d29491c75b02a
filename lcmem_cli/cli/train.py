"""``lcmem train-codec``, ``train-stage1`` and ``finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    BasedirOption,
    CodecOption,
    ConfigOption,
    FilelistOption,
    JsonOption,
    MaxUnreadableOption,
    OutputOption,
    SetOption,
)

if TYPE_CHECKING:
    from lcmem_cli.engine.training.stages import TrainingResult

ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the run in the output folder, if there is one.")
]
OptionalFilelist = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--filelist", help="Images: for a config without codec, or to align pretrained weights."
    ),
]


def train_codec(
    filelist: FilelistOption,
    output: OutputOption,
    config: ConfigOption = "mini/codec",
    basedir: BasedirOption = None,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    max_unreadable: MaxUnreadableOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a small AutoencoderKL on your own images; writes a diffusers folder."""
    from lcmem_cli.engine.config import CodecConfig, load_config
    from lcmem_cli.engine.training.autoencoder import train_codec as run

    resolved = load_config(config, CodecConfig, overrides=overrides or [])
    result = run(
        resolved,
        filelist,
        basedir=basedir,
        output=output,
        resume=resume,
        max_unreadable=max_unreadable,
        reporter=render.reporter(),
    )

    def human() -> None:
        render.line(f"codec      {result.codec.describe()}")
        render.line(f"encoder    {result.num_encoder_parameters:,} parameters")
        render.line(
            f"VAL error  {result.val_mean_absolute_error:.4f} mean absolute, "
            f"{result.val_psnr:.1f} dB PSNR"
        )
        render.line(
            f"next       lcmem latents --codec {result.codec.name} --filelist {filelist} "
            f"--size {resolved.image.size} -o latents"
        )

    render.emit(result, as_json=as_json, human=human)


def train_stage1(
    output: OutputOption,
    latents: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--latents", help="Latent store made by lcmem latents."),
    ] = None,
    filelist: OptionalFilelist = None,
    basedir: BasedirOption = None,
    config: ConfigOption = "stage1",
    overrides: SetOption = None,
    resume: ResumeOption = False,
    max_unreadable: MaxUnreadableOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train the Siamese network on latents (or on images, for the baselines)."""
    from lcmem_cli.engine.config import Stage1Config, load_config
    from lcmem_cli.engine.data.manifest import load_manifest
    from lcmem_cli.engine.distributed import current_ranks
    from lcmem_cli.engine.store.latents import LatentStore
    from lcmem_cli.engine.training.stages import train_stage1 as run

    resolved = load_config(config, Stage1Config, overrides=overrides or [])
    result = run(
        resolved,
        output=output,
        store=None if latents is None else LatentStore.open(latents),
        manifest=(
            None
            if filelist is None
            else load_manifest(filelist, basedir=basedir, max_missing=max_unreadable)
        ),
        resume=resume,
        max_unreadable=max_unreadable,
        reporter=render.reporter(),
    )
    if current_ranks(resolved.runtime.device).is_main:
        render.emit(result, as_json=as_json, human=lambda: _show(result))


def finetune(
    checkpoint: Annotated[str, typer.Argument(help="Stage-1 checkpoint.")],
    filelist: FilelistOption,
    output: OutputOption,
    basedir: BasedirOption = None,
    config: ConfigOption = "finetune",
    codec: CodecOption = None,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    max_unreadable: MaxUnreadableOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune in image space under augmentation; the codec stays frozen."""
    from lcmem_cli.engine.config import FinetuneConfig, load_config
    from lcmem_cli.engine.data.manifest import load_manifest
    from lcmem_cli.engine.distributed import current_ranks
    from lcmem_cli.engine.training.stages import finetune as run

    resolved = load_config(config, FinetuneConfig, overrides=overrides or [])
    result = run(
        resolved,
        checkpoint=checkpoint,
        manifest=load_manifest(filelist, basedir=basedir, max_missing=max_unreadable),
        output=output,
        codec=codec,
        resume=resume,
        max_unreadable=max_unreadable,
        reporter=render.reporter(),
    )
    if current_ranks(resolved.runtime.device).is_main:
        render.emit(result, as_json=as_json, human=lambda: _show(result))


def _show(result: TrainingResult) -> None:
    kept = next(r for r in result.history if r.epoch == result.best_epoch - 1)
    early = ", stopped early" if result.stopped_early else ""
    render.line(
        f"kept epoch {result.best_epoch} of {result.num_epochs}{early}: "
        f"train {kept.train_loss:.4f}, VAL {kept.val_loss:.4f}"
    )
    rows = [
        (
            name,
            f"{v['auc']:.4f}",
            "-" if v["low"] is None else f"{v['low']:.4f} to {v['high']:.4f}",
            f"{v['num_positives']:,}",
            f"{v['num_negatives']:,}",
        )
        for name, v in result.test_auc.items()
    ]
    if rows:
        render.table(
            ["data set", "TEST AUC", "95 % interval", "positives", "negatives"],
            rows,
            title="TEST pairs (all positives, negatives within the data set)",
        )
    for threshold in result.thresholds:
        render.line(f"threshold  {threshold.name}: {threshold.value:.6f} ({threshold.fitted_on})")
    render.line(f"checkpoint {result.checkpoint}")
