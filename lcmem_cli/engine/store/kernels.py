"""Compiled loops of the search. Import this module only where much is to be computed.

Importing the compiler takes longer than comparing a few images. The compiled code is kept on disk
where there is a writable place for it.

Every sum of a pair is taken in the order of ``lcmem_cli.engine.store.lanes``, without reassociation
or fused operations. So a score has the same bits whatever the block, the thread or the processor.

Rows of float32 features and their weights have a multiple of ``PASS`` columns: the compiler makes
vector instructions of loops of known length only. Columns of zeros make up for what is missing;
they change no bit of a sum. Columns are walked by ``while``: with ``range`` the compiler makes no
vector instructions either, and ``bench_search.py`` shows five times the time.

Some kernels take more than eight parameters: numba compiles plain arrays and numbers, and a tuple
of them would be unpacked in the innermost loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lcmem_cli.engine.compiled import compiled
from lcmem_cli.engine.store.lanes import LANES, PASS

_TILE_ROWS = 64
_SCREEN_ROWS = 512
_ZERO = np.float32(0)


_compiled = compiled(nogil=True)  # without the interpreter's lock, threads can share the work


@_compiled
def fold(lanes: Any) -> Any:
    """Return the sum of ``lanes [LANES]``, which are overwritten."""
    for i in range(16):
        lanes[i] += lanes[i + 16]
    for i in range(8):
        lanes[i] += lanes[i + 8]
    for i in range(4):
        lanes[i] += lanes[i + 4]
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])


@_compiled
def distance(a: Any, b: Any, weight: Any, lanes: Any) -> Any:
    """Return ``Σ_k w_k |a_k - b_k|`` of two rows ``[d]``; ``lanes`` is scratch ``[LANES]``."""
    for i in range(LANES):
        lanes[i] = _ZERO
    o = 0
    while o + PASS <= weight.shape[0]:
        for i in range(LANES):
            s = lanes[i]
            for k in range(0, PASS, LANES):
                s += weight[o + k + i] * abs(a[o + k + i] - b[o + k + i])
            lanes[i] = s
        o += PASS
    return fold(lanes)


@_compiled
def four_distances(
    a: Any, b: Any, c: Any, d: Any, other: Any, weight: Any, la: Any, lb: Any, lc: Any, ld: Any
) -> Any:
    """Return ``distance`` of each of four rows from another, which is read once for all four."""
    for i in range(LANES):
        la[i] = lb[i] = lc[i] = ld[i] = _ZERO
    o = 0
    while o + PASS <= weight.shape[0]:
        for i in range(LANES):
            sa, sb, sc, sd = la[i], lb[i], lc[i], ld[i]
            for k in range(0, PASS, LANES):
                w, value = weight[o + k + i], other[o + k + i]
                sa += w * abs(a[o + k + i] - value)
                sb += w * abs(b[o + k + i] - value)
                sc += w * abs(c[o + k + i] - value)
                sd += w * abs(d[o + k + i] - value)
            la[i], lb[i], lc[i], ld[i] = sa, sb, sc, sd
        o += PASS
    return fold(la), fold(lb), fold(lc), fold(ld)


@_compiled
def pairs(a: Any, b: Any, weight: Any, start: int, stop: int, out: Any) -> None:
    """Score rows ``start`` to ``stop`` of ``a`` with the same rows of ``b`` into ``out [n]``."""
    lanes = np.empty(LANES, np.float32)
    for i in range(start, stop):
        out[i] = distance(a[i], b[i], weight, lanes)


@_compiled
def matrix(a: Any, b: Any, weight: Any, start: int, stop: int, out: Any) -> None:
    """Score rows ``start`` to ``stop`` of ``a`` with all rows of ``b`` into ``out [n, m]``."""
    la, lb = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    lc, ld = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    fours = start + (stop - start) // 4 * 4
    for tile in range(0, b.shape[0], _TILE_ROWS):
        end = min(tile + _TILE_ROWS, b.shape[0])
        for i in range(start, fours, 4):
            for j in range(tile, end):
                out[i, j], out[i + 1, j], out[i + 2, j], out[i + 3, j] = four_distances(
                    a[i], a[i + 1], a[i + 2], a[i + 3], b[j], weight, la, lb, lc, ld
                )
        for i in range(fours, stop):
            for j in range(tile, end):
                out[i, j] = distance(a[i], b[j], weight, la)


@_compiled
def insert(value: Any, row: int, scores: Any, rows: Any) -> None:
    """Put a match into a descending list, behind its equals: rows must come in order."""
    place = scores.shape[0] - 1
    while place > 0 and value > scores[place - 1]:
        scores[place] = scores[place - 1]
        rows[place] = rows[place - 1]
        place -= 1
    scores[place] = value
    rows[place] = row


@_compiled
def search(
    queries: Any, block: Any, weight: Any, first: int, start: int, stop: int, scores: Any, rows: Any
) -> None:
    """Bring the lists of queries ``start`` to ``stop`` up to date with a block of the bank.

    Args:
        queries: ``[n, d]`` float32.
        block: ``[m, d]`` float32.
        weight: ``[d]`` float32.
        first: row of the bank at which the block begins.
        start: first query.
        stop: query after the last.
        scores: ``[n, k]`` float32, descending, changed in place.
        rows: ``[n, k]`` int64, changed in place.
    """
    last = scores.shape[1] - 1
    lanes = np.empty(LANES, np.float32)
    for tile in range(0, block.shape[0], _TILE_ROWS):
        for i in range(start, stop):
            for j in range(tile, min(tile + _TILE_ROWS, block.shape[0])):
                value = distance(queries[i], block[j], weight, lanes)
                if value > scores[i, last]:
                    insert(value, first + j, scores[i], rows[i])


@_compiled
def quantise(
    values: Any, low: Any, step: Any, size: Any, start: int, stop: int, out: Any, error: Any
) -> None:
    """Round rows ``start`` to ``stop`` to the grid ``low_k + step_k * (0 .. 255)``.

    Args:
        values: ``[n, d]`` float32.
        low: ``[d]`` float64.
        step: ``[d]`` float64, above 0.
        size: ``[d]`` float64, ``|w_k|``.
        start: first row.
        stop: row after the last.
        out: ``[n, d]`` uint8, written.
        error: ``[n]`` float64, written: ``Σ_k |w_k| |value_k - grid value_k|``.
    """
    width = values.shape[1]
    inverse, off = 1 / step, np.empty(width)
    for i in range(start, stop):
        # The sum has a loop of its own: its additions wait for each other, the rest need not.
        for k in range(width):
            value = np.float64(values[i, k])
            place = np.floor((value - low[k]) * inverse[k] + 0.5)
            place = min(max(place, 0.0), 255.0)
            out[i, k] = np.uint8(place)
            off[k] = size[k] * abs(value - (low[k] + place * step[k]))
        total = 0.0
        for k in range(width):
            total += off[k]
        error[i] = total


@_compiled
def grid_distance(a: Any, b: Any, weight: Any) -> Any:
    """Return ``Σ_k w_k |a_k - b_k|`` of uint8 rows and int16 weights; must fit into int32."""
    total = np.int32(0)
    for k in range(a.shape[0]):
        difference = np.int32(np.int32(a[k]) - np.int32(b[k]))
        total = np.int32(total + np.int32(np.int32(abs(difference)) * np.int32(weight[k])))
    return total


@_compiled
def search_screened(
    queries: Any,
    block: Any,
    weight: Any,
    grid_queries: Any,
    grid_block: Any,
    grid_weight: Any,
    unit: float,
    query_margin: Any,
    block_margin: Any,
    first: int,
    start: int,
    stop: int,
    scores: Any,
    rows: Any,
) -> None:
    """Do as ``search`` does, computing only the pairs that may enter a list.

    A pair's score is at most ``unit * grid_distance + query_margin + block_margin``. Where that is
    below the last of the query's list, the pair is left out.

    Args:
        queries: ``[n, d]`` float32.
        block: ``[m, d]`` float32.
        weight: ``[d]`` float32.
        grid_queries: ``[n, d]`` uint8.
        grid_block: ``[m, d]`` uint8.
        grid_weight: ``[d]`` int16.
        unit: score of one unit of ``grid_distance``.
        query_margin: ``[n]`` float64.
        block_margin: ``[m]`` float64.
        first: row of the bank at which the block begins.
        start: first query.
        stop: query after the last.
        scores: ``[n, k]`` float32, descending, changed in place.
        rows: ``[n, k]`` int64, changed in place.
    """
    last = scores.shape[1] - 1
    lanes = np.empty(LANES, np.float32)
    for tile in range(0, block.shape[0], _SCREEN_ROWS):
        for i in range(start, stop):
            for j in range(tile, min(tile + _SCREEN_ROWS, block.shape[0])):
                coarse = unit * grid_distance(grid_queries[i], grid_block[j], grid_weight)
                if coarse + query_margin[i] + block_margin[j] < scores[i, last]:
                    continue
                value = distance(queries[i], block[j], weight, lanes)
                if value > scores[i, last]:
                    insert(value, first + j, scores[i], rows[i])


@_compiled
def product(a: Any, b: Any) -> Any:
    """Return ``Σ_k a_k b_k`` of int16 rows, exactly; it must fit into int32, its parts need not."""
    total = np.int32(0)
    for k in range(a.shape[0]):
        total = np.int32(total + np.int32(np.int32(a[k]) * np.int32(b[k])))
    return total


@_compiled
def lengths(rows: Any) -> Any:
    """Return the length ``[n]`` of each row of ``rows [n, d]`` int16; 1 of a row of zeros."""
    result = np.empty(rows.shape[0])
    for i in range(rows.shape[0]):
        result[i] = np.sqrt(np.float64(max(product(rows[i], rows[i]), 1)))
    return result


@_compiled
def search_cosine(
    queries: Any,
    query_lengths: Any,
    block: Any,
    block_lengths: Any,
    highest: float,
    first: int,
    start: int,
    stop: int,
    scores: Any,
    rows: Any,
) -> None:
    """Bring the lists of queries ``start`` to ``stop`` up to date with a block of the bank.

    Args:
        queries: ``[n, d]`` int16.
        query_lengths: ``[n]`` float64.
        block: ``[m, d]`` int16.
        block_lengths: ``[m]`` float64.
        highest: what larger cosines are cut to.
        first: row of the bank at which the block begins.
        start: first query.
        stop: query after the last.
        scores: ``[n, k]`` float64, descending, changed in place.
        rows: ``[n, k]`` int64, changed in place.
    """
    last = scores.shape[1] - 1
    for tile in range(0, block.shape[0], _TILE_ROWS):
        for i in range(start, stop):
            for j in range(tile, min(tile + _TILE_ROWS, block.shape[0])):
                value = np.float64(product(queries[i], block[j]))
                value /= query_lengths[i] * block_lengths[j]
                value = min(max(value, -highest), highest)
                if value > scores[i, last]:
                    insert(value, first + j, scores[i], rows[i])
