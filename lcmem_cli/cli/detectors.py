"""``lcmem detectors``: what can score a pair of images, and what of it can run here."""

from __future__ import annotations

from lcmem_cli.cli import render
from lcmem_cli.cli.options import JsonOptions


def detectors(options: JsonOptions) -> None:
    """List the detectors: what they measure, where their weights come from, what can run here.

    Examples:
        lcmem detectors
        lcmem detectors --json
    """
    from lcmem_cli.engine.detectors.registry import describe_detectors

    infos = describe_detectors()

    def human() -> None:
        rows = [
            (
                info.name,
                info.summary,
                info.weights,
                info.licence,
                f"{info.status}: {info.note}" if info.note else info.status,
            )
            for info in infos
        ]
        columns = ["detector", "measures", "weights", "licence", "here"]
        if render.is_wide():
            render.table(columns, rows, align_left=True)
        else:  # so narrow a table would break the names
            for name, *cells in rows:
                render.line(name)
                for column, cell in zip(columns[1:], cells, strict=True):
                    render.line(f"    {column + ':':<10}{cell}")
        render.line("options, as in NAME?key=value&key=value:")
        for known in dict.fromkeys(info.options for info in infos if info.options):
            names = [_short(info.name) for info in infos if info.options == known]
            render.line(f"  {', '.join(known)}: {', '.join(names)}")

    render.emit(
        {"detectors": [info.to_dict() for info in infos]}, as_json=options.as_json, human=human
    )


def _short(pattern: str) -> str:
    """Return a name without what may stand after its colon."""
    return pattern.partition(":")[0].removesuffix("[")
