"""What adapting to unlabelled images of a kind is worth for kinds that the last layer has not seen.

    python tests/benchmarks/bench_adapt.py data/filelist.csv

For each data set the embedded model's last layer is fitted anew without its images (the trunk has
seen its TRAIN images). Then, as it is and adapted to some or all of the set's TRAIN images, whose
identities are not used:

- AUC of the pairs of VAL and TEST identities (all positive pairs, up to 20,000 negative ones);
- negative and positive pairs that pass the threshold that 1 % of the negative VAL pairs of the
  other data sets pass (all of data sets that could be adapted);
- audits of known answer: altered copies of 14 TRAIN images by 41 edits, searched among all TRAIN
  images; the share that is flagged at the rate of 2 %, the null being the VAL and TEST images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.data.perturb import EXTENDED_SUITE, perturb
from lcmem_cli.engine.detectors.base import resize_batch
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.detectors.joint import JointDetector
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.errors import NotAdaptableError
from lcmem_cli.engine.evaluation.calibration import (
    conformal_threshold,
    fit_threshold,
    required_null_size,
)
from lcmem_cli.engine.models.checkpoint import load_checkpoint
from lcmem_cli.engine.models.hub import locate_checkpoint
from lcmem_cli.engine.training.last_layer import Whitening

IMAGES = (0, 20, 100, None)
"""To adapt to; 0: not adapted, ``None``: all."""
PAIR_RATE = 0.01
MAX_NEGATIVES = 20_000
MIN_POSITIVES = 10
SOURCES, EDIT_SIZE, RATE = 14, 256, 0.02
AUDITS = (0, None)


def main():
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filelist", type=Path)
    manifest = load_manifest(parser.parse_args().filelist)
    whitening = Whitening.of(
        load_checkpoint(locate_checkpoint(None)), manifest.select("TRAIN"), Compute(device="cpu")
    )
    scored, flagged = {}, {}
    for name in dict.fromkeys(record.ds_name for record in manifest.records):
        own = manifest.select(ds_names=[name])
        identities = np.array([record.id for record in own.records])
        train = np.array([record.split == "TRAIN" for record in own.records])
        is_val = np.array([record.split == "VAL" for record in own.records])
        pairs = unseen_pairs(identities, np.flatnonzero(~train))
        if pairs is None:
            continue
        network = LCMemDetector(whitening.fitted(without=name), name="lcmem", device="cpu")
        joint = JointDetector(network)
        found = embed_files(joint, own.paths())
        features, width = found.features[found.rows], network.num_features
        bank = np.random.default_rng(0).permutation(np.flatnonzero(train))
        contents = [str(found.content_hashes[row]) for row in bank]
        copies = altered_copies(joint, [own.paths()[row] for row in bank[:SOURCES]])
        for count in IMAGES:
            detector, convert = adapted(network, features[bank, :width], contents, count)
            rows = convert(features[:, :width])
            first, second, positive = pairs
            scores = detector.score_features(rows[first], rows[second])
            fits = is_val[first] & is_val[second] & ~positive
            scored.setdefault(count, {})[name] = (scores, positive, fits, detector.adapted_to)
        if (~train).sum() < required_null_size(RATE):
            continue
        for base, columns in ((network, slice(width)), (joint, slice(None))):
            for count in AUDITS:
                detector, convert = adapted(base, features[bank, columns], contents, count)
                real, searched = (
                    convert(features[~train, columns]),
                    convert(features[bank, columns]),
                )
                best = [
                    detector.score_matrix(queries, searched).max(axis=1)
                    for queries in (real, convert(copies[:, columns]))
                ]
                share = (best[1] > conformal_threshold(best[0], RATE)).mean()
                flagged.setdefault((base.name, count), {})[name] = float(share)
    print("AUC by the number of images adapted to")
    table(
        {
            count: {name: roc_auc_score(positive, s) for name, (s, positive, *_) in sets.items()}
            for count, sets in scored.items()
        }
    )
    for label in (False, True):
        print(
            f"\nshare of {'positive' if label else 'negative'} pairs that pass the threshold of "
            f"{PAIR_RATE:.0%} of the other data sets' negative VAL pairs"
        )
        could_be = {name for name, parts in scored[None].items() if parts[3]}
        table({count: passing(sets, label, could_be) for count, sets in scored.items()})
    print(f"\nshare of altered copies flagged at {RATE:.0%}")
    table(flagged)


def passing(sets, label, chosen):
    """Return by data set the share of pairs at or above the threshold that the others give."""
    sets = {name: parts for name, parts in sets.items() if name in chosen}
    shares = {}
    for name, (scores, positive, *_) in sets.items():
        others = [s[fits] for other, (s, _, fits, _) in sets.items() if other != name]
        threshold = fit_threshold(
            np.concatenate(others), kind="fpr", rate=PAIR_RATE, fingerprint="", fitted_on=""
        )
        shares[name] = float((scores[positive == label] >= threshold.value).mean())
    return shares


def adapted(detector, features, contents, count):
    """Return a detector adapted to the first images where it can be, and what converts features."""
    try:
        if count != 0:
            return detector.adapted(features[:count], contents[:count])[:2]
    except NotAdaptableError as error:
        print(error)
    return detector, lambda rows: rows


def unseen_pairs(identities, rows):
    """Return both rows of each pair and whether it is positive; nothing where too few are."""
    first, second = (rows[index] for index in np.triu_indices(len(rows), 1))
    positive = identities[first] == identities[second]
    if positive.sum() < MIN_POSITIVES:
        return None
    negative = np.flatnonzero(~positive)
    if len(negative) > MAX_NEGATIVES:
        negative = np.random.default_rng(0).choice(negative, MAX_NEGATIVES, replace=False)
    kept = np.concatenate([np.flatnonzero(positive), negative])
    return first[kept], second[kept], positive[kept]


def altered_copies(detector, files):
    """Embed the files altered by each edit."""
    rows = []
    for number, file in enumerate(files):
        image = to_tensor(load_image(file), EDIT_SIZE)
        edited = torch.stack(
            [perturb(image, e.transform, e.strength, seed=number) for e in EXTENDED_SUITE]
        )
        rows.append(detector.embed_batch(resize_batch(edited.clamp(0, 1), detector.input_size)))
    return np.concatenate(rows)


def table(results):
    """Print one line a row of results, with its mean."""
    for key, values in results.items():
        shown = " ".join(f"{name}:{value:.3f}" for name, value in values.items())
        print(f"{key!s:16} mean {np.mean(list(values.values())):.3f}  {shown}", flush=True)


if __name__ == "__main__":
    main()
