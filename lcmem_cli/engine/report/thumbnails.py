"""Small pictures as data URIs, sized so that a page full of them stays usable."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from lcmem_cli.engine.errors import LcmemError
from lcmem_cli.engine.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from PIL.Image import Image

Item = TypeVar("Item")
SIDES = (384, 256, 192, 144, 112, 80, 64)
BUDGET_BYTES = 30_000_000
_QUALITY = 80
_TYPICAL_BYTES_PER_PIXEL = 0.4  # of a photograph, in base64; a guess that is checked afterwards


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thumbnails:
    """Encoded pictures.

    Attributes:
        side: longest side in pixels; smaller pictures are not enlarged.
        uris: one ``data:image/...`` URI per item, or ``None`` where there is no picture.
    """

    side: int
    uris: tuple[str | None, ...]

    @property
    def num_bytes(self) -> int:
        """Length of all URIs together."""
        return sum(len(uri) for uri in self.uris if uri is not None)


def make_thumbnails(
    items: Sequence[Item],
    load: Callable[[Item], Image],
    *,
    budget_bytes: int = BUDGET_BYTES,
    workers: int = 1,
    reporter: Reporter = SILENT,
) -> Thumbnails:
    """Encode pictures at the largest of ``SIDES`` at which all of them fit into a budget.

    At the smallest side the budget may be exceeded.

    Args:
        items: what each picture is made of, such as the path of an image.
        load: makes one picture, RGB; where it fails the result holds ``None``.
        budget_bytes: bytes that all URIs together should not exceed.
        workers: threads that decode.
        reporter: told the progress.
    """
    guess = [
        side
        for side in SIDES
        if len(items) * side * side * _TYPICAL_BYTES_PER_PIXEL <= budget_bytes
    ]
    for side in guess or SIDES[-1:]:
        result = _encode_all(items, load, side, workers, reporter)
        if result.num_bytes <= budget_bytes:
            break
    return result


def data_uri(image: Image, side: int) -> str:
    """Encode one picture as a WebP (where Pillow has it, otherwise JPEG) data URI.

    Args:
        image: RGB.
        side: longest side of the result in pixels; a smaller picture keeps its size.
    """
    from PIL import Image as images
    from PIL import features

    kind = "webp" if features.check("webp") else "jpeg"
    small = image.copy()
    small.thumbnail((side, side), images.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=_QUALITY)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _encode_all(
    items: Sequence[Item],
    load: Callable[[Item], Image],
    side: int,
    workers: int,
    reporter: Reporter,
) -> Thumbnails:
    def encode(item: Item) -> str | None:
        try:
            return data_uri(load(item), side)
        except (LcmemError, OSError):
            return None  # the image was there when it was embedded; the page says what is missing

    uris = []
    with (
        reporter.task("thumbnails", len(items), unit="images") as task,
        ThreadPoolExecutor(max(1, workers)) as pool,
    ):
        for uri in pool.map(encode, items):
            uris.append(uri)
            task.advance()
    return Thumbnails(side=side, uris=tuple(uris))
