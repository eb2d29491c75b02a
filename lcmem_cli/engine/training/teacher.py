"""The pretrained backbone as a teacher: what it knows about pixels must not be lost in training.

Fine-tuning on a few thousand images makes features that fit their data sets and no others. The
teacher names the direction in which each training image's feature should stay: the pretrained
backbone's own feature of the clean image, whitened, and centred within its data set, so that what
all images of a data set share does not count. An altered copy is held to the target of its clean
image.

Idea: feature distillation, Hinton et al. 2015, arXiv 1503.02531.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.config import RetentionSection
from lcmem_cli.engine.data.augment import NONE, Augmentation
from lcmem_cli.engine.data.loading import Transform, iter_readable
from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.errors import CheckpointError, InputError
from lcmem_cli.engine.files import atomic_path
from lcmem_cli.engine.models.siamese import TwoLevelBackbone, load_strictly, resolve_backbone
from lcmem_cli.engine.models.weights import read_state_dict, rename_by_order
from lcmem_cli.engine.models.whitening import (
    FLOOR,
    level_scales,
    principal_axes,
    spread,
    whitened_projection,
)

TEACHER_NAME = "teacher.safetensors"
MIN_DATASET = 60
"""Images that a data set needs for its own standard deviations."""
_BATCH = 32
_MEAN, _PROJECTION, _START, _HEADER = "mean", "projection", "start", "teacher"


class _Header(pydantic.BaseModel):
    """What a teacher's file says about its tensors."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    backbones: list[str] = pydantic.Field(min_length=1)
    inner_stride: int | None
    inner_bands: int | None


def load_pretrained(backbone: str, path: Path) -> nn.Module:
    """Build a timm model with its own input and classifier, and load weights from a file.

    Files whose keys carry other names but whose tensors have the same shapes in the same order are
    accepted.

    Args:
        backbone: a timm name, or the paper's.
        path: state dict.

    Raises:
        CheckpointError: the weights are of another model.
    """
    import timm

    model: nn.Module = timm.create_model(resolve_backbone(backbone), pretrained=False)
    state = rename_by_order(read_state_dict(path), model.state_dict())
    load_strictly(model, state, source=str(path))
    return model.eval()


def normalise_pixels(pretrained: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Bring images ``[B, 3, H, W]`` in [0, 1] to the mean and deviation of the pretraining."""
    model: Any = pretrained
    mean, std = (images.new_tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    return (images - mean[:, None, None]) / std[:, None, None]


@dataclasses.dataclass(frozen=True)
class Member:
    """One pretrained backbone of a teacher.

    Attributes:
        backbone: timm name.
        model: the backbone on pixels, in evaluation mode.
        image_size: side in pixels of its input.
        inner_stride: of the earlier stage that it also shows, as ``NetworkSpec.inner_stride``.
        inner_bands: as ``NetworkSpec.inner_bands``.
    """

    backbone: str
    model: nn.Module
    image_size: int
    inner_stride: int | None
    inner_bands: int | None

    @staticmethod
    def of(
        backbone: str,
        model: nn.Module,
        inner_stride: int | None = None,
        inner_bands: int | None = None,
    ) -> Member:
        """Return a frozen member at the image size of its pretraining."""
        timm_model: Any = model.eval().requires_grad_(False)
        size = int(timm_model.pretrained_cfg["input_size"][-1])
        return Member(backbone, model, size, inner_stride, inner_bands)

    @torch.inference_mode()
    def pool(
        self,
        paths: Sequence[Path],
        compute: Compute = DEFAULT_COMPUTE,
        *,
        transform: Transform | None = None,
    ) -> list[torch.Tensor]:
        """Return the backbone's pooled features of images, by level, on the CPU.

        Args:
            paths: the images.
            compute: its threads and processes share the work.
            transform: gets an image and its position in ``paths``, and alters it.

        Returns:
            ``[N, d]`` float32; with ``inner_stride`` those of ``TwoLevelBackbone``.

        Raises:
            InputError: an image cannot be read.
        """
        ranks = compute.ranks
        mine = ranks.share(list(paths))
        device = next(self.model.parameters()).device
        features, widths = self._features()
        transform = None if transform is None else _counting_all(transform, ranks)
        batches = iter_readable(
            mine, self.image_size, task_name=f"features of {self.backbone}",
            workers=compute.num_workers, batch_size=_BATCH, transform=transform,
            reporter=compute.reporter,
        )  # fmt: skip
        parts: list[torch.Tensor] = []
        for images in batches:
            pixels = normalise_pixels(self.model, images.to(device))
            if device.type == "cpu":
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            parts.append(features(pixels).float().cpu())
        # Process r has every size-th image from the r-th on, so its rows go back to these places.
        gathered = ranks.gather(torch.cat(parts).numpy() if parts else None)
        known = [part for part in gathered if part is not None]
        whole: NDArray[np.float32] = np.empty((len(paths), known[0].shape[1]), dtype=np.float32)
        for rank, part in enumerate(gathered):
            if part is not None:
                whole[rank :: ranks.size] = part
        return list(torch.split(torch.from_numpy(whole), widths or whole.shape[1], dim=1))

    def _features(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[int]]:
        """Return what computes all levels side by side, and their widths if there are several."""
        if self.inner_stride is not None:
            levels = TwoLevelBackbone(self.model, self.inner_stride, None, self.inner_bands)
            levels.eval()
            return levels, levels.widths
        model: Any = self.model
        return lambda pixels: model.forward_head(
            model.forward_features(pixels), pre_logits=True
        ), []


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Pretrained backbones, and the projections of their features.

    The first member is the student's own backbone. Others make the targets better than any one of
    them is; their part is turned so that the targets lie as near as can be to where the student
    starts.

    Attributes:
        members: the backbones; the first is the one that the student is made of.
        mean: of their pooled features, levels and members side by side, over the images that it
            was fitted on, ``[d]``.
        projection: ``[n, d]``: whitens, turns, and scales to ``SPREAD``.
        start: ``[n, d_0]``: the same for the first member alone, turned at random.
    """

    members: tuple[Member, ...]
    mean: torch.Tensor
    projection: torch.Tensor
    start: torch.Tensor

    @staticmethod
    def fit(
        members: Sequence[Member],
        paths: Sequence[Path],
        *,
        num_features: int,
        seed: int,
        altered: Augmentation = NONE,
        compute: Compute = DEFAULT_COMPUTE,
    ) -> tuple[Teacher, torch.Tensor]:
        """Fit the projections to images: principal component analyses with a floor.

        With ``altered`` the student's start also sees how an altered copy of each image differs
        from it, see ``whitened_projection``.

        Args:
            members: the student's backbone first.
            paths: training images, more than a few hundred.
            num_features: rows of the projections.
            seed: of the rotation and the edits.
            altered: edits of the copies.
            compute: how the images are read.

        Returns:
            The teacher, and the images' pooled features ``[N, d]``.
        """
        levels = [member.pool(paths, compute) for member in members]
        widths = [[level.shape[1] for level in member] for member in levels]
        own = sum(widths[0])
        pooled = torch.cat([level for member in levels for level in member], dim=1)
        changes = None
        if altered.edits:
            transform = altered.drawn(len(paths), seed)
            copies = torch.cat(members[0].pool(paths, compute, transform=transform), dim=1)
            changes = copies - pooled[:, :own]
        start = whitened_projection(
            pooled[:, :own], widths[0], num_features=num_features, seed=seed, changes=changes
        )
        mean = pooled.mean(dim=0)
        projection = start
        if len(members) > 1:
            centred = (pooled - mean).double()
            scales = level_scales(centred, [width for member in widths for width in member])
            joint = principal_axes(centred * scales, num_features)
            # The nearest rotation (orthogonal Procrustes, Schönemann 1966).
            left, _, right = torch.linalg.svd(
                (centred[:, :own] @ start.T).T @ (centred * scales @ joint.T), full_matrices=False
            )
            projection = spread(left @ right @ joint * scales, centred)
        return Teacher(tuple(members), mean, projection.float(), start.float()), pooled

    def pool(self, paths: Sequence[Path], compute: Compute = DEFAULT_COMPUTE) -> torch.Tensor:
        """Return the members' pooled features of images side by side, ``[N, d]``, on the CPU.

        Raises:
            InputError: an image cannot be read.
        """
        levels = [level for member in self.members for level in member.pool(paths, compute)]
        return torch.cat(levels, dim=1)

    def to(self, device: str | torch.device) -> Teacher:
        """Move the backbones to a device."""
        for member in self.members:
            member.model.to(device)
        return self

    def targets(self, pooled: torch.Tensor, records: Sequence[Record]) -> torch.Tensor:
        """Return the direction in which each image's pre-sigmoid features should lie.

        Args:
            pooled: ``[N, d]``, from ``pool``.
            records: one a row, for its data set.

        Returns:
            ``[N, n]``: projected, then centred and (in data sets of at least ``MIN_DATASET``
            images) brought to one standard deviation within each data set; rows of length 1.
        """
        projected = (pooled - self.mean) @ self.projection.T
        overall = projected.std(dim=0)
        names = np.asarray([record.ds_name or "" for record in records])
        for name in np.unique(names):
            rows = torch.from_numpy(np.flatnonzero(names == name))
            part = projected[rows]
            part = part - part.mean(dim=0)
            if len(rows) >= MIN_DATASET:
                part = part / (part.std(dim=0) + FLOOR * overall)
            projected[rows] = part
        return F.normalize(projected, dim=1)

    def retention(
        self, section: RetentionSection, pooled: torch.Tensor, records: Sequence[Record]
    ) -> Retention | None:
        """Return the loss that holds a network to this teacher, ``None`` where it is off.

        Args:
            section: weights and temperature.
            pooled: ``[N, d]``, of all TRAIN images: pairs name them by their rows, and each is told
                from all the others.
            records: one a row.
        """
        if not section.weight:
            return None
        return Retention(
            self.targets(pooled, records),
            records,
            weight=section.weight,
            instance_weight=section.instance_weight,
            temperature=section.temperature,
        )

    def save(self, path: Path) -> None:
        """Write the teacher, with its backbones, to one ``.safetensors`` file."""
        from safetensors.torch import save_file

        tensors = {
            f"{number}.{key}": value.cpu().contiguous()
            for number, member in enumerate(self.members)
            for key, value in member.model.state_dict().items()
        }
        tensors |= {
            _MEAN: self.mean,
            _PROJECTION: self.projection.contiguous(),
            _START: self.start.contiguous(),
        }
        header = {
            "backbones": [member.backbone for member in self.members],
            "inner_stride": self.members[0].inner_stride,
            "inner_bands": self.members[0].inner_bands,
        }
        # One key: safetensors writes several in any order, and a run is known by the file's hash.
        with atomic_path(path) as temporary:
            save_file(tensors, str(temporary), metadata={_HEADER: json.dumps(header)})

    @staticmethod
    def load(path: Path) -> Teacher:
        """Read what ``save`` wrote.

        Raises:
            InputError: no such file.
            CheckpointError: not a teacher's file.
        """
        import timm
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise InputError(
                f"{path}: no such teacher; train-stage1 writes {TEACHER_NAME} into its folder "
                "where network.align_stem is on. Name the file with --set retention.teacher=FILE, "
                "or switch retention off"
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                header = _Header.model_validate_json((file.metadata() or {})[_HEADER])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            mean, projection, start = (tensors.pop(k) for k in (_MEAN, _PROJECTION, _START))
            if projection.ndim != 2 or mean.shape != projection.shape[1:]:
                raise ValueError("mean and projection do not fit")
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a teacher's file: {error}") from error
        names = [resolve_backbone(name) for name in header.backbones]
        members = []
        for number, name in enumerate(names):
            model: nn.Module = timm.create_model(name, pretrained=False)
            prefix = f"{number}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            load_strictly(model, state, source=f"{path}, {name}")
            members.append(Member.of(name, model, header.inner_stride, header.inner_bands))
        return Teacher(tuple(members), mean, projection, start)


def _counting_all(transform: Transform, ranks: Ranks) -> Transform:
    """Return a transform for this process's share of the images that ``transform`` counts."""
    return lambda image, number: transform(image, ranks.rank + ranks.size * number)


class Retention:
    """Holds a batch's features near the teacher's targets.

    Args:
        targets: of all training images, ``[N, n]``, rows of length 1.
        records: of the same images; images of one identity are no negatives of each other.
        weight: of ``1 - cosine`` between pre-sigmoid features and targets, mean over both images.
        instance_weight: of the cross-entropy that finds the second image's target among those of
            all training images.
        temperature: divides the cosines of that cross-entropy.
    """

    def __init__(
        self,
        targets: torch.Tensor,
        records: Sequence[Record],
        *,
        weight: float,
        instance_weight: float,
        temperature: float,
    ) -> None:
        numbers: dict[tuple[str, str], int] = {}
        identity = [numbers.setdefault(r.identity, len(numbers)) for r in records]
        self.targets = targets
        self.identity = torch.tensor(identity)
        self.weight, self.instance_weight = weight, instance_weight
        self.temperature = temperature

    def to(self, device: torch.device) -> Retention:
        """Move the targets to a device."""
        self.targets, self.identity = self.targets.to(device), self.identity.to(device)
        return self

    def __call__(
        self,
        features_a: torch.Tensor,
        features_b: torch.Tensor,
        first: NDArray[np.int64],
        second: NDArray[np.int64],
    ) -> torch.Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            features_a: ``[B, n]`` in [0, 1].
            features_b: ``[B, n]`` in [0, 1], of altered images.
            first: rows of the first images among all training images, ``[B]``.
            second: the same of the second images.
        """
        rows_a = torch.from_numpy(first).to(self.targets.device)
        rows_b = torch.from_numpy(second).to(self.targets.device)
        # The sigmoid's inverse; its floor is below any value that float32 features reach.
        before_a = F.normalize(torch.logit(features_a, eps=1e-6), dim=1)
        before_b = F.normalize(torch.logit(features_b, eps=1e-6), dim=1)
        likeness = torch.cat([before_a, before_b]) * self.targets[torch.cat([rows_a, rows_b])]
        loss = self.weight * (1 - likeness.sum(dim=1)).mean()
        if self.instance_weight:
            cosines = before_b @ self.targets.T / self.temperature
            relatives = self.identity[rows_b][:, None] == self.identity[None]
            relatives[torch.arange(len(rows_b)), rows_b] = False
            cosines = cosines.masked_fill(relatives, -torch.inf)
            loss = loss + self.instance_weight * F.cross_entropy(cosines, rows_b)
        return loss
