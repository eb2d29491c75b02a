"""Fitting the last layer of a checkpoint's network to images, in closed form.

Two ways: ``adapt`` fits it to one kind of images, ``Whitening`` to many with known identities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.data.augment import Augmentation
from lcmem_cli.engine.data.loading import Transform, hash_files, iter_readable
from lcmem_cli.engine.data.manifest import Manifest
from lcmem_cli.engine.detectors.adapted import MIN_IMAGES, picture_weights, shrunk_whitening
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.models.checkpoint import Checkpoint
from lcmem_cli.engine.models.codec_loading import load_codec_of
from lcmem_cli.engine.models.siamese import SiameseNetwork
from lcmem_cli.engine.models.whitening import whitened_projection

_BATCH = 32
_ALTERED = "strong"
FEWEST_IMAGES = 2
"""Images that a last layer can be fitted to."""
_WHITEN_FLOOR = 0.02
"""As ``whitened_projection``'s ``floor``; lower than a training's start, which stays in motion."""


def adapt(
    checkpoint: Checkpoint, manifest: Manifest, compute: Compute = DEFAULT_COMPUTE
) -> Checkpoint:
    """Return a checkpoint whose last layer is adapted to one kind of images.

    Nearly what ``detectors.adapted`` does to features of one length, done once and for all to the
    layer that makes them, before they have one length: they are centred, and the directions in
    which they differ most are made smaller. The images' identities are not used.

    Args:
        checkpoint: its backbone ends in a linear layer with a bias, which is changed.
        manifest: images of the kind, ten or more.
        compute: how the images are read.

    Raises:
        InputError: too few images, one that cannot be read, or another kind of backbone.
    """
    if len(manifest.records) < MIN_IMAGES:
        raise InputError(
            f"{len(manifest.records)} TRAIN images are too few to adapt to; {MIN_IMAGES} or more "
            "are needed"
        )
    contents = hash_files(manifest.paths(), compute)[0]
    last = LastLayer(checkpoint, compute)
    inputs = last.inputs(manifest, contents=contents).double()
    weight, bias = (checkpoint.network_state[f"{last.name}.{key}"] for key in ("weight", "bias"))
    outputs = (inputs @ weight.double().T + bias.double()).numpy()
    weights = picture_weights(outputs / np.linalg.norm(outputs, axis=1, keepdims=True))
    centre, matrix = map(torch.from_numpy, shrunk_whitening(outputs, weights))
    replaced = {
        f"{last.name}.weight": (matrix @ weight.double()).to(weight),
        f"{last.name}.bias": (matrix @ (bias.double() - centre)).to(bias),
    }
    training = {
        **checkpoint.training,
        "adapted": {"data_digest": manifest.digest, "num_images": len(manifest)},
    }
    return checkpoint.changed(
        network_state=checkpoint.network_state | replaced,
        training=training,
        adapted_to=tuple(sorted({*filter(None, contents), *checkpoint.adapted_to})),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whitening:
    """Fits a last layer that gives the whitened principal components of its input.

    In closed form, to images and one altered copy of each (augmentation ``strong``): what edits
    change and what sets images of one identity apart counts less, see ``whitened_projection``.
    The head becomes a plain distance.

    Attributes:
        checkpoint: its last layer is to be replaced; its head is the plain distance.
        layer: name of that layer.
        widths: columns of each level of its inputs.
        manifest: the images.
        pooled: the layer's inputs of the images, ``[N, d]``.
        changes: how those of an altered copy of each image differ, ``[N, d]``.
        seed: of the copies, and of the turn of the components.
    """

    checkpoint: Checkpoint
    layer: str
    widths: tuple[int, ...]
    manifest: Manifest
    pooled: torch.Tensor
    changes: torch.Tensor
    seed: int

    @staticmethod
    def of(
        checkpoint: Checkpoint,
        manifest: Manifest,
        compute: Compute = DEFAULT_COMPUTE,
        *,
        inner_bands: int | None = None,
        seed: int = 0,
    ) -> Whitening:
        """Compute what the last layer is given for all images.

        Args:
            checkpoint: its backbone ends in a linear layer with a bias.
            manifest: images of the domain, more than there are features. Where each has an
                identity of its own, only their edits count less.
            compute: how the images are read.
            inner_bands: let the backbone show so many bands as well, see ``TwoLevelBackbone``;
                ``None`` keeps what it shows.
            seed: of the copies, and of the turn of the components.

        Raises:
            InputError: fewer than two images, one that cannot be read, or another kind of backbone.
        """
        if len(manifest.records) < FEWEST_IMAGES:
            raise InputError(f"{len(manifest.records)} TRAIN images are too few to whiten on")
        if inner_bands is not None:
            checkpoint = _with_bands(checkpoint, inner_bands)
        last = LastLayer(checkpoint, compute)
        network = last.network
        network.measure_distance()
        state = checkpoint.network_state
        head = {f"head.{key}": value for key, value in network.head.state_dict().items()}
        head = {key: value.cpu().to(state[key]) for key, value in head.items()}
        pooled = last.inputs(manifest)
        edits = Augmentation.from_preset(_ALTERED).drawn(len(pooled), seed)
        altered = last.inputs(manifest, transform=edits)
        return Whitening(
            checkpoint=dataclasses.replace(checkpoint, network_state=state | head),
            layer=last.name,
            widths=tuple(getattr(network.backbone, "widths", [pooled.shape[1]])),
            manifest=manifest,
            pooled=pooled,
            changes=altered - pooled,
            seed=seed,
        )

    def fitted(self, *, without: str | None = None) -> Checkpoint:
        """Return the checkpoint with the last layer of all images, or of all but one data set.

        Raises:
            InputError: fewer than two images are left.
        """
        records = self.manifest.records
        rows = [row for row, r in enumerate(records) if without is None or r.ds_name != without]
        if len(rows) < FEWEST_IMAGES:
            raise InputError(f"{len(rows)} TRAIN images without data set {without} are too few")
        numbers: dict[tuple[str, str], int] = {}
        pooled, checkpoint = self.pooled[rows], self.checkpoint
        projection = whitened_projection(
            pooled,
            self.widths,
            num_features=checkpoint.network.num_features,
            seed=self.seed,
            changes=self.changes[rows],
            identities=[numbers.setdefault(records[r].identity, len(numbers)) for r in rows],
            floor=_WHITEN_FLOOR,
        )
        replaced = {
            f"{self.layer}.weight": projection,
            f"{self.layer}.bias": -(projection @ pooled.mean(dim=0).double()),
        }
        state = checkpoint.network_state
        state = state | {k: value.to(state[k]) for k, value in replaced.items()}
        training = {
            **{key: value for key, value in checkpoint.training.items() if key != "adapted"},
            "whitened": {
                "data_digest": self.manifest.digest,
                "num_images": len(rows),
                "num_identities": len(numbers),
                "altered": _ALTERED,
                "seed": self.seed,
            },
        }
        return checkpoint.changed(network_state=state, training=training, adapted_to=())


def _with_bands(checkpoint: Checkpoint, inner_bands: int) -> Checkpoint:
    """Return a checkpoint that shows bands, with random weights in the layer that reads them."""
    if checkpoint.network.inner_stride is None:
        raise InputError("--bands: the checkpoint's network reads no earlier stage (inner_stride)")
    spec = dataclasses.replace(checkpoint.network, inner_bands=inner_bands)
    network = SiameseNetwork(spec)
    layer = _last_layer(network)
    state = {
        key: network.state_dict()[key] if key.startswith(f"{layer}.") else value
        for key, value in checkpoint.network_state.items()
    }
    return dataclasses.replace(checkpoint, network=spec, network_state=state)


class LastLayer:
    """The linear layer that a checkpoint's backbone ends in.

    Args:
        checkpoint: whose it is.
        compute: where to compute, and how images are read.

    Attributes:
        network: the checkpoint's, as it was trained.
        name: of the layer among the network's modules.

    Raises:
        InputError: the backbone ends in another way.
    """

    def __init__(self, checkpoint: Checkpoint, compute: Compute) -> None:
        where = resolve_device(compute.device)
        self._compute = compute
        self.network = checkpoint.build().to(where)
        self.name = _last_layer(self.network)
        self._codec = load_codec_of(checkpoint, source="checkpoint", device=where)
        self._image_size = checkpoint.image_size

    @torch.inference_mode()
    def inputs(
        self,
        manifest: Manifest,
        *,
        transform: Transform | None = None,
        contents: Sequence[str | None] | None = None,
    ) -> torch.Tensor:
        """Return what the layer is given for each image, ``[N, d]`` float32 on the CPU.

        Args:
            manifest: the images.
            transform: what is done to each.
            contents: SHA-256 that each file had before.

        Raises:
            InputError: an image cannot be read, or has changed.
        """
        seen: list[torch.Tensor] = []
        hook = self.network.get_submodule(self.name).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].float().cpu())
        )
        batches = iter_readable(
            manifest.paths(),
            self._image_size,
            task_name="features" if transform is None else "features of altered copies",
            workers=self._compute.num_workers,
            batch_size=_BATCH,
            transform=transform,
            expected=contents,
            reporter=self._compute.reporter,
        )
        for images in batches:
            self.network(self._codec.encode(images))
        hook.remove()
        return torch.cat(seen)


def _last_layer(network: SiameseNetwork) -> str:
    """Return the name of the linear layer that the backbone ends in.

    Raises:
        InputError: it ends in another way.
    """
    backbone: Any = network.backbone
    last = backbone.get_classifier()
    if not isinstance(last, nn.Linear) or last.bias is None:
        raise InputError(
            f"backbone {network.spec.backbone} does not end in one linear layer with a bias that "
            "could be fitted"
        )
    name: str = next(name for name, module in network.named_modules() if module is last)
    return name
