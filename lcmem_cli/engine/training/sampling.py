"""Which pairs each epoch sees: a pure function of (seed, epoch), so that resuming needs no state.

Method: arXiv 2512.14421: one item an identity, two of its images drawn with replacement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.config import SamplingSection
from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.errors import InputError, ManifestError

MIN_IDENTITIES = 3
_VALIDATION_EPOCH = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Pairs of one optimiser step.

    Attributes:
        first: rows of the first images, ``[B]``.
        second: rows of the second images, ``[B]``; the same identity row by row.
        seeds: one seed a pair, for the augmentation of the second image, ``[B]``.
        step_seed: seed of everything else that is random in this step.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    seeds: NDArray[np.int64]
    step_seed: int

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.first)


class PairSampler:
    """Draws batches in which all identities differ.

    Args:
        records: images that may be drawn; rows refer to this sequence.
        sampling: see ``SamplingSection``.
        batch_size: pairs a batch; the last batch of an epoch may be smaller, but never has fewer
            than three.
        seed: of all draws.

    Raises:
        ManifestError: fewer than three identities.
    """

    def __init__(
        self,
        records: Sequence[Record],
        sampling: SamplingSection,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        groups: dict[tuple[str, str], list[int]] = {}
        for row, record in enumerate(records):
            identity = f"{row}" if sampling.unsupervised else record.id
            groups.setdefault((record.ds_name or "", identity), []).append(row)
        if len(groups) < MIN_IDENTITIES:
            raise ManifestError(
                f"training needs at least {MIN_IDENTITIES} identities, there are {len(groups)}; "
                "check the id column, or set sampling.unsupervised = true to make every image "
                "its own identity"
            )
        self.images = [np.asarray(rows, dtype=np.int64) for rows in groups.values()]
        names = [ds_name for ds_name, _ in groups]
        self.datasets = [
            np.flatnonzero(np.asarray([n == name for n in names])) for name in dict.fromkeys(names)
        ]
        self.sampling = sampling
        self.batch_size = batch_size
        self.seed = seed

    @property
    def num_identities(self) -> int:
        """How many identities there are."""
        return len(self.images)

    def epoch(self, epoch: int) -> list[PairBatch]:
        """Return the batches of an epoch; a function of the seed and ``epoch`` only."""
        rng = np.random.default_rng([self.seed, epoch])
        batches: list[PairBatch] = []
        for _ in range(self.sampling.passes_per_epoch):
            order = self._order(rng)
            if self.sampling.mini_epoch_size:
                order = order[: self.sampling.mini_epoch_size]
            batches += self._batches(order, rng)
        return batches

    def validation(self) -> list[PairBatch]:
        """Return the validation batches: drawn once, a quarter of ``mini_epoch_size`` if set."""
        rng = np.random.default_rng([self.seed, 2**32 + _VALIDATION_EPOCH])
        order = self._order(rng)
        if self.sampling.mini_epoch_size:
            order = order[: max(MIN_IDENTITIES, self.sampling.mini_epoch_size // 4)]
        return self._batches(order, rng)

    def _order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return all identities in the order in which batches are cut from them."""
        per_batch = self.sampling.datasets_per_batch
        if not per_batch:
            return rng.permutation(len(self.images))
        chunk = max(2, -(-self.batch_size // per_batch))
        chunks: list[NDArray[np.int64]] = []
        for members in self.datasets:
            shuffled = rng.permutation(members)
            chunks.extend(shuffled[i : i + chunk] for i in range(0, len(shuffled), chunk))
        return np.concatenate([chunks[i] for i in rng.permutation(len(chunks))])

    def _batches(self, order: NDArray[np.int64], rng: np.random.Generator) -> list[PairBatch]:
        batches = []
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            if len(part) < MIN_IDENTITIES:
                continue  # its negative half would hold a true pair
            first = np.asarray([rng.choice(self.images[i]) for i in part], dtype=np.int64)
            second = np.asarray([rng.choice(self.images[i]) for i in part], dtype=np.int64)
            same = rng.random(len(part)) < self.sampling.same_image_probability
            second = np.where(same, first, second)
            seeds = rng.integers(0, 2**63 - 1, len(part), dtype=np.int64)
            batches.append(
                PairBatch(
                    first=first,
                    second=second,
                    seeds=seeds,
                    step_seed=int(rng.integers(0, 2**63 - 1)),
                )
            )
        return batches


def check_batches(train: Sequence[PairBatch], validation: Sequence[PairBatch]) -> None:
    """Raise ``InputError`` where there is nothing to train or to validate on."""
    if not train or not validation:
        raise InputError(
            f"no batch of at least {MIN_IDENTITIES} identities can be made from TRAIN or VAL; "
            "raise schedule.batch_size or sampling.mini_epoch_size, or list more identities"
        )
