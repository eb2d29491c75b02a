"""Known-answer benchmark of ``lcmem audit`` on real images: false flags and recall per edit.

In every repeat the identities of the data are dealt out anew: most to the training set, one image
each of others to the generated set ("fresh", nothing copied) and to the held-out set. Altered
copies of images that are always in the training set are planted among the generated ones. With m
held-out images and the rate q, a = floor((m + 1) q) of the m + 1 ranks are flagged, so the share of
fresh images flagged should be a / (m + 1) on average, which is at most q. In one split the number
flagged of n follows a beta-binomial law, as the null is drawn too.

    python tests/benchmarks/bench_audit_fpr.py DATA --detector ncc --repeats 20 -o FOLDER

DATA is a folder with ``filelist.csv`` (path, id). Features are cached in FOLDER, so the first
repeat takes the time.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import betabinom, binom

from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.data.perturb import EXTENDED_SUITE, perturb
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.evaluation.audit.run import audit
from lcmem_cli.engine.evaluation.calibration import clopper_pearson


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


def main() -> int:
    """Run the benchmark and print its tables; exit 1 if the rate does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--detector", default="lcmem")
    parser.add_argument("--input-size", type=int, default=64, help="of the pixel measures")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--fpr", type=float, default=0.01)
    parser.add_argument("--copies", type=int, default=26, help="images that copies are made of")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    by_id: dict[str, list[Path]] = defaultdict(list)
    with (arguments.data / "filelist.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            by_id[row["id"]].append((arguments.data / row["path"]).absolute())
    rng = np.random.default_rng(0)
    names = np.array(sorted(by_id))
    always = rng.choice(names, arguments.copies, replace=False)
    edits = plant([by_id[name][0] for name in always], (arguments.output / "copies").absolute())
    others = np.setdiff1d(names, always)
    num_held_out, num_fresh = len(others) * 4 // 10, len(others) * 2 // 10
    detector = load_detector(arguments.detector, input_size=arguments.input_size)

    flagged_fresh, found, right, splits = 0, Counter[str](), Counter[str](), []
    for repeat in range(arguments.repeats):
        order = rng.permutation(others)
        parts = np.split(order, [num_held_out, num_held_out + num_fresh])

        def one_each(ids: np.ndarray) -> list[tuple[str, str]]:
            return [(str(rng.choice(by_id[name])), name) for name in ids]

        held_out = write_list(arguments.output / "held-out.csv", one_each(parts[0]))
        fresh = one_each(parts[1])
        copies = [(str((arguments.output / "copies" / n).absolute()), n) for n in edits]
        generated = write_list(arguments.output / "generated.csv", fresh + copies)
        training = write_list(
            arguments.output / "training.csv",
            [(str(path), name) for name in [*always, *parts[2]] for path in by_id[name]],
        )
        result = audit(
            generated,
            training,
            held_out=held_out,
            basedir="/",
            fpr=arguments.fpr,
            detector=detector,
            top_k=1,
            output=arguments.output / "audit",
            overwrite=True,
        )
        fresh_paths = {path for path, _ in fresh}
        false = sum(match.query in fresh_paths for match in result.flagged)
        flagged_fresh += false
        splits.append((false, result.null.num_scores))
        for match in result.flagged:
            if match.query not in fresh_paths:
                name = Path(match.query).name
                found[edits[name]] += 1
                original = by_id[always[int(name.rsplit("-", 1)[1].removesuffix(".png"))]][0]
                right[edits[name]] += match.match == str(original)
        print(f"repeat {repeat}: {false} of {num_fresh} fresh images flagged", file=sys.stderr)

    total = arguments.repeats * num_fresh
    low, high = clopper_pearson(flagged_fresh, total)
    inside, expected = 0, []
    for false, m in splits:
        allowed = int((m + 1) * arguments.fpr + 1e-9)
        expected.append(allowed / (m + 1))
        law = betabinom(num_fresh, allowed, m + 1 - allowed)
        inside += bool(law.ppf(0.025) <= false <= law.ppf(0.975))
    rate = float(np.mean(expected))
    interval = [int(bound) for bound in binom.ppf([0.025, 0.975], total, rate)]
    per_edit = Counter(edits.values())
    summary = {
        "detector": detector.name,
        "fingerprint": detector.fingerprint,
        "fpr": arguments.fpr,
        "expected_share": rate,
        "repeats": arguments.repeats,
        "fresh_images": total,
        "fresh_flagged": flagged_fresh,
        "share": flagged_fresh / total,
        "share_interval": [low, high],
        "binomial_interval_of_count": interval,
        "splits_inside_beta_binomial_95": inside,
        "recall": {
            edit: {
                "flagged": found[edit] / (count * arguments.repeats),
                "flagged_with_its_original": right[edit] / (count * arguments.repeats),
            }
            for edit, count in per_edit.items()
        },
    }
    (arguments.output / "bench_audit_fpr.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"{detector.name}: {flagged_fresh} of {total} fresh images flagged at {arguments.fpr:g} "
        f"({100 * flagged_fresh / total:.2f} %, 95 % CI {100 * low:.2f} to {100 * high:.2f}; "
        f"expected {100 * rate:.2f} %, binomial 95 % interval {interval[0]} to {interval[1]} "
        f"images); {inside} of {arguments.repeats} splits inside their own interval"
    )
    for edit, recall in summary["recall"].items():
        print(
            f"  {edit:28s} recall {recall['flagged']:.3f}"
            f"   with its original {recall['flagged_with_its_original']:.3f}"
        )
    return 0 if interval[0] <= flagged_fresh <= interval[1] else 1


if __name__ == "__main__":
    sys.exit(main())
