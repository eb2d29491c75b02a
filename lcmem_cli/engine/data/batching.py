"""How many images go into one network call: as said, or as many as the graphics card holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.data.loading import LoadedBatch
from lcmem_cli.engine.errors import LcmemError, NotFiniteError
from lcmem_cli.engine.reporter import SILENT, Reporter

AUTO = 0
"""The batch size that leaves the choice to ``Batching``."""
NOT_EMBEDDED = "cannot be embedded"
"""How the reason begins why an image that can be read has no features."""
CPU_SIZE = 32
CUDA_SIZE = 128


class Batching:
    """Calls a network on batches, and on smaller ones from when they do not fit into its memory.

    Args:
        size: images per call; ``AUTO`` begins with 128 on CUDA and 32 elsewhere, and halves it
            whenever CUDA runs out of memory.
        device: of the network.
        reporter: is told of a new size.

    Attributes:
        loaded: images to load at once.
        size: images per call now.
    """

    def __init__(
        self, size: int, device: torch.device | str = "cpu", *, reporter: Reporter = SILENT
    ) -> None:
        self.is_auto = size == AUTO
        if self.is_auto:
            size = CUDA_SIZE if torch.device(device).type == "cuda" else CPU_SIZE
        self.loaded = self.size = size
        self.reporter = reporter
        self._has_embedded = False

    def call(
        self, work: Callable[..., NDArray[Any]], images: torch.Tensor, *beside: Sequence[Any]
    ) -> NDArray[Any]:
        """Return the rows that ``work`` makes of images, and of what stands beside each.

        Args:
            work: takes a slice of ``images``, and the same slice of each sequence in ``beside``.
            images: at least one.
            beside: sequences of the same length.

        Raises:
            LcmemError: out of memory with the size that was asked for, or with a single image.
        """
        rows: list[NDArray[Any]] = []
        start = 0
        while start < len(images):
            part = slice(start, start + self.size)
            made = _try(work, images[part], *(sequence[part] for sequence in beside))
            if made is None:
                self._halve()
            else:
                rows.append(made)
                start += self.size
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def embed(
        self, work: Callable[[torch.Tensor], NDArray[Any]], batch: LoadedBatch
    ) -> tuple[list[int], list[NDArray[Any]], list[tuple[int, str]]]:
        """Embed a loaded batch; where a network fails for some of its images, name them and go on.

        Args:
            work: takes images and returns a row of features for each.
            batch: at least one image.

        Returns:
            The ``indices`` of the images with features; those, in pieces; and the ``indices`` of
            the others with the reason.

        Raises:
            NotFiniteError: it failed for several images and has not worked for any.
            LcmemError: see ``call``.
        """
        try:
            whole = self.call(work, batch.images)
            self._has_embedded = True
            return batch.indices, [whole], []
        except NotFiniteError:
            pass
        indices: list[int] = []
        pieces: list[NDArray[Any]] = []
        failed: list[tuple[int, str]] = []
        last: NotFiniteError | None = None
        for index, image in zip(batch.indices, batch.images, strict=True):
            try:
                pieces.append(self.call(work, image[None]))
                indices.append(index)
            except NotFiniteError as error:
                failed.append((index, f"{NOT_EMBEDDED} ({error})"))
                last = error
        self._has_embedded |= bool(indices)
        if last is not None and len(failed) > 1 and not self._has_embedded:
            raise last
        return indices, pieces, failed

    def _halve(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self.is_auto or self.size == 1:
            hint = (
                "use --device cpu" if self.size == 1 else "use --batch-size auto, or a smaller one"
            )
            raise LcmemError(
                f"out of GPU memory with {self.size} image(s) per network call; {hint}"
            )
        self.size //= 2
        self.reporter.event("batch-size", images=self.size)


def _try(work: Callable[..., NDArray[Any]], *inputs: Any) -> NDArray[Any] | None:
    try:
        return np.asarray(work(*inputs))
    except torch.cuda.OutOfMemoryError:
        return None  # the error is let go here, and with it what it keeps in memory
