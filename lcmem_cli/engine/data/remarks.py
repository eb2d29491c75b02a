"""What a reader of the results should know of an image beside its features, in one row of numbers.

The row travels with the image: through loading and embedding into the cache of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Remarks = NDArray[np.int32]
"""``[n, 7]``: what a reader of the results should know of each image, in these columns."""
GUESSED, BLANK, FRAMES, ON_WHITE, GREY, BARS, PAGE = range(7)
"""Whether its depth was guessed; its colour ``0xRRGGBB`` where it shows nothing else, otherwise -1;
how many images its file holds, where only the first was read without being asked for; whether it
is transparent and was laid on white; and by ``data.looks``: whether it has no colour, may stand in
a frame of bars, is mostly white ground."""
NOTHING_REMARKABLE = (0, -1, 1, 0, 0, 0, 0)
_SHOWN = 5


def no_remarks(count: int) -> Remarks:
    """Return the remarks of images of which there is nothing to say."""
    return np.tile(np.array(NOTHING_REMARKABLE, dtype=np.int32), (count, 1))


def is_remarkable(remark: NDArray[np.int32]) -> bool:
    """Return whether ``remarks_texts`` has something to say of an image."""
    return tuple(remark[:GREY].tolist()) != NOTHING_REMARKABLE[:GREY]


def remarks_texts(paths: Sequence[Path], remarks: Remarks) -> list[str]:
    """Return what to tell of some images, one sentence for each kind of remark.

    Args:
        paths: ``n`` files.
        remarks: ``[n, 7]``, of each.
    """
    texts = []
    if count := int(np.count_nonzero(remarks[:, GUESSED])):
        texts.append(guesses_text(count))
    if len(several := np.flatnonzero(remarks[:, FRAMES] > 1)):
        texts.append(
            f"{len(several):,} file(s) hold several images (pages, frames), "
            f"{int(remarks[several, FRAMES].sum()):,} in all, of which only the first was used: "
            f"{_some(paths, several)}; --frames all lists each by itself"
        )
    if len(dark := np.flatnonzero(remarks[:, ON_WHITE])):
        texts.append(
            f"{len(dark):,} transparent image(s) of dark content were laid on white, all others "
            f"on black: {_some(paths, dark)}"
        )
    if len(blank := np.flatnonzero(remarks[:, BLANK] >= 0)):
        texts.append(
            f"{len(blank):,} image(s) show nothing but one colour, and match only their equals: "
            f"{_some(paths, blank)}"
        )
    return texts


def guesses_text(count: int) -> str:
    """Return what to tell about images of which the depth was guessed."""
    return (
        f"{count:,} image(s) of more than 8 bits without a stated range: their brightness was "
        "guessed from their values"
    )


def _some(paths: Sequence[Path], rows: NDArray[np.intp]) -> str:
    shown = ", ".join(str(paths[row]) for row in rows[:_SHOWN])
    return f"{shown}, ..." if len(rows) > _SHOWN else shown
