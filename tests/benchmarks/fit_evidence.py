"""Fit and check the second row of weights of ``verification.evidence``, data sets left out.

For every data set of each DATA folder (``filelist.csv`` with path, id, ds_name) half of the
identities are training images; altered copies of some are aligned with their source, and images of
the other half with their best candidates by ``joint``: look-alikes that copy nothing. Each data
set is judged by weights that were fitted to the others: recall at the value that 1 % of its
look-alikes' best matches pass (of few images, so each set's own number is rough). Data sets whose
different identities share pixels (drawn figures, video frames) are left out of what is fitted.

    python tests/benchmarks/fit_evidence.py DATA [DATA ...]

``--only`` takes some of the data sets.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.data.perturb import EXTENDED_SUITE, TRANSFORMS, blur, generator, resize
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.verification import evidence
from lcmem_cli.engine.verification.features import LocalFeatures, local_features

Edit = Callable[[torch.Tensor, torch.Tensor, np.random.Generator], torch.Tensor]
SHARED = frozenset({"lpc_character", "unit_sprite", "tower", "road_ir", "tno_ir"})
NUM_TRAINING, NUM_REAL, NUM_SOURCES, NUM_CANDIDATES = 60, 30, 2, 5


class Pair(NamedTuple):
    """One query and training image: the edit, or nothing for a look-alike; what was measured."""

    data_set: str
    query: str
    edit: str | None
    measured: np.ndarray


def chain(*steps: tuple[str, float]) -> Edit:
    """Return edits of the robustness suite, one after another."""

    def apply(image: torch.Tensor, _: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        for name, strength in steps:
            image = TRANSFORMS[name].apply(image, strength, rng).clamp(0, 1)
        return image

    return apply


def pasted(side: float) -> Edit:
    """Return the image, shrunk, somewhere in another one."""

    def apply(image: torch.Tensor, other: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        factor = side * min(other.shape[1] / image.shape[1], other.shape[2] / image.shape[2])
        rows, columns = (max(8, int(length * factor)) for length in image.shape[1:])
        top = int(rng.integers(other.shape[1] - rows + 1))
        left = int(rng.integers(other.shape[2] - columns + 1))
        result = other.clone()
        result[:, top : top + rows, left : left + columns] = resize(image, rows, columns)
        return result

    return apply


def half(image: torch.Tensor, other: torch.Tensor, _: np.random.Generator) -> torch.Tensor:
    """Return the left half of the image beside the right half of another one."""
    result = resize(other, *image.shape[1:]).clone()
    middle = image.shape[2] // 2
    result[:, :, :middle] = image[:, :, :middle]
    return result


def recoloured(image: torch.Tensor, _: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return the image with other colours, inverted, in an ellipse about its middle."""
    height, width = image.shape[1:]
    rows, columns = np.mgrid[0:height, 0:width]
    shift = 0.35 + 0.3 * rng.random(2)
    inside = ((rows / height - shift[0]) ** 2 + (columns / width - shift[1]) ** 2) < 0.38**2
    return torch.where(torch.from_numpy(inside), (1 - image)[[1, 2, 0]], image)


EDITS: dict[str, Edit] = {str(s): chain((s.transform, s.strength)) for s in EXTENDED_SUITE} | {
    "mirrored, turned 12, crop 0.6": chain(
        ("HorizontalFlip", 1), ("Rotation", 12), ("CropResize", 0.6)
    ),
    "mirrored, turned 90": chain(("HorizontalFlip", 1), ("Rotation", 90)),
    "turned 45, crop 0.75": chain(("Rotation", 45), ("CropResize", 0.75)),
    "crop 0.5, brighter": chain(("CropResize", 0.5), ("Brightness", 1.6)),
    "crop 0.35": chain(("CropResize", 0.35)),
    "mirrored, combined": chain(("HorizontalFlip", 1), ("Combination", 1)),
    "turned -25, combined": chain(("Rotation", -25), ("Combination", 1)),
    "blur 6, not cut off": lambda image, _, __: blur(image, 6, 49),
    "mirrored, low resolution": chain(("LowResolution", 4), ("HorizontalFlip", 1)),
    "mirrored, noise": chain(("Noise", 0.2), ("HorizontalFlip", 1)),
    "JPEG 10, crop 0.6": chain(("JPEGCompression", 90), ("CropResize", 0.6)),
    "mirrored, caption, brighter": chain(
        ("Caption", 0.15), ("Brightness", 1.6), ("HorizontalFlip", 1)
    ),
    "pasted, a quarter": pasted(0.5),
    "pasted, half": pasted(0.75),
    "half of it": half,
    "recoloured": recoloured,
}


def main() -> int:
    """Print recall by edit, each data set left out once, and the weights of all together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--only", action="append", help="a data set; repeat for several")
    arguments = parser.parse_args()
    sets: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for folder in arguments.data:
        with (folder / "filelist.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if not arguments.only or row["ds_name"] in arguments.only:
                    sets[row["ds_name"]][row["id"]].append((folder / row["path"]).absolute())
    detector = load_detector("joint")
    pairs = []
    for name, ids in sets.items():
        pairs += pairs_of(name, ids, detector)
        print(f"{name}: {len(pairs)} pairs", file=sys.stderr)
    values = np.empty(len(pairs))
    for name in sets:
        weights, constant = fit([pair for pair in pairs if pair.data_set not in {name, *SHARED}])
        for number, pair in enumerate(pairs):
            if pair.data_set == name:
                values[number] = pair.measured @ weights + constant
    recall: dict[str, list[bool]] = defaultdict(list)
    for name in sets:
        best: dict[str, float] = defaultdict(lambda: -np.inf)
        mine = [number for number, pair in enumerate(pairs) if pair.data_set == name]
        for number in mine:
            if pairs[number].edit is None:
                query = pairs[number].query
                best[query] = max(best[query], values[number])
        threshold = np.quantile(list(best.values()), 0.99)
        for number in mine:
            if pairs[number].edit is not None:
                recall[str(pairs[number].edit)].append(bool(values[number] > threshold))
    for edit, found in recall.items():
        print(f"  {edit:32s} recall {np.mean(found):.3f} of {len(found)}")
    weights, constant = fit([pair for pair in pairs if pair.data_set not in SHARED])
    print(f"weights {np.round(weights, 2).tolist()}, constant {constant:.2f}")
    return 0


def pairs_of(name: str, ids: dict[str, list[Path]], detector) -> list[Pair]:
    """Align altered copies with their sources, and real images with their best candidates."""
    rng = np.random.default_rng(0)
    order = [str(key) for key in rng.permutation(sorted(ids))]
    middle = max(NUM_SOURCES, len(order) // 2)

    def some(keys: list[str], number: int) -> list[Path]:
        rounds = max(len(ids[key]) for key in keys)
        return [ids[k][turn] for turn in range(rounds) for k in keys if turn < len(ids[k])][:number]

    training, real = some(order[:middle], NUM_TRAINING), some(order[middle:], NUM_REAL)
    top = detector.top_k(detector.embed(real), detector.embed(training), NUM_CANDIDATES)
    known = [local_features(load_image(path)) for path in training]
    jobs = [
        (str(path), None, local_features(load_image(path)), [known[row] for row in rows])
        for path, rows in zip(real, top.rows, strict=True)
    ]
    pictures = [
        torch.from_numpy(np.array(load_image(path))).permute(2, 0, 1).float() / 255
        for path in [*training[:NUM_SOURCES], *real]
    ]
    for source in range(NUM_SOURCES):
        for number, (edit, apply) in enumerate(EDITS.items()):
            other = pictures[NUM_SOURCES + (number + source) % len(real)]
            changed = apply(pictures[source], other, generator(number)).clamp(0, 1)
            image = Image.fromarray((changed * 255).round().byte().permute(1, 2, 0).numpy())
            jobs.append((f"{edit} {source}", edit, local_features(image), [known[source]]))

    def measured(job: tuple[str, str | None, LocalFeatures, list[LocalFeatures]]) -> list[Pair]:
        query, edit, features, candidates = job
        found = evidence.find_alignments(features, candidates)
        return [
            Pair(name, query, edit, vector(pair, features, candidate))
            for pair, candidate in zip(found, candidates, strict=True)
        ]

    with ThreadPoolExecutor() as pool:
        return [pair for part in pool.map(measured, jobs) for pair in part]


def vector(
    found: evidence.Found | None, query: LocalFeatures, training: LocalFeatures
) -> np.ndarray:
    """Return what was measured of an alignment; not-a-numbers, which pass nothing, without one."""
    seen = None if found is None else evidence.agreement(found.matrix, query, training)
    if found is None or seen is None:
        return np.full(evidence.WEIGHTS.shape[1], np.nan)
    return evidence.measurements(found.inliers, seen)


def fit(pairs: list[Pair]) -> tuple[np.ndarray, float]:
    """Fit weights and constant by logistic regression, both classes counting alike."""
    pairs = [pair for pair in pairs if not np.isnan(pair.measured).any()]
    measured = np.stack([pair.measured for pair in pairs])
    mean, deviation = measured.mean(axis=0), measured.std(axis=0) + 1e-6
    model = LogisticRegression(max_iter=500, class_weight="balanced")
    model.fit((measured - mean) / deviation, [pair.edit is not None for pair in pairs])
    weights = model.coef_[0] / deviation
    return weights, float(model.intercept_[0] - weights @ mean)


if __name__ == "__main__":
    sys.exit(main())
