"""Embedding many files: each distinct content is decoded and embedded once."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.data.loading import iter_images
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.distributed import Ranks, resolve_workers
from lcmem_cli.engine.files import sha256_file
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Unreadable
from lcmem_cli.engine.store.features import FeatureCache

IMAGES_PER_WRITE = 512
MAX_BYTES_IN_MEMORY = 512 << 20


@dataclasses.dataclass(frozen=True)
class EmbeddedFiles:
    """Features of a list of files.

    Attributes:
        features: ``[d, n]``, one row a distinct readable content, in order of first appearance.
        rows: ``[files]`` row of each file, or -1 where it is unreadable.
        content_hashes: SHA-256 of each file, ``None`` where it cannot be read at all.
        unreadable: files that were left out, with reasons.
        encoder_passes: images that the encoder saw now, over all processes.
    """

    features: NDArray[Any]
    rows: NDArray[np.int64]
    content_hashes: list[str | None]
    unreadable: tuple[Unreadable, ...]
    encoder_passes: int


def embed_files(
    detector: Detector,
    paths: Sequence[Path],
    *,
    batch_size: int = 32,
    workers: int = -1,
    cache: FeatureCache | None = None,
    ranks: Ranks | None = None,
    reporter: Reporter = SILENT,
) -> EmbeddedFiles:
    """Embed files; equal contents, and contents in the cache, cost nothing more.

    Args:
        detector: what embeds.
        paths: image files.
        batch_size: images per network call; features do not depend on it.
        workers: decoding threads; -1 from the CPUs.
        cache: features of this detector from earlier runs; filled as the work goes on, so that a
            killed run continues.
        ranks: processes that share the work; each gets the whole result.
        reporter: receives progress.
    """
    ranks = ranks or Ranks()
    num_workers = resolve_workers(workers, ranks.size)
    hashes = _hash_all(paths, max(1, num_workers))
    first: dict[str, int] = {}
    for index, content in enumerate(hashes):
        if content is not None:
            first.setdefault(content, index)
    contents = list(first)
    known = {c for c, hit in zip(contents, _known(cache, contents), strict=True) if hit}
    known = set().union(*ranks.gather(known)) if ranks.size > 1 else known
    todo = list(ranks.share([content for content in contents if content not in known]))
    made: dict[str, NDArray[Any]] = {}
    failed: dict[str, str] = {}
    with reporter.task(f"embedding ({detector.name})", len(todo), unit="image") as task:
        for names, features, bad in _embed(detector, todo, first, paths, batch_size, num_workers):
            made.update(zip(names, features, strict=True))
            failed.update(bad)
            if cache is not None and ranks.size == 1:
                cache.put_many(names, features)
            task.advance(len(names) + len(bad))
    passes = sum(ranks.gather(len(made)))
    for part, problems in ranks.gather((made, failed)) if ranks.size > 1 else ():
        made.update(part)
        failed.update(problems)
    if cache is not None and ranks.size > 1 and ranks.is_main and made:
        names = sorted(made)
        cache.put_many(names, np.stack([made[name] for name in names]))
    usable = [content for content in contents if content not in failed]
    features = _collect(usable, made, cache, detector)
    if ranks.size > 1:  # only the first process may know the cache's newest content
        features = ranks.broadcast(features)
    row_of = {content: row for row, content in enumerate(usable)}
    reasons = {**dict.fromkeys([None], "cannot be opened"), **failed}
    return EmbeddedFiles(
        features=features,
        rows=np.asarray([row_of.get(c, -1) if c else -1 for c in hashes], dtype=np.int64),
        content_hashes=hashes,
        unreadable=tuple(
            Unreadable(path=str(path), reason=reasons[content])
            for path, content in zip(paths, hashes, strict=True)
            if content is None or content in failed
        ),
        encoder_passes=passes,
    )


def _hash_all(paths: Sequence[Path], workers: int) -> list[str | None]:
    def digest(path: Path) -> str | None:
        try:
            return sha256_file(path)
        except OSError:
            return None

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(digest, paths))


def _known(cache: FeatureCache | None, contents: Sequence[str]) -> Sequence[bool]:
    if cache is None:
        return [False] * len(contents)
    flags: list[bool] = [c in cache for c in contents]
    return flags


def _embed(
    detector: Detector,
    todo: Sequence[str],
    first: dict[str, int],
    paths: Sequence[Path],
    batch_size: int,
    workers: int,
) -> Iterator[tuple[list[str], NDArray[Any], dict[str, str]]]:
    """Yield names, features and failures, some hundred images at a time."""
    names: list[str] = []
    rows: list[NDArray[Any]] = []
    bad: dict[str, str] = {}
    files = [paths[first[content]] for content in todo]
    for batch in iter_images(files, detector.input_size, workers=workers, batch_size=batch_size):
        bad.update({todo[i]: reason for i, reason in batch.unreadable})
        if batch.indices:
            rows.append(np.asarray(detector.embed_batch(batch.images)))
            names += [todo[i] for i in batch.indices]
        if len(names) + len(bad) >= IMAGES_PER_WRITE:
            yield names, _joined(rows, detector), bad
            names, rows, bad = [], [], {}
    yield names, _joined(rows, detector), bad


def _joined(rows: list[NDArray[Any]], detector: Detector) -> NDArray[Any]:
    return np.concatenate(rows) if rows else np.zeros((0, detector.num_features), np.float32)


def _collect(
    contents: Sequence[str],
    made: dict[str, NDArray[Any]],
    cache: FeatureCache | None,
    detector: Detector,
) -> NDArray[Any]:
    """Bring the rows in order; beyond a limit into a temporary file instead of memory."""
    if not contents:
        return np.zeros((0, detector.num_features), np.float32)

    def row(content: str) -> NDArray[Any]:
        if content in made:
            return made[content]
        assert cache is not None
        stored: NDArray[Any] = cache.get_many([content])[0][0]
        return stored

    sample = row(contents[0])
    shape = (len(contents), sample.shape[0])
    if shape[0] * sample.nbytes > MAX_BYTES_IN_MEMORY:
        result: NDArray[Any] = np.memmap(
            tempfile.TemporaryFile(), dtype=sample.dtype, mode="w+", shape=shape
        )
    else:
        result = np.empty(shape, dtype=sample.dtype)
    for number, content in enumerate(contents):
        result[number] = row(content)
    return result
