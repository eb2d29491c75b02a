"""``lcmem audit``: does a generated set reproduce its training set?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    ANY_UNREADABLE,
    APPROXIMATE,
    CACHE,
    FAIL_ON,
    FOLDER,
    FRAMES,
    INPUT,
    JUDGING,
    OUTPUT,
    OVERWRITE,
    VERIFY,
    ComputeOptions,
    Frames,
    TableOptions,
    argument,
    option,
    seed_option,
)

if TYPE_CHECKING:
    from lcmem_cli.engine.evaluation.audit.result import AuditResult, Match
    from lcmem_cli.engine.evaluation.audit.shares import Shares
    from lcmem_cli.engine.evaluation.set_metrics import Spread

EXIT_GATE_FAILED = 3
_SHOWN_PAIRS = 10
SHARE_HEADINGS = ("images", "flagged", "beyond chance (95 %)", "copies")
_SHOWN_GROUPS = 20


class JudgedOptions(TableOptions, ComputeOptions):
    """How a set is compared with a training set, whatever its images are."""

    frames: Frames = FRAMES
    folders_are: Literal["identities", "classes", "auto"] = option(
        INPUT,
        "What subfolders stand for; auto: few large ones are classes, others identities.",
        "auto",
    )
    null: Literal["leave-one-out", "split"] | None = option(
        JUDGING,
        "Without --held-out: compare training images with those of other identities "
        "(leave-one-out, the default; approximate), or split some off (exact, but they are not "
        "searched).",
        None,
    )
    fpr: float = option(JUDGING, "Chance of flagging an image that copies nothing.", 0.01)
    bh: bool = option(
        JUDGING,
        "Hold --fpr as the share of false ones among the flagged (Benjamini-Hochberg).",
        False,
    )
    detector: str | None = option(
        JUDGING,
        "What compares the images (default: joint, or that of an index among the sets).",
        None,
    )
    input_size: int | None = option(
        JUDGING, "Side in pixels for the pixel measures (default: 512).", None, min=8
    )
    approximate: bool = APPROXIMATE
    adapt: bool | None = option(
        JUDGING,
        "Fit the detector to the kind of the training images first, so that what they all share "
        "does not count as likeness (default: where it can be).",
        None,
        flags="--adapt/--no-adapt",
    )
    verify: bool | None = VERIFY
    top_k: int = option(OUTPUT, "Matches to list per image.", 5, min=1)
    confidence: float | None = option(
        JUDGING, "Hold --fpr with this confidence, such as 0.95: takes more real images.", None
    )
    sensitivity: int | None = option(
        JUDGING,
        "Altered copies of training images to plant, to see how many the audit finds; 0 leaves "
        "this out (default: as many as take a third of the time at most).",
        None,
        min=0,
    )
    group_by: str | None = option(
        JUDGING,
        "Figures by group of generated images: 'folder', a column of their filelist, or an "
        "expression for their names, as 'step([0-9]+)'.",
        None,
        metavar="folder|COLUMN|REGEX",
    )
    fail_on: str | None = FAIL_ON
    max_unreadable: int | None = ANY_UNREADABLE
    seed: int = seed_option()
    cache: bool = CACHE
    output: Path = FOLDER
    overwrite: bool = OVERWRITE
    absolute_paths: bool = option(
        OUTPUT, "Name the sets by absolute paths, not as seen from the folder.", False
    )


class AuditOptions(JudgedOptions):
    """What an audit is asked for."""

    generated: Path = argument(
        "Generated images: a folder, filelist, archive, array or saved index."
    )
    against: Path = option(INPUT, "The generator's training set, likewise.")
    held_out: Path | None = option(
        INPUT, "Real images that the generator never saw, likewise.", None
    )


def audit_command(options: AuditOptions) -> None:
    """Find generated images that match a training image more closely than real images do.

    Writes audit.json, matches.csv, matches.parquet and report.html, which shows the flagged pairs.

    Examples:
        lcmem audit generated --against training --held-out real -o audit
        lcmem audit generated --against list.csv --basedir images -o audit
        lcmem audit generated --against training -o audit --fail-on altered --json
    """
    from lcmem_cli.engine.evaluation.audit.run import audit

    show(audit(**options.arguments()), options.output, as_json=options.as_json)


def show(result: AuditResult, output: Path, *, as_json: bool) -> None:
    """Print a result; where it has a gate its line comes last, and the exit code says its end.

    Raises:
        typer.Exit: the gate failed, or is undecided.
    """
    render.emit(result, as_json=as_json, human=lambda: _show(result, output))
    if result.gate is None:
        return
    (render.note if as_json else render.line)(result.gate.line)
    if result.gate.ended != "passed":
        raise typer.Exit(EXIT_GATE_FAILED)


def _show(result: AuditResult, output: Path) -> None:
    _show_verdict(result)
    _show_sets(result)
    render.table(["over the whole set", result.word, "real"], _figures(result))
    _show_groups(result)
    _show_exposed(result)
    if result.flagged:
        render.table(
            [result.word, "training image", "score", "p-value", "what is known"],
            [
                [
                    match.query,
                    match.match,
                    f"{match.score:.4f}",
                    f"{match.p_value:.4f}",
                    _known(match),
                ]
                for match in result.flagged[:_SHOWN_PAIRS]
            ],
            title=f"Flagged ({min(_SHOWN_PAIRS, result.num_flagged)} of {result.num_flagged:,})",
        )
    render.line(f"See {output / 'report.html'}")


def _show_groups(result: AuditResult) -> None:
    grouping = result.grouping
    if grouping is None:
        return
    shown = grouping.groups[:_SHOWN_GROUPS]
    number = (
        f" ({len(shown)} of {len(grouping.groups):,})" if len(shown) < len(grouping.groups) else ""
    )
    render.table(
        [grouping.by, *SHARE_HEADINGS],
        [share_cells(one) for one in shown],
        title=f"By group{number}",
    )
    render.line(grouping.finding)


def share_cells(one: Shares) -> list[str]:
    """Return the name of a group or an audit, and the cells under ``SHARE_HEADINGS``."""
    from lcmem_cli.engine.evaluation.audit.wording import percent

    beyond = "-"
    if one.excess_interval is not None:
        beyond = " to ".join(percent(end) for end in one.excess_interval)
    return [
        one.name,
        f"{one.num_images:,}",
        f"{one.num_flagged:,} ({percent(one.share_flagged)})",
        beyond,
        "-" if one.num_altered is None else f"{one.num_copies:,}",
    ]


def _show_exposed(result: AuditResult) -> None:
    if not result.exposed_identities:
        return
    shown = result.exposed_identities[:_SHOWN_PAIRS]
    render.table(
        ["identity", "what is known", "score", "flagged images", "best match"],
        [
            [
                " ".join(filter(None, (one.ds_name, one.name))),
                one.tier,
                f"{one.score:.4f}",
                f"{len(one.matches):,}",
                one.matches[0],
            ]
            for one in shown
        ],
        title=f"Exposed identities ({len(shown)} of {len(result.exposed_identities):,})",
    )


def _known(match: Match) -> str:
    if match.tier == "same picture, altered":
        return f"same picture: {match.edit}"
    return str(match.tier)


def _show_verdict(result: AuditResult) -> None:
    from lcmem_cli.engine.evaluation.audit.wording import counted

    render.line(result.statement)
    render.line(result.verdict)
    over = result.rule.threshold
    limit = "" if over is None else f", flagged: score over {over:.4f}"
    adapted = "" if result.adapted_to is None else " adapted to the training images"
    render.line(f"Detector {result.detector}{adapted}{limit}.")
    if result.num_flagged:
        exposed = counted(result.num_exposed_images, "training image")
        if result.num_exposed_identities is not None:
            exposed += f" of {counted(result.num_exposed_identities, 'identity', 'identities')}"
        render.line(f"Exposed: {exposed}.")
    render.line()
    for title, lines in (
        ("What this shows", result.shows),
        ("What it does not show", result.does_not_show),
    ):
        render.line(f"{title}:")
        for text in lines:
            render.line(f"  - {text}")
    render.line()


def _show_sets(result: AuditResult) -> None:
    named = {
        result.word: result.generated,
        "training": result.training,
        "held-out": result.held_out,
    }
    sets = {name: images for name, images in named.items() if images is not None}
    rows = [
        [
            name,
            f"{images.num_images:,}",
            f"{images.num_distinct:,}",
            "-" if images.num_identities is None else f"{images.num_identities:,}",
            f"{len(images.unreadable):,}",
            images.source,
        ]
        for name, images in sets.items()
    ]
    render.table(["set", "images", "distinct", "identities", "unreadable", "source"], rows)
    bad = [item for images in sets.values() for item in images.unreadable]
    render.unreadable(bad, listed_in="audit.json")


def _figures(result: AuditResult) -> list[list[str]]:
    def number(value: float | None, form: str = ".4g") -> str:
        return "-" if value is None else format(value, form)

    def median(spread: Spread | None) -> float | None:
        return None if spread is None else spread.median

    metrics = result.metrics
    copying = "-"
    if metrics.copying is not None:
        copying = f"{metrics.copying.value:+.2f} (p {metrics.copying.p_value:.3f})"
    rows = [
        [
            "median best-match score",
            number(median(metrics.generated_scores)),
            number(median(metrics.null_scores)),
        ],
        ["AuthPct", number(metrics.auth_pct, ".1f"), number(metrics.null_auth_pct, ".1f")],
        ["C_T (below 0: nearer than real ones), p by permutation", copying, "-"],
        [
            "first / second neighbour, median",
            number(median(metrics.generated_ratio), ".3f"),
            number(median(metrics.null_ratio), ".3f"),
        ],
    ]
    return [row for row in rows if row[1:] != ["-", "-"]]
