"""Verify the candidates of images: align each with its query and measure how well both agree.

For the integrator, in order of use::

    store = FeatureStore(compute)                        # reads files, keeps features by content
    found = verify(query_files, training_files, candidates, compute)
    found.values                                         # [n, k] evidence, 0 where there is none
    found.evidence(query, rank)                          # Evidence of one candidate, or None
    scores = fuse(scores, found.values)                  # [n, k], on the detector's scale

``candidates`` are rows of the training set, as ``Detector.top_k`` gives them; the null's images are
verified by the same call. Order candidates by the fused scores afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.verification.evidence import Evidence

NUM_CANDIDATES = 10
"""Candidates of an image that are verified."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """Evidence for the candidates of many queries.

    Attributes:
        values: ``[n, k]`` evidence, 0 where nothing was found or an image cannot be read.
        found: what the alignment of each pair gave, for ``evidence``.
    """

    values: NDArray[np.float64]
    found: tuple[tuple[Evidence | None, ...], ...]

    def evidence(self, query: int, rank: int) -> Evidence | None:
        """Return what was found for one candidate of a query, if anything."""
        return self.found[query][rank]


def verify(
    queries: Sequence[Path],
    training: Sequence[Path],
    candidates: NDArray[np.int64],
    compute: Compute = DEFAULT_COMPUTE,
) -> Verification:
    """Align queries with their candidates.

    Args:
        queries: ``n`` image files.
        training: image files.
        candidates: ``[n, k]`` rows of ``training``.
        compute: threads, processes, progress and cache; none of it changes the result.
    """
    raise NotImplementedError


def fuse(scores: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the larger of score and evidence, both on the scale of ``joint``'s probabilities."""
    raise NotImplementedError
