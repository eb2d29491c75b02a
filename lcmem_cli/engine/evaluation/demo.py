"""A complete audit on drawn pictures: what lcmem does, in one command and offline."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from lcmem_cli.engine.data.images import to_tensor
from lcmem_cli.engine.data.perturb import perturb
from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.detectors.joint import JointDetector
from lcmem_cli.engine.detectors.lcmem import load_lcmem
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.run import audit
from lcmem_cli.engine.evaluation.inference import InferenceResult, score_pairs
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result

NUM_TRAINING, NUM_HELD_OUT, NUM_FRESH = 60, 120, 36
RATE = 0.01
FIRST_SEED = 1000
"""Of the scenes: some of which chance flags none, as in about three such demonstrations of four."""
SIDE = 192
PLANTED = (
    ("CropResize", 0.75),
    ("HorizontalFlip", 1.0),
    ("GaussianBlur", 2.0),
    ("Brightness", 1.3),
)
MARKER = ".lcmem-demo"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoResult(Result):
    """What the demonstration found.

    Attributes:
        folder: everything it wrote.
        report: page to open.
        planted: names of the altered copies among the generated pictures.
        flagged: names that the audit flagged.
        edits: what the audit says was done to the training image, by flagged name.
        statement: of the audit.
        verdict: of the audit.
        pairs: a few scored pairs.
    """

    folder: str
    report: str
    planted: tuple[str, ...]
    flagged: tuple[str, ...]
    edits: dict[str, str]
    statement: str
    verdict: str
    pairs: InferenceResult


def run_demo(output: Path, *, device: str = "auto", reporter: Reporter = SILENT) -> DemoResult:
    """Draw pictures, plant altered copies among new ones, and look for them.

    Args:
        output: folder to write; an earlier demonstration there is replaced.
        device: where to compute.
        reporter: receives progress.

    Raises:
        InputError: the folder holds something else.
    """
    if output.exists() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise InputError(f"{output}: is not empty and no demonstration; choose another folder")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / MARKER).touch()
    folders = {name: output / name for name in ("training", "held-out", "generated")}
    planted = _draw_sets(folders)
    detector = load_lcmem(device=device)
    first = folders["training"] / "training-000.png"
    pairs = score_pairs(
        detector,
        [
            (folders["generated"] / planted[0], first),
            (folders["training"] / "training-001.png", first),
        ],
        reporter=reporter,
    )
    result = audit(
        folders["generated"],
        folders["training"],
        held_out=folders["held-out"],
        fpr=RATE,
        detector=JointDetector(detector),
        output=output / "audit",
        reporter=reporter,
    )
    return DemoResult(
        folder=str(output),
        report=str(output / "audit" / "report.html"),
        planted=tuple(planted),
        flagged=tuple(sorted(match.query for match in result.flagged)),
        edits={match.query: match.edit for match in result.flagged},
        statement=result.statement,
        verdict=result.verdict,
        pairs=pairs,
    )


def _draw_sets(folders: Mapping[str, Path]) -> list[str]:
    """Draw the three sets; return the names of the altered copies among the generated pictures."""
    counts = {"training": NUM_TRAINING, "held-out": NUM_HELD_OUT, "generated": NUM_FRESH}
    seeds = itertools.count(FIRST_SEED)
    for name, folder in folders.items():
        folder.mkdir()
        for number, seed in zip(range(counts[name]), seeds, strict=False):
            draw_scene(seed, side=SIDE).save(folder / f"{name}-{number:03d}.png")
    planted = []
    for number, (transform, strength) in enumerate(PLANTED):
        source = to_tensor(draw_scene(FIRST_SEED + number, side=SIDE), SIDE)
        planted.append(f"copy-of-{number:03d}-{transform}.png")
        altered = perturb(source, transform, strength, seed=number)
        _save(altered, folders["generated"] / planted[-1])
    return planted


def _save(image: torch.Tensor, path: Path) -> None:
    from PIL import Image

    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)
