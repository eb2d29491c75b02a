"""Typed configuration: TOML files to validated objects, every problem reported at once."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lcmem_cli.engine.errors import ConfigError, InputError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_CONFIG_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_PROBLEMS = 50
_SHOWN = 120


class Section(BaseModel):
    """Base of every config section: frozen, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class _MisfitError(ValueError):
    """Keys of a config that do not fit together; one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class Config(Section):
    """Base of the configs: what concerns two keys at once is told of all of them together."""

    @model_validator(mode="after")
    def _fit_together(self) -> Config:
        problems = list(self.misfits())
        if problems:
            raise _MisfitError(problems)
        return self

    def misfits(self) -> Iterator[str]:
        """Yield problems that concern two keys at once, and options without effect."""
        raise NotImplementedError


class ImageSection(Section):
    """How an image becomes a tensor."""

    size: int = Field(512, ge=16, le=4096, multiple_of=2)
    """Side in pixels of the square that images are resized to."""


class CodecSection(Section):
    """The VAE that makes latents: ``lcmem latents`` uses it, and ``train-stage1`` asks for it."""

    name: str = "embedded"
    """``embedded``, ``none`` (the network sees pixels), a diffusers folder or a hub id."""
    weights_hash: str | None = None
    """SHA-256 of the encoder, which a run writes into its config; unset: not asked for."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    input_range: Literal["symmetric", "unit"] = "symmetric"
    """Whether the VAE is fed [-1, 1] (as Stable Diffusion's were trained) or [0, 1]."""
    posterior: Literal["mean", "sample"] = "mean"
    """Mean of the posterior (repeatable), or a seeded sample."""


class NetworkSection(Section):
    """The Siamese network."""

    backbone: str = "convnext_tiny"
    """A timm name, or the paper's: ConvNeXt-Tiny/Small/Base/Large, ResNet-50/101, DINOv3."""
    num_features: int = Field(512, ge=1, le=65536)
    """Width of the feature vector."""
    normalisation: Literal["sample", "dataset", "none", "imagenet"] = "sample"
    """Of the network's input: per sample and channel, by data-set statistics, none, ImageNet's."""
    weights: Literal["random", "timm"] | Annotated[str, Field(min_length=1)] = "random"
    """Initial backbone: ``random``, ``timm`` (pretrained, from the hub), or a file of timm keys."""
    stem_stride: Literal[1, 2, 4] | None = None
    """Stride of the first convolution. Latents are already smaller than the image, so 1 keeps the
    resolutions that a pretrained backbone saw; unset leaves the backbone's own."""
    inner_stride: int | None = Field(None, ge=1, le=64)
    """Reads an earlier stage beside the last features: the one of this stride as timm counts it
    (16: the last but one of most convolutional backbones). It tells more of an image's own
    texture, and sees altered copies better. Unset: the last features alone."""
    inner_bands: int | None = Field(None, ge=2, le=16)
    """Also reads means of that stage over so many horizontal bands: where in the image things
    are. Unset: none."""
    feature_rms: float | None = Field(None, gt=0, le=10)
    """Root mean square that each image's features are scaled to before the sigmoid, such as 1.5,
    so that two images are compared by the direction of their features alone. Unset: not scaled."""
    align_stem: int = Field(0, ge=0, le=100_000)
    """Images on which a pretrained backbone's first convolution is fitted to latents by least
    squares to what it made of the pixels. The projection then begins as the principal components
    of the backbone's features of all TRAIN images, whitened, and the head as a plain negative
    distance. 0: leave the ends random."""
    align_altered: Literal["none", "reference", "strong"] = "none"
    """Augmentation of one copy of each TRAIN image, so that what edits change in the features
    counts less in that projection."""
    drop_path_rate: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth while training."""


class LossSection(Section):
    """``alpha * BCE + (1 - alpha) * NT-Xent``."""

    alpha: float = Field(0.8, ge=0, le=1)
    """Weight of the binary cross-entropy."""
    temperature: float = Field(0.07, gt=0, le=10)
    """Of NT-Xent."""
    negatives: Literal["roll", "all"] = "roll"
    """BCE negatives: half of the batch rolled by one, or every pair of two identities."""


class RetentionSection(Section):
    """Keeps what the pretrained backbone knew; see ``engine/training/teacher.py``."""

    weight: float = Field(0.0, ge=0)
    """Of the cosine distance between a feature and the pretrained backbone's of the clean image."""
    instance_weight: float = Field(0.0, ge=0)
    """Of the cross-entropy that finds an altered copy's target among those of all TRAIN images."""
    temperature: float = Field(0.07, gt=0, le=10)
    """Of that cross-entropy."""
    panel: dict[str, str] = Field(default_factory=dict)
    """For stage 1: further pretrained backbones, timm name = weights file; together with the
    network's own they make better targets than any one alone."""
    teacher: str | None = None
    """For finetune: what stage 1 wrote; unset: ``teacher.safetensors`` beside the checkpoint."""


class SamplingSection(Section):
    """Which pairs a training epoch sees."""

    unsupervised: bool = False
    """Every image is its own identity."""
    mini_epoch_size: int = Field(0, ge=0)
    """Identities drawn for one epoch; 0: all. Validation uses a quarter of it, drawn once."""
    passes_per_epoch: int = Field(1, ge=1)
    """How often an epoch goes over its identities; validation comes after each epoch."""
    same_image_probability: float = Field(0.0, ge=0, le=1)
    """Share of the pairs whose second image is the first one (altered by the augmentation)."""
    datasets_per_batch: int = Field(0, ge=0)
    """Data sets that one batch is drawn from, so that negatives are hard; 0: no grouping."""


class AugmentationSection(Section):
    """What is done to the second image of a pair."""

    preset: Literal["none", "reference", "strong"] = "strong"
    """``reference``: the published set; ``strong``: real ranges for every family of edits."""
    working_size: int = Field(0, ge=0, le=4096)
    """Side in pixels at which images are altered before they are shrunk to the network's size; 0:
    the network's size. Real copies are altered at their own size."""


class OptimiserSection(Section):
    """Adam and its schedule."""

    learning_rate: float = Field(5e-4, gt=0, le=1)
    """Of the head and, times ``backbone_scale``, of the backbone."""
    backbone_scale: float = Field(1.0, ge=0, le=10)
    """Learning rate of the pretrained part relative to the head's."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """Decoupled (AdamW); 0 is plain Adam."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    eta_min_ratio: float = Field(1.0, ge=0, le=1)
    """End of the cosine schedule relative to its start; the published configs use 1 (constant)."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then what is kept; 0: off."""
    clip_norm: float = Field(0.0, ge=0)
    """Largest norm of the gradient; 0: no clipping."""
    freeze_statistics: bool = False
    """Keep the running mean and variance of batch normalisation as they were pretrained, and use
    them in training too. Scores in training then depend on no other image of the batch, nor on how
    many processes share it."""
    frozen: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Modules that stay as they are: ``head``, or ``backbone.`` and timm's name
    (``backbone.blocks.0``). Nothing is computed backward through those below the first that is
    trained."""


class ScheduleSection(Section):
    """How long to train."""

    epochs: int = Field(500, ge=1, le=100_000)
    """The most epochs."""
    patience: int = Field(25, ge=0)
    """Epochs without a better validation loss before stopping; 0: never stop early."""
    keep: Literal["best", "last"] = "best"
    """Network of the epoch with the best validation loss, or of the last epoch. Validation judges
    identities of the same data sets; features for others may still improve when it rises."""
    batch_size: int = Field(512, ge=2)
    """Pairs per optimiser step, over all processes."""
    accumulate: int = Field(1, ge=1)
    """Parts that a batch is computed in, to save memory; the loss still sees the whole batch."""


class RuntimeSection(Section):
    """How and where a run computes; what of it changes no result: ``NOT_THE_STUDY``."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Of everything random."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    num_workers: int = Field(-1, ge=-1, le=256)
    """Decoding threads; -1: from the CPUs that this process may use."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """``auto``: only on accelerators that have it; never on a CPU."""
    compile: bool = False
    """Compile the network with torch.compile."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: about a third slower,
    for a graphics card with little memory. Loss and gradients are the same."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = ()
    """Where else the losses of each epoch are shown: TensorBoard, Weights & Biases."""


NOT_THE_STUDY = ("device", "num_workers", "checkpointing", "trackers")
"""Keys of ``RuntimeSection`` that change no result, so that a run may be continued with others."""
AFTER_TRAINING = ("start_share",)
"""Keys of ``RegularisationSection`` that are used only when the training has ended: they change the
result, but a run may be continued with others."""
FOUND = ("weights_hash",)
"""Keys of ``CodecSection`` that a run fills in; which data it is of is compared by itself."""
HOW_LONG = ("epochs", "patience")
"""Keys of ``ScheduleSection`` that say when a training ends: a run may be asked for more."""


class CodecModelSection(Section):
    """Shape of a small AutoencoderKL."""

    block_channels: Annotated[tuple[int, ...], Field(strict=False, min_length=1, max_length=8)] = (
        16,
        32,
        64,
        64,
    )
    """Channels per resolution; each level after the first halves the image."""
    layers_per_block: int = Field(1, ge=0, le=8)
    """Residual blocks per resolution of the encoder; the decoder has one more."""
    latent_channels: int = Field(4, ge=1, le=64)
    """Channels of a latent."""
    norm_groups: int = Field(8, ge=1)
    """Groups of the group normalisation; must divide every entry of ``block_channels``."""
    start: Literal["random", "pixels"] = "random"
    """Weights that training begins with. ``pixels``: an encoder whose latents are the pixels of
    each block of the image, one channel each, so that nothing is lost at the start. Needs
    ``layers_per_block = 0``."""


class CodecLossSection(Section):
    """Mean absolute error plus a Kullback-Leibler term."""

    kl_weight: float = Field(1e-6, ge=0)
    """Weight of the Kullback-Leibler term per pixel."""


class CodecScheduleSection(Section):
    """How long to train a codec."""

    steps: int = Field(3000, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(16, ge=1)
    """Images per step."""
    crop_size: int = Field(128, ge=16)
    """Side of the random crops in pixels."""
    learning_rate: float = Field(1e-3, gt=0, le=1)
    """Of Adam, decayed to zero along a cosine."""


class CodecConfig(Config):
    """Everything ``lcmem train-codec`` needs beside its data."""

    kind: Literal["codec"]
    image: ImageSection = ImageSection()
    model: CodecModelSection = CodecModelSection()
    loss: CodecLossSection = CodecLossSection()
    schedule: CodecScheduleSection = CodecScheduleSection()
    runtime: RuntimeSection = RuntimeSection()
    input_range: Literal["symmetric", "unit"] = "symmetric"

    def misfits(self) -> Iterator[str]:
        """Yield what does not fit together."""
        model, runtime = self.model, self.runtime
        bad = [count for count in model.block_channels if count <= 0 or count % model.norm_groups]
        if bad:
            yield f"model.norm_groups: {model.norm_groups} must divide every entry, not {bad}"
        if model.layers_per_block == 0 and len(set(model.block_channels)) > 1:
            yield (
                "model.layers_per_block: without residual blocks nothing changes the number of "
                "channels; make all entries of block_channels equal, or set 1"
            )
        if model.layers_per_block > 0 and model.start == "pixels":
            yield 'model.layers_per_block: start = "pixels" needs 0'
        if runtime.trackers:
            yield "runtime.trackers: has no effect on train-codec; see its history.csv"
        if runtime.checkpointing:
            yield "runtime.checkpointing: has no effect on train-codec"
        if runtime.compile:
            yield "runtime.compile: has no effect on train-codec"


class Stage1Config(Config):
    """Everything ``lcmem train-stage1`` needs beside its data."""

    kind: Literal["stage1"]
    image: ImageSection = ImageSection()
    codec: CodecSection = CodecSection()
    network: NetworkSection = NetworkSection()
    loss: LossSection = LossSection()
    retention: RetentionSection = RetentionSection()
    sampling: SamplingSection = SamplingSection()
    augmentation: AugmentationSection = AugmentationSection(preset="none")
    optimiser: OptimiserSection = OptimiserSection()
    schedule: ScheduleSection = ScheduleSection()
    runtime: RuntimeSection = RuntimeSection()

    def misfits(self) -> Iterator[str]:
        """Yield what does not fit together."""
        network, augmentation, retention = self.network, self.augmentation, self.retention
        pixels = self.codec.name == "none"
        if pixels != (network.normalisation == "imagenet"):
            yield (
                'network.normalisation: "imagenet" goes with codec.name = "none", and only with it'
            )
        if augmentation.preset != "none" and not pixels:
            yield (
                "augmentation.preset: has no effect on stored latents; use finetune, or "
                'codec.name = "none"'
            )
        if network.align_stem and network.weights == "random":
            yield "network.align_stem: needs pretrained network.weights to align to"
        if network.align_stem and network.weights == "timm":
            yield "network.align_stem: needs network.weights to be a file"
        if network.align_stem and pixels:
            yield 'network.align_stem: has no effect with codec.name = "none"'
        if network.align_altered != "none" and not network.align_stem:
            yield "network.align_altered: needs network.align_stem"
        if network.inner_bands and not network.inner_stride:
            yield "network.inner_bands: needs network.inner_stride"
        if augmentation.working_size and augmentation.preset == "none":
            yield 'augmentation.working_size: has no effect with preset = "none"'
        if retention.teacher is not None:
            yield "retention.teacher: has no effect in stage 1, which makes the teacher"
        if retention.weight and not network.align_stem:
            yield "retention.weight: needs network.align_stem, which makes the teacher"
        yield from _pair_misfits(self)


class RegularisationSection(Section):
    """Of a network whose shape the checkpoint gives."""

    drop_path_rate: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth while training."""
    start_share: float = Field(0.0, ge=0, lt=1)
    """Share of the starting checkpoint's weights in those that are kept at the end (WiSE-FT,
    Wortsman et al. 2022, arXiv 2109.01903): a little of the start serves unseen kinds of images.
    A finished run takes another share with ``--resume``."""


class FinetuneImageSection(Section):
    """How an image becomes a tensor."""

    size: int | None = Field(None, ge=16, le=4096, multiple_of=2)
    """Side in pixels; unset: the checkpoint's. A convolutional backbone takes any."""


class FinetuneConfig(Config):
    """Everything ``lcmem finetune`` needs beside its data and the stage-1 checkpoint."""

    kind: Literal["finetune"]
    image: FinetuneImageSection = FinetuneImageSection()
    regularisation: RegularisationSection = RegularisationSection()
    loss: LossSection = LossSection()
    retention: RetentionSection = RetentionSection()
    sampling: SamplingSection = SamplingSection()
    augmentation: AugmentationSection = AugmentationSection()
    optimiser: OptimiserSection = OptimiserSection(learning_rate=8e-5)
    schedule: ScheduleSection = ScheduleSection(epochs=20, patience=5, batch_size=64)
    runtime: RuntimeSection = RuntimeSection()

    def misfits(self) -> Iterator[str]:
        """Yield what does not fit together."""
        if self.retention.teacher is not None and not self.retention.weight:
            yield "retention.teacher: needs retention.weight above 0"
        if self.retention.panel:
            yield "retention.panel: has no effect in finetune; the teacher holds its panel"
        yield from _pair_misfits(self)


def _pair_misfits(config: Stage1Config | FinetuneConfig) -> Iterator[str]:
    """Yield what does not fit together in either stage that learns from pairs."""
    retention, schedule = config.retention, config.schedule
    if retention.panel and not retention.weight:
        yield "retention.panel: needs retention.weight above 0"
    if retention.instance_weight and not retention.weight:
        yield "retention.instance_weight: needs retention.weight above 0"
    if schedule.keep == "last" and schedule.patience:
        yield 'schedule.keep: "last" needs schedule.patience = 0, no early stopping'
    if config.loss.negatives == "all" and config.loss.alpha == 0:
        yield "loss.negatives: has no effect with loss.alpha = 0"
    if schedule.batch_size % schedule.accumulate:
        yield (
            f"schedule.accumulate: {schedule.accumulate} must divide schedule.batch_size = "
            f"{schedule.batch_size}"
        )


AnyConfig = CodecConfig | Stage1Config | FinetuneConfig
ConfigT = TypeVar("ConfigT", CodecConfig, Stage1Config, FinetuneConfig)
KINDS: dict[str, type[AnyConfig]] = {
    "codec": CodecConfig,
    "stage1": Stage1Config,
    "finetune": FinetuneConfig,
}


def config_folder() -> Path:
    """Return the folder of the shipped configs (inside the wheel, or beside the package)."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Return the shipped configs by name, such as ``stage1`` or ``mini/codec``."""
    folder = config_folder()
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.toml"))
    }


def find_config(name: str) -> Path:
    """Return the file behind a config name or path.

    Raises:
        InputError: neither a file nor a shipped config.
    """
    path = Path(name)
    with contextlib.suppress(OSError, ValueError):  # a name that is too long, or holds a NUL
        if path.is_file():
            return path
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    shown = name[:_SHOWN]
    raise InputError(f"no config file or shipped config '{shown}'; {nearest(shown, shipped)}")


def describe_config(path: Path) -> tuple[str, str]:
    """Return a config file's kind and its purpose, which is its first comment line."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return str(read_toml(path).get("kind", "?")), first.lstrip("# ").strip()


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: unreadable, too large, or not TOML (with line and column).
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(str(path), [f"larger than {MAX_CONFIG_BYTES} bytes: not a config"])
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        raise ConfigError(str(path), [f"not valid TOML: {error}"]) from error


def parse_override(text: str) -> tuple[list[str], Any]:
    """Parse ``section.key=value``; the value is TOML, or a plain string where it is not.

    Raises:
        ConfigError: no ``=`` or an empty key.
    """
    key, sign, raw = text.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise ConfigError("--set", [f"'{text[:_SHOWN]}': expected section.key=value"])
    try:
        return parts, tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):
        return parts, raw.strip()


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a TOML tree with ``section.key=value`` strings applied in order."""
    result = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for text in overrides:
        parts, value = parse_override(text)
        node = result
        for part in parts[:-1]:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                raise ConfigError(
                    "--set", [f"'{text[:_SHOWN]}': {part[:_SHOWN]} is a value, not a section"]
                )
            node = child
        node[parts[-1]] = value
    return result


def validate(values: dict[str, Any], *, source: str) -> AnyConfig:
    """Validate a TOML tree.

    Raises:
        ConfigError: with every unknown key, wrong type and bad range at once.
    """
    _check_extent(values, source)
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        shown = repr(kind)[:_SHOWN]
        hint = nearest(shown.strip("'"), KINDS) if kind is not None else 'add: kind = "stage1"'
        raise ConfigError(
            source, [f"kind: must be one of {', '.join(sorted(KINDS))}, not {shown}; {hint}"]
        )
    try:
        return KINDS[kind].model_validate(values)
    except ValidationError as error:
        problems = _problems(error, KINDS[kind])
        wrong = [item["loc"] for item in error.errors() if item["loc"]]
    # Pydantic compares keys with each other only where each is right by itself, so those that are
    # not are left out to learn what else is wrong; what is said of their defaults does not count.
    if wrong:
        names = [".".join(map(str, place[:2])) for place in wrong]
        try:
            KINDS[kind].model_validate(_without(values, wrong))
        except ValidationError as error:
            others = _problems(error, KINDS[kind])
            problems += [line for line in others if not any(name in line for name in names)]
    more = len(problems) - MAX_PROBLEMS
    raise ConfigError(
        source, problems[:MAX_PROBLEMS] + ([f"and {more:,} more"] if more > 0 else [])
    )


def load_config(name: str, kind: type[ConfigT], *, overrides: Sequence[str] = ()) -> ConfigT:
    """Load a shipped config or a file, apply overrides, and validate.

    Args:
        name: shipped name (``mini/stage1``) or path.
        kind: the config class that the caller needs.
        overrides: ``section.key=value`` strings; they win over the file.

    Raises:
        ConfigError: the file or an override is wrong, or the file is of another kind.
        InputError: no such config.
    """
    path = find_config(name)
    config = validate(apply_overrides(read_toml(path), overrides), source=str(path))
    if not isinstance(config, kind):
        wanted = " or ".join(get_args(kind.model_fields["kind"].annotation))
        raise ConfigError(
            str(path), [f"kind: this command needs {wanted}, the file says '{config.kind}'"]
        )
    return config


def study_settings(config: Section) -> dict[str, Any]:
    """Return the plain values of a config that decide its result."""
    values = config.model_dump(mode="json")
    runtime = {k: v for k, v in values["runtime"].items() if k not in NOT_THE_STUDY}
    return {**values, "runtime": runtime}


def resumable_settings(config: Section) -> dict[str, Any]:
    """Return those of ``study_settings`` with which alone a run may be continued."""
    settings = study_settings(config)
    free = {"regularisation": AFTER_TRAINING, "schedule": HOW_LONG, "codec": FOUND}
    for section, keys in free.items():
        if section in settings:
            settings[section] = {k: v for k, v in settings[section].items() if k not in keys}
    return settings


def to_toml(config: Section) -> str:
    """Return a config as TOML text; an unset key, for which TOML has no word, is a comment."""
    import tomli_w

    values = config.model_dump(mode="json")
    # Before the sections, or they would be read as keys of the last one.
    parts = [tomli_w.dumps({k: v for k, v in values.items() if not isinstance(v, dict)})]
    for name, value in values.items():
        if not isinstance(value, dict):
            continue
        known = {key: item for key, item in value.items() if item is not None}
        text = tomli_w.dumps({name: known}) or f"[{name}]\n"
        unset = "".join(f"# {key} is unset\n" for key, item in value.items() if item is None)
        parts.append(_after_header(text, unset))
    return "\n".join(parts)


def _after_header(section: str, comment: str) -> str:
    """Put comments where they are read as a section's: before the tables inside it."""
    header, _, rest = section.partition("\n")
    return f"{header}\n{comment}{rest}"


def _check_extent(values: dict[str, Any], source: str) -> None:
    """Refuse what no config holds and what could not be shown or written: deep trees, huge numbers.

    Raises:
        ConfigError: naming the key.
    """
    waiting: list[tuple[str, int, Any]] = [(key, 1, value) for key, value in values.items()]
    while waiting:
        key, depth, value = waiting.pop()
        key = key[:_SHOWN]
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(source, [f"{key}: an integer of TOML has 64 bits, this has more"])
        if not isinstance(value, (dict, list)):
            continue
        if depth > MAX_DEPTH:
            raise ConfigError(source, [f"{key}: nested more than {MAX_DEPTH} deep: not a config"])
        items = value.items() if isinstance(value, dict) else enumerate(value)
        waiting.extend((f"{key}.{name}", depth + 1, child) for name, child in items)


def _without(values: dict[str, Any], places: Sequence[tuple[int | str, ...]]) -> dict[str, Any]:
    """Return a tree without the keys at, or around, some places."""
    result = copy.deepcopy(values)
    for place in places:
        node: Any = result
        for part in place[:-1]:
            if not isinstance(node.get(part), dict):
                node.pop(part, None)
                break
            node = node[part]
        else:
            node.pop(place[-1], None)
    return result


def _problems(error: ValidationError, root: type[Section]) -> list[str]:
    """Return one line for each problem that pydantic found."""
    problems: list[str] = []
    for item in error.errors():
        misfit = item.get("ctx", {}).get("error")
        found = misfit.problems if isinstance(misfit, _MisfitError) else [_describe(item, root)]
        problems += [problem for problem in found if problem not in problems]
    return problems


def _describe(item: Any, root: type[Section]) -> str:
    location = [str(part)[:_SHOWN] for part in item["loc"]]
    key = ".".join(location) or "(top level)"
    if item["type"] == "extra_forbidden":
        section = root
        for part in location[:-1]:
            annotation = section.model_fields[part].annotation
            assert isinstance(annotation, type) and issubclass(annotation, Section)
            section = annotation
        return f"{key}: unknown key; {nearest(location[-1], section.model_fields)}"
    given = item.get("input")
    shown = f", not {given!r}"[:120] if not isinstance(given, dict) else ""
    return f"{key}: {item['msg'][:1].lower()}{item['msg'][1:]}{shown}"
