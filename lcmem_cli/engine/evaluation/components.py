"""What hangs together by pairs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def components(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the number of the connected component of each of ``count`` nodes.

    Args:
        pairs: ``[p, 2]`` nodes that belong together.
        count: nodes; one without a pair is a component by itself.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    labels: NDArray[np.int32] = connected_components(edges, directed=False)[1]
    return labels.astype(np.int64)
