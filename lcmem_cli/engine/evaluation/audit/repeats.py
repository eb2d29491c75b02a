"""Generated images that repeat each other: what is beyond chance counts each picture once.

A generator whose samples are nearly all alike makes chance flag all of them or none. The law of the
flagged images holds for independent ones. So images that match each other more closely than any
real image matches a training image are one picture, and so are those of one identity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.evaluation.audit.null import Null
from lcmem_cli.engine.evaluation.audit.result import DifferentPictures
from lcmem_cli.engine.evaluation.audit.sets import Embedded
from lcmem_cli.engine.evaluation.components import components

_BLOCK = 1024
"""Images that are compared with each other at once."""


def count_pictures(
    embedded: Embedded, null: Null, flagged: NDArray[np.bool_], copied: NDArray[np.int64]
) -> DifferentPictures:
    """Count the different pictures among the generated images.

    Args:
        embedded: the sets.
        null: real images; pictures match that are more alike than each of them and its match.
        flagged: ``[d]`` of each distinct content, whether it is flagged.
        copied: those that are flagged and known to be copies.
    """
    generated = embedded.sets.generated
    groups = generated.groups if generated.labelled else np.arange(generated.num_distinct)
    if flagged.any():
        limit = float(null.scores[:, 0].max())
        pairs = groups[_repeats(embedded.detector, generated.features, limit)]
        groups = components(pairs, int(groups.max()) + 1)[groups]
    with_flag, with_copy = set(groups[flagged].tolist()), set(groups[copied].tolist())
    return DifferentPictures(
        num_pictures=len(np.unique(groups)),
        num_flagged=len(with_flag),
        num_alike=len(with_flag - with_copy),
    )


def _repeats(detector: Detector, features: NDArray[Any], limit: float) -> NDArray[np.int64]:
    """Return each image that matches an earlier picture, with that picture's first image.

    Images are compared with first images alone. Groups that hang together by chains would grow
    into one where there are many images.

    Returns:
        ``[p, 2]`` rows.
    """
    pairs: list[tuple[int, int]] = []
    first = np.zeros(0, np.int64)
    for start in range(0, len(features), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(features)))
        if len(first):
            found = detector.top_k(features[rows], features[first], 1)
            known = found.scores[:, 0] > limit
            pairs += zip(rows[known].tolist(), first[found.rows[known, 0]].tolist(), strict=True)
            rows = rows[~known]
        scores = detector.score_matrix(features[rows], features[rows])
        new: list[int] = []
        for place, row in enumerate(rows.tolist()):
            alike = np.flatnonzero(scores[place, new] > limit)
            if len(alike):
                pairs.append((row, int(rows[new[alike[0]]])))
            else:
                new.append(place)
        first = np.concatenate([first, rows[new]])
    return np.array(pairs, np.int64).reshape(-1, 2)
