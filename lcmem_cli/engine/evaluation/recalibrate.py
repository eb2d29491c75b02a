"""Fitting a checkpoint anew to the user's own data: its thresholds, size and last layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.augment import Augmentation
from lcmem_cli.engine.data.loading import Transform, hash_files, iter_readable
from lcmem_cli.engine.data.manifest import Manifest, load_manifest
from lcmem_cli.engine.detectors.adapted import (
    MIN_IMAGES,
    picture_weights,
    shrunk_whitening,
    some_images,
)
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.distributed import resolve_device, resolve_workers
from lcmem_cli.engine.errors import InputError, NotAdaptableError
from lcmem_cli.engine.evaluation.calibration import required_negatives
from lcmem_cli.engine.evaluation.judge import (
    FITTED_RATES,
    ScoredSplit,
    embed_split,
    fit_thresholds,
    judge,
)
from lcmem_cli.engine.files import check_writable
from lcmem_cli.engine.models.checkpoint import (
    SUFFIX,
    Checkpoint,
    halve,
    load_checkpoint,
    save_checkpoint,
)
from lcmem_cli.engine.models.codec_loading import load_codec_of
from lcmem_cli.engine.models.hub import locate_checkpoint
from lcmem_cli.engine.models.siamese import SiameseNetwork
from lcmem_cli.engine.models.whitening import whitened_projection
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Threshold, Unreadable, check_unreadable

_BATCH = 32
_ALTERED = "strong"
_FEWEST = 2
"""Images that a last layer can be fitted to."""
_WHITEN_FLOOR = 0.02
"""As ``whitened_projection``'s ``floor``; lower than a training's start, which stays in motion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationResult(Result):
    """A checkpoint with new thresholds.

    Attributes:
        checkpoint: file that was written.
        fingerprint: its fingerprint.
        num_bytes: its size.
        thresholds: fitted on VAL.
        adapted_thresholds: the same for the network adapted to each data set, see ``recalibrate``.
        test_auc: AUC per data set and overall on TEST, where there is one.
        unreadable: images left out.
    """

    checkpoint: str
    fingerprint: str
    num_bytes: int
    thresholds: tuple[Threshold, ...]
    adapted_thresholds: tuple[Threshold, ...]
    test_auc: dict[str, dict[str, Any]]
    unreadable: tuple[Unreadable, ...]


def recalibrate(
    checkpoint: str | Path,
    filelist: Path,
    *,
    output: Path,
    basedir: Path | None = None,
    half: bool = False,
    size: int | None = None,
    adapted: bool = False,
    whitened: bool = False,
    inner_bands: int | None = None,
    seed: int = 0,
    max_unreadable: int | None = None,
    workers: int = -1,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> CalibrationResult:
    """Fit thresholds for per-pair rates on VAL and write the checkpoint with them.

    Args:
        checkpoint: what to start from, see ``locate_checkpoint``; left as it is.
        filelist: images with identities and splits (one is made where there is none).
        output: file to write.
        basedir: folder that paths start from.
        half: round the network's weights to float16 first, which halves the file.
        size: side in pixels that images are brought to from now on; ``None`` keeps the trained one.
            Objects look larger in random crops than in whole images, so somewhat more than the
            size of training is often better (Touvron et al. 2019, arXiv 1906.06423).
        adapted: adapt the last layer to the list's TRAIN images first, see ``adapt``. Then a list
            with too few VAL pairs gives a checkpoint without thresholds.
        whitened: fit the last layer to the list's TRAIN images first, see ``Whitening``. Where
            these are of several data sets, the thresholds are for images of yet another kind: each
            data set's pairs are scored with a last layer that was fitted without it. So are further
            thresholds, for which that layer is adapted to the data set's TRAIN images.
        inner_bands: for ``Whitening``.
        seed: for ``Whitening``.
        max_unreadable: unreadable VAL and TEST images to tolerate; ``None``: any number.
        workers: decoding threads.
        device: where to compute.
        reporter: receives progress.

    Raises:
        UnreadableLimitError: more images than ``max_unreadable`` could not be read.
        InputError: ``output`` is no ``.safetensors`` file, VAL holds too few pairs for any
            threshold, the codec cannot take the size, or ``adapted`` and ``whitened`` are
            both asked for.
        CheckpointError: the network's weights do not fit another size.
    """
    if adapted and whitened:
        raise InputError("whitening fits the same layer; leave --adapt out")
    if inner_bands is not None and not whitened:
        raise InputError("--bands has no effect without --whiten")
    check_writable(output, suffix=SUFFIX)
    loaded = load_checkpoint(locate_checkpoint(checkpoint))
    if size is not None:
        loaded = loaded.at_size(size)
    manifest = load_manifest(filelist, basedir=basedir, max_missing=max_unreadable)
    train = manifest.select("TRAIN")
    if adapted:
        loaded = adapt(loaded, train, workers=workers, device=device, reporter=reporter)
    whitening = None
    if whitened:
        _check_remainder(manifest)
        whitening = Whitening.of(
            loaded, train, inner_bands=inner_bands, seed=seed, workers=workers, device=device,
            reporter=reporter,
        )  # fmt: skip
        loaded = whitening.fitted()
    if half:
        loaded = halve(loaded)
    compute = Compute(device=device, workers=workers, reporter=reporter)
    judged = judge(loaded, manifest, compute)
    check_unreadable(judged.unreadable, max_unreadable)
    _check_thresholds(judged.thresholds, filelist, needed=not adapted, reporter=reporter)
    loaded = dataclasses.replace(loaded, thresholds=judged.thresholds)
    if whitening is not None and len({record.ds_name for record in train.records}) > 1:
        plain, adapted_to_each = _strangers_thresholds(
            whitening, manifest, loaded.fingerprint, compute
        )
        loaded = dataclasses.replace(loaded, thresholds=plain, adapted_thresholds=adapted_to_each)
    saved = save_checkpoint(output, loaded)
    return CalibrationResult(
        checkpoint=str(output),
        fingerprint=saved.fingerprint,
        num_bytes=output.stat().st_size,
        thresholds=saved.thresholds,
        adapted_thresholds=saved.adapted_thresholds,
        test_auc=judged.auc,
        unreadable=judged.unreadable,
    )


def adapt(
    checkpoint: Checkpoint,
    manifest: Manifest,
    *,
    workers: int = -1,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> Checkpoint:
    """Return a checkpoint whose last layer is adapted to one kind of images.

    Nearly what ``detectors.adapted`` does to features of one length, done once and for all to the
    layer that makes them, before they have one length: they are centred, and the directions in
    which they differ most are made smaller. The images' identities are not used.

    Args:
        checkpoint: its backbone ends in a linear layer with a bias, which is changed.
        manifest: images of the kind, ten or more.
        workers: decoding threads.
        device: where to compute.
        reporter: receives progress.

    Raises:
        InputError: too few images, one that cannot be read, or another kind of backbone.
    """
    if len(manifest.records) < MIN_IMAGES:
        raise InputError(
            f"{len(manifest.records)} TRAIN images are too few to adapt to; {MIN_IMAGES} or more "
            "are needed"
        )
    last = _LastLayer(checkpoint, device=device)
    inputs = last.inputs(manifest, workers=workers, reporter=reporter).double()
    weight, bias = (checkpoint.network_state[f"{last.name}.{key}"] for key in ("weight", "bias"))
    outputs = (inputs @ weight.double().T + bias.double()).numpy()
    weights = picture_weights(outputs / np.linalg.norm(outputs, axis=1, keepdims=True))
    centre, matrix = map(torch.from_numpy, shrunk_whitening(outputs, weights))
    replaced = {
        f"{last.name}.weight": (matrix @ weight.double()).to(weight),
        f"{last.name}.bias": (matrix @ (bias.double() - centre)).to(bias),
    }
    training = {
        **checkpoint.training,
        "adapted": {"data_digest": manifest.digest, "num_images": len(manifest)},
    }
    contents = hash_files(manifest.paths(), Compute(workers=workers))[0]
    return checkpoint.changed(
        network_state=checkpoint.network_state | replaced,
        training=training,
        adapted_to=tuple(sorted({*filter(None, contents), *checkpoint.adapted_to})),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whitening:
    """Fits a last layer that gives the whitened principal components of its input.

    In closed form, to images and one altered copy of each (augmentation ``strong``): what edits
    change and what sets images of one identity apart counts less, see ``whitened_projection``.
    The head becomes a plain distance.

    Attributes:
        checkpoint: its last layer is to be replaced; its head is the plain distance.
        layer: name of that layer.
        widths: columns of each level of its inputs.
        manifest: the images.
        pooled: the layer's inputs of the images, ``[N, d]``.
        changes: how those of an altered copy of each image differ, ``[N, d]``.
        seed: of the copies, and of the turn of the components.
    """

    checkpoint: Checkpoint
    layer: str
    widths: tuple[int, ...]
    manifest: Manifest
    pooled: torch.Tensor
    changes: torch.Tensor
    seed: int

    @staticmethod
    def of(
        checkpoint: Checkpoint,
        manifest: Manifest,
        *,
        inner_bands: int | None = None,
        seed: int = 0,
        workers: int = -1,
        device: str = "auto",
        reporter: Reporter = SILENT,
    ) -> Whitening:
        """Compute what the last layer is given for all images.

        Args:
            checkpoint: its backbone ends in a linear layer with a bias.
            manifest: images of the domain, more than there are features. Where each has an
                identity of its own, only their edits count less.
            inner_bands: let the backbone show so many bands as well, see ``TwoLevelBackbone``;
                ``None`` keeps what it shows.
            seed: of the copies, and of the turn of the components.
            workers: decoding threads.
            device: where to compute.
            reporter: receives progress.

        Raises:
            InputError: fewer than two images, one that cannot be read, or another kind of backbone.
        """
        if len(manifest.records) < _FEWEST:
            raise InputError(f"{len(manifest.records)} TRAIN images are too few to whiten on")
        if inner_bands is not None:
            checkpoint = _with_bands(checkpoint, inner_bands)
        last = _LastLayer(checkpoint, device=device)
        network = last.network
        network.measure_distance()
        state = checkpoint.network_state
        head = {f"head.{key}": value for key, value in network.head.state_dict().items()}
        head = {key: value.cpu().to(state[key]) for key, value in head.items()}
        pooled = last.inputs(manifest, workers=workers, reporter=reporter)
        altered = last.inputs(
            manifest,
            transform=Augmentation.from_preset(_ALTERED).drawn(len(pooled), seed),
            workers=workers,
            reporter=reporter,
        )
        return Whitening(
            checkpoint=dataclasses.replace(checkpoint, network_state=state | head),
            layer=last.name,
            widths=tuple(getattr(network.backbone, "widths", [pooled.shape[1]])),
            manifest=manifest,
            pooled=pooled,
            changes=altered - pooled,
            seed=seed,
        )

    def fitted(self, *, without: str | None = None) -> Checkpoint:
        """Return the checkpoint with the last layer of all images, or of all but one data set.

        Raises:
            InputError: fewer than two images are left.
        """
        records = self.manifest.records
        rows = [row for row, r in enumerate(records) if without is None or r.ds_name != without]
        if len(rows) < _FEWEST:
            raise InputError(f"{len(rows)} TRAIN images without data set {without} are too few")
        numbers: dict[tuple[str, str], int] = {}
        pooled, checkpoint = self.pooled[rows], self.checkpoint
        projection = whitened_projection(
            pooled,
            self.widths,
            num_features=checkpoint.network.num_features,
            seed=self.seed,
            changes=self.changes[rows],
            identities=[numbers.setdefault(records[r].identity, len(numbers)) for r in rows],
            floor=_WHITEN_FLOOR,
        )
        replaced = {
            f"{self.layer}.weight": projection,
            f"{self.layer}.bias": -(projection @ pooled.mean(dim=0).double()),
        }
        state = checkpoint.network_state
        state = state | {k: value.to(state[k]) for k, value in replaced.items()}
        training = {
            **{key: value for key, value in checkpoint.training.items() if key != "adapted"},
            "whitened": {
                "data_digest": self.manifest.digest,
                "num_images": len(rows),
                "num_identities": len(numbers),
                "altered": _ALTERED,
                "seed": self.seed,
            },
        }
        return checkpoint.changed(network_state=state, training=training, adapted_to=())


def _check_thresholds(
    thresholds: tuple[Threshold, ...], filelist: Path, *, needed: bool, reporter: Reporter
) -> None:
    """Say which thresholds VAL has too few pairs for.

    Raises:
        InputError: there is none, and one is needed.
    """
    if not thresholds:
        lacking = (
            f"{filelist}: VAL has too few pairs for a threshold: it needs identities with two or "
            "more images, and at least 100 pairs of different identities within a data set"
        )
        if needed:
            raise InputError(lacking)
        reporter.warn(lacking)
        return
    fitted = {(threshold.kind, threshold.rate) for threshold in thresholds}
    for kind, rate in FITTED_RATES:
        if kind == "fpr" and (kind, rate) not in fitted:
            reporter.warn(
                f"no threshold fpr{rate:g}: it needs {required_negatives(rate):,} negative VAL "
                f"pairs within data sets, there are {thresholds[0].num_negatives:,}"
            )


def _check_remainder(manifest: Manifest) -> None:
    """Refuse, before any work, a list of which too little is left without one of its data sets."""
    names = [record.ds_name for record in manifest.select("TRAIN").records]
    for name in dict.fromkeys(record.ds_name for record in manifest.select("VAL").records):
        rest = len(names) - names.count(name)
        if 0 < rest < _FEWEST:
            raise InputError(
                f"without data set {name} only {rest} TRAIN images are left, too few for a last "
                "layer that its thresholds could be fitted with; list that data set alone, or more "
                "images of the others"
            )


def _own_part(manifest: Manifest, name: str | None) -> Manifest:
    """Return the images of a data set; of those of TRAIN only as many as are adapted to."""
    own = [record for record in manifest.records if record.ds_name == name]
    train = some_images([record for record in own if record.split == "TRAIN"])
    rest = [record for record in own if record.split != "TRAIN"]
    return dataclasses.replace(manifest, records=(*train, *rest))


def _strangers_thresholds(
    whitening: Whitening, manifest: Manifest, fingerprint: str, compute: Compute
) -> tuple[tuple[Threshold, ...], tuple[Threshold, ...]]:
    """Fit thresholds on VAL, each data set scored with a last layer that was fitted without it.

    Among images of a kind that a last layer was not fitted to, all pairs are alike to it: at the
    threshold that 1 % of the negative pairs of known kinds pass, half of theirs may.

    Returns:
        Thresholds for the last layer as it is, and for one that is adapted to the kind of images,
        as it is here to each data set's TRAIN images, where there are enough of them.
    """
    scored, adapted = [], []
    names = dict.fromkeys(record.ds_name for record in manifest.select("VAL").records)
    for name in names:
        detector = LCMemDetector(
            whitening.fitted(without=name),
            name="checkpoint",
            device=resolve_device(compute.device),
        )
        own = _own_part(manifest, name)
        records, features, _ = embed_split(detector, own, "VAL", compute)
        if not records:
            continue
        scored.append(ScoredSplit.of(detector, features, records))
        bank, bank_features, _ = embed_split(detector, own, "TRAIN", compute)
        try:
            kind = detector.adapted(bank_features, [record.path for record in bank])
        except NotAdaptableError as error:
            compute.reporter.event("not_adapted", data_set=name, reason=str(error))
            continue
        adapted.append(ScoredSplit.of(kind.detector, kind.convert(features), records))
    by = ", each scored by a last layer that was fitted without it"
    return (
        fit_thresholds(scored, fingerprint, by=by),
        fit_thresholds(adapted, fingerprint, by=f"{by} and adapted to its TRAIN images"),
    )


def _with_bands(checkpoint: Checkpoint, inner_bands: int) -> Checkpoint:
    """Return a checkpoint that shows bands, with random weights in the layer that reads them."""
    if checkpoint.network.inner_stride is None:
        raise InputError("--bands: the checkpoint's network reads no earlier stage (inner_stride)")
    spec = dataclasses.replace(checkpoint.network, inner_bands=inner_bands)
    network = SiameseNetwork(spec)
    layer = _last_layer(network)
    state = {
        key: network.state_dict()[key] if key.startswith(f"{layer}.") else value
        for key, value in checkpoint.network_state.items()
    }
    return dataclasses.replace(checkpoint, network=spec, network_state=state)


class _LastLayer:
    """The linear layer that a checkpoint's backbone ends in.

    Args:
        checkpoint: whose it is.
        device: where to compute.

    Attributes:
        network: the checkpoint's, as it was trained.
        name: of the layer among the network's modules.

    Raises:
        InputError: the backbone ends in another way.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str) -> None:
        where = resolve_device(device)
        self.network = checkpoint.build().to(where)
        self.name = _last_layer(self.network)
        self._codec = load_codec_of(checkpoint, source="checkpoint", device=where)
        self._image_size = checkpoint.image_size

    @torch.inference_mode()
    def inputs(
        self,
        manifest: Manifest,
        *,
        transform: Transform | None = None,
        workers: int,
        reporter: Reporter,
    ) -> torch.Tensor:
        """Return what the layer is given for each image, ``[N, d]`` float32 on the CPU.

        Raises:
            InputError: an image cannot be read.
        """
        seen: list[torch.Tensor] = []
        hook = self.network.get_submodule(self.name).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].float().cpu())
        )
        batches = iter_readable(
            manifest.paths(),
            self._image_size,
            task_name="features" if transform is None else "features of altered copies",
            workers=resolve_workers(workers),
            batch_size=_BATCH,
            transform=transform,
            reporter=reporter,
        )
        for images in batches:
            self.network(self._codec.encode(images))
        hook.remove()
        return torch.cat(seen)


def _last_layer(network: SiameseNetwork) -> str:
    """Return the name of the linear layer that the backbone ends in.

    Raises:
        InputError: it ends in another way.
    """
    backbone: Any = network.backbone
    last = backbone.get_classifier()
    if not isinstance(last, nn.Linear) or last.bias is None:
        raise InputError(
            f"backbone {network.spec.backbone} does not end in one linear layer with a bias that "
            "could be fitted"
        )
    name: str = next(name for name, module in network.named_modules() if module is last)
    return name
