"""The middle of an audit, which a guard shares: from embedded sets to comparable scores.

Real images and generated ones go the same way, so that the null holds for both.
"""

from __future__ import annotations

from typing import NamedTuple

from lcmem_cli.engine.evaluation.audit.conditions import Conditions, check_conditions
from lcmem_cli.engine.evaluation.audit.detector import adapt_if_asked
from lcmem_cli.engine.evaluation.audit.null import Null, independent, make_null
from lcmem_cli.engine.evaluation.audit.request import AuditRequest
from lcmem_cli.engine.evaluation.audit.search import Found, best_matches
from lcmem_cli.engine.evaluation.audit.sets import Embedded
from lcmem_cli.engine.evaluation.audit.verify import ByPicture, verify_candidates
from lcmem_cli.engine.verification.verify import NUM_CANDIDATES


class Matched(NamedTuple):
    """Sets whose images have their best matches.

    Attributes:
        conditions: whether the sets are what an audit takes them for.
        embedded: the sets, as the adapted detector sees them.
        null: real images and their best matches; one image of each identity.
        found: best matches of the generated images.
        by_picture: finds candidates besides; ``None``: candidates are not verified.
    """

    conditions: Conditions
    embedded: Embedded
    null: Null
    found: Found
    by_picture: ByPicture | None


def match_sets(plain: Embedded, request: AuditRequest, *, verified: bool) -> Matched:
    """Adapt the detector, search, and verify what is found.

    Args:
        plain: the sets, as the detector sees them before it is adapted.
        request: what is asked.
        verified: align the best candidates of null and generated images.
    """
    conditions = check_conditions(plain, seed=request.seed)  # adapting would hide differences
    embedded = adapt_if_asked(plain, request)
    k = NUM_CANDIDATES if verified else 2
    null = make_null(embedded, request, k)
    found = best_matches(embedded, null.bank, max(k, request.top_k))
    by_picture = None
    if verified:
        by_picture = ByPicture.beside(embedded, null)
        null, found = verify_candidates(embedded, by_picture, null, found)
    null = independent(null, embedded, request)
    return Matched(conditions, embedded, null, found, by_picture)
