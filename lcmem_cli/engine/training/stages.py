"""The two stages of LCMem: identity on latents, then copies in image space.

Method: arXiv 2512.14421.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lcmem_cli.engine.config import FinetuneConfig, Stage1Config
from lcmem_cli.engine.data.augment import Augmentation
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.data.manifest import Manifest, Record
from lcmem_cli.engine.distributed import Ranks, resolve_device, resolve_workers
from lcmem_cli.engine.errors import InputError, LcmemError
from lcmem_cli.engine.files import write_json
from lcmem_cli.engine.models.checkpoint import (
    MAX_EMBEDDED_CODEC_BYTES,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from lcmem_cli.engine.models.codec import Codec, CodecSpec, load_codec
from lcmem_cli.engine.models.siamese import (
    NetworkSpec,
    SiameseNetwork,
    check_input,
    resolve_backbone,
)
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Threshold, Unreadable
from lcmem_cli.engine.store.latents import LatentStore
from lcmem_cli.engine.training.initialise import (
    align_stem,
    load_backbone_weights,
    spread_features,
)
from lcmem_cli.engine.training.loop import EpochRecord, Trainer, TrainingOutcome
from lcmem_cli.engine.training.run import (
    check_unreadable,
    open_training_folder,
    readable_part,
)
from lcmem_cli.engine.training.sampling import PairSampler
from lcmem_cli.engine.training.sources import ImageSource, LatentSource, PairSource

CHECKPOINT_NAME = "checkpoint.safetensors"
RESULT_NAME = "training.json"
_ALIGN_BATCH = 32


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
    ranks = _ranks(config.runtime.device)
    reporter = reporter if ranks.is_main else SILENT
    pixels = config.codec.name == "none"
    if pixels and store is not None:
        raise InputError('codec.name = "none" trains on images: pass --filelist, not --latents')
    if not pixels and store is None:
        raise InputError(
            "stage 1 trains on latents: make them with lcmem latents and pass --latents, or use a "
            'config with codec.name = "none" (the baselines)'
        )
    unreadable: tuple[Unreadable, ...] = ()
    if store is None:
        if manifest is None:
            raise InputError("training on images needs --filelist")
        manifest, unreadable = readable_part(manifest, config.runtime.num_workers, reporter)
        check_unreadable(unreadable, max_unreadable)
        codec = load_codec("none", device=device)
        spec, size, digest = codec.spec, config.image.size, manifest.digest
        records: Sequence[Record] = manifest.records
    else:
        spec, size, digest, codec = store.spec, store.image_size, store.manifest_digest, None
        records, unreadable = store.records, store.unreadable
        _check_store(config, store)
        digest = f"{digest}/{spec.weights_hash}/{size}"

    torch.manual_seed(config.runtime.seed)
    network_spec = NetworkSpec(
        backbone=resolve_backbone(config.network.backbone),
        in_channels=spec.latent_channels,
        num_features=config.network.num_features,
        input_size=size // spec.downsampling,
        normalisation=config.network.normalisation,
        stem_stride=config.network.stem_stride,
        mean=store.mean if store and config.network.normalisation == "dataset" else None,
        std=store.std if store and config.network.normalisation == "dataset" else None,
    )
    network = SiameseNetwork(
        network_spec,
        drop_path_rate=config.network.drop_path_rate,
        pretrained=config.network.weights == "timm",
    )
    check_input(network)
    if config.network.weights not in ("random", "timm"):
        stem = load_backbone_weights(network, Path(config.network.weights))
        if config.network.align_stem and stem is not None:
            if store is None or manifest is None:
                raise InputError(
                    "network.align_stem fits the first convolution to images beside their latents: "
                    "pass --filelist (and --basedir) too"
                )
            explained = align_stem(
                network,
                stem,
                _aligned_batches(store, manifest, config.network.align_stem, config.runtime.seed),
            )
            spread_features(
                network,
                (
                    latents
                    for _, latents in _aligned_batches(
                        store, manifest, config.network.align_stem, config.runtime.seed
                    )
                ),
            )
            reporter.event("aligned", explained_variance=explained)

    def source(rows: list[int]) -> PairSource:
        if store is not None:
            return LatentSource(store, rows)
        assert manifest is not None and codec is not None
        paths = manifest.paths()
        return ImageSource(
            [paths[row] for row in rows],
            codec,
            image_size=size,
            augmentation=Augmentation.from_preset(config.augmentation.preset),
            num_workers=resolve_workers(config.runtime.num_workers, ranks.size),
        )

    def finish(outcome: TrainingOutcome) -> Checkpoint:
        codec_config, codec_state = _embeddable(store)
        # A codec that is inside needs no path of the machine that it was made on.
        inside = spec if codec_state is None else dataclasses.replace(spec, name="inside")
        return Checkpoint(
            stage="stage1",
            network=network_spec,
            network_state=outcome.state,
            codec=inside,
            codec_config=codec_config,
            codec_state=codec_state,
            image_size=size,
            training=_provenance(config, digest, outcome),
        )

    return _run(
        config, "stage1", network.to(device), records, source, finish, output=output,
        digest=f"{digest}/{_state_digest(network)}", resume=resume, ranks=ranks,
        evaluate_on=store if store is not None else manifest, unreadable=unreadable,
        reporter=reporter,
    )  # fmt: skip


def finetune(
    config: FinetuneConfig,
    *,
    checkpoint: Path,
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
        checkpoint: where the network and its codec come from.
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
    from lcmem_cli.engine.detectors.lcmem import LCMemDetector

    device = resolve_device(config.runtime.device)
    ranks = _ranks(config.runtime.device)
    reporter = reporter if ranks.is_main else SILENT
    start = load_checkpoint(checkpoint)
    encoder = LCMemDetector(start, name=str(checkpoint), codec=codec, device=device).codec
    manifest, unreadable = readable_part(manifest, config.runtime.num_workers, reporter)
    check_unreadable(unreadable, max_unreadable)
    network = SiameseNetwork(start.network, drop_path_rate=config.regularisation.drop_path_rate)
    network.load_state_dict(start.build(source=str(checkpoint)).state_dict())
    paths = manifest.paths()

    def source(rows: list[int]) -> PairSource:
        return ImageSource(
            [paths[row] for row in rows],
            encoder,
            image_size=start.image_size,
            augmentation=Augmentation.from_preset(config.augmentation.preset),
            num_workers=resolve_workers(config.runtime.num_workers, ranks.size),
        )

    digest = f"{manifest.digest}/{start.fingerprint}"

    def finish(outcome: TrainingOutcome) -> Checkpoint:
        return dataclasses.replace(
            start,
            stage="finetune",
            network_state=outcome.state,
            thresholds=(),
            training={
                **_provenance(config, digest, outcome),
                "started_from": {"fingerprint": start.fingerprint, "training": start.training},
            },
        )

    return _run(
        config, "finetune", network.to(device), manifest.records, source, finish, output=output,
        digest=digest, resume=resume, ranks=ranks, evaluate_on=manifest, unreadable=unreadable,
        reporter=reporter,
    )  # fmt: skip


def _run(
    config: Stage1Config | FinetuneConfig,
    stage: Literal["stage1", "finetune"],
    network: SiameseNetwork,
    records: Sequence[Record],
    source: Any,
    finish: Any,
    *,
    output: Path,
    digest: str,
    resume: bool,
    ranks: Ranks,
    evaluate_on: Any,
    unreadable: tuple[Unreadable, ...],
    reporter: Reporter,
) -> TrainingResult:
    """Train, save the kept network with its thresholds, and judge it on TEST."""
    from lcmem_cli.engine.evaluation.judge import judge
    from lcmem_cli.engine.report.plots import plot_loss_curves, plot_roc

    def part(split: str) -> tuple[PairSource, PairSampler]:
        rows = [row for row, record in enumerate(records) if record.split == split]
        sampler = PairSampler(
            [records[row] for row in rows],
            config.sampling,
            batch_size=config.schedule.batch_size,
            seed=config.runtime.seed,
        )
        return source(rows), sampler

    train, validation = part("TRAIN"), part("VAL")
    with open_training_folder(output, config, digest, resume=resume, ranks=ranks) as run_digest:
        outcome = Trainer(
            network,
            train=train,
            validation=validation,
            loss=config.loss,
            optimiser=config.optimiser,
            schedule=config.schedule,
            runtime=config.runtime,
            folder=output,
            run_digest=run_digest,
            ranks=ranks,
            reporter=reporter,
        ).run()
        checkpoint: Checkpoint = finish(outcome).with_fingerprint()
        judged = judge(
            checkpoint, evaluate_on, workers=config.runtime.num_workers, ranks=ranks,
            device=config.runtime.device, reporter=reporter,
        )  # fmt: skip
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
            stage=stage,
            num_train_identities=train[1].num_identities,
            best_epoch=outcome.best_epoch + 1,
            num_epochs=len(outcome.history),
            stopped_early=outcome.stopped_early,
            history=outcome.history,
            test_auc=judged.auc,
            thresholds=judged.thresholds,
            unreadable=unreadable,
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


def _ranks(device: str) -> Ranks:
    from lcmem_cli.engine.distributed import current_ranks

    return current_ranks(device)


def _check_store(config: Stage1Config, store: LatentStore) -> None:
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


def _embeddable(
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
    config: Stage1Config | FinetuneConfig, digest: str, outcome: TrainingOutcome
) -> dict[str, Any]:
    settings = config.model_dump(mode="json")
    settings["runtime"] = {
        k: v for k, v in settings["runtime"].items() if k not in ("device", "num_workers")
    }
    return {
        "config": settings,
        "data_digest": digest,
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
