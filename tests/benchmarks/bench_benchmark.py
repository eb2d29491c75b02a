"""Time ``lcmem benchmark`` against encoding both images of every pair, on the same pairs and model.

Run it by hand: ``python tests/benchmarks/bench_benchmark.py FILELIST --detector lcmem``. The two
ways take turns, so that a change of the machine's load meets both.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from lcmem_cli.engine.data.loading import iter_images
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.data.pairs import reference_pairs
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.distributed import resolve_workers
from lcmem_cli.engine.evaluation.study.benchmark import benchmark
from lcmem_cli.engine.reporter import Reporter


class Passes(Reporter):
    """Remembers how many images were embedded."""

    encoder_passes = 0
    distinct = 0

    def event(self, name: str, **fields: object) -> None:
        """Take the numbers of an embedding."""
        if name == "embedded":
            self.encoder_passes = int(str(fields["encoder_passes"]))
            self.distinct = int(str(fields["distinct"]))


def encode_every_pair(
    filelist: Path, basedir: Path | None, name: str, input_size: int, batch_size: int
) -> np.ndarray:
    """Score the pairs as the published code does: load and encode both images of each pair."""
    records = load_manifest(filelist, basedir=basedir).select("TEST")
    pairs, paths = reference_pairs(records.records), records.paths()
    detector = load_detector(name, input_size=input_size)
    features = []
    for rows in (pairs.first, pairs.second):
        batches = iter_images(
            [paths[row] for row in rows],
            detector.input_size,
            workers=resolve_workers(-1),
            batch_size=batch_size,
        )
        features.append(np.concatenate([detector.embed_batch(batch.images) for batch in batches]))
    return detector.score_features(*features)


def main() -> None:
    """Take turns, compare the scores, and print both times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filelist", type=Path)
    parser.add_argument("--basedir", type=Path)
    parser.add_argument("--detector", default="lcmem")
    parser.add_argument("--input-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[float]] = {"every pair": [], "benchmark": []}
    for _ in range(options.repeats):
        began = time.perf_counter()
        expected = encode_every_pair(
            options.filelist,
            options.basedir,
            options.detector,
            options.input_size,
            options.batch_size,
        )
        times["every pair"].append(time.perf_counter() - began)
        passes = Passes()
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            benchmark(
                options.filelist,
                basedir=options.basedir,
                output=Path(folder) / "out",
                detectors=[options.detector],
                input_size=options.input_size,
                batch_size=options.batch_size,
                fit_split=None,
                cache=False,
                reporter=passes,
            )
            times["benchmark"].append(time.perf_counter() - began)
            with (Path(folder) / "out" / "scores.csv").open(newline="") as file:
                found = [float(row[options.detector]) for row in csv.DictReader(file)]
        difference = float(np.abs(np.asarray(found) - expected).max())
        ratio = times["every pair"][-1] / times["benchmark"][-1]
        print(
            f"{len(expected)} pairs: every pair {times['every pair'][-1]:.1f} s "
            f"({2 * len(expected)} encoder passes), benchmark {times['benchmark'][-1]:.1f} s "
            f"({passes.encoder_passes} passes, {passes.distinct} distinct images): {ratio:.2f} "
            f"times less; scores differ by at most {difference:.1e}",
            flush=True,
        )
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"median: {medians['every pair'] / medians['benchmark']:.2f} times less")


if __name__ == "__main__":
    main()
