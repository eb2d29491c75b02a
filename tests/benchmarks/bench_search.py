"""Times of the exact search beside ``torch.cdist(p=1)`` + ``topk``, and its memory at scale.

    python tests/benchmarks/bench_search.py
    python tests/benchmarks/bench_search.py --features features.npy --weight weight.npy
    python tests/benchmarks/bench_search.py --scale 1000000 --queries 1000
    python tests/benchmarks/bench_search.py --scale 1000000 --detector joint --approximate

Every form is run in turn, several times, and the fastest run of each counts, in wall time and in
processor time over all threads (which other programs on the machine disturb less). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli import Detector, load_detector
from lcmem_cli.engine.store import search
from lcmem_cli.engine.store.steps import in_steps

Features = NDArray[np.float32]
K = 5
REFERENCE = "cdist + topk (no weights)"


def simulated(rows: int, columns: int, *, seed: int) -> Features:
    """Return uniform features: the hardest case for the 8-bit pass, all dimensions in full use."""
    return np.random.default_rng(seed).random((rows, columns), dtype=np.float32)


Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}


def fastest(forms: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Return the shortest time of each form in seconds by clock; the forms take turns."""
    for form in forms.values():
        form()  # compile, and touch the memory
    times = {clock: dict.fromkeys(forms, float("inf")) for clock in CLOCKS}
    for _ in range(repeats):
        for name, form in forms.items():
            began = {clock: now() for clock, now in CLOCKS.items()}
            form()
            for clock, now in CLOCKS.items():
                times[clock][name] = min(times[clock][name], now() - began[clock])
    return times


def compare(queries: Features, bank: Features, weight: Features, repeats: int) -> dict[str, object]:
    """Time every form on the same features."""
    import torch

    torch_queries, torch_bank = torch.from_numpy(queries), torch.from_numpy(bank)
    forms: dict[str, Callable[[], object]] = {
        REFERENCE: lambda: torch.cdist(torch_queries, torch_bank, p=1).topk(K, largest=False),
        "matrix": lambda: search.weighted_l1_matrix(queries, bank, weight),
        "top_k": lambda: search.weighted_l1_top_k(queries, bank, weight, K),
    }
    try:
        import faiss
    except ImportError:
        pass
    else:
        flat = faiss.IndexFlat(bank.shape[1], faiss.METRIC_L1)
        flat.add(bank)
        forms["faiss flat L1 (no weights)"] = lambda: flat.search(queries, K)
    times = fastest(forms, repeats)
    return {
        "shape": [*queries.shape, len(bank)],
        "seconds": times,
        "ratio to cdist": {
            clock: {name: seconds / by_form[REFERENCE] for name, seconds in by_form.items()}
            for clock, by_form in times.items()
        },
    }


def at_scale(rows: int, num_queries: int, columns: int) -> dict[str, object]:
    """Search a memory map of ``rows`` features and report the time and the memory in use."""
    weight = np.random.default_rng(2).normal(size=columns).astype(np.float32)
    queries = simulated(num_queries, columns, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.npy"
        bank = np.lib.format.open_memmap(path, "w+", np.float32, (rows, columns))
        for start in range(0, rows, 65536):
            stop = min(start + 65536, rows)
            bank[start:stop] = simulated(stop - start, columns, seed=start)
        bank.flush()
        del bank
        mapped = np.load(path, mmap_mode="r")
        search.weighted_l1_top_k(queries[:64], mapped[:1000], weight, K)
        began = time.perf_counter()
        found = search.weighted_l1_top_k(queries, mapped, weight, K)
        seconds = time.perf_counter() - began
        one = time.perf_counter()
        search.weighted_l1_top_k(queries[:1], mapped, weight, K)
        one = time.perf_counter() - one
    assert (np.diff(found.scores, axis=1) <= 0).all()
    return {
        "shape": [num_queries, columns, rows],
        "seconds": seconds,
        "seconds for one query": one,
        "peak resident GiB, mapped pages included": resource.getrusage(
            resource.RUSAGE_SELF
        ).ru_maxrss
        / 2**20,
    }


def stored(detector: Detector, rows: int, *, seed: int) -> NDArray[Any]:
    """Return features as a detector keeps them: of a thousand things, each seen many times."""
    rng, width = np.random.default_rng(seed), detector.num_features
    network = getattr(detector, "network", detector).num_features
    things = np.random.default_rng(0).random((1000, width), dtype=np.float32)
    made = things[rng.integers(0, len(things), rows)]
    made += 0.2 * rng.standard_normal(made.shape, dtype=np.float32)
    np.clip(made, 0, 1, out=made)
    pictures = made[:, network:]
    if pictures.size:
        pictures -= pictures.mean(axis=1, keepdims=True)
        pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    return in_steps(made) if detector.feature_dtype == np.int16 else made


def detector_at_scale(
    name: str, rows: int, num_queries: int, *, approximate: bool
) -> dict[str, object]:
    """Search a memory map of features with a detector, for further views of what they show."""
    detector = load_detector(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.npy"
        kind, width = detector.feature_dtype, detector.num_features
        bank = np.lib.format.open_memmap(path, "w+", kind, (rows, width))
        for start in range(0, rows, 16384):
            stop = min(start + 16384, rows)
            bank[start:stop] = stored(detector, stop - start, seed=1 + start)
        bank.flush()
        del bank
        mapped = np.load(path, mmap_mode="r")
        queries = stored(detector, num_queries, seed=0)
        searcher = detector.approximate() if approximate else detector
        searcher.top_k(queries[:64], mapped[:2000], K)  # compiles
        began, busy = time.perf_counter(), time.process_time()
        found = searcher.top_k(queries, mapped, K)
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
    return {
        "detector": name,
        "approximate": approximate,
        "shape": [num_queries, width, rows],
        "seconds": seconds,
        "processor seconds": busy,
        "recall": found.recall,
        "peak resident GiB, mapped pages included": resource.getrusage(
            resource.RUSAGE_SELF
        ).ru_maxrss
        / 2**20,
    }


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=int, help="Stored features of a search at scale.")
    parser.add_argument("--detector", help="With --scale: whose search, lcmem or joint.")
    parser.add_argument("--approximate", action="store_true", help="With --detector.")
    parser.add_argument("--features", type=Path, help="Real features, .npy [n, d].")
    parser.add_argument("--weight", type=Path, help="Weights of the head, .npy [d].")
    options = parser.parse_args()
    if options.scale and options.detector:
        result = detector_at_scale(
            options.detector, options.scale, options.queries, approximate=options.approximate
        )
    elif options.scale:
        result = at_scale(options.scale, options.queries, options.columns)
    elif options.features:
        features = np.load(options.features).astype(np.float32)
        half = len(features) // 2
        weight = np.load(options.weight).astype(np.float32).reshape(-1)
        result = compare(features[:half].copy(), features[half:].copy(), weight, options.repeats)
    else:
        result = compare(
            simulated(options.queries, options.columns, seed=0),
            simulated(options.rows, options.columns, seed=1),
            np.random.default_rng(2).normal(size=options.columns).astype(np.float32),
            options.repeats,
        )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
