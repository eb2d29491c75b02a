"""Search on a graphics card that gives what the exact search gives.

The card compares all pairs in single precision and names some candidates more than are wanted.
These are scored exactly. How far the card can be off is known. So it is known as well where a row
that it did not name might belong to the best, and such queries are searched exactly as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from lcmem_cli.engine.store.search import ScoreMatrix, Search, TopK

SPARE = 8
"""Candidates beyond the matches that are wanted."""
LEAST_PAIRS = 10_000_000
"""Pairs from which bringing a bank to the card pays."""
_QUERY_ROWS = 2048
_BANK_ROWS = 16_384
_HALF_STEP = 2.0**-24


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceScore:
    """A score as a card computes it.

    Attributes:
        matrix: ``[n, d], [m, d] -> [n, m]`` on one device.
        margin: how far it can be off from the exact one, for features of some size.
    """

    matrix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    margin: Callable[[float], float]


def weighted_l1(weight: NDArray[np.float32], device: torch.device) -> DeviceScore:
    """Return ``Σ_k w_k |a_k - b_k|``: columns that are added less those that are taken away."""
    sides = [(sign, torch.from_numpy(np.flatnonzero(sign * weight > 0))) for sign in (1, -1)]
    parts = [
        (sign, columns.to(device), torch.from_numpy(np.abs(weight)).to(device)[columns.to(device)])
        for sign, columns in sides
        if len(columns)
    ]
    total = float(np.abs(weight.astype(np.float64)).sum())

    def matrix(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        scores = a.new_zeros(len(a), len(b))
        for sign, columns, scale in parts:
            scaled = a[:, columns] * scale, b[:, columns] * scale
            scores.add_(torch.cdist(*scaled, p=1), alpha=sign)
        return scores

    def margin(largest: float) -> float:
        return 2 * (len(weight) + 8) * _HALF_STEP * total * 2 * largest

    return DeviceScore(matrix=matrix, margin=margin)


def cosine(num_columns: int, *, centred: bool) -> DeviceScore:
    """Return the cosine of two rows, or of these less their means."""

    def unit(rows: torch.Tensor) -> torch.Tensor:
        values = rows.double()
        if centred:
            values = values - values.mean(dim=1, keepdim=True)
        return F.normalize(values, dim=1).float()

    def margin(largest: float) -> float:
        return 2 * (num_columns + 8) * _HALF_STEP

    return DeviceScore(matrix=lambda a, b: unit(a) @ unit(b).T, margin=margin)


def is_worth_it(device: torch.device, num_queries: int, num_rows: int) -> bool:
    """Return whether a search is done on a device."""
    return device.type == "cuda" and num_queries * num_rows >= LEAST_PAIRS


def top_k(
    make_score: Callable[[], DeviceScore],
    exact: ScoreMatrix,
    search: Search,
    queries: NDArray[Any],
    bank: NDArray[Any],
    k: int,
    device: torch.device,
) -> TopK:
    """Search on the device where that is worth it, else with ``search``; see ``top_k_on_device``.

    Args:
        make_score: makes what names candidates, if it is needed.
        exact: see ``top_k_on_device``.
        search: likewise.
        queries: likewise.
        bank: likewise.
        k: likewise; ``search`` refuses less than 1.
        device: likewise.
    """
    if k < 1 or not is_worth_it(device, len(queries), len(bank)):
        return search(queries, bank, k=k)
    return top_k_on_device(make_score(), exact, search, queries, bank, k, device)


def top_k_on_device(
    score: DeviceScore,
    exact: ScoreMatrix,
    search: Search,
    queries: NDArray[Any],
    bank: NDArray[Any],
    k: int,
    device: torch.device,
) -> TopK:
    """Return each query's ``k`` best rows of a bank, as an exact search does.

    Args:
        score: names candidates on the device.
        exact: ``[1, d], [m, d] -> [1, m]``, which the result is of.
        search: the exact search, for queries whose candidates may not hold all of the best.
        queries: ``[n, d]``.
        bank: ``[m, d]``, perhaps a memory map; read once for some thousand queries.
        k: at least 1; cut to ``m``.
        device: where candidates are looked for.
    """
    k = min(k, len(bank))
    scores, rows = np.zeros((len(queries), k)), np.zeros((len(queries), k), dtype=np.int64)
    unsure = []
    for start in range(0, len(queries), _QUERY_ROWS):
        block = np.ascontiguousarray(queries[start : start + _QUERY_ROWS], dtype=np.float32)
        rough, near, largest = _candidates(score, block, bank, k + SPARE, device)
        margin = score.margin(largest)
        for i, numbers in enumerate(np.sort(near, axis=1)):
            values = exact(block[i : i + 1], bank[numbers])[0]
            order = np.lexsort((numbers, -values))[:k]
            scores[start + i], rows[start + i] = values[order], numbers[order]
            if len(numbers) < len(bank) and rough[i, -1] + margin >= values[order[-1]]:
                unsure.append(start + i)  # a row that was not named may be as good
    if unsure:
        found = search(queries[unsure], bank, k=k)
        scores[unsure], rows[unsure] = found.scores, found.rows
    return TopK(scores, rows)


def _candidates(
    score: DeviceScore, block: NDArray[Any], bank: NDArray[Any], count: int, device: torch.device
) -> tuple[NDArray[Any], NDArray[np.int64], float]:
    """Return the rough scores and rows of the best, best first, and the largest feature seen."""
    queries = torch.from_numpy(block).to(device)
    best = queries.new_zeros(len(block), 0)
    rows = torch.zeros(len(block), 0, dtype=torch.int64, device=device)
    largest = queries.abs().max()
    for start in range(0, len(bank), _BANK_ROWS):
        part = np.ascontiguousarray(bank[start : start + _BANK_ROWS], dtype=np.float32)
        against = torch.from_numpy(part).to(device)
        largest = torch.maximum(largest, against.abs().max())
        scores = torch.cat([best, score.matrix(queries, against)], dim=1)
        numbers = torch.arange(start, start + len(part), device=device).expand(len(block), -1)
        best, places = scores.topk(min(count, scores.shape[1]), dim=1)
        rows = torch.cat([rows, numbers], dim=1).gather(1, places)
    return best.cpu().numpy(), rows.cpu().numpy(), float(largest)
