"""Detectors by name.

Another package adds its own by an entry point of the group ``lcmem.detectors`` that is a
``DetectorKind``; a program adds one with ``register_detector``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.detectors.kinds import DetectorKind, Request, Status
from lcmem_cli.engine.detectors.options import join_name, parse_name, read_options, split_names
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import (
    InputError,
    LcmemError,
    WeightsFileNeededError,
    first_line,
    nearest,
)
from lcmem_cli.engine.precision import AskedPrecision, resolve_precision
from lcmem_cli.engine.results import Result

__all__ = [
    "DetectorInfo",
    "DetectorKind",
    "Request",
    "check_name",
    "describe_detectors",
    "detectors",
    "load_detector",
    "register_detector",
    "split_names",
]

ENTRY_POINT_GROUP = "lcmem.detectors"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorInfo(Result):
    """A line of ``lcmem detectors``.

    Attributes:
        name: how its name is written.
        summary: what it measures.
        weights: where its weights come from.
        licence: of the weights, as far as it is known.
        options: keys that its name may carry.
        status: whether it can run here.
        note: what is missing, if anything.
    """

    name: str
    summary: str
    weights: str
    licence: str
    options: tuple[str, ...]
    status: Status
    note: str


def load_detector(
    name: str,
    *,
    device: str = "auto",
    input_size: int = 512,
    precision: AskedPrecision | None = None,
) -> Detector:
    """Load a detector by name.

    Args:
        name: for example ``lcmem``, ``lcmem:run/checkpoint.safetensors``, ``ncc``, ``dinov2``,
            ``timm:resnet50``, ``torchscript:sscd.pt?size=288``; see ``describe_detectors``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        input_size: side in pixels for the pixel measures; the others bring their own.
        precision: what it computes in, see ``at_precision``.

    Raises:
        InputError: unknown name, option or file, or an optional dependency is missing.
        WeightsUnavailableError: the weights are not on this machine.

    Example:
        >>> detector = load_detector("ncc", input_size=64)
        >>> detector.score("a.png", "b.png")
    """
    name = at_precision(name, precision, device)
    kind, target, options = check_name(name)
    request = Request(
        kind=kind.name,
        name=name,
        target=target or kind.stands_for,
        options=options,
        device=device,
        input_size=input_size,
    )
    if kind in _BUILT_IN:
        detector = kind.builder(request)
    else:
        detector = _built_elsewhere(kind, request)
    detector.name = name
    return detector


def at_precision(name: str, asked: AskedPrecision | None, device: str) -> str:
    """Return a detector's name with the precision that is asked for as its option.

    So it stands wherever the name is recorded. Single precision, in which all compute by
    themselves, is not written.

    Args:
        name: of a detector.
        asked: ``None``: as the name says.
        device: which ``auto`` is resolved for.

    Raises:
        InputError: the name says another, or the detector takes none.
    """
    if asked is None:
        return name
    kind, _, options = check_name(name)
    named = options.get(_PRECISION)
    if named is not None and asked not in ("auto", named):
        raise InputError(
            f"--precision {asked}: detector '{name}' computes in {named}; leave it out"
        )
    found = resolve_precision(asked, resolve_device(device))
    if named is not None or found == "fp32":
        return name
    if _PRECISION not in kind.options:
        if asked == "auto":
            return name
        raise InputError(
            f"--precision {asked} has no effect: detector '{name}' computes in its own precision; "
            "leave it out, or use auto"
        )
    parts = parse_name(name)
    return join_name(parts.kind, parts.target, {**parts.options, _PRECISION: found})


def _built_elsewhere(kind: DetectorKind, request: Request) -> Detector:
    """Build a detector of another package and try it out: its code may fail in any way.

    Raises:
        InputError: saying what it lacks.
    """
    try:
        detector = kind.builder(request)
        _check_built(detector, request.name)
        _try_out(detector, request.name)
    except LcmemError:
        raise
    except Exception as error:
        raise InputError(
            f"detector '{request.name}': {type(error).__name__}: {first_line(error)}"
        ) from error
    return detector


def check_name(name: str) -> tuple[DetectorKind, str, dict[str, Any]]:
    """Check a detector's name without loading anything.

    Returns:
        The kind, what stands after the colon, and the options.

    Raises:
        InputError: unknown name or option, or a part of the name is missing or too many.
        WeightsFileNeededError: that part is a file of weights.
    """
    parsed = parse_name(name)
    known = detectors()
    if parsed.kind not in known and name.endswith(".safetensors"):
        raise InputError(f"unknown detector '{name}'; for a checkpoint write 'lcmem:{name}'")
    if parsed.kind not in known:
        raise InputError(
            f"unknown detector '{parsed.kind}'; {nearest(parsed.kind, known)} "
            "(lcmem detectors lists all)"
        )
    kind = known[parsed.kind]
    if parsed.target and not kind.target:
        raise InputError(
            f"detector '{kind.name}' takes nothing after a colon, not '{parsed.target}'"
        )
    if kind.target_needed and not parsed.target:
        if kind.weights == _YOUR_FILE:
            raise WeightsFileNeededError(
                f"detector '{kind.name}' needs a file of its weights: write {kind.pattern}"
            )
        raise InputError(f"detector '{kind.name}' needs a name: write {kind.pattern}")
    options = read_options(name, parsed.options, kind.options, config=kind.config_file)
    return kind, parsed.target, options


def describe_detectors() -> tuple[DetectorInfo, ...]:
    """Return all kinds: built in, registered, and those of other packages."""
    infos = []
    for kind in detectors().values():
        status, note = kind.status()
        infos.append(
            DetectorInfo(
                name=kind.pattern,
                summary=kind.summary,
                weights=kind.weights,
                licence=kind.licence,
                options=(*kind.options, "config") if kind.config_file else tuple(kind.options),
                status=status,
                note=note,
            )
        )
    return tuple(infos)


def register_detector(kind: DetectorKind) -> None:
    """Add a kind of detector to this process.

    Raises:
        InputError: its name is not valid or is taken.
    """
    _check_kind(kind, detectors())
    _registered[kind.name] = kind


def _check_kind(kind: object, known: Mapping[str, DetectorKind]) -> DetectorKind:
    if not isinstance(kind, DetectorKind):
        raise InputError(f"a detector is registered as a DetectorKind, not {type(kind).__name__}")
    if not _NAME.fullmatch(kind.name):
        raise InputError(
            f"detector name '{kind.name}': expected lower-case letters, digits and single hyphens"
        )
    if kind.name in known:
        raise InputError(f"detector '{kind.name}' exists already; choose another name")
    return kind


def _check_built(detector: object, name: str) -> None:
    """Check what ``build`` returned, which may be somebody else's code."""
    if not isinstance(detector, Detector):
        raise InputError(f"detector '{name}': was built as {type(detector).__name__}, no Detector")
    if not _FINGERPRINT.fullmatch(getattr(detector, "fingerprint", "")):
        raise InputError(f"detector '{name}': its fingerprint is no SHA-256 in hexadecimal")
    for attribute in ("input_size", "num_features"):
        value = getattr(detector, attribute, None)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"detector '{name}': {attribute} must be at least 1, not {value!r}")


def _try_out(detector: Detector, name: str) -> None:
    """Embed and score two grey images, and look at the shapes of what comes back."""
    side, count = detector.input_size, 2
    grey = torch.linspace(0.25, 0.75, count)[:, None, None, None].expand(count, 3, side, side)
    features = detector.embed_batch(grey.clone())
    _check_shape(name, "embed_batch", features, (count, detector.num_features))
    if features.dtype != np.dtype(detector.feature_dtype):
        raise InputError(
            f"detector '{name}': embed_batch returns {features.dtype}, but feature_dtype is "
            f"{np.dtype(detector.feature_dtype)}"
        )
    pairs = detector.score_features(features, features[::-1])
    _check_shape(name, "score_features", pairs, (count,))
    if not np.isfinite(pairs).all() or not np.allclose(pairs, pairs[::-1]):
        raise InputError(
            f"detector '{name}': score_features gives {pairs.tolist()} for two images and for the "
            "same in the other order; scores must be finite and symmetric"
        )
    _check_shape(name, "score_matrix", detector.score_matrix(features, features), (count, count))


def _check_shape(name: str, method: str, found: object, shape: tuple[int, ...]) -> None:
    if not isinstance(found, np.ndarray) or found.shape != shape:
        what = list(found.shape) if isinstance(found, np.ndarray) else type(found).__name__
        raise InputError(
            f"detector '{name}': {method} returns {what}, expected an array of the shape "
            f"{list(shape)}"
        )


def detectors() -> dict[str, DetectorKind]:
    """Return all kinds by name: built in, registered, and those of other packages.

    An entry point that fails is listed as broken and stops nothing else.
    """
    found = {kind.name: kind for kind in _BUILT_IN} | _registered
    for point in sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        try:
            kind = _check_kind(point.load(), found)
        except Exception as error:  # another package's code may fail in any way
            kind = _broken(point, str(error) or type(error).__name__)
        found.setdefault(kind.name, kind)
    return found


def _broken(point: metadata.EntryPoint, reason: str) -> DetectorKind:
    def build(request: Request) -> Detector:
        raise LcmemError(f"detector '{request.name}' ({point.value}) cannot be used: {reason}")

    return DetectorKind(
        name=point.name,
        summary=f"entry point {point.value}",
        weights="unknown",
        licence="unknown",
        build=build,
        status=lambda: ("broken", reason),
    )


def _embedded_status() -> tuple[Status, str]:
    from lcmem_cli.engine.models.checkpoint import embedded_checkpoint

    if embedded_checkpoint().is_file():
        return "ready", ""
    return "needs a file", "this copy of the package holds no model"


def _file_status(extra: str = "", package: str = "") -> tuple[Status, str]:
    if extra and find_spec(package) is None:
        return "needs an extra", f"pip install 'lcmem[{extra}]'"
    return "needs a file", ""


def _hub_status(hub_id: str, extra: str = "", package: str = "") -> tuple[Status, str]:
    from lcmem_cli.engine.models.weights import cached_weights

    if extra and find_spec(package) is None:
        return "needs an extra", f"pip install 'lcmem[{extra}]'"
    if cached_weights(hub_id) is not None:
        return "ready", ""
    return "needs a download", "not in the local cache"


_YOUR_FILE = "your file"
_registered: dict[str, DetectorKind] = {}
_HERE = "lcmem_cli.engine.detectors"
_PRECISION = "precision"
_INPUT_OPTIONS = ("size", "mean", "std", "score")
_FILE_OPTIONS = (*_INPUT_OPTIONS, "layout", "channels", "output")


def _pixel_kind(name: str, summary: str) -> DetectorKind:
    return DetectorKind(
        name=name, summary=summary, weights="none", licence="none", build=f"{_HERE}.pixel:build"
    )


def _model_kind(name: str, title: str, model: str, licence: str) -> DetectorKind:
    """Return the kind of a published network that timm knows; the licence is timm's word."""
    return DetectorKind(
        name=name,
        summary=f"{title}, cosine",
        weights=f"hub: timm/{model}",
        licence=licence,
        build=f"{_HERE}.backbones:build_timm",
        stands_for=model,
        options=("weights", *_INPUT_OPTIONS, _PRECISION),
        status=partial(_hub_status, f"timm/{model}"),
    )


def _file_kind(name: str, summary: str, build: str, **settings: Any) -> DetectorKind:
    settings = {"target": "FILE", "status": _file_status, **settings}
    return DetectorKind(
        name=name,
        summary=summary,
        weights=_YOUR_FILE,
        licence="the file's",
        build=f"{_HERE}.{build}",
        target_needed=True,
        **settings,
    )


_checkpoint_kind = partial(_file_kind, target="CHECKPOINT", options=("codec", _PRECISION))
_network_kind = partial(_file_kind, options=_FILE_OPTIONS, config_file=True)

_BUILT_IN: tuple[DetectorKind, ...] = (
    DetectorKind(
        name="lcmem",
        summary="LCMem: probability that both show the same",
        weights="inside the package, or a checkpoint",
        licence="Apache-2.0, or the checkpoint's",
        build=f"{_HERE}.lcmem:build",
        target="CHECKPOINT",
        options=("codec", "adapt", _PRECISION),
        status=_embedded_status,
    ),
    DetectorKind(
        name="joint",
        summary="the embedded LCMem, or correlation of small pictures: the larger",
        weights="inside the package",
        licence="Apache-2.0",
        build=f"{_HERE}.joint:build",
        target="EXPORT.onnx",
        options=("adapt", _PRECISION),
        status=_embedded_status,
    ),
    _pixel_kind("mse", "negative mean squared difference of pixels"),
    _pixel_kind("ssim", "structural similarity of pixels"),
    _pixel_kind("ncc", "normalised cross-correlation of pixels"),
    _pixel_kind("phash", "share of equal bits of the perceptual hash"),
    DetectorKind(
        name="random",
        summary="ResNet-18 with random weights, cosine",
        weights="none",
        licence="none",
        build=f"{_HERE}.backbones:build_random",
        options=(_PRECISION,),
    ),
    _model_kind("clip", "CLIP ViT-B/16", "vit_base_patch16_clip_224.openai", "Apache-2.0"),
    _model_kind("convnext", "ConvNeXt-B, ImageNet-22k", "convnext_base.fb_in22k", "Apache-2.0"),
    _model_kind("inception", "Inception v3", "inception_v3.tv_in1k", "Apache-2.0"),
    _model_kind("mae", "MAE ViT-B/16", "vit_base_patch16_224.mae", "CC-BY-NC-4.0"),
    _model_kind("dinov2", "DINOv2 ViT-B/14", "vit_base_patch14_dinov2.lvd142m", "Apache-2.0"),
    _model_kind("dinov3", "DINOv3 ViT-B/16", "vit_base_patch16_dinov3.lvd1689m", "DINOv3 licence"),
    DetectorKind(
        name="data2vec",
        summary="data2vec vision base, cosine",
        weights="hub: facebook/data2vec-vision-base",
        licence="Apache-2.0",
        build=f"{_HERE}.backbones:build_data2vec",
        target="FOLDER",
        options=(_PRECISION,),
        status=partial(_hub_status, "facebook/data2vec-vision-base", "data2vec", "transformers"),
    ),
    _file_kind("swav", "SwAV ResNet-50, cosine", "backbones:build_resnet50", options=(_PRECISION,)),
    _file_kind("byol", "BYOL ResNet-50, cosine", "backbones:build_resnet50", options=(_PRECISION,)),
    DetectorKind(
        name="timm",
        summary="any timm model, cosine",
        weights="hub: timm, or ?weights=FILE",
        licence="the model's",
        build=f"{_HERE}.backbones:build_timm",
        target="MODEL",
        target_needed=True,
        options=("weights", *_INPUT_OPTIONS, _PRECISION),
        status=lambda: ("needs a download", "or ?weights=FILE"),
    ),
    _checkpoint_kind("siamese", "Siamese network, its head", "lcmem:build"),
    _checkpoint_kind(
        "siamese-ntxent", "Siamese network, correlation of features", "lcmem:build_correlation"
    ),
    _checkpoint_kind(
        "siamese-ntxent-u", "the same, trained without identities", "lcmem:build_correlation"
    ),
    _network_kind("torchscript", "any network, such as SSCD", "torchscript:TorchScriptDetector"),
    _network_kind(
        "onnx",
        "any network, or a file of lcmem export",
        "onnx:build",
        status=partial(_file_status, "onnx", "onnxruntime"),
    ),
)
