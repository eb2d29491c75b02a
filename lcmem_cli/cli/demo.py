"""``lcmem demo``: the main job on drawn pictures, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import Device, DeviceOption, JsonOption


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path(
        "lcmem-demo"
    ),
    device: DeviceOption = Device.AUTO,
    as_json: JsonOption = False,
) -> None:
    """Plant altered copies in a small drawn set, find them, and write the report page."""
    from lcmem_cli.engine.evaluation.demo import run_demo
    from lcmem_cli.engine.evaluation.inference import verdict_text

    result = run_demo(output, device=device.value, reporter=render.reporter())

    def human() -> None:
        render.line("Two pairs, scored (lcmem infer A B):")
        for pair in result.pairs.pairs:
            names = f"{Path(pair.path_a).name}  {Path(pair.path_b).name}"
            render.line(f"  {pair.score:.4f}  {verdict_text(pair):<9} {names}")
        render.line()
        render.line("A generated set, audited (lcmem audit GENERATED --against TRAINING):")
        render.line(f"  {result.statement}")
        found = set(result.flagged)
        for name in result.planted:
            render.line(f"  planted {name}: {'found' if name in found else 'missed'}")
        others = sorted(found - set(result.planted))
        render.line(f"  flagged besides: {', '.join(others) if others else 'none'}")
        render.line()
        render.line(f"Look at   {result.report}")
        render.line("Next      lcmem audit GENERATED --against TRAINING --held-out REAL -o audit")

    render.emit(result, as_json=as_json, human=human)
