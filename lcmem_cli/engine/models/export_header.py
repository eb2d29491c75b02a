"""What an exported network says of itself: a JSON document inside its file."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from lcmem_cli.engine.documents import FileName, parse_document
from lcmem_cli.engine.models.header import CheckedThreshold
from lcmem_cli.engine.models.siamese import MAX_SIDE

EXPORT_KEY = "lcmem"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportHeader:
    """What scoring with an exported network needs.

    Attributes:
        fingerprint: of the checkpoint that was exported.
        image_size: side in pixels of the square images that the network takes.
        head_weight: ``w``, one number per feature.
        head_bias: ``b``.
        thresholds: on the probability; they belong to the checkpoint.
        codec: what encodes the images inside the network, for people.
        adapted_to: SHA-256 of the image files that the checkpoint was adapted to.
        format: of this document.
    """

    fingerprint: str
    image_size: Annotated[int, Field(ge=1, le=MAX_SIDE)]
    head_weight: tuple[FiniteFloat, ...]
    head_bias: FiniteFloat
    thresholds: tuple[CheckedThreshold, ...]
    codec: FileName
    adapted_to: tuple[str, ...]
    format: Literal[1] = 1

    def to_json(self) -> str:
        """Return the document."""
        explained = {
            "input": f"images [N, 3, {self.image_size}, {self.image_size}] float32 RGB in [0, 1], "
            "resized with antialiased bilinear interpolation, aspect ratio not kept",
            "output": f"features [N, {len(self.head_weight)}] in [0, 1]",
            "score": "sigmoid(sum(head_weight * abs(f1 - f2)) + head_bias)",
        }
        return json.dumps(explained | dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, *, source: str) -> ExportHeader:
        """Read the document.

        Args:
            text: see ``to_json``.
            source: for messages.

        Raises:
            InputError: it is of another format.
            CorruptFileError: a value is missing or out of its bounds.
        """
        return parse_document(text, cls, source=source, remedy="export the checkpoint again")
