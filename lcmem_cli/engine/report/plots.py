"""Plots as PNG and PDF: colour-blind safe, readable in print, the same bytes for the same data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.files import atomic_path

DPI = 200
# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*<>hp"
MAX_CURVE_POINTS = 2000
GRID_COLUMNS = 8
_FAINT = "0.45"

# Value, low and high end of its interval (``None``: not known).
Bar = tuple[float, float | None, float | None]


class Curve(NamedTuple):
    """A ROC curve.

    Attributes:
        fpr: ``[n]`` false-positive rates, ascending.
        tpr: ``[n]`` true-positive rates.
        auc: area under it.
        num_negatives: behind it; a rate below one of them cannot be told.
        interval: of the area; ``None``: not known.
    """

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]
    auc: float
    num_negatives: int
    interval: tuple[float, float] | None = None


class Rate(NamedTuple):
    """A rate at one strength of an edit.

    Attributes:
        strength: as it is written at the axis.
        value: in [0, 1].
        interval: of it; ``None``: not known.
    """

    strength: str
    value: float
    interval: tuple[float, float] | None = None


def styles() -> Iterator[dict[str, str]]:
    """Yield line styles: every colour solid first, then dashed, and so on."""
    for style in cycle(LINE_STYLES):
        for colour in PALETTE:
            yield {"color": colour, "linestyle": style}


def plot_loss_curves(
    history: Sequence[Mapping[str, float]], target: Path, *, best_epoch: int
) -> None:
    """Plot training and validation losses, with both parts, against the epoch.

    Args:
        best_epoch: the kept one, from 1, which is marked.
        history: one mapping an epoch with ``epoch``, ``train_loss``, ``train_bce``,
            ``train_ntxent`` and the same with ``val_``; ``train_retention`` where there is any,
            which is then a part of ``train_loss`` only.
        target: path without suffix; ``.png`` and ``.pdf`` are written.
    """
    parts = [
        ("loss", "total", "weighted sum"),
        ("bce", "binary cross-entropy", "nats a pair"),
        ("ntxent", "NT-Xent", "nats a pair"),
    ]
    if any(row.get("train_retention") for row in history):
        parts[0] = ("loss", "total (train: with retention)", "weighted sum")
        parts.append(("retention", "retention", "weighted sum"))
    figure = figure_of(3.4 * len(parts), 3.2)
    epochs = [int(row["epoch"]) for row in history]
    marker = "o" if len(epochs) < 30 else ""
    for axis, (part, title, unit) in zip(figure.subplots(1, len(parts)), parts, strict=True):
        sides = ("train",) if part == "retention" else ("train", "val")
        for side, style in zip(sides, styles(), strict=False):
            values = [row[f"{side}_{part}"] for row in history]
            axis.plot(epochs, values, label=side, marker=marker, markersize=3, **style)
        axis.axvline(best_epoch, color=_FAINT, linewidth=0.9, label=f"kept: epoch {best_epoch}")
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    save_figure(figure, target)


def plot_codec_losses(history: Sequence[Sequence[float]], target: Path) -> None:
    """Plot the two parts of a codec's training loss against the step.

    Args:
        history: rows of step, mean absolute error and Kullback-Leibler term.
        target: path without suffix; ``.png`` and ``.pdf`` are written.
    """
    figure = figure_of(7, 3.2)
    steps = [int(row[0]) for row in history]
    titles = (
        ("mean absolute error", "on the scale of its input"),
        ("Kullback-Leibler term", "nats a pixel"),
    )
    for column, (axis, (title, unit)) in enumerate(
        zip(figure.subplots(1, 2), titles, strict=True), 1
    ):
        values = [row[column] for row in history]
        axis.plot(steps, values, marker="o" if len(steps) < 30 else "", markersize=3)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.25)
    save_figure(figure, target)


def plot_roc(curves: Mapping[str, Curve], target: Path) -> None:
    """Plot ROC curves, with a linear and a logarithmic axis of false-positive rates.

    On the logarithmic axis no curve reaches below one negative pair.

    Args:
        curves: by name.
        target: path without suffix; ``.png`` and ``.pdf`` are written.
    """
    figure = figure_of(11, max(4.2, 1.0 + 0.21 * len(curves)))
    linear, logarithmic = figure.subplots(1, 2)
    ordered = sorted(curves.items(), key=lambda item: -item[1].auc)
    for (name, curve), style in zip(ordered, styles(), strict=False):
        width = 2.2 if name == "overall" else 1.4
        x, y = _thinned(np.asarray(curve.fpr), np.asarray(curve.tpr))
        linear.plot(x, y, linewidth=width, **style)
        told = x >= (1 - 1e-9) / curve.num_negatives
        ends = "" if curve.interval is None else ", {:.3f}–{:.3f}".format(*curve.interval)
        logarithmic.plot(
            x[told],
            y[told],
            linewidth=width,
            label=f"{label_of(name)} ({curve.auc:.3f}{ends})",
            drawstyle="steps-post",
            **style,
        )
    linear.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    most = max(curve.num_negatives for curve in curves.values())
    linear.set(title="ROC", xlabel="false-positive rate", ylabel="true-positive rate")
    linear.set_xlim(-0.01, 1.01)
    logarithmic.set(
        title="low false-positive rates",
        xlabel=f"false-positive rate (none below 1 of {most:,} negative pairs)",
        ylabel="true-positive rate",
        xscale="log",
        xlim=(1 / most, 1),
    )
    for axis in (linear, logarithmic):
        axis.grid(alpha=0.25)
        axis.set_ylim(0, 1.01)
    figure.legend(
        loc="outside right center",
        frameon=False,
        fontsize=8,
        title="AUC, 95 % interval" if any(c.interval for c in curves.values()) else "AUC",
        handlelength=3.2,
    )
    save_figure(figure, target)


def plot_bars(panels: Mapping[str, Mapping[str, Bar | None]], target: Path) -> None:
    """Plot one horizontal bar a detector with its interval, in one panel a measure.

    Detectors stand in the same order, best of the first measure on top, in every panel. A measure
    that is known of none has no panel.

    Args:
        panels: per measure, the values in [0, 1] by detector; ``None`` where there is none.
        target: path without suffix; ``.png`` and ``.pdf`` are written.
    """
    panels = {name: bars for name, bars in panels.items() if any(bars.values())}
    first = next(iter(panels.values()))
    names = sorted(first, key=lambda name: _height(first[name]))
    figure = figure_of(2.2 + 3.1 * len(panels), 1.1 + 0.3 * len(names))
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axis, (measure, bars), colour in zip(axes, panels.items(), cycle(PALETTE), strict=False):
        for place, name in enumerate(names):
            bar = bars.get(name)
            if bar is None:
                axis.text(0.02, place, "not known", va="center", fontsize=7, color="0.4")
                continue
            value, low, high = bar
            axis.barh(place, value, color=colour, alpha=0.75, height=0.72)
            if low is not None and high is not None:
                axis.plot([low, high], [place, place], color="black", linewidth=1.2)
            axis.text(1.02, place, f"{value:.3f}", va="center", fontsize=7)
        axis.set(
            title=measure,
            xlabel="value (line: 95 % interval)",
            xlim=(0, 1),
            xticks=[0, 0.25, 0.5, 0.75, 1],
        )
        axis.grid(axis="x", alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), [label_of(name) for name in names])
    axes[0].set_ylim(-0.6, len(names) - 0.4)
    save_figure(figure, target)


def plot_strengths(
    curves: Mapping[str, Mapping[str, Sequence[Rate]]],
    target: Path,
    *,
    ylabel: str,
    note: str = "",
    xlabels: Mapping[str, str],
    untransformed: Mapping[str, Rate],
    lowest: float = 0.0,
) -> None:
    """Plot a rate against the strength of each transform.

    A transform has its own panel; those with one strength share the last one. The axis of rates
    covers the data, and grey ground marks where they cannot tell a rate from another.

    Args:
        curves: per transform and detector, the rates from mild to harsh.
        target: path without suffix; ``.png`` and ``.pdf`` are written.
        ylabel: what the rate is.
        note: what else to know, below the panels.
        xlabels: what the strength of each transform is, with its unit.
        untransformed: per detector, the rate on unaltered images, drawn on the left.
        lowest: the smallest rate above 0 that the pairs can show.
    """
    several = {name: panel for name, panel in curves.items() if _num_points(panel) > 1}
    single = {name: panel for name, panel in curves.items() if name not in several}
    names = list(dict.fromkeys(name for panel in curves.values() for name in panel))
    num_panels = len(several) + bool(single)
    columns = min(3, num_panels)
    num_rows = math.ceil(num_panels / columns)
    figure = figure_of(3.3 * columns + 2.4, max(2.8 * num_rows, 1.0 + 0.21 * len(names)))
    axes = figure.subplots(num_rows, columns, sharey=True, squeeze=False).ravel()
    lines: dict[str, Any] = {}
    for name, style, marker in zip(names, styles(), cycle(MARKERS), strict=False):
        look = {
            "marker": marker,
            "markersize": 4,
            "linewidth": 1.3,
            "label": label_of(name),
            **style,
        }
        for axis, panel in zip(axes, several.values(), strict=False):
            rates = [untransformed[name], *panel.get(name, ())]
            lines[name] = _draw_rates(axis, rates, look, lowest)
        if single:
            rates = [rate for panel in single.values() for rate in panel.get(name, ())]
            unconnected = {**look, "linestyle": ""}
            dots = _draw_rates(
                axes[num_panels - 1], [untransformed[name], *rates], unconnected, lowest
            )
            lines.setdefault(name, dots)
    for axis, (transform, panel) in zip(axes, several.items(), strict=False):
        axis.set(title=transform, xlabel=xlabels.get(transform, "strength"))
        _set_ticks(axis, [rate.strength for rate in next(iter(panel.values()))])
    if single:
        axes[num_panels - 1].set_title("single edits")
        _set_ticks(axes[num_panels - 1], list(single), rotation=35, ha="right")
    every = [r for panel in curves.values() for rates in panel.values() for r in rates]
    low, high = _extent([*every, *untransformed.values()], lowest)
    for axis in axes[:num_panels]:
        axis.set_ylim(low, high)
        axis.axhspan(0, lowest, color="0.9", zorder=0)
        axis.grid(alpha=0.25)
    for axis in axes[num_panels:]:
        axis.set_visible(False)
    for axis in axes[:num_panels:columns]:
        axis.set_ylabel(ylabel)
    figure.supxlabel(note, fontsize=8)
    handles = [lines[name] for name in names]
    figure.legend(
        handles=handles, loc="outside right center", frameon=False, fontsize=8, handlelength=3.2
    )
    save_figure(figure, target)


def _draw_rates(axis: Any, rates: Sequence[Rate], look: Mapping[str, Any], lowest: float) -> Any:
    """Draw points with intervals, the first one left of 0; no line leads below ``lowest``."""
    places = range(-1, len(rates) - 1)
    for place, rate in zip(places, rates, strict=True):
        if rate.interval is not None:
            axis.plot([place] * 2, rate.interval, color=look["color"], linewidth=0.9, alpha=0.6)
    values = [rate.value for rate in rates]
    axis.plot(places, values, **{**look, "linestyle": ""})
    line = axis.plot(places, [v if v >= lowest else math.nan for v in values], **look)[0]
    return line


def _extent(rates: Sequence[Rate], lowest: float) -> tuple[float, float]:
    """Return the ends of an axis that shows all rates and their intervals."""
    ends = [end for rate in rates for end in (rate.value, *(rate.interval or ()))]
    known = [end for end in ends if not math.isnan(end)] or [0.0, 1.0]
    low, high = min(known), max(*known, 2 * lowest)
    edge = 0.06 * max(high - low, 0.02)
    return max(low - edge, -edge), min(high + edge, 1 + edge)


def plot_transforms(
    original: NDArray[Any], edits: Mapping[str, Sequence[tuple[str, NDArray[Any]]]], target: Path
) -> None:
    """Show what each transform does to one image, with the original in front of every row.

    Args:
        original: ``[H, W, 3]`` in [0, 1].
        edits: per transform, a caption and an image ``[H, W, 3]`` for each strength.
        target: path without suffix; ``.png`` and ``.pdf`` are written.
    """
    rows: list[list[tuple[str, NDArray[Any]]]] = []
    for images in edits.values():
        if not rows or len(rows[-1]) + len(images) > GRID_COLUMNS:
            rows.append([])
        rows[-1] += images
    columns = 1 + max(len(row) for row in rows)
    figure = figure_of(1.5 * columns, 1.75 * len(rows))
    for axes, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axis in axes:
            axis.set_axis_off()
        for axis, (caption, image) in zip(axes, [("original", original), *row], strict=False):
            axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
            axis.set_title(caption, fontsize=7.5)
    save_figure(figure, target)


def save_figure(figure: Any, target: Path) -> None:
    """Write a figure as ``target.png`` and ``target.pdf``, without dates inside."""
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        with atomic_path(target.with_name(target.name + suffix)) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=DPI, metadata=metadata)


def figure_of(width: float, height: float) -> Any:
    """Return an empty figure, sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _num_points(panel: Mapping[str, Sequence[Rate]]) -> int:
    return max((len(points) for points in panel.values()), default=0)


def _set_ticks(axis: Any, names: list[str], **options: Any) -> None:
    axis.set_xticks(range(-1, len(names)), ["none", *names], **options)


def _height(bar: Bar | None) -> float:
    return -1.0 if bar is None else bar[0]


def label_of(name: str, limit: int = 34) -> str:
    """Return a name that a legend can hold: no formulas, no control characters, both ends kept."""
    plain = "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")
    if len(plain) <= limit:
        return plain
    return f"{plain[: limit // 3]}…{plain[-(limit - limit // 3 - 1) :]}"


def _thinned(
    fpr: NDArray[np.float64], tpr: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Keep the points that can be told apart on a linear or a logarithmic axis."""
    if len(fpr) <= MAX_CURVE_POINTS:
        return fpr, tpr
    half = MAX_CURVE_POINTS // 2
    wanted = np.concatenate([np.linspace(0, 1, half), np.geomspace(fpr[fpr > 0].min(), 1, half)])
    chosen = np.unique(np.clip(np.searchsorted(fpr, wanted, side="right") - 1, 0, len(fpr) - 1))
    chosen = np.union1d(chosen, [0, len(fpr) - 1])
    return fpr[chosen], tpr[chosen]
