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
from lcmem_cli.engine.verification.bank import FeatureBank
from lcmem_cli.engine.verification.evidence import Evidence, Found, describe, find_alignments
from lcmem_cli.engine.verification.features import single_threaded

NUM_CANDIDATES = 10
"""Candidates of an image that are verified."""
OFFSET = 0.5
"""What makes a logit of evidence: 1 % of real images' best matches pass about 0.5 by evidence, and
0.3 % of them about 1 by ``joint``, so that most of the rate is spent on evidence."""
_ROUND_QUERIES = 256


@dataclasses.dataclass(frozen=True)
class Verification:
    """Evidence for the candidates of many queries.

    Attributes:
        values: ``[n, k]`` log-odds that both show the same picture; ``-inf`` where nothing was
            found or an image cannot be read.
        found: the alignment of each pair, if any.
    """

    values: NDArray[np.float64]
    found: tuple[tuple[Found | None, ...], ...]

    def evidence(self, query: int, rank: int) -> Evidence | None:
        """Return what was found for one candidate of a query, if anything."""
        found = self.found[query][rank]
        return None if found is None else describe(found)


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

    def align(number: int) -> tuple[int, list[Found | None]]:
        query = queries[number]
        if query is None:
            return number, [None] * candidates.shape[1]
        return number, find_alignments(query, [training[row] for row in candidates[number]])

    found: dict[int, list[Found | None]] = {}
    with (
        single_threaded(),
        ThreadPoolExecutor(max(1, compute.num_workers)) as pool,
        compute.reporter.task("verifying", len(candidates), unit="image") as task,
    ):
        for start in range(0, len(candidates), _ROUND_QUERIES):
            part = range(start, min(start + _ROUND_QUERIES, len(candidates)))
            mine = list(pool.map(align, compute.ranks.share(part)))
            for others in compute.ranks.gather(mine):
                found.update(others)
            task.advance(len(part))
    rows = tuple(tuple(found[number]) for number in range(len(candidates)))
    values = np.full(candidates.shape, -np.inf)
    for number, row in enumerate(rows):
        values[number] = [-np.inf if pair is None else pair.value for pair in row]
    return Verification(values, rows)


def fuse(scores: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the larger of score and evidence, both as probabilities on one scale.

    Args:
        scores: in [0, 1], of the detector.
        values: log-odds of ``verify``, of the same shape.
    """
    from scipy.special import expit

    result: NDArray[np.float64] = np.maximum(scores, expit(values + OFFSET))
    return result
