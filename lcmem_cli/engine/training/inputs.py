"""What a training begins with: its networks, its teacher, and whether its inputs fit together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lcmem_cli.engine.config import FinetuneConfig, Stage1Config
from lcmem_cli.engine.data.manifest import Manifest, Record
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.models.checkpoint import MAX_EMBEDDED_CODEC_BYTES, Checkpoint
from lcmem_cli.engine.models.codec import CodecSpec
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.siamese import (
    NetworkSpec,
    SiameseNetwork,
    freeze_modules,
    load_strictly,
    resolve_backbone,
    use_checkpointing,
)
from lcmem_cli.engine.store.latents import LatentStore
from lcmem_cli.engine.training.teacher import TEACHER_NAME, Teacher

OTHER_LIST = (
    "{source}: was not trained on this filelist, so images of its VAL or TEST may have been in "
    "TRAIN then"
)


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


def check_store(config: Stage1Config, store: LatentStore) -> None:
    """Refuse latents that were made otherwise than the config says.

    Raises:
        InputError: naming what differs.
    """
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


def is_other_list(start: Checkpoint, manifest: Manifest) -> bool:
    """Return whether a checkpoint was trained on another image list, as far as it says."""
    known = start.training.get("list_digest") or start.training.get("data_digest", "")
    return str(known).partition("/")[0] != manifest.digest


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
    return _prepared(network, config)


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
    return _prepared(network, config)


def _prepared(network: SiameseNetwork, config: Stage1Config | FinetuneConfig) -> SiameseNetwork:
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


def embeddable_codec(
    store: LatentStore,
) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor] | None]:
    """Return config and encoder weights of the store's codec if small and on this machine.

    Raises:
        InputError: the codec there is not the one that made the latents.
    """
    spec, name = store.spec, store.spec.name
    if name != "embedded" and not Path(name).is_dir():
        return None, None  # a hub id is found again by its name
    codec = load_codec(name, input_range=spec.input_range)
    if codec.spec.weights_hash != spec.weights_hash:
        raise InputError(
            f"codec {name} has changed since the latents in {store.folder} were made; restore it "
            "or make the latents again"
        )
    state = codec.encoder_state()
    if sum(v.numel() * v.element_size() for v in state.values()) > MAX_EMBEDDED_CODEC_BYTES:
        return None, None
    return codec.model_config(), state
