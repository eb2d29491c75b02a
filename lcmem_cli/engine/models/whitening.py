"""Projection of pooled features to their whitened principal components, in closed form.

Distances of a backbone's raw features are ruled by the few directions in which all images differ
most. Whitened, every direction counts that the images show at all (Jégou & Chum 2012, doi
10.1007/978-3-642-33709-3_55).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOOR = 0.05
"""Of the deviations where a training starts and where its teacher's targets are made."""
SPREAD = 2.5
"""Standard deviation of a projected feature: most of the sigmoid's range, where the L1 distance of
two features orders pairs much as the angle between them does."""
ALTERED_SHARE = 0.5
"""Weight of what edits change, in the covariance that is whitened."""
RELATED_SHARE = 2.0
"""Weight of how two images of one identity differ, in the same."""


def whitened_projection(
    pooled: torch.Tensor,
    widths: Sequence[int],
    *,
    num_features: int,
    seed: int,
    changes: torch.Tensor | None = None,
    identities: Sequence[int] | None = None,
    floor: float = FLOOR,
) -> torch.Tensor:
    """Return a projection to principal components of equal spread, turned at random.

    Turned, the components share what they tell, so that no feature is worth more than another to
    a distance that adds them up.

    Args:
        pooled: features of images, levels side by side, ``[N, d]``.
        widths: of the levels; each has the same say, whatever the scale of its features.
        num_features: rows of the result.
        seed: of the turn.
        changes: how an altered copy of each image differs from it, ``[N, d]``. A share of their
            second moment is added to the covariance, so that whitening makes the directions
            smaller in which edits move the features (as within-class covariance does in Hatch et
            al. 2006, doi 10.21437/Interspeech.2006-183).
        identities: a number an image. A share of the second moment of how two images of one
            identity differ is added in the same way, mean over the identities with several.
        floor: see ``principal_axes``.

    Returns:
        ``[num_features, d]`` float64; projected features have the standard deviation ``SPREAD``.
    """
    centred = (pooled - pooled.mean(dim=0)).double()
    scales = level_scales(centred, widths)
    seen = centred * scales
    if changes is not None:
        seen = torch.cat([seen, changes.double() * scales * ALTERED_SHARE**0.5])
    if identities is not None:
        related = _related(centred * scales, identities)
        seen = torch.cat([seen, related * (RELATED_SHARE * len(pooled)) ** 0.5])
    axes = principal_axes(seen, num_features, floor=floor)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(
        torch.randn(num_features, len(axes), generator=generator, dtype=torch.float64)
    )[0]
    return spread(turn @ axes * scales, centred)


def _related(features: torch.Tensor, identities: Sequence[int]) -> torch.Tensor:
    """Return rows whose sum of squares is that of two images' difference, mean over identities."""
    rows = []
    numbers = torch.tensor(identities)
    for number in sorted(set(identities)):
        own = features[numbers == number]
        if len(own) > 1:  # the difference of two varies by twice the variance
            rows.append((own - own.mean(dim=0)) * (2 / (len(own) - 1)) ** 0.5)
    return torch.cat(rows) / len(rows) ** 0.5 if rows else features[:0]


def level_scales(centred: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Return ``[d]``: factors that bring each level of ``[N, d]`` to the same mean length."""
    levels = torch.split(centred, list(widths), dim=1)
    return torch.cat([(1 / x.square().sum(dim=1).mean().sqrt()).expand(x.shape[1]) for x in levels])


def principal_axes(
    centred: torch.Tensor, num_features: int, *, floor: float = FLOOR
) -> torch.Tensor:
    """Return ``[r, d]`` float64: principal axes over their deviations.

    Args:
        centred: ``[N, d]`` float64.
        num_features: most rows of the result.
        floor: added to every deviation, relative to the largest, so that directions of which
            little is known are not blown up.
    """
    rank = min(num_features, len(centred) - 1, centred.shape[1])
    _, deviations, axes = torch.linalg.svd(
        centred / max(1, len(centred) - 1) ** 0.5, full_matrices=False
    )
    deviations, axes = deviations[:rank], axes[:rank]
    whitened: torch.Tensor = axes / (deviations + floor * deviations[0])[:, None]
    return whitened


def spread(projection: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
    """Scale each projected feature's standard deviation to ``SPREAD``."""
    deviations = (centred @ projection.T).std(dim=0).clamp_min(1e-12)
    return projection * (SPREAD / deviations)[:, None]
