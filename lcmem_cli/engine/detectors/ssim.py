"""Compiled kernels of the structural similarity.

Operations keep their order (no ``fastmath``), so that the covariance of an image with itself is its
variance to the last bit, and a score is the same with the two images exchanged.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lcmem_cli.engine.compiled import compiled


@compiled(inline="always")
def _smooth_row(x: Any, y: Any, row: Any, weights: Any, column_sums: Any, out: Any) -> None:
    """Average ``x * y`` with the window along one row: first down the columns, then along it."""
    for column in range(column_sums.shape[0]):
        column_sums[column] = 0.0
    for k in range(weights.shape[0]):
        for column in range(column_sums.shape[0]):
            column_sums[column] += weights[k] * (x[row + k, column] * y[row + k, column])
    for column in range(out.shape[0]):
        out[column] = 0.0
    for k in range(weights.shape[0]):
        for column in range(out.shape[0]):
            out[column] += weights[k] * column_sums[column + k]


@compiled()
def smooth(x: Any, y: Any, weights: Any, out: Any) -> None:
    """Write the local averages of ``x * y``.

    Args:
        x: ``[C, H + k - 1, W + k - 1]`` float64.
        y: the same shape.
        weights: ``[k]``, the window along each axis.
        out: ``[C, H, W]``, filled.
    """
    column_sums = np.empty(x.shape[2])
    for channel in range(x.shape[0]):
        for row in range(out.shape[1]):
            _smooth_row(x[channel], y[channel], row, weights, column_sums, out[channel, row])


@compiled(error_model="numpy")
def similarity(
    x: Any, mean_x: Any, var_x: Any, y: Any, mean_y: Any, var_y: Any, weights: Any, c1: Any, c2: Any
) -> Any:
    """Return the mean structural similarity of two images.

    Args:
        x: first image ``[C, H + k - 1, W + k - 1]`` float64.
        mean_x: its local mean ``[C, H, W]``.
        var_x: its local variance ``[C, H, W]``.
        y: second image.
        mean_y: its local mean.
        var_y: its local variance.
        weights: ``[k]``, the window along each axis.
        c1: keeps the means' quotient finite.
        c2: keeps the variances' quotient finite.
    """
    column_sums = np.empty(x.shape[2])
    products = np.empty(mean_x.shape[2])
    totals = np.zeros(mean_x.shape[2])
    for channel in range(x.shape[0]):
        for row in range(mean_x.shape[1]):
            _smooth_row(x[channel], y[channel], row, weights, column_sums, products)
            for column in range(products.shape[0]):
                mx, my = mean_x[channel, row, column], mean_y[channel, row, column]
                variances = var_x[channel, row, column] + var_y[channel, row, column]
                covariance = products[column] - mx * my
                totals[column] += ((2 * (mx * my) + c1) * (2 * covariance + c2)) / (
                    (mx * mx + my * my + c1) * (variances + c2)
                )
    return totals.sum() / mean_x.size
