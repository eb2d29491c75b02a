"""Detectors by name.

Another package adds its own by an entry point of the group ``lcmem.detectors`` that is a
``DetectorKind``; a program adds one with ``register_detector``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.detectors.options import parse_name, read_options, split_names
from lcmem_cli.engine.errors import InputError, LcmemError, nearest
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

Status = Literal["ready", "needs a file", "needs a download", "needs an extra", "broken"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a detector is built from.

    Attributes:
        name: as the user wrote it.
        target: what stands after the colon, perhaps empty.
        options: from the name, checked and typed; see ``read_options``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        input_size: side in pixels for detectors that have none of their own.
    """

    name: str
    target: str
    options: Mapping[str, Any]
    device: str
    input_size: int


def _always() -> tuple[Status, str]:
    return "ready", ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorKind:
    """A kind of detector.

    Attributes:
        name: lower-case letters, digits and hyphens.
        summary: what it measures, in a few words.
        weights: where its weights come from.
        licence: of the weights, as far as it is known.
        build: makes one.
        target: what stands after the colon, such as ``FILE``; empty if nothing may.
        target_needed: whether it must be there.
        options: keys that the name may carry; see ``read_options``.
        config_file: whether the options may also come from a TOML file (``config=``).
        status: whether it can run here, and why not.
    """

    name: str
    summary: str
    weights: str
    licence: str
    build: Callable[[Request], Detector]
    target: str = ""
    target_needed: bool = False
    options: Sequence[str] = ()
    config_file: bool = False
    status: Callable[[], tuple[Status, str]] = _always

    @property
    def pattern(self) -> str:
        """How its name is written."""
        if not self.target:
            return self.name
        return (
            f"{self.name}:{self.target}" if self.target_needed else f"{self.name}[:{self.target}]"
        )


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


def load_detector(name: str, *, device: str = "auto", input_size: int = 512) -> Detector:
    """Load a detector by name.

    Args:
        name: for example ``lcmem``, ``lcmem:run/checkpoint.safetensors``, ``ncc``, ``dinov2``,
            ``timm:resnet50``, ``torchscript:sscd.pt?size=288``; see ``describe_detectors``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        input_size: side in pixels for the pixel measures; the others bring their own.

    Raises:
        InputError: unknown name, option or file, or an optional dependency is missing.
        WeightsUnavailableError: the weights are not on this machine.

    Example:
        >>> detector = load_detector("ncc", input_size=64)
        >>> detector.score("a.png", "b.png")
    """
    kind, target, options = check_name(name)
    detector = kind.build(
        Request(name=name, target=target, options=options, device=device, input_size=input_size)
    )
    _check_built(detector, name)
    detector.name = name
    return detector


def check_name(name: str) -> tuple[DetectorKind, str, dict[str, Any]]:
    """Check a detector's name without loading anything.

    Returns:
        The kind, what stands after the colon, and the options.

    Raises:
        InputError: unknown name or option, or a part of the name is missing or too many.
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
        raise InputError(f"detector '{kind.name}' needs more: {kind.pattern}")
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


def _lcmem(request: Request) -> Detector:
    from lcmem_cli.engine.detectors.lcmem import load_lcmem

    detector = load_lcmem(
        request.target or None, codec=request.options.get("codec"), device=request.device
    )
    return _adapted(detector, request)


def _adapted(detector: Detector, request: Request) -> Detector:
    """Adapt a detector to the images of the option ``adapt`` (of a list with splits, to TRAIN)."""
    source = request.options.get("adapt")
    if source is None:
        return detector
    from lcmem_cli.engine.data.manifest import load_manifest
    from lcmem_cli.engine.detectors.adapted import some_images
    from lcmem_cli.engine.detectors.embedding import embed_files

    listed = load_manifest(Path(source), need_split=False)
    if any(record.split == "TRAIN" for record in listed.records):
        listed = listed.select("TRAIN")
    found = embed_files(detector, some_images(listed.paths()))
    for bad in found.unreadable:
        raise InputError(f"detector '{request.name}': {bad.path}: {bad.reason}")
    contents = {
        int(row): str(content)
        for row, content in zip(found.rows, found.content_hashes, strict=True)
        if row >= 0
    }
    return detector.adapted(found.features, [contents[row] for row in sorted(contents)]).detector


def _joint(request: Request) -> Detector:
    return _adapted(_unadapted_joint(request), request)


def _unadapted_joint(request: Request) -> Detector:
    from lcmem_cli.engine.detectors.joint import JointDetector
    from lcmem_cli.engine.detectors.lcmem import load_lcmem

    if not request.target:
        return JointDetector(load_lcmem(device=request.device), name=request.name)
    if not request.target.lower().endswith(".onnx"):
        raise InputError(
            f"detector 'joint' takes nothing after a colon but an ONNX export of the embedded "
            f"model, not '{request.target}': to another model's scores it was not fitted"
        )
    from lcmem_cli.engine.detectors.external import load_onnx_export
    from lcmem_cli.engine.models.checkpoint import load_checkpoint
    from lcmem_cli.engine.models.hub import locate_checkpoint

    network = load_onnx_export(Path(request.target), name=request.name, device=request.device)
    if network.exported_from != load_checkpoint(locate_checkpoint(None)).fingerprint:
        raise InputError(
            f"detector '{request.name}': an export of another model than the embedded one, to "
            "whose scores the correlation of pictures was fitted; make the file with: "
            f"lcmem export {request.target}"
        )
    return JointDetector(network, name=request.name)


def _correlation(request: Request) -> Detector:
    from lcmem_cli.engine.detectors.backbones import SiameseCorrelation
    from lcmem_cli.engine.detectors.lcmem import load_lcmem

    inner = load_lcmem(request.target, codec=request.options.get("codec"), device=request.device)
    return SiameseCorrelation(inner, name=request.name)


def _mse(request: Request) -> Detector:
    from lcmem_cli.engine.detectors.pixel import MSE

    return MSE(request.input_size)


def _ncc(request: Request) -> Detector:
    from lcmem_cli.engine.detectors.pixel import NCC

    return NCC(request.input_size)


def _ssim(request: Request) -> Detector:
    from lcmem_cli.engine.detectors.pixel import SSIM

    return SSIM(request.input_size)


def _phash(request: Request) -> Detector:
    from lcmem_cli.engine.detectors.pixel import PHash

    return PHash(request.input_size)


def _random(request: Request) -> Detector:
    from lcmem_cli.engine.detectors.backbones import random_backbone

    return random_backbone(device=request.device)


def _timm(request: Request) -> Detector:
    from lcmem_cli.engine.detectors.backbones import timm_backbone

    return timm_backbone(
        request.target, name=request.name, device=request.device, **_with_path(request.options)
    )


def _with_path(options: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(options)
    if "weights" in values:
        values["weights"] = Path(values["weights"])
    return values


def _pretrained(published: Pretrained) -> Callable[[Request], Detector]:
    def build(request: Request) -> Detector:
        from lcmem_cli.engine.detectors.backbones import timm_backbone

        return timm_backbone(
            published.model,
            name=request.name,
            device=request.device,
            projection=published.projection,
            **_with_path(request.options),
        )

    return build


def _resnet50(kind: str) -> Callable[[Request], Detector]:
    def build(request: Request) -> Detector:
        from lcmem_cli.engine.detectors.backbones import resnet50_from_file

        return resnet50_from_file(
            kind, Path(request.target), name=request.name, device=request.device
        )

    return build


def _data2vec(request: Request) -> Detector:
    from lcmem_cli.engine.detectors.backbones import data2vec_backbone

    return data2vec_backbone(request.target or None, name=request.name, device=request.device)


def _torchscript(request: Request) -> Detector:
    from lcmem_cli.engine.detectors.external import TorchScriptDetector

    return TorchScriptDetector(
        Path(request.target), name=request.name, device=request.device, options=request.options
    )


def _onnx(request: Request) -> Detector:
    from lcmem_cli.engine.detectors.external import load_onnx

    return load_onnx(
        Path(request.target), name=request.name, device=request.device, options=request.options
    )


def _embedded_status() -> tuple[Status, str]:
    from lcmem_cli.engine.models.checkpoint import embedded_checkpoint

    if embedded_checkpoint().is_file():
        return "ready", ""
    return "needs a file", "this copy of the package holds no model"


def _file_status() -> tuple[Status, str]:
    return "needs a file", ""


def _hub_status(hub_id: str) -> Callable[[], tuple[Status, str]]:
    def status() -> tuple[Status, str]:
        from lcmem_cli.engine.detectors.backbones import cached_weights

        if cached_weights(hub_id) is not None:
            return "ready", ""
        return "needs a download", "not in the local cache"

    return status


def _data2vec_status() -> tuple[Status, str]:
    from lcmem_cli.engine.detectors.backbones import DATA2VEC_HUB_ID

    if find_spec("transformers") is None:
        return "needs an extra", "pip install 'lcmem[data2vec]'"
    return _hub_status(DATA2VEC_HUB_ID)()


def _onnx_status() -> tuple[Status, str]:
    if find_spec("onnxruntime") is None:
        return "needs an extra", "pip install 'lcmem[onnx]'"
    return _file_status()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A published network that timm knows.

    Attributes:
        title: for people.
        model: timm's name with the tag of the weights.
        licence: of the weights, as timm states it.
        projection: keep the network's last layer; CLIP compares images by its output.
    """

    title: str
    model: str
    licence: str
    projection: bool = False


PRETRAINED: Mapping[str, Pretrained] = {
    "clip": Pretrained(
        title="CLIP ViT-B/16",
        model="vit_base_patch16_clip_224.openai",
        licence="Apache-2.0",
        projection=True,
    ),
    "convnext": Pretrained(
        title="ConvNeXt-B, ImageNet-22k", model="convnext_base.fb_in22k", licence="Apache-2.0"
    ),
    "inception": Pretrained(
        title="Inception v3", model="inception_v3.tv_in1k", licence="Apache-2.0"
    ),
    "mae": Pretrained(
        title="MAE ViT-B/16", model="vit_base_patch16_224.mae", licence="CC-BY-NC-4.0"
    ),
    "dinov2": Pretrained(
        title="DINOv2 ViT-B/14",
        model="vit_base_patch14_dinov2.lvd142m",
        licence="Apache-2.0",
    ),
    "dinov3": Pretrained(
        title="DINOv3 ViT-B/16",
        model="vit_base_patch16_dinov3.lvd1689m",
        licence="DINOv3 licence",
    ),
}

_NONE = "none"
_YOURS = "your file"
_INPUT_OPTIONS = ("size", "mean", "std", "score")
_registered: dict[str, DetectorKind] = {}


def _hub_kind(name: str, published: Pretrained) -> DetectorKind:
    return DetectorKind(
        name=name,
        summary=f"{published.title}, cosine",
        weights=f"hub: timm/{published.model}",
        licence=published.licence,
        build=_pretrained(published),
        options=("weights", *_INPUT_OPTIONS),
        status=_hub_status(f"timm/{published.model}"),
    )


def _file_kind(
    name: str, summary: str, build: Callable[[Request], Detector], **settings: Any
) -> DetectorKind:
    values = {
        "target": "FILE",
        "weights": _YOURS,
        "licence": "the file's",
        "status": _file_status,
        **settings,
    }
    return DetectorKind(name=name, summary=summary, build=build, target_needed=True, **values)


_BUILT_IN: tuple[DetectorKind, ...] = (
    DetectorKind(
        name="lcmem",
        summary="LCMem: probability that both show the same",
        weights="inside the package, or a checkpoint",
        licence="Apache-2.0, or the checkpoint's",
        build=_lcmem,
        target="CHECKPOINT",
        options=("codec", "adapt"),
        status=_embedded_status,
    ),
    DetectorKind(
        name="joint",
        summary="the embedded LCMem, or correlation of small pictures: the larger",
        weights="inside the package",
        licence="Apache-2.0",
        build=_joint,
        target="EXPORT.onnx",
        options=("adapt",),
        status=_embedded_status,
    ),
    DetectorKind(
        name="mse",
        summary="negative mean squared difference of pixels",
        weights=_NONE,
        licence=_NONE,
        build=_mse,
    ),
    DetectorKind(
        name="ssim",
        summary="structural similarity of pixels",
        weights=_NONE,
        licence=_NONE,
        build=_ssim,
    ),
    DetectorKind(
        name="ncc",
        summary="normalised cross-correlation of pixels",
        weights=_NONE,
        licence=_NONE,
        build=_ncc,
    ),
    DetectorKind(
        name="phash",
        summary="share of equal bits of the perceptual hash",
        weights=_NONE,
        licence=_NONE,
        build=_phash,
    ),
    DetectorKind(
        name="random",
        summary="ResNet-18 with random weights, cosine",
        weights=_NONE,
        licence=_NONE,
        build=_random,
    ),
    *(_hub_kind(name, published) for name, published in PRETRAINED.items()),
    DetectorKind(
        name="data2vec",
        summary="data2vec vision base, cosine",
        weights="hub: facebook/data2vec-vision-base",
        licence="Apache-2.0",
        build=_data2vec,
        target="FOLDER",
        status=_data2vec_status,
    ),
    _file_kind("swav", "SwAV ResNet-50, cosine", _resnet50("swav")),
    _file_kind("byol", "BYOL ResNet-50, cosine", _resnet50("byol")),
    DetectorKind(
        name="timm",
        summary="any timm model, cosine",
        weights="hub: timm, or ?weights=FILE",
        licence="the model's",
        build=_timm,
        target="MODEL",
        target_needed=True,
        options=("weights", *_INPUT_OPTIONS),
        status=lambda: ("needs a download", "or ?weights=FILE"),
    ),
    *(
        _file_kind(name, summary, build, target="CHECKPOINT", options=("codec",))
        for name, summary, build in (
            ("siamese", "Siamese network, its head", _lcmem),
            ("siamese-ntxent", "Siamese network, correlation of features", _correlation),
            ("siamese-ntxent-u", "the same, trained without identities", _correlation),
        )
    ),
    _file_kind(
        "torchscript",
        "any network, such as SSCD",
        _torchscript,
        options=("size", "mean", "std", "score", "layout", "channels", "output"),
        config_file=True,
    ),
    _file_kind(
        "onnx",
        "any network, or a file of lcmem export",
        _onnx,
        options=("size", "mean", "std", "score", "layout", "channels", "output"),
        config_file=True,
        status=_onnx_status,
    ),
)
