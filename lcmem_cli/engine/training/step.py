"""One optimiser step on a batch that may be spread over processes and computed in parts.

The loss couples all rows of the batch (NT-Xent negatives, rolled BCE negatives), so it is computed
on the features of the whole batch in every process. Each process then sends the gradient of the
loss with respect to its own features back through its own part of the network, and the backbone's
gradients are summed. The result is the gradient of one process with the whole batch.

Computing in parts uses the gradient cache of Gao et al. 2021, arXiv 2101.06983: features first
without a graph, then once more part by part with their share of the gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import nn

from lcmem_cli.engine.distributed import Ranks, collective
from lcmem_cli.engine.models.siamese import SiameseNetwork
from lcmem_cli.engine.training.losses import TrainingLoss

LossOf = Callable[[torch.Tensor, torch.Tensor, nn.Linear], TrainingLoss]
Autocast = Callable[[], contextlib.AbstractContextManager[None]]


def rank_slice(num_pairs: int, ranks: Ranks) -> slice:
    """Return the contiguous part of a batch that this process computes."""
    base, extra = divmod(num_pairs, ranks.size)
    start = ranks.rank * base + min(ranks.rank, extra)
    return slice(start, start + base + (ranks.rank < extra))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """How one step is computed.

    Attributes:
        num_pairs: pairs of the whole batch, over all processes.
        ranks: the processes.
        synchronised: the network waits for the other processes, so that each has to run it equally
            often, if need be on no rows.
        parts: pieces that this process's part is computed in.
        step_seed: of stochastic depth; the same masks are drawn again in the second pass.
        autocast: context for mixed precision.
        scale: factor of the loss before the backward pass (gradient scaling in fp16).
    """

    num_pairs: int
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    synchronised: bool = False
    parts: int = 1
    step_seed: int = 0
    autocast: Autocast = contextlib.nullcontext
    scale: float = 1.0


def forward_backward(
    network: SiameseNetwork,
    loss_of: LossOf,
    latents_a: torch.Tensor,
    latents_b: torch.Tensor,
    plan: StepPlan,
) -> TrainingLoss:
    """Compute the loss of the whole batch and leave its gradient in the parameters.

    Args:
        network: in training mode; existing gradients are added to.
        loss_of: the loss of two feature matrices and the head.
        latents_a: this process's part of the first images' latents, ``[b, C, h, w]``.
        latents_b: the same of the second images.
        plan: how it is computed.

    Returns:
        The loss and its parts, detached and unscaled, the same in every process.
    """
    ranks, single = plan.ranks, plan.parts == 1
    num_rows = latents_a.shape[0]
    pieces = [*torch.arange(num_rows).tensor_split(plan.parts)]
    pieces = [p for p in pieces if len(p) or plan.synchronised]

    def embed(piece_number: int) -> torch.Tensor:
        rows = pieces[piece_number]
        torch.manual_seed((plan.step_seed + 7919 * piece_number + 104729 * ranks.rank) % 2**63)
        with plan.autocast():
            both = network(torch.cat([latents_a[rows], latents_b[rows]]))
        features: torch.Tensor = both.float()
        return features

    if single:
        graphs = [embed(i) for i in range(len(pieces))]
    else:
        with torch.no_grad(), _frozen_statistics(network):
            graphs = [embed(i) for i in range(len(pieces))]
    halves = [graph.detach().chunk(2) for graph in graphs]
    # A process whose part of a small last batch is empty still takes part in the exchange.
    empty = [latents_a.new_zeros(0, network.spec.num_features)]
    local_a = torch.cat([a for a, _ in halves] or empty).requires_grad_()
    local_b = torch.cat([b for _, b in halves] or empty).requires_grad_()
    full_a = _gather(local_a, plan.num_pairs, ranks)
    full_b = _gather(local_b, plan.num_pairs, ranks)
    loss = loss_of(full_a, full_b, network.head)
    torch.autograd.backward(loss.total * plan.scale)
    assert local_a.grad is not None and local_b.grad is not None
    for number, rows in enumerate(pieces):
        gradient = torch.cat([local_a.grad[rows], local_b.grad[rows]])
        graph = graphs[number] if single else embed(number)
        with _frozen_statistics(network):  # with checkpointing the forward pass runs again in here
            torch.autograd.backward(graph, gradient)
    _sum_gradients(network.backbone, ranks)
    return loss.detach()


def embed_batch_for_loss(
    network: SiameseNetwork, latents_a: torch.Tensor, latents_b: torch.Tensor, plan: StepPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed this process's part of a batch and return the whole batch's features, for validation.

    Args:
        network: in evaluation mode; call under ``torch.no_grad``.
        latents_a: this process's part of the first images' latents, ``[b, C, h, w]``.
        latents_b: the same of the second images.
        plan: see ``StepPlan``; parts, seed and scale do not matter here.

    Returns:
        Two ``[num_pairs, n]`` float32 matrices, the same in every process.
    """
    features_a = features_b = latents_a.new_zeros(0, network.spec.num_features)
    if len(latents_a):
        with plan.autocast():
            features_a, features_b = network(torch.cat([latents_a, latents_b])).float().chunk(2)
    return (
        _gather(features_a, plan.num_pairs, plan.ranks),
        _gather(features_b, plan.num_pairs, plan.ranks),
    )


def _gather(local: torch.Tensor, num_pairs: int, ranks: Ranks) -> torch.Tensor:
    """Return the rows of all processes in batch order; this process's own keep their graph."""
    if ranks.size == 1:
        return local
    # ``all_gather`` takes tensors of one shape and returns copies without a graph: parts are padded
    # to the largest, and this process's own copy is replaced by the tensor that knows its graph.
    import torch.distributed as dist

    width = -(-num_pairs // ranks.size)
    padded = torch.zeros(width, local.shape[1], device=local.device)
    padded[: local.shape[0]] = local.detach()
    received = [torch.empty_like(padded) for _ in range(ranks.size)]
    with collective():
        dist.all_gather(received, padded)
    rows = []
    for rank, tensor in enumerate(received):
        part = rank_slice(num_pairs, Ranks(rank, ranks.size))
        rows.append(local if rank == ranks.rank else tensor[: part.stop - part.start])
    return torch.cat(rows)


def _sum_gradients(module: nn.Module, ranks: Ranks) -> None:
    """Add up the gradients of all processes; the head's are already those of the whole batch."""
    if ranks.size == 1:
        return
    import torch.distributed as dist

    gradients = [
        p.grad if p.grad is not None else torch.zeros_like(p)
        for p in module.parameters()
        if p.requires_grad
    ]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    with collective():
        dist.all_reduce(flat)
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter, piece in zip(
        parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True
    ):
        parameter.grad = piece.view_as(parameter).clone()


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch normalisation from being updated twice."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    try:
        for layer in layers:
            layer.momentum, layer.num_batches_tracked = 0.0, None
        yield
    finally:
        for layer, (momentum, count) in zip(layers, kept, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, count
