"""How long a guard takes for one image, first and later, beside the training images it holds.

    python tests/benchmarks/bench_guard.py [--images 10000]

The index holds simulated features: those of some drawn scenes, each moved a little. Its files are
small pictures, of which keypoints are found as for any others. Prints JSON, times in milliseconds,
as measured and as used of all cores; of repeated ones the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NUM_SCENES, NUM_REAL, REPEATS = 120, 99, 20


def make_index(folder: Path, count: int) -> None:
    """Write an index of ``count`` images."""
    from lcmem_cli import load_detector
    from lcmem_cli.engine.data.scenes import draw_scene
    from lcmem_cli.engine.files import sha256_bytes
    from lcmem_cli.engine.store.index import Index
    from lcmem_cli.engine.store.steps import from_steps, in_steps

    detector = load_detector("joint")
    scenes = detector.embed(draw_scene(seed, side=256) for seed in range(NUM_SCENES))
    rng = np.random.default_rng(0)
    scenes = from_steps(scenes)
    features = scenes[rng.integers(0, NUM_SCENES, count)]
    features = in_steps(features + rng.normal(0, 0.3, features.shape) * scenes.std(axis=0))
    images, contents = [], []
    (folder / "training").mkdir()
    for number in range(count):
        cells = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        path = folder / "training" / f"{number:06}.png"
        Image.fromarray(cells).resize((128, 128), Image.Resampling.BICUBIC).save(path)
        contents.append(sha256_bytes(path.read_bytes()))
        images.append((str(path), str(number), contents[-1], None))
    index = Index.create(folder / "index", detector="joint", fingerprint=detector.fingerprint)
    index.append(images, contents, features)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return milliseconds by the clock, and of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return 1e3 * (time.perf_counter() - clock), 1e3 * (time.process_time() - processor)


def repeated(work: Callable[[int], Any]) -> tuple[float, float]:
    """Return the medians over some calls with different numbers."""
    times = [timed(lambda number=number: work(number)) for number in range(REPEATS)]
    return tuple(statistics.median(column) for column in zip(*times, strict=True))


def measure(folder: Path) -> dict[str, tuple[float, float]]:
    """Time a guard in a process that has not computed anything yet."""
    found: dict[str, Any] = {"import": timed(lambda: __import__("lcmem_cli").Guard)}
    from lcmem_cli import Guard, Index, load_detector
    from lcmem_cli.engine.data.scenes import draw_scene

    scenes = [draw_scene(2000 + seed, side=256) for seed in range(REPEATS + 2)]
    box: list[Any] = []
    found["load the model"] = timed(lambda: box.append(load_detector("joint")))
    (detector,) = box
    index = Index.open(folder / "index")
    found["first search"] = timed(lambda: index.search(detector, detector.embed(scenes[-1]), 1))
    found["search"] = repeated(lambda n: index.search(detector, detector.embed(scenes[n]), 1))
    found["embed"] = repeated(lambda n: detector.embed(scenes[n]))
    fit = lambda: box.append(Guard.fit(index, folder / "real", detector=detector))  # noqa: E731
    found["fit"] = timed(fit)
    guard = box[-1]
    found["first check"] = timed(lambda: guard.check(scenes[-2]))
    found["check"] = repeated(lambda n: guard.check(scenes[n]))
    found["check again"] = repeated(lambda n: guard.check(scenes[n]))
    return found


def main() -> None:
    """Make the index, and start a new process for the times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="keep the index here, or use what is there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        if not (folder / "index").is_dir():
            import subprocess

            from lcmem_cli.engine.data.scenes import draw_scene

            (folder / "real").mkdir(parents=True)
            for seed in range(NUM_REAL):
                draw_scene(1000 + seed, side=256).save(folder / "real" / f"{seed}.png")
            make_index(folder, arguments.images)
            command = [sys.executable, __file__, "--folder", str(folder)]
            sys.exit(subprocess.run(command).returncode)
        print(
            json.dumps({name: [round(t) for t in times] for name, times in measure(folder).items()})
        )


if __name__ == "__main__":
    main()
