"""Fitting a checkpoint anew to the user's own data: its thresholds, size and centre."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lcmem_cli.engine.data.manifest import Manifest, load_manifest
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.judge import judge
from lcmem_cli.engine.models.checkpoint import (
    Checkpoint,
    halve,
    load_checkpoint,
    save_checkpoint,
)
from lcmem_cli.engine.models.hub import locate_checkpoint
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Threshold, Unreadable

_SATURATED = 1e-6
"""Distance from 0 and 1 below which a feature's value before the sigmoid is not known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationResult(Result):
    """A checkpoint with new thresholds.

    Attributes:
        checkpoint: file that was written.
        fingerprint: its fingerprint.
        num_bytes: its size.
        thresholds: fitted on VAL.
        test_auc: AUC per data set and overall on TEST, where there is one.
        unreadable: images left out.
    """

    checkpoint: str
    fingerprint: str
    num_bytes: int
    thresholds: tuple[Threshold, ...]
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
    centred: bool = False,
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
        centred: centre the features on the list's TRAIN images first, see ``recentre``.
        workers: decoding threads.
        device: where to compute.
        reporter: receives progress.

    Raises:
        InputError: VAL holds too few pairs for any threshold, or the codec cannot take the size.
        CheckpointError: the network's weights do not fit another size.
    """
    loaded = load_checkpoint(locate_checkpoint(checkpoint))
    if size is not None:
        loaded = loaded.at_size(size)
    manifest = load_manifest(filelist, basedir=basedir)
    if centred:
        loaded = recentre(
            loaded, manifest.select("TRAIN"), workers=workers, device=device, reporter=reporter
        )
    if half:
        loaded = halve(loaded)
    judged = judge(
        loaded,
        manifest,
        workers=workers,
        device=device,
        reporter=reporter,
    )
    if not judged.thresholds:
        raise InputError(
            f"{filelist}: VAL has too few pairs for a threshold: it needs identities with two or "
            "more images, and at least 100 pairs of different identities within a data set"
        )
    saved = save_checkpoint(output, dataclasses.replace(loaded, thresholds=judged.thresholds))
    return CalibrationResult(
        checkpoint=str(output),
        fingerprint=saved.fingerprint,
        num_bytes=output.stat().st_size,
        thresholds=saved.thresholds,
        test_auc=judged.auc,
        unreadable=judged.unreadable,
    )


def recentre(
    checkpoint: Checkpoint,
    manifest: Manifest,
    *,
    workers: int = -1,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> Checkpoint:
    """Return a checkpoint whose last layer has mean 0 over these images, before any scaling.

    What all images of one kind share (a chest, a face) says nothing about which person it is, and
    moves features to the sigmoid's ends. The images' identities are not used.

    Args:
        checkpoint: its backbone ends in a linear layer with a bias, which is changed.
        manifest: images of the domain, some hundred or more.
        workers: decoding threads.
        device: where to compute.
        reporter: receives progress.

    Raises:
        InputError: no image, one that cannot be read, or another kind of backbone.
    """
    unscaled = dataclasses.replace(checkpoint.network, feature_rms=None)
    detector = LCMemDetector(
        dataclasses.replace(checkpoint, network=unscaled),
        name="checkpoint",
        device=resolve_device(device),
    )
    backbone: Any = detector.network.backbone
    last = backbone.get_classifier()
    if not isinstance(last, nn.Linear) or last.bias is None:
        raise InputError(
            f"backbone {checkpoint.network.backbone} does not end in one linear layer with a bias; "
            "it cannot be recentred"
        )
    if not manifest.records:
        raise InputError("there is no TRAIN image to recentre on")
    embedded = embed_files(detector, manifest.paths(), workers=workers, reporter=reporter)
    for bad in embedded.unreadable:
        raise InputError(f"{bad.path}: {bad.reason}")
    features = torch.from_numpy(np.asarray(embedded.features, dtype=np.float64))
    mean = torch.logit(features, eps=_SATURATED).mean(dim=0)
    [layer] = [name for name, module in backbone.named_modules() if module is last]
    key = f"backbone.{layer}.bias"
    bias = checkpoint.network_state[key]
    state = {**checkpoint.network_state, key: (bias - mean).to(bias.dtype)}
    training = {
        **checkpoint.training,
        "recentred": {"data_digest": manifest.digest, "num_images": len(features)},
    }
    return dataclasses.replace(
        checkpoint, network_state=state, thresholds=(), training=training
    ).with_fingerprint()
