"""The constants of the joint detector: one scale for network and correlation.

    python tests/benchmarks/fit_joint.py data/filelist.csv

For each data set of VAL with 300 negative pairs or more: the scores that 10, 3, 1, 0.3 and 0.1 % of
them pass, by the embedded network (as logit) and by the correlation of small pictures (as Fisher's
z); their means over the data sets, and the line through the means; the line of the data set whose
negative pairs correlate most; and the network's score that 0.01 % of all these pairs pass. Once for
the network as it is; and once with a last layer that was fitted without the data set and then
adapted to its TRAIN images, as for a kind of images that the network does not know.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.special import logit

from lcmem_cli import load_detector
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.data.pairs import pairs_within
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.detectors.joint import ADAPTED_SCALE, SCALE, JointDetector, Scale
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.store.steps import cosine_pairs
from lcmem_cli.engine.training.last_layer import Whitening

RATES = np.array([0.1, 0.03, 0.01, 0.003, 0.001])
MIN_NEGATIVES = 300
PLATEAU_RATE = 1e-4


def main():
    """Print the quantiles and the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filelist", type=Path)
    manifest = load_manifest(parser.parse_args().filelist)
    joint = load_detector("joint")
    validation = manifest.select("VAL")
    pairs = pairs_within(validation.records)
    features = embed_all(joint, validation.paths())
    whitening = Whitening.of(joint.network.checkpoint, manifest.select("TRAIN"))
    as_it_is, adapted = {}, {}
    for number, name in enumerate(pairs.names):
        chosen = (pairs.dataset == number) & (pairs.labels == 0)
        if chosen.sum() < MIN_NEGATIVES:
            continue
        both = pairs.first[chosen], pairs.second[chosen]
        as_it_is[name] = both_parts(joint, *(features[side] for side in both))
        without = JointDetector(LCMemDetector(whitening.fitted(without=name), name=name))
        own = embed_all(without, manifest.select("TRAIN", ds_names=[name]).paths())
        detector, convert, _ = without.adapted(own, [str(row) for row in range(len(own))])
        needed = np.unique(np.concatenate(both))
        rows = convert(embed_all(without, [validation.paths()[row] for row in needed]))
        adapted[name] = both_parts(detector, *(rows[np.searchsorted(needed, s)] for s in both))
    for title, scores, known in (
        ("as it is", as_it_is, SCALE),
        ("adapted to a kind that it does not know", adapted, ADAPTED_SCALE),
    ):
        print(f"{title}:\n{fit(scores)}\n(in the package: {known})")


def embed_all(detector, paths):
    """Return a feature row of each file."""
    found = embed_files(detector, paths)
    return found.features[found.rows]


def both_parts(detector, a, b):
    """Return Fisher's z of the pictures and the network's logits, of pairs of feature rows."""
    width = detector.network.num_features
    correlation = cosine_pairs(a[:, width:], b[:, width:])
    logits = logit(detector.network.score_features(a[:, :width], b[:, :width]))
    return np.arctanh(correlation.clip(-1, 1 - 1e-6)), logits


def fit(scores):
    """Return the scale for the negative pairs of some data sets."""
    rows = []
    for name, parts in scores.items():
        rows.append([np.quantile(part, 1 - RATES) for part in parts])
        print(name, "Fisher's z", rows[-1][0].round(2), "logit", rows[-1][1].round(2))
    fisher_mean, logit_mean = np.mean(rows, axis=0)
    print("mean", fisher_mean.round(3), logit_mean.round(3))
    slope, offset = np.polyfit(fisher_mean, logit_mean, 1)
    hardest_fisher, hardest_logit = max(rows, key=lambda row: row[0][-1])
    hard_slope, hard_offset = np.polyfit(hardest_fisher, hardest_logit, 1)
    every = np.concatenate([logits for _, logits in scores.values()])
    plateau = np.quantile(every, 1 - PLATEAU_RATE)
    values = (slope, offset, hard_slope, hard_offset, plateau)
    return Scale(*(round(float(value), 2) for value in values))


if __name__ == "__main__":
    main()
