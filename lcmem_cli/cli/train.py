"""``lcmem train-codec``, ``train-stage1`` and ``finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    CODEC,
    FOLDER,
    INPUT,
    MAX_UNREADABLE,
    OUTPUT,
    OVERRIDES,
    ListOptions,
    TableOptions,
    argument,
    option,
    training_config_option,
)

if TYPE_CHECKING:
    from lcmem_cli.engine.config import ConfigT
    from lcmem_cli.engine.data.manifest import Manifest
    from lcmem_cli.engine.training.stages import TrainingResult


class TrainingOptions(TableOptions):
    """What every training is asked for."""

    config: str | None
    overrides: list[str] | None = OVERRIDES
    max_unreadable: int = MAX_UNREADABLE
    output: Path = FOLDER
    resume: bool = option(OUTPUT, "Continue the run in the output folder, if there is one.", False)

    def arguments(self) -> dict[str, Any]:
        """Return what every function of the engine that trains takes."""
        return {
            "output": self.output,
            "resume": self.resume,
            "max_unreadable": self.max_unreadable,
            "reporter": render.reporter(),
        }

    def load_config(self, kind: type[ConfigT], *, default: str) -> ConfigT:
        """Return the config that is asked for, or that of the run that is continued."""
        from lcmem_cli.engine.training.run import load_run_config

        return load_run_config(
            self.config,
            kind,
            default=default,
            overrides=self.overrides or [],
            output=self.output,
            resume=self.resume,
        )

    def load_manifest(self, filelist: Path) -> Manifest:
        """Return the images that are asked for."""
        return self.reading(self.max_unreadable).load(filelist, need_split=True)


class TrainCodecOptions(ListOptions, TrainingOptions):
    """What the training of a codec is asked for."""

    config: str | None = training_config_option("mini/codec")


class Stage1Options(TrainingOptions):
    """What the first stage is asked for."""

    latents: Path | None = option(INPUT, "Latent store made by lcmem latents.", None)
    filelist: Path | None = option(
        INPUT, "Images: for a config without codec, or to align pretrained weights.", None
    )
    config: str | None = training_config_option("stage1")


class FinetuneOptions(ListOptions, TrainingOptions):
    """What the second stage is asked for."""

    checkpoint: str = argument("Stage-1 checkpoint.")
    config: str | None = training_config_option("finetune")
    codec: str | None = CODEC


def train_codec(options: TrainCodecOptions) -> None:
    """Train a small AutoencoderKL on your own images; writes a diffusers folder.

    Examples:
        lcmem train-codec --filelist list.csv -o codec
    """
    from lcmem_cli.engine.config import CodecConfig
    from lcmem_cli.engine.training.autoencoder import train_codec as run

    resolved = options.load_config(CodecConfig, default="mini/codec")
    result = run(
        resolved,
        options.filelist,
        basedir=options.basedir,
        columns=options.list_columns(),
        **options.arguments(),
    )

    def human() -> None:
        render.line(f"codec      {result.codec.describe()}")
        render.line(f"encoder    {result.num_encoder_parameters:,} parameters")
        render.line(
            f"VAL error  {result.val_mean_absolute_error:.4f} mean absolute, "
            f"{result.val_psnr:.1f} dB PSNR"
        )
        render.line(
            f"next       lcmem latents --config mini/stage1 --codec {result.codec.name} "
            f"--size {resolved.image.size} --filelist {options.filelist} -o latents"
        )

    render.emit(result, as_json=options.as_json, human=human)


def train_stage1(options: Stage1Options) -> None:
    """Train the Siamese network on latents (or on images, for the baselines).

    Examples:
        lcmem train-stage1 --latents latents -o run
        lcmem train-stage1 --latents latents -o run --resume --set schedule.epochs=600
    """
    from lcmem_cli.engine.config import Stage1Config
    from lcmem_cli.engine.store.latents import LatentStore
    from lcmem_cli.engine.training.stages import train_stage1 as run

    filelist = options.filelist
    result = run(
        options.load_config(Stage1Config, default="stage1"),
        store=None if options.latents is None else LatentStore.open(options.latents),
        manifest=None if filelist is None else options.load_manifest(filelist),
        **options.arguments(),
    )
    render.emit(result, as_json=options.as_json, human=lambda: _show(result))


def finetune(options: FinetuneOptions) -> None:
    """Fine-tune in image space under augmentation; the codec stays frozen.

    Examples:
        lcmem finetune run/checkpoint.safetensors --filelist list.csv -o finetuned
    """
    from lcmem_cli.engine.config import FinetuneConfig
    from lcmem_cli.engine.training.stages import finetune as run

    result = run(
        options.load_config(FinetuneConfig, default="finetune"),
        checkpoint=options.checkpoint,
        manifest=options.load_manifest(options.filelist),
        codec=options.codec,
        **options.arguments(),
    )
    render.emit(result, as_json=options.as_json, human=lambda: _show(result))


def _show(result: TrainingResult) -> None:
    kept = next(r for r in result.history if r.epoch == result.best_epoch)
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
