"""What would fail in a run, found by the run's own loaders before hours are spent on it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lcmem_cli.engine import config as configs
from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.config import AnyConfig, CodecConfig, FinetuneConfig, Stage1Config
from lcmem_cli.engine.data.manifest import SPLITS, Manifest, inspect_manifest
from lcmem_cli.engine.data.sources.opened import is_there
from lcmem_cli.engine.data.tables import STANDARD, ListColumns
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.detectors.options import take_label
from lcmem_cli.engine.detectors.registry import check_name, load_detector
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import ConfigError, LcmemError, ManifestError
from lcmem_cli.engine.evaluation.study.scoring import check_latents
from lcmem_cli.engine.files import LOCK_NAME, folder_lock
from lcmem_cli.engine.models.checkpoint import Checkpoint, load_checkpoint
from lcmem_cli.engine.models.codec import EMBEDDED, PIXELS, CodecSpec
from lcmem_cli.engine.models.codec_loading import load_codec, load_codec_of, needs_download
from lcmem_cli.engine.models.hub import locate_checkpoint
from lcmem_cli.engine.models.siamese import SiameseNetwork, resolve_backbone
from lcmem_cli.engine.models.weights import cached_weights
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Unreadable
from lcmem_cli.engine.runs import CONFIG_NAME
from lcmem_cli.engine.store.latents import LatentStore
from lcmem_cli.engine.training import autoencoder, inputs
from lcmem_cli.engine.training.loop import training_precision
from lcmem_cli.engine.training.run import check_continues, readable_part
from lcmem_cli.engine.training.sampling import PairBatch, PairSampler, check_batches
from lcmem_cli.engine.training.teacher import load_pretrained
from lcmem_cli.engine.training.trackers import check_trackers

Level = Literal["problem", "warning", "fine"]
DEFAULT_IMAGES = 64
_FLOAT_BYTES = 4
_SMALL_FILES_BYTES = 64 << 20  # plots, tables, the report page
_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked.

    Attributes:
        group: what it is about, such as ``filelist``.
        level: ``problem`` (a run would fail), ``warning`` or ``fine``.
        what: what was found.
        remedy: what to do about it; empty where it is fine.
    """

    group: str
    level: Level
    what: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckResult(Result):
    """Everything that was checked.

    Attributes:
        findings: in order of the groups.
        num_problems: findings that would make a run fail.
        num_warnings: findings that weaken its result.
        num_images_decoded: images that were decoded for this.
        unreadable: those of them that could not be.
    """

    findings: tuple[Finding, ...]
    num_problems: int
    num_warnings: int
    num_images_decoded: int
    unreadable: tuple[Unreadable, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """What a run would be given. What is not given is not checked.

    Attributes:
        config: name or path of a training config; with ``resume`` the run's own by default.
        overrides: ``section.key=value`` strings.
        filelist: CSV, Parquet or folder of images.
        basedir: folder that paths are relative to.
        columns: what the filelist calls its columns.
        checkpoint: what fine-tuning starts from, or what scores.
        latents: latent store.
        detectors: names.
        num_images: images to decode, and latents to read, of a seeded draw; ``None`` is all.
        output: folder of the run.
        resume: whether a run there is to be continued.
        device: ``auto`` takes the config's.
    """

    config: str | None = None
    overrides: Sequence[str] = ()
    filelist: Path | None = None
    basedir: Path | None = None
    columns: ListColumns = STANDARD
    checkpoint: str | Path | None = None
    latents: Path | None = None
    detectors: Sequence[str] = ()
    num_images: int | None = DEFAULT_IMAGES
    output: Path | None = None
    resume: bool = False
    device: str = "auto"


def check_run(request: CheckRequest, reporter: Reporter = SILENT) -> CheckResult:
    """Read what a run would read and return all that would fail; nothing is written.

    Args:
        request: what is to be checked; the embedded model, where it names nothing.
        reporter: receives progress.

    Example:
        >>> check_run(CheckRequest(config="finetune", filelist=Path("filelist.csv"))).num_problems
        0
    """
    work = _Check(request, reporter)
    work.vain_options()
    work.read_inputs()
    work.training()
    work.fit()
    work.detectors()
    work.trackers()
    work.device()
    work.output()
    return work.result()


class _Check:
    """Reads what a request names and collects findings.

    Args:
        request: what is to be checked.
        reporter: receives progress.

    Attributes:
        settings: the config, where it is valid.
        manifest: the images, where the list can be read.
        store: the latents, where they can be read.
        file: of the checkpoint, where there is one.
        start: the checkpoint, where it can be read.
        num_parameters: of the network that would be trained, as far as it is known.
        config_name: of the config, or the file of the run that is continued.
    """

    def __init__(self, request: CheckRequest, reporter: Reporter) -> None:
        self.request, self.reporter = request, reporter
        self.findings: list[Finding] = []
        self.num_decoded = 0
        self.unreadable: tuple[Unreadable, ...] = ()
        self.settings: AnyConfig | None = None
        self.manifest: Manifest | None = None
        self.store: LatentStore | None = None
        self.file: Path | None = None
        self.start: Checkpoint | None = None
        self.num_parameters = 0
        self.config_name = request.config
        if request.config is None and request.resume and request.output is not None:
            own = request.output / CONFIG_NAME
            self.config_name = str(own) if own.is_file() else None

    def result(self) -> CheckResult:
        levels = collections.Counter(finding.level for finding in self.findings)
        groups = list(dict.fromkeys(finding.group for finding in self.findings))
        return CheckResult(
            findings=tuple(sorted(self.findings, key=lambda f: groups.index(f.group))),
            num_problems=levels["problem"],
            num_warnings=levels["warning"],
            num_images_decoded=self.num_decoded,
            unreadable=self.unreadable,
        )

    def add(self, group: str, level: Level, what: str, remedy: str = "") -> None:
        self.findings.append(Finding(group=group, level=level, what=what, remedy=remedy))

    def problem(self, group: str, what: str, remedy: str) -> None:
        self.add(group, "problem", what, remedy)

    def warning(self, group: str, what: str, remedy: str) -> None:
        self.add(group, "warning", what, remedy)

    def fine(self, group: str, what: str) -> None:
        self.add(group, "fine", what)

    @contextlib.contextmanager
    def guard(self, group: str, remedy: str, *, level: Level = "problem") -> Iterator[None]:
        """Turn what a loader raises into findings, and go on after the block."""
        try:
            yield
        except (ConfigError, ManifestError) as error:
            for problem in error.problems:
                self.add(group, level, problem, remedy)
        except (LcmemError, OSError) as error:
            self.add(group, level, str(error), remedy)

    def vain_options(self) -> None:
        """Tell which parts of the request have no effect without others."""
        given = self.request
        if given.overrides and self.config_name is None:
            self.warning("config", "--set has no effect without --config", "pass --config too")
        if given.basedir is not None and given.filelist is None:
            self.warning("filelist", "--basedir has no effect without --filelist", "pass it too")
        if given.columns != STANDARD and given.filelist is None:
            text = "--path-column and the like have no effect without --filelist"
            self.warning("filelist", text, "pass it too")

    def read_inputs(self) -> None:
        """Read what the request names."""
        given = self.request
        if self.config_name is not None:
            self.settings = self.config(self.config_name, given.overrides)
        if given.filelist is not None:
            self.manifest = self.filelist(given.filelist, given)
        if self.manifest is not None:
            if not isinstance(self.settings, CodecConfig):  # which compares no images
                self.splits(self.manifest, self.settings)
            self.images(self.manifest)
        checkpoint = given.checkpoint
        if checkpoint is None and not (
            self.config_name or given.filelist or given.latents or given.detectors
        ):
            checkpoint = EMBEDDED
        if checkpoint is not None:
            self.file = self.locate(checkpoint)
        if self.file is not None:
            self.start = self.checkpoint(self.file, needs_thresholds=self.settings is None)
        if given.latents is not None:
            self.store = self.latents(given.latents)

    def training(self) -> None:
        """Check what the config's training needs."""
        if isinstance(self.settings, Stage1Config):
            self.stage1(self.settings)
        if isinstance(self.settings, FinetuneConfig):
            self.finetune(self.settings)
        if isinstance(self.settings, CodecConfig):
            self.codec_training(self.settings)

    def config(self, name: str, overrides: Sequence[str]) -> AnyConfig | None:
        path = None
        with self.guard("config", "pass a file, or one of those that lcmem config ls shows"):
            path = configs.find_config(name)
        if path is None:
            return None
        with self.guard("config", f"edit {path}, or pass --set section.key=value"):
            config = configs.validate(
                configs.apply_overrides(configs.read_toml(path), overrides), source=str(path)
            )
            self.fine("config", f"{path}: valid {config.kind} config")
            return config
        return None

    def filelist(self, source: Path, given: CheckRequest) -> Manifest | None:
        manifest, problems = inspect_manifest(source, basedir=given.basedir, columns=given.columns)
        for problem in problems:
            self.problem("filelist", problem, f"correct {source}, or pass another --basedir")
        if manifest is not None and not problems:
            counts = collections.Counter(record.split for record in manifest.records)
            shown = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
            self.fine("filelist", f"{source}: {len(manifest):,} images ({shown})")
        return manifest

    def splits(self, manifest: Manifest, config: Stage1Config | FinetuneConfig | None) -> None:
        """Check what training and evaluation need of each split."""
        trains = config is not None
        sampling = configs.SamplingSection() if config is None else config.sampling
        size = len(manifest) if config is None else config.schedule.batch_size
        batches: dict[str, list[PairBatch]] = {}
        for split in SPLITS:
            part = [record for record in manifest.records if record.split == split]
            if not part:
                level: Level = "problem" if trains and split != "TEST" else "warning"
                self.add("filelist", level, f"{split} is empty", "set the column Split of more ids")
                continue
            images = collections.Counter(record.identity for record in part)
            single = sum(count == 1 for count in images.values())
            if single and not sampling.unsupervised:
                self.warning(
                    "filelist",
                    f"{split}: {single:,} of {len(images):,} identities have no second image",
                    "they give no positive pair; add images, or take these ids out",
                )
            if split == "TEST":
                if single == len(images):
                    self.warning(
                        "filelist",
                        "TEST: no pair of one identity, for a benchmark",
                        "list ids with two images or more in TEST",
                    )
                continue
            with self.guard(
                "filelist", f"list more ids in {split}", level="problem" if trains else "warning"
            ):
                sampler = PairSampler(part, sampling, batch_size=size, seed=0)
                batches[split] = sampler.epoch(0) if split == "TRAIN" else sampler.validation()
        if trains and len(batches) == 2:
            with self.guard("filelist", "change the config, or list more ids"):
                check_batches(batches["TRAIN"], batches["VAL"])

    def images(self, manifest: Manifest) -> None:
        """Decode a draw of the images; those that a list names in vain are the list's problem."""
        is_folder = Path(manifest.source).is_dir()
        there = [
            manifest.records[row]
            for row in self._draw(len(manifest))
            if is_folder or is_there(manifest.basedir / manifest.records[row].path)
        ]
        if not there:
            return
        drawn = Manifest(tuple(there), manifest.basedir, manifest.source)
        kept, self.unreadable = readable_part(drawn, Compute(reporter=self.reporter))
        self.num_decoded = len(kept)
        if not self.unreadable:
            self.fine("images", f"{len(kept):,} of {len(manifest):,} decoded")
            return
        shown = "; ".join(f"{bad.path}: {bad.reason}" for bad in self.unreadable[:_SHOWN])
        more = "; ..." if len(self.unreadable) > _SHOWN else ""
        self.problem(
            "images",
            f"{len(self.unreadable):,} of {len(there):,} drawn cannot be read: {shown}{more}",
            "replace these files or take them out of the list, or run with --max-unreadable",
        )

    def _draw(self, count: int) -> list[int]:
        wanted = self.request.num_images
        if wanted is None or wanted >= count:
            return list(range(count))
        rng = np.random.default_rng(0)
        return sorted(rng.choice(count, wanted, replace=False).tolist())

    def locate(self, name: str | Path) -> Path | None:
        with self.guard("checkpoint", "name a file, or get it on a machine with internet"):
            return locate_checkpoint(name)
        return None

    def checkpoint(self, path: Path, *, needs_thresholds: bool) -> Checkpoint | None:
        with self.guard("checkpoint", "get the file again, or make it with lcmem convert"):
            loaded = load_checkpoint(path)
            loaded.build(source=str(path))
            self.fine(
                "checkpoint",
                f"{path}: {loaded.stage}, {loaded.image_size} px, fingerprint {loaded.fingerprint}",
            )
            self._thresholds(path, loaded, needed=needs_thresholds)
            self._codec(path, loaded)
            return loaded
        return None

    def _thresholds(self, path: Path, loaded: Checkpoint, *, needed: bool) -> None:
        remedy = f"fit some with: lcmem calibrate {path}"
        with self.guard("checkpoint", remedy):
            for threshold in loaded.thresholds:
                threshold.check(loaded.fingerprint)
            names = ", ".join(threshold.name for threshold in loaded.thresholds)
            if names:
                self.fine("checkpoint", f"thresholds {names}")
            elif needed:
                self.warning("checkpoint", "no thresholds: scores without verdict", remedy)

    def _codec(self, path: Path, loaded: Checkpoint) -> None:
        spec = loaded.codec
        if loaded.codec_state is None and needs_download(spec.name, spec.revision):
            self.absent("codec", f"codec {spec.name}", "pass a copy of its folder with --codec")
            return
        with self.guard("codec", "pass the folder of the codec that it needs with --codec"):
            codec = load_codec_of(loaded, source=str(path))
            self.fine("codec", codec.spec.describe())

    def absent(self, group: str, what: str, remedy: str) -> None:
        """Record weights that would have to be downloaded."""
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            self.add(group, "problem", f"{what}: not on this machine, which is offline", remedy)
        else:
            self.add(
                group, "warning", f"{what}: not on this machine; the run would download it", remedy
            )

    def latents(self, folder: Path) -> LatentStore | None:
        with self.guard("latents", "run the same lcmem latents command again"):
            store = LatentStore.open(folder)
            store.measure()
            if self.request.num_images is None:
                store.verify()
            for row in [] if self.request.num_images is None else self._draw(len(store)):
                store.latents([row])  # compares its shard with the checksum
            self.fine(
                "latents",
                f"{folder}: {len(store):,} of {store.image_size} px by {store.spec.describe()}",
            )
            return store
        return None

    def stage1(self, config: Stage1Config) -> None:
        """Check what ``train-stage1`` needs."""
        store, spec = self.store, None if self.store is None else self.store.spec
        has_latents = self.request.latents is not None
        has_images = self.request.filelist is not None
        if has_latents or has_images:
            vain = has_latents and config.codec.name == PIXELS
            with self.guard(
                "inputs", "give train-stage1 what its config trains on",
                level="problem" if vain else "warning",
            ):  # fmt: skip
                inputs.check_stage1_inputs(config, has_latents=has_latents, has_images=has_images)
        if store is not None:
            with self.guard("latents", "change the config, or make the latents anew"):
                inputs.check_store(config, store)
        elif not has_latents:
            spec = self._config_codec(config)
        backbone = None
        with self.guard("network", "correct network.backbone"):
            backbone = resolve_backbone(config.network.backbone)
        if backbone is not None:
            with self.guard("network", "set network.weights to weights of network.backbone"):
                self._weights(config, backbone)
        for name, file in config.retention.panel.items():
            with self.guard("network", f"set retention.panel to a file of {name}'s weights"):
                load_pretrained(name, Path(file))
        if spec is not None and backbone is not None:
            self._stage1_network(config, spec)

    def _config_codec(self, config: Stage1Config) -> CodecSpec | None:
        name, revision = config.codec.name, config.codec.revision
        if needs_download(name, revision):
            self.absent("codec", f"codec {name}", "set codec.name to a copy of its folder")
            return None
        with self.guard("codec", "set codec.name to a diffusers folder, a hub id or 'embedded'"):
            codec = load_codec(name, revision=revision, input_range=config.codec.input_range)
            self.fine("codec", codec.spec.describe())
            return codec.spec
        return None

    def _stage1_network(self, config: Stage1Config, spec: CodecSpec) -> None:
        store = self.store
        if store is None and config.network.normalisation == "dataset":
            self.warning(
                "network",
                "not tried: its normalisation is by statistics of latents",
                "pass --latents too",
            )
            return
        size = config.image.size if store is None else store.image_size
        random = config.network.model_copy(update={"weights": "random"})
        with self.guard("network", "correct the key that it is about"):
            config = config.model_copy(update={"network": random})
            self._count(inputs.stage1_network(config, spec, size, store))

    def _count(self, network: SiameseNetwork) -> None:
        self.num_parameters = sum(value.numel() for value in network.parameters())
        self.fine("network", f"{network.spec.backbone}: {self.num_parameters:,} parameters")

    def _weights(self, config: Stage1Config, backbone: str) -> None:
        """Check the weights that a backbone, by timm's name, begins with."""
        if config.network.weights == "random":
            return
        if config.network.weights != "timm":
            load_pretrained(backbone, Path(config.network.weights))
            return
        hub_id = _timm_hub_id(backbone)
        if not hub_id:
            self.problem(
                "network",
                f"{backbone}: timm has no pretrained weights",
                'set network.weights to a file, or to "random"',
            )
        elif cached_weights(hub_id) is None:
            self.absent("network", f"weights {hub_id}", "set network.weights to a file")

    def finetune(self, config: FinetuneConfig) -> None:
        """Check what ``finetune`` needs."""
        path, start = self.file, self.start
        if path is None:
            self.warning(
                "inputs",
                "fine-tuning starts from a checkpoint, which was not given",
                "pass --checkpoint to have it checked too",
            )
        if path is None or start is None:
            return
        with self.guard("network", "correct the key that it is about, or leave it unset"):
            built = inputs.finetune_network(config, start, source=str(path))
            self._count(built)
            if config.retention.weight:
                with self.guard("inputs", "set retention.teacher, or retention.weight = 0"):
                    inputs.load_teacher(inputs.teacher_file(config, path), built)

    def codec_training(self, config: CodecConfig) -> None:
        """Check what ``train-codec`` needs."""
        counts = {"TRAIN": 1, "VAL": 1}
        if self.manifest is not None:
            for split in counts:
                counts[split] = sum(record.split == split for record in self.manifest.records)
        with self.guard("inputs", "change the config, or the splits of the filelist"):
            autoencoder.check_inputs(config, counts["TRAIN"], counts["VAL"])
        with self.guard("network", "change the section [model]"):
            model = autoencoder.build_autoencoder(config)
            self.num_parameters = sum(value.numel() for value in model.parameters())

    def fit(self) -> None:
        """Check that the inputs belong together."""
        config, manifest, store, start = self.settings, self.manifest, self.store, self.start
        if store is not None and manifest is not None and store.manifest_digest != manifest.digest:
            self._fit_latents(config, manifest, store)
        if start is None:
            return
        if store is not None and config is None:
            with self.guard("latents", "encode the images with the checkpoint's codec and size"):
                check_latents(LCMemDetector(start, name=str(self.file)), store)
        if (
            isinstance(config, FinetuneConfig)
            and manifest
            and inputs.is_other_list(start, manifest)
        ):
            self.warning(
                "checkpoint",
                inputs.OTHER_LIST.format(source=self.file),
                "use the filelist of stage 1, or do not rely on the TEST results",
            )

    def _fit_latents(
        self, config: AnyConfig | None, manifest: Manifest, store: LatentStore
    ) -> None:
        listed = {record.path for record in manifest.records}
        encoded = {record.path for record in store.records}
        left_out = {bad.path for bad in store.unreadable}
        aligns = isinstance(config, Stage1Config) and config.network.align_stem > 0
        lacking = listed - encoded - left_out
        if lacking:
            self.add(
                "latents",
                "warning" if isinstance(config, Stage1Config) else "problem",
                f"{store.folder}: has no latents of {len(lacking):,} of {len(listed):,} listed "
                f"images, such as {min(lacking)!r}",
                "make them with lcmem latents on the same filelist",
            )
        unlisted = encoded - listed
        if unlisted:
            self.add(
                "latents",
                "problem" if aligns else "warning",
                f"{store.folder}: {len(unlisted):,} of its {len(encoded):,} images are not in the "
                f"filelist, such as {min(unlisted)!r}",
                "use the filelist that the latents were made of",
            )
        if not lacking and not unlisted:
            self.warning(
                "latents",
                f"{store.folder}: ids or splits differ from the filelist's; training uses those "
                "of the store",
                "make the latents anew where the filelist is right",
            )

    def detectors(self) -> None:
        """Check that each detector can be loaded."""
        for name in self.request.detectors:
            with self.guard("detectors", "see: lcmem detectors"):
                self._detector(take_label(name)[1])

    def _detector(self, name: str) -> None:
        kind, target, options = check_name(name)
        status, _ = kind.status()
        here = bool(options.get("weights")) or Path(target or "nosuch").exists()
        if kind.name == "timm" and not here:
            hub_id = _timm_hub_id(target)  # without one, loading says what is wrong
            here = not hub_id or cached_weights(hub_id) is not None
        if status == "needs a download" and not here:
            self.absent("detectors", name, f"fetch its weights first ({kind.weights})")
            return
        detector = load_detector(name)
        if isinstance(detector, LCMemDetector):
            spec = detector.checkpoint.codec
            inside = detector.checkpoint.codec_state is not None
            if not inside and needs_download(options.get("codec") or spec.name):
                self.absent("detectors", f"{name}: codec {spec.name}", "pass ?codec=FOLDER")
                return
            _ = detector.codec
        self.fine(
            "detectors",
            f"{name}: {detector.input_size} px, fingerprint {detector.fingerprint[:12]}",
        )

    def trackers(self) -> None:
        config = self.settings
        if config is not None and config.runtime.trackers:
            with self.guard("trackers", "install it, or leave it out of runtime.trackers"):
                check_trackers(config.runtime)
                self.fine("trackers", ", ".join(config.runtime.trackers))

    def device(self) -> None:
        config, device = self.settings, self.request.device
        if device == "auto" and config is not None:
            device = config.runtime.device
        with self.guard("device", "choose another device: auto, cpu, cuda or mps"):
            found = resolve_device(device)
            self.fine("device", f"{device}: computes on {found}")
            if config is not None and not isinstance(config, CodecConfig):
                with self.guard("device", 'set runtime.mixed_precision to "auto"'):
                    training_precision(config.runtime, torch.device(found))

    def output(self) -> None:
        """Check that a run can write its folder, and whether one was begun there."""
        folder, config = self.request.output, self.settings
        if folder is not None and self._has_room(folder):
            self._what_is_there(folder)
        if self.request.resume and (folder is None or config is None):
            self.warning(
                "output",
                "--resume has no effect without --output, nor where there is no run nor --config",
                "pass them too",
            )

    def _has_room(self, folder: Path) -> bool:
        """Check permission and space; only a nameless file is made, and vanishes."""
        there = folder.absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            self.problem("output", f"{there}: is no folder", "choose another --output")
            return False
        try:
            with tempfile.TemporaryFile(dir=there):
                free = shutil.disk_usage(there).free
        except OSError as error:
            self.problem(
                "output",
                f"{there}: cannot write here ({error.strerror or error})",
                "choose another --output, or change its permissions",
            )
            return False
        num_bytes = _estimate(self.settings, self.num_parameters)
        room = f"{free / 1e9:,.1f} GB free, about {num_bytes / 1e9:,.2f} GB needed"
        if num_bytes > free:
            self.problem("output", f"{there}: {room}", "choose a folder on a larger disk")
        else:
            self.fine("output", f"{folder}: {room}")
        return True

    def _what_is_there(self, folder: Path) -> None:
        if (folder / LOCK_NAME).exists():
            with self.guard("output", "wait for that process"), folder_lock(folder):
                pass
        if self.settings is not None and self._run_there(folder, self.settings):
            return
        if folder.is_dir() and any(p.name != LOCK_NAME for p in folder.iterdir()):
            self.warning(
                "output",
                f"{folder}: is not empty",
                "results of another study would be refused; choose another folder",
            )

    def _run_there(self, folder: Path, config: AnyConfig) -> bool:
        """Check whether a training may go on in a folder; return whether one was begun there."""
        with self.guard("output", "continue it with the config in it, or choose another folder"):
            if not check_continues(folder, config):
                return False
            if self.request.resume:
                self.fine("output", f"{folder}: holds a run that can go on")
            else:
                self.problem(
                    "output",
                    f"{folder}: holds a training run already",
                    "continue it with --resume, or choose another folder",
                )
        return True


def _timm_hub_id(name: str) -> str:
    """Return where timm's weights of a model are, or nothing where it has none."""
    import timm

    pretrained = timm.get_pretrained_cfg(name)
    return str(pretrained.hf_hub_id or "") if pretrained else ""


def _estimate(config: AnyConfig | None, num_parameters: int) -> int:
    """Return about how many bytes a run writes at most, old and new state side by side."""
    copies = 0
    if isinstance(config, CodecConfig):
        copies = 2 * (1 + 2) + 1  # states of weights and Adam's moments, and the codec
    elif config is not None:
        state = 1 + 2 + 1 + (config.optimiser.ema_decay > 0)  # also the best and the average
        copies = 2 * state + 2  # and the checkpoint and the teacher
    return copies * num_parameters * _FLOAT_BYTES + _SMALL_FILES_BYTES
