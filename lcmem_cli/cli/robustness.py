"""``lcmem robustness``: do edited copies still match?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lcmem_cli.cli import render
from lcmem_cli.cli.options import INPUT, JUDGING, StudyOptions, option

if TYPE_CHECKING:
    from pathlib import Path

    from lcmem_cli.engine.evaluation.study.results import RobustnessOfDetector, RobustnessResult


class RobustnessOptions(StudyOptions):
    """What a robustness study is asked for."""

    suite: Literal["reference", "extended"] = option(
        INPUT, "The published 24 settings, or harder ones too.", "reference"
    )
    same_image: bool = option(INPUT, "Pair each image with its own edited copy.", False)
    only_positives: bool = option(INPUT, "Judge positive pairs only: no FPR, no F1.", False)
    fit: Literal["fpr", "recall"] = option(
        JUDGING, "Hold a false-positive rate, or a recall on unedited pairs.", "fpr"
    )
    fit_rate: float | None = option(
        JUDGING, "That rate (default: 0.01 for fpr, 0.95 for recall).", None
    )
    fit_split: str = option(JUDGING, "Split that thresholds are fitted on.", "VAL")
    round_trip: str | None = option(
        INPUT,
        "Autoencoder (diffusers folder or hub id) that the extended suite encodes and decodes "
        "images with.",
        None,
    )


def robustness_command(options: RobustnessOptions) -> None:
    """Edit the second image of each pair and see which detectors still find the match.

    Writes robustness_results.csv and .json, thresholds.json and plots. A killed run continues.

    Examples:
        lcmem robustness --filelist list.csv -o robustness
        lcmem robustness --filelist list.csv --suite extended -o robustness
    """
    from lcmem_cli.engine.evaluation.study.robustness import robustness

    result = robustness(**options.arguments())
    render.emit(result, as_json=options.as_json, human=lambda: _show(result, options.output))


def _show(result: RobustnessResult, output: Path) -> None:
    per_detector = [_mean_rates(item, result.fit) for item in result.detectors]
    rows: list[list[str]] = []
    for label in per_detector[0]:
        cells = [rates[label] for rates in per_detector]
        best = max(recall for recall, _ in cells) if len(cells) > 1 else None
        rows.append([label, *(_cell(recall, fpr, recall == best) for recall, fpr in cells)])
    shown = "Recall" if result.only_positives else "Recall / false-positive rate"
    render.fitting_tables(
        ["edit", *(item.name for item in result.detectors)],
        rows,
        title=f"{shown}, means over strengths; thresholds: {result.fit} {result.fit_rate:g} on "
        f"{result.fit_split}",
    )
    if len(per_detector) > 1:
        render.line("* the highest recall of the row")
    for note in result.notes:
        render.line(f"Note: {note}.")
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
