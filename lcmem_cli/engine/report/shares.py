"""Plot of flagged shares: groups of one audit, or audits side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lcmem_cli.engine.report.plots import PALETTE, figure_of, label_of, save_figure

MAX_POINTS = 40
"""More groups than these cannot be told apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharePoint:
    """One group or audit.

    Attributes:
        name: its name.
        x: its place on the axis; ``None``: one after the other.
        flagged: share of flagged images.
        interval: 95 % interval of it.
        copies: share of the images that are known copies; ``None`` where that is not known.
    """

    name: str
    x: float | None
    flagged: float
    interval: tuple[float, float]
    copies: float | None


def plot_shares(
    points: Sequence[SharePoint], target: Path, *, rate: float | None, label: str
) -> None:
    """Plot shares of images with their intervals: a curve over numbers, else one place each.

    Args:
        points: at least one.
        target: path without suffix; ``.png`` and ``.pdf`` are written.
        rate: false-positive rate per image, drawn as a line; ``None``: there is none.
        label: of the x axis.
    """
    figure = figure_of(max(5.0, min(10.0, 1.6 + 0.55 * len(points))), 3.4)
    axis = figure.subplots()
    numbers = [point.x for point in points]
    x = [float(place if number is None else number) for place, number in enumerate(numbers)]
    is_curve = None not in numbers
    percent = [100 * point.flagged for point in points]
    below = [100 * max(0.0, point.flagged - point.interval[0]) for point in points]
    above = [100 * max(0.0, point.interval[1] - point.flagged) for point in points]
    axis.errorbar(
        x,
        percent,
        yerr=[below, above],
        color=PALETTE[0],
        marker="o",
        linestyle="-" if is_curve else "",
        capsize=3,
        label="flagged, 95 % interval",
    )
    copies = [point.copies for point in points]
    known = [100 * share for share in copies if share is not None]
    if len(known) == len(points):
        axis.plot(
            x,
            known,
            color=PALETTE[1],
            marker="s",
            markersize=4,
            linestyle="--" if is_curve else "",
            label="known copies",
        )
    if rate is not None:
        axis.axhline(100 * rate, color="0.5", linewidth=1, linestyle=":", label="by chance")
    axis.set_xticks(x, [label_of(point.name, 18) for point in points])
    if not is_curve and len(points) > 4:
        axis.tick_params(axis="x", labelrotation=45)
    axis.set(xlabel=label_of(label), ylabel="share of the images (%)")
    axis.set_ylim(bottom=0)
    axis.margins(x=0.06)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, target)
