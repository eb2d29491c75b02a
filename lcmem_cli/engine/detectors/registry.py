"""Detectors by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import metadata

from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.errors import InputError, nearest

ENTRY_POINT_GROUP = "lcmem.detectors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorInfo:
    """A kind of detector.

    Attributes:
        name: what the user writes; what stands after a colon is an argument.
        summary: what it measures.
        weights: where its weights come from.
        build: makes one from the argument (empty without colon), the device and the input size.
    """

    name: str
    summary: str
    weights: str
    build: Callable[[str, str, int], Detector]


def _lcmem(argument: str, device: str, _size: int) -> Detector:
    from lcmem_cli.engine.detectors.lcmem import load_lcmem

    return load_lcmem(argument or None, device=device)


def _pixel(kind: str) -> Callable[[str, str, int], Detector]:
    def build(argument: str, _device: str, size: int) -> Detector:
        from lcmem_cli.engine.detectors.pixel import MSE, NCC, SSIM, PHash

        if argument:
            raise InputError(f"detector '{kind}' takes nothing after a colon, not '{argument}'")
        return {"mse": MSE, "ncc": NCC, "ssim": SSIM, "phash": PHash}[kind](size)

    return build


def _random(argument: str, device: str, _size: int) -> Detector:
    from lcmem_cli.engine.detectors.backbones import random_backbone

    if argument:
        raise InputError(f"detector 'random' takes nothing after a colon, not '{argument}'")
    return random_backbone(device=device)


def _timm(argument: str, device: str, _size: int) -> Detector:
    from lcmem_cli.engine.detectors.backbones import timm_backbone

    if not argument:
        raise InputError("detector 'timm' needs a model: timm:NAME or timm:NAME?weights=FILE")
    return timm_backbone(argument, device=device)


BUILT_IN: tuple[DetectorInfo, ...] = (
    DetectorInfo(
        name="lcmem",
        summary="LCMem: lcmem (the embedded model) or lcmem:CHECKPOINT",
        weights="inside the package, or the file",
        build=_lcmem,
    ),
    DetectorInfo(
        name="mse", summary="negative mean squared error", weights="none", build=_pixel("mse")
    ),
    DetectorInfo(
        name="ncc", summary="normalised cross-correlation", weights="none", build=_pixel("ncc")
    ),
    DetectorInfo(
        name="ssim", summary="structural similarity", weights="none", build=_pixel("ssim")
    ),
    DetectorInfo(name="phash", summary="perceptual hash", weights="none", build=_pixel("phash")),
    DetectorInfo(
        name="random", summary="cosine, random-weight ResNet-18", weights="none", build=_random
    ),
    DetectorInfo(
        name="timm",
        summary="cosine of a timm model's features: timm:NAME[?weights=FILE]",
        weights="the hub's cache, or the file",
        build=_timm,
    ),
)


def detectors() -> dict[str, DetectorInfo]:
    """Return all kinds by name: built in, and those that other packages register.

    A package registers one with an entry point of the group ``lcmem.detectors`` that is a
    ``DetectorInfo``.

    Raises:
        InputError: an entry point is no ``DetectorInfo``, or takes a name that is taken.
    """
    found = {info.name: info for info in BUILT_IN}
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        info = point.load()
        if not isinstance(info, DetectorInfo):
            raise InputError(f"entry point {point.name} ({point.value}) is no DetectorInfo")
        if info.name in found:
            raise InputError(f"entry point {point.value}: detector '{info.name}' exists already")
        found[info.name] = info
    return found


def load_detector(name: str, *, device: str = "auto", input_size: int = 512) -> Detector:
    """Load a detector by name.

    Args:
        name: for example ``lcmem``, ``lcmem:run/checkpoint.safetensors``, ``ncc``, ``timm:NAME``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        input_size: side in pixels for the pixel measures; the others bring their own.

    Raises:
        InputError: unknown name or argument.
        WeightsUnavailableError: the weights are not on this machine.

    Example:
        >>> detector = load_detector("ncc", input_size=64)
        >>> detector.score("a.png", "b.png")
    """
    kind, _, argument = name.partition(":")
    known = detectors()
    if kind not in known:
        raise InputError(f"unknown detector '{name}'; {nearest(kind, known)}")
    detector = known[kind].build(argument, device, input_size)
    detector.name = name
    return detector
