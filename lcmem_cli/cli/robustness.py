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
    split_commas,
)

if TYPE_CHECKING:
    from pathlib import Path

    from lcmem_cli.engine.evaluation.study.results import RobustnessOfDetector, RobustnessResult


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
    from lcmem_cli.engine.detectors.options import split_names
    from lcmem_cli.engine.distributed import current_ranks
    from lcmem_cli.engine.evaluation.study.robustness import robustness

    result = robustness(
        filelist,
        output=output,
        basedir=basedir,
        detectors=split_names(detectors),
        ds_names=split_commas(ds_name) if ds_name else None,
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
    per_detector = [_mean_rates(item, result.fit) for item in result.detectors]
    rows: list[list[str]] = []
    for label in per_detector[0]:
        cells = [rates[label] for rates in per_detector]
        best = max(recall for recall, _ in cells) if len(cells) > 1 else None
        rows.append([label, *(_cell(recall, fpr, recall == best) for recall, fpr in cells)])
    shown = "Recall" if result.only_positives else "Recall / false-positive rate"
    render.table(
        ["edit", *(item.name for item in result.detectors)],
        rows,
        title=f"{shown}, means over strengths; thresholds: {result.fit} {result.fit_rate:g} on "
        f"{result.fit_split}",
    )
    if len(per_detector) > 1:
        render.line("* the highest recall of the row")
    for left_out in result.skipped:
        render.line(f"Left out: {left_out.name}: {left_out.reason}")
    render.line(
        f"{result.num_pairs:,} pairs of {result.split}, {result.num_dropped:,} dropped; "
        f"{len(result.unreadable):,} of {result.num_images:,} images unreadable."
    )
    render.unreadable(result.unreadable, listed_in="robustness_results.json")
    render.line(f"Written to {output}; robustness_results.csv holds every setting")


def _mean_rates(item: RobustnessOfDetector, rule: str) -> dict[str, tuple[float, float | None]]:
    """Return recall and false-positive rate: unedited, mean of each edit, mean of all settings."""
    outcomes = {"unedited": [item.unedited[rule]]}
    for at in item.settings:
        outcomes.setdefault(at.transform, []).append(at.outcomes[rule])
    outcomes["mean of all settings"] = [at.outcomes[rule] for at in item.settings]
    means: dict[str, tuple[float, float | None]] = {}
    for label, group in outcomes.items():
        recalls = [out.recall for out in group if out.recall is not None]
        fprs = [out.fpr for out in group if out.fpr is not None]
        mean_fpr = sum(fprs) / len(fprs) if fprs else None
        means[label] = (sum(recalls) / len(recalls), mean_fpr)
    return means


def _cell(recall: float, fpr: float | None, is_best: bool) -> str:
    shown = f"{recall:.3f}" if fpr is None else f"{recall:.3f} / {fpr:.3f}"
    return f"{shown} {'*' if is_best else ' '}"
