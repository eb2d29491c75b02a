"""Where the latents of a training batch come from: stored latents, or images on the fly."""

from __future__ import annotations

import abc
import collections
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from lcmem_cli.engine.data.augment import Augmentation
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.detectors.base import resize_batch
from lcmem_cli.engine.errors import LcmemError, UnreadableImageError
from lcmem_cli.engine.models.codec import Codec
from lcmem_cli.engine.store.latents import LatentStore
from lcmem_cli.engine.training.sampling import PairBatch

LatentPair = tuple[torch.Tensor, torch.Tensor]
_BATCHES_AHEAD = 2


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

        def load(number: int) -> LatentPair:
            batch, piece = batches[number], part[number]
            first = [self.rows[i] for i in batch.first[piece]]
            second = [self.rows[i] for i in batch.second[piece]]
            return self.store.latents(first), self.store.latents(second)

        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting: collections.deque[Future[LatentPair]] = collections.deque()
            for number in range(len(batches)):
                waiting.append(pool.submit(load, number))
                if len(waiting) > _BATCHES_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


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

    def pair(self, first: int, second: int, seed: int) -> LatentPair:
        """Return the two images of one pair, ``[3, image_size, image_size]`` in [0, 1] each."""
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
        if self.num_workers == 0:
            for batch, piece in zip(batches, part, strict=True):
                rows = zip(batch.first[piece], batch.second[piece], batch.seeds[piece], strict=True)
                yield self._encode([self.pair(int(a), int(b), int(s)) for a, b, s in rows])
            return
        pool = ThreadPoolExecutor(
            self.num_workers, initializer=torch.set_num_threads, initargs=(1,)
        )
        waiting: collections.deque[list[Future[LatentPair]]] = collections.deque()
        try:
            for batch, piece in zip(batches, part, strict=True):
                rows = zip(batch.first[piece], batch.second[piece], batch.seeds[piece], strict=True)
                waiting.append([pool.submit(self.pair, int(a), int(b), int(s)) for a, b, s in rows])
                if len(waiting) > _BATCHES_AHEAD:
                    yield self._encode([future.result() for future in waiting.popleft()])
            while waiting:
                yield self._encode([future.result() for future in waiting.popleft()])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _encode(self, pairs: list[LatentPair]) -> LatentPair:
        empty = torch.zeros(0, 3, self.image_size, self.image_size)
        images = torch.stack([a for a, _ in pairs] + [b for _, b in pairs]) if pairs else empty
        # The codec runs in inference mode; a clone is an ordinary tensor that autograd accepts.
        first, second = self.codec.encode(images).clone().chunk(2)
        return first, second
