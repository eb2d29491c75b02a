"""The two stages of LCMem: identity on latents, then copies in image space.

Method: arXiv 2512.14421.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.config import (
    FinetuneConfig,
    RetentionSection,
    Stage1Config,
    study_settings,
)
from lcmem_cli.engine.data.augment import Augmentation
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.data.loading import hash_files
from lcmem_cli.engine.data.manifest import Manifest, Record
from lcmem_cli.engine.data.paths import paths_outside
from lcmem_cli.engine.distributed import Ranks, current_ranks, resolve_device, resolve_workers
from lcmem_cli.engine.errors import InputError, LcmemError
from lcmem_cli.engine.files import sha256_file, write_json
from lcmem_cli.engine.models.checkpoint import (
    MAX_EMBEDDED_CODEC_BYTES,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from lcmem_cli.engine.models.codec import Codec, CodecSpec
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.hub import locate_checkpoint
from lcmem_cli.engine.models.siamese import (
    NetworkSpec,
    SiameseNetwork,
    check_input,
    freeze_modules,
    load_strictly,
    mix_weights,
    resolve_backbone,
    use_checkpointing,
)
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Threshold, Unreadable, check_unreadable
from lcmem_cli.engine.store.latents import LatentStore
from lcmem_cli.engine.training.initialise import align_stem, copy_backbone, project_features
from lcmem_cli.engine.training.loop import EpochRecord, Trainer, TrainingOutcome
from lcmem_cli.engine.training.run import (
    open_training_folder,
    readable_part,
)
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
_ALIGN_BATCH = 32
_MAX_ANCESTORS = 8
OTHER_LIST = (
    "{source}: was not trained on this filelist, so images of its VAL or TEST may have been in "
    "TRAIN then"
)


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
    device = resolve_device(config.runtime.device)
    ranks = current_ranks(config.runtime.device)
    reporter = reporter if ranks.is_main else SILENT
    check_trackers(config.runtime)
    check_stage1_inputs(config, has_latents=store is not None, has_images=manifest is not None)
    unreadable: tuple[Unreadable, ...] = ()
    listed = store.manifest_digest if store is not None else ""
    if store is None:
        assert manifest is not None
        listed = manifest.digest
        manifest, unreadable = readable_part(manifest, config.runtime.num_workers, reporter)
        check_unreadable(unreadable, max_unreadable)
        codec = load_codec("none", device=device)
        spec, size, digest = codec.spec, config.image.size, manifest.digest
        records: Sequence[Record] = manifest.records
        evaluate_on: LatentStore | Manifest = manifest
    else:
        spec, size, digest, codec = store.spec, store.image_size, store.manifest_digest, None
        records, unreadable = store.records, store.unreadable  # tolerated when it was made
        evaluate_on = store
        check_store(config, store)
        if config.codec.name not in ("embedded", store.spec.name):
            reporter.event(
                "codec.name has no effect with --latents",
                given=config.codec.name,
                made_by=store.spec.name,
            )
        digest = f"{digest}/{spec.weights_hash}/{size}"

    network = stage1_network(config, spec, size, store)
    check_input(network)
    pretrained, is_fitted = None, False
    if config.network.weights not in ("random", "timm"):
        pretrained = load_pretrained(config.network.backbone, Path(config.network.weights))
        other_input = copy_backbone(network, pretrained)
        is_fitted = bool(config.network.align_stem) and other_input
    # What is fitted below rounds otherwise with other threads, so it does not name the run.
    initial = _state_digest(network)
    teacher, retention = None, None
    if pretrained is not None and is_fitted:
        assert store is not None and manifest is not None
        files = map(Path, config.retention.panel.values())
        initial = "/".join([initial, *map(sha256_file, files)])
        teacher, pooled = _fit_teacher(
            config, pretrained, network, store, manifest,
            known=output / TEACHER_NAME if resume else None, ranks=ranks, reporter=reporter,
        )  # fmt: skip
        retention = _retention(
            config.retention, teacher, pooled, [records[row] for row in store.select("TRAIN")]
        )

    def source(rows: list[int]) -> PairSource:
        if store is not None:
            return LatentSource(store, rows)
        assert manifest is not None and codec is not None
        return _image_source(config, manifest, rows, codec, size, ranks)

    def finish(outcome: TrainingOutcome) -> Checkpoint:
        codec_config, codec_state = embeddable_codec(store)
        # A codec that is inside needs no path of the machine that it was made on.
        inside = spec if codec_state is None else dataclasses.replace(spec, name="inside")
        return Checkpoint(
            stage="stage1",
            network=network.spec,
            network_state=outcome.state,
            codec=inside,
            codec_config=codec_config,
            codec_state=codec_state,
            image_size=size,
            training=_provenance(config, digest, listed, outcome),
        )

    stage = _Stage(
        name="stage1",
        config=config,
        network=network.to(device),
        records=records,
        source=source,
        finish=finish,
        evaluate_on=evaluate_on,
        digest=f"{digest}/{initial}",
        unreadable=unreadable,
        teacher=teacher,
        retention=retention,
    )
    return _run(stage, output=output, resume=resume, ranks=ranks, reporter=reporter)


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
    from lcmem_cli.engine.models.codec_loading import load_codec_of

    device = resolve_device(config.runtime.device)
    ranks = current_ranks(config.runtime.device)
    reporter = reporter if ranks.is_main else SILENT
    check_trackers(config.runtime)
    start_file = locate_checkpoint(checkpoint)
    start = load_checkpoint(start_file)
    encoder = load_codec_of(start, source=str(checkpoint), codec=codec, device=device)
    if is_other_list(start, manifest):
        reporter.warn(OTHER_LIST.format(source=checkpoint))
    listed = manifest.digest
    manifest, unreadable = readable_part(manifest, config.runtime.num_workers, reporter)
    check_unreadable(unreadable, max_unreadable)
    size = config.image.size or start.image_size
    network = finetune_network(config, start, source=str(checkpoint))
    digest, retention = f"{manifest.digest}/{start.fingerprint}", None
    train = manifest.select("TRAIN")
    check_has_images(train.records, "TRAIN")
    if config.retention.weight:
        file = teacher_file(config, start_file)
        teacher = load_teacher(file, network).to(device)
        workers = resolve_workers(config.runtime.num_workers, ranks.local_size)
        pooled = teacher.pool(train.paths(), workers=workers, ranks=ranks, reporter=reporter)
        retention = _retention(config.retention, teacher, pooled, train.records)
        digest = f"{digest}/{sha256_file(file)}"

    def source(rows: list[int]) -> PairSource:
        return _image_source(config, manifest, rows, encoder, size, ranks)

    def finish(outcome: TrainingOutcome) -> Checkpoint:
        return start.changed(
            stage="finetune",
            network=network.spec,
            network_state=mix_weights(
                outcome.state, start.network_state, config.regularisation.start_share
            ),
            image_size=size,
            training={
                **_provenance(config, digest, listed, outcome),
                "started_from": {
                    "fingerprint": start.fingerprint,
                    "training": _history(start.training, _MAX_ANCESTORS),
                },
            },
        )

    stage = _Stage(
        name="finetune",
        config=config,
        network=network.to(device),
        records=manifest.records,
        source=source,
        finish=finish,
        evaluate_on=manifest,
        digest=digest,
        unreadable=unreadable,
        retention=retention,
    )
    return _run(stage, output=output, resume=resume, ranks=ranks, reporter=reporter)


def _history(training: dict[str, Any], generations: int) -> dict[str, Any]:
    """Return how a checkpoint was trained, as far back as some generations of checkpoints."""
    before = training.get("started_from")
    if not isinstance(before, dict) or not isinstance(before.get("training"), dict):
        return training
    older = {} if generations < 2 else _history(before["training"], generations - 1)
    return {**training, "started_from": {**before, "training": older}}


def check_stage1_inputs(config: Stage1Config, *, has_latents: bool, has_images: bool) -> None:
    """Check that stage 1 is given what its config trains on.

    Raises:
        InputError: latents or images are missing, or are given in vain.
    """
    pixels = config.codec.name == "none"
    if pixels and has_latents:
        raise InputError('codec.name = "none" trains on images: pass --filelist, not --latents')
    if not pixels and not has_latents:
        raise InputError(
            "stage 1 trains on latents: make them with lcmem latents and pass --latents, or use a "
            'config with codec.name = "none" (the baselines)'
        )
    if pixels and not has_images:
        raise InputError("training on images needs --filelist")
    from_file = config.network.weights not in ("random", "timm")
    if from_file and config.network.align_stem and not pixels and not has_images:
        raise InputError(
            "network.align_stem fits the first convolution to images beside their latents: "
            "pass --filelist (and --basedir) too"
        )


def stage1_network(
    config: Stage1Config, codec: CodecSpec, size: int, store: LatentStore | None
) -> SiameseNetwork:
    """Build the network of a stage-1 config with seeded weights.

    Args:
        config: resolved config.
        codec: of the latents.
        size: side in pixels of the images that they were made of.
        store: for the statistics of its latents.

    Raises:
        InputError: the backbone cannot be built so, or cannot do what ``config.runtime`` and
            ``config.optimiser.frozen`` ask for.
    """
    torch.manual_seed(config.runtime.seed)
    whole = store is not None and config.network.normalisation == "dataset"
    spec = NetworkSpec(
        backbone=resolve_backbone(config.network.backbone),
        in_channels=codec.latent_channels,
        num_features=config.network.num_features,
        input_size=size // codec.downsampling,
        normalisation=config.network.normalisation,
        stem_stride=config.network.stem_stride,
        inner_stride=config.network.inner_stride,
        inner_bands=config.network.inner_bands,
        feature_rms=config.network.feature_rms,
        mean=store.mean if store and whole else None,
        std=store.std if store and whole else None,
    )
    network = SiameseNetwork(
        spec,
        drop_path_rate=config.network.drop_path_rate,
        pretrained=config.network.weights == "timm",
    )
    if config.runtime.checkpointing:
        use_checkpointing(network)
    freeze_modules(network, config.optimiser.frozen)
    return network


def finetune_network(config: FinetuneConfig, start: Checkpoint, *, source: str) -> SiameseNetwork:
    """Build a checkpoint's network at the config's image size.

    Raises:
        CheckpointError: its weights do not fit another size.
        InputError: it cannot do what ``config.runtime`` and ``config.optimiser.frozen`` ask for.
    """
    size = config.image.size or start.image_size
    spec = start.at_size(size).network
    network = SiameseNetwork(spec, drop_path_rate=config.regularisation.drop_path_rate)
    load_strictly(network, start.build().state_dict(), source=f"{source} at {size} px")
    if config.runtime.checkpointing:
        use_checkpointing(network)
    freeze_modules(network, config.optimiser.frozen)
    return network


def teacher_file(config: FinetuneConfig, checkpoint: Path) -> Path:
    """Return the file of the teacher that holds the features."""
    return Path(config.retention.teacher or checkpoint.parent / TEACHER_NAME)


def load_teacher(file: Path, network: SiameseNetwork) -> Teacher:
    """Load the teacher that holds a network's features.

    Raises:
        InputError: no such file, or its targets have another width than the network's features.
        CheckpointError: not a teacher's file.
    """
    teacher = Teacher.load(file)
    width, wanted = teacher.projection.shape[0], network.spec.num_features
    if width != wanted:
        raise InputError(
            f"{file}: a teacher of networks with {width} features, not {wanted}; name the one that "
            "stage 1 wrote with --set retention.teacher=FILE"
        )
    return teacher


def is_other_list(start: Checkpoint, manifest: Manifest) -> bool:
    """Return whether a checkpoint was trained on another image list, as far as it says."""
    known = start.training.get("list_digest") or start.training.get("data_digest", "")
    return str(known).partition("/")[0] != manifest.digest


def check_has_images(images: Sequence[Record] | Sequence[int], split: str) -> None:
    """Refuse a list without an image of a split that training needs.

    Raises:
        InputError: there is none.
    """
    if not len(images):
        use = "train on" if split == "TRAIN" else "choose the best epoch and the thresholds by"
        raise InputError(
            f"no image has the split {split}, so there is nothing to {use}; set the column Split "
            "of more ids"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stage:
    """What is trained, and what sets one stage apart from the other.

    Attributes:
        name: of the stage.
        config: resolved.
        network: to train, on its device.
        records: images with splits.
        source: makes the source of pairs of some rows of ``records``.
        finish: makes the checkpoint of the kept network.
        evaluate_on: what the checkpoint is judged on.
        digest: of all that the training starts from; another one is another run.
        unreadable: images left out.
        teacher: to save beside the checkpoint.
        retention: loss that holds the features of a teacher.
    """

    name: Literal["stage1", "finetune"]
    config: Stage1Config | FinetuneConfig
    network: SiameseNetwork
    records: Sequence[Record]
    source: Callable[[list[int]], PairSource]
    finish: Callable[[TrainingOutcome], Checkpoint]
    evaluate_on: LatentStore | Manifest
    digest: str
    unreadable: tuple[Unreadable, ...]
    teacher: Teacher | None = None
    retention: Retention | None = None


def _run(
    stage: _Stage, *, output: Path, resume: bool, ranks: Ranks, reporter: Reporter
) -> TrainingResult:
    """Train, save the kept network with its thresholds, and judge it on TEST."""
    from lcmem_cli.engine.evaluation.judge import judge
    from lcmem_cli.engine.report.plots import plot_loss_curves, plot_roc

    config = stage.config

    def part(split: str) -> tuple[PairSource, PairSampler]:
        rows = [row for row, record in enumerate(stage.records) if record.split == split]
        check_has_images(rows, split)
        sampler = PairSampler(
            [stage.records[row] for row in rows],
            config.sampling,
            batch_size=config.schedule.batch_size,
            seed=config.runtime.seed,
        )
        return stage.source(rows), sampler

    train, validation = part("TRAIN"), part("VAL")
    with contextlib.ExitStack() as stack:
        run_digest = stack.enter_context(
            open_training_folder(output, config, stage.digest, resume=resume, ranks=ranks)
        )
        log = stack.enter_context(
            open_trackers(config.runtime, output, config.model_dump(mode="json"), run_digest, ranks)
        )
        if stage.teacher is not None and ranks.is_main:
            stage.teacher.save(output / TEACHER_NAME)
        outcome = Trainer(
            stage.network,
            train=train,
            validation=validation,
            loss=config.loss,
            optimiser=config.optimiser,
            schedule=config.schedule,
            runtime=config.runtime,
            folder=output,
            run_digest=run_digest,
            retention=stage.retention,
            log=log,
            ranks=ranks,
            reporter=reporter,
        ).run()
        checkpoint = stage.finish(outcome).with_fingerprint()
        compute = Compute(
            device=config.runtime.device, workers=config.runtime.num_workers, ranks=ranks,
            reporter=reporter,
        )  # fmt: skip
        judged = judge(checkpoint, stage.evaluate_on, compute)
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
            stage=stage.name,
            num_train_identities=train[1].num_identities,
            best_epoch=outcome.best_epoch + 1,
            num_epochs=len(outcome.history),
            stopped_early=outcome.stopped_early,
            history=outcome.history,
            test_auc=judged.auc,
            thresholds=judged.thresholds,
            unreadable=stage.unreadable,
        )
        if ranks.is_main:
            save_checkpoint(path, checkpoint)
            write_json(output / RESULT_NAME, result.to_dict())
            plot_loss_curves(
                [dataclasses.asdict(record) for record in outcome.history], output / "loss"
            )
            if judged.roc:
                plot_roc(judged.roc, output / "roc")
        ranks.barrier()
        return result


def check_store(config: Stage1Config, store: LatentStore) -> None:
    """Refuse latents that were made otherwise than the config says."""
    problems = []
    if config.codec.input_range != store.spec.input_range:
        problems.append(
            f"codec.input_range is {config.codec.input_range}, the latents were made with "
            f"{store.spec.input_range}"
        )
    if config.image.size != store.image_size:
        problems.append(
            f"image.size is {config.image.size}, the latents were made at {store.image_size}"
        )
    if problems:
        raise InputError(f"{store.folder}: {'; '.join(problems)}")


def _image_source(
    config: Stage1Config | FinetuneConfig,
    manifest: Manifest,
    rows: list[int],
    codec: Codec,
    size: int,
    ranks: Ranks,
) -> ImageSource:
    paths = manifest.paths()
    return ImageSource(
        [paths[row] for row in rows],
        codec,
        image_size=size,
        augmentation=Augmentation.from_preset(config.augmentation.preset),
        working_size=config.augmentation.working_size,
        num_workers=resolve_workers(config.runtime.num_workers, ranks.local_size),
    )


def _fit_teacher(
    config: Stage1Config,
    pretrained: torch.nn.Module,
    network: SiameseNetwork,
    store: LatentStore,
    manifest: Manifest,
    *,
    known: Path | None,
    ranks: Ranks,
    reporter: Reporter,
) -> tuple[Teacher, torch.Tensor]:
    """Fit a pretrained network's ends to latents; return its teacher and the TRAIN features."""
    rows = store.select("TRAIN")
    check_has_images(rows, "TRAIN")
    names = [store.records[row].path for row in rows]
    outside = paths_outside(names, manifest.basedir)
    if outside:
        raise InputError(
            f"{store.folder}: its images lie outside of {manifest.basedir}, the first is "
            f"{outside[0]!r}; pass the --basedir that the latents were made with"
        )
    seed, count = config.runtime.seed, config.network.align_stem
    compute = Compute(workers=config.runtime.num_workers, ranks=ranks)
    workers = compute.num_workers
    paths = [manifest.basedir / name for name in names]
    store.check_unchanged(dict(zip(names, hash_files(paths, compute)[0], strict=True)))
    explained = align_stem(network, pretrained, _aligned_batches(store, manifest, count, seed))
    device = resolve_device(config.runtime.device)
    if known is not None and known.is_file():
        teacher = Teacher.load(known).to(device)
        pooled = teacher.pool(paths, workers=workers, ranks=ranks, reporter=reporter)
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
            members, paths, num_features=config.network.num_features, seed=seed,
            altered=Augmentation.from_preset(config.network.align_altered), workers=workers,
            ranks=ranks, reporter=reporter,
        )  # fmt: skip
    batches = _aligned_batches(store, manifest, count, seed)
    project_features(network, teacher, (latents for _, latents in batches))
    reporter.event("aligned", explained_variance=explained)
    return teacher, pooled


def _retention(
    section: RetentionSection, teacher: Teacher, pooled: torch.Tensor, records: Sequence[Record]
) -> Retention | None:
    if not section.weight:
        return None
    return Retention(
        teacher.targets(pooled, records),
        records,
        weight=section.weight,
        instance_weight=section.instance_weight,
        temperature=section.temperature,
    )


def _aligned_batches(
    store: LatentStore, manifest: Manifest, num_images: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = torch.tensor(store.select("TRAIN"))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    chosen: list[int] = rows[order][:num_images].tolist()
    for start in range(0, len(chosen), _ALIGN_BATCH):
        part = chosen[start : start + _ALIGN_BATCH]
        images = [
            to_tensor(load_image(manifest.basedir / store.records[row].path), store.image_size)
            for row in part
        ]
        yield torch.stack(images), store.latents(part)


def embeddable_codec(
    store: LatentStore | None,
) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor] | None]:
    """Return config and encoder weights of the store's codec if small and on this machine."""
    if store is None:
        return None, None
    spec: CodecSpec = store.spec
    name = spec.name
    if name != "embedded" and not Path(name).is_dir():
        return None, None  # a hub id is found again by its name
    codec: Codec = load_codec(name, input_range=spec.input_range)
    if codec.spec.weights_hash != spec.weights_hash:
        raise InputError(
            f"codec {name} has changed since the latents in {store.folder} were made; restore it "
            "or make the latents again"
        )
    state = codec.encoder_state()
    if sum(v.numel() * v.element_size() for v in state.values()) > MAX_EMBEDDED_CODEC_BYTES:
        return None, None
    return codec.model_config(), state


def _provenance(
    config: Stage1Config | FinetuneConfig, digest: str, listed: str, outcome: TrainingOutcome
) -> dict[str, Any]:
    return {
        "config": study_settings(config),
        "data_digest": digest,
        "list_digest": listed,
        "best_epoch": outcome.best_epoch + 1,
        "num_epochs": len(outcome.history),
    }


def _state_digest(network: SiameseNetwork) -> str:
    """Identify the initial weights, so that a run is only continued from the same."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(network.spec)).encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
