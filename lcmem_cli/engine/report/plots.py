"""Plots as PNG and PDF: colour-blind safe, readable in print, the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from lcmem_cli.engine.files import atomic_path

DPI = 160
# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")


def styles() -> Iterator[dict[str, str]]:
    """Yield line styles: every colour solid first, then dashed, and so on."""
    for style in cycle(LINE_STYLES):
        for colour in PALETTE:
            yield {"color": colour, "linestyle": style}


def plot_loss_curves(history: Sequence[Mapping[str, float]], target: Path) -> None:
    """Plot training and validation losses, with both parts, against the epoch.

    Args:
        history: one mapping an epoch with ``epoch``, ``train_loss``, ``train_bce``,
            ``train_ntxent`` and the same with ``val_``.
        target: path without suffix; ``.png`` and ``.pdf`` are written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    epochs = [int(row["epoch"]) + 1 for row in history]
    marker = "o" if len(epochs) < 30 else ""
    for axis, (part, title) in zip(
        figure.subplots(1, 3),
        (("loss", "total"), ("bce", "binary cross-entropy"), ("ntxent", "NT-Xent")),
        strict=True,
    ):
        for side, style in zip(("train", "val"), styles(), strict=False):
            values = [row[f"{side}_{part}"] for row in history]
            axis.plot(epochs, values, label=side, marker=marker, markersize=3, **style)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    save_figure(figure, target)


def plot_roc(curves: Mapping[str, tuple[Any, Any, float]], target: Path) -> None:
    """Plot ROC curves, with a linear and a logarithmic axis of false-positive rates.

    Args:
        curves: per name, false-positive rates, true-positive rates and the AUC.
        target: path without suffix; ``.png`` and ``.pdf`` are written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    linear, logarithmic = figure.subplots(1, 2)
    ordered = sorted(curves.items(), key=lambda item: -item[1][2])
    for (name, (fpr, tpr, auc)), style in zip(ordered, styles(), strict=False):
        width = 2.2 if name == "overall" else 1.3
        linear.plot(fpr, tpr, linewidth=width, **style)
        logarithmic.plot(
            fpr, tpr, linewidth=width, label=f"{name} ({auc:.3f})", drawstyle="steps-post", **style
        )
    linear.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    linear.set(title="ROC", xlabel="false-positive rate", ylabel="true-positive rate")
    logarithmic.set(
        title="low false-positive rates", xlabel="false-positive rate", xscale="log", xlim=(1e-4, 1)
    )
    for axis in (linear, logarithmic):
        axis.grid(alpha=0.25)
        axis.set_ylim(0, 1.01)
    figure.legend(loc="outside right center", frameon=False, fontsize=8, title="AUC")
    save_figure(figure, target)


def save_figure(figure: Any, target: Path) -> None:
    """Write a figure as ``target.png`` and ``target.pdf``, without dates inside."""
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        with atomic_path(target.with_name(target.name + suffix)) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=DPI, metadata=metadata)
