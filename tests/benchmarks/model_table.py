"""Figures of docs/results.md and of the model card: detectors side by side on the same pairs.

    python tests/benchmarks/model_table.py --filelist F --detectors lcmem,ncc --identities --copies
    python tests/benchmarks/model_table.py --speed

``--sets a,b`` takes all images of these data sets, for a model that was trained without them;
otherwise the TEST identities of all sets (``--identities``) or VAL and TEST images (``--copies``).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from lcmem_cli import load_detector
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.data.loading import iter_images
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.data.pairs import pairs_within
from lcmem_cli.engine.data.perturb import EXTENDED_SUITE, REFERENCE_SUITE, perturb, perturb_seed
from lcmem_cli.engine.detectors.base import resize_batch
from lcmem_cli.engine.detectors.options import split_names
from lcmem_cli.engine.evaluation.metrics import pair_metrics

PIXEL_SIZE = 64
WORKING_SIZE = 256
NATURAL = ("imagenet_sample", "grocery", "tower", "nyala", "ham_lesion", "celebs")
NUM_QUERIES, NUM_BANK, RATE = 100, 400, 0.01


def identities(manifest, names, sets):
    """Print the AUC of all positive and up to 20,000 negative pairs within each data set."""
    records = [
        record
        for record in manifest.records
        if (record.ds_name in sets if sets else record.split == "TEST")
    ]
    pairs = pairs_within(records)
    table = {}
    for name in names:
        detector = load_detector(name, input_size=PIXEL_SIZE)
        paths = [manifest.basedir / record.path for record in records]
        features = [
            detector.embed_batch(batch.images)
            for batch in iter_images(paths, detector.input_size, workers=2, batch_size=32)
        ]
        features = np.concatenate([np.asarray(part) for part in features])
        for number, ds_name in enumerate(pairs.names):
            chosen = pairs.dataset == number
            labels = pairs.labels[chosen]
            if not 0 < labels.sum() < len(labels):
                continue
            first, second = pairs.first[chosen], pairs.second[chosen]
            scores = np.concatenate(
                [
                    detector.score_features(features[first[p]], features[second[p]])
                    for p in np.array_split(np.arange(len(first)), 1 + len(first) // 2000)
                ]
            )
            table.setdefault(ds_name, []).append(pair_metrics(scores, labels)["auc"])
    show("data set", names, table, digits=3)


def show(what, names, table, digits):
    """Print a table in Markdown, the mean last."""
    print(f"| {what} |", " | ".join(names), "|")
    print("| --- |", " | ".join("---" for _ in names), "|")
    for row, values in table.items():
        print(f"| {row} |", " | ".join(f"{v:.{digits}f}" for v in values), "|")
    means = np.mean(list(table.values()), axis=0)
    print("| mean |", " | ".join(f"{v:.3f}" for v in means), "|")


def copies(manifest, names, sets):
    """Print the share of altered copies found in a bank at 1 % of the null queries passing."""
    unseen = [
        row
        for row, record in enumerate(manifest.records)
        if record.ds_name in NATURAL and (record.split != "TRAIN" or record.ds_name in sets)
    ]
    rng = np.random.default_rng(1)
    singles = [r for r in unseen if manifest.records[r].ds_name == "imagenet_sample"]
    singles = rng.permutation(singles).tolist()
    queries, null = singles[:NUM_QUERIES], singles[NUM_QUERIES : 2 * NUM_QUERIES]
    others = [r for r in unseen if manifest.records[r].ds_name != "imagenet_sample"]
    fill = rng.choice(others, NUM_BANK - NUM_QUERIES, replace=False).tolist()
    paths = manifest.paths()
    images = {r: to_tensor(load_image(paths[r]), WORKING_SIZE) for r in queries + null + fill}
    table = {}
    for name in names:
        detector = load_detector(name, input_size=PIXEL_SIZE)

        def embed(rows, setting=None, detector=detector):
            parts = []
            for start in range(0, len(rows), 25):
                batch = [
                    images[r]
                    if setting is None
                    else perturb(
                        images[r],
                        setting.transform,
                        setting.strength,
                        seed=perturb_seed(0, str(r), setting),
                    )
                    for r in rows[start : start + 25]
                ]
                parts.append(
                    detector.embed_batch(resize_batch(torch.stack(batch), detector.input_size))
                )
            return np.concatenate(parts)

        bank = embed(queries + fill)
        for setting in EXTENDED_SUITE:
            if setting.transform == "VAERoundTrip":
                continue
            found = detector.top_k(embed(queries, setting), bank, 1)
            others_best = detector.top_k(embed(null, setting), bank, 1).scores[:, 0]
            threshold = np.sort(others_best)[-1 - round(RATE * len(null))]
            hit = (found.rows[:, 0] == np.arange(NUM_QUERIES)) & (found.scores[:, 0] > threshold)
            table.setdefault(str(setting), []).append(hit.mean())
    reference = {str(s): table.pop(str(s)) for s in REFERENCE_SUITE}
    show("24 reference settings", names, reference, digits=2)
    print()
    show("harder edits", names, table, digits=2)


def speed():
    """Print images per second of the embedded model and of a ResNet-50 at 288 px, in turn."""
    import timm

    detector = load_detector("lcmem")
    resnet = timm.create_model("resnet50").eval().to(memory_format=torch.channels_last)
    ours = torch.rand(32, 3, detector.input_size, detector.input_size)
    theirs = torch.rand(32, 3, 288, 288).contiguous(memory_format=torch.channels_last)

    def rate(run):
        begin = time.perf_counter()
        run()
        return 32 / (time.perf_counter() - begin)

    with torch.inference_mode():
        rate(lambda: detector.embed_batch(ours)), rate(lambda: resnet(theirs))
        pairs = [
            (rate(lambda: detector.embed_batch(ours)), rate(lambda: resnet(theirs)))
            for _ in range(7)
        ]
    ratios = sorted(a / b for a, b in pairs)
    print(f"embedded model {np.median([a for a, _ in pairs]):.0f} images/s")
    print(f"ResNet-50 at 288 px {np.median([b for _, b in pairs]):.0f} images/s")
    print(f"ratio {ratios[3]:.1f} (from {ratios[0]:.1f} to {ratios[-1]:.1f})")


def main():
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filelist", type=Path)
    parser.add_argument("--detectors", default="lcmem,ncc")
    parser.add_argument("--sets", default="")
    parser.add_argument("--identities", action="store_true")
    parser.add_argument("--copies", action="store_true")
    parser.add_argument("--speed", action="store_true")
    arguments = parser.parse_args()
    sets = [name for name in arguments.sets.split(",") if name]
    names = split_names(arguments.detectors)
    if arguments.identities:
        identities(load_manifest(arguments.filelist), names, sets)
    if arguments.copies:
        copies(load_manifest(arguments.filelist), names, sets)
    if arguments.speed:
        speed()


if __name__ == "__main__":
    main()
