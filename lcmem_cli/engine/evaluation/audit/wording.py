"""Numbers in sentences."""

from __future__ import annotations


def percent(share: float) -> str:
    """Write a share as a percentage: ``0.0123`` is ``1.23 %``."""
    return f"{100 * share:.3g} %"


def counted(number: int, one: str, many: str | None = None) -> str:
    """Write a number with its noun: ``1 image``, ``2,000 images``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
