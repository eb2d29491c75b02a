"""``lcmem robustness``: do edited copies still match?"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    AnyUnreadableOption,
    BasedirOption,
    BatchSizeOption,
    CacheOption,
    DatasetsOption,
    DetectorsOption,
    Device,
    DeviceOption,
    FilelistOption,
    FitSplitOption,
    InputSizeOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    SeedOption,
    SplitOption,
    StrictOption,
    WorkersOption,
    split_names,
)

if TYPE_CHECKING:
    from pathlib import Path

    from lcmem_cli.engine.evaluation.robustness import RobustnessOfDetector, RobustnessResult


class SuiteChoice(str, enum.Enum):
    """Which edits are made."""

    REFERENCE = "reference"
    EXTENDED = "extended"


class FitChoice(str, enum.Enum):
    """What the thresholds hold."""

    FPR = "fpr"
    RECALL = "recall"


def robustness_command(
    filelist: FilelistOption,
    output: OutputOption,
    basedir: BasedirOption = None,
    detectors: DetectorsOption = "lcmem,mse,ssim,ncc,phash,random",
    ds_name: DatasetsOption = None,
    suite: Annotated[
        SuiteChoice, typer.Option("--suite", help="The published 24 settings, or harder ones too.")
    ] = SuiteChoice.REFERENCE,
    same_image: Annotated[
        bool, typer.Option("--same-image", help="Pair each image with its own edited copy.")
    ] = False,
    only_positives: Annotated[
        bool, typer.Option("--only-positives", help="Judge positive pairs only: no FPR, no F1.")
    ] = False,
    fit: Annotated[
        FitChoice,
        typer.Option("--fit", help="Hold a false-positive rate, or a recall on unedited pairs."),
    ] = FitChoice.FPR,
    fit_rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--fit-rate", help="That rate (default: 0.01 for fpr, 0.95 for recall)."),
    ] = None,
    split: SplitOption = "TEST",
    fit_split: FitSplitOption = "VAL",
    seed: SeedOption = 42,
    input_size: InputSizeOption = 512,
    round_trip: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--round-trip",
            help="Autoencoder (diffusers folder or hub id) that the extended suite encodes and "
            "decodes images with.",
        ),
    ] = None,
    strict: StrictOption = False,
    cache: CacheOption = True,
    overwrite: OverwriteOption = False,
    max_unreadable: AnyUnreadableOption = None,
    device: DeviceOption = Device.AUTO,
    batch_size: BatchSizeOption = 32,
    workers: WorkersOption = -1,
    as_json: JsonOption = False,
) -> None:
    """Edit the second image of each pair and see which detectors still find the match.

    Writes robustness_results.csv and .json, thresholds.json and plots. A killed run continues.
    """
    from lcmem_cli.engine.distributed import current_ranks
    from lcmem_cli.engine.evaluation.robustness import robustness

    result = robustness(
        filelist,
        output=output,
        basedir=basedir,
        detectors=split_names(detectors),
        ds_names=split_names(ds_name) if ds_name else None,
        suite=suite.value,
        same_image=same_image,
        only_positives=only_positives,
        fit=fit.value,
        fit_rate=fit_rate,
        split=split,
        fit_split=fit_split,
        seed=seed,
        input_size=input_size,
        round_trip=round_trip,
        strict=strict,
        cache=cache,
        overwrite=overwrite,
        max_unreadable=max_unreadable,
        device=device.value,
        batch_size=batch_size,
        workers=workers,
        reporter=render.reporter(),
    )
    if current_ranks(device.value).is_main:
        render.emit(result, as_json=as_json, human=lambda: _show(result, output))


def _show(result: RobustnessResult, output: Path) -> None:
    per_detector = [_mean_recalls(item, result.fit) for item in result.detectors]
    rows: list[list[str]] = []
    for label in per_detector[0]:
        values = [recalls[label] for recalls in per_detector]
        best = max(values) if len(values) > 1 else None
        rows.append([label, *(f"{v:.3f}{' *' if v == best else '  '}" for v in values)])
    rates = [item.unedited[result.fit].fpr for item in result.detectors]
    rows.append(["FPR, unedited", *("-" if rate is None else f"{rate:.3f}  " for rate in rates)])
    render.table(
        ["recall", *(item.name for item in result.detectors)],
        rows,
        title=f"Recall, mean over the strengths of each edit (thresholds: {result.fit} "
        f"{result.fit_rate:g} on {result.fit_split})",
    )
    for left_out in result.skipped:
        render.line(f"Left out: {left_out.name}: {left_out.reason}")
    render.line(
        f"{result.num_pairs:,} pairs of {result.split}, {result.num_dropped:,} dropped; "
        f"{len(result.unreadable):,} of {result.num_images:,} images unreadable."
    )
    for bad in result.unreadable[:10]:
        render.line(f"  {bad.path}: {bad.reason}")
    if len(result.unreadable) > 10:
        render.line(f"  and {len(result.unreadable) - 10} more, all in robustness_results.json")
    render.line(f"Written to {output}; robustness_results.csv holds every setting")


def _mean_recalls(item: RobustnessOfDetector, rule: str) -> dict[str, float]:
    """Return the recall without an edit, its mean for each edit, and the mean of all settings."""
    found: dict[str, list[float]] = {"unedited": [item.unedited[rule].recall or 0.0]}
    edited = []
    for at in item.settings:
        edited.append(at.outcomes[rule].recall or 0.0)
        found.setdefault(at.transform, []).append(edited[-1])
    found["mean of all settings"] = edited
    return {label: sum(values) / len(values) for label, values in found.items()}
