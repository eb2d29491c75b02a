"""The pretrained backbone as a teacher: what it knows about pixels must not be lost in training.

Fine-tuning on a few thousand images makes features that fit their data sets and no others. The
teacher names the direction in which each training image's feature should stay: the pretrained
backbone's own feature of the clean image, whitened, and centred within its data set, so that what
all images of a data set share does not count. An altered copy is held to the target of its clean
image.

Idea: feature distillation, Hinton et al. 2015, arXiv 1503.02531; whitening of features before
distances, Jégou & Chum 2012, doi 10.1007/978-3-642-33709-3_55.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from lcmem_cli.engine.data.loading import iter_images
from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.errors import CheckpointError, InputError
from lcmem_cli.engine.files import atomic_path
from lcmem_cli.engine.models.siamese import load_strictly, resolve_backbone
from lcmem_cli.engine.models.weights import read_state_dict, rename_by_order
from lcmem_cli.engine.reporter import SILENT, Reporter

TEACHER_NAME = "teacher.safetensors"
FLOOR = 0.1
"""Added to every principal axis' standard deviation, relative to the largest, when whitening."""
SPREAD = 2.5
"""Standard deviation of a projected feature: most of the sigmoid's range, where the L1 distance of
two features orders pairs much as the angle between them does."""
MIN_DATASET = 60
"""Images that a data set needs for its own standard deviations."""
_BATCH = 32
_BACKBONE, _PROJECTION, _MEAN = "backbone.", "projection", "mean"


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


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A pretrained backbone and the projection of its features that the student starts with.

    Attributes:
        backbone: timm name.
        model: the backbone on pixels, in evaluation mode.
        image_size: side in pixels of its input.
        mean: of its pooled features over the images that it was fitted on, ``[d]``.
        projection: ``[n, d]``: whitens, turns by a random rotation, and scales to ``SPREAD``.
    """

    backbone: str
    model: nn.Module
    image_size: int
    mean: torch.Tensor
    projection: torch.Tensor

    @staticmethod
    def fit(
        backbone: str,
        model: nn.Module,
        paths: Sequence[Path],
        *,
        num_features: int,
        seed: int,
        workers: int = 1,
        ranks: Ranks | None = None,
        reporter: Reporter = SILENT,
    ) -> tuple[Teacher, torch.Tensor]:
        """Fit the projection to images: a principal component analysis with a floor.

        Args:
            backbone: timm name of ``model``.
            model: see ``load_pretrained``.
            paths: training images, more than a few hundred.
            num_features: rows of the projection.
            seed: of the rotation.
            workers: decoding threads.
            ranks: processes that share the work.
            reporter: receives progress.

        Returns:
            The teacher, and the images' pooled features ``[N, d]``.
        """
        model = model.eval().requires_grad_(False)
        timm_model: Any = model
        image_size = int(timm_model.pretrained_cfg["input_size"][-1])
        blank = Teacher(backbone, model, image_size, torch.empty(0), torch.empty(0))
        pooled = blank.pool(paths, workers=workers, ranks=ranks, reporter=reporter)
        mean = pooled.mean(dim=0)
        centred = (pooled - mean).double()
        rank = min(num_features, len(pooled) - 1, pooled.shape[1])
        _, deviations, axes = torch.linalg.svd(
            centred / max(1, len(centred) - 1) ** 0.5, full_matrices=False
        )
        deviations, axes = deviations[:rank], axes[:rank]
        generator = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(
            torch.randn(num_features, rank, generator=generator, dtype=torch.float64)
        )[0]
        projection = turn @ (axes / (deviations + FLOOR * deviations[0])[:, None])
        spread = (centred @ projection.T).std(dim=0).clamp_min(1e-12)
        projection = projection * (SPREAD / spread)[:, None]
        return dataclasses.replace(blank, mean=mean, projection=projection.float()), pooled

    @torch.inference_mode()
    def pool(
        self,
        paths: Sequence[Path],
        *,
        workers: int = 1,
        ranks: Ranks | None = None,
        reporter: Reporter = SILENT,
    ) -> torch.Tensor:
        """Return the backbone's pooled features of images, ``[N, d]`` float32, on the CPU.

        Raises:
            InputError: an image cannot be read.
        """
        ranks = ranks or Ranks()
        mine = ranks.share(list(paths))
        device = next(self.model.parameters()).device
        backbone: Any = self.model
        config = backbone.pretrained_cfg
        mean = torch.tensor(config["mean"], device=device)[:, None, None]
        std = torch.tensor(config["std"], device=device)[:, None, None]
        parts: list[torch.Tensor] = []
        with reporter.task("teacher's features", len(mine), unit="image") as task:
            for batch in iter_images(mine, self.image_size, workers=workers, batch_size=_BATCH):
                for position, reason in batch.unreadable:
                    raise InputError(f"{mine[position]}: {reason}")
                pixels = (batch.images.to(device) - mean) / std
                if device.type == "cpu":
                    pixels = pixels.contiguous(memory_format=torch.channels_last)
                maps = backbone.forward_features(pixels)
                parts.append(backbone.forward_head(maps, pre_logits=True).float().cpu())
                task.advance(len(batch.images))
        gathered = ranks.gather(torch.cat(parts).numpy() if parts else None)
        known = [part for part in gathered if part is not None]
        whole: NDArray[np.float32] = np.empty((len(paths), known[0].shape[1]), dtype=np.float32)
        for rank, part in enumerate(gathered):
            if part is not None:
                whole[rank :: ranks.size] = part
        return torch.from_numpy(whole)

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

    def save(self, path: Path) -> None:
        """Write the teacher, with its backbone, to one ``.safetensors`` file."""
        from safetensors.torch import save_file

        tensors = {_BACKBONE + k: v.cpu().contiguous() for k, v in self.model.state_dict().items()}
        tensors |= {_MEAN: self.mean, _PROJECTION: self.projection.contiguous()}
        with atomic_path(path) as temporary:
            save_file(
                tensors,
                str(temporary),
                metadata={"backbone": self.backbone, "image_size": str(self.image_size)},
            )

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
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            backbone, image_size = metadata["backbone"], int(metadata["image_size"])
            mean, projection = tensors.pop(_MEAN), tensors.pop(_PROJECTION)
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: not a teacher's file: {error}") from error
        model: nn.Module = timm.create_model(resolve_backbone(backbone), pretrained=False)
        state = {key.removeprefix(_BACKBONE): value for key, value in tensors.items()}
        load_strictly(model, state, source=str(path))
        return Teacher(backbone, model.eval().requires_grad_(False), image_size, mean, projection)


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
