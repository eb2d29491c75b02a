"""Building, extending and asking an index."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.data.arrays import UNIT_RANGE, Images, ValueRange
from lcmem_cli.engine.data.manifest import (
    DEFAULT_READING,
    STRICT_READING,
    Manifest,
    Reading,
    is_filelist,
)
from lcmem_cli.engine.data.sources.in_memory import placed
from lcmem_cli.engine.data.sources.opened import find_shards, is_there
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.detectors.options import absolute_name
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.files import folder_lock
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Unreadable, check_unreadable
from lcmem_cli.engine.store.index import Index, IndexMatch
from lcmem_cli.engine.verification.bank import FeatureBank, IndexKeypoints, read_bank, read_indexed
from lcmem_cli.engine.verification.evidence import Evidence
from lcmem_cli.engine.verification.features import ROW_BYTES
from lcmem_cli.engine.verification.verify import NUM_CANDIDATES
from lcmem_cli.engine.verification.verify import verify as verify_candidates

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
        keypoint_bytes: size of the keypoints of each distinct image; 0 where none are kept.
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
    keypoint_bytes: int
    unreadable: tuple[Unreadable, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryMatch(IndexMatch):
    """A match of a query of an index, perhaps verified.

    Attributes:
        evidence: what aligning the query with it found; ``None`` where nothing was found or looked
            for.
    """

    evidence: Evidence | None = None

    @property
    def same_picture(self) -> bool | None:
        """Whether both show one picture, altered or not; ``None`` where nothing says so."""
        return None if self.evidence is None else self.evidence.same_picture

    @property
    def edit(self) -> str:
        """What was done to the indexed image to give the query; empty where not known."""
        return self.evidence.text() if self.evidence is not None and self.same_picture else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryResult(Result):
    """Best matches of each query.

    Attributes:
        folder: the index.
        matches: per query path, its best matches: those that show the same picture by their
            evidence, then the others by their score.
        unreadable: queries that could not be read.
        search_recall: share of the exact best matches found on a sample; 1 for exact search.
    """

    folder: str
    matches: dict[str, tuple[QueryMatch, ...]]
    unreadable: tuple[Unreadable, ...]
    search_recall: float

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a row for each match of each query."""
        return [
            {
                "query": query,
                "rank": rank,
                "match": match.path,
                "match_id": match.id,
                "score": match.score,
                "same_picture": match.same_picture,
                "edit": match.edit,
            }
            for query, matches in self.matches.items()
            for rank, match in enumerate(matches, start=1)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; each match with its edit in words."""
        values = super().to_dict()
        for asked, matches in self.matches.items():
            for written, match in zip(values["matches"][asked], matches, strict=True):
                written |= {"same_picture": match.same_picture, "edit": match.edit}
        return values


def add_to_index(
    source: Path,
    folder: Path,
    detector: Detector,
    *,
    reading: Reading = STRICT_READING,
    only_listed: bool = False,
    keypoints: bool = False,
    compute: Compute = DEFAULT_COMPUTE,
) -> IndexingResult:
    """Add a folder or filelist to an index, making it if there is none.

    Images that are in the index already, with the content that they have now, are skipped, so a
    killed run is continued by the same call, and adding in two calls ends as adding in one.
    Contents that the index knows under another path are not embedded again.

    Args:
        source: see ``load_manifest``.
        folder: the index.
        detector: what embeds; an index of another is refused.
        reading: how the source is read.
        only_listed: refuse an index that holds images which the source does not list.
        keypoints: keep what verification needs of each image, ``ROW_BYTES`` of it, so that the
            files need not be there; an index that has them goes on keeping them.
        compute: how the images are embedded; its cache is not used, the index is one itself.

    Raises:
        InputError: the index holds other images, which ``only_listed`` refuses.
        FingerprintMismatchError: the index is another detector's.
        UnreadableLimitError: more unreadable images than tolerated; the readable ones are added.
        FolderBusyError: another process adds to the index.
    """
    ranks = compute.ranks
    manifest = reading.load(source, reporter=compute.reporter)
    # Held to the end: a second addition at the same time would number its segments alike.
    with folder_lock(folder) if ranks.is_main else contextlib.nullcontext():
        if ranks.is_main:
            name = absolute_name(detector.name)
            Index.create(folder, detector=name, fingerprint=detector.fingerprint)
        ranks.barrier()
        addition = _Addition(manifest, folder, detector, compute)
        kept = IndexKeypoints(folder)
        keypoints = keypoints or ranks.broadcast(kept.are_kept)
        if only_listed:
            addition.refuse_others()
        for start in range(0, len(manifest.records), IMAGES_PER_SEGMENT):
            added = addition.add_segment(range(start, start + IMAGES_PER_SEGMENT))
            if keypoints:
                kept.keep(*added, compute)
    if addition.num_changed:
        compute.reporter.warn(
            f"{folder}: {addition.num_changed} file(s) have another content than when they were "
            "added; the index holds both contents"
        )
    remark = "the readable ones are in the index"
    check_unreadable(addition.unreadable, reading.max_unreadable, remark=remark)
    return IndexingResult(
        folder=str(folder),
        detector=detector.name,
        num_images=len(addition.index),
        num_distinct=addition.index.num_rows,
        num_added=addition.num_added,
        num_known=addition.num_known,
        num_changed=addition.num_changed,
        encoder_passes=addition.encoder_passes,
        keypoint_bytes=ROW_BYTES if keypoints else 0,
        unreadable=tuple(addition.unreadable),
    )


def build_index(
    source: str | Path | Images,
    folder: str | Path,
    *,
    detector: str | Detector = "joint",
    value_range: ValueRange = UNIT_RANGE,
    device: str = "auto",
    batch_size: int = 32,
    workers: int = -1,
    reporter: Reporter = SILENT,
) -> Index:
    """Make an index of images, or add to one; see ``add_to_index``.

    Args:
        source: folder, filelist or archive; or images in memory, such as a DataLoader, named by
            their numbers. Of these the index keeps features only, so that later their matches
            cannot be verified.
        folder: the index.
        detector: name, or a loaded detector.
        value_range: black and white of floating-point images in memory, such as ``(-1, 1)``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        batch_size: images per network call.
        workers: decoding workers; -1: from the CPUs.
        reporter: told progress and warnings.

    Raises:
        InputError: there are no images.
        FingerprintMismatchError: the index is another detector's.
        UnreadableLimitError: an image cannot be read.
    """
    if isinstance(detector, str):
        detector = load_detector(detector, device=device)
    compute = Compute(device=device, batch_size=batch_size, workers=workers, reporter=reporter)
    with contextlib.ExitStack() as stack:
        place = Path(placed(source, "images", value_range, stack))
        add_to_index(place, Path(folder), detector, compute=compute)
    return Index.open(folder)


class _Addition:
    """Adds the images of a list that an index does not hold, a segment at a time.

    Args:
        manifest: the list.
        folder: the index, which exists.
        detector: what embeds.
        compute: how; the processes share the work, and the first one writes.

    Attributes:
        index: as it is now.
        unreadable: images left out so far.
        num_added: images added so far.
        num_known: listed images so far that the index held.
        num_changed: added ones so far whose file it held with another content.
        encoder_passes: images that the encoder saw so far.
    """

    def __init__(
        self, manifest: Manifest, folder: Path, detector: Detector, compute: Compute
    ) -> None:
        self.index = Index.open(folder)
        self.index.check(detector.fingerprint)
        if compute.ranks.is_main:
            self.index.verify()  # nothing is added to what is damaged
        self.unreadable: list[Unreadable] = []
        self.num_added = self.num_known = self.num_changed = self.encoder_passes = 0
        self._records = manifest.records
        self._detector = detector
        self._compute = dataclasses.replace(compute, cache=None)
        self._paths = [path.absolute() for path in manifest.paths()]
        self._held = {(entry.path, entry.content_hash) for entry in self.index.entries}
        self._held_paths = {path for path, _ in self._held}

    def refuse_others(self) -> None:
        """Refuse an index that holds images which are not listed.

        Raises:
            InputError: it does.
        """
        others = self._held_paths.difference(map(str, self._paths))
        if others:
            raise InputError(
                f"{self.index.folder}: holds {len(others):,} image(s) that are not listed now, the "
                f"first is {min(others)}; choose another folder, or add to this one with: lcmem "
                "index add"
            )

    def add_segment(self, places: range) -> tuple[list[Path], list[str]]:
        """Add the new images among some places of the list; each file is read once.

        Returns:
            Files and contents of all images there that the index holds now.
        """
        part = [place for place in places if place < len(self._paths)]
        embedded = embed_files(
            self._detector,
            [self._paths[place] for place in part],
            self._compute,
            known=self.index,
            with_blank=False,
        )
        images = []
        fresh: dict[str, int] = {}
        found = zip(part, embedded.content_hashes, embedded.rows.tolist(), strict=True)
        for place, content, row in found:
            path, record = str(self._paths[place]), self._records[place]
            if (path, content) in self._held:
                self.num_known += 1
            elif content is not None and (row >= 0 or content in self.index):
                images.append((path, record.id, content, record.ds_name))
                self.num_changed += path in self._held_paths
                if row >= 0:
                    fresh.setdefault(content, row)
        ranks = self._compute.ranks
        if ranks.is_main and images:
            self.index.append(images, list(fresh), embedded.features[list(fresh.values())])
        ranks.barrier()
        if not ranks.is_main:
            self.index = Index.open(self.index.folder)
        self.unreadable.extend(embedded.unreadable)
        self.num_added += len(images)
        self.encoder_passes += embedded.encoder_passes
        held = [
            (self._paths[place], content)
            for place, content in zip(part, embedded.content_hashes, strict=True)
            if content is not None and content in self.index
        ]
        return [file for file, _ in held], [content for _, content in held]


def query_index(
    folder: Path,
    query: Path,
    detector: Detector,
    *,
    top_k: int = 5,
    approximate: bool = False,
    verify: bool = True,
    reading: Reading = DEFAULT_READING,
    compute: Compute = DEFAULT_COMPUTE,
) -> QueryResult:
    """Find the indexed images most like one image, or like each of a folder or filelist.

    Args:
        folder: the index.
        query: an image, or see ``load_manifest``.
        detector: the one that the index was built with.
        top_k: matches per image.
        approximate: see ``audit``.
        verify: align the best candidates with their query, where their files are still there.
        reading: how a list is read.
        compute: how the images are embedded.

    Raises:
        InputError: nothing readable to ask about.
        UnreadableLimitError: more images than tolerated could not be read.
        FingerprintMismatchError: the index is another detector's.
    """
    index = Index.open(folder)
    index.check(detector.fingerprint)
    is_image = is_there(query) and not (is_filelist(query) or find_shards(query))
    paths = [query] if is_image else reading.load(query).paths()
    embedded = embed_files(detector, paths, compute, with_blank=False)
    check_unreadable(embedded.unreadable, reading.max_unreadable)
    if not len(embedded.features):
        reasons = "; ".join(f"{u.path}: {u.reason}" for u in embedded.unreadable[:3])
        reasons = reasons or "they show nothing but one colour"
        raise InputError(f"{query}: no readable image ({reasons})")
    searcher = detector.approximate() if approximate else detector
    found = index.top_k(searcher, embedded.features, max(top_k, NUM_CANDIDATES * verify))
    matches = [[QueryMatch(**vars(match)) for match in row] for row in index.matches(found)]
    if verify:
        # Of equal contents the first file; each with the hash of what was embedded.
        first = np.unique(embedded.rows[embedded.rows >= 0], return_index=True)[1]
        places = np.flatnonzero(embedded.rows >= 0)[first]
        queries = read_bank(
            [paths[place] for place in places],
            [str(embedded.content_hashes[place]) for place in places],
            compute,
        )
        matches = _verified(index, queries, matches, compute)
    return QueryResult(
        folder=str(folder),
        matches={
            str(path): tuple(matches[row][:top_k])
            for path, row in zip(paths, embedded.rows, strict=True)
            if row >= 0
        },
        unreadable=embedded.unreadable,
        search_recall=found.recall,
    )


def _verified(
    index: Index, queries: FeatureBank, matches: list[list[QueryMatch]], compute: Compute
) -> list[list[QueryMatch]]:
    """Align the best matches with their queries, and put those of the same picture first."""
    contents = {entry.row: entry.content_hash for entry in index.entries}
    candidates = np.array([[match.row for match in row[:NUM_CANDIDATES]] for row in matches])
    path_of = {match.row: Path(match.path) for row in matches for match in row}
    rows = np.unique(candidates).tolist()
    hashes = [contents[row] for row in rows]
    bank = read_indexed(index.folder, [path_of[row] for row in rows], hashes, compute)
    if num_without := int((~bank.rows.any(axis=1)).sum()):
        compute.reporter.warn(
            f"{num_without:,} of the {len(rows):,} best matches are not verified: their files are "
            "not where and what the index found"
        )
    training = bank.numbered(rows)
    found = verify_candidates(queries, training, candidates, compute)
    verified = []
    for number, row in enumerate(matches):
        evidence = [found.evidence(number, rank) for rank in range(candidates.shape[1])]
        for rank, what in enumerate(evidence):
            row[rank] = dataclasses.replace(row[rank], evidence=what)
        verified.append(sorted(row, key=_strength, reverse=True))
    return verified


def _strength(match: QueryMatch) -> tuple[bool, float]:
    if match.evidence is not None and match.evidence.same_picture:
        return True, match.evidence.value
    return False, match.score
