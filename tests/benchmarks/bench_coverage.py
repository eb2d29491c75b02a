"""How often the bootstrap intervals of a study hold the true AUC, by the number of identities.

Identities are points, their images lie around them, and the score is the negative distance. The
true AUC is that of very many identities. A 95 % interval should hold it in 95 % of the samples.

    python tests/benchmarks/bench_coverage.py --samples 400
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from lcmem_cli.engine.evaluation.metrics import bootstrap_intervals

IMAGES, COLUMNS = 3, 6
Pairs = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]


def sample(count: int, noise: float, rng: np.random.Generator) -> Pairs:
    """Return scores, labels and identities of all pairs of a sample."""
    identity = np.repeat(np.arange(count), IMAGES)
    centres = rng.normal(size=(count, COLUMNS)) * rng.uniform(0.5, 1.5, (count, 1))
    images = centres[identity] + noise * rng.normal(size=(len(identity), COLUMNS))
    first, second = np.triu_indices(len(identity), 1)
    if count > 200:  # negatives of a large sample are thinned out
        keep = (identity[first] == identity[second]) | (rng.random(len(first)) < 0.02)
        first, second = first[keep], second[keep]
    scores = -np.linalg.norm(images[first] - images[second], axis=1)
    ends = np.stack([identity[first], identity[second]], axis=1)
    return scores, (ends[:, 0] == ends[:, 1]).astype(np.int64), ends


def main() -> int:
    """Print the coverage for each number of identities."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=400)
    arguments = parser.parse_args()
    for noise in (0.5, 1.0):
        rng = np.random.default_rng(0)
        scores, labels, _ = sample(1500, noise, rng)
        truth = roc_auc_score(labels, scores)
        for count in (10, 30, 100):
            held = widths = 0.0
            for _ in range(arguments.samples):
                scores, labels, ends = sample(count, noise, rng)
                found = bootstrap_intervals(scores, labels, ends, replicates=500)["auc"]
                if found is not None:
                    held += found[0] <= truth <= found[1]
                    widths += found[1] - found[0]
            row = {"true AUC": round(float(truth), 3), "identities": count}
            row |= {"coverage": held / arguments.samples, "width": widths / arguments.samples}
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
