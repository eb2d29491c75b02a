"""Known-answer benchmark of ``lcmem audit`` on real images: false flags and recall per edit.

In every repeat the identities of the data are dealt out anew: most to the training set, one image
each of others to the generated set ("fresh", nothing copied) and to the held-out set. Altered
copies of images that are always in the training set are planted among the generated ones. With m
held-out images and the rate q, a = floor((m + 1) q) of the m + 1 ranks are flagged, so the share of
fresh images flagged should be a / (m + 1) on average, which is at most q. In one split the number
flagged of n follows a beta-binomial law, as the null is drawn too.

    python tests/benchmarks/bench_audit_fpr.py DATA --detector ncc --repeats 20 -o FOLDER

DATA is a folder with ``filelist.csv`` (path, id, ds_name); ``--only`` takes some of its data sets,
so that all images are of one kind. Every finished split is a line of FOLDER/splits.jsonl, from
which a killed run goes on. Features and keypoints are in the user's cache (``LCMEM_CACHE``), and
the alignments of a query with a training image are remembered for the other splits.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import betabinom, binom

from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.data.perturb import EXTENDED_SUITE, perturb
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.evaluation.audit.run import audit
from lcmem_cli.engine.evaluation.calibration import clopper_pearson
from lcmem_cli.engine.verification import evidence
from lcmem_cli.engine.verification.alignment import Query
from lcmem_cli.engine.verification.features import LocalFeatures

Align = Callable[[Query, LocalFeatures], evidence.Found | None]


def edit_name(transform: str, strength: float) -> str:
    """Return a name of an edit that can be part of a file name."""
    return f"{transform}-{strength:g}"


def plant(files: list[Path], folder: Path) -> dict[str, str]:
    """Write altered copies of the images, and return the edit behind each file name."""
    import torch

    edits = {}
    folder.mkdir(parents=True, exist_ok=True)
    for setting in EXTENDED_SUITE:
        edit = edit_name(setting.transform, setting.strength)
        for number, file in enumerate(files):
            target = folder / f"{edit}-{number:03d}.png"
            edits[target.name] = edit
            if target.exists():
                continue
            pixels = torch.from_numpy(np.array(load_image(file))).permute(2, 0, 1).float() / 255
            changed = perturb(pixels, setting.transform, setting.strength, seed=number)
            array = (changed.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(array).save(target)
    return edits


def write_list(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Write a filelist of (path, id)."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "id"])
        writer.writerows(rows)
    return path


def remembering(align: Align) -> Align:
    """Return a function that aligns each pair of contents once: the same pairs meet in splits."""
    known: dict[bytes, evidence.Found | None] = {}

    def digest(features: LocalFeatures) -> bytes:
        return hashlib.blake2b(features.packed(), digest_size=12).digest()

    def remembered(query: Query, training: LocalFeatures) -> evidence.Found | None:
        key = digest(query.features) + digest(training)
        if key not in known:
            known[key] = align(query, training)
        return known[key]

    return remembered


class Benchmark:
    """Images, planted copies and one audit for each split.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.fpr, self.folder = arguments.fpr, arguments.output
        self.by_id: dict[str, list[Path]] = defaultdict(list)
        with (arguments.data / "filelist.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if not arguments.only or row["ds_name"] in arguments.only:
                    path = (arguments.data / row["path"]).absolute()
                    self.by_id[row["id"]].append(path)
        self.rng = np.random.default_rng(0)
        names = np.array(sorted(self.by_id))
        self.always = self.rng.choice(names, arguments.copies, replace=False)
        sources = [self.by_id[name][0] for name in self.always]
        self.edits = plant(sources, (self.folder / "copies").absolute())
        self.others = np.setdiff1d(names, self.always)
        self.num_held_out = len(self.others) * 4 // 10
        self.num_fresh = len(self.others) * 2 // 10
        self.detector = load_detector(arguments.detector, input_size=arguments.input_size)

    def lists(self) -> dict[str, list[tuple[str, str]]]:
        """Deal out the identities anew."""
        order = self.rng.permutation(self.others)
        parts = np.split(order, [self.num_held_out, self.num_held_out + self.num_fresh])

        def one_each(ids: np.ndarray) -> list[tuple[str, str]]:
            return [(str(self.rng.choice(self.by_id[name])), name) for name in ids]

        training = [
            (str(path), name) for name in [*self.always, *parts[2]] for path in self.by_id[name]
        ]
        return {
            "held-out": one_each(parts[0]),
            "fresh": one_each(parts[1]),
            "training": training,
        }

    def split(self, lists: dict[str, list[tuple[str, str]]]) -> dict[str, Any]:
        """Run the audit of one split and count."""
        copies = [(str((self.folder / "copies" / n).absolute()), n) for n in self.edits]
        files = {
            name: write_list(self.folder / f"{name}.csv", rows)
            for name, rows in {
                "generated": lists["fresh"] + copies,
                "training": lists["training"],
                "held-out": lists["held-out"],
            }.items()
        }
        result = audit(
            files["generated"],
            files["training"],
            held_out=files["held-out"],
            basedir="/",
            fpr=self.fpr,
            detector=self.detector,
            top_k=1,
            sensitivity=0,
        )
        fresh = {path for path, _ in lists["fresh"]}
        found, right = Counter[str](), Counter[str]()
        for match in result.flagged:
            if match.query not in fresh:
                name = Path(match.query).name
                source = self.by_id[self.always[int(name.rsplit("-", 1)[1][:-4])]][0]
                found[self.edits[name]] += 1
                right[self.edits[name]] += match.match == str(source)
        return {
            "fresh_flagged": sum(match.query in fresh for match in result.flagged),
            "null": result.null.num_scores,
            "flagged": found,
            "flagged_with_its_original": right,
        }

    def splits(self, repeats: int) -> list[dict[str, Any]]:
        """Run the splits that are not done yet; return all."""
        path = self.folder / "splits.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        done = [json.loads(line) for line in lines]
        for repeat in range(repeats):
            lists = self.lists()  # of those done too: the next split depends on it
            if repeat < len(done):
                continue
            done.append(self.split(lists))
            with path.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            copies = sum(done[-1]["flagged"].values()) / len(self.edits)
            print(
                f"split {repeat}: {done[-1]['fresh_flagged']} of {self.num_fresh} fresh images "
                f"flagged, {copies:.3f} of the copies",
                file=sys.stderr,
                flush=True,
            )
        return done[:repeats]

    def summary(self, splits: list[dict[str, Any]]) -> dict[str, Any]:
        """Put the splits together."""
        total = len(splits) * self.num_fresh
        flagged_fresh = sum(split["fresh_flagged"] for split in splits)
        inside, expected = 0, []
        for split in splits:
            m = split["null"]
            allowed = int((m + 1) * self.fpr + 1e-9)
            expected.append(allowed / (m + 1))
            law = betabinom(self.num_fresh, allowed, m + 1 - allowed)
            inside += bool(law.ppf(0.025) <= split["fresh_flagged"] <= law.ppf(0.975))
        rate = float(np.mean(expected))
        per_edit = Counter(self.edits.values())
        recall = {
            edit: {
                key: sum(split[key].get(edit, 0) for split in splits) / (count * len(splits))
                for key in ("flagged", "flagged_with_its_original")
            }
            for edit, count in per_edit.items()
        }
        return {
            "detector": self.detector.name,
            "fingerprint": self.detector.fingerprint,
            "fpr": self.fpr,
            "expected_share": rate,
            "repeats": len(splits),
            "fresh_images": total,
            "fresh_flagged": flagged_fresh,
            "share": flagged_fresh / total,
            "share_interval": clopper_pearson(flagged_fresh, total),
            "binomial_interval_of_count": [
                int(bound) for bound in binom.ppf([0.025, 0.975], total, rate)
            ],
            "splits_inside_beta_binomial_95": inside,
            "mean_recall": float(np.mean([values["flagged"] for values in recall.values()])),
            "recall": recall,
        }


def main() -> int:
    """Run the benchmark and print its tables; exit 1 if the rate does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--detector", default="lcmem")
    parser.add_argument("--input-size", type=int, default=64, help="of the pixel measures")
    parser.add_argument("--only", action="append", help="a data set; repeat for several")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--fpr", type=float, default=0.01)
    parser.add_argument("--copies", type=int, default=26, help="images that copies are made of")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    for name in ("by_keypoints", "by_correlation"):
        setattr(evidence, name, remembering(getattr(evidence, name)))
    benchmark = Benchmark(arguments)
    summary = benchmark.summary(benchmark.splits(arguments.repeats))
    (arguments.output / "bench_audit_fpr.json").write_text(json.dumps(summary, indent=2) + "\n")
    low, high = summary["share_interval"]
    least, most = summary["binomial_interval_of_count"]
    print(
        f"{summary['detector']}: {summary['fresh_flagged']} of {summary['fresh_images']} fresh "
        f"images flagged at {arguments.fpr:g} ({100 * summary['share']:.2f} %, 95 % CI "
        f"{100 * low:.2f} to {100 * high:.2f}; expected {100 * summary['expected_share']:.2f} %, "
        f"binomial 95 % interval {least} to {most} images); "
        f"{summary['splits_inside_beta_binomial_95']} of {arguments.repeats} splits inside their "
        f"own interval; mean recall {summary['mean_recall']:.3f}"
    )
    for edit, recall in summary["recall"].items():
        print(
            f"  {edit:28s} recall {recall['flagged']:.3f}"
            f"   with its original {recall['flagged_with_its_original']:.3f}"
        )
    return 0 if least <= summary["fresh_flagged"] <= most else 1


if __name__ == "__main__":
    sys.exit(main())
