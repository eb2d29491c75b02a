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
from lcmem_cli.engine.evaluation.metrics import INTERVAL_KEYS, METRIC_KEYS, roc_curve
from lcmem_cli.engine.evaluation.study.results import (
    OVERALL,
    BenchmarkResult,
    Outcome,
    RobustnessResult,
)
from lcmem_cli.engine.evaluation.study.runner import Scored
from lcmem_cli.engine.files import write_csv, write_json
from lcmem_cli.engine.report.plots import Bar, plot_bars, plot_roc, plot_strengths, plot_transforms

THRESHOLDS_NAME = "thresholds.json"
SCORES_NAME = "scores.csv"
BENCHMARK_JSON, BENCHMARK_CSV = "benchmark_results.json", "benchmark_results.csv"
ROC_NAME, BARS_NAME = "roc", "bars"
ROBUSTNESS_JSON, ROBUSTNESS_CSV = "robustness_results.json", "robustness_results.csv"
RECALL_NAME, FPR_NAME = "robustness_recall", "robustness_fpr"
GRID_NAME = "robustness_transforms"
ROBUSTNESS_COLUMNS = (
    "Detector",
    "Transform",
    "Strength",
    "Recall",
    "Precision",
    "Accuracy",
    "F1",
    "FPR",
    "TP",
    "FP",
    "TN",
    "FN",
    "Threshold",
    "Fit",
)


def _pictures(*names: str) -> list[str]:
    return [f"{name}{suffix}" for name in names for suffix in (".png", ".pdf")]


BENCHMARK_FILES = (
    *(BENCHMARK_JSON, BENCHMARK_CSV, SCORES_NAME, THRESHOLDS_NAME),
    *_pictures(ROC_NAME, BARS_NAME),
)
ROBUSTNESS_FILES = (
    *(ROBUSTNESS_JSON, ROBUSTNESS_CSV, THRESHOLDS_NAME),
    *_pictures(RECALL_NAME, FPR_NAME, GRID_NAME),
)

Example = tuple[NDArray[Any], dict[str, list[tuple[str, NDArray[Any]]]]]
"""An image ``[H, W, 3]`` and what each transform does to it, with captions."""


def write_benchmark(
    folder: Path, result: BenchmarkResult, scored: Scored, records: Sequence[Record]
) -> None:
    """Write everything; the JSON file last, so that where it stands the rest does too.

    Args:
        folder: of the study.
        result: of it.
        scored: that the result follows from.
        records: that the pairs hold rows of.
    """
    (folder / BENCHMARK_JSON).unlink(missing_ok=True)
    columns = ["path_a", "path_b", "label", "ds_name", *(item.name for item in scored.detectors)]
    write_csv(folder / SCORES_NAME, columns, _score_rows(scored, records))
    write_csv(folder / BENCHMARK_CSV, *_benchmark_table(result))
    _write_thresholds(folder, {item.name: item.thresholds for item in result.detectors})
    curves = {}
    for found, item in zip(result.detectors, scored.detectors, strict=True):
        if found.overall.metrics is not None:
            fpr, tpr, _ = roc_curve(item.parts[""].test, scored.test.labels)
            curves[found.name] = (fpr, tpr, found.overall.metrics["auc"])
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
    write_csv(folder / ROBUSTNESS_CSV, ROBUSTNESS_COLUMNS, _robustness_rows(result))
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


def _benchmark_table(result: BenchmarkResult) -> tuple[list[str], list[list[str]]]:
    rates = [f"fpr{at.rate:g}" for at in result.detectors[0].overall.at_fpr]
    columns = [
        "detector",
        "ds_name",
        *METRIC_KEYS,
        *(f"{key}_{end}" for key in INTERVAL_KEYS for end in ("low", "high")),
        *(
            f"{what}_{name}"
            for name in rates
            for what in ("threshold", "tpr_at", "fpr_at", "tpr_low", "tpr_high")
        ),
        "num_positives",
        "num_negatives",
        "num_duplicates",
    ]
    rows = []
    for item in result.detectors:
        for name, part in [(OVERALL, item.overall), *item.per_dataset.items()]:
            metrics: Mapping[str, float | None] = part.metrics or {}
            cells: list[Any] = [metrics.get(key) for key in METRIC_KEYS]
            for key in INTERVAL_KEYS:
                cells += part.intervals.get(key) or (None, None)
            for at in part.at_fpr:
                cells += [at.threshold, at.tpr, at.fpr, *(at.tpr_interval or (None, None))]
            cells += [part.num_positives, part.num_negatives, part.num_duplicates]
            rows.append([item.name, name, *_texts(cells)])
    return columns, rows


def _texts(cells: Sequence[Any]) -> list[str]:
    return ["" if cell is None else str(cell) for cell in cells]


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


def _robustness_rows(result: RobustnessResult) -> list[list[str]]:
    rows = []
    for item in result.detectors:
        threshold = item.thresholds[result.fit]
        for at in item.settings:
            out = at.outcomes[result.fit]
            cells = [
                *(out.recall, out.precision, out.accuracy, out.f1, out.fpr),
                *(out.true_positives, out.false_positives),
                *(out.true_negatives, out.false_negatives),
                threshold.value,
                threshold.name,
            ]
            rows.append([item.name, at.transform, f"{at.strength:g}", *_texts(cells)])
    return rows


def _plot_rates(
    target: Path, result: RobustnessResult, rate: Literal["recall", "fpr"], label: str
) -> None:
    def value(outcome: Outcome) -> float:
        found = outcome.recall if rate == "recall" else outcome.fpr
        return math.nan if found is None else found

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for item in result.detectors:
        for at in item.settings:
            points = curves.setdefault(at.transform, {}).setdefault(item.name, [])
            points.append((at.strength, value(at.outcomes[result.fit])))
    unedited = {item.name: value(item.unedited[result.fit]) for item in result.detectors}
    plot_strengths(curves, target, ylabel=label, untransformed=unedited)
