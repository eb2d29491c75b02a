"""Are sets of one source called comparable, and others not? Real images, identities apart.

    python tests/benchmarks/bench_comparable.py FILELIST [--draws 20] [--ds-name NAME ...]

Each data set is halved by identity many times (true controls). Then one half is compared with
altered copies of the other: blurred, at half resolution, as JPEG of quality 40; and with other data
sets of the list.
"""

import argparse
import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.evaluation.comparability import Sample, compare_sets

MOST = 400


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    return Image.open(buffer).convert("RGB")


def half(image):
    width, height = image.size
    return image.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.BILINEAR)


CHANGES = {
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(max(1, min(image.size) / 64))),
    "half resolution": half,
    "JPEG 40": jpeg,
}


def halves(groups, seed):
    identities = np.random.default_rng(seed).permutation(np.unique(groups))
    chosen = np.isin(groups, identities[: len(identities) // 2])
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def part(features, groups, files, rows):
    known = None if groups is None else groups[rows]
    return Sample(features=features, rows=rows, groups=known, files=[files[r] for r in rows])


def line(name, what, found):
    told = [item for item in found if item.comparable is not None]
    if not told:
        print(f"{name:<16} {what:<18} too few identities")
        return
    aucs = [item.auc for item in told]
    comparable = sum(item.comparable is True for item in told)
    print(
        f"{name:<16} {what:<18} comparable {comparable:>3} of {len(told):>3}   "
        f"AUC {np.mean(aucs):.3f} ({min(aucs):.3f} to {max(aucs):.3f})",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filelist", type=Path)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--ds-name", action="append")
    parser.add_argument("--detector", default="joint")
    parser.add_argument("--unknown", action="store_true", help="do not tell who is who")
    options = parser.parse_args()
    detector = load_detector(options.detector, device="cpu")
    manifest = load_manifest(options.filelist, need_split=False)
    names = options.ds_name or sorted({record.ds_name for record in manifest.records})
    sets = {}
    for name in names:
        own = manifest.select(ds_names=[name])
        step = max(1, len(own) // MOST)
        files, records = own.paths()[::step], own.records[::step]
        numbers = {identity: n for n, identity in enumerate({r.identity for r in records})}
        groups = np.array([numbers[record.identity] for record in records])
        plain = [load_image(file) for file in files]
        features = detector.embed(plain)
        drawn = [halves(groups, seed) for seed in range(options.draws)]
        groups = None if options.unknown else groups
        sets[name] = features, groups, files
        line(name, "halves", [
            compare_sets(part(features, groups, files, a), part(features, groups, files, b), seed=n)
            for n, (a, b) in enumerate(drawn)
        ])  # fmt: skip
        for what, change in CHANGES.items():
            altered = detector.embed([change(image) for image in plain])
            line(name, what, [
                compare_sets(
                    part(features, groups, files, a), part(altered, groups, files, b), seed=n
                )
                for n, (a, b) in enumerate(drawn[:3])
            ])  # fmt: skip
    for first, second in itertools.pairwise(names):
        found = compare_sets(*(
            part(*sets[name], np.arange(len(sets[name][2]))) for name in (first, second)
        ))  # fmt: skip
        line(f"{first}/{second}", "other sources", [found])


if __name__ == "__main__":
    main()
