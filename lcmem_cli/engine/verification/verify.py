"""Verify the candidates of images: align each with its query and measure how well both agree.

In order of use::

    numbers = np.unique(candidates)       # only these are read
    training = read_bank(files_of(numbers), hashes_of(numbers), compute).numbered(numbers)
    queries = read_bank(query_files, query_hashes, compute)
    found = verify(queries, training, candidates, compute)
    found.values                          # [n, k] log-odds of the same picture, -inf without any
    found.evidence(query, rank)           # Evidence of one candidate, or None
    scores = fuse(scores, found.values)   # [n, k], on the scale of the detector's probabilities

``candidates`` are rows of the training set, as ``Detector.top_k`` gives them. The null's images are
verified by the same call. Order candidates by the fused scores afterwards.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.verification.agreement import Shades
from lcmem_cli.engine.verification.bank import FeatureBank
from lcmem_cli.engine.verification.evidence import Evidence, Found, describe, find_alignments
from lcmem_cli.engine.verification.features import single_threaded

NUM_CANDIDATES = 10
"""Candidates of an image that are verified."""
OFFSET = 0.5
"""What makes a logit of evidence: 1 % of real images' best matches pass about 0.5 by evidence, and
0.3 % of them about 1 by ``joint``, so that most of the rate is spent on evidence."""
ALIGNMENT = np.dtype(
    [
        ("value", np.float64),
        ("matrix", np.float64, (2, 3)),
        ("inliers", np.int32),
        ("correlation", np.float64),
        ("shades", np.float64, (3,)),
        ("extent", np.float64, (4,)),
        ("query", np.int32, (2,)),
        ("training", np.int32, (2,)),
    ]
)
"""A ``Found`` as kept for many pairs; its value is -inf where there is none."""
_ROUND_QUERIES = 256


@dataclasses.dataclass(frozen=True)
class Verification:
    """Evidence for the candidates of many queries.

    Attributes:
        found: ``[n, k]`` alignment of each pair, ``ALIGNMENT.itemsize`` bytes of each.
    """

    found: NDArray[np.void]

    @property
    def values(self) -> NDArray[np.float64]:
        """``[n, k]`` log-odds that both show the same picture.

        ``-inf`` where nothing was found or an image cannot be read.
        """
        values: NDArray[np.float64] = self.found["value"]
        return values

    def alignment(self, query: int, rank: int) -> Found | None:
        """Return the alignment of one candidate with a query, if there is any."""
        found = self.found[query, rank]
        return None if found["value"] == -np.inf else _unpacked(found)

    def evidence(self, query: int, rank: int) -> Evidence | None:
        """Return what was found for one candidate of a query, if anything."""
        found = self.alignment(query, rank)
        return None if found is None else describe(found)


def _packed(pairs: list[Found | None]) -> NDArray[np.void]:
    """Return alignments ``[k]`` as rows of ``ALIGNMENT``."""
    rows = np.zeros(len(pairs), ALIGNMENT)
    rows["value"] = -np.inf
    for row, pair in zip(rows, pairs, strict=True):
        if pair is not None:
            for name, value in pair._asdict().items():
                row[name] = np.nan if value is None else value
    return rows


def _unpacked(row: np.void) -> Found:
    extent = row["extent"].tolist()
    return Found(
        value=float(row["value"]),
        matrix=row["matrix"],
        inliers=int(row["inliers"]),
        correlation=float(row["correlation"]),
        shades=Shades(*row["shades"].tolist()),
        extent=None if np.isnan(extent).any() else tuple(extent),
        query=tuple(row["query"].tolist()),
        training=tuple(row["training"].tolist()),
    )


def verify(
    queries: FeatureBank,
    training: FeatureBank,
    candidates: NDArray[np.int64],
    compute: Compute = DEFAULT_COMPUTE,
) -> Verification:
    """Align queries with their candidates.

    Args:
        queries: local features of ``n`` images.
        training: local features of the training images that are candidates.
        candidates: ``[n, k]`` numbers of images in ``training``.
        compute: threads, processes and progress; none of it changes the result.
    """
    found = np.empty(candidates.shape, ALIGNMENT)
    with (
        single_threaded(),
        ThreadPoolExecutor(max(1, compute.num_workers)) as pool,
        compute.reporter.task("verifying", len(candidates), unit="image") as task,
    ):
        # Threads share the queries; of a single one they share the candidates.
        outer, inner = (map, pool.map) if len(candidates) == 1 else (pool.map, map)

        def align(number: int) -> NDArray[np.void]:
            query, rows = queries[number], candidates[number]
            if query is None:
                return _packed([None] * len(rows))
            return _packed(find_alignments(query, [training[row] for row in rows], inner))

        for start in range(0, len(candidates), _ROUND_QUERIES):
            part = range(start, min(start + _ROUND_QUERIES, len(candidates)))
            mine = compute.ranks.share(part)
            aligned = dict(zip(mine, outer(align, mine), strict=True))
            for others in compute.ranks.gather(aligned):
                for number, row in others.items():
                    found[number] = row
            task.advance(len(part))
    return Verification(found)


def fuse(scores: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the larger of score and evidence, both as probabilities on one scale.

    Args:
        scores: in [0, 1], of the detector.
        values: log-odds of ``verify``, of the same shape.
    """
    from scipy.special import expit

    result: NDArray[np.float64] = np.maximum(scores, expit(values + OFFSET))
    return result
