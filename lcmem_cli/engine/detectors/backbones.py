"""Backbones compared by the cosine of their features: timm models, pretrained or random."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.base import Detector, FloatArray
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import InputError, WeightsUnavailableError, nearest
from lcmem_cli.engine.models.siamese import load_strictly
from lcmem_cli.engine.models.weights import read_state_dict

RANDOM_BACKBONE = "resnet18"
_RANDOM_SEED = 0


class CosineDetector(Detector):
    """Cosine of the pooled features of a timm model.

    Args:
        name: how the user named it.
        model: a timm model without classifier, in evaluation mode.
        device: torch device string.
    """

    def __init__(self, name: str, model: Any, *, device: str) -> None:
        import timm.data

        self.name = name
        config = timm.data.resolve_model_data_config(model)
        self.input_size = int(config["input_size"][-1])
        self.num_features = int(model.num_features)
        self.device = torch.device(device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        if self.device.type == "cpu":
            self.model = self.model.to(memory_format=torch.channels_last)
        self.mean = torch.tensor(config["mean"]).reshape(1, 3, 1, 1)
        self.std = torch.tensor(config["std"]).reshape(1, 3, 1, 1)
        digest = hashlib.sha256(f"{name.partition('?')[0]}/{self.input_size}".encode())
        digest.update(repr((config["mean"], config["std"])).encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    @torch.inference_mode()
    def embed_batch(self, batch: torch.Tensor) -> NDArray[np.float32]:
        """Return features of length 1: float32 ``[n, num_features]``."""
        inputs = ((batch - self.mean) / self.std).to(self.device)
        if self.device.type == "cpu":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        features = torch.nn.functional.normalize(self.model(inputs).float(), dim=1)
        result: NDArray[np.float32] = features.cpu().numpy()
        return result

    def score_features(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Return the cosine of row i with row i, ``[n]`` in [-1, 1]."""
        scores: NDArray[np.float64] = np.einsum(
            "nd,nd->n", a.astype(np.float64), b.astype(np.float64)
        )
        return scores

    def score_matrix(self, a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
        """Return the cosine of every row with every row, ``[n, m]``."""
        scores: NDArray[np.float64] = a.astype(np.float64) @ b.astype(np.float64).T
        return scores


def random_backbone(*, device: str = "auto") -> CosineDetector:
    """Return a network with random weights, the same ones in every run."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        model = timm.create_model(RANDOM_BACKBONE, pretrained=False, num_classes=0)
    return CosineDetector("random", model, device=resolve_device(device))


def timm_backbone(model_name: str, *, device: str = "auto") -> CosineDetector:
    """Return a pretrained timm model.

    Args:
        model_name: a timm name, and perhaps ``?weights=FILE`` with a state dict of that model
            (its classifier included), which needs no hub.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Raises:
        InputError: timm does not know the model, or an unknown option.
        WeightsUnavailableError: not cached, and the hub cannot be reached.
        CheckpointError: the file is of another model.
    """
    import timm

    name, _, options = model_name.partition("?")
    if not timm.is_model(name.partition(".")[0]):
        raise InputError(f"timm has no model '{name}'; {nearest(name, timm.list_models())}")
    key, _, file = options.partition("=")
    if options and (key != "weights" or not file):
        raise InputError(f"timm:{model_name}: the only option is ?weights=FILE")
    if file:
        model = timm.create_model(name, pretrained=False)
        state = read_state_dict(Path(file))
        expected = model.state_dict()
        if set(state) != set(expected) and [v.shape for v in state.values()] == [
            v.shape for v in expected.values()
        ]:
            state = dict(zip(expected, state.values(), strict=True))
        load_strictly(model, state, source=file)
        model.reset_classifier(0)
    else:
        try:
            model = timm.create_model(name, pretrained=True, num_classes=0)
        except (OSError, RuntimeError, ValueError) as error:
            raise WeightsUnavailableError(
                f"timm:{name}: its weights are not in the local cache and the hub could not be "
                f"reached; fetch them on a machine with internet, then: timm:{name}?weights=FILE"
            ) from error
    return CosineDetector(f"timm:{model_name}", model, device=resolve_device(device))
