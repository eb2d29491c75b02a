"""Whose images are exposed: flagged matches, gathered by training image and by identity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.evaluation.audit.result import TIERS, Exposed, Match, certainty

COLUMNS = (
    "kind",
    "name",
    "id",
    "ds_name",
    "tier",
    "score",
    "p_value",
    "num_matches",
    "matches",
)
"""Columns of ``exposed.csv``."""


def exposed_images(
    flagged: Iterable[Match], record_of: Mapping[str, Record]
) -> tuple[Exposed, ...]:
    """Return the training images that are the best match of a flagged image, surest first.

    Args:
        flagged: flagged images with their best match.
        record_of: training images by path.
    """
    keyed: dict[str, list[Match]] = {}
    for match in flagged:
        keyed.setdefault(match.match, []).append(match)
    return _ordered(
        _gathered("image", path, record_of[path], matches) for path, matches in keyed.items()
    )


def exposed_identities(
    flagged: Iterable[Match], record_of: Mapping[str, Record]
) -> tuple[Exposed, ...]:
    """Return the identities of these training images, surest first."""
    keyed: dict[tuple[str, str], list[Match]] = {}
    for match in flagged:
        keyed.setdefault(record_of[match.match].identity, []).append(match)
    return _ordered(
        _gathered("identity", key[1], record_of[matches[0].match], matches)
        for key, matches in keyed.items()
    )


def rows(exposed: Iterable[Exposed]) -> Iterable[list[str]]:
    """Yield the rows of ``exposed.csv``."""
    for item in exposed:
        numbers = [repr(item.score), repr(item.p_value), str(len(item.matches))]
        names = [item.kind, item.name, item.id, item.ds_name or "", item.tier]
        yield [*names, *numbers, "; ".join(item.matches)]


def _gathered(
    kind: Literal["image", "identity"], name: str, record: Record, matches: Sequence[Match]
) -> Exposed:
    matches = sorted(matches, key=certainty)
    best = matches[0]
    assert best.tier is not None  # of a flagged image
    return Exposed(
        kind=kind,
        name=name,
        id=record.id,
        ds_name=record.ds_name,
        tier=best.tier,
        score=best.score,
        p_value=best.p_value,
        image=best.match,
        matches=tuple(match.query for match in matches),
    )


def _ordered(exposed: Iterable[Exposed]) -> tuple[Exposed, ...]:
    return tuple(sorted(exposed, key=lambda item: (TIERS.index(item.tier), -item.score, item.name)))
