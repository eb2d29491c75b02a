"""Audits whose conditions are broken: what is flagged, and how often it is called more than chance.

Nothing is copied in any of them, so each flag is false. An audit should flag the stated rate, or
fewer; say "more than chance" in at most 2.5 % of its runs; or call the sets not comparable.

    python tests/benchmarks/bench_conditions.py data/filelist.csv --draws 20

DATA needs the data sets ``ham_lesion`` and ``nih_cxr64``, with several images of one identity.
Candidates are not verified, so the rates are those of the network and the pictures alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.evaluation.audit.run import audit
from lcmem_cli.engine.reporter import SILENT

Row = tuple[Path, str]
RATE, SMALLEST = 0.05, 39


class Scenarios:
    """Deals out the identities of one data set, and breaks a condition.

    Args:
        by_id: files of each identity.
        folder: where altered images are written.
        rng: of the deals.
    """

    def __init__(
        self, by_id: dict[str, list[Path]], folder: Path, rng: np.random.Generator
    ) -> None:
        self.by_id, self.folder, self.rng = by_id, folder, rng

    def deal(self) -> tuple[list[str], list[str], list[str]]:
        """Return a half of the identities and two quarters."""
        names = self.rng.permutation(sorted(self.by_id)).tolist()
        half, quarter = len(names) // 2, len(names) // 4
        return names[:half], names[half : half + quarter], names[half + quarter :]

    def one(self, names: list[str]) -> list[Row]:
        """Return one image of each."""
        return [
            (self.by_id[name][self.rng.integers(len(self.by_id[name]))], name) for name in names
        ]

    def all(self, names: list[str]) -> list[Row]:
        """Return all images of each."""
        return [(path, name) for name in names for path in self.by_id[name]]

    def altered(
        self, rows: list[Row], kind: str, alter: Callable[[Image.Image], Image.Image]
    ) -> list[Row]:
        """Return altered images in place of these."""
        changed = []
        for path, name in rows:
            target = self.folder / kind / f"{path.stem}.png"
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                alter(load_image(path)).save(target)
            changed.append((target, name))
        return changed

    def kept(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Conditions hold: generated, training, held-out."""
        training, real, fresh = self.deal()
        return self.one(fresh), self.all(training), self.one(real)

    def other_source(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Held-out images are blurred."""
        fresh, training, real = self.kept()
        blurred = self.altered(
            real, "blurred", lambda image: image.filter(ImageFilter.GaussianBlur(2))
        )
        return fresh, training, blurred

    def several_images(self) -> tuple[list[Row], list[Row], list[Row]]:
        """All images of each identity, on both sides."""
        training, real, fresh = self.deal()
        return self.all(fresh), self.all(training), self.all(real)

    def shared(self) -> tuple[list[Row], list[Row], list[Row]]:
        """A fifth of the held-out identities stand in the training set too."""
        training, real, fresh = self.deal()
        return self.one(fresh), self.all(training + real[: len(real) // 5]), self.one(real)

    def contaminated(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Of the held-out images 5 % are mirrored training images under new ids."""
        fresh, training, real = self.kept()
        leaked = self.altered(training[: max(1, len(real) // 20)], "mirrored", ImageOps.mirror)
        return fresh, training, real + [(path, f"new-{name}") for path, name in leaked]

    def smallest(self) -> tuple[list[Row], list[Row], list[Row]]:
        """No held-out images, and as few training images as the rate allows without them."""
        training, real, fresh = self.deal()
        return self.one(fresh + real), self.one(training)[:SMALLEST], []

    def collapsed(self) -> tuple[list[Row], list[Row], list[Row]]:
        """The generator repeats each of a few pictures twenty times, nearly alike."""
        fresh, training, real = self.kept()
        repeated = []
        for turn in range(20):
            again = self.altered(
                fresh[:10],
                f"again{turn}",
                lambda image: image.point(lambda v: min(255, v + turn % 3)),  # noqa: B023
            )
            repeated += [(path, f"{name}-{turn}") for path, name in again]
        return repeated, training, real


SCENARIOS = {
    "conditions hold": Scenarios.kept,
    "held-out images of another source": Scenarios.other_source,
    "several images of an identity": Scenarios.several_images,
    "identities in both sets": Scenarios.shared,
    "contaminated held-out images": Scenarios.contaminated,
    "mode collapse": Scenarios.collapsed,
    "leave-one-out at its smallest": Scenarios.smallest,
}


def write(path: Path, rows: list[Row]) -> Path:
    """Write a filelist."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "id"])
        writer.writerows([[str(image), name] for image, name in rows])
    return path


def main() -> int:
    """Run every scenario on every data set and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("filelist", type=Path)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--ds-name", action="append", help="default: ham_lesion, nih_cxr64")
    parser.add_argument("--only", action="append", choices=SCENARIOS, help="default: all")
    parser.add_argument("--detector", default="lcmem")
    arguments = parser.parse_args()
    detector = load_detector(arguments.detector)
    for name in arguments.ds_name or ("ham_lesion", "nih_cxr64"):
        by_id: dict[str, list[Path]] = defaultdict(list)
        with arguments.filelist.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["ds_name"] == name:
                    by_id[row["id"]].append((arguments.filelist.parent / row["path"]).absolute())
        with tempfile.TemporaryDirectory() as folder:
            scenarios = Scenarios(by_id, Path(folder), np.random.default_rng(0))
            for scenario in arguments.only or SCENARIOS:
                row = judge(name, scenario, scenarios, detector, arguments.draws)
                print(json.dumps(row), flush=True)
    return 0


def judge(
    name: str, scenario: str, scenarios: Scenarios, detector: Detector, draws: int
) -> dict[str, object]:
    """Run one scenario several times and count."""
    flagged = images = more = apart = 0
    for _ in range(draws):
        lists = SCENARIOS[scenario](scenarios)
        files = [
            write(scenarios.folder / f"{what}.csv", rows)
            for what, rows in zip(("generated", "training", "held-out"), lists, strict=True)
        ]
        result = audit(
            files[0], files[1], held_out=files[2] if lists[2] else None, basedir="/", fpr=RATE,
            detector=detector, verify=False, sensitivity=0, top_k=1, reporter=SILENT,
        )  # fmt: skip
        flagged, images = flagged + result.num_flagged, images + result.num_queries
        more += result.more_than_chance is True
        apart += result.comparable is False
    return {
        "data set": name, "scenario": scenario, "flagged": round(flagged / images, 4),
        "more than chance": f"{more} of {draws}", "not comparable": f"{apart} of {draws}",
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
