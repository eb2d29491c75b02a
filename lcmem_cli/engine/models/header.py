"""The header of a checkpoint: a JSON document in the metadata of its ``.safetensors`` file.

A checkpoint may come from anywhere, so every number in it has a bound, and nothing is built of it
before all of them are checked. What the fingerprint does not cover (thresholds above all) has a
checksum of its own, so that an edit is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WrapValidator, model_validator

from lcmem_cli.engine.documents import check_document
from lcmem_cli.engine.errors import CheckpointError, CorruptFileError, InputError
from lcmem_cli.engine.models.codec import CodecSpec
from lcmem_cli.engine.models.siamese import MAX_SIDE, NetworkSpec
from lcmem_cli.engine.results import Threshold

HEADER_KEY = "lcmem"
MAX_HEADER_BYTES = 16 << 20
MAX_HEADER_DEPTH = 64
_MAX_CODEC_NUMBER, _MAX_CODEC_LAYERS, _MAX_CODEC_BLOCKS = 8192, 64, 16
_LAYERS = ("layers_per_block", "num_encoder_blocks", "num_decoder_blocks")
_REMEDY = "get the file again, or make it anew with this version of lcmem"
Stage = Literal["stage1", "finetune", "converted"]


def _usable(value: Any, validate: Callable[[Any], Threshold]) -> Threshold:
    try:
        return validate(value)
    except InputError as error:  # of the threshold's own checks, which pydantic does not know
        raise ValueError(str(error)) from error


CheckedThreshold = Annotated[Threshold, WrapValidator(_usable)]


def _bounded(config: dict[str, Any]) -> dict[str, Any]:
    """Refuse a codec's config that asks for more layers or channels than any codec has."""
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        highest = _MAX_CODEC_LAYERS if key in _LAYERS else _MAX_CODEC_NUMBER
        if len(values) > _MAX_CODEC_BLOCKS and key.endswith(("_types", "_channels", "_blocks")):
            raise ValueError(f"{key} has {len(values):,} entries, at most {_MAX_CODEC_BLOCKS}")
        for number in values:
            if isinstance(number, (int, float)) and not -highest <= number <= highest:  # NaN too
                raise ValueError(f"{key} must lie in -{highest:,} to {highest:,}")
            if isinstance(number, (dict, list)):
                raise ValueError(f"{key} is nested")
    return config


class Header(BaseModel):
    """What stands in it; the attributes are those of ``Checkpoint``, and ``checksum``."""

    model_config = ConfigDict(frozen=True, revalidate_instances="always")  # also when written

    format: Literal[2] = 2
    stage: Stage
    network: NetworkSpec
    codec: CodecSpec
    codec_config: Annotated[dict[str, Any], AfterValidator(_bounded)] | None
    image_size: int = Field(ge=1, le=MAX_SIDE)
    thresholds: tuple[CheckedThreshold, ...]
    adapted_thresholds: tuple[CheckedThreshold, ...]
    training: dict[str, Any]
    fingerprint: str
    checksum: str = ""

    @model_validator(mode="after")
    def _statistics_fit(self) -> Header:
        network = self.network
        for name, values in (("mean", network.mean), ("std", network.std)):
            if values is None and network.normalisation != "dataset":
                continue
            if values is None or len(values) != network.in_channels:
                raise ValueError(f"network.{name} must hold a number for each channel")
            if not all(map(math.isfinite, values)):
                raise ValueError(f"network.{name} holds values that are not finite")
        return self

    def to_json(self, adapted_to: Sequence[str]) -> str:
        """Return the document with its checksum.

        Args:
            adapted_to: see ``Checkpoint``; stands outside the header, but in the checksum.

        Raises:
            ValueError: ``read_header`` would refuse it.
        """
        values = json.loads(json.dumps(self.model_dump(exclude={"checksum"})))
        if _is_deeper_than(values, MAX_HEADER_DEPTH):
            raise ValueError("what it tells of its training is nested too deep")
        text = json.dumps({**values, "checksum": checksum(values, adapted_to)}, sort_keys=True)
        if len(text) > MAX_HEADER_BYTES // 4:
            raise ValueError("what it tells of its training is too long")
        return text


def checksum(header: dict[str, Any], adapted_to: Sequence[str]) -> str:
    """Return the SHA-256 of a header, but for its checksum, and of ``adapted_to``."""
    values = {key: value for key, value in header.items() if key != "checksum"}
    text = json.dumps([values, list(adapted_to)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_header(values: dict[str, Any], *, source: str) -> Header:
    """Turn a header as read into a typed one.

    Raises:
        InputError: of another format.
        CorruptFileError: a key is missing or out of its bounds.
    """
    return check_document(values, Header, source=source, remedy=_REMEDY)


def check_sum(values: dict[str, Any], adapted_to: Sequence[str], *, source: str) -> None:
    """Compare a header with its checksum.

    Raises:
        CorruptFileError: they differ.
    """
    if values.get("checksum") != checksum(values, adapted_to):
        raise CorruptFileError(
            f"{source}: its header does not match its checksum: thresholds or settings were "
            f"damaged or edited; {_REMEDY}"
        )


def read_header(path: Path) -> dict[str, Any]:
    """Read the lcmem header of a checkpoint, unchecked, without its weights.

    Raises:
        InputError: no such file.
        CheckpointError: not an lcmem checkpoint.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: not a safetensors file (header of {length} bytes); for the authors' "
                    ".pth files see: lcmem convert"
                )
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(json.loads(raw)["__metadata__"][HEADER_KEY])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: a safetensors file, but not an lcmem checkpoint; convert it with: "
            "lcmem convert"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its lcmem header is not an object")
    if _is_deeper_than(header, MAX_HEADER_DEPTH):
        raise CheckpointError(f"{path}: its lcmem header is nested over {MAX_HEADER_DEPTH} deep")
    return header


def _is_deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list, tuple))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return bool(level)
