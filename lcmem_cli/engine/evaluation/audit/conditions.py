"""Whether the conditions of an audit hold, as far as its images tell."""

from __future__ import annotations

import dataclasses

import numpy as np

from lcmem_cli.engine.evaluation.audit.sets import Embedded, ImageSet
from lcmem_cli.engine.evaluation.comparability import Comparability, Sample, compare_sets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a classifier tells apart; ``None`` where there are no held-out images.

    Attributes:
        held_out: held-out from training images. If it can, no rate holds.
        generated: generated from held-out images. That is no fault of an audit, but worth a note.
    """

    held_out: Comparability | None = None
    generated: Comparability | None = None


def check_conditions(embedded: Embedded, *, seed: int) -> Conditions:
    """Compare the sets by the features of a detector that was not adapted to any of them.

    Args:
        embedded: the sets.
        seed: of samples, folds and permutations.
    """
    sets, ranks = embedded.sets, embedded.compute.ranks
    if sets.held_out is None:  # real images from the training set itself are of its source
        return Conditions()
    found = None
    if ranks.is_main:  # files of an index may be on its machine alone, so all take its word
        found = Conditions(
            held_out=_compare(sets.held_out, sets.training, seed),
            generated=_compare(sets.generated, sets.held_out, seed),
        )
    conditions: Conditions = ranks.broadcast(found)
    return conditions


def _compare(first: ImageSet, second: ImageSet, seed: int) -> Comparability:
    """Compare two sets without the contents and identities that are in both."""
    contents = set(first.hashes) & set(second.hashes)
    identities: frozenset[tuple[str, str]] = frozenset()
    if first.labelled and second.labelled:
        identities = first.identities & second.identities
    samples = []
    for images in (first, second):
        rows = np.array(
            [
                row
                for row, digest in enumerate(images.hashes)
                if digest not in contents and images.record_of(row).identity not in identities
            ],
            dtype=np.int64,
        )
        samples.append(
            Sample(
                features=images.features,
                rows=rows,
                groups=images.groups[rows] if images.summary.num_identities else None,
                files=[images.files[image] for image in images.first_image[rows]],
            )
        )
    return compare_sets(*samples, seed=seed)
