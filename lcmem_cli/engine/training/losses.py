"""The pair loss: binary cross-entropy on the head, plus NT-Xent on the features.

Method: arXiv 2512.14421, section on training; NT-Xent: Chen et al. 2020, arXiv 2002.05709.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from lcmem_cli.engine.errors import InputError


class PairLoss(NamedTuple):
    """The loss and its two parts, each a scalar tensor."""

    total: torch.Tensor
    bce: torch.Tensor
    ntxent: torch.Tensor


class TrainingLoss(NamedTuple):
    """The loss of a training step and its parts, each a scalar tensor."""

    total: torch.Tensor
    bce: torch.Tensor
    ntxent: torch.Tensor
    retention: torch.Tensor

    def detach(self) -> TrainingLoss:
        """Return the same values without their graph."""
        return TrainingLoss(*(part.detach() for part in self))


def nt_xent(
    features_a: torch.Tensor, features_b: torch.Tensor, *, temperature: float = 0.07
) -> torch.Tensor:
    """Return the NT-Xent loss of ``B`` positive pairs as one masked cross-entropy.

    Each of the ``2B`` rows is an anchor with one positive and ``2B - 2`` negatives. Only a
    ``[2B, 2B]`` matrix is formed.

    Args:
        features_a: ``[B, n]``.
        features_b: ``[B, n]``; row i shows the same identity as row i of ``features_a``.
        temperature: divides the cosine similarities.

    Returns:
        Scalar, mean over the anchors.
    """
    rows = F.normalize(torch.cat([features_a, features_b]), dim=1)
    similarity = rows @ rows.T / temperature
    num_pairs = features_a.shape[0]
    itself = torch.eye(2 * num_pairs, dtype=torch.bool, device=rows.device)
    similarity = similarity.masked_fill(itself, -torch.inf)
    positive = torch.arange(2 * num_pairs, device=rows.device).roll(num_pairs)
    return F.cross_entropy(similarity, positive)


def rolled_bce(features_a: torch.Tensor, features_b: torch.Tensor, head: nn.Linear) -> torch.Tensor:
    """Return the binary cross-entropy with one half of the batch rolled into negatives.

    Rows below ``B // 2`` are positives ``(a_i, b_i)``. In the other half row i of ``b`` meets row
    ``i - 1`` of ``a``, the first the last.

    Args:
        features_a: ``[B, n]``, B at least 3, so that the negative half has two rows.
        features_b: ``[B, n]``.
        head: linear layer ``n -> 1`` on the absolute difference.

    Returns:
        Scalar, mean over the rows.

    Raises:
        InputError: fewer than two rows in the negative half: its "negative" would be a true pair.
    """
    num_pairs = features_a.shape[0]
    half = num_pairs // 2
    if num_pairs - half < 2:
        raise InputError(
            f"a batch of {num_pairs} pair(s) has no negative pair; use at least 3 identities"
        )
    first = torch.cat([features_a[:half], features_a[half:].roll(1, dims=0)])
    logits = head((first - features_b).abs()).squeeze(-1)
    labels = (torch.arange(num_pairs, device=logits.device) < half).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, labels)


def all_pairs_bce(
    features_a: torch.Tensor, features_b: torch.Tensor, head: nn.Linear
) -> torch.Tensor:
    """Return the binary cross-entropy over every pair of the batch, both classes weighing half.

    Args:
        features_a: ``[B, n]``, B at least 2.
        features_b: ``[B, n]``.
        head: linear layer ``n -> 1`` on the absolute difference.

    Returns:
        Scalar: the mean over the ``B`` positives and the mean over the ``B * (B - 1)`` negatives,
        averaged.
    """
    num_pairs = features_a.shape[0]
    if num_pairs < 2:
        raise InputError("a batch of one pair has no negative pair")
    logits = head((features_a[:, None] - features_b[None]).abs()).squeeze(-1)
    same = torch.eye(num_pairs, dtype=torch.bool, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits, same.to(logits.dtype), reduction="none")
    return (loss[same].mean() + loss[~same].mean()) / 2


def pair_loss(
    features_a: torch.Tensor,
    features_b: torch.Tensor,
    head: nn.Linear,
    *,
    alpha: float = 0.8,
    temperature: float = 0.07,
    negatives: Literal["roll", "all"] = "roll",
) -> PairLoss:
    """Return ``alpha * BCE + (1 - alpha) * NT-Xent`` and both parts.

    Args:
        features_a: ``[B, n]`` in [0, 1], first images.
        features_b: ``[B, n]`` in [0, 1], second images; row i shows the same identity as row i of
            ``features_a``, different rows show different identities.
        head: ``torch.nn.Linear(n, 1)``.
        alpha: weight of the BCE, in [0, 1].
        temperature: of NT-Xent.
        negatives: BCE negatives, ``roll`` (the paper's) or ``all`` pairs of the batch.

    Returns:
        ``PairLoss(total, bce, ntxent)``.

    Raises:
        InputError: shapes differ or the batch is too small for a negative pair.
    """
    if features_a.shape != features_b.shape or features_a.ndim != 2:
        raise InputError(
            f"features must be two [B, n] tensors of one shape, not {list(features_a.shape)} and "
            f"{list(features_b.shape)}"
        )
    bce_of = rolled_bce if negatives == "roll" else all_pairs_bce
    bce = bce_of(features_a, features_b, head)
    ntxent = nt_xent(features_a, features_b, temperature=temperature)
    return PairLoss(alpha * bce + (1 - alpha) * ntxent, bce, ntxent)
