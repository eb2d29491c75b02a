"""Batch normalisation over the batches of all processes.

torch's own ``SyncBatchNorm`` does not run on a CPU, so that it could not be compared with one
process here; this one is made of collective operations that every backend has.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcmem_cli.engine.distributed import collective


def synchronise_batch_norm(network: nn.Module) -> bool:
    """Let every batch normalisation use the statistics of all processes' parts while training.

    Every process then has to run the network equally often, also on no rows at all.

    Args:
        network: changed in place; names and tensors of its state stay as they are.

    Returns:
        Whether the network holds any batch normalisation.
    """
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        kind = type(layer)
        layer.__class__ = type(f"Synchronised{kind.__name__}", (_Synchronised, kind), {})
    return bool(layers)


class _Synchronised(_BatchNorm):
    """Replaces the forward pass of a batch normalisation in training mode."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(inputs)
        result = self._normalise(inputs.float()).to(inputs.dtype)
        if isinstance(self, BatchNormAct2d):  # timm's carries its activation
            layer: Any = self
            result = layer.act(layer.drop(result))
        return result

    def _normalise(self, inputs: torch.Tensor) -> torch.Tensor:
        axes = [axis for axis in range(inputs.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(inputs.ndim)]
        here = inputs.new_tensor([inputs.numel() / inputs.shape[1]])
        gathered: torch.Tensor = _SumOverProcesses.apply(torch.cat([inputs.sum(dim=axes), here]))
        count = float(gathered[-1].detach())
        if count == 0:
            return inputs
        mean = gathered[:-1] / count
        centred = inputs - mean.view(shape)
        # From the deviations, in a second round: squares less the squared mean lose digits.
        variance: torch.Tensor = _SumOverProcesses.apply(centred.square().sum(dim=axes)) / count
        self._track(mean.detach(), variance.detach() * count / max(count - 1, 1))
        result: torch.Tensor = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if share is None:
                share = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share or 0.0)
        self.running_var.lerp_(variance, share or 0.0)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; the gradient is summed in the same way."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _sum(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _sum(gradient)


def _sum(values: torch.Tensor) -> torch.Tensor:
    import torch.distributed as dist

    total = values.clone(memory_format=torch.contiguous_format)
    with collective():
        dist.all_reduce(total)
    return total
