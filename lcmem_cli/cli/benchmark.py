"""``lcmem benchmark``: how well do detectors tell one identity from two?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lcmem_cli.cli import render
from lcmem_cli.cli.options import INPUT, JUDGING, StudyOptions, option

if TYPE_CHECKING:
    from lcmem_cli.engine.evaluation.study.results import BenchmarkResult, SetResult


class BenchmarkOptions(StudyOptions):
    """What a benchmark is asked for."""

    pairs: Literal["reference", "all"] = option(
        INPUT, "The published pairs, or every pair within a data set.", "reference"
    )
    fit_split: str = option(JUDGING, "Split that thresholds are fitted on, or none.", "VAL")
    target_recall: float = option(JUDGING, "Recall of the _atR metrics, in (0, 1].", 0.99)
    latents: Path | None = option(
        INPUT, "Latent store that LCMem detectors take images from.", None
    )
    adapt: bool = option(
        JUDGING,
        "Also score with LCMem and joint adapted to the TRAIN images of each data set; identities "
        "are not used.",
        False,
    )


def benchmark_command(options: BenchmarkOptions) -> None:
    """Score pairs of images with several detectors and compare them.

    Writes benchmark_results.json and .csv, scores.csv, thresholds.json, ROC curves and bars. Each
    distinct image is embedded once per detector; a killed run continues.

    Examples:
        lcmem benchmark --filelist list.csv -o benchmark
        lcmem benchmark --filelist list.csv --detectors joint,ssim -o benchmark
    """
    from lcmem_cli.engine.evaluation.study.benchmark import benchmark

    fit_split = None if options.fit_split == "none" else options.fit_split
    result = benchmark(**{**options.arguments(), "fit_split": fit_split})
    render.emit(result, as_json=options.as_json, human=lambda: _show(result, options.output))


def _show(result: BenchmarkResult, output: Path) -> None:
    from lcmem_cli.engine.evaluation.study.results import OVERALL

    datasets = list(dict.fromkeys(name for item in result.detectors for name in item.per_dataset))
    _show_set(result, [item.overall for item in result.detectors], OVERALL)
    if len(datasets) > 1:
        for name in datasets:
            _show_set(result, [item.per_dataset[name] for item in result.detectors], name)
    if len(result.detectors) > 1:
        render.line(render.BEST_NOTE)
    render.line(f"Note: {'; '.join(result.notes)}.")
    for item in result.skipped:
        render.line(f"Left out: {item.name}: {item.reason}")
    render.line(
        f"{result.num_pairs:,} pairs of {result.split} ({result.num_duplicates:,} of them repeat "
        f"an earlier one), {result.num_dropped:,} dropped; {len(result.unreadable):,} of "
        f"{result.num_images:,} images unreadable."
    )
    render.unreadable(result.unreadable, listed_in="benchmark_results.json")
    render.line(f"Written to {output}")


def _show_set(result: BenchmarkResult, parts: list[SetResult], name: str) -> None:
    problem = next((part.problem for part in parts if part.problem), None)
    if problem:
        render.line(f"{name}: {problem}")
        return
    is_wide = render.is_wide()
    recall = f"{100 * result.target_recall:g} % recall"
    headings = {  # by metric; in a narrow terminal, where one of them is left out
        "auc": ("AUC (95 % interval)", "AUC"),
        "precision_bestF1": ("best F1: precision", "F1: prec."),
        "recall_bestF1": ("recall", "F1: recall"),
        "precision_atR": (f"at {recall}: precision", None),
        "fpr_atR": ("FPR", f"FPR at {recall}"),
    }
    columns, cells, best = ["detector"], [[item.name for item in result.detectors]], {}

    def add(heading: str, values: Sequence[float | None], *, lower_is_better: bool = False) -> None:
        known = [(-v if lower_is_better else v, -i) for i, v in enumerate(values) if v is not None]
        if known and len(values) > 1:
            best[len(columns)] = -max(known)[1]
        columns.append(heading)
        cells.append(["-" if value is None else f"{value:.3f}" for value in values])

    for key, (wide, narrow) in headings.items():
        heading = wide if is_wide else narrow
        if heading is not None:
            metrics = [(part.metrics or {})[key] for part in parts]
            add(heading, metrics, lower_is_better=key == "fpr_atR")
    if is_wide:
        intervals = [part.intervals.get("auc") for part in parts]
        shown = ["" if ends is None else f" ({ends[0]:.3f}–{ends[1]:.3f})" for ends in intervals]
        cells[1] = [cell + more for cell, more in zip(cells[1], shown, strict=True)]
    at_fpr = parts[0].at_fpr if result.fit_split is not None else ()
    for number, at in enumerate(at_fpr):
        rates = [part.at_fpr[number] for part in parts]
        heading = f"TPR at {100 * at.rate:g} % FPR"
        add(
            heading + (f" of {result.fit_split} (FPR here)" if is_wide else ""),
            [r.tpr for r in rates],
        )
        if is_wide:
            reached = ["" if r.fpr is None else f" ({r.fpr:.4f})" for r in rates]
            cells[-1] = [cell + more for cell, more in zip(cells[-1], reached, strict=True)]
    counts = f"{parts[0].num_positives:,} positive, {parts[0].num_negatives:,} negative pairs"
    rows = [list(row) for row in zip(*cells, strict=True)]
    render.table(columns, rows, title=f"{name}: {counts}", best=best)
    for at in at_fpr:
        if at.reason:
            render.line(f"{name}: no TPR at {100 * at.rate:g} % FPR: {at.reason}")
