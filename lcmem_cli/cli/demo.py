"""``lcmem demo``: the main job on drawn pictures, offline."""

from __future__ import annotations

from pathlib import Path

from lcmem_cli.cli import render
from lcmem_cli.cli.options import OUTPUT, DeviceOptions, option


class DemoOptions(DeviceOptions):
    """What the demo is asked for."""

    output: Path = option(OUTPUT, "Folder to write to.", Path("lcmem-demo"), flags="--output -o")


def demo(options: DemoOptions) -> None:
    """Plant altered copies in a small drawn set, find them, and write the report page.

    Examples:
        lcmem demo
        lcmem demo -o try --json
    """
    from lcmem_cli.engine.evaluation.demo import run_demo
    from lcmem_cli.engine.evaluation.inference import finding_text, verdict_text

    result = run_demo(**options.arguments())

    def human() -> None:
        render.line("Two pairs, scored (lcmem infer A B):")
        for pair in result.pairs.pairs:
            names = f"{Path(pair.path_a).name}  {Path(pair.path_b).name}"
            render.line(
                f"  {pair.score:.4f}  {verdict_text(pair):<9} {names}  {finding_text(pair)}"
            )
        render.line()
        render.line("A generated set, audited (lcmem audit GENERATED --against TRAINING):")
        render.line(f"  {result.statement}")
        render.line(f"  {result.verdict}")
        found = set(result.flagged)
        for name in result.planted:
            said = f"found: {result.edits[name]}" if name in found else "missed"
            render.line(f"  planted {name}: {said}")
        others = sorted(found - set(result.planted))
        render.line(f"  flagged besides: {', '.join(others) if others else 'none'}")
        render.line()
        render.line(f"Look at   {result.report}")
        render.line("Next      lcmem audit GENERATED --against TRAINING --held-out REAL -o audit")

    render.emit(result, as_json=options.as_json, human=human)
