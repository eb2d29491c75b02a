"""In which precision networks compute on which device: decided here and nowhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from lcmem_cli.engine.files import sha256_bytes

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]
AskedPrecision = Literal["auto", "fp32", "bf16", "fp16"]

CHANNELS_LAST = ("cpu", "cuda")
"""Devices on which convolutional networks take this memory layout."""


def resolve_precision(asked: AskedPrecision, device: torch.device | str) -> Precision:
    """Return what a device computes in: ``auto`` is half precision on CUDA, single elsewhere."""
    import torch

    if asked != "auto":
        return asked
    if torch.device(device).type != "cuda":
        return "fp32"
    # What torch emulates counts as supported otherwise, and is slower than fp16 on older cards.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@contextlib.contextmanager
def computing_in(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """Compute in a precision; in ``fp32`` also the convolutions of CUDA, which torch rounds."""
    import torch

    kind = torch.device(device).type
    if precision != "fp32":
        with torch.autocast(kind, dtype=half_type(precision)):
            yield
        return
    if kind != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def half_type(precision: Precision) -> torch.dtype | None:
    """Return the type that autocast takes, ``None`` for single precision."""
    import torch

    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def fingerprint_in(precision: Precision, fingerprint: str) -> str:
    """Return the fingerprint of what computes in a precision; that of ``fp32`` is unchanged."""
    if precision == "fp32":
        return fingerprint
    return sha256_bytes(f"{precision}/{fingerprint}".encode())


def to_device(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring images to a device as float32, to CUDA while the CPU goes on."""
    import torch

    if device.type == "cuda" and batch.device.type == "cpu":
        batch = batch.pin_memory()
    return batch.to(device, torch.float32, non_blocking=True)
