"""The tables of a benchmark, for a terminal and for a paper."""

from __future__ import annotations

from collections.abc import Sequence

from lcmem_cli.engine.evaluation.study.results import OVERALL, BenchmarkResult, SetResult
from lcmem_cli.engine.report.tables import Table

NOT_KNOWN = "-"


def benchmark_tables(result: BenchmarkResult) -> list[Table]:
    """Return the table over all pairs, and one for each data set where there are several."""
    tables = [_table(result, OVERALL, [item.overall for item in result.detectors])]
    names = dict.fromkeys(name for item in result.detectors for name in item.per_dataset)
    if len(names) > 1:
        for name in names:
            tables.append(_table(result, name, [i.per_dataset[name] for i in result.detectors]))
    return tables


def _table(result: BenchmarkResult, name: str, parts: Sequence[SetResult]) -> Table:
    counts = f"{parts[0].num_positives:,} positive, {parts[0].num_negatives:,} negative pairs"
    problem = next((part.problem for part in parts if part.problem), None)
    if problem:
        return Table(title=f"{name}: {counts}", columns=(), rows=(), remarks=(problem,))
    columns, cells = ["detector"], [[item.name for item in result.detectors]]
    best: dict[int, int] = {}

    def add(
        heading: str,
        values: Sequence[float | None],
        ends: Sequence[tuple[float, float] | None] = (),
        *,
        lower_is_better: bool = False,
        digits: int = 3,
    ) -> None:
        known = [(-v if lower_is_better else v, -i) for i, v in enumerate(values) if v is not None]
        if known and len(values) > 1:
            best[len(columns)] = -max(known)[1]
        columns.append(heading)
        shown = [NOT_KNOWN if value is None else f"{value:.{digits}f}" for value in values]
        intervals = ["" if end is None else f" ({end[0]:.3f}–{end[1]:.3f})" for end in ends]
        cells.append([a + b for a, b in zip(shown, intervals or [""] * len(shown), strict=True)])

    metrics = [part.metrics or {} for part in parts]
    recall = f"R {100 * result.target_recall:g} %"
    add("AUC (95 % interval)", [m["auc"] for m in metrics], [p.intervals["auc"] for p in parts])
    add("F1: precision", [m["precision_bestF1"] for m in metrics])
    add("F1: recall", [m["recall_bestF1"] for m in metrics])
    add(f"{recall}: precision", [m["precision_atR"] for m in metrics])
    add(f"{recall}: FPR", [m["fpr_atR"] for m in metrics], lower_is_better=True)
    remarks = []
    for number, at in enumerate(parts[0].at_fpr if result.fit_split is not None else ()):
        rates = [part.at_fpr[number] for part in parts]
        percent = f"{100 * at.rate:g} % FPR"
        if at.reason:
            remarks.append(f"{name}: no TPR at {percent}: {at.reason}")
            continue
        add(
            f"TPR at {percent}",
            [rate.tpr for rate in rates],
            [rate.tpr_interval for rate in rates],
        )
        columns.append("FPR here")
        cells.append([NOT_KNOWN if r.fpr is None else f"{r.fpr:.4f}" for r in rates])
    return Table(
        title=f"{name}: {counts}",
        columns=columns,
        rows=[list(row) for row in zip(*cells, strict=True)],
        best=best,
        remarks=remarks,
    )
