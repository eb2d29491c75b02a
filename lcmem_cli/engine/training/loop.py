"""The training loop that both stages share: epochs, validation, early stopping, resuming.

Every draw is a function of the seed, the epoch and the step, so the saved state holds tensors and
counters only, and a run that was killed and resumed on a CPU ends with the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import functools
import io
import math
from pathlib import Path
from typing import Any, Literal

import torch

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.config import (
    FinetuneConfig,
    OptimiserSection,
    RuntimeSection,
    Stage1Config,
)
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.files import write_text
from lcmem_cli.engine.models.siamese import SiameseNetwork
from lcmem_cli.engine.precision import CHANNELS_LAST, half_type, resolve_precision
from lcmem_cli.engine.training.batch_norm import synchronise_batch_norm
from lcmem_cli.engine.training.losses import TrainingLoss, pair_loss
from lcmem_cli.engine.training.run import HISTORY_NAME
from lcmem_cli.engine.training.sampling import PairBatch, PairSampler, check_batches
from lcmem_cli.engine.training.sources import PairSource
from lcmem_cli.engine.training.state import StateFile
from lcmem_cli.engine.training.step import (
    StepPlan,
    embed_batch_for_loss,
    forward_backward,
    rank_slice,
)
from lcmem_cli.engine.training.teacher import Retention
from lcmem_cli.engine.training.trackers import Log

_REMEDY = "a smaller optimiser.learning_rate, or optimiser.clip_norm = 1.0,"
_NUM_SUMS = len(TrainingLoss._fields) + 1  # each part of the loss, and the pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """Mean losses of one epoch; the loss is ``alpha * bce + (1 - alpha) * ntxent + retention``.

    Epochs count from 1. Validation has no retention.
    """

    epoch: int
    train_loss: float
    train_bce: float
    train_ntxent: float
    train_retention: float
    val_loss: float
    val_bce: float
    val_ntxent: float
    learning_rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """What a training ends with.

    Attributes:
        state: weights of the kept epoch, see ``schedule.keep``.
        history: one record an epoch.
        best_epoch: number of the kept epoch, from 1.
        stopped_early: whether patience ran out.
    """

    state: dict[str, torch.Tensor]
    history: tuple[EpochRecord, ...]
    best_epoch: int
    stopped_early: bool


@dataclasses.dataclass
class _State:
    """Everything that changes while training and is saved.

    Attributes:
        epoch: finished epochs.
        step: finished steps of the epoch under way.
        sums: losses of these steps times their pairs, and the pairs.
        history: one record an epoch.
        best_epoch: number of the kept epoch, from 1; 0: none.
        best_loss: its VAL loss.
        planned: epochs that the learning rate was laid out for; 0: not begun.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = dataclasses.field(default_factory=lambda: [0.0] * _NUM_SUMS)
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best_epoch: int = 0
    best_loss: float = math.inf
    planned: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of one split: which are drawn, and where their latents come from."""

    source: PairSource
    sampler: PairSampler


class Trainer:
    """Trains a Siamese network in a run folder.

    Args:
        network: on the training device; changed in place.
        config: resolved.
        train: training pairs.
        validation: validation pairs.
        folder: run folder; holds the state and ``history.csv``.
        run_digest: see ``StateFile``.
        retention: holds features near a teacher's, if wanted.
        compute: how it is done.
    """

    def __init__(
        self,
        network: SiameseNetwork,
        config: Stage1Config | FinetuneConfig,
        *,
        train: Pairs,
        validation: Pairs,
        folder: Path,
        run_digest: str,
        retention: Retention | None = None,
        compute: Compute = DEFAULT_COMPUTE,
    ) -> None:
        self.network, self.folder = network, folder
        self.device = next(network.parameters()).device
        if self.device.type in CHANNELS_LAST:
            network.to(memory_format=torch.channels_last)
        self.train, self.validation = train, validation
        self.val_batches = validation.sampler.validation()
        self.loss, self.optimiser, self.schedule = config.loss, config.optimiser, config.schedule
        self.retention = retention.to(self.device) if retention else None
        self.ranks, self.reporter = compute.ranks, compute.reporter
        self.file = StateFile(folder, run_digest, self.device)
        self.state = _State()
        self.synchronised = (
            self.ranks.size > 1
            and not self.optimiser.freeze_statistics
            and synchronise_batch_norm(network)
        )
        self.adam = _build_adam(network, self.optimiser)
        self.base_rates = [group["lr"] for group in self.adam.param_groups]
        self.ema: SiameseNetwork | None = None
        if self.optimiser.ema_decay:
            self.ema = copy.deepcopy(network).requires_grad_(False)
        self.best: dict[str, torch.Tensor] = {}
        precision = training_precision(config.runtime, self.device)
        self.autocast_dtype = None if precision == "no" else half_type(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        if config.runtime.compile:
            network.backbone.compile()
        batches = train.sampler.epoch(0)
        check_batches(batches, self.val_batches)
        self.steps_per_epoch = len(batches)

    def run(self, log: Log | None = None) -> TrainingOutcome:
        """Train to the end, continuing from a saved state if there is one.

        Args:
            log: takes each epoch's record, if wanted.

        Raises:
            TrainingDivergedError: the loss became NaN or infinite.
            InputError: the saved state is of another run.
        """
        self._restore()
        self.state.planned = self.schedule.epochs
        while not self._is_over():
            self._train_epoch()
            self._finish_epoch()
            if log is not None:
                log(self.state.history[-1])
            self._save()
        rows: list[dict[str, Any]] = [{**r, "epoch": int(r["epoch"])} for r in self.state.history]
        return TrainingOutcome(
            state=self.best,
            history=tuple(EpochRecord(**row) for row in rows),
            best_epoch=self.state.best_epoch,
            stopped_early=self.state.epoch < self.schedule.epochs,
        )

    def _train_epoch(self) -> None:
        state = self.state
        batches = self.train.sampler.epoch(state.epoch)
        remaining = batches[state.step :]
        parts = [rank_slice(len(batch), self.ranks) for batch in remaining]
        self.network.train()
        freeze_statistics(self.network, trained=self.optimiser.freeze_statistics)
        description = f"epoch {state.epoch + 1}/{self.schedule.epochs}"
        with self.reporter.task(description, len(batches), unit="step") as task:
            task.advance(state.step)
            stream = self.train.source.stream(remaining, parts)
            for batch, (first, second) in zip(remaining, stream, strict=True):
                loss = self._step(batch, first, second)
                values = [float(part) for part in loss]
                for index, value in enumerate(values):
                    state.sums[index] += value * len(batch)
                state.sums[-1] += len(batch)
                state.step += 1
                shown: dict[str, Any] = dict(zip(("loss", "bce", "ntxent"), values, strict=False))
                if self.retention is not None:
                    shown["retention"] = values[3]
                task.advance(**shown)
                if self.file.is_due:
                    self._save()

    def _step(self, batch: PairBatch, first: torch.Tensor, second: torch.Tensor) -> TrainingLoss:
        number = self.state.epoch * self.steps_per_epoch + self.state.step
        factor = learning_rate_factor(
            number, self.steps_per_epoch * self.schedule.epochs, self.optimiser
        )
        for group, rate in zip(self.adam.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        self.adam.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.scale(torch.zeros(1, device=self.device))  # creates its scale tensor
        loss = forward_backward(
            self.network,
            functools.partial(self._loss_of, batch=batch),
            first.to(self.device, non_blocking=True),
            second.to(self.device, non_blocking=True),
            self._plan(batch),
        )
        where = f"at epoch {self.state.epoch + 1}, step {self.state.step + 1}"
        if not math.isfinite(float(loss.total)):
            raise self.file.diverged(f"the loss became {float(loss.total)} {where}", _REMEDY)
        self.scaler.unscale_(self.adam)  # does nothing when disabled
        norm = torch.nn.utils.clip_grad_norm_(
            self.network.parameters(), self.optimiser.clip_norm or math.inf
        )
        # With gradient scaling an overflow is normal, and the scaler leaves the step out.
        if not self.scaler.is_enabled() and not math.isfinite(float(norm)):
            raise self.file.diverged(f"the gradient became {float(norm)} {where}", _REMEDY)
        self.scaler.step(self.adam)
        self.scaler.update()
        if self.ema is not None:
            update_average(self.ema, self.network, self.optimiser.ema_decay, number)
        return loss

    def _plan(self, batch: PairBatch) -> StepPlan:
        return StepPlan(
            num_pairs=len(batch),
            ranks=self.ranks,
            synchronised=self.synchronised,
            parts=self.schedule.accumulate,
            step_seed=batch.step_seed,
            autocast=self._autocast,
            scale=self.scaler.get_scale(),
        )

    def _finish_epoch(self) -> None:
        state = self.state
        train = [value / state.sums[-1] for value in state.sums[:-1]]
        kept = self.ema or self.network
        val = self._validate(kept)
        if not math.isfinite(val[0]):
            raise self.file.diverged(
                f"the VAL loss became {val[0]} after epoch {state.epoch + 1}", _REMEDY
            )
        state.history.append(
            {
                "epoch": state.epoch + 1,
                "train_loss": train[0],
                "train_bce": train[1],
                "train_ntxent": train[2],
                "train_retention": train[3],
                "val_loss": val[0],
                "val_bce": val[1],
                "val_ntxent": val[2],
                "learning_rate": self.adam.param_groups[0]["lr"],
            }
        )
        if val[0] < state.best_loss or self.schedule.keep == "last":
            state.best_loss, state.best_epoch = val[0], state.epoch + 1
            self.best = {k: v.detach().cpu().clone() for k, v in kept.state_dict().items()}
        self.reporter.event(
            "epoch",
            number=state.epoch + 1,
            train=train[0],
            bce=train[1],
            ntxent=train[2],
            val=val[0],
            best=state.best_epoch,
        )
        state.epoch, state.step, state.sums = state.epoch + 1, 0, [0.0] * _NUM_SUMS
        if self.ranks.is_main:
            self._write_history()

    @torch.no_grad()
    def _validate(self, network: SiameseNetwork) -> list[float]:
        network.eval()
        parts = [rank_slice(len(batch), self.ranks) for batch in self.val_batches]
        sums, count = [0.0, 0.0, 0.0], 0
        stream = self.validation.source.stream(self.val_batches, parts)
        for batch, (first, second) in zip(self.val_batches, stream, strict=True):
            features = embed_batch_for_loss(
                network, first.to(self.device), second.to(self.device), self._plan(batch)
            )
            loss = self._loss_of(*features, network.head)
            for index, part in enumerate(loss[:3]):
                sums[index] += float(part) * len(batch)
            count += len(batch)
        return [value / count for value in sums]

    def _loss_of(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        head: torch.nn.Linear,
        *,
        batch: PairBatch | None = None,
    ) -> TrainingLoss:
        """Return the loss of features; only a training batch, given with its rows, is retained."""
        pair = pair_loss(
            a,
            b,
            head,
            alpha=self.loss.alpha,
            temperature=self.loss.temperature,
            negatives=self.loss.negatives,
        )
        if self.retention is None or batch is None:
            return TrainingLoss(*pair, retention=pair.total.new_zeros(()))
        retained = self.retention(a, b, batch.first, batch.second)
        return TrainingLoss(pair.total + retained, pair.bce, pair.ntxent, retained)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _is_over(self) -> bool:
        return self.state.epoch >= self.schedule.epochs or self._patience_is_out()

    def _patience_is_out(self) -> bool:
        waited = self.state.epoch - self.state.best_epoch
        return bool(self.schedule.patience) and waited >= self.schedule.patience

    def _save(self) -> None:
        if not self.ranks.is_main:
            return
        self.file.save(
            {
                "progress": dataclasses.asdict(self.state),
                "network": self.network.state_dict(),
                "adam": self.adam.state_dict(),
                "ema": None if self.ema is None else self.ema.state_dict(),
                "scaler": self.scaler.state_dict(),
                "best": self.best,
            }
        )

    def _restore(self) -> None:
        # Every draw is a function of seed, epoch and step, so no generator's state is saved.
        def take(payload: dict[str, Any]) -> None:
            self.state = _State(**payload["progress"])
            self.network.load_state_dict(payload["network"])
            self.adam.load_state_dict(payload["adam"])
            if self.ema is not None:
                self.ema.load_state_dict(payload["ema"])
            self.scaler.load_state_dict(payload["scaler"])
            self.best = {k: v.cpu() for k, v in payload["best"].items()}

        if not self.file.restore(take):
            return
        state, asked = self.state, self.schedule.epochs
        if self._is_over():
            self.reporter.event("already trained", epochs=state.epoch)
            if state.epoch < asked:
                self.reporter.warn(
                    f"epoch {state.best_epoch} is the best of {state.epoch}, so schedule.patience "
                    f"= {self.schedule.patience} has ended the training; raise it too for more"
                )
            return
        self.reporter.event("resumed", epoch=state.epoch + 1, step=state.step)
        if state.planned != asked and self.optimiser.eta_min_ratio != 1:
            self.reporter.warn(
                f"the learning rate falls over {asked} epochs from here, and fell over "
                f"{state.planned} until now: the result is not that of {asked} from the start"
            )

    def _write_history(self) -> None:
        fields = [field.name for field in dataclasses.fields(EpochRecord)]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.state.history)
        write_text(self.folder / HISTORY_NAME, buffer.getvalue())


def freeze_statistics(network: torch.nn.Module, *, trained: bool) -> None:
    """Make batch normalisation use its running statistics and leave them as they are.

    Args:
        network: in training mode.
        trained: of all layers, not only of those whose weights are frozen.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            frozen = not any(parameter.requires_grad for parameter in module.parameters())
            if trained or (frozen and module.affine):
                module.eval()


def learning_rate_factor(step: int, total_steps: int, optimiser: OptimiserSection) -> float:
    """Return the factor of the learning rate at a step: linear warm-up, then a cosine.

    Args:
        step: from 0.
        total_steps: of the whole training.
        optimiser: ``warmup_steps`` and ``eta_min_ratio`` (1 keeps the rate constant).
    """
    if step < optimiser.warmup_steps:
        return (step + 1) / optimiser.warmup_steps
    span = max(1, total_steps - optimiser.warmup_steps)
    progress = min(1.0, (step - optimiser.warmup_steps) / span)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return optimiser.eta_min_ratio + (1 - optimiser.eta_min_ratio) * cosine


@torch.no_grad()
def update_average(
    average: SiameseNetwork, network: SiameseNetwork, decay: float, step: int
) -> None:
    """Move the averaged weights towards the current ones; early steps count more."""
    rate = 1 - min(decay, (1 + step) / (10 + step))
    current = network.state_dict()
    for key, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(current[key], rate)
        else:
            value.copy_(current[key])


def _build_adam(network: SiameseNetwork, section: OptimiserSection) -> torch.optim.Optimizer:
    """Return AdamW with one rate for head and projection, another for the backbone below them."""
    backbone: Any = network.backbone
    classifier = backbone.get_classifier()
    new = {id(p) for p in network.head.parameters()} | {id(p) for p in classifier.parameters()}
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in new], "lr": section.learning_rate},
        {
            "params": [p for p in parameters if id(p) not in new],
            "lr": section.learning_rate * section.backbone_scale,
        },
    ]
    return torch.optim.AdamW(groups, weight_decay=section.weight_decay)


def training_precision(
    runtime: RuntimeSection, device: torch.device
) -> Literal["no", "bf16", "fp16"]:
    """Return ``no``, ``fp16`` or ``bf16`` for a device.

    Raises:
        InputError: the device does not compute in what the config asks for.
    """
    if runtime.mixed_precision != "auto":
        if device.type == "cpu" and runtime.mixed_precision != "no":
            raise InputError(
                f'runtime.mixed_precision = "{runtime.mixed_precision}": a CPU computes in '
                'float32 here (bfloat16 is far slower without the instructions); use "no"'
            )
        return runtime.mixed_precision
    found = resolve_precision("auto", device)
    return "no" if found == "fp32" else found
