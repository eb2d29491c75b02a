"""The model card that is published beside a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lcmem_cli.engine.files import dump_json
from lcmem_cli.engine.models.checkpoint import Checkpoint
from lcmem_cli.engine.results import named_thresholds

_FRONT_MATTER = """---
library_name: lcmem
pipeline_tag: image-feature-extraction
tags:
- lcmem
- copy-detection
- re-identification
---
"""
_ADAPTED = """
Those that are adapted hold for the network adapted to unlabelled images of the kind that is
compared, `--detector "lcmem:model.safetensors?adapt=IMAGES"`.
"""


def model_card(checkpoint: Checkpoint, repo_id: str) -> str:
    """Return a card in Markdown, made from what the checkpoint says of itself.

    Args:
        checkpoint: with its fingerprint.
        repo_id: where it will be.
    """
    network, codec = checkpoint.network, checkpoint.codec
    parameters = sum(value.numel() for value in checkpoint.network_state.values())
    inside = "weights in the file" if checkpoint.codec_state is not None else "weights not in it"
    facts = [
        ("fingerprint", f"`{checkpoint.fingerprint}`"),
        ("stage", checkpoint.stage),
        ("backbone", f"{network.backbone}, {parameters:,} parameters"),
        ("features", f"{network.num_features:,} per image"),
        ("images", f"resized to {checkpoint.image_size} x {checkpoint.image_size} pixels"),
        ("codec", f"{codec.describe()}, {inside}"),
    ]
    sections = [
        f"{_FRONT_MATTER}\n# {repo_id.rpartition('/')[2]}\n",
        "A checkpoint of `lcmem`: it tells whether two images show the same person, patient or\n"
        "object, or whether one is an altered copy of the other (LCMem, arXiv 2512.14421).\n",
        f"```bash\nlcmem pull {repo_id} model.safetensors\n"
        "lcmem infer a.png b.png --checkpoint model.safetensors\n"
        "lcmem audit GENERATED --against TRAINING --held-out REAL "
        "--detector lcmem:model.safetensors -o audit\n```\n",
        "## What it is\n",
        _table(["", ""], facts),
        "## Thresholds\n",
        _thresholds(checkpoint),
    ]
    if checkpoint.training:
        sections += ["## Training\n", _code(dump_json(checkpoint.training), "json")]
    return "\n".join(sections)


def _thresholds(checkpoint: Checkpoint) -> str:
    named = named_thresholds(checkpoint.thresholds, checkpoint.adapted_thresholds)
    if not named:
        return "None are fitted. Fit some on your own images with `lcmem calibrate`.\n"
    rows = [
        (
            name,
            f"{threshold.value:.6f}",
            _percent(threshold.achieved_fpr),
            _percent(threshold.achieved_recall),
            f"{threshold.num_positives:,}",
            f"{threshold.num_negatives:,}",
            threshold.fitted_on,
        )
        for name, threshold in named
    ]
    columns = [
        "threshold", "score at least", "false-positive rate", "recall", "positive pairs",
        "negative pairs", "fitted on",
    ]  # fmt: skip
    return (
        _table(columns, rows)
        + "\nThe rates are those of the pairs that the thresholds were fitted on. They hold for "
        "images like\nthose; for others fit new thresholds with `lcmem calibrate`. A pair below a "
        "threshold is not\nproven different.\n"
        + "".join(f"\n`{name}`: {t.transfer}.\n" for name, t in named if t.transfer)
        + (_ADAPTED if checkpoint.adapted_thresholds else "")
    )


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.3%}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """Keep what comes from the file inside its cell, and keep it text."""
    flat = " ".join(text.split())
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _code(text: str, language: str) -> str:
    """Return a block of code, with a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}\n"
