"""Initial weights: a pretrained backbone, its first convolution fitted to latents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.models.siamese import (
    SiameseNetwork,
    first_convolution,
    normalise,
    timm_part,
)
from lcmem_cli.engine.training.teacher import Teacher, normalise_pixels

RIDGE = 1e-3


def copy_backbone(network: SiameseNetwork, pretrained: nn.Module) -> bool:
    """Copy a pretrained backbone's weights, leaving ends of another shape random.

    The classifier is left random. Where the first convolution takes another number of channels,
    its weights are left to ``align_stem``.

    Args:
        network: to be changed in place.
        pretrained: the same timm model with its own input and classifier.

    Returns:
        Whether this network's first convolution takes other channels.
    """
    backbone = timm_part(network.backbone)
    own, loaded = backbone.state_dict(), pretrained.state_dict()
    fitting = {key: loaded[key] for key in own if own[key].shape == loaded[key].shape}
    backbone.load_state_dict(fitting, strict=False)
    return first_convolution(pretrained).in_channels != network.spec.in_channels


@torch.no_grad()
def align_stem(
    network: SiameseNetwork,
    pretrained: nn.Module,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
) -> float:
    """Fit the first convolution so that on latents it makes what the pretrained made of pixels.

    A ridge regression from latent patches to the pretrained convolution's output at the same
    places, in closed form and float64. Where the latents are normalised per sample and channel, so
    are the pixels: what that removes the latents could not tell either. Otherwise the pixels are
    normalised as in the pretraining.

    Args:
        network: its first convolution is replaced in place.
        pretrained: the same timm model with its own input, of which the first convolution is used.
        batches: ``(images [B, 3, H, W] in [0, 1], raw latents [B, C, h, w])``.

    Returns:
        Share of the output's variance that the fit explains, at most 1.

    Raises:
        InputError: the two convolutions do not end at the same resolution.
    """
    # Longer than others: sums, solution and residual of one regression share all their values.
    stem, pretrained_stem = first_convolution(network.backbone), first_convolution(pretrained)
    kernel = stem.kernel_size[0]
    padding = kernel // 2
    columns = stem.in_channels * kernel * kernel + 1
    gram = torch.zeros(columns, columns, dtype=torch.float64)
    cross = torch.zeros(columns, stem.out_channels, dtype=torch.float64)
    total = torch.zeros(stem.out_channels, dtype=torch.float64)
    square = torch.zeros(stem.out_channels, dtype=torch.float64)
    count = 0
    for images, latents in batches:
        pixels = (
            normalise(images, "sample")
            if network.spec.normalisation == "sample"
            else normalise_pixels(pretrained, images)
        )
        target = pretrained_stem(pixels)
        inputs = normalise(latents, network.spec.normalisation, mean=network.mean, std=network.std)
        patches = F.unfold(inputs, kernel, padding=padding, stride=stem.stride)
        side = int(patches.shape[-1] ** 0.5)
        if target.shape[-1] != side:
            raise InputError(
                f"network.align_stem: the pretrained convolution ends at {target.shape[-1]} px, "
                f"this one at {side} px; set network.stem_stride so that they agree"
            )
        rows = patches.transpose(1, 2).reshape(-1, columns - 1).double()
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        wanted = target.flatten(2).transpose(1, 2).reshape(-1, stem.out_channels).double()
        gram += rows.T @ rows
        cross += rows.T @ wanted
        total += wanted.sum(0)
        square += wanted.square().sum(0)
        count += len(rows)
    scale = gram.diagonal().mean()
    solution = torch.linalg.solve(
        gram + RIDGE * scale * torch.eye(columns, dtype=torch.float64), cross
    )
    stem.weight.copy_(solution[:-1].T.reshape(stem.weight.shape).float())
    constant = solution[-1].float()
    if stem.bias is not None:
        stem.bias.copy_(constant)
    else:
        norm = _norm_after(network.backbone, stem)
        if norm is not None and norm.running_mean is not None:
            norm.running_mean.sub_(constant)  # what it subtracts, less the constant
    residual = square - 2 * (solution * cross).sum(0) + (solution * (gram @ solution)).sum(0)
    variance = square - total.square() / count
    return float(1 - residual.sum() / variance.sum())


def _norm_after(backbone: nn.Module, stem: nn.Conv2d) -> nn.BatchNorm2d | None:
    """Return the batch normalisation that follows the first convolution, if one does."""
    modules = list(backbone.modules())
    position = next(i for i, module in enumerate(modules) if module is stem)
    for module in modules[position + 1 :]:
        if isinstance(module, nn.BatchNorm2d):
            return module
        if isinstance(module, nn.Conv2d):
            return None
    return None


@torch.no_grad()
def project_features(
    network: SiameseNetwork, teacher: Teacher, batches: Iterator[torch.Tensor]
) -> None:
    """Start from the pretrained backbone's own notion of likeness.

    The projection becomes the teacher's, centred on what this network makes of latents, and the
    head a plain negative L1 distance. A random head starts with signs that training has to unlearn
    first.

    Args:
        network: projection and head are replaced in place; its mode is kept.
        teacher: fitted to the training images.
        batches: raw latents ``[B, C, h, w]``, some hundred in all.
    """
    backbone: Any = network.backbone
    projection = backbone.get_classifier()
    if not isinstance(projection, nn.Linear):
        raise InputError(
            "network.align_stem: this backbone does not end in one linear layer; leave it 0"
        )
    projection.weight.copy_(teacher.start)
    nn.init.zeros_(projection.bias)
    was_training = network.training
    network.eval()
    outputs = torch.cat(
        [
            network.backbone(
                normalise(latents, network.spec.normalisation, mean=network.mean, std=network.std)
            )
            for latents in batches
        ]
    )
    network.train(was_training)
    projection.bias.copy_(-outputs.mean(dim=0))
    network.measure_distance()
