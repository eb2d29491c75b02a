"""``lcmem benchmark``: how well do detectors tell one identity from two?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lcmem_cli.cli import render
from lcmem_cli.cli.options import INPUT, JUDGING, OUTPUT, StudyOptions, option

if TYPE_CHECKING:
    from lcmem_cli.engine.evaluation.study.results import BenchmarkResult


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
    latex: bool = option(OUTPUT, "Also write benchmark_results.tex.", False)


def benchmark_command(options: BenchmarkOptions) -> None:
    """Score pairs of images with several detectors and compare them.

    Writes benchmark_results.json and .csv, scores.csv, thresholds.json, ROC curves and bars. Each
    distinct image is embedded once per detector; a killed run continues.

    Examples:
        lcmem benchmark --filelist list.csv -o benchmark
        lcmem benchmark --filelist list.csv --detectors joint,ssim --latex -o bench
    """
    from lcmem_cli.engine.evaluation.study.benchmark import benchmark

    fit_split = None if options.fit_split == "none" else options.fit_split
    result = benchmark(**{**options.arguments(), "fit_split": fit_split})
    render.emit(result, as_json=options.as_json, human=lambda: _show(result, options.output))


def _show(result: BenchmarkResult, output: Path) -> None:
    from lcmem_cli.engine.evaluation.study.tables import benchmark_tables

    for table in benchmark_tables(result):
        if table.columns:
            render.fitting_tables(table.columns, table.rows, title=table.title, best=table.best)
        else:
            render.line(table.title)
        for remark in table.remarks:
            render.line(remark)
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
