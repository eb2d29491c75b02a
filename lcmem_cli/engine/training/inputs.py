"""What a training begins with: its networks, its teacher, and whether its inputs fit together."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lcmem_cli.engine.config import FinetuneConfig, Stage1Config
from lcmem_cli.engine.data.manifest import Manifest, Record
from lcmem_cli.engine.errors import InputError, LcmemError
from lcmem_cli.engine.models.checkpoint import MAX_EMBEDDED_CODEC_BYTES, Checkpoint
from lcmem_cli.engine.models.codec import EMBEDDED, Codec, CodecSpec
from lcmem_cli.engine.models.codec_loading import load_codec, needs_download
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


def check_store(config: Stage1Config, store: LatentStore) -> Codec | None:
    """Refuse latents that were made otherwise than the config says.

    Returns:
        The codec that the config names, where it is at hand; its weights are those that made the
        latents.

    Raises:
        InputError: naming what differs, and how to make it agree.
    """
    codec, problem = _codec_of(config, store)
    needed = overrides_for(config, store.spec, store.image_size)
    problems = [problem] if problem else []
    for key, value in needed.items():
        if key.startswith("codec.") and key not in ("codec.input_range", "codec.posterior"):
            continue  # names may differ where the weights are the same
        section, _, name = key.partition(".")
        asked = getattr(getattr(config, section), name)
        problems.append(f"{key} is {asked}, the latents were made with {value}")
    if problems:
        raise InputError(
            f"{store.folder}: config and latents do not fit: {'; '.join(problems)}; train on these "
            f"latents with {as_options(needed)}, or make others with lcmem latents and the same "
            "--config"
        )
    return codec


def overrides_for(config: Stage1Config, spec: CodecSpec, image_size: int) -> dict[str, str]:
    """Return the values by key that a config needs in place of its own to train on some latents.

    Args:
        config: resolved.
        spec: codec of the latents.
        image_size: side in pixels of the images that they were made of.
    """
    made = {
        "codec.name": (config.codec.name, spec.name),
        "codec.revision": (config.codec.revision, spec.revision),
        "codec.input_range": (config.codec.input_range, spec.input_range),
        "codec.posterior": (config.codec.posterior, spec.posterior),
        "image.size": (config.image.size, image_size),
    }
    return {key: str(there) for key, (asked, there) in made.items() if asked != there}


def as_options(overrides: dict[str, str]) -> str:
    """Return values by key as ``--set`` options for a shell."""
    return " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in overrides.items())


def _codec_of(config: Stage1Config, store: LatentStore) -> tuple[Codec | None, str]:
    """Return the codec that the config names, if it is at hand, and why it is not the latents'."""
    asked, made = config.codec, store.spec
    if asked.weights_hash not in (None, made.weights_hash):
        return None, (
            f"codec.weights_hash is {asked.weights_hash}, the latents were made with "
            f"{made.weights_hash}"
        )
    is_same = (asked.name, asked.revision) == (made.name, made.revision)
    asked_for, made_by = (
        f"{codec.name} at {codec.revision}" if codec.revision else codec.name
        for codec in (asked, made)
    )
    other = f"codec.name is {asked_for}, the latents were made with {made_by}"
    codec = None
    if not needs_download(asked.name, asked.revision):
        try:
            codec = load_codec(asked.name, revision=asked.revision, input_range=made.input_range)
        except LcmemError:  # a folder that has gone; its name is all that is left to compare
            codec = None
    if codec is None:
        return None, "" if is_same else other
    if codec.spec.weights_hash == made.weights_hash:
        return codec, ""
    if is_same:
        return codec, (
            f"codec {asked.name} has changed since the latents were made: its weights are "
            f"{codec.spec.weights_hash[:12]}, they were {made.weights_hash[:12]}"
        )
    return codec, other


def with_codec(config: Stage1Config, store: LatentStore) -> Stage1Config:
    """Return a config that says which weights made the latents; they fit, see ``check_store``."""
    codec = config.codec.model_copy(update={"weights_hash": store.spec.weights_hash})
    return config.model_copy(update={"codec": codec})


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
    codec: Codec | None,
) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor] | None]:
    """Return config and encoder weights of a codec if it is small and no hub id's."""
    if codec is None or not (codec.spec.name == EMBEDDED or Path(codec.spec.name).exists()):
        return None, None  # a hub id is found again by its name
    state = codec.encoder_state()
    if sum(v.numel() * v.element_size() for v in state.values()) > MAX_EMBEDDED_CODEC_BYTES:
        return None, None
    return codec.model_config(), state
