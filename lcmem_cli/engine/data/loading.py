"""Reading and decoding many files in threads, in order and in bounded memory."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.data.images import (
    DEPTH_NOTE,
    FRAMES_NOTE,
    load_image,
    pixels_to_tensor,
    resized_pixels,
)
from lcmem_cli.engine.data.looks import look_at
from lcmem_cli.engine.data.pixels import ON_WHITE_NOTE
from lcmem_cli.engine.data.reading import content_hash, read_bytes
from lcmem_cli.engine.data.remarks import NOTHING_REMARKABLE, Remarks, no_remarks
from lcmem_cli.engine.errors import InputError, UnreadableImageError
from lcmem_cli.engine.reporter import SILENT, Reporter

Edit = Callable[[Image.Image, int], Image.Image]
Transform = Callable[[torch.Tensor, int], torch.Tensor]
IsKnown = Callable[[str], bool]
CHANGED = "has changed while it was read; run the same command again"
_MOST_SKIPPED = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedBatch:
    """Images of consecutive paths, those that could not be read left out.

    Attributes:
        indices: position of each image in the list of paths, ascending.
        images: ``[len(indices), 3, size, size]`` float32 in [0, 1], or what a transform or a codec
            made of each; perhaps of length zero.
        unreadable: position and reason of each path that gave no image.
        hashes: SHA-256 of each file that could be read, by its position: of those that were
            decoded, of the very bytes that were, and of those that did not need to be.
        remarks: ``[len(indices), 7]``, see ``Remarks``; of no rows where they are no images.
    """

    indices: list[int]
    images: torch.Tensor
    unreadable: list[tuple[int, str]]
    hashes: dict[int, str] = dataclasses.field(default_factory=dict)
    remarks: Remarks = dataclasses.field(default_factory=lambda: no_remarks(0))

    def __len__(self) -> int:
        """Return the number of paths that it tells of."""
        return len(self.hashes) + sum(index not in self.hashes for index, _ in self.unreadable)

    @property
    def skipped(self) -> list[int]:
        """Positions of files that were hashed, and did not need to be decoded."""
        others = {*self.indices, *(index for index, _ in self.unreadable)}
        return [index for index in self.hashes if index not in others]


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """One path's outcome: 8-bit pixels, or a transformed image, or a reason; or it was skipped."""

    content: str | None = None
    pixels: NDArray[np.uint8] | None = None
    image: torch.Tensor | None = None
    reason: str | None = None
    remark: tuple[int, ...] = NOTHING_REMARKABLE
    is_skipped: bool = False


def load_once(
    path: Path, expected: str | None = None, *, size: int | None = None
) -> tuple[Image.Image, str]:
    """Decode a file and tell its content: what is decoded is what is hashed.

    Args:
        path: the file.
        expected: SHA-256 that it had before; ``None``: any.
        size: see ``load_image``.

    Returns:
        The image, and the SHA-256 of the file.

    Raises:
        UnreadableImageError: it cannot be read, or its content is another by now.
    """
    data, content = read_bytes(path)
    if expected is not None and content != expected:
        raise UnreadableImageError(path, CHANGED)
    return _decode(path, data, content, size), content


def _decode(path: Path, data: bytes | None, content: str, size: int | None) -> Image.Image:
    image = load_image(path, data=data, size=size)
    if data is None and content_hash(path) != content:  # too large to be held while it is decoded
        raise UnreadableImageError(path, CHANGED)
    return image


def iter_images(
    paths: Sequence[Path],
    size: int,
    *,
    workers: int,
    batch_size: int,
    transform: Transform | None = None,
    expected: Sequence[str | None] | None = None,
    is_known: IsKnown | None = None,
    edit: Edit | None = None,
) -> Iterator[LoadedBatch]:
    """Load images in order; the next batch is decoded while the caller works on this one.

    Each file is read once: what is hashed is what is decoded. At most ``2 * batch_size + 2 *
    workers`` images are held, and the bytes of ``workers`` files. An image's pixels depend neither
    on ``workers`` nor on ``batch_size``. A file that cannot be read, or has gone, becomes an entry
    of ``unreadable``; it never raises.

    Args:
        paths: files to load.
        size: side of the square images in pixels.
        workers: reading and decoding threads; 0 does both in the calling thread.
        batch_size: paths per batch.
        transform: gets an image ``[3, size, size]`` in [0, 1] and its position in ``paths``, and
            returns what is to stand in its place. It runs in the decoding thread.
        expected: SHA-256 that each file had before, where it is known: one that need not be decoded
            is not read either, and one that has another now is unreadable.
        is_known: gets the SHA-256 of a file, in the decoding threads, and returns whether it need
            not be decoded. Where it is given, of equal files the first alone is.
        edit: gets a decoded image and its position, and returns what is to be resized.

    Yields:
        One ``LoadedBatch`` for every ``batch_size`` paths; those that are only hashed count little.
    """
    chosen = None if is_known is None else _Chosen(is_known)

    def load(index: int) -> _Loaded:
        before = content = None if expected is None else expected[index]
        try:
            if content is not None and chosen is not None and not chosen.take(index, content):
                return _Loaded(content, is_skipped=True)
            data, content = read_bytes(paths[index])
            if before is not None and content != before:
                return _Loaded(before, reason=CHANGED)
            if before is None and chosen is not None and not chosen.take(index, content):
                return _Loaded(content, is_skipped=True)
            image = _decode(paths[index], data, content, size)
        except UnreadableImageError as error:
            return _Loaded(content, reason=error.reason)
        notes = image.info
        if edit is not None:
            image = edit(image, index)
        pixels = resized_pixels(image, size)
        look = look_at(pixels)
        remark = (
            int(DEPTH_NOTE in notes),
            look.blank,
            notes.get(FRAMES_NOTE, 1),
            int(ON_WHITE_NOTE in notes),
            int(look.is_grey),
            int(look.has_bars),
            int(look.is_page),
        )
        if transform is None:
            return _Loaded(content, pixels=pixels, remark=remark)
        made = transform(pixels_to_tensor(pixels), index)
        return _Loaded(content, image=made, remark=remark)

    outcomes = _in_order(load, len(paths), workers=workers, ahead=batch_size + 2 * workers)
    try:
        yield from _batches(outcomes, chosen, batch_size, size)
    finally:
        outcomes.close()


class _Chosen:
    """Which files are decoded: of each content that is not known, the first.

    Threads come here in any order. One that comes before an earlier file of the same content
    decodes it in vain, which ``is_first`` tells afterwards, when all earlier ones have been here.
    """

    def __init__(self, is_known: IsKnown) -> None:
        self._is_known = is_known
        self._first: dict[str, int] = {}
        self._lock = threading.Lock()

    def take(self, index: int, content: str) -> bool:
        """Return whether a file is to be decoded, by what is known so far."""
        with self._lock:
            if self._first.setdefault(content, index) < index:
                return False
            self._first[content] = index
        return not self._is_known(content)

    def is_first(self, index: int, content: str) -> bool:
        """Return whether a file is the first of its content."""
        return self._first[content] == index


def iter_readable(
    paths: Sequence[Path],
    size: int,
    *,
    task_name: str,
    workers: int,
    batch_size: int,
    transform: Transform | None = None,
    expected: Sequence[str | None] | None = None,
    reporter: Reporter = SILENT,
) -> Iterator[torch.Tensor]:
    """Load images as ``iter_images`` does where each of them is needed, with progress.

    Yields:
        ``[n, 3, size, size]`` float32 in [0, 1].

    Raises:
        InputError: one cannot be read, or has another content than the expected one.
    """
    batches = iter_images(
        paths,
        size,
        workers=workers,
        batch_size=batch_size,
        transform=transform,
        expected=expected,
    )
    with reporter.task(task_name, len(paths), unit="image") as task:
        for batch in batches:
            for position, reason in batch.unreadable:
                raise InputError(f"{paths[position]}: {reason}")
            yield batch.images
            task.advance(len(batch.images))


def _in_order(
    load: Callable[[int], _Loaded], count: int, *, workers: int, ahead: int
) -> collections.abc.Generator[_Loaded, None, None]:
    if workers == 0:
        yield from map(load, range(count))
        return
    waiting: collections.deque[Future[_Loaded]] = collections.deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="lcmem-load")
    try:
        for index in range(count):
            waiting.append(pool.submit(load, index))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(
    outcomes: Iterable[_Loaded], chosen: _Chosen | None, batch_size: int, size: int
) -> Iterator[LoadedBatch]:
    part: list[tuple[int, _Loaded]] = []
    hashes: dict[int, str] = {}
    for index, outcome in enumerate(outcomes):
        content = outcome.content
        if content is not None:
            hashes[index] = content
        is_first = chosen is None or content is None or chosen.is_first(index, content)
        if is_first and not outcome.is_skipped:
            part.append((index, outcome))
        if len(part) == batch_size or len(hashes) - len(part) >= _MOST_SKIPPED:
            yield _collate(part, hashes, size)
            part, hashes = [], {}
    if part or hashes:
        yield _collate(part, hashes, size)


def _collate(
    outcomes: Sequence[tuple[int, _Loaded]], hashes: dict[int, str], size: int
) -> LoadedBatch:
    readable = [(index, outcome) for index, outcome in outcomes if outcome.reason is None]
    pixels = [outcome.pixels for _, outcome in readable if outcome.pixels is not None]
    images = [outcome.image for _, outcome in readable if outcome.image is not None]
    if images:
        batch = torch.stack(images)
    elif pixels:
        batch = pixels_to_tensor(np.stack(pixels))
    else:
        batch = torch.zeros(0, 3, size, size)
    return LoadedBatch(
        indices=[index for index, _ in readable],
        images=batch,
        hashes=hashes,
        unreadable=[
            (index, outcome.reason) for index, outcome in outcomes if outcome.reason is not None
        ],
        remarks=np.array([outcome.remark for _, outcome in readable], np.int32).reshape(
            -1, len(NOTHING_REMARKABLE)
        ),
    )


def hash_files(
    paths: Sequence[Path], compute: Compute = DEFAULT_COMPUTE
) -> tuple[list[str | None], dict[int, str]]:
    """Hash files in threads, each process its share.

    Args:
        paths: files.
        compute: its threads and processes share the work.

    Returns:
        The SHA-256 of each file, ``None`` where it cannot be read; and the reasons, by position.
    """

    def digest(index: int) -> tuple[int, str | None, str]:
        try:
            return index, content_hash(paths[index]), ""
        except UnreadableImageError as error:
            return index, None, error.reason

    with ThreadPoolExecutor(max(1, compute.num_workers)) as pool:
        mine = list(pool.map(digest, compute.ranks.share(range(len(paths)))))
    hashes: list[str | None] = [None] * len(paths)
    failed: dict[int, str] = {}
    for index, content, reason in itertools.chain.from_iterable(compute.ranks.gather(mine)):
        hashes[index] = content
        if content is None:
            failed[index] = reason
    return hashes, failed
