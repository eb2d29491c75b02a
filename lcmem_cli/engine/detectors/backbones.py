"""Networks compared by the likeness of their features, and where their weights come from.

The list of them is that of the benchmark in arXiv 2512.14421.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.detectors.kinds import Request
from lcmem_cli.engine.detectors.vectors import Likeness, NetworkDetector, Preprocessing
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import (
    CheckpointError,
    InputError,
    MissingExtraError,
    WeightsUnavailableError,
    nearest,
)
from lcmem_cli.engine.models.siamese import load_strictly
from lcmem_cli.engine.models.weights import (
    LEVELS,
    cached_weights,
    hub_answers,
    read_state_dict,
    rename_by_order,
)
from lcmem_cli.engine.precision import (
    CHANNELS_LAST,
    Precision,
    computing_in,
    fingerprint_in,
    to_device,
)

RANDOM_BACKBONE = "resnet18"
DATA2VEC_HUB_ID = "facebook/data2vec-vision-base"
_DATA2VEC_FILE = "data2vec:FOLDER"
_RANDOM_SEED = 0
_COMPARED_BY_PROJECTION = ("clip",)  # whose last layer is what CLIP compares images by
_AUXILIARY = ("AuxLogits.",)  # only used while training an Inception network


class TorchDetector(NetworkDetector):
    """A torch module whose outputs are compared.

    Args:
        model: takes a normalised batch, returns ``[n, d]``.
        request: brings name and device.
        identity: names the architecture; part of the fingerprint.
        preprocessing: of the input.
        likeness: how two outputs are compared.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        request: Request,
        *,
        identity: str,
        preprocessing: Preprocessing,
        likeness: Likeness = "cosine",
    ) -> None:
        self.device = torch.device(resolve_device(request.device))
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.precision: Precision = request.options.get("precision", "fp32")
        if self.device.type in CHANNELS_LAST:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.preprocessing = preprocessing
        probe = torch.full((1, 3, preprocessing.size, preprocessing.size), 0.5)
        digest = hashlib.sha256(f"{identity}/{preprocessing}/{likeness}".encode())
        _hash_state(digest, self.model)
        super().__init__(
            name=request.name,
            fingerprint=fingerprint_in(self.precision, digest.hexdigest()),
            preprocessing=preprocessing,
            num_features=int(self.forward(probe).shape[-1]),
            likeness=likeness,
        )

    @torch.inference_mode()
    def forward(self, batch: torch.Tensor) -> Any:
        """Run the network: ``[n, 3, size, size]`` in [0, 1] to ``[n, num_features]``."""
        inputs = self.preprocessing.apply(to_device(batch, self.device))
        if self.device.type in CHANNELS_LAST:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with computing_in(self.precision, self.device):
            return self.model(inputs)


def build_random(request: Request) -> TorchDetector:
    """Return a ResNet-18 with random weights: the same ones in every run, whatever ran before."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_RANDOM_SEED)
        # By default timm starts the residual branches at zero, which leaves them out.
        model = timm.create_model(
            RANDOM_BACKBONE, pretrained=False, num_classes=0, zero_init_last=False
        )
    return TorchDetector(
        model, request, identity=f"random/{RANDOM_BACKBONE}", preprocessing=_preprocessing(model)
    )


def build_timm(request: Request) -> TorchDetector:
    """Return a timm model with trained weights.

    The target is timm's name, with or without the tag of the weights. The option ``weights`` names
    a state dict of that model in timm's format, with or without classifier, which needs no hub;
    without it the weights come from the hub's cache, or the hub. ``size``, ``mean`` and ``std``
    replace the model's own.

    Raises:
        InputError: timm does not know the model, or it cannot be fed with this size.
        WeightsUnavailableError: not cached, and the hub cannot be reached.
        CheckpointError: the file is of another model.
    """
    import timm

    model_name, options = request.target, request.options
    base, _, tag = model_name.partition(".")
    if not timm.is_model(base):
        raise InputError(f"timm has no model '{base}'; {nearest(base, timm.list_models())}")
    tags = timm.list_pretrained(f"{base}.*")
    if tag and model_name not in tags:
        raise InputError(f"timm has no weights '{model_name}'; {nearest(model_name, tags)}")
    projection = request.kind in _COMPARED_BY_PROJECTION
    if "weights" in options:
        model = _from_file(model_name, Path(options["weights"]), projection=projection)
    elif timm.get_pretrained_cfg(model_name, allow_unregistered=True):
        model = _from_hub(model_name, name=request.name, projection=projection)
    else:
        raise InputError(f"{request.name}: timm has no weights of this model; add ?weights=FILE")
    preprocessing = _preprocessing(model, options)
    try:
        _set_size(model, preprocessing.size)
        return TorchDetector(
            model,
            request,
            identity=f"timm/{base}",
            preprocessing=preprocessing,
            likeness=options.get("score", "cosine"),
        )
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"detector '{request.name}': does not take {preprocessing.size} pixels: {error}"
        ) from error


def build_resnet50(request: Request) -> TorchDetector:
    """Return a ResNet-50 with weights that were published by a self-supervised method.

    The target is a file: of SwAV's model zoo, or a PyTorch state dict of BYOL. The trunk may have
    torchvision's names or the numbers of a ``Sequential`` of its parts, below any prefix
    (``module.``, ``encoder.``, ``online_network.`` and so on). Where a file holds an online and a
    target network, the online one is used. Projection and prediction heads are left out;
    everything else must be there.

    Raises:
        InputError: no such file.
        CheckpointError: not a ResNet-50; the missing weights are named.
    """
    import timm

    model = timm.create_model("resnet50", pretrained=False, num_classes=0)
    state = read_state_dict(
        Path(request.target),
        levels=(*LEVELS, "online_network_state_dict", "online_backbone", "online_network"),
    )
    load_strictly(model, _trunk(state, source=request.target), source=request.target)
    return TorchDetector(
        model, request, identity=request.kind, preprocessing=Preprocessing(size=224)
    )


class Data2VecDetector(TorchDetector):
    """Mean of the patch features of data2vec's image network (Baevski et al. 2022)."""

    def forward(self, batch: torch.Tensor) -> Any:
        """Run the network: ``[n, 3, size, size]`` in [0, 1] to ``[n, num_features]``."""
        return super().forward(batch).last_hidden_state[:, 1:].mean(dim=1)


def build_data2vec(request: Request) -> Data2VecDetector:
    """Return data2vec's image network through transformers.

    The target is a local copy of the hub's folder; without it the hub's cache, or the hub, is used.

    Raises:
        MissingExtraError: transformers is not installed.
        InputError: the folder holds no such network.
        WeightsUnavailableError: not cached, and the hub cannot be reached.
    """
    name, folder = request.name, request.target
    try:
        from transformers import Data2VecVisionModel
    except ImportError as error:
        raise MissingExtraError(f"detector '{name}'", "data2vec") from error
    is_local = bool(folder) or cached_weights(DATA2VEC_HUB_ID) is not None
    if not is_local and not hub_answers(DATA2VEC_HUB_ID):
        raise WeightsUnavailableError(_how_to_get(name, DATA2VEC_HUB_ID, file=_DATA2VEC_FILE))
    try:
        model = Data2VecVisionModel.from_pretrained(
            folder or DATA2VEC_HUB_ID, add_pooling_layer=False, local_files_only=is_local
        )
    except (OSError, ValueError, RuntimeError) as error:
        if folder:
            raise InputError(f"{folder}: no data2vec image network: {error}") from error
        raise WeightsUnavailableError(
            _how_to_get(name, DATA2VEC_HUB_ID, file=_DATA2VEC_FILE)
        ) from error
    return Data2VecDetector(
        model,
        request,
        identity="data2vec",
        preprocessing=Preprocessing(size=224, mean=(0.5,) * 3, std=(0.5,) * 3),
    )


def _from_hub(model_name: str, *, name: str, projection: bool) -> Any:
    """Load from the hub's cache without asking the hub, or else from the hub."""
    import timm

    hub_id = str(timm.get_pretrained_cfg(model_name).hf_hub_id)
    options: dict[str, Any] = {} if projection else {"num_classes": 0}
    cached = cached_weights(hub_id)
    file = f"{name.partition('?')[0]}?weights=FILE"
    if cached is None and not hub_answers(hub_id):
        raise WeightsUnavailableError(_how_to_get(name, hub_id, file=file))
    if cached is not None:
        options["pretrained_cfg_overlay"] = {"state_dict": read_state_dict(cached)}
    try:
        return timm.create_model(model_name, pretrained=True, **options)
    except (OSError, RuntimeError, ValueError) as error:
        if cached is not None:
            raise CheckpointError(f"{cached}: weights do not fit {model_name}: {error}") from error
        raise WeightsUnavailableError(_how_to_get(name, hub_id, file=file)) from error


def _how_to_get(name: str, hub_id: str, *, file: str) -> str:
    return (
        f"detector '{name}': its weights are not in the local cache, and the hub could not be "
        f"reached.\nOn a machine with internet run: hf download {hub_id}\n"
        f"then copy the files here and use {file}, or set HF_HOME to a copy of its cache."
    )


def _from_file(model_name: str, path: Path, *, projection: bool) -> Any:
    import timm

    state = {
        key: value for key, value in read_state_dict(path).items() if not key.startswith(_AUXILIARY)
    }
    whole = timm.create_model(model_name, pretrained=False)
    state = rename_by_order(state, whole.state_dict())
    if projection:
        load_strictly(whole, state, source=str(path))
        return whole
    heads = whole.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    model = timm.create_model(model_name, pretrained=False, num_classes=0)
    own = set(model.state_dict())
    state = {k: v for k, v in state.items() if k in own or not k.startswith(heads)}
    load_strictly(model, state, source=str(path))
    return model


def _preprocessing(model: Any, options: Mapping[str, Any] = MappingProxyType({})) -> Preprocessing:
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    return Preprocessing(
        size=options.get("size") or int(config["input_size"][-1]),
        mean=options.get("mean") or tuple(config["mean"]),
        std=options.get("std") or tuple(config["std"]),
    )


def _set_size(model: Any, size: int) -> None:
    """Tell a transformer the side of its input; convolutional networks take any."""
    import timm.data

    own = timm.data.resolve_model_data_config(model)["input_size"][-1]
    if size != own and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(size, size))


_PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_HEADS = {
    "fc",
    "head",
    "neck",
    "predictor",
    "projection",
    "projection_head",
    "projector",
    "prototypes",
}
_SECOND_NETWORK = ("target", "teacher", "momentum", "ema")
_STEM_SHAPE = (64, 3, 7, 7)


def _trunk(state: Mapping[str, torch.Tensor], *, source: str) -> dict[str, torch.Tensor]:
    """Find the ResNet-50 in a state dict and give it torchvision's names."""
    stems = [
        (key, part)
        for key, value in state.items()
        for part in ("conv1.weight", "0.weight")
        if tuple(value.shape) == _STEM_SHAPE and (key == part or key.endswith(f".{part}"))
    ]
    if not stems:
        raise CheckpointError(
            f"{source}: no ResNet-50 in it: no conv1.weight of the shape {list(_STEM_SHAPE)}; its "
            f"keys begin with {', '.join(sorted(state)[:5])}"
        )
    key, part = min(stems, key=lambda stem: _rank(stem[0]))
    prefix = key[: len(key) - len(part)]
    trunk = {}
    for name, value in state.items():
        if not name.startswith(prefix):
            continue  # another network, or a head beside this one
        first, _, rest = name[len(prefix) :].partition(".")
        if first not in _HEADS:
            trunk[f"{_PARTS.get(first, first)}.{rest}"] = value
    return trunk


def _rank(stem: str) -> tuple[bool, bool, int]:
    """Order candidates: not the slowly following network, the one called online, the outermost."""
    return (any(word in stem for word in _SECOND_NETWORK), "online" not in stem, len(stem))


def _hash_state(digest: Any, model: torch.nn.Module) -> None:
    for key, value in sorted(model.state_dict().items()):
        array: NDArray[Any] = np.ascontiguousarray(value.detach().cpu().numpy())
        digest.update(f"{key}{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
