"""The order in which the terms of a score are added up, shared by the kernels and numpy.

Floating-point addition is not associative, so a score has the same bits everywhere only if every
place adds in the same order. Term ``k`` goes to lane ``k % LANES``; a lane is added up in the order
of ``k``; then the upper half of the lanes is added to the lower half until one lane is left.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LANES = 32
"""Sums that run side by side: four vector registers of eight numbers, which hides the latency of an
addition."""
PASS = 8 * LANES
"""Columns of one turn of the compiled loop, which becomes vector instructions only where its length
is known."""


def lane_sums(terms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum the last axis of ``[..., d]`` in the order of the kernels, to the same bits.

    Args:
        terms: ``w_k |a_k - b_k|`` in float32.

    Returns:
        ``[...]`` float32.
    """
    lanes = np.zeros((*terms.shape[:-1], LANES), dtype=np.float32)
    for start in range(0, terms.shape[-1], LANES):
        part = terms[..., start : start + LANES]
        lanes[..., : part.shape[-1]] += part
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]
