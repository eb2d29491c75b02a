"""From the start of ``lcmem infer a b`` to its answer, beside ``python -c "import torch, timm"``.

    python tests/benchmarks/bench_start.py

Both are started in turn, several times; the ratio of the fastest runs counts. Prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lcmem_cli.engine.data.scenes import draw_scene

REPEATS = 7


def seconds(*arguments: str) -> float:
    """Return how long a new Python process takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Let both take turns."""
    with tempfile.TemporaryDirectory() as name:
        pair = [str(Path(name) / f"{seed}.png") for seed in range(2)]
        for seed, path in enumerate(pair):
            draw_scene(seed).save(path)
        infer = ("-m", "lcmem_cli", "infer", *pair)
        imports = ("-c", "import torch, timm")
        times = [(seconds(*infer), seconds(*imports)) for _ in range(REPEATS)]
    ours, theirs = (min(column) for column in zip(*times, strict=True))
    print(json.dumps({"infer_s": ours, "import_s": theirs, "ratio": ours / theirs}))


if __name__ == "__main__":
    main()
