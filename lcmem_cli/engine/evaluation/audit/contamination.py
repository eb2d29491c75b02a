"""Which real images an audit stands on: the closest ones, and the threshold without each.

One altered copy of a training image among the real ones raises the threshold and hides others. It
leaves the null by itself only on evidence beyond doubt (``null.SURELY_SAME``). All else is shown:
whoever looks at the closest pairs sees a copy at once, and what it costs.
"""

from __future__ import annotations

import numpy as np

from lcmem_cli.engine.evaluation.audit.null import Null, threshold_of
from lcmem_cli.engine.evaluation.audit.request import AuditRequest
from lcmem_cli.engine.evaluation.audit.result import RealMatch
from lcmem_cli.engine.evaluation.audit.sets import ImageSet
from lcmem_cli.engine.verification.evidence import SAME_PICTURE

NUM_CLOSEST = 10


def closest_real(null: Null, training: ImageSet, request: AuditRequest) -> tuple[RealMatch, ...]:
    """Return the real images that match the training set best, the closest first.

    Args:
        null: real images and their best matches.
        training: the training set.
        request: its rate, and how it is held.
    """
    scores = null.scores[:, 0]
    order = np.lexsort((null.rows, -scores))
    closest = []
    for position in order[:NUM_CLOSEST]:
        evidence = float(null.values[position, 0])
        closest.append(
            RealMatch(
                path=null.images.record_of(null.rows[position]).path,
                match=training.record_of(null.matches[position, 0]).path,
                score=float(scores[position]),
                may_be_copy=None if null.searched is None else evidence >= SAME_PICTURE,
                threshold_without=threshold_of(np.delete(scores, position), null.kind, request),
            )
        )
    return tuple(closest)
