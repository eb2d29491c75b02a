"""Best matches of images among the training images, the same for any number of processes."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.base import Detector, FloatArray
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.evaluation.audit.sets import Embedded
from lcmem_cli.engine.store.search import TopK, merge_top_k
from lcmem_cli.engine.verification.evidence import SAME_PICTURE, Evidence
from lcmem_cli.engine.verification.verify import Verification

_PAIR_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """Best matches of every distinct generated content.

    Attributes:
        rows: ``[d, k]`` rows of the training set; an identical image comes first.
        scores: ``[d, k]``, fused with the evidence where candidates were verified.
        best: ``[d]`` highest score.
        exact: ``[d]`` whether the first match is an identical image.
        recall: of the search, see ``TopK``.
        values: ``[d, k]`` evidence of each match, see ``verification.verify``; -inf where there is
            none.
        places: ``[d, k]`` number of each match among the candidates as the search found them.
        verification: of these candidates, if they were verified.
        searched: the matches before that, by the detector's scores alone.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]
    best: NDArray[np.float64]
    exact: NDArray[np.bool_]
    recall: float
    values: NDArray[np.float64]
    places: NDArray[np.int64]
    verification: Verification | None = None
    searched: Found | None = None

    @property
    def identical(self) -> NDArray[np.bool_]:
        """``[d, k]`` which matches are identical images."""
        identical = np.zeros(self.rows.shape, dtype=np.bool_)
        identical[:, 0] = self.exact
        return identical

    def over(self, threshold: float | None) -> NDArray[np.bool_]:
        """``[d, k]`` which matches score more than a threshold; none where there is none."""
        if threshold is None:
            return np.zeros(self.scores.shape, dtype=np.bool_)
        return self.scores > threshold

    def reordered(self, order: NDArray[np.int64]) -> Found:
        """Return the matches of each content in another order ``[d, k]``."""
        return dataclasses.replace(
            self,
            rows=np.take_along_axis(self.rows, order, 1),
            scores=np.take_along_axis(self.scores, order, 1),
            values=np.take_along_axis(self.values, order, 1),
            places=np.take_along_axis(self.places, order, 1),
        )

    def evident_first(self, threshold: float | None) -> Found:
        """Put flagged matches that show the same picture before others that are flagged."""
        evident = (self.values >= SAME_PICTURE) & self.over(threshold)
        return self.reordered(np.argsort(2 - evident - 2 * self.identical, axis=1, kind="stable"))

    def evidence(self, row: int, rank: int) -> Evidence | None:
        """Return what alignment found for one match, if it was verified."""
        place = int(self.places[row, rank])
        if self.verification is None or place >= self.verification.values.shape[1]:
            return None
        return self.verification.evidence(row, place)


def search(detector: Detector, queries: FloatArray, bank: FloatArray, k: int, ranks: Ranks) -> TopK:
    """Find the ``k`` best rows of the bank; every process searches its part of it.

    The matches found are scored once more pair by pair. Matrix products round differently with the
    number of rows; so the result is the same to the last bit for any number of processes.
    """
    k = min(k, len(bank))
    if not len(queries):
        return TopK(np.zeros((0, k)), np.zeros((0, k), dtype=np.int64))
    bounds = [len(bank) * part // ranks.size for part in range(ranks.size + 1)]
    low, high = bounds[ranks.rank], bounds[ranks.rank + 1]
    found = detector.top_k(queries, bank[low:high], k) if high > low else None
    # A process whose part is empty has nothing to merge: there are more processes than rows.
    parts = {
        offset: part for offset, part in zip(bounds, ranks.gather(found), strict=False) if part
    }
    merged = merge_top_k(list(parts.values()), list(parts), k)
    rows = merged.rows
    scores = np.empty(rows.shape)
    block = max(1, _PAIR_BYTES // (k * queries[:1].nbytes))
    for start in range(0, len(rows), block):
        part_rows = rows[start : start + block]
        left = np.repeat(queries[start : start + block], k, axis=0)
        pairs = detector.score_features(left, bank[part_rows.ravel()])
        scores[start : start + block] = pairs.reshape(-1, k)
    order = np.lexsort((rows, -scores), axis=1)
    in_order = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    return TopK(*in_order, merged.recall)


def search_training(
    embedded: Embedded, queries: FloatArray, bank: NDArray[np.int64], k: int
) -> TopK:
    """Search rows of the training set; the rows found are numbered as the training set's.

    Args:
        embedded: the sets.
        queries: ``[n, d]`` features.
        bank: ``[b]`` rows to search, ascending.
        k: matches of each query.
    """
    features = embedded.sets.training.features_of(bank)
    found = search(embedded.detector, queries, features, k, embedded.compute.ranks)
    return TopK(found.scores, bank[found.rows], found.recall)


def best_matches(embedded: Embedded, bank: NDArray[np.int64], k: int) -> Found:
    """Search every distinct generated content; an identical training image is put first.

    It is looked for by its content in the whole training set, also where the bank does not hold
    it, and takes the last place's room where it is not among the matches.

    Args:
        embedded: the sets.
        bank: ``[b]`` rows of the training set to search.
        k: matches of each.
    """
    generated, training = embedded.sets.generated, embedded.sets.training
    top = search_training(embedded, generated.features, bank, k)
    rows, scores = top.rows.copy(), top.scores.copy()
    exact = np.zeros(len(rows), dtype=np.bool_)
    for query, digest in enumerate(generated.hashes):
        row = training.row_of.get(digest)
        if row is None:
            continue
        exact[query] = True
        place = np.flatnonzero(rows[query] == row)
        last = int(place[0]) if len(place) else rows.shape[1] - 1
        score = embedded.detector.score_features(
            generated.features[query : query + 1], training.features[row : row + 1]
        )
        rows[query] = np.concatenate([[row], np.delete(rows[query], last)])
        scores[query] = np.concatenate([score, np.delete(scores[query], last)])
    return Found(
        rows=rows,
        scores=scores,
        best=top.scores[:, 0],
        exact=exact,
        recall=top.recall,
        values=np.full(rows.shape, -np.inf),
        places=np.tile(np.arange(rows.shape[1]), (len(rows), 1)),
    )
