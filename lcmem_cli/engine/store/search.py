"""Exact search with the signed weighted L1 head, in bounded memory.

The logit of a pair is ``b + Σ w_k |a_k - b_k|`` with weights of both signs (arXiv 2512.14421), so
comparing two sets of features needs no network. The kernels are compiled on first use; inputs of a
few rows are computed by numpy instead, which spares a short command the compiler's start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.errors import InputError, MissingExtraError

BLOCK_ROWS = 8192
_SMALL = 2_000_000
_TILE_ROWS = 64

FloatArray = NDArray[np.floating[Any]]
ScoreMatrix = Callable[[Any, Any], NDArray[Any]]


class TopK(NamedTuple):
    """Best matches of each query.

    Attributes:
        scores: ``[n, k]``, best first.
        rows: ``[n, k]`` int64, rows of the bank; equal scores are ordered by row.
    """

    scores: NDArray[Any]
    rows: NDArray[np.int64]


def weighted_l1_pairs(a: FloatArray, b: FloatArray, weight: FloatArray) -> NDArray[np.float32]:
    """Return ``Σ_k w_k |a_ik - b_ik|`` of row i with row i.

    Args:
        a: ``[n, d]``.
        b: ``[n, d]``.
        weight: ``[d]``, of both signs.

    Returns:
        ``[n]`` float32.

    Raises:
        InputError: shapes that do not fit.
    """
    a, b, weight = _rows(a), _rows(b), _rows(weight)
    if a.shape != b.shape or a.ndim != 2 or weight.shape != a.shape[1:]:
        raise InputError(f"features {a.shape}, {b.shape} and weight {weight.shape} do not fit")
    result = np.empty(len(a), dtype=np.float32)
    for start in range(0, len(a), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        result[part] = np.einsum(
            "nd,d->n", np.abs(a[part] - b[part]), weight, dtype=np.float64, casting="same_kind"
        )
    return result


def weighted_l1_matrix(a: FloatArray, b: FloatArray, weight: FloatArray) -> NDArray[np.float32]:
    """Return ``Σ_k w_k |a_ik - b_jk|`` of every row with every row.

    Args:
        a: ``[n, d]``.
        b: ``[m, d]``.
        weight: ``[d]``, of both signs.

    Returns:
        ``[n, m]`` float32.

    Raises:
        InputError: shapes that do not fit.
    """
    a, b, weight = _checked(a, b, weight)
    if len(a) * len(b) * a.shape[1] <= _SMALL:
        small: NDArray[np.float32] = np.einsum(
            "nmd,d->nm", np.abs(a[:, None] - b[None]), weight, dtype=np.float64
        ).astype(np.float32)
        return small
    result = np.empty((len(a), len(b)), dtype=np.float32)
    _kernels()[0](a, b, weight, result)
    return result


def weighted_l1_top_k(
    queries: FloatArray,
    bank: FloatArray,
    weight: FloatArray,
    k: int,
    *,
    block_rows: int = BLOCK_ROWS,
) -> TopK:
    """Return each query's ``k`` largest ``Σ_k w_k |q_k - b_k|`` over the bank, exactly.

    The bank is read block by block, so it may be a memory map larger than memory; beyond one block
    only ``n * k`` results are held.

    Args:
        queries: ``[n, d]``.
        bank: ``[m, d]``.
        weight: ``[d]``, of both signs.
        k: at least 1; cut to ``m``.
        block_rows: bank rows read at once; the result does not depend on it.

    Raises:
        InputError: shapes that do not fit, or ``k`` below 1.
    """
    _check_k(k)
    k = min(k, len(bank))
    if len(queries) * len(bank) * bank.shape[1] <= _SMALL:
        return top_k_blocked(functools.partial(weighted_l1_matrix, weight=weight), queries, bank, k)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    search = _kernels()[1]
    for start in range(0, len(bank), block_rows):
        q, block, w = _checked(queries, bank[start : start + block_rows], weight)
        search(q, block, w, start, scores, rows)
    return TopK(scores, rows)


def top_k_blocked(
    score_matrix: ScoreMatrix,
    queries: Any,
    bank: Any,
    k: int,
    *,
    block_rows: int = 1024,
) -> TopK:
    """Return each query's ``k`` best rows of a bank for any score, without the full matrix.

    Args:
        score_matrix: ``[n, d], [m, d] -> [n, m]``; larger is better.
        queries: ``[n, d]``.
        bank: ``[m, d]``, perhaps a memory map.
        k: at least 1; cut to ``m``.
        block_rows: rows of either side scored at once; the result does not depend on it.

    Raises:
        InputError: ``k`` below 1.
    """
    _check_k(k)
    k = min(k, len(bank))
    parts = []
    for first in range(0, len(queries), block_rows):
        block = queries[first : first + block_rows]
        best = TopK(np.zeros((len(block), 0)), np.zeros((len(block), 0), dtype=np.int64))
        for start in range(0, len(bank), block_rows):
            found = score_matrix(block, bank[start : start + block_rows])
            numbers = np.arange(start, start + found.shape[1], dtype=np.int64)
            best = _best(
                np.concatenate([best.scores, found], axis=1),
                np.concatenate(
                    [best.rows, np.broadcast_to(numbers, found.shape)], axis=1, dtype=np.int64
                ),
                k,
            )
        parts.append(best)
    if not parts:
        return TopK(np.zeros((0, k)), np.zeros((0, k), dtype=np.int64))
    return TopK(
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.rows for part in parts]),
    )


def merge_top_k(parts: Sequence[TopK], offsets: Sequence[int], k: int) -> TopK:
    """Merge the results of searching the shards of a bank into those of the whole bank.

    Args:
        parts: one result a shard, for the same queries.
        offsets: row of the whole bank at which each shard begins, increasing.
        k: matches to keep.
    """
    return _best(
        np.concatenate([part.scores for part in parts], axis=1),
        np.concatenate(
            [part.rows + offset for part, offset in zip(parts, offsets, strict=True)], axis=1
        ),
        k,
    )


def approximate_top_k(
    queries: FloatArray,
    bank: FloatArray,
    weight: FloatArray,
    k: int,
    *,
    candidates: int = 200,
    num_lists: int | None = None,
    probes: int = 16,
    recall_sample: int = 100,
) -> tuple[TopK, float]:
    """Search with a faiss inverted file first, and score its candidates exactly.

    faiss knows only the unsigned L1 distance, so the candidates come from features multiplied by
    ``|w|`` and the signs enter when these are scored again.

    Args:
        queries: ``[n, d]``.
        bank: ``[m, d]``.
        weight: ``[d]``, of both signs.
        k: matches to keep.
        candidates: rows per query that are scored exactly.
        num_lists: cells of the inverted file; by default about ``4 sqrt(m)``, fewer for few rows.
        probes: cells searched.
        recall_sample: queries that are also searched exactly.

    Returns:
        The matches, and the share of the exact best matches found on the sample.

    Raises:
        MissingExtraError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("approximate search", "search") from error
    _check_k(k)
    queries, bank, weight = _checked(queries, bank, weight)
    scale = np.abs(weight)
    num_lists = num_lists or max(1, min(int(4 * len(bank) ** 0.5), len(bank) // 40))
    quantiser = faiss.IndexFlat(bank.shape[1], faiss.METRIC_L1)
    index = faiss.IndexIVFFlat(quantiser, bank.shape[1], num_lists, faiss.METRIC_L1)
    index.train(bank * scale)
    index.add(bank * scale)
    index.nprobe = probes
    _, found = index.search(queries * scale, min(max(candidates, k), len(bank)))
    k = min(k, len(bank))
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    for number, near in enumerate(found):
        near = np.sort(near[near >= 0])
        exact = weighted_l1_matrix(queries[number : number + 1], bank[near], weight)
        best = _best(exact, near[None].astype(np.int64), k)
        scores[number, : best.scores.shape[1]] = best.scores[0]
        rows[number, : best.rows.shape[1]] = best.rows[0]
    sample = np.linspace(0, len(queries) - 1, min(recall_sample, len(queries))).astype(np.int64)
    truth = weighted_l1_top_k(queries[sample], bank, weight, 1)
    recall = float((truth.rows[:, 0] == rows[sample, 0]).mean()) if len(sample) else 1.0
    return TopK(scores, rows), recall


def _best(scores: NDArray[Any], rows: NDArray[np.int64], k: int) -> TopK:
    """Return the ``k`` best columns of each row; equal scores by bank row."""
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return TopK(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))


def _check_k(k: int) -> None:
    if k < 1:
        raise InputError(f"the number of matches must be at least 1, not {k}")


def _rows(values: Any) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, dtype=np.float32)


def _checked(
    a: Any, b: Any, weight: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    a, b, weight = _rows(a), _rows(b), _rows(weight)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or weight.shape != a.shape[1:]:
        raise InputError(f"features {a.shape}, {b.shape} and weight {weight.shape} do not fit")
    return a, b, weight


@functools.cache
def _kernels() -> tuple[Callable[..., None], Callable[..., None]]:
    """Compile the kernels (kept on disk where that is possible)."""
    import numba

    def compiled(function: Callable[..., Any], **options: Any) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no writable place for compiled code
            return numba.njit(**options)(function)

    distance = compiled(_distance, fastmath={"reassoc", "contract"}, inline="never")

    def matrix(a: Any, b: Any, weight: Any, out: Any) -> None:
        for tile in range(0, b.shape[0], _TILE_ROWS):
            stop = min(tile + _TILE_ROWS, b.shape[0])
            for i in numba.prange(a.shape[0]):
                for j in range(tile, stop):
                    out[i, j] = distance(a[i], b[j], weight)

    def search(q: Any, block: Any, weight: Any, start: int, scores: Any, rows: Any) -> None:
        k = scores.shape[1]
        for tile in range(0, block.shape[0], _TILE_ROWS):
            stop = min(tile + _TILE_ROWS, block.shape[0])
            for i in numba.prange(q.shape[0]):
                for j in range(tile, stop):
                    value = distance(q[i], block[j], weight)
                    if value > scores[i, k - 1]:  # later rows lose ties
                        place = k - 1
                        while place > 0 and value > scores[i, place - 1]:
                            scores[i, place] = scores[i, place - 1]
                            rows[i, place] = rows[i, place - 1]
                            place -= 1
                        scores[i, place] = value
                        rows[i, place] = start + j

    return (compiled(matrix, parallel=True), compiled(search, parallel=True))


def _distance(a: Any, b: Any, weight: Any) -> Any:
    total = np.float32(0)
    for index in range(a.shape[0]):
        total += weight[index] * abs(a[index] - b[index])
    return total
