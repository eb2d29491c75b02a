"""How the embedded model does on kinds of images that its last layer was not fitted to.

    python tests/benchmarks/bench_kinds.py data/filelist.csv data2/filelist.csv --folder kinds
    python tests/benchmarks/bench_kinds.py ... --only thresholds --output model.safetensors

The kinds are in five folds. The last layer is fitted to the TRAIN images of four, as
``lcmem calibrate --whiten`` does, and judged on all images of the fifth: AUC of the pairs within
each data set, as it is and adapted to the data set's TRAIN images. Copies are searched for as by
``model_table.py``, among natural images that the layer was not fitted to, altered at two sizes.

The trunk is the shipped one: it has seen TRAIN images of the first list's data sets, none of the
second's. So only the second's are new to the whole model; both have a mean of their own.

``--only thresholds`` judges the thresholds as they are on the second list's data sets, and
``--output`` keeps what became of their rates in the file.

What the last layer is given is kept in ``--folder``, so that a killed run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.augment import Augmentation
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.data.manifest import Manifest, load_manifest
from lcmem_cli.engine.data.pairs import pairs_within
from lcmem_cli.engine.data.perturb import (
    EXTENDED_SUITE,
    REFERENCE_SUITE,
    Setting,
    blur,
    perturb,
    perturb_seed,
)
from lcmem_cli.engine.detectors.base import resize_batch, score_listed
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.errors import NotAdaptableError
from lcmem_cli.engine.evaluation.calibration import required_negatives
from lcmem_cli.engine.evaluation.metrics import pair_metrics
from lcmem_cli.engine.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lcmem_cli.engine.models.hub import locate_checkpoint
from lcmem_cli.engine.results import Threshold
from lcmem_cli.engine.training.last_layer import LastLayer, Whitening

FOLDS = {
    "faces": "celebs orl umist yaleb yale",
    "bodies and hands": "nih_cxr nih_cxr64 ham_lesion fingerprint palmprint signature "
    "arabic_writer",
    "objects": "coil20 coil100 grocery dvd_cover traffic_sign",
    "scenes": "nyala tower satellite texture wide_baseline building_render road_ir tno_ir "
    "multifocus",
    "drawn and natural": "lpc_character unit_sprite imagenet_sample bsds",
}
NATURAL = ("imagenet_sample", "bsds")
BANK_FILL = ("imagenet_sample", "bsds", "unit_sprite", "lpc_character")
NUM_QUERIES, NUM_FILL = 50, 250
SIZES = (256, 128)
FULL_BLUR = 6 / 256
"""Sigma as a share of the side; the kernel holds three of them, unlike the reference's of 9."""


def merged(lists: list[Path]) -> Manifest:
    """Return the images of several lists by absolute paths."""
    records = []
    for filelist in lists:
        listed = load_manifest(filelist)
        records += [
            record._replace(path=str(path.absolute()))
            for record, path in zip(listed.records, listed.paths(), strict=True)
        ]
    return Manifest(tuple(records), Path("/"), lists[0])


def kept(path: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return an array that was saved before, or make and save it."""
    if not path.exists():
        np.save(path, make().half().numpy())
    return torch.from_numpy(np.load(path)).float()


def fitted_without(whitening: Whitening, names: list[str]) -> LCMemDetector:
    """Return the detector whose last layer was fitted to none of some data sets."""
    records = whitening.manifest.records
    rows = [row for row, record in enumerate(records) if record.ds_name not in names]
    part = dataclasses.replace(
        whitening,
        manifest=dataclasses.replace(whitening.manifest, records=tuple(records[r] for r in rows)),
        pooled=whitening.pooled[rows],
        changes=whitening.changes[rows],
    )
    return LCMemDetector(part.fitted(), name="without " + ", ".join(names))


def features_of(detector: LCMemDetector, layer: str, inputs: torch.Tensor) -> np.ndarray:
    """Return the features of what the last layer is given."""
    state, spec = detector.checkpoint.network_state, detector.checkpoint.network
    weight, bias = (state[f"{layer}.{key}"].float() for key in ("weight", "bias"))
    before = functional.normalize(functional.linear(inputs, weight, bias), dim=1)
    return torch.sigmoid(before * (spec.feature_rms * spec.num_features**0.5)).numpy()


def auc_within(detector, features, records) -> float | None:
    """Return the AUC of the pairs of one data set, ``None`` where no image has a partner."""
    pairs = pairs_within(records)
    if not 0 < pairs.labels.sum() < len(pairs.labels):
        return None
    scores = score_listed(detector, features, pairs.first, pairs.second)
    return pair_metrics(scores, pairs.labels)["auc"]


def identities(whitening: Whitening, everything: Manifest, inputs: torch.Tensor, second: set[str]):
    """Print the AUC of each data set, and the means."""
    rows = []
    for fold, names in FOLDS.items():
        detector = fitted_without(whitening, names.split())
        for name in names.split():
            own = [row for row, r in enumerate(everything.records) if r.ds_name == name]
            records = [everything.records[row] for row in own]
            features = features_of(detector, whitening.layer, inputs[own])
            auc = auc_within(detector, features, records)
            if auc is None:
                continue
            train = [n for n, record in enumerate(records) if record.split == "TRAIN"]
            try:
                kind = detector.adapted(features[train], [records[n].path for n in train])
                adapted = auc_within(kind.detector, kind.convert(features), records)
            except NotAdaptableError:
                adapted = auc
            rows.append((fold, name, auc, adapted))
            print(f"| {fold} | {name} | {auc:.3f} | {adapted:.3f} |", flush=True)
    for title, chosen in (
        ("mean", rows),
        ("new to the trunk", [row for row in rows if row[1] in second]),
        ("faces", [row for row in rows if row[0] == "faces"]),
    ):
        means = np.mean([row[2:] for row in chosen], axis=0)
        print(f"| {title} | {len(chosen)} sets | {means[0]:.3f} | {means[1]:.3f} |")
    worst = min(rows, key=lambda row: row[2])
    print(f"| worst | {worst[1]} | {worst[2]:.3f} | {worst[3]:.3f} |")


def transfer(checkpoint: Checkpoint, layer: str, everything: Manifest, inputs, second: set[str]):
    """Return the checkpoint whose thresholds say what became of their rates in unseen data sets.

    Those of the last list: neither network nor thresholds were fitted to them. All pairs of their
    VAL and TEST images count; the adapted network is adapted to their TRAIN images.
    """
    detector = LCMemDetector(checkpoint, name="lcmem")
    shares = {"thresholds": {}, "adapted_thresholds": {}}
    for name in sorted(second):
        own = [row for row, r in enumerate(everything.records) if r.ds_name == name]
        records = [everything.records[row] for row in own]
        features = features_of(detector, layer, inputs[own])
        train = [n for n, record in enumerate(records) if record.split == "TRAIN"]
        rest = [n for n, record in enumerate(records) if record.split != "TRAIN"]
        pairs = pairs_within([records[n] for n in rest])
        first, other = (side[pairs.labels == 0] for side in (pairs.first, pairs.second))
        shares["thresholds"][name] = score_listed(detector, features[rest], first, other)
        try:
            kind = detector.adapted(features[train], [records[n].path for n in train])
        except NotAdaptableError:
            continue
        moved = kind.convert(features)[rest]
        shares["adapted_thresholds"][name] = score_listed(kind.detector, moved, first, other)

    def told(threshold: Threshold, scores: dict[str, np.ndarray]) -> Threshold:
        if threshold.kind != "fpr":
            return threshold
        enough = {n: s for n, s in scores.items() if len(s) >= required_negatives(threshold.rate)}
        found = {name: float(np.mean(s >= threshold.value)) for name, s in enough.items()}
        made = dataclasses.replace(threshold, unseen_fprs=found)
        print(f"{threshold.name}: {made.transfer}")
        return made

    fields = {
        field: tuple(told(threshold, scores) for threshold in getattr(checkpoint, field))
        for field, scores in shares.items()
    }
    return dataclasses.replace(checkpoint, **fields)


def altered(image: torch.Tensor, setting: Setting, key: str) -> torch.Tensor:
    """Return an altered image."""
    if setting.transform == "FullBlur":
        sigma = FULL_BLUR * image.shape[-1]
        return blur(image, sigma, 2 * round(3 * sigma) + 1)
    return perturb(image, setting.transform, setting.strength, seed=perturb_seed(0, key, setting))


def copies(detector: LCMemDetector, everything: Manifest, size: int) -> dict[str, float]:
    """Return the share of altered copies that are found where no null query passes."""
    rng = np.random.default_rng(1)
    singles = [r.path for r in everything.records if r.ds_name in NATURAL]
    singles = rng.permutation(singles).tolist()
    queries, null = singles[:NUM_QUERIES], singles[NUM_QUERIES : 2 * NUM_QUERIES]
    others = sorted(
        {r.path for r in everything.records if r.ds_name in BANK_FILL} - {*queries, *null}
    )
    fill = rng.choice(others, NUM_FILL, replace=False).tolist()
    images = {path: to_tensor(load_image(path), size) for path in queries + null + fill}

    def embed(chosen: list[torch.Tensor]) -> np.ndarray:
        parts = [chosen[start : start + 25] for start in range(0, len(chosen), 25)]
        size = detector.input_size
        return np.concatenate(
            [detector.embed_batch(resize_batch(torch.stack(part), size)) for part in parts]
        )

    bank = embed([images[path] for path in queries + fill])
    suite = [s for s in EXTENDED_SUITE if s.transform != "VAERoundTrip"]
    found = {}
    for setting in [*suite, Setting("FullBlur", 6.0)]:
        made = embed([altered(images[path], setting, Path(path).name) for path in queries + null])
        best = detector.top_k(made, bank, 1)
        scores, rows = best.scores[:, 0], best.rows[:, 0]
        threshold = scores[len(queries) :].max()
        hit = (rows[: len(queries)] == np.arange(len(queries))) & (
            scores[: len(queries)] > threshold
        )
        found[str(setting)] = float(hit.mean())
        print(f"| {setting} | {size} px | {hit.mean():.2f} |", flush=True)
    reference = [found[str(setting)] for setting in REFERENCE_SUITE]
    harder = [share for name, share in found.items() if name not in map(str, REFERENCE_SUITE)]
    print(f"| 24 reference settings, mean and lowest | {size} px | ", end="")
    print(f"{np.mean(reference):.3f}, {min(reference):.2f} |")
    print(f"| harder edits, mean and lowest | {size} px | {np.mean(harder):.3f}, ", end="")
    print(f"{min(harder):.2f} |", flush=True)
    return found


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filelists", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--checkpoint", help="default: the embedded one")
    parser.add_argument("--only", choices=("identities", "copies", "thresholds"))
    parser.add_argument("--output", type=Path, help="the checkpoint with what thresholds are worth")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    everything = merged(arguments.filelists)
    second = set(load_manifest(arguments.filelists[-1]).ds_names)
    checkpoint = load_checkpoint(locate_checkpoint(arguments.checkpoint))
    train = everything.select("TRAIN")
    last = LastLayer(checkpoint, Compute())
    inputs = kept(arguments.folder / "inputs.npy", lambda: last.inputs(everything))
    if arguments.only in (None, "thresholds"):
        told = transfer(checkpoint, last.name, everything, inputs, second)
        if arguments.output is not None:
            save_checkpoint(arguments.output, told)
    if arguments.only == "thresholds":
        return
    edits = Augmentation.from_preset("strong").drawn(len(train), 0)
    changed = kept(arguments.folder / "altered.npy", lambda: last.inputs(train, transform=edits))
    is_train = torch.tensor([record.split == "TRAIN" for record in everything.records])
    whitening = Whitening(
        checkpoint=checkpoint,
        layer=last.name,
        widths=tuple(last.network.backbone.widths),
        manifest=train,
        pooled=inputs[is_train],
        changes=changed - inputs[is_train],
        seed=0,
    )
    if arguments.only != "copies":
        identities(whitening, everything, inputs, second)
    if arguments.only != "identities":
        natural = next(names for names in FOLDS.values() if "bsds" in names)
        detector = fitted_without(whitening, natural.split())
        for size in SIZES:
            copies(detector, everything, size)


if __name__ == "__main__":
    main()
