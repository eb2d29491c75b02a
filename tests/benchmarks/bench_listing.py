"""How long a set of two million files is listed, and how much memory its list takes.

    python tests/benchmarks/bench_listing.py [--files 2000000] [--folders 2000] [--place FOLDER]

Makes the files as links to one per folder, so that they take little room on the disk, and removes
them. Prints JSON: seconds and peak memory of a new process that lists them as an audit does, and
then says of each whether it has changed, which is all that a known image costs on a local disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.evaluation.audit.sets import list_set
from lcmem_cli.engine.store.features import file_state


def make(place: Path, num_files: int, num_folders: int) -> None:
    """Make the set."""
    each = num_files // num_folders
    for folder in (place / f"{number:05}" for number in range(num_folders)):
        folder.mkdir()
        draw_scene(0, side=16).save(folder / "0.png")
        for number in range(1, each):
            os.link(folder / "0.png", folder / f"{number}.png")


def measure(place: Path) -> dict[str, float]:
    """List the set in this process."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    before, began = peak(), time.perf_counter()
    listing = list_set(place, what="training")
    listed, after = time.perf_counter(), peak()
    for file in listing.files:
        file_state(file)
    return {
        "files": len(listing.files),
        "listing_s": round(listed - began, 1),
        "states_s": round(time.perf_counter() - listed, 1),
        "gib": round(after - before, 2),
    }


def main() -> None:
    """Make the set, and list it in a new process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=2_000_000)
    parser.add_argument("--folders", type=int, default=2_000)
    parser.add_argument("--place", type=Path, help="where the set is made; or of --list")
    parser.add_argument("--list", action="store_true", help="a set that is there")
    asked = parser.parse_args()
    if asked.list:
        print(json.dumps(measure(asked.place)))
        return
    with tempfile.TemporaryDirectory(dir=asked.place) as name:
        make(Path(name), asked.files, asked.folders)
        subprocess.run([sys.executable, __file__, "--list", "--place", name], check=True)


if __name__ == "__main__":
    main()
