"""The two stages of LCMem: identity on latents, then copies in image space.

Method: arXiv 2512.14421.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.config import FinetuneConfig, Stage1Config, study_settings
from lcmem_cli.engine.data.augment import Augmentation
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.data.loading import hash_files
from lcmem_cli.engine.data.manifest import Manifest
from lcmem_cli.engine.data.paths import paths_outside
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import InputError, LcmemError
from lcmem_cli.engine.files import sha256_file, write_json
from lcmem_cli.engine.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lcmem_cli.engine.models.codec import Codec
from lcmem_cli.engine.models.codec_loading import load_codec, load_codec_of
from lcmem_cli.engine.models.hub import locate_checkpoint
from lcmem_cli.engine.models.siamese import (
    SiameseNetwork,
    check_input,
    mix_weights,
    resolve_backbone,
)
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Threshold, Unreadable, check_unreadable
from lcmem_cli.engine.store.latents import LatentStore
from lcmem_cli.engine.training import inputs
from lcmem_cli.engine.training.initialise import align_stem, copy_backbone, project_features
from lcmem_cli.engine.training.loop import EpochRecord, Pairs, Trainer, TrainingOutcome
from lcmem_cli.engine.training.run import open_training_folder, readable_part
from lcmem_cli.engine.training.sampling import PairSampler
from lcmem_cli.engine.training.sources import ImageSource, LatentSource, PairSource
from lcmem_cli.engine.training.teacher import (
    TEACHER_NAME,
    Member,
    Retention,
    Teacher,
    load_pretrained,
)
from lcmem_cli.engine.training.trackers import check_trackers, open_trackers

CHECKPOINT_NAME = "checkpoint.safetensors"
RESULT_NAME = "training.json"
_INSIDE = "inside"
_ALIGN_BATCH = 32
_MAX_ANCESTORS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult(Result):
    """A finished training.

    Attributes:
        checkpoint: file of the kept network.
        fingerprint: of that checkpoint.
        stage: which stage.
        num_train_identities: identities that pairs were drawn from.
        best_epoch: kept epoch, from 1.
        num_epochs: epochs trained.
        stopped_early: whether patience ran out.
        history: losses per epoch.
        test_auc: per data set and ``overall``: AUC of the TEST pairs with its 95 % interval.
        thresholds: fitted on VAL.
        unreadable: images left out.
    """

    checkpoint: str
    fingerprint: str
    stage: str
    num_train_identities: int
    best_epoch: int
    num_epochs: int
    stopped_early: bool
    history: tuple[EpochRecord, ...]
    test_auc: dict[str, dict[str, Any]]
    thresholds: tuple[Threshold, ...]
    unreadable: tuple[Unreadable, ...]


def train_stage1(
    config: Stage1Config,
    *,
    output: Path,
    store: LatentStore | None = None,
    manifest: Manifest | None = None,
    resume: bool = False,
    max_unreadable: int = 0,
    reporter: Reporter = SILENT,
) -> TrainingResult:
    """Train a Siamese network on stored latents, or on images where there is no codec.

    Args:
        config: resolved config.
        output: run folder.
        store: latents to train on; needed unless ``config.codec.name`` is ``none``.
        manifest: images; needed without a store, and to align a pretrained first convolution.
        resume: continue a run that stopped.
        max_unreadable: tolerated unreadable images of the manifest.
        reporter: receives progress.

    Raises:
        InputError: config and data do not fit.
        UnreadableLimitError: more unreadable images than tolerated.
        TrainingDivergedError: the loss became NaN.
    """
    compute = _start(config, reporter)
    inputs.check_stage1_inputs(
        config, has_latents=store is not None, has_images=manifest is not None
    )
    stage: _Stage
    if store is not None:
        # A teacher that is fitted again differs by rounding, and so would all that follows.
        known = output / TEACHER_NAME if resume else None
        stage = _latent_stage(config, store, manifest, known, compute)
    else:
        assert manifest is not None  # checked above
        stage = _pixel_stage(config, manifest, max_unreadable, compute)
    return _run(stage, output, resume=resume, compute=compute)


def finetune(
    config: FinetuneConfig,
    *,
    checkpoint: str | Path,
    manifest: Manifest,
    output: Path,
    codec: str | None = None,
    resume: bool = False,
    max_unreadable: int = 0,
    reporter: Reporter = SILENT,
) -> TrainingResult:
    """Fine-tune a stage-1 network in image space; the codec stays frozen.

    Args:
        config: resolved config.
        checkpoint: where the network and its codec come from, see ``locate_checkpoint``.
        manifest: images with splits.
        output: run folder.
        codec: folder or hub id of the codec where the checkpoint does not hold it.
        resume: continue a run that stopped.
        max_unreadable: tolerated unreadable images.
        reporter: receives progress.

    Raises:
        InputError: config, checkpoint and data do not fit.
        UnreadableLimitError: more unreadable images than tolerated.
        TrainingDivergedError: the loss became NaN.
    """
    compute = _start(config, reporter)
    device = resolve_device(compute.device)
    start_file = locate_checkpoint(checkpoint)
    start = load_checkpoint(start_file)
    encoder = load_codec_of(start, source=str(checkpoint), codec=codec, device=device)
    if inputs.is_other_list(start, manifest):
        compute.reporter.warn(inputs.OTHER_LIST.format(source=checkpoint))
    listed = manifest.digest
    manifest, unreadable = _readable(manifest, max_unreadable, compute)
    network = inputs.finetune_network(config, start, source=str(checkpoint))
    digest, retention = f"{manifest.digest}/{start.fingerprint}", None
    train = manifest.select("TRAIN")
    inputs.check_has_images(train.records, "TRAIN")
    if config.retention.weight:
        file = inputs.teacher_file(config, start_file)
        teacher = inputs.load_teacher(file, network).to(device)
        pooled = teacher.pool(train.paths(), compute)
        retention = teacher.retention(config.retention, pooled, train.records)
        digest = f"{digest}/{sha256_file(file)}"
    stage = _FinetuneStage(
        config=config,
        network=network.to(device),
        images=manifest,
        listed=listed,
        data_digest=digest,
        unreadable=unreadable,
        retention=retention,
        codec=encoder,
        image_size=config.image.size or start.image_size,
        start=start,
    )
    return _run(stage, output, resume=resume, compute=compute)


def _start(config: Stage1Config | FinetuneConfig, reporter: Reporter) -> Compute:
    compute = Compute.start(
        device=config.runtime.device, workers=config.runtime.num_workers, reporter=reporter
    )
    resolve_device(compute.device)  # what is refused is refused before anything is read
    check_trackers(config.runtime)
    return compute


def _readable(
    manifest: Manifest, max_unreadable: int, compute: Compute
) -> tuple[Manifest, tuple[Unreadable, ...]]:
    manifest, unreadable = readable_part(manifest, compute)
    check_unreadable(unreadable, max_unreadable)
    return manifest, unreadable


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stage(abc.ABC):
    """What is trained, and what sets one kind of training apart from the others.

    Attributes:
        config: resolved.
        network: to train, on its device.
        images: with splits; what the network is trained and judged on.
        listed: digest of the image list as it was given.
        data_digest: of what the network sees.
        initial: identifies the weights that it begins with; empty where ``data_digest`` does.
        unreadable: images left out.
        teacher: to save beside the checkpoint.
        retention: loss that holds the features of a teacher.
    """

    config: Stage1Config | FinetuneConfig
    network: SiameseNetwork
    images: LatentStore | Manifest
    listed: str
    data_digest: str
    initial: str = ""
    unreadable: tuple[Unreadable, ...]
    teacher: Teacher | None = None
    retention: Retention | None = None

    @abc.abstractmethod
    def source(self, rows: Sequence[int], compute: Compute) -> PairSource:
        """Return the source of pairs of some rows of the images."""

    @abc.abstractmethod
    def checkpoint(self, outcome: TrainingOutcome) -> Checkpoint:
        """Return the checkpoint of the kept network."""

    def provenance(self, outcome: TrainingOutcome) -> dict[str, Any]:
        """Return what the checkpoint tells of its training."""
        return {
            "config": study_settings(self.config),
            "data_digest": self.data_digest,
            "list_digest": self.listed,
            "best_epoch": outcome.best_epoch,
            "num_epochs": len(outcome.history),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LatentStage(_Stage):
    """Stage 1 on stored latents.

    Attributes:
        codec: what made them, where it is at hand.
    """

    images: LatentStore
    codec: Codec | None

    def source(self, rows: Sequence[int], compute: Compute) -> PairSource:
        return LatentSource(self.images, rows)

    def checkpoint(self, outcome: TrainingOutcome) -> Checkpoint:
        codec_config, codec_state = inputs.embeddable_codec(self.codec)
        spec, training = self.images.spec, self.provenance(outcome)
        if codec_state is not None:  # it needs no path of the machine that it was made on
            spec = dataclasses.replace(spec, name=_INSIDE)
            training["config"]["codec"]["name"] = _INSIDE
        return Checkpoint(
            stage="stage1",
            network=self.network.spec,
            network_state=outcome.state,
            codec=spec,
            codec_config=codec_config,
            codec_state=codec_state,
            image_size=self.images.image_size,
            training=training,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ImageStage(_Stage):
    """Stage 1 on the pixels of images, or the base of fine-tuning.

    Attributes:
        codec: frozen; encodes them on the fly, or hands on their pixels.
        image_size: side in pixels of what it sees.
    """

    images: Manifest
    codec: Codec
    image_size: int

    def source(self, rows: Sequence[int], compute: Compute) -> PairSource:
        paths = self.images.paths()
        return ImageSource(
            [paths[row] for row in rows],
            self.codec,
            image_size=self.image_size,
            augmentation=Augmentation.from_preset(self.config.augmentation.preset),
            working_size=self.config.augmentation.working_size,
            num_workers=compute.num_workers,
        )

    def checkpoint(self, outcome: TrainingOutcome) -> Checkpoint:
        return Checkpoint(
            stage="stage1",
            network=self.network.spec,
            network_state=outcome.state,
            codec=self.codec.spec,
            codec_config=None,
            codec_state=None,
            image_size=self.image_size,
            training=self.provenance(outcome),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FinetuneStage(_ImageStage):
    """Fine-tuning in image space.

    Attributes:
        start: the checkpoint that it starts from.
    """

    config: FinetuneConfig
    start: Checkpoint

    def checkpoint(self, outcome: TrainingOutcome) -> Checkpoint:
        share = self.config.regularisation.start_share
        return self.start.changed(
            stage="finetune",
            network=self.network.spec,
            network_state=mix_weights(outcome.state, self.start.network_state, share),
            image_size=self.image_size,
            training={
                **self.provenance(outcome),
                "started_from": {
                    "fingerprint": self.start.fingerprint,
                    "training": _history(self.start.training, _MAX_ANCESTORS),
                },
            },
        )


def _history(training: dict[str, Any], generations: int) -> dict[str, Any]:
    """Return how a checkpoint was trained, as far back as some generations of checkpoints."""
    before = training.get("started_from")
    if not isinstance(before, dict) or not isinstance(before.get("training"), dict):
        return training
    older = {} if generations < 2 else _history(before["training"], generations - 1)
    return {**training, "started_from": {**before, "training": older}}


def _pixel_stage(
    config: Stage1Config, manifest: Manifest, max_unreadable: int, compute: Compute
) -> _Stage:
    listed = manifest.digest
    manifest, unreadable = _readable(manifest, max_unreadable, compute)
    device = resolve_device(compute.device)
    codec = load_codec("none", device=device)
    network = inputs.stage1_network(config, codec.spec, config.image.size, None)
    check_input(network)
    if config.network.weights not in ("random", "timm"):
        copy_backbone(
            network, load_pretrained(config.network.backbone, Path(config.network.weights))
        )
    initial = _state_digest(network)
    return _ImageStage(
        config=config,
        network=network.to(device),
        images=manifest,
        listed=listed,
        data_digest=manifest.digest,
        initial=initial,
        unreadable=unreadable,
        codec=codec,
        image_size=config.image.size,
    )


def _latent_stage(
    config: Stage1Config,
    store: LatentStore,
    manifest: Manifest | None,
    known_teacher: Path | None,
    compute: Compute,
) -> _Stage:
    """Return stage 1 on latents.

    Args:
        config: resolved.
        store: the latents.
        manifest: their images; needed where a pretrained first convolution is fitted to latents.
        known_teacher: file of the teacher that the run which is continued has saved.
        compute: how images are read.
    """
    codec = inputs.check_store(config, store)
    config = inputs.with_codec(config, store)
    network = inputs.stage1_network(config, store.spec, store.image_size, store)
    check_input(network)
    pretrained, is_fitted = None, False
    if config.network.weights not in ("random", "timm"):
        pretrained = load_pretrained(config.network.backbone, Path(config.network.weights))
        is_fitted = copy_backbone(network, pretrained) and bool(config.network.align_stem)
    # What is fitted below rounds otherwise with other threads, so it does not name the run.
    initial = _state_digest(network)
    teacher, retention = None, None
    if pretrained is not None and is_fitted:
        assert manifest is not None  # see check_stage1_inputs
        files = map(Path, config.retention.panel.values())
        initial = "/".join([initial, *map(sha256_file, files)])
        teacher, pooled = _fit_teacher(
            config, pretrained, network, _Aligned(store, manifest), known_teacher, compute
        )
        train = [store.records[row] for row in store.select("TRAIN")]
        retention = teacher.retention(config.retention, pooled, train)
    return _LatentStage(
        config=config,
        network=network.to(resolve_device(compute.device)),
        images=store,
        listed=store.manifest_digest,
        data_digest=f"{store.manifest_digest}/{store.spec.weights_hash}/{store.image_size}",
        initial=initial,
        unreadable=store.unreadable,  # tolerated when it was made
        codec=codec,
        teacher=teacher,
        retention=retention,
    )


def _run(stage: _Stage, output: Path, *, resume: bool, compute: Compute) -> TrainingResult:
    """Train, save the kept network with its thresholds, and judge it on TEST."""
    config, ranks = stage.config, compute.ranks
    train, validation = (_pairs(stage, split, compute) for split in ("TRAIN", "VAL"))
    digest = "/".join(filter(None, (stage.data_digest, stage.initial)))
    with contextlib.ExitStack() as stack:
        run_digest = stack.enter_context(
            open_training_folder(output, config, digest, resume=resume, ranks=ranks)
        )
        log = stack.enter_context(
            open_trackers(config.runtime, output, config.model_dump(mode="json"), run_digest, ranks)
        )
        if stage.teacher is not None and ranks.is_main:
            stage.teacher.save(output / TEACHER_NAME)
        outcome = Trainer(
            stage.network,
            config,
            train=train,
            validation=validation,
            folder=output,
            run_digest=run_digest,
            retention=stage.retention,
            compute=compute,
        ).run(log)
        result = _conclude(stage, outcome, train.sampler.num_identities, output, compute)
        ranks.barrier()
        return result


def _pairs(stage: _Stage, split: str, compute: Compute) -> Pairs:
    rows = [row for row, record in enumerate(stage.images.records) if record.split == split]
    inputs.check_has_images(rows, split)
    sampler = PairSampler(
        [stage.images.records[row] for row in rows],
        stage.config.sampling,
        batch_size=stage.config.schedule.batch_size,
        seed=stage.config.runtime.seed,
    )
    return Pairs(source=stage.source(rows, compute), sampler=sampler)


def _conclude(
    stage: _Stage, outcome: TrainingOutcome, num_identities: int, output: Path, compute: Compute
) -> TrainingResult:
    """Fit thresholds on VAL, judge on TEST, and write the checkpoint, the result and its plots."""
    from lcmem_cli.engine.evaluation.judge import judge
    from lcmem_cli.engine.report.plots import plot_loss_curves, plot_roc

    checkpoint = stage.checkpoint(outcome).with_fingerprint()
    judged = judge(checkpoint, stage.images, compute)
    if judged.unreadable:  # they were all readable when the training began
        bad = judged.unreadable[0]
        raise LcmemError(
            f"{bad.path}: became unreadable during training ({bad.reason}), and "
            f"{len(judged.unreadable) - 1} more; restore the files and start the same command "
            "with --resume"
        )
    checkpoint = dataclasses.replace(checkpoint, thresholds=judged.thresholds)
    path = output / CHECKPOINT_NAME
    result = TrainingResult(
        checkpoint=str(path),
        fingerprint=checkpoint.fingerprint,
        stage=stage.config.kind,
        num_train_identities=num_identities,
        best_epoch=outcome.best_epoch,
        num_epochs=len(outcome.history),
        stopped_early=outcome.stopped_early,
        history=outcome.history,
        test_auc=judged.auc,
        thresholds=judged.thresholds,
        unreadable=stage.unreadable,
    )
    if compute.ranks.is_main:
        save_checkpoint(path, checkpoint)
        write_json(output / RESULT_NAME, result.to_dict())
        plot_loss_curves(
            [dataclasses.asdict(record) for record in outcome.history],
            output / "loss",
            best_epoch=outcome.best_epoch,
        )
        if judged.roc:
            plot_roc(judged.roc, output / "roc")
    return result


@dataclasses.dataclass(frozen=True)
class _Aligned:
    """Latents of TRAIN images beside the images themselves."""

    store: LatentStore
    manifest: Manifest

    def paths(self, compute: Compute) -> list[Path]:
        """Return the images, after comparing them with those that the latents were made from.

        Raises:
            InputError: there are none, they lie elsewhere, or they have changed.
        """
        rows = self.store.select("TRAIN")
        inputs.check_has_images(rows, "TRAIN")
        names = [self.store.records[row].path for row in rows]
        outside = paths_outside(names, self.manifest.basedir)
        if outside:
            raise InputError(
                f"{self.store.folder}: its images lie outside of {self.manifest.basedir}, the "
                f"first is {outside[0]!r}; pass the --basedir that the latents were made with"
            )
        paths = [self.manifest.basedir / name for name in names]
        contents, _ = hash_files(paths, compute)
        self.store.check_unchanged(dict(zip(names, contents, strict=True)))
        return paths

    def batches(self, num_images: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images ``[B, 3, H, W]`` and their latents of a seeded draw."""
        rows = torch.tensor(self.store.select("TRAIN"))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        chosen: list[int] = rows[order][:num_images].tolist()
        for start in range(0, len(chosen), _ALIGN_BATCH):
            part = chosen[start : start + _ALIGN_BATCH]
            files = [self.manifest.basedir / self.store.records[row].path for row in part]
            images = [to_tensor(load_image(file), self.store.image_size) for file in files]
            yield torch.stack(images), self.store.latents(part)


def _fit_teacher(
    config: Stage1Config,
    pretrained: torch.nn.Module,
    network: SiameseNetwork,
    aligned: _Aligned,
    known: Path | None,
    compute: Compute,
) -> tuple[Teacher, torch.Tensor]:
    """Fit a pretrained network's ends to latents; return its teacher and the TRAIN features."""
    seed, count = config.runtime.seed, config.network.align_stem
    paths = aligned.paths(compute)
    explained = align_stem(network, pretrained, aligned.batches(count, seed))
    device = resolve_device(compute.device)
    if known is not None and known.is_file():
        teacher = Teacher.load(known).to(device)
        pooled = teacher.pool(paths, compute)
    else:
        loaded = [(config.network.backbone, pretrained)]
        loaded += [(n, load_pretrained(n, Path(f))) for n, f in config.retention.panel.items()]
        members = [
            Member.of(
                resolve_backbone(name),
                model.to(device),
                config.network.inner_stride,
                config.network.inner_bands,
            )
            for name, model in loaded
        ]
        teacher, pooled = Teacher.fit(
            members,
            paths,
            num_features=config.network.num_features,
            seed=seed,
            altered=Augmentation.from_preset(config.network.align_altered),
            compute=compute,
        )
    project_features(network, teacher, (latents for _, latents in aligned.batches(count, seed)))
    compute.reporter.event("aligned", explained_variance=explained)
    return teacher, pooled


def _state_digest(network: SiameseNetwork) -> str:
    """Identify the initial weights, so that a run is only continued from the same."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(network.spec)).encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
