"""Training a small AutoencoderKL on the user's own images.

Architecture: the KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), made
small; the loss is the mean absolute error plus a light Kullback-Leibler term, without the
adversarial and perceptual parts, which latents for comparison do not need.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.config import CodecConfig
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.data.tables import STANDARD, ListColumns
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.files import naming_target, write_json, write_text
from lcmem_cli.engine.models.codec import Codec, CodecSpec
from lcmem_cli.engine.report.plots import plot_codec_losses
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, check_unreadable
from lcmem_cli.engine.training.run import open_training_folder, readable_part
from lcmem_cli.engine.training.sources import load_ahead
from lcmem_cli.engine.training.state import StateFile

CODEC_FOLDER = "codec"
RESULT_NAME = "training.json"
HISTORY_NAME = "history.csv"
STEPS_BETWEEN_RECORDS = 50
MAX_VALIDATION_IMAGES = 256
CONSTANT = 20.0
"""Of the two constant channels of a group where the encoder starts from pixels; those hold values
in [-1, 1]."""
ALMOST_LINEAR = 8.0
"""Within 2 of this SiLU is within 0.015 of its argument."""
START_LOG_VARIANCE = -6.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecTrainingResult(Result):
    """A trained codec.

    Attributes:
        codec: its spec; the name is the folder that ``--codec`` takes.
        num_encoder_parameters: parameters that encoding uses.
        val_mean_absolute_error: of reconstructions of VAL images, on the scale [0, 1].
        val_psnr: peak signal-to-noise ratio of the same, in decibels.
        steps: optimiser steps.
    """

    codec: CodecSpec
    num_encoder_parameters: int
    val_mean_absolute_error: float
    val_psnr: float
    steps: int


def build_autoencoder(config: CodecConfig) -> torch.nn.Module:
    """Build the AutoencoderKL of a config with seeded random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(config.runtime.seed)
    levels = len(config.model.block_channels)
    model: torch.nn.Module = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.model.block_channels,
        layers_per_block=config.model.layers_per_block,
        latent_channels=config.model.latent_channels,
        norm_num_groups=config.model.norm_groups,
        mid_block_add_attention=False,
        sample_size=config.image.size,
    )
    if config.model.start == "pixels":
        start_from_pixels(model)
    return model


@torch.no_grad()
def start_from_pixels(model: Any) -> None:
    """Make an encoder that sorts the pixels of each block into channels (space to depth).

    The first convolution keeps the colours, every downsampling sorts the four pixels of a square
    into four times as many channels, and the residual blocks add nothing at first. Two channels
    of each normalisation group hold the constants ``K`` and ``-K``, so that its statistics hardly
    depend on the image, and tell its mean; the last convolution takes that off again. The
    activation before it works where it is all but linear.

    Args:
        model: ``AutoencoderKL`` with ``layers_per_block = 0``; changed in place.

    Raises:
        InputError: there are fewer channels than values in a block of pixels.
    """
    # Longer than others: one derivation, of which no part has a meaning by itself.
    encoder = model.encoder
    groups, channels = encoder.conv_norm_out.num_groups, encoder.conv_norm_out.num_channels
    members = torch.arange(channels).reshape(groups, -1)
    if members.shape[1] < 3:
        raise InputError('model.norm_groups: start = "pixels" needs groups of 3 channels or more')
    slots, plus, minus = members[:, :-2].flatten(), members[:, -2], members[:, -1]
    downsamplers = [b.downsamplers[0].conv for b in encoder.down_blocks if b.downsamplers]
    values = 3 * 4 ** len(downsamplers)
    latent_channels = model.config.latent_channels
    if values > min(len(slots), latent_channels):
        raise InputError(
            f'model.start: "pixels" needs {values} latent_channels and {values} channels beside '
            f"two in each group; there are {latent_channels} and {len(slots)}"
        )

    def constants(convolution: Any) -> None:
        convolution.weight.zero_()
        convolution.bias.zero_()
        convolution.bias[plus], convolution.bias[minus] = CONSTANT, -CONSTANT

    constants(encoder.conv_in)
    for colour in range(3):
        encoder.conv_in.weight[slots[colour], colour, 1, 1] = 1
    carried = 3
    for convolution in downsamplers:
        constants(convolution)
        for place in range(4):
            for value in range(carried):
                target = slots[place * carried + value]
                convolution.weight[target, slots[value], place // 2, place % 2] = 1
        carried *= 4
    for name, module in encoder.named_modules():
        if name.endswith("conv2"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    norm, last = encoder.conv_norm_out, encoder.conv_out
    norm.weight.fill_(CONSTANT * (2 / members.shape[1]) ** 0.5)  # the deviation of a group
    norm.bias.fill_(ALMOST_LINEAR)
    norm.bias[plus] -= CONSTANT
    norm.bias[minus] += CONSTANT
    last.weight.zero_()
    last.bias.zero_()
    last.bias[latent_channels:] = START_LOG_VARIANCE
    for value in range(values):
        slot = slots[value]
        group = int(slot) // members.shape[1]
        last.weight[value, slot, 1, 1] = 1
        last.weight[value, plus[group], 1, 1] = last.weight[value, minus[group], 1, 1] = -0.5
    model.quant_conv.weight.copy_(torch.eye(2 * latent_channels)[:, :, None, None])
    model.quant_conv.bias.zero_()


def train_codec(
    config: CodecConfig,
    filelist: Path,
    *,
    basedir: Path | None,
    columns: ListColumns = STANDARD,
    output: Path,
    resume: bool = False,
    max_unreadable: int = 0,
    reporter: Reporter = SILENT,
) -> CodecTrainingResult:
    """Train an autoencoder on the TRAIN images of a list; write a diffusers folder.

    Args:
        config: shape, loss and schedule.
        filelist: images with splits; the reconstruction error is measured on VAL.
        basedir: folder that its paths start from.
        columns: what the filelist calls its columns.
        output: run folder; the codec is its folder ``codec``.
        resume: continue a run that stopped.
        max_unreadable: tolerated unreadable images.
        reporter: receives progress.

    Raises:
        UnreadableLimitError: more unreadable images than tolerated.
        InputError: no images, sizes that do not fit, or a folder of another run.
        TrainingDivergedError: the loss became NaN or infinite.
    """
    # A codec is small and trained by one process, whatever the launcher has started.
    compute = Compute(
        device=config.runtime.device, workers=config.runtime.num_workers, reporter=reporter
    )
    listed = load_manifest(filelist, basedir=basedir, columns=columns, max_missing=max_unreadable)
    manifest, unreadable = readable_part(listed, compute)
    check_unreadable(unreadable, max_unreadable)
    train_paths, val_paths = (manifest.select(split).paths() for split in ("TRAIN", "VAL"))
    check_inputs(config, len(train_paths), len(val_paths))
    with open_training_folder(output, config, manifest.digest, resume=resume) as run_digest:
        trainer = _CodecTrainer(config, train_paths, output, run_digest, compute)
        trainer.run()
        trainer.model.eval()
        count = min(len(val_paths), MAX_VALIDATION_IMAGES)
        rng = np.random.default_rng(config.runtime.seed)
        drawn = np.sort(rng.choice(len(val_paths), count, replace=False))
        error, psnr = _reconstruction_error(trainer, [val_paths[row] for row in drawn])
        codec = _write_codec(trainer.model.cpu(), output, config)
        result = CodecTrainingResult(
            codec=codec.spec,
            num_encoder_parameters=sum(v.numel() for v in codec.encoder_state().values()),
            val_mean_absolute_error=error,
            val_psnr=psnr,
            steps=config.schedule.steps,
        )
        write_json(output / RESULT_NAME, result.to_dict())
        return result


def _write_codec(model: Any, output: Path, config: CodecConfig) -> Codec:
    """Write a diffusers folder in the place of a former one, whole or not at all."""
    folder = output / CODEC_FOLDER
    with naming_target(folder), tempfile.TemporaryDirectory(dir=output) as temporary:
        made = Path(temporary) / CODEC_FOLDER
        # Channels-last weights are refused by diffusers 0.32.
        model.to(memory_format=torch.contiguous_format).save_pretrained(made)
        if folder.exists():
            folder.rename(Path(temporary) / "former")
        made.rename(folder)
    return Codec(model, name=str(folder), input_range=config.input_range)


def check_inputs(config: CodecConfig, num_train: int, num_val: int) -> None:
    """Check that sides fit the shape, and that there is something to train and to validate on.

    Raises:
        InputError: they do not, or there is not.
    """
    factor = 2 ** (len(config.model.block_channels) - 1)
    for key, side in (
        ("image.size", config.image.size),
        ("schedule.crop_size", config.schedule.crop_size),
    ):
        if side % factor:
            raise InputError(f"{key}: {side} is not divisible by the codec's downsampling {factor}")
    if config.schedule.crop_size > config.image.size:
        raise InputError(
            f"schedule.crop_size: {config.schedule.crop_size} is larger than image.size "
            f"{config.image.size}"
        )
    if not num_train or not num_val:
        raise InputError("training a codec needs TRAIN and VAL images")


class _CodecTrainer:
    def __init__(
        self,
        config: CodecConfig,
        paths: list[Path],
        folder: Path,
        run_digest: str,
        compute: Compute,
    ) -> None:
        self.config, self.paths, self.folder, self.compute = config, paths, folder, compute
        self.device = torch.device(resolve_device(compute.device))
        self.file = StateFile(folder, run_digest, self.device)
        self.model: Any = build_autoencoder(config).to(self.device)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=config.schedule.learning_rate)
        self.step = 0
        self.history: list[list[float]] = []
        self.sums = [0.0, 0.0]

    def run(self) -> None:
        self._restore()
        schedule = self.config.schedule
        self.model.train()
        if self.device.type == "cpu":
            self.model.to(memory_format=torch.channels_last)
        with self.compute.reporter.task("codec", schedule.steps, unit="step") as task:
            task.advance(self.step)
            for images in self._stream():
                error, divergence = self._train_step(images)
                self.sums[0] += error
                self.sums[1] += divergence
                self.step += 1
                task.advance(error=error, kl=divergence)
                if self.step % STEPS_BETWEEN_RECORDS == 0 or self.step == schedule.steps:
                    count = (self.step - 1) % STEPS_BETWEEN_RECORDS + 1
                    self.history.append([self.step, *(value / count for value in self.sums)])
                    self.sums = [0.0, 0.0]
                if self.file.is_due:
                    self._save()
        self._save()
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["step", "mean_absolute_error", "kl"])
        writer.writerows([[int(row[0]), *row[1:]] for row in self.history])
        write_text(self.folder / HISTORY_NAME, buffer.getvalue())
        plot_codec_losses(self.history, self.folder / "loss")

    def _train_step(self, images: torch.Tensor) -> tuple[float, float]:
        schedule = self.config.schedule
        rate = schedule.learning_rate * (1 + math.cos(math.pi * self.step / schedule.steps)) / 2
        for group in self.adam.param_groups:
            group["lr"] = rate
        inputs = images.to(self.device)
        if self.config.input_range == "symmetric":
            inputs = inputs * 2 - 1
        if self.device.type == "cpu":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        posterior = self.model.encode(inputs).latent_dist
        generator = torch.Generator(self.device).manual_seed(
            self.config.runtime.seed * 1_000_003 + self.step
        )
        decoded = self.model.decode(posterior.sample(generator=generator)).sample
        error = F.l1_loss(decoded, inputs)
        divergence = posterior.kl().sum() / inputs[:, 0].numel()
        loss = error + self.config.loss.kl_weight * divergence
        if not math.isfinite(float(loss.detach())):
            raise self.file.diverged(
                f"the loss became {float(loss.detach())} at step {self.step + 1}",
                "a smaller schedule.learning_rate",
            )
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.step()
        return float(error.detach()), float(divergence.detach())

    def _stream(self) -> Iterator[torch.Tensor]:
        """Yield batches of random crops; each is a function of the seed and the step."""
        schedule = self.config.schedule

        def draw(step: int) -> list[tuple[int, int]]:
            rng = np.random.default_rng([self.config.runtime.seed, step])
            rows = rng.integers(0, len(self.paths), schedule.batch_size)
            seeds = rng.integers(0, 2**63 - 1, schedule.batch_size)
            return list(zip(rows.tolist(), seeds.tolist(), strict=True))

        def crop(drawn: tuple[int, int]) -> torch.Tensor:
            index, seed = drawn
            image = to_tensor(load_image(self.paths[index]), self.config.image.size)
            rng = np.random.default_rng(seed)
            room = self.config.image.size - schedule.crop_size
            top, left = (int(v) for v in rng.integers(0, room + 1, 2))
            piece = image[:, top : top + schedule.crop_size, left : left + schedule.crop_size]
            return piece.flip(-1) if rng.random() < 0.5 else piece

        steps = (draw(step) for step in range(self.step, schedule.steps))
        for crops in load_ahead(crop, steps, workers=self.compute.num_workers):
            yield torch.stack(crops)

    def _save(self) -> None:
        self.file.save(
            {
                "step": self.step,
                "history": self.history,
                "sums": self.sums,
                "model": self.model.state_dict(),
                "adam": self.adam.state_dict(),
            }
        )

    def _restore(self) -> None:
        def take(payload: dict[str, Any]) -> None:
            self.model.load_state_dict(payload["model"])
            self.adam.load_state_dict(payload["adam"])
            self.step, self.history = payload["step"], payload["history"]
            self.sums = payload["sums"]

        if self.file.restore(take):
            self.compute.reporter.event("resumed", step=self.step)


@torch.inference_mode()
def _reconstruction_error(trainer: _CodecTrainer, paths: Sequence[Path]) -> tuple[float, float]:
    """Return mean absolute error and PSNR of reconstructions on the scale [0, 1]."""
    absolute, squared, count = 0.0, 0.0, 0
    symmetric = trainer.config.input_range == "symmetric"
    with trainer.compute.reporter.task("reconstructions", len(paths), unit="image") as task:
        for path in paths:
            image = to_tensor(load_image(path), trainer.config.image.size)[None].to(trainer.device)
            inputs = image * 2 - 1 if symmetric else image
            decoded = trainer.model.decode(trainer.model.encode(inputs).latent_dist.mode()).sample
            restored = ((decoded + 1) / 2 if symmetric else decoded).clamp(0, 1)
            absolute += float((restored - image).abs().sum())
            squared += float((restored - image).square().sum())
            count += image.numel()
            task.advance()
    return absolute / count, -10 * math.log10(max(squared / count, 1e-12))
