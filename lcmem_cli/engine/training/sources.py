"""Where the latents of a training batch come from: stored latents, or images on the fly."""

from __future__ import annotations

import abc
import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from lcmem_cli.engine.data.augment import Augmentation
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.detectors.base import resize_batch
from lcmem_cli.engine.errors import LcmemError, UnreadableImageError
from lcmem_cli.engine.models.codec import Codec
from lcmem_cli.engine.store.latents import LatentStore
from lcmem_cli.engine.training.sampling import PairBatch

LatentPair = tuple[torch.Tensor, torch.Tensor]
Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
_BATCHES_AHEAD = 2


def load_ahead(
    load: Callable[[Item], Loaded], batches: Iterable[Sequence[Item]], *, workers: int
) -> Iterator[list[Loaded]]:
    """Load batches item by item, in order, while the caller works on an earlier one.

    Args:
        load: makes one item.
        batches: items of each batch.
        workers: threads; 0 loads in the calling thread. Each computes in one thread of torch, as
            the training needs the other cores.
    """
    if workers == 0:
        for items in batches:
            yield [load(item) for item in items]
        return
    waiting: collections.deque[list[Future[Loaded]]] = collections.deque()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for items in batches:
            waiting.append([pool.submit(load, item) for item in items])
            if len(waiting) > _BATCHES_AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class PairSource(abc.ABC):
    """Turns batches of rows into pairs of latents, preparing the next while one is computed."""

    @abc.abstractmethod
    def stream(self, batches: Sequence[PairBatch], part: Sequence[slice]) -> Iterator[LatentPair]:
        """Yield ``(first, second)`` latents ``[b, C, h, w]`` of each batch, in order.

        Args:
            batches: what to load.
            part: per batch, the rows that this process computes.
        """


class LatentSource(PairSource):
    """Reads precomputed latents; no augmentation is possible.

    Args:
        store: an open latent store.
        rows: store row of each training record.
    """

    def __init__(self, store: LatentStore, rows: Sequence[int]) -> None:
        self.store = store
        self.rows = list(rows)

    def stream(self, batches: Sequence[PairBatch], part: Sequence[slice]) -> Iterator[LatentPair]:
        """Yield stored latents."""

        def load(item: tuple[PairBatch, slice]) -> LatentPair:
            batch, piece = item
            first = [self.rows[i] for i in batch.first[piece]]
            second = [self.rows[i] for i in batch.second[piece]]
            return self.store.latents(first), self.store.latents(second)

        whole = ([item] for item in zip(batches, part, strict=True))
        for (pair,) in load_ahead(load, whole, workers=1):
            yield pair


class ImageSource(PairSource):
    """Decodes images, alters the second of each pair, and encodes both with the frozen codec.

    Args:
        paths: image of each training record.
        codec: frozen; on the training device.
        image_size: side in pixels of what the codec sees.
        augmentation: of the second image.
        working_size: side in pixels at which images are altered, before the resize to
            ``image_size``; 0 means ``image_size``.
        num_workers: decoding threads; 0 decodes in the training thread.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        codec: Codec,
        *,
        image_size: int,
        augmentation: Augmentation,
        working_size: int = 0,
        num_workers: int = 1,
    ) -> None:
        self.paths = list(paths)
        self.codec = codec
        self.image_size = image_size
        self.augmentation = augmentation
        self.working_size = working_size or image_size
        self.num_workers = num_workers

    def pair(self, rows: tuple[int, int, int]) -> LatentPair:
        """Return the two images of one pair, ``[3, image_size, image_size]`` in [0, 1] each.

        Args:
            rows: of the first and the second image, and the seed of the augmentation.
        """
        first, second, seed = rows
        return self._image(first, None), self._image(second, seed)

    def _image(self, row: int, seed: int | None) -> torch.Tensor:
        path = self.paths[row]
        try:
            image = load_image(path)
        except UnreadableImageError as error:
            raise LcmemError(
                f"{path}: became unreadable during training ({error.reason}); restore the file "
                "and start the same command with --resume"
            ) from error
        if seed is None:
            return to_tensor(image, self.image_size)
        altered = self.augmentation(to_tensor(image, self.working_size), seed=seed)
        return resize_batch(altered[None], self.image_size)[0]

    def stream(self, batches: Sequence[PairBatch], part: Sequence[slice]) -> Iterator[LatentPair]:
        """Yield latents encoded on the fly; decoding runs ahead in threads."""
        items = (
            list(zip(*(v[piece].tolist() for v in (b.first, b.second, b.seeds)), strict=True))
            for b, piece in zip(batches, part, strict=True)
        )
        for pairs in load_ahead(self.pair, items, workers=self.num_workers):
            yield self._encode(pairs)

    def _encode(self, pairs: list[LatentPair]) -> LatentPair:
        empty = torch.zeros(0, 3, self.image_size, self.image_size)
        images = torch.stack([a for a, _ in pairs] + [b for _, b in pairs]) if pairs else empty
        # The codec runs in inference mode; a clone is an ordinary tensor that autograd accepts.
        first, second = self.codec.encode(images).clone().chunk(2)
        return first, second
