"""Time of verifying an image beside that of embedding it, by turns on the same images.

Each image is embedded, its keypoints are found, and ten others are aligned with it, whose keypoints
are at hand as they are from the cache: what an image that copies nothing costs, and nearly the
most. A copy beyond doubt costs less: then correlation is not tried. Processor time of one thread,
so other work on the machine changes little.

    python tests/benchmarks/bench_verify.py DATA --only imagenet_sample

DATA is a folder with ``filelist.csv`` (path, id, ds_name).
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.verification.evidence import find_alignments
from lcmem_cli.engine.verification.features import local_features, single_threaded
from lcmem_cli.engine.verification.verify import NUM_CANDIDATES


def main() -> int:
    """Measure and print medians over the images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", required=True, help="a data set")
    parser.add_argument("--images", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with (arguments.data / "filelist.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["ds_name"] == arguments.only]
    images = [load_image(arguments.data / row["path"]) for row in rows[: arguments.images]]
    detector = load_detector("joint")
    with single_threaded():
        known = [local_features(image) for image in images]
        detector.embed(images[:1])
        find_alignments(known[0], known[1:2])  # the first call loads libraries
        spent: dict[str, list[float]] = {"embedding": [], "keypoints": [], "other": [], "copy": []}

        def timed(name: str, work: Callable[[], object]) -> None:
            start = time.process_time()
            work()
            spent[name].append(1000 * (time.process_time() - start))

        for place, image in enumerate(images):
            others = [known[(place + step) % len(known)] for step in range(1, NUM_CANDIDATES + 1)]
            timed("embedding", lambda image=image: detector.embed([image]))
            timed("keypoints", lambda image=image: local_features(image))
            timed("other", lambda p=place, o=others: find_alignments(known[p], o))
            timed("copy", lambda p=place, o=others: find_alignments(known[p], [known[p], *o[1:]]))
    both = np.add(spent["keypoints"], spent["other"])
    print(f"{len(images)} images of {arguments.only}, milliseconds of one thread, medians")
    for name, values in {**spent, "keypoints and other": both}.items():
        print(f"  {name:20s} {np.median(values):6.1f}")
    share = np.median(both / np.array(spent["embedding"]))
    print(f"  verification takes {share:.2f} times as long as embedding (median of pairs)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
