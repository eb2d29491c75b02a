"""``lcmem benchmark``: how well do detectors tell one identity from two?"""

from __future__ import annotations

import enum
from pathlib import Path
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
    from lcmem_cli.engine.evaluation.benchmark import BenchmarkResult, SetResult

_WIDE = 100
"""Columns of a terminal from which on tables show intervals."""


class PairChoice(str, enum.Enum):
    """Which pairs are made."""

    REFERENCE = "reference"
    ALL = "all"


def benchmark_command(
    filelist: FilelistOption,
    output: OutputOption,
    basedir: BasedirOption = None,
    detectors: DetectorsOption = "lcmem,mse,ssim,ncc,phash,random",
    ds_name: DatasetsOption = None,
    pairs: Annotated[
        PairChoice,
        typer.Option("--pairs", help="The published pairs, or every pair within a data set."),
    ] = PairChoice.REFERENCE,
    split: SplitOption = "TEST",
    fit_split: Annotated[
        str, typer.Option("--fit-split", help="Split that thresholds are fitted on, or none.")
    ] = "VAL",
    seed: SeedOption = 42,
    target_recall: Annotated[
        float, typer.Option("--target-recall", help="Recall of the _atR metrics, in (0, 1].")
    ] = 0.99,
    input_size: InputSizeOption = 512,
    latents: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--latents", help="Latent store that LCMem detectors take images from."),
    ] = None,
    adapt: Annotated[
        bool,
        typer.Option(
            "--adapt",
            help="Also score with LCMem and joint adapted to the TRAIN images of each data set; "
            "identities are not used.",
        ),
    ] = False,
    strict: StrictOption = False,
    cache: CacheOption = True,
    overwrite: OverwriteOption = False,
    max_unreadable: AnyUnreadableOption = None,
    device: DeviceOption = Device.AUTO,
    batch_size: BatchSizeOption = 32,
    workers: WorkersOption = -1,
    as_json: JsonOption = False,
) -> None:
    """Score pairs of images with several detectors and compare them.

    Writes benchmark_results.json and .csv, scores.csv, thresholds.json, ROC curves and bars. Each
    distinct image is embedded once per detector; a killed run continues.
    """
    from lcmem_cli.engine.distributed import current_ranks
    from lcmem_cli.engine.evaluation.benchmark import benchmark

    result = benchmark(
        filelist,
        output=output,
        basedir=basedir,
        detectors=split_names(detectors),
        ds_names=split_names(ds_name) if ds_name else None,
        pairs=pairs.value,
        split=split,
        fit_split=None if fit_split == "none" else fit_split,
        seed=seed,
        target_recall=target_recall,
        input_size=input_size,
        latents=latents,
        adapt=adapt,
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


def _show(result: BenchmarkResult, output: Path) -> None:
    from lcmem_cli.engine.evaluation.benchmark import OVERALL

    datasets = list(dict.fromkeys(name for item in result.detectors for name in item.per_dataset))
    _show_set(result, [item.overall for item in result.detectors], OVERALL)
    if len(datasets) > 1:
        for name in datasets:
            _show_set(result, [item.per_dataset[name] for item in result.detectors], name)
    render.line(f"Note: {'; '.join(result.notes)}.")
    for item in result.skipped:
        render.line(f"Left out: {item.name}: {item.reason}")
    render.line(
        f"{result.num_pairs:,} pairs of {result.split} ({result.num_duplicates:,} of them repeat "
        f"an earlier one), {result.num_dropped:,} dropped; {len(result.unreadable):,} of "
        f"{result.num_images:,} images unreadable."
    )
    for bad in result.unreadable[:10]:
        render.line(f"  {bad.path}: {bad.reason}")
    if len(result.unreadable) > 10:
        render.line(f"  and {len(result.unreadable) - 10} more, all in benchmark_results.json")
    render.line(f"Written to {output}")


def _show_set(result: BenchmarkResult, parts: list[SetResult], name: str) -> None:
    problem = next((part.problem for part in parts if part.problem), None)
    if problem:
        render.line(f"{name}: {problem}")
        return
    recall = f"{100 * result.target_recall:g} % recall"
    rates = [f"TPR at {100 * at.rate:g} % FPR" for at in parts[0].at_fpr]
    is_wide = render.width() >= _WIDE
    columns = ["detector", "AUC (95 % interval)", "best F1: precision", "recall"]
    columns += [f"at {recall}: precision", "FPR", *(f"{r} ({result.fit_split})" for r in rates)]
    if not is_wide:
        columns = ["detector", "AUC", "F1: prec.", "F1: recall", f"prec. at {recall}"]
        columns += [f"FPR at {recall}", *rates]
    rows: list[list[str]] = []
    values: list[list[float | None]] = []
    for item, part in zip(result.detectors, parts, strict=True):
        metrics = part.metrics or {}
        keys = ("auc", "precision_bestF1", "recall_bestF1", "precision_atR")
        values.append(
            [
                *(metrics[key] for key in keys),
                -metrics["fpr_atR"],
                *(at.tpr for at in part.at_fpr),
            ]
        )
        interval = part.intervals.get("auc")
        shown = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval and is_wide else ""
        rows.append(
            [
                item.name,
                f"{metrics['auc']:.3f}{shown}",
                *(f"{metrics[key]:.3f}" for key in (*keys[1:], "fpr_atR")),
                *("-" if at.tpr is None else f"{at.tpr:.3f}" for at in part.at_fpr),
            ]
        )
    best = {}
    for column in range(len(values[0])):
        known = [(row[column], -i) for i, row in enumerate(values) if row[column] is not None]
        if known and len(rows) > 1:
            best[column + 1] = -max(known)[1]
    counts = f"{parts[0].num_positives:,} positive, {parts[0].num_negatives:,} negative pairs"
    render.table(columns, rows, title=f"{name}: {counts}", best=best)
    for at in parts[0].at_fpr:
        if at.reason:
            render.line(f"{name}: no TPR at {100 * at.rate:g} % FPR: {at.reason}")
