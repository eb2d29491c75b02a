"""Generated images that repeat each other: what is beyond chance counts each picture once.

A generator whose samples are nearly all alike makes chance flag all of them or none. The law of the
flagged images holds for independent ones, so images that match each other as an image matches a
training image to be flagged are one picture, and so are those of one identity.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.evaluation.audit.result import DifferentPictures, FlagRule
from lcmem_cli.engine.evaluation.audit.sets import Embedded, ImageSet

_NEIGHBOURS = 16
"""Matches of each image that are looked at; a group of more hangs together by chains."""


def count_pictures(
    embedded: Embedded, rule: FlagRule, flagged: NDArray[np.bool_], copied: NDArray[np.bool_]
) -> DifferentPictures:
    """Count the different pictures among the generated images.

    Args:
        embedded: the sets.
        rule: what is flagged.
        flagged: ``[d]`` of each distinct content, whether it is flagged.
        copied: ``[d]`` whether it is flagged and known to be a copy.
    """
    generated = embedded.sets.generated
    groups = generated.groups if generated.labelled else np.arange(generated.num_distinct)
    if flagged.any() and rule.threshold is not None:
        groups = _joined(groups, _alike(embedded, generated, rule.threshold))
    with_flag, with_copy = set(groups[flagged].tolist()), set(groups[copied].tolist())
    return DifferentPictures(
        num_pictures=len(np.unique(groups)),
        num_flagged=len(with_flag),
        num_alike=len(with_flag - with_copy),
    )


def _alike(embedded: Embedded, generated: ImageSet, threshold: float) -> NDArray[np.int64]:
    """Return the pairs of distinct contents that match each other, ``[p, 2]``."""
    features = generated.features
    found = embedded.detector.top_k(features, features, min(_NEIGHBOURS, len(features)))
    rows, ranks = np.nonzero(found.scores > threshold)
    return np.stack([rows, found.rows[rows, ranks]], axis=1)


def _joined(groups: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the groups after those that a pair connects have become one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = int(groups.max()) + 1
    ends = groups[pairs]
    edges = coo_array((np.ones(len(pairs)), (ends[:, 0], ends[:, 1])), shape=(size, size))
    number: NDArray[np.int64] = connected_components(edges, directed=False)[1]
    return number[groups].astype(np.int64)
