"""``lcmem audit``: does a generated set reproduce its training set?"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import (
    AnyUnreadableOption,
    ApproximateOption,
    BasedirOption,
    BatchSizeOption,
    CacheOption,
    Device,
    DeviceOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    SeedOption,
    WorkersOption,
)

if TYPE_CHECKING:
    from lcmem_cli.engine.evaluation.audit.result import AuditResult
    from lcmem_cli.engine.evaluation.set_metrics import Spread

EXIT_GATE_FAILED = 3
_SHOWN_PAIRS = 10


class NullChoice(str, enum.Enum):
    """What takes the place of held-out images."""

    LEAVE_ONE_OUT = "leave-one-out"
    SPLIT = "split"


def audit_command(
    generated: Annotated[
        Path, typer.Argument(help="Generated images: a folder, a filelist or a saved index.")
    ],
    against: Annotated[
        Path, typer.Option("--against", help="The generator's training set, likewise.")
    ],
    output: OutputOption,
    held_out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--held-out", help="Real images that the generator never saw, likewise."),
    ] = None,
    basedir: BasedirOption = None,
    null: Annotated[
        Optional[NullChoice],  # noqa: UP045
        typer.Option(
            "--null",
            help="Without --held-out: compare training images with those of other identities "
            "(leave-one-out, the default; approximate), or split some off (exact, but they are "
            "not searched).",
        ),
    ] = None,
    fpr: Annotated[
        float, typer.Option("--fpr", help="Chance of flagging an image that copies nothing.")
    ] = 0.01,
    bh: Annotated[
        bool,
        typer.Option(
            "--bh",
            help="Hold --fpr as the share of false ones among the flagged (Benjamini-Hochberg).",
        ),
    ] = False,
    detector: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--detector",
            help="What compares the images (default: joint, or that of an index among the sets).",
        ),
    ] = None,
    input_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--input-size", min=8, help="Side in pixels for the pixel measures (default: 512)."
        ),
    ] = None,
    approximate: ApproximateOption = False,
    adapt: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--adapt/--no-adapt",
            help="Fit the detector to the kind of the training images first, so that what they all "
            "share does not count as likeness (default: where it can be).",
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Matches to list per image.")] = 5,
    fail_over: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--fail-over", help="Exit 3 if more than this share of images is flagged."),
    ] = None,
    max_unreadable: AnyUnreadableOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = Device.AUTO,
    batch_size: BatchSizeOption = 32,
    workers: WorkersOption = -1,
    cache: CacheOption = True,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find generated images that match a training image more closely than real images do.

    Writes audit.json, matches.csv, matches.parquet and report.html, which shows the flagged pairs.
    """
    from lcmem_cli.engine.distributed import current_ranks
    from lcmem_cli.engine.evaluation.audit.run import audit

    result = audit(
        generated,
        against,
        held_out=held_out,
        basedir=basedir,
        null=None if null is None else null.value,
        fpr=fpr,
        bh=bh,
        detector=detector,
        input_size=input_size,
        approximate=approximate,
        adapt=adapt,
        top_k=top_k,
        fail_over=fail_over,
        max_unreadable=max_unreadable,
        seed=seed,
        device=device.value,
        batch_size=batch_size,
        workers=workers,
        cache=cache,
        output=output,
        overwrite=overwrite,
        reporter=render.reporter(),
    )
    if current_ranks(device.value).is_main:
        render.emit(result, as_json=as_json, human=lambda: _show(result, output))
    if result.gate_failed:
        raise typer.Exit(EXIT_GATE_FAILED)


def _show(result: AuditResult, output: Path) -> None:
    from lcmem_cli.engine.evaluation.audit.sentences import counted, percent

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
    render.table(
        ["set", "images", "distinct", "identities", "unreadable", "source"],
        [
            [
                name,
                f"{images.num_images:,}",
                f"{images.num_distinct:,}",
                "-" if images.num_identities is None else f"{images.num_identities:,}",
                f"{len(images.unreadable):,}",
                images.source,
            ]
            for name, images in (
                ("generated", result.generated),
                ("training", result.training),
                ("held-out", result.held_out),
            )
            if images is not None
        ],
    )
    bad = [
        item
        for images in (result.generated, result.training, result.held_out)
        if images is not None
        for item in images.unreadable
    ]
    render.unreadable(bad, listed_in="audit.json")
    render.table(["over the whole set", "generated", "real"], _figures(result))
    if result.flagged:
        render.table(
            ["generated", "training image", "score", "p-value"],
            [
                [match.query, match.match, f"{match.score:.4f}", f"{match.p_value:.4f}"]
                for match in result.flagged[:_SHOWN_PAIRS]
            ],
            title=f"Flagged ({min(_SHOWN_PAIRS, result.num_flagged)} of {result.num_flagged:,})",
        )
    if result.fail_over is not None:
        ended, compared = ("failed", "over") if result.gate_failed else ("passed", "not over")
        render.line(
            f"Gate {ended}: {percent(result.share_flagged)} of the images are flagged, {compared} "
            f"{percent(result.fail_over)}."
        )
    render.line(f"See {output / 'report.html'}")


def _figures(result: AuditResult) -> list[list[str]]:
    def number(value: float | None, form: str = ".4g") -> str:
        return "-" if value is None else format(value, form)

    def median(spread: Spread | None) -> float | None:
        return None if spread is None else spread.median

    metrics = result.metrics
    copying = None if metrics.copying is None else metrics.copying.value
    rows = [
        [
            "median best-match score",
            number(median(metrics.generated_scores)),
            number(median(metrics.null_scores)),
        ],
        ["AuthPct", number(metrics.auth_pct, ".1f"), number(metrics.null_auth_pct, ".1f")],
        ["C_T (below -3: copying; within 3: nothing)", number(copying, "+.2f"), "-"],
        [
            "first / second neighbour, median",
            number(median(metrics.generated_ratio), ".3f"),
            number(median(metrics.null_ratio), ".3f"),
        ],
    ]
    return [row for row in rows if row[1:] != ["-", "-"]]
