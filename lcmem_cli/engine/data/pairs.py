"""Lists of labelled image pairs (method.md sections 5 and 6, arXiv 2512.14421).

Pairs hold rows of the record list that they were made from. A negative pair is always taken within
one data set: across data sets it would be trivially easy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.errors import InputError

UNNAMED_DATASET = "test"
MAX_PAIRS = 50_000_000
MAX_LISTED_PAIRS = 5_000_000
MAX_NEGATIVES = 20_000
_MAX_ENUMERATED = 3_000
"""Images of a data set up to which all of its pairs are listed and negatives chosen among them."""
_MAX_POSITIVES = 2_000_000
"""Of a larger data set; beyond that they are those of a draw of each identity's images."""
_INTEGER = re.compile(r"\s*[+-]?\d+\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_INTEGER_RANGES = ((-(2**63), 2**63), (0, 2**64))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSet:
    """Labelled pairs of images.

    Attributes:
        first: ``[n]`` record row of each pair's first image.
        second: ``[n]`` record row of the second image.
        labels: ``[n]`` 1 where both show one identity, else 0.
        dataset: ``[n]`` number of each pair's data set, into ``names``.
        names: data sets in order of first appearance among the records.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    labels: NDArray[np.int64]
    dataset: NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.first)

    def shifted(self, by: int) -> PairSet:
        """Return the same pairs of records that stand ``by`` rows further on."""
        return dataclasses.replace(self, first=self.first + by, second=self.second + by)

    @property
    def num_positives(self) -> int:
        """Number of pairs of one identity."""
        return int(self.labels.sum())

    @property
    def num_negatives(self) -> int:
        """Number of pairs of two identities."""
        return len(self) - self.num_positives

    def num_distinct(self, label: int) -> int:
        """Return the number of different unordered pairs with this label."""
        return len(np.unique(self._unordered()[self.labels == label]))

    @property
    def num_duplicates(self) -> int:
        """Number of pairs that repeat an earlier one, the order within a pair left aside.

        An identity with two images gives its positive pair twice.
        """
        return len(self) - len(np.unique(self._unordered()))

    @property
    def digest(self) -> str:
        """SHA-256 of the pairs in their order."""
        digest = hashlib.sha256(repr(self.names).encode("utf-8", "surrogateescape"))
        for column in (self.first, self.second, self.labels, self.dataset):
            digest.update(column.tobytes())
        return digest.hexdigest()

    def select(self, keep: NDArray[np.bool_]) -> PairSet:
        """Return the pairs where ``keep`` ``[n]`` is true."""
        return dataclasses.replace(
            self,
            first=self.first[keep],
            second=self.second[keep],
            labels=self.labels[keep],
            dataset=self.dataset[keep],
        )

    def _unordered(self) -> NDArray[np.int64]:
        low, high = np.minimum(self.first, self.second), np.maximum(self.first, self.second)
        return low * (int(high.max(initial=0)) + 1) + high


def reference_pairs(
    records: Sequence[Record],
    seed: int = 42,
    *,
    column: Iterable[str] | None = None,
    negatives_per_anchor: int = 1,
) -> PairSet:
    """Return the pairs of the published benchmark, bit for bit.

    For each data set in order of first appearance, each identity in sorted order, and each of its
    images in file order if it has at least two: the pair with the identity's next image (the last
    with the first), then the pair with the first image of an identity drawn at random. One source
    of randomness serves all data sets.

    Args:
        records: images of one split, in file order.
        seed: of Python's ``random.Random``.
        column: ids of the whole filelist. The reference reads the filelist with pandas, which
            turns the ids into numbers if ALL of them are numbers, and then sorts them as numbers;
            by default the ids of ``records`` decide.
        negatives_per_anchor: draws of a negative per image; the published benchmark makes one.

    Raises:
        InputError: a data set with a single identity, for which no negative exists.
    """
    rng = random.Random(seed)
    rows: list[tuple[int, int, int, int]] = []
    groups = _group(records, column)
    _refuse_single(groups)
    for number, identities in enumerate(groups.values()):
        last = len(identities) - 1
        for own, images in enumerate(identities):
            if len(images) < 2:
                continue
            for position, image in enumerate(images):
                rows.append((image, images[(position + 1) % len(images)], 1, number))
                for _ in range(negatives_per_anchor):
                    other = rng.randint(0, last)
                    while other == own:
                        other = rng.randint(0, last)
                    rows.append((image, identities[other][0], 0, number))
    return _pair_set(rows, groups)


def all_pairs(records: Sequence[Record], *, max_pairs: int = MAX_PAIRS) -> PairSet:
    """Return every unordered pair within each data set.

    Args:
        records: images of one split.
        max_pairs: 32 bytes of memory each, and as much again for every detector's scores.

    Raises:
        InputError: there would be more pairs than ``max_pairs``.
    """
    groups = _rows_by_dataset(records)
    total = sum(len(rows) * (len(rows) - 1) // 2 for rows in groups.values())
    if total > max_pairs:
        raise InputError(
            f"{len(records):,} images make {total:,} pairs, more than the limit of {max_pairs:,}; "
            "use the reference's pairs, or fewer data sets at a time"
        )
    numbers, _ = identity_numbers(records)
    first, second, dataset = (np.empty(total, dtype=np.int64) for _ in range(3))
    start = 0
    for number, rows in enumerate(groups.values()):
        members = np.asarray(rows, dtype=np.int64)
        for position in range(len(members) - 1):
            stop = start + len(members) - position - 1
            first[start:stop] = members[position]
            second[start:stop] = members[position + 1 :]
            dataset[start:stop] = number
            start = stop
    return PairSet(
        first=first,
        second=second,
        labels=(numbers[first] == numbers[second]).astype(np.int64),
        dataset=dataset,
        names=tuple(groups),
    )


def pairs_within(records: Sequence[Record], max_negatives: int = MAX_NEGATIVES) -> PairSet:
    """Return every positive pair, and of the negatives a draw that is always the same.

    Args:
        records: images of one split.
        max_negatives: of each data set.
    """
    groups = _rows_by_dataset(records)
    identity, _ = identity_numbers(records)
    rng = np.random.default_rng(0)  # one for all data sets, so their order matters
    columns: list[tuple[NDArray[np.int64], ...]] = []
    for number, rows in enumerate(groups.values()):
        members = np.asarray(rows, dtype=np.int64)
        draw = _listed_pairs if len(members) <= _MAX_ENUMERATED else _drawn_pairs
        a, b, same = draw(identity[members], max_negatives, rng)
        columns.append((members[a], members[b], same, np.full(len(a), number, dtype=np.int64)))
    first, second, labels, dataset = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    return PairSet(first=first, second=second, labels=labels, dataset=dataset, names=tuple(groups))


def identity_pairs(
    records: Sequence[Record],
    seed: int = 42,
    *,
    column: Iterable[str] | None = None,
    negatives: bool = True,
    max_pairs: int = MAX_LISTED_PAIRS,
) -> PairSet:
    """Return all pairs within identities, each followed by a negative with the same first image.

    Args:
        records: images of one split, in file order.
        seed: of the negatives, drawn among all images of other identities.
        column: as in ``reference_pairs``.
        negatives: whether to draw negatives.
        max_pairs: about 150 bytes of memory each while they are listed.

    Raises:
        InputError: a data set with a single identity, if negatives are drawn, or there would be
            more pairs than ``max_pairs``.
    """
    sizes = Counter((dataset_name(record), record.id) for record in records).values()
    total = sum(size * (size - 1) // 2 for size in sizes) * (2 if negatives else 1)
    if total > max_pairs:
        raise InputError(
            f"the identities of {len(records):,} images make {total:,} pairs, more than the limit "
            f"of {max_pairs:,}; take fewer images of each, or fewer data sets at a time"
        )

    def positives(identity: Sequence[int]) -> Iterator[tuple[int, int]]:
        return itertools.combinations(identity, 2)

    return _with_negatives(records, seed, column, positives, negatives)


def same_image_pairs(
    records: Sequence[Record],
    seed: int = 42,
    *,
    column: Iterable[str] | None = None,
    negatives: bool = True,
) -> PairSet:
    """Return each image with itself, each pair followed by a negative with the same first image.

    Meant for altering the second image: does the altered copy still match?

    Args:
        records: images of one split, in file order.
        seed: of the negatives, drawn among all images of other identities.
        column: as in ``reference_pairs``.
        negatives: whether to draw negatives.

    Raises:
        InputError: a data set with a single identity, if negatives are drawn.
    """

    def positives(identity: Sequence[int]) -> Iterator[tuple[int, int]]:
        return ((image, image) for image in identity)

    return _with_negatives(records, seed, column, positives, negatives)


def single_identity_datasets(records: Sequence[Record]) -> list[str]:
    """Return the data sets that hold one identity only, so that they have no negative pair."""
    groups = _group(records, None)
    return [name for name, identities in groups.items() if len(identities) == 1]


def identity_numbers(
    records: Sequence[Record],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the identities, keyed by data set and id.

    Returns:
        The identity of each record ``[records]`` and the data set of each identity
        ``[identities]``, both from 0 in order of first appearance.
    """
    numbers: dict[tuple[str, str], int] = {}
    datasets: dict[str, int] = {}
    rows = [numbers.setdefault((dataset_name(r), r.id), len(numbers)) for r in records]
    strata = [datasets.setdefault(name, len(datasets)) for name, _ in numbers]
    return np.asarray(rows, dtype=np.int64), np.asarray(strata, dtype=np.int64)


def dataset_name(record: Record) -> str:
    """Return a record's data set; without one it belongs to the set ``test``."""
    return UNNAMED_DATASET if record.ds_name is None else record.ds_name


def _with_negatives(
    records: Sequence[Record],
    seed: int,
    column: Iterable[str] | None,
    positives: Callable[[Sequence[int]], Iterator[tuple[int, int]]],
    negatives: bool,
) -> PairSet:
    rng = random.Random(seed)
    groups = _group(records, column)
    if negatives:
        _refuse_single(groups)
    rows: list[tuple[int, int, int, int]] = []
    for number, identities in enumerate(groups.values()):
        images = [image for identity in identities for image in identity]
        start = 0
        for identity in identities:
            for first, second in positives(identity):
                rows.append((first, second, 1, number))
                if negatives:
                    drawn = rng.randrange(len(images) - len(identity))
                    other = images[drawn if drawn < start else drawn + len(identity)]
                    rows.append((first, other, 0, number))
            start += len(identity)
    return _pair_set(rows, groups)


Drawn = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""First and second rows of pairs, and their labels."""


def _listed_pairs(
    identity: NDArray[np.int64], max_negatives: int, rng: np.random.Generator
) -> Drawn:
    """Choose among a list of all pairs."""
    a, b = np.triu_indices(len(identity), 1)
    same = identity[a] == identity[b]
    negatives = np.flatnonzero(~same)
    if len(negatives) > max_negatives:
        negatives = np.sort(rng.choice(negatives, max_negatives, replace=False))
    chosen = np.concatenate([np.flatnonzero(same), negatives])
    return a[chosen], b[chosen], same[chosen].astype(np.int64)


def _drawn_pairs(
    identity: NDArray[np.int64], max_negatives: int, rng: np.random.Generator
) -> Drawn:
    """Draw pairs without a list of all of them, which would not fit into memory."""
    order = np.argsort(identity, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(identity[order])) + 1)
    same = sum(len(group) * (len(group) - 1) // 2 for group in groups)
    possible = len(identity) * (len(identity) - 1) // 2 - same
    if same > _MAX_POSITIVES:  # of each identity as large a part of its images
        part = math.sqrt(_MAX_POSITIVES / same)
        groups = [rng.permutation(group)[: max(2, int(part * len(group)))] for group in groups]
    positives = [
        np.stack([group[i] for i in np.triu_indices(len(group), 1)], axis=1) for group in groups
    ]
    negatives: NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)
    # Repetitions fall away, so draws go on until there are enough, or all that are possible.
    while len(negatives) < min(possible, max_negatives):
        drawn = np.sort(rng.integers(len(identity), size=(max_negatives, 2)), axis=1)
        drawn = drawn[identity[drawn[:, 0]] != identity[drawn[:, 1]]]
        negatives = np.unique(np.concatenate([negatives, drawn]), axis=0)
    if len(negatives) > max_negatives:
        kept = rng.choice(len(negatives), max_negatives, replace=False)
        negatives = negatives[np.sort(kept)]
    pairs = np.concatenate([*positives, negatives])
    labels = (np.arange(len(pairs)) < len(pairs) - len(negatives)).astype(np.int64)
    return pairs[:, 0], pairs[:, 1], labels


def _pair_set(rows: list[tuple[int, int, int, int]], groups: dict[str, Any]) -> PairSet:
    columns = np.asarray(rows, dtype=np.int64).reshape(-1, 4).T
    first, second, labels, dataset = (np.ascontiguousarray(column) for column in columns)
    return PairSet(first=first, second=second, labels=labels, dataset=dataset, names=tuple(groups))


def _rows_by_dataset(records: Sequence[Record]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        groups.setdefault(dataset_name(record), []).append(row)
    return groups


def _group(records: Sequence[Record], column: Iterable[str] | None) -> dict[str, list[list[int]]]:
    """Return the rows of each identity, identities sorted, by data set."""
    key = _sort_key([record.id for record in records] if column is None else column)
    result: dict[str, list[list[int]]] = {}
    for name, rows in _rows_by_dataset(records).items():
        identities: dict[str, list[int]] = {}
        for row in rows:
            identities.setdefault(records[row].id, []).append(row)
        result[name] = [identities[identity] for identity in sorted(identities, key=key)]
    return result


def _sort_key(column: Iterable[str]) -> Callable[[str], Any]:
    """Return how pandas orders the ids of a column that it has read from CSV.

    Ids that are different texts of one number (``7`` and ``07``) stay two identities here.
    """
    ids = set(column)
    if ids and all(_INTEGER.fullmatch(text) for text in ids):
        values = [int(text) for text in ids]
        low, high = min(values), max(values)
        if any(start <= low and high < stop for start, stop in _INTEGER_RANGES):
            return lambda text: (int(text), text)
    elif ids and all(_NUMBER.fullmatch(text) for text in ids):
        return lambda text: (float(text), text)
    return lambda text: text


def _refuse_single(groups: dict[str, list[list[int]]]) -> None:
    single = [name for name, identities in groups.items() if len(identities) == 1]
    if single:
        names = ", ".join(repr(name) for name in single)
        raise InputError(
            f"data set(s) with a single identity: {names}; a negative pair needs two identities "
            "of one data set: leave the set out (--ds-name names the sets to use) or add "
            "identities to it"
        )
