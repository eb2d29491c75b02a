"""Building, extending and asking an index."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.data.loading import hash_files
from lcmem_cli.engine.data.manifest import Manifest, is_filelist, load_manifest
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.detectors.head import approximate_search
from lcmem_cli.engine.detectors.options import absolute_name
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.files import folder_lock
from lcmem_cli.engine.results import Result, Unreadable, check_unreadable
from lcmem_cli.engine.store.index import Index, IndexMatch

IMAGES_PER_SEGMENT = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexingResult(Result):
    """What an addition did.

    Attributes:
        folder: the index.
        detector: name of the detector.
        num_images: images in the index now.
        num_distinct: distinct contents among them.
        num_added: images added now.
        num_known: listed images that were in the index already.
        num_changed: files whose content was another when they were added; the index holds both.
        encoder_passes: images that the encoder saw now.
        unreadable: images left out.
    """

    folder: str
    detector: str
    num_images: int
    num_distinct: int
    num_added: int
    num_known: int
    num_changed: int
    encoder_passes: int
    unreadable: tuple[Unreadable, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryResult(Result):
    """Best matches of each query.

    Attributes:
        folder: the index.
        matches: per query path, its best matches, best first.
        unreadable: queries that could not be read.
        search_recall: share of the exact best matches found on a sample; 1 for exact search.
    """

    folder: str
    matches: dict[str, tuple[IndexMatch, ...]]
    unreadable: tuple[Unreadable, ...]
    search_recall: float


def add_to_index(
    source: Path,
    folder: Path,
    detector: Detector,
    *,
    basedir: Path | None = None,
    max_unreadable: int = 0,
    only_listed: bool = False,
    compute: Compute = DEFAULT_COMPUTE,
) -> IndexingResult:
    """Add a folder or filelist to an index, making it if there is none.

    Images that are in the index already, with the content that they have now, are skipped, so a
    killed run is continued by the same call, and adding in two calls ends as adding in one.
    Contents that the index knows under another path are not embedded again.

    Args:
        source: folder or filelist.
        folder: the index.
        detector: what embeds; an index of another is refused.
        basedir: folder that the paths of a filelist are relative to.
        max_unreadable: tolerated unreadable images.
        only_listed: refuse an index that holds images which the source does not list.
        compute: how the images are embedded; its cache is not used, the index is one itself.

    Raises:
        InputError: the index holds other images, which ``only_listed`` refuses.
        FingerprintMismatchError: the index is another detector's.
        UnreadableLimitError: more unreadable images than tolerated; the readable ones are added.
        FolderBusyError: another process adds to the index.
    """
    ranks = compute.ranks
    manifest = load_manifest(source, basedir=basedir, need_split=False, max_missing=max_unreadable)
    # Held to the end: a second addition at the same time would number its segments alike.
    with folder_lock(folder) if ranks.is_main else contextlib.nullcontext():
        if ranks.is_main:
            Index.create(
                folder, detector=absolute_name(detector.name), fingerprint=detector.fingerprint
            )
        ranks.barrier()
        return _add(
            manifest,
            folder,
            detector,
            only_listed=only_listed,
            max_unreadable=max_unreadable,
            compute=compute,
        )


def _add(
    manifest: Manifest,
    folder: Path,
    detector: Detector,
    *,
    only_listed: bool,
    max_unreadable: int,
    compute: Compute,
) -> IndexingResult:
    ranks, reporter = compute.ranks, compute.reporter
    paths = [path.absolute() for path in manifest.paths()]
    index = Index.open(folder)
    index.check(detector.fingerprint)
    contents, _ = hash_files(paths, compute)
    known_paths = {entry.path for entry in index.entries}
    others = known_paths.difference(map(str, paths)) if only_listed else set()
    if others:
        raise InputError(
            f"{folder}: holds {len(others):,} image(s) that are not listed now, the first is "
            f"{min(others)}; choose another folder, or add to this one with: lcmem index add"
        )
    known = {(entry.path, entry.content_hash) for entry in index.entries}
    is_new = [
        (str(path), content) not in known for path, content in zip(paths, contents, strict=True)
    ]
    num_changed = sum(
        new and content is not None and str(path) in known_paths
        for new, path, content in zip(is_new, paths, contents, strict=True)
    )
    if num_changed:
        reporter.warn(
            f"{folder}: {num_changed} file(s) have another content than when they were added; "
            "the index holds both contents"
        )
    unreadable: list[Unreadable] = []
    added = passes = 0
    for start in range(0, len(paths), IMAGES_PER_SEGMENT):
        part = [
            number
            for number in range(start, min(start + IMAGES_PER_SEGMENT, len(paths)))
            if is_new[number]
        ]
        missing = [number for number in part if contents[number] not in index]
        embedded = embed_files(
            detector,
            [paths[number] for number in missing],
            dataclasses.replace(compute, cache=None),
        )
        found = zip(embedded.rows, embedded.content_hashes, strict=True)
        made = dict(zip(missing, found, strict=True))
        images: list[tuple[str, str, str, str | None]] = []
        fresh: dict[str, int] = {}
        for number in part:
            row, content = made.get(number, (-1, contents[number]))
            if content is None or (row < 0 and content not in index):
                continue
            record = manifest.records[number]
            images.append((str(paths[number]), record.id, content, record.ds_name))
            if content not in index:
                fresh.setdefault(content, int(row))
        if ranks.is_main and images:
            index.append(images, list(fresh), embedded.features[list(fresh.values())])
        ranks.barrier()
        unreadable.extend(embedded.unreadable)
        added += len(images)
        passes += embedded.encoder_passes
        if not ranks.is_main:
            index = Index.open(folder)
    check_unreadable(unreadable, max_unreadable, remark="the readable ones are in the index")
    return IndexingResult(
        folder=str(folder),
        detector=detector.name,
        num_images=len(index),
        num_distinct=index.num_rows,
        num_added=added,
        num_known=len(paths) - sum(is_new),
        num_changed=num_changed,
        encoder_passes=passes,
        unreadable=tuple(unreadable),
    )


def query_index(
    folder: Path,
    query: Path,
    detector: Detector,
    *,
    top_k: int = 5,
    approximate: bool = False,
    basedir: Path | None = None,
    max_unreadable: int | None = None,
    compute: Compute = DEFAULT_COMPUTE,
) -> QueryResult:
    """Find the indexed images most like one image, or like each of a folder or filelist.

    Args:
        folder: the index.
        query: image, folder or filelist.
        detector: the one that the index was built with.
        top_k: matches per image.
        approximate: see ``audit``.
        basedir: folder that a filelist's paths start from.
        max_unreadable: unreadable images to tolerate; ``None``: any number.
        compute: how the images are embedded.

    Raises:
        InputError: nothing readable to ask about.
        UnreadableLimitError: more images than ``max_unreadable`` could not be read.
        FingerprintMismatchError: the index is another detector's.
    """
    index = Index.open(folder)
    index.check(detector.fingerprint)
    is_image = query.is_file() and not is_filelist(query)
    paths = [query]
    if not is_image:
        listed = load_manifest(query, basedir=basedir, need_split=False, max_missing=max_unreadable)
        paths = listed.paths()
    embedded = embed_files(detector, paths, compute)
    check_unreadable(embedded.unreadable, max_unreadable)
    if not len(embedded.features):
        reasons = "; ".join(f"{u.path}: {u.reason}" for u in embedded.unreadable[:3])
        raise InputError(f"{query}: no readable image ({reasons})")
    searcher = approximate_search(detector) if approximate else detector
    found = index.top_k(searcher, embedded.features, top_k)
    matches = index.matches(found)
    return QueryResult(
        folder=str(folder),
        matches={
            str(path): tuple(matches[row])
            for path, row in zip(paths, embedded.rows, strict=True)
            if row >= 0
        },
        unreadable=embedded.unreadable,
        search_recall=found.recall,
    )
