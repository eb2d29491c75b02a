"""How many images are flagged: of a group of one audit, or of one audit among several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lcmem_cli.engine.documents import FileName
from lcmem_cli.engine.report.shares import MAX_POINTS, SharePoint, plot_shares

SHARE_COLUMNS = (
    "num_images",
    "num_flagged",
    "share_flagged",
    "low",
    "high",
    "beyond_low",
    "beyond_high",
    "num_identical",
    "num_altered",
    "num_alike",
    "num_exposed_images",
)
"""Columns of ``Shares.cells``, after that of the name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """The figures of some generated images, all of an audit or a part of them.

    Attributes:
        name: what they have in common.
        num_images: readable ones.
        num_flagged: flagged ones.
        share_flagged: their share.
        interval: 95 % Clopper-Pearson interval of the share, given the threshold.
        excess_interval: as ``Finding.excess_interval``.
        num_identical: flagged images with the bytes or pixels of a training image.
        num_altered: flagged images that show a training image, altered; ``None``: not verified.
        num_alike: flagged images of which no more is known.
        num_exposed_images: training images that the flagged ones match best.
    """

    name: FileName
    num_images: int
    num_flagged: int
    share_flagged: float
    interval: tuple[float, float]
    excess_interval: tuple[float, float] | None
    num_identical: int
    num_altered: int | None
    num_alike: int
    num_exposed_images: int

    @property
    def num_copies(self) -> int:
        """Flagged images that are known to show a training image."""
        return self.num_identical + (self.num_altered or 0)

    @property
    def share_copies(self) -> float | None:
        """Their share; ``None`` where candidates were not verified."""
        return None if self.num_altered is None else self.num_copies / self.num_images

    def cells(self, *more: float | int | None) -> list[str]:
        """Return a row of a table: the columns ``SHARE_COLUMNS``, and more numbers."""
        low, high = self.excess_interval or (None, None)
        values = (
            *(self.num_images, self.num_flagged, self.share_flagged, *self.interval, low, high),
            *(self.num_identical, self.num_altered, self.num_alike, self.num_exposed_images),
            *more,
        )
        return [self.name, *("" if value is None else repr(value) for value in values)]


def draw_shares(
    shares: Sequence[Shares], target: Path, *, rate: float | None, label: str, ordered: bool = False
) -> None:
    """Draw the first of them, see ``report.shares``.

    Args:
        shares: at least one.
        target: path without suffix.
        rate: false-positive rate per image; ``None``: there is none.
        label: of the x axis.
        ordered: whether the names are numbers, which are places on that axis.
    """
    points = [
        SharePoint(
            name=f"{float(one.name):,g}" if ordered else one.name,
            x=float(one.name) if ordered else None,
            flagged=one.share_flagged,
            interval=one.interval,
            copies=one.share_copies,
        )
        for one in shares[:MAX_POINTS]
    ]
    plot_shares(points, target, rate=rate, label=label)
