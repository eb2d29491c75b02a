"""The constants of the joint detector: one scale for network and correlation.

    python tests/benchmarks/fit_joint.py data/filelist.csv

For each data set of VAL: the scores that 10, 3, 1, 0.3 and 0.1 % of its negative pairs pass, by
the embedded network (as logit) and by the correlation of small pictures (as Fisher's z); their
means over the data sets, and the line through the means; the line of the data set whose negative
pairs correlate most; and the network's score that 0.01 % of all negative pairs pass.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.special import logit

from lcmem_cli import load_detector
from lcmem_cli.engine.data.loading import iter_images
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.detectors.joint import (
    HARD_OFFSET,
    HARD_SLOPE,
    OFFSET,
    PLATEAU,
    SLOPE,
)
from lcmem_cli.engine.evaluation.judge import within_pairs

RATES = np.array([0.1, 0.03, 0.01, 0.003, 0.001])
MIN_NEGATIVES = 300
PLATEAU_RATE = 1e-4


def main():
    """Print the quantiles and the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filelist", type=Path)
    manifest = load_manifest(parser.parse_args().filelist).select("VAL")
    detector = load_detector("joint")
    features = np.concatenate(
        [
            detector.embed_batch(batch.images)
            for batch in iter_images(
                manifest.paths(), detector.input_size, workers=2, batch_size=32
            )
        ]
    )
    pairs = within_pairs(manifest.records)
    width = detector.network.num_features
    a, b = features[pairs.first], features[pairs.second]
    logits = logit(detector.network.score_features(a[:, :width], b[:, :width]))
    fisher = np.arctanh((a[:, width:] * b[:, width:]).sum(axis=1).clip(-1, 1 - 1e-6))
    rows = []
    for number, name in enumerate(pairs.names):
        negative = (pairs.dataset == number) & (pairs.labels == 0)
        if negative.sum() < MIN_NEGATIVES:
            continue
        both = [np.quantile(scores[negative], 1 - RATES) for scores in (fisher, logits)]
        rows.append(both)
        print(name, "Fisher's z", both[0].round(2), "logit", both[1].round(2))
    fisher_mean, logit_mean = np.mean(rows, axis=0)
    slope, offset = np.polyfit(fisher_mean, logit_mean, 1)
    print("mean", fisher_mean.round(3), logit_mean.round(3))
    print(f"slope {slope:.2f}, offset {offset:.2f} (in the package: {SLOPE}, {OFFSET})")
    hardest_fisher, hardest_logit = max(rows, key=lambda row: row[0][-1])
    slope, offset = np.polyfit(hardest_fisher, hardest_logit, 1)
    print(
        f"data set that correlates most: slope {slope:.2f}, offset {offset:.2f} "
        f"(in the package: {HARD_SLOPE}, {HARD_OFFSET})"
    )
    plateau = np.quantile(logits[pairs.labels == 0], 1 - PLATEAU_RATE)
    print(f"plateau {plateau:.2f} (in the package: {PLATEAU})")


if __name__ == "__main__":
    main()
