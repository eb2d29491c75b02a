"""Exact search with the signed weighted L1 head, in bounded memory.

The logit of a pair is ``b + Σ w_k |a_k - b_k|`` with weights of both signs (arXiv 2512.14421), so
comparing two sets of features needs no network. Inputs of a few rows are computed by numpy, which
spares a short command the compiler's start; the compiled kernels give the same bits.

Search of many queries first compares features rounded to 8 bits. How far such a comparison can be
off is known for every row, so it only leaves out pairs that cannot be among the best, and the
result is that of comparing all pairs exactly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.distributed import available_cpus
from lcmem_cli.engine.errors import InputError, MissingExtraError
from lcmem_cli.engine.store.lanes import LANES, PASS, lane_sums

BLOCK_ROWS = 8192
SMALL = 2_000_000
_SCREEN_QUERIES = 16
_GRID_STEPS = 255
_MAX_GRID_WEIGHT = 16384
_ALONE_NUMBERS = 8192
"""Numbers of a bank whose product with one query BLAS leaves to one thread."""
_ALONE_QUERIES = 8
_CANDIDATES = 200
"""Rows per query that the approximate search scores exactly."""
_PROBES = 16
"""Cells of an inverted file that are searched."""
_TRAINING_ROWS, _TRAINING_ROUNDS = 16, 3
"""Rows of the bank for each cell, and rounds over them, that place the cells. Four times the rows
and eight times the rounds found no more of 500 best matches among 30,000."""
_SHARD_ROWS = 1 << 18
"""Rows of an inverted file. Of a larger bank one after the other is made, so memory is bounded."""
_RECALL_SAMPLE = 100
"""Queries of the approximate search that are searched exactly as well, to measure its recall."""

FloatArray = NDArray[np.floating[Any]]
ScoreMatrix = Callable[[Any, Any], NDArray[Any]]
Search = Callable[..., "TopK"]
"""Called as ``search(queries, bank, k=k)``."""


class TopK(NamedTuple):
    """Best matches of each query.

    Attributes:
        scores: ``[n, k]``, best first.
        rows: ``[n, k]`` int64, rows of the bank; equal scores are ordered by row.
        recall: share of the exact best matches that were found on a sample of the queries; 1 where
            the search is exact.
    """

    scores: NDArray[Any]
    rows: NDArray[np.int64]
    recall: float = 1.0


def weighted_l1_pairs(a: FloatArray, b: FloatArray, weight: FloatArray) -> NDArray[np.float32]:
    """Return ``Σ_k w_k |a_ik - b_ik|`` of row i with row i.

    Args:
        a: ``[n, d]``.
        b: ``[n, d]``.
        weight: ``[d]``, of both signs.

    Returns:
        ``[n]`` float32; the same bits as the matrix and the search.

    Raises:
        InputError: shapes that do not fit, or values that are not finite.
    """
    a, b, weight = _checked(a, b, weight)
    if len(a) != len(b):
        raise InputError(f"pairs need as many rows on both sides, not {len(a)} and {len(b)}")
    if a.size <= SMALL:
        return lane_sums(weight * np.abs(a - b))
    from lcmem_cli.engine.store import kernels

    a, b, weight = (_in_passes(values) for values in (a, b, weight))
    result = np.empty(len(a), dtype=np.float32)
    in_threads(lambda start, stop: kernels.pairs(a, b, weight, start, stop, result), len(a))
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
        InputError: shapes that do not fit, or values that are not finite.
    """
    a, b, weight = _checked(a, b, weight)
    if len(a) * b.size <= SMALL:
        return lane_sums(weight * np.abs(a[:, None] - b[None]))
    from lcmem_cli.engine.store import kernels

    a, b, weight = (_in_passes(values) for values in (a, b, weight))
    result = np.empty((len(a), len(b)), dtype=np.float32)
    in_threads(lambda start, stop: kernels.matrix(a, b, weight, start, stop, result), len(a))
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
    only ``n * k`` results are held. The scores are those of ``weighted_l1_matrix`` bit for bit.

    Args:
        queries: ``[n, d]``.
        bank: ``[m, d]``.
        weight: ``[d]``, of both signs.
        k: at least 1; cut to ``m``.
        block_rows: bank rows read at once; the result does not depend on it.

    Raises:
        InputError: shapes that do not fit, values that are not finite, or ``k`` below 1.
    """
    check_k(k)
    _check_shapes(queries, bank, weight)
    if len(queries) * bank.size <= SMALL:
        return top_k_blocked(partial(weighted_l1_matrix, weight=weight), queries, bank, k)
    k = min(k, len(bank))
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    queries, _, weight = _checked(queries, bank[:0], weight)
    for first in range(0, len(bank), block_rows):
        _, block, _ = _checked(queries[:0], bank[first : first + block_rows], weight)
        _search_block(queries, block, weight, first, scores, rows)
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
    check_k(k)
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


def inner_products(queries: FloatArray, bank: FloatArray) -> FloatArray:
    """Return the products ``[n, m]`` of every query with every row of a bank.

    BLAS divides even one query's product among threads and waits for the slowest, on busy cores
    ten times as long as it computes. So a few queries are multiplied with a few rows at a time.

    Args:
        queries: ``[n, d]``.
        bank: ``[m, d]``, of the same type.
    """
    if len(queries) > _ALONE_QUERIES:
        return queries @ bank.T
    rows = max(1, _ALONE_NUMBERS // bank.shape[1])
    whole = len(bank) - len(bank) % rows
    parts = np.asarray(bank[:whole]).reshape(-1, rows, bank.shape[1])
    result = np.empty((len(queries), len(bank)), dtype=np.result_type(queries, bank))
    for query, products in zip(queries, result, strict=True):
        products[:whole] = (parts @ query).ravel()
        products[whole:] = bank[whole:] @ query
    return result


def merge_top_k(parts: Sequence[TopK], offsets: Sequence[int], k: int) -> TopK:
    """Merge the results of searching the shards of a bank; the lowest recall is that of all.

    Args:
        parts: one result a shard, for the same queries.
        offsets: row of the whole bank at which each shard begins, increasing.
        k: matches to keep.
    """
    best = _best(
        np.concatenate([part.scores for part in parts], axis=1),
        np.concatenate(
            [part.rows + offset for part, offset in zip(parts, offsets, strict=True)], axis=1
        ),
        k,
    )
    return best._replace(recall=min(part.recall for part in parts))


def approximate_top_k(
    queries: FloatArray,
    bank: FloatArray,
    weight: FloatArray,
    k: int,
    *,
    probes: int = _PROBES,
) -> TopK:
    """Search with a faiss inverted file first, and score its candidates exactly.

    faiss knows only the unsigned L1 distance, so the candidates come from features multiplied by
    ``|w|`` and the signs enter when these are scored again.

    Args:
        queries: ``[n, d]``.
        bank: ``[m, d]``; faiss keeps a float32 copy of ``_SHARD_ROWS`` rows in memory.
        weight: ``[d]``, of both signs.
        k: matches to keep.
        probes: cells of an inverted file that are searched, of about the root of its rows.

    Returns:
        The matches; their recall is measured on a sample of the queries.

    Raises:
        MissingExtraError: faiss is not installed.
    """
    faiss = _faiss()
    check_k(k)
    _check_shapes(queries, bank, weight)
    queries, _, weight = _checked(queries, bank[:0], weight)
    scale = np.abs(weight)

    def make_index(cells: int) -> Any:
        quantiser = faiss.IndexFlat(bank.shape[1], faiss.METRIC_L1)
        return faiss.IndexIVFFlat(quantiser, bank.shape[1], cells, faiss.METRIC_L1)

    proposed = _proposed(make_index, queries, bank, max(_CANDIDATES, k), scale=scale, probes=probes)
    exact = partial(weighted_l1_top_k, weight=weight)
    found = _best_proposed(
        partial(weighted_l1_matrix, weight=weight), exact, queries, bank, k, proposed
    )
    return with_recall(found, exact, queries, bank)


def approximate_products(
    score_matrix: ScoreMatrix, exact: Search, queries: FloatArray, bank: FloatArray, k: int
) -> TopK:
    """Search unit vectors by their product, as ``approximate_top_k`` does by weighted L1.

    The inverted file keeps 8 bits of a number, and only proposes: the scores are exact.

    Args:
        score_matrix: exact scores, rising with the product.
        exact: searches queries of which the cells searched hold fewer than ``k`` rows.
        queries: ``[n, d]``.
        bank: ``[m, d]``.
        k: matches to keep.

    Raises:
        MissingExtraError: faiss is not installed.
    """
    faiss = _faiss()
    check_k(k)
    width = bank.shape[1]

    def make_index(cells: int) -> Any:
        return faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(width), width, cells,
            faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT,
        )  # fmt: skip

    proposed = _proposed(make_index, queries, bank, max(_CANDIDATES, k))
    return _best_proposed(score_matrix, exact, queries, bank, k, proposed)


def with_recall(found: TopK, exact: Search, queries: FloatArray, bank: FloatArray) -> TopK:
    """Return matches with the share of best ones that are so exactly, of a sample of queries."""
    sample = _spread(_RECALL_SAMPLE, len(queries))
    if not len(sample):
        return found._replace(recall=1.0)
    truth = exact(queries[sample], bank, k=1)
    return found._replace(recall=float((truth.rows[:, 0] == found.rows[sample, 0]).mean()))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("approximate search", "search") from error
    return faiss


def _num_cells(num_rows: int) -> int:
    return max(1, min(int(num_rows**0.5), num_rows // 40))


def _proposed(
    make_index: Callable[[int], Any],
    queries: FloatArray,
    bank: FloatArray,
    count: int,
    *,
    scale: FloatArray | float = 1.0,
    probes: int = _PROBES,
) -> NDArray[np.int64]:
    """Return rows ``[n, count]`` of the bank that inverted files hold near; -1 where none.

    Args:
        make_index: makes an empty inverted file of so many cells.
        queries: ``[n, d]``.
        bank: ``[m, d]``.
        count: rows for each query, cut to ``m``.
        scale: of all features.
        probes: cells that are searched.
    """
    count = min(count, len(bank))
    queries = np.ascontiguousarray(queries, dtype=np.float32) * scale
    rows = np.zeros((len(queries), 0), dtype=np.int64)
    far = np.zeros(rows.shape)
    for first in range(0, len(bank), _SHARD_ROWS):
        shard = bank[first : first + _SHARD_ROWS]
        index = make_index(_num_cells(len(shard)))
        index.cp.min_points_per_centroid = 1  # it remarks on small banks past any reporter
        index.cp.niter = _TRAINING_ROUNDS
        index.nprobe = probes
        training_rows = _spread(_TRAINING_ROWS * index.nlist, len(shard))
        index.train(np.asarray(shard[training_rows], dtype=np.float32) * scale)
        for start in range(0, len(shard), BLOCK_ROWS):
            index.add(np.asarray(shard[start : start + BLOCK_ROWS], dtype=np.float32) * scale)
        values, found = index.search(queries, min(count, len(shard)))
        sign = -1.0 if index.metric_type == 0 else 1.0  # METRIC_INNER_PRODUCT: larger is nearer
        far = np.concatenate([far, np.where(found < 0, np.inf, sign * values)], axis=1)
        rows = np.concatenate([rows, np.where(found < 0, -1, found + first)], axis=1)
        nearest = np.argsort(far, axis=1, kind="stable")[:, :count]
        far, rows = np.take_along_axis(far, nearest, 1), np.take_along_axis(rows, nearest, 1)
    return rows


def _best_proposed(
    score_matrix: ScoreMatrix,
    exact: Search,
    queries: FloatArray,
    bank: FloatArray,
    k: int,
    proposed: NDArray[np.int64],
) -> TopK:
    """Return the best of the proposed rows; of all rows where fewer than ``k`` are proposed."""
    k = min(k, len(bank))
    scores = np.full((len(queries), k), -np.inf)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    is_short = (proposed >= 0).sum(axis=1) < k  # the cells searched hold too few rows
    if is_short.any():
        best = exact(queries[is_short], bank, k=k)
        scores[is_short], rows[is_short] = best.scores, best.rows
    for number in np.flatnonzero(~is_short):
        near = np.sort(proposed[number][proposed[number] >= 0])
        near_scores = score_matrix(queries[number : number + 1], bank[near])
        best = _best(near_scores, near[None].astype(np.int64), k)
        scores[number], rows[number] = best.scores[0], best.rows[0]
    return TopK(scores, rows)


def _best(scores: NDArray[Any], rows: NDArray[np.int64], k: int) -> TopK:
    """Return the ``k`` best columns of each row; equal scores by bank row."""
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return TopK(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))


def _spread(count: int, total: int) -> NDArray[np.int64]:
    """Return ``count`` of ``range(total)``, evenly spread; all of them where there are fewer."""
    return np.linspace(0, total - 1, min(count, total)).astype(np.int64)


def check_k(k: int) -> None:
    """Refuse to look for less than one match."""
    if k < 1:
        raise InputError(f"the number of matches must be at least 1, not {k}")


def _check_shapes(a: FloatArray, b: FloatArray, weight: FloatArray) -> None:
    if a.ndim != 2 or b.ndim != 2 or not a.shape[1:] == b.shape[1:] == weight.shape:
        raise InputError(f"features {a.shape}, {b.shape} and weight {weight.shape} do not fit")


def _checked(
    a: Any, b: Any, weight: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    a, b, weight = (np.ascontiguousarray(values, dtype=np.float32) for values in (a, b, weight))
    _check_shapes(a, b, weight)
    for name, values in (("features", a), ("features", b), ("weights", weight)):
        if not np.isfinite(values).all():
            raise InputError(f"{name} to be compared are not finite (NaN or infinite)")
    return a, b, weight


def _in_passes(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``[..., d]`` with zeros behind the last column, up to a multiple of ``PASS``."""
    missing = -values.shape[-1] % PASS
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)]) if missing else values


def in_threads(work: Callable[[int, int], None], count: int) -> None:
    """Run ``work(start, stop)`` over ``range(count)`` in as many threads as one may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # of nested regions, perhaps
    threads = int(wanted) if wanted.isdecimal() else available_cpus()
    parts = max(1, min(threads, count))
    bounds = [count * part // parts for part in range(parts + 1)]
    if parts == 1:
        work(0, count)
        return
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))


def _search_block(
    queries: NDArray[np.float32],
    block: NDArray[np.float32],
    weight: NDArray[np.float32],
    first: int,
    scores: NDArray[np.float32],
    rows: NDArray[np.int64],
) -> None:
    """Bring the lists of all queries up to date with the rows of a block."""
    from lcmem_cli.engine.store import kernels

    whole_queries, whole_block, whole_weight = (
        _in_passes(values) for values in (queries, block, weight)
    )
    if len(queries) < _SCREEN_QUERIES:  # rounding the block would cost more than it saves
        in_threads(
            lambda start, stop: kernels.search(
                whole_queries, whole_block, whole_weight, first, start, stop, scores, rows
            ),
            len(queries),
        )
        return
    grid = _Grid(queries, block, weight)
    grid_queries, query_error = grid.round(queries)
    grid_block, block_error = grid.round(block)
    in_threads(
        lambda start, stop: kernels.search_screened(
            whole_queries,
            whole_block,
            whole_weight,
            grid_queries,
            grid_block,
            grid.weight,
            grid.unit,
            query_error + grid.slack,
            block_error,
            first,
            start,
            stop,
            scores,
            rows,
        ),
        len(queries),
    )


class _Grid:
    """Rounding of features to 8 bits, and how far a score of rounded features can be off.

    With ``a = A + r`` and ``b = B + s``, A and B on the grid, ``|a - b|`` and ``|A - B|`` differ by
    at most ``|r| + |s|``, so a score moves by at most ``Σ |w_k| |r_k| + Σ |w_k| |s_k|``; ``round``
    returns these margins row by row.
    On the grid ``w_k |A_k - B_k| = w_k step_k * integer``; the products ``w_k step_k`` are rounded
    to 16 bits, which moves a score by at most ``255 Σ |rounding|``. The slack is that and what the
    float32 sum of the exact score can be off.

    Attributes:
        weight: ``[d]`` int16; ``255 Σ |weight|`` fits into int32.
        unit: score of one unit.
        slack: margin that all pairs share.
    """

    def __init__(
        self,
        queries: NDArray[np.float32],
        block: NDArray[np.float32],
        weight: NDArray[np.float32],
    ) -> None:
        low = np.minimum(queries.min(axis=0), block.min(axis=0)).astype(np.float64)
        high = np.maximum(queries.max(axis=0), block.max(axis=0)).astype(np.float64)
        self._low = low
        self._step = np.where(high > low, (high - low) / _GRID_STEPS, 1.0)
        self._size = np.abs(weight.astype(np.float64))
        products = weight * self._step
        largest, total = float(np.abs(products).max()), float(np.abs(products).sum())
        room = np.iinfo(np.int32).max / _GRID_STEPS - len(weight)
        units = min(_MAX_GRID_WEIGHT / largest, room / total) if largest > 0 else 1.0
        self.unit = 1.0 / units
        self.weight = np.rint(products * units).astype(np.int16)
        rounding = float(np.abs(products - self.weight * self.unit).sum()) * _GRID_STEPS
        # A term passes at most this many float32 roundings: of its own, in its lane, in folding.
        num_roundings = 3 + -(-len(weight) // LANES) + 5
        most = float((self._size * (high - low)).sum())
        reach = float((self._size * np.maximum(np.abs(low), np.abs(high))).sum())
        underflow = len(weight) * 2.0**-149
        self.slack = rounding + 1.1 * num_roundings * 2.0**-24 * most + underflow + 1e-12 * reach

    def round(self, values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """Return rows on the grid ``[n, d]`` and the margin of each ``[n]``."""
        from lcmem_cli.engine.store import kernels

        rounded = np.empty(values.shape, dtype=np.uint8)
        error = np.empty(len(values), dtype=np.float64)
        in_threads(
            lambda start, stop: kernels.quantise(
                values, self._low, self._step, self._size, start, stop, rounded, error
            ),
            len(values),
        )
        return rounded, error
