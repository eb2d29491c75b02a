"""Fitting a checkpoint's thresholds anew, on the user's own data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.judge import judge
from lcmem_cli.engine.models.checkpoint import halve, load_checkpoint, save_checkpoint
from lcmem_cli.engine.models.hub import locate_checkpoint
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Threshold, Unreadable


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
        workers: decoding threads.
        device: where to compute.
        reporter: receives progress.

    Raises:
        InputError: VAL holds too few pairs for any threshold.
    """
    loaded = load_checkpoint(locate_checkpoint(checkpoint))
    if half:
        loaded = halve(loaded)
    judged = judge(
        loaded,
        load_manifest(filelist, basedir=basedir),
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
