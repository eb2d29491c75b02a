"""The files of the studies: tables, plots, and the JSON documents of their results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.data.pairs import dataset_name
from lcmem_cli.engine.data.perturb import shown_strength, strength_axis
from lcmem_cli.engine.evaluation.metrics import INTERVAL_KEYS, METRIC_KEYS, roc_curve
from lcmem_cli.engine.evaluation.study.results import (
    OVERALL,
    BenchmarkResult,
    Outcome,
    RobustnessResult,
)
from lcmem_cli.engine.evaluation.study.runner import Scored
from lcmem_cli.engine.evaluation.study.tables import benchmark_tables
from lcmem_cli.engine.files import write_csv, write_json, write_text
from lcmem_cli.engine.report.plots import (
    Bar,
    Curve,
    Rate,
    plot_bars,
    plot_roc,
    plot_strengths,
    plot_transforms,
)
from lcmem_cli.engine.report.tables import to_latex

THRESHOLDS_NAME = "thresholds.json"
SCORES_NAME = "scores.csv"
BENCHMARK_JSON, BENCHMARK_CSV = "benchmark_results.json", "benchmark_results.csv"
BENCHMARK_TEX = "benchmark_results.tex"
ROC_NAME, BARS_NAME = "roc", "bars"
ROBUSTNESS_JSON, ROBUSTNESS_CSV = "robustness_results.json", "robustness_results.csv"
RECALL_NAME, FPR_NAME = "robustness_recall", "robustness_fpr"
GRID_NAME = "robustness_transforms"
_AT_FPR = ("threshold", "tpr_at", "fpr_at", "tpr_low", "tpr_high")


def _pictures(*names: str) -> list[str]:
    return [f"{name}{suffix}" for name in names for suffix in (".png", ".pdf")]


BENCHMARK_FILES = (
    *(BENCHMARK_JSON, BENCHMARK_CSV, BENCHMARK_TEX, SCORES_NAME, THRESHOLDS_NAME),
    *_pictures(ROC_NAME, BARS_NAME),
)
ROBUSTNESS_FILES = (
    *(ROBUSTNESS_JSON, ROBUSTNESS_CSV, THRESHOLDS_NAME),
    *_pictures(RECALL_NAME, FPR_NAME, GRID_NAME),
)

Example = tuple[NDArray[Any], dict[str, list[tuple[str, NDArray[Any]]]]]
"""An image ``[H, W, 3]`` and what each transform does to it, with captions."""


def write_benchmark(
    folder: Path,
    result: BenchmarkResult,
    scored: Scored,
    records: Sequence[Record],
    *,
    latex: bool,
) -> None:
    """Write everything; the JSON file last, so that where it stands the rest does too.

    Args:
        folder: of the study.
        result: of it.
        scored: that the result follows from.
        records: that the pairs hold rows of.
        latex: whether the tables are written for a paper too.
    """
    for name in (BENCHMARK_JSON, BENCHMARK_TEX):
        (folder / name).unlink(missing_ok=True)
    if latex:
        write_text(folder / BENCHMARK_TEX, to_latex(benchmark_tables(result)))
    columns = ["path_a", "path_b", "label", "ds_name", *(item.name for item in scored.detectors)]
    write_csv(folder / SCORES_NAME, columns, _score_rows(scored, records))
    _write_table(folder / BENCHMARK_CSV, _benchmark_rows(result))
    _write_thresholds(folder, {item.name: item.thresholds for item in result.detectors})
    curves = {}
    for found, item in zip(result.detectors, scored.detectors, strict=True):
        if found.overall.metrics is not None:
            fpr, tpr, _ = roc_curve(item.parts[""].test, scored.test.labels)
            curves[found.name] = Curve(
                fpr,
                tpr,
                found.overall.metrics["auc"],
                found.overall.num_negatives,
                found.overall.intervals["auc"],
            )
    if curves:
        plot_roc(curves, folder / ROC_NAME)
        plot_bars(_bars(result), folder / BARS_NAME)
    write_json(folder / BENCHMARK_JSON, result.to_dict())


def write_robustness(folder: Path, result: RobustnessResult, example: Example | None) -> None:
    """Write everything; the JSON file last, so that where it stands the rest does too.

    Args:
        folder: of the study.
        result: of it.
        example: edits to show, where an image can be read.
    """
    (folder / ROBUSTNESS_JSON).unlink(missing_ok=True)
    _write_table(folder / ROBUSTNESS_CSV, _robustness_rows(result))
    thresholds = {item.name: list(item.thresholds.values()) for item in result.detectors}
    _write_thresholds(folder, thresholds)
    _plot_rates(folder / RECALL_NAME, result, "recall", "recall")
    if not result.only_positives:
        _plot_rates(folder / FPR_NAME, result, "fpr", "false-positive rate")
    if example is not None:
        plot_transforms(*example, folder / GRID_NAME)
    write_json(folder / ROBUSTNESS_JSON, result.to_dict())


def _write_thresholds(folder: Path, thresholds: Mapping[str, Sequence[Any]]) -> None:
    listed = {name: [dataclasses.asdict(t) for t in group] for name, group in thresholds.items()}
    write_json(folder / THRESHOLDS_NAME, listed)


def _score_rows(scored: Scored, records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    scores = [item.parts[""].test for item in scored.detectors]
    test = scored.test
    for number in range(len(test)):
        first, second = records[test.first[number]], records[test.second[number]]
        yield (
            first.path,
            second.path,
            str(int(test.labels[number])),
            dataset_name(first),
            *(repr(float(column[number])) for column in scores),
        )


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same columns; ``None`` becomes an empty cell."""
    texts = (["" if cell is None else str(cell) for cell in row.values()] for row in rows)
    write_csv(path, list(rows[0]), texts)


def _benchmark_rows(result: BenchmarkResult) -> list[dict[str, Any]]:
    rows = []
    for item in result.detectors:
        for name, part in [(OVERALL, item.overall), *item.per_dataset.items()]:
            row: dict[str, Any] = {"detector": item.name, "ds_name": name}
            row |= part.metrics or dict.fromkeys(METRIC_KEYS)
            for key in INTERVAL_KEYS:
                row[f"{key}_low"], row[f"{key}_high"] = part.intervals.get(key) or (None, None)
            for at in part.at_fpr:
                low, high = at.tpr_interval or (None, None)
                cells = (at.threshold, at.tpr, at.fpr, low, high)
                for what, cell in zip(_AT_FPR, cells, strict=True):
                    row[f"{what}_fpr{at.rate:g}"] = cell
            for count in ("num_positives", "num_negatives", "num_duplicates"):
                row[count] = getattr(part, count)
            rows.append(row)
    return rows


def _bars(result: BenchmarkResult) -> dict[str, dict[str, Bar | None]]:
    panels: dict[str, dict[str, Bar | None]] = {"AUC": {}}
    for item in result.detectors:
        metrics = item.overall.metrics
        if metrics is not None:
            ends = item.overall.intervals.get("auc") or (None, None)
            panels["AUC"][item.name] = (metrics["auc"], *ends)
        for at in item.overall.at_fpr:
            panel = panels.setdefault(f"TPR at {100 * at.rate:g} % FPR of {result.fit_split}", {})
            ends = at.tpr_interval or (None, None)
            panel[item.name] = None if at.tpr is None else (at.tpr, *ends)
    return panels


def _robustness_rows(result: RobustnessResult) -> list[dict[str, Any]]:
    rows = []
    for item in result.detectors:
        threshold = item.thresholds[result.fit]
        for at in item.settings:
            out = at.outcomes[result.fit]
            row = {
                "Detector": item.name,
                "Transform": at.transform,
                "Strength": f"{at.strength:g}",
                "Recall": out.recall,
                "Precision": out.precision,
                "Accuracy": out.accuracy,
                "F1": out.f1,
                "FPR": out.fpr,
                "TP": out.true_positives,
                "FP": out.false_positives,
                "TN": out.true_negatives,
                "FN": out.false_negatives,
                "Threshold": threshold.value,
                "Fit": threshold.name,
            }
            rows.append(row)
    return rows


def _plot_rates(
    target: Path, result: RobustnessResult, rate: Literal["recall", "fpr"], label: str
) -> None:
    def point(strength: str, outcome: Outcome) -> Rate:
        found, ends = outcome.recall, outcome.recall_interval
        if rate == "fpr":
            found, ends = outcome.fpr, outcome.fpr_interval
        return Rate(strength, math.nan if found is None else found, ends)

    curves: dict[str, dict[str, list[Rate]]] = {}
    for item in result.detectors:
        for at in item.settings:
            points = curves.setdefault(at.transform, {}).setdefault(item.name, [])
            points.append(point(shown_strength(at.transform, at.strength), at.outcomes[result.fit]))
    first = result.detectors[0].unedited[result.fit]
    count = first.true_positives + first.false_negatives
    if rate == "fpr":
        count = first.false_positives + first.true_negatives
    plot_strengths(
        curves,
        target,
        ylabel=label,
        note=f"Lines: 95 % intervals over identities. Grey: below 1 of {count:,} pairs, which they "
        "cannot tell from none.",
        xlabels={name: strength_axis(name) for name in curves},
        untransformed={i.name: point("none", i.unedited[result.fit]) for i in result.detectors},
        lowest=1 / count,
    )
