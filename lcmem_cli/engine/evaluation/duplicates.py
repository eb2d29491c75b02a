"""Near-duplicates within one set: groups about the image to keep, and a list without the others.

What a set shows several times a generator learns by heart first. A group holds one image to keep
and those that were each verified against it, so it is no chain from picture to picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.data.loading import load_once
from lcmem_cli.engine.data.manifest import (
    DEFAULT_READING,
    Manifest,
    Reading,
    Record,
    write_manifest,
)
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.documents import FileName
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.detector import DEFAULT_DETECTOR, DEFAULT_SIZE
from lcmem_cli.engine.evaluation.audit.null import same_pixels
from lcmem_cli.engine.evaluation.audit.search import search
from lcmem_cli.engine.evaluation.audit.sets import ImageSet, Listing, embed_set, list_set
from lcmem_cli.engine.evaluation.audit.verify import features_of
from lcmem_cli.engine.evaluation.components import components
from lcmem_cli.engine.files import folder_lock, jsonable, write_csv, write_json
from lcmem_cli.engine.results import Result, Unreadable, check_unreadable
from lcmem_cli.engine.verification.bank import FeatureBank
from lcmem_cli.engine.verification.candidates import PictureSearch, merged
from lcmem_cli.engine.verification.evidence import describe
from lcmem_cli.engine.verification.residual import COPY_EVIDENCE, is_copy
from lcmem_cli.engine.verification.verify import NUM_CANDIDATES, verify

DUPLICATES_SCHEMA: Literal[1] = 1
JSON_NAME = "duplicates.json"
CSV_NAME = "duplicates.csv"
KEEP_NAME = "keep.csv"
COLUMNS = ("group", "path", "kept", "relation", "evidence", "edit")
Relation = Literal["identical file", "same pixels", "same picture, altered"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duplicate:
    """An image that is left out of the list to keep.

    Attributes:
        group: number of its group, from 1.
        path: as listed.
        kept: the image that stands for the group.
        relation: what is known of both.
        evidence: log-odds that both show one picture; ``None`` of identical files and pixels.
        edit: what was done to the kept image to give this one, in words.
    """

    group: int
    path: FileName
    kept: FileName
    relation: Relation
    evidence: float | None = None
    edit: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicatesResult(Result):
    """The near-duplicates of a set.

    Attributes:
        source: the set, as the user named it.
        folder: that the paths are relative to; ``--basedir`` of ``keep.csv``.
        detector: what proposed the candidates.
        fingerprint: of the detector.
        num_images: images listed.
        num_groups: groups of near-duplicates.
        num_kept: images in ``keep.csv``.
        duplicates: the images that are not, group by group.
        unreadable: images that could not be read; they are in neither list.
    """

    source: FileName
    folder: FileName
    detector: str
    fingerprint: str
    num_images: int
    num_groups: int
    num_kept: int
    duplicates: tuple[Duplicate, ...]
    unreadable: tuple[Unreadable, ...]

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a row for each duplicate."""
        return [dataclasses.asdict(item) for item in self.duplicates]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values: dict[str, Any] = jsonable(dataclasses.asdict(self))
        return {"format": "lcmem-duplicates", "schema": DUPLICATES_SCHEMA, **values}


def find_duplicates(
    images: str | Path,
    *,
    reading: Reading = DEFAULT_READING,
    detector: str = DEFAULT_DETECTOR,
    compute: Compute = DEFAULT_COMPUTE,
    output: Path | None = None,
    overwrite: bool = False,
) -> DuplicatesResult:
    """Find images of a set that show one picture: identical, re-encoded, mirrored, cropped.

    The largest picture of a group is kept, of equal ones the first by name. Candidates are found by
    the detector and by picture, as in an audit; which of them are copies, alignment decides.

    Args:
        images: folder, filelist, archive, array or saved index.
        reading: how the set is read.
        detector: name of what proposes candidates.
        compute: how it is done.
        output: folder for ``duplicates.csv``, ``keep.csv`` and ``duplicates.json``.
        overwrite: replace another result there.

    Raises:
        InputError: an argument is wrong, the set is empty, or ``output`` holds another result.
        UnreadableLimitError: more images than tolerated could not be read.
    """
    if output is not None and (output / JSON_NAME).is_file() and not overwrite:
        raise InputError(f"{output}: holds a result; choose another folder, or pass --overwrite")
    listing = list_set(
        images,
        what="image",
        reading=reading,
        folders_are="identities",  # of which nothing is judged here: keep.csv tells each folder
        reporter=compute.reporter,
    )
    name = detector if listing.index is None else listing.index.detector
    loaded = load_detector(
        name, device=compute.device, input_size=DEFAULT_SIZE, precision=compute.precision
    )
    if listing.index is not None:
        listing.index.check(loaded.fingerprint)
    found = embed_set(listing, loaded, compute)
    unreadable = found.summary.unreadable
    check_unreadable(unreadable, reading.max_unreadable)
    duplicates = _Groups(found, loaded, compute).duplicates()
    left_out = {item.path for item in duplicates} | {item.path for item in unreadable}
    kept = [record for record in listing.records if record.path not in left_out]
    result = DuplicatesResult(
        source=listing.source,
        folder=str(listing.folder.absolute()),
        detector=loaded.name,
        fingerprint=loaded.fingerprint,
        num_images=len(listing.records),
        num_groups=max((item.group for item in duplicates), default=0),
        num_kept=len(kept),
        duplicates=tuple(duplicates),
        unreadable=unreadable,
    )
    if output is not None:
        _write(output, result, listing, kept)
    return result


def _write(
    output: Path, result: DuplicatesResult, listing: Listing, kept: Sequence[Record]
) -> None:
    """Write the three files, the JSON document last."""
    with folder_lock(output):
        (output / JSON_NAME).unlink(missing_ok=True)
        write_csv(output / CSV_NAME, COLUMNS, map(_cells, result.duplicates))
        manifest = Manifest(tuple(kept), listing.folder, Path(listing.source))
        write_manifest(manifest, output / KEEP_NAME)
        write_json(output / JSON_NAME, result.to_dict())


def _cells(item: Duplicate) -> list[str]:
    evidence = "" if item.evidence is None else f"{item.evidence:.2f}"
    return [str(item.group), item.path, item.kept, item.relation, evidence, item.edit]


@dataclasses.dataclass(frozen=True)
class _Known:
    """What is known of two images that show one picture, see ``Duplicate``."""

    relation: Relation
    evidence: float | None = None
    edit: str = ""


class _Groups:
    """Groups the contents of a set.

    Args:
        images: the set, as a detector sees it.
        detector: that one.
        compute: how it is done.
    """

    def __init__(self, images: ImageSet, detector: Detector, compute: Compute) -> None:
        self.images, self.detector, self.compute = images, detector, compute
        self.bank = features_of(images, np.arange(images.num_distinct), compute)
        self.names: list[list[str]] = [[] for _ in range(images.num_distinct)]
        for record, row in zip(images.records, images.rows.tolist(), strict=True):
            self.names[row].append(record.path)
        for names in self.names:
            names.sort()

    def duplicates(self) -> list[Duplicate]:
        """Return the images to leave out, group by group in order of the kept images' names."""
        known = {row: (kept, copy) for row, kept, copy in self._about_kept(self._components())}
        groups: dict[int, list[Duplicate]] = {}
        for row, names in enumerate(self.names):
            kept, copy = known.get(row, (row, _Known("identical file")))
            for name in names if row in known else names[1:]:
                item = Duplicate(group=0, path=name, kept=self.names[kept][0], **vars(copy))
                groups.setdefault(kept, []).append(item)
        order = sorted(groups, key=lambda row: self.names[row][0])
        return [
            dataclasses.replace(item, group=number)
            for number, row in enumerate(order, 1)
            for item in sorted(groups[row], key=lambda item: item.path)
        ]

    def _components(self) -> list[list[int]]:
        """Return contents that hang together by candidates which are copies."""
        count = self.images.num_distinct
        if count < 2:
            return []
        candidates = self._candidates()
        found = self._compared(np.arange(count), candidates)
        edges = np.argwhere([[pair is not None for pair in row] for row in found])
        ends = candidates[edges[:, 0], edges[:, 1]]
        labels = components(np.stack([edges[:, 0], ends], axis=1), count)
        members: dict[int, list[int]] = {}
        for row, label in enumerate(labels.tolist()):
            members.setdefault(label, []).append(row)
        return [rows for rows in members.values() if len(rows) > 1]

    def _candidates(self) -> NDArray[np.int64]:
        """Return ``[n, k]`` other contents that are most alike, by detector and by picture."""
        features, own = self.images.features, np.arange(self.images.num_distinct)
        k = min(NUM_CANDIDATES, len(own) - 1)
        found = search(self.detector, features, features, k + 1, self.compute.ranks).rows
        is_own = found == own[:, None]
        is_own[~is_own.any(axis=1), -1] = True  # many equal ones came first: the last gives way
        found = np.asarray(found[~is_own].reshape(len(own), k), dtype=np.int64)
        if self.detector.pictures(features[:1]) is None:
            return found
        alike = PictureSearch(self._pictures, len(own), own)
        near = alike.nearest(self._pictures(slice(None)), k, own)
        return np.asarray(merged(found, near, k), dtype=np.int64)

    def _pictures(self, rows: slice) -> NDArray[Any]:
        pictures = self.detector.pictures(self.images.features[rows])
        assert pictures is not None
        return pictures

    def _compared(
        self, rows: NDArray[np.int64], others: NDArray[np.int64]
    ) -> list[list[_Known | None]]:
        """Return what is known of contents ``[m]`` and each of some others ``[m, k]``."""
        k = others.shape[1]
        equal = same_pixels(self.images, np.repeat(rows, k), self.images, others.ravel())
        queries = FeatureBank(self.bank.rows, dict(enumerate(rows.tolist())))
        aligned = verify(queries, self.bank, others, self.compute)

        def known(place: int, rank: int) -> _Known | None:
            if equal[place * k + rank]:
                return _Known("same pixels")
            found = aligned.alignment(place, rank)
            if found is None or found.value < COPY_EVIDENCE:
                return None
            query, training = self.bank[rows[place]], self.bank[others[place, rank]]
            assert query is not None and training is not None  # they were aligned
            if not is_copy(found, query, training):
                return None
            return _Known("same picture, altered", found.value, describe(found).text("kept image"))

        return [[known(place, rank) for rank in range(k)] for place in range(len(rows))]

    def _about_kept(self, components: Iterable[list[int]]) -> Iterator[tuple[int, int, _Known]]:
        """Yield content, kept content and what is known of both.

        In each round every component keeps its largest picture, and what is verified against it
        joins its group. The others are a component of the next round.
        """
        waiting = [sorted(rows, key=self._largest_first) for rows in components]
        while waiting:
            pairs = np.array([(row, rows[0]) for rows in waiting for row in rows[1:]])
            found = self._compared(pairs[:, 0], pairs[:, 1:])
            left: dict[int, list[int]] = {}
            for (known,), (row, kept) in zip(found, pairs.tolist(), strict=True):
                if known is None:
                    left.setdefault(kept, []).append(row)
                else:
                    yield row, kept, known
            waiting = [rows for rows in left.values() if len(rows) > 1]

    def _largest_first(self, row: int) -> tuple[int, str]:
        image = self.images.first_image[row]
        width, height = load_once(self.images.files[image], self.images.hashes[row])[0].size
        return -width * height, self.names[row][0]
