"""``lcmem export``: the network of a checkpoint for other programs."""

from __future__ import annotations

from pathlib import Path

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import CODEC, JsonOptions, argument


class ExportOptions(JsonOptions):
    """What an export is asked for."""

    checkpoint: str | None = argument(
        "A .safetensors file, hf:REPO_ID@REVISION, or embedded. May be left out: embedded.", None
    )
    output: Path | None = argument(
        "File to write: .onnx or .pt2 (torch.export).", None, metavar="OUT"
    )
    codec: str | None = CODEC


def export(options: ExportOptions) -> None:
    """Export codec and network as one ONNX or torch.export file, compared with the checkpoint.

    Examples:
        lcmem export lcmem.onnx
        lcmem export run/checkpoint.safetensors mine.pt2
    """
    checkpoint, output = options.checkpoint, options.output
    if checkpoint is None:
        raise typer.BadParameter("give the file to write, after the checkpoint if there is one")
    name, target = (None, Path(checkpoint)) if output is None else (checkpoint, output)

    from lcmem_cli.engine.detectors.export import export_checkpoint

    result = export_checkpoint(name, target, codec=options.codec, reporter=render.reporter())

    def human() -> None:
        size, features = result.image_size, result.num_features
        opset = "" if result.opset is None else f", opset {result.opset}"
        render.line(f"wrote      {result.path} ({result.num_bytes / 1e6:.1f} MB{opset})")
        render.line(f"input      images [N, 3, {size}, {size}] float32 in [0, 1], already resized")
        render.line(f"output     features [N, {features}]; head and thresholds are in the file")
        if result.max_difference is None:
            render.line("compared   no: onnxruntime is not installed")
        else:
            render.line(
                f"compared   {result.num_checked} random images, largest difference "
                f"{result.max_difference:.2g} (allowed: {result.tolerance:g})"
            )
        render.line(f"checkpoint {result.fingerprint}")

    render.emit(result, as_json=options.as_json, human=human)
