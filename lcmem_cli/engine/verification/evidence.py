"""What the alignment of two pictures shows, as a value and in words."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What alignment found for a query and one training image.

    Attributes:
        value: how strongly both show the same picture, altered or not; 0: nothing was found. Its
            scale is the same for all images.
        same_picture: whether ``value`` reaches ``SAME_PICTURE``.
        mirrored: whether the query is mirrored.
        turn: degrees by which the query is turned counter-clockwise, in (-180, 180], after being
            mirrored left and right if it is.
        scale: size of what is shown in the query, relative to the training image, both pictures
            having the same longer side.
        share_of_training: share of the training image's area that the query shows.
        share_of_query: share of the query's area that the training image covers.
        outline: corners ``(x, y)`` of the copied part in the training image, 0 to 1 of its width
            and height.
        correlation: of both pictures where they overlap after alignment, in [-1, 1].
        inliers: pairs of keypoints that agree on the alignment.
        matrix: ``((a, b, c), (d, e, f))`` that takes places of the query (x and y as shares of its
            width and height) to places of the training image.
    """

    value: float
    same_picture: bool
    mirrored: bool
    turn: float
    scale: float
    share_of_training: float
    share_of_query: float
    outline: tuple[tuple[float, float], ...]
    correlation: float
    inliers: int
    matrix: tuple[tuple[float, float, float], tuple[float, float, float]]

    def text(self) -> str:
        """Say what was done, such as "mirrored, turned by 12 degrees, 61 % of the training image"."""
        parts = []
        if self.mirrored:
            parts.append("mirrored")
        if abs(self.turn) >= 2:
            parts.append(f"turned by {round(self.turn)} degrees")
        if self.share_of_training < 0.95:
            parts.append(f"{math.floor(100 * self.share_of_training)} % of the training image")
        if self.share_of_query < 0.9:
            parts.append(f"on {math.floor(100 * self.share_of_query)} % of the generated one")
        return ", ".join(parts) or "in place"
