"""Features rounded to 16 bits: half of single precision, and the same numbers wherever they go.

A detector that keeps such features rounds them as it embeds, so that a direct audit, an index, the
cache and a guard compare the same numbers. A feature from -1 to 1 is a whole number of steps, which
moves it by half a step at most. Products of such rows are exact in whole numbers, so cosines have
the same bits whatever the block, the thread or the order of addition.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.store.search import (
    BLOCK_ROWS,
    SMALL,
    FloatArray,
    TopK,
    check_k,
    in_threads,
    top_k_blocked,
)

NUM_STEPS = 32767
"""From 0 to 1."""
HIGHEST_COSINE = 1 - 1e-9
"""Cosines end here, so that rows that differ by rounding alone are equally close."""

StepArray = NDArray[np.int16]


def in_steps(values: FloatArray) -> StepArray:
    """Round features, of any shape, from -1 to 1."""
    return np.rint(values * np.float64(NUM_STEPS)).astype(np.int16)


def from_steps(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Return the features that were rounded; others as they are."""
    values = rows.astype(np.float64)
    return values / NUM_STEPS if rows.dtype == np.int16 else values


def in_unit_of(weight: NDArray[np.float32], rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return weights ``[d]`` to be multiplied with rows as they are kept, perhaps in steps."""
    return weight / np.float32(NUM_STEPS) if rows.dtype == np.int16 else weight


def cosine_pairs(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cosine ``[n]`` of row i of ``a [n, d]`` with row i of ``b [n, d]``, in steps."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return _cosines(np.einsum("nd,nd->n", a, b), _lengths(a) * _lengths(b))


def cosine_matrix(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cosine ``[n, m]`` of every row of ``a [n, d]`` with every row of ``b [m, d]``."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return _cosines(a @ b.T, _lengths(a)[:, None] * _lengths(b))


def cosine_top_k(
    queries: StepArray, bank: StepArray, k: int, *, block_rows: int = BLOCK_ROWS
) -> TopK:
    """Return each query's ``k`` rows of the bank with the largest cosine, exactly.

    Args:
        queries: ``[n, d]`` in steps, of length 1 or 0 as features: a product fits into 32 bits.
        bank: ``[m, d]`` likewise, perhaps a memory map; it is read block by block.
        k: at least 1; cut to ``m``.
        block_rows: bank rows read at once; the result does not depend on it.

    Raises:
        InputError: ``k`` below 1, or rows that are not in steps, which would all be cut to 0.
    """
    check_k(k)
    if any(rows.dtype != np.int16 for rows in (queries, bank)):
        raise InputError(f"features must be int16 steps, not {queries.dtype} and {bank.dtype}")
    if len(queries) * bank.size <= SMALL:
        return top_k_blocked(cosine_matrix, queries, bank, k)
    from lcmem_cli.engine.store import kernels

    k = min(k, len(bank))
    scores = np.full((len(queries), k), -np.inf)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    whole = np.ascontiguousarray(queries)
    lengths = kernels.lengths(whole)
    for first in range(0, len(bank), block_rows):
        block = np.ascontiguousarray(bank[first : first + block_rows])
        block_lengths = kernels.lengths(block)

        def search(
            start: int,
            stop: int,
            first: int = first,
            block: StepArray = block,
            block_lengths: NDArray[np.float64] = block_lengths,
        ) -> None:
            kernels.search_cosine(
                whole, lengths, block, block_lengths, HIGHEST_COSINE, first, start, stop,
                scores, rows,
            )  # fmt: skip

        in_threads(search, len(queries))
    return TopK(scores, rows)


def _cosines(products: NDArray[np.float64], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(products / lengths, -HIGHEST_COSINE, HIGHEST_COSINE)


def _lengths(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the length of each row; 1 of one without length, which is like nothing."""
    lengths: NDArray[np.float64] = np.sqrt(np.maximum(np.einsum("nd,nd->n", rows, rows), 1.0))
    return lengths
