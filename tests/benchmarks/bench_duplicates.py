"""How many planted duplicates are found in a set, and how many of its own images are called some.

    python tests/benchmarks/bench_duplicates.py FOLDER... [--images 400]

Of each folder the first images are taken, and of 20 of them a mirrored, a cropped (about 75 % of
the area, brought back to the size) and a recompressed copy (JPEG, quality 60) are planted. Prints
a row of a Markdown table for each folder.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image, ImageOps

from lcmem_cli.engine.evaluation.duplicates import find_duplicates

NUM_COPIED = 20
KINDS = ("mirrored", "cropped", "recompressed")


def plant(folder: Path, files: list[Path]) -> dict[str, str]:
    """Copy files, plant duplicates of some, and return the original of each."""
    for file in files:
        shutil.copy(file, folder / f"a-{file.name}")
    originals = {}
    for file in random.Random(0).sample(files, NUM_COPIED):
        with Image.open(file) as opened:
            image = opened.convert("L" if opened.mode == "L" else "RGB")
        (width, height), name = image.size, f"a-{file.name}"
        box = (width // 20, height // 10, width - width // 10, height - height // 20)
        mirrored, cropped, recompressed = (f"z-{kind}-{file.stem}" for kind in KINDS)
        ImageOps.mirror(image).save(folder / f"{mirrored}.png")
        image.resize(image.size, Image.Resampling.BICUBIC, box).save(folder / f"{cropped}.png")
        image.save(folder / f"{recompressed}.jpg", quality=60)
        originals |= {f"{mirrored}.png": name, f"{cropped}.png": name, f"{recompressed}.jpg": name}
    return originals


def main() -> None:
    """Print a row for each folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--images", type=int, default=400)
    given = parser.parse_args()
    for source in given.folders:
        files = sorted(file for file in source.iterdir() if file.suffix in (".png", ".jpg"))
        files = files[: given.images]
        with tempfile.TemporaryDirectory() as folder:
            originals = plant(Path(folder), files)
            result = find_duplicates(folder)
        found = Counter(
            item.path.split("-")[1]
            for item in result.duplicates
            if originals.get(item.path) == item.kept
        )
        real = sum(item.path not in originals for item in result.duplicates)
        cells = [*(f"{found[kind]} of {NUM_COPIED}" for kind in KINDS), f"{real} of {len(files)}"]
        print(f"| {source.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
