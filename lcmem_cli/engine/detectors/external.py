"""What networks have in common that a user brings as one file, such as SSCD (Pizzi et al. 2022)."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lcmem_cli.engine.detectors.base import check_features
from lcmem_cli.engine.detectors.kinds import Request
from lcmem_cli.engine.detectors.vectors import NetworkDetector, Preprocessing
from lcmem_cli.engine.errors import InputError, first_line
from lcmem_cli.engine.files import sha256_bytes


class FileDetector(NetworkDetector):
    """A network from a file, tried on a grey image before anything is scored.

    Args:
        request: brings the name.
        content: of the file; part of the fingerprint.
        size: side in pixels of its input.
        layout: of its input, ``nchw`` or ``nhwc``.
        output: which of its outputs is used; may be ``None`` where it has one.
        options: see ``read_options``; ``mean`` and ``std`` are ImageNet's by default.

    Raises:
        InputError: it refuses the input, or its output is not one vector per image.
    """

    def __init__(
        self,
        request: Request,
        content: bytes,
        *,
        size: int,
        layout: str,
        output: str | None,
        options: Mapping[str, Any],
    ) -> None:
        given = {key: options[key] for key in ("mean", "std", "channels") if key in options}
        self.name, self.layout, self.output = request.name, layout, output
        self.preprocessing = Preprocessing(size=size, **given)
        probe = self.forward(torch.full((1, 3, size, size), 0.5))
        features = check_features(probe, 1, None, source=f"detector '{self.name}'")
        rest = {key: options.get(key) for key in ("layout", "output", "score")}
        settings = f"{sha256_bytes(content)}/{self.preprocessing}/{sorted(rest.items())}"
        super().__init__(
            name=self.name,
            fingerprint=hashlib.sha256(settings.encode()).hexdigest(),
            preprocessing=self.preprocessing,
            num_features=features.shape[1],
            likeness=options.get("score", "cosine"),
        )

    @torch.inference_mode()
    def forward(self, batch: torch.Tensor) -> Any:
        """Run the network: ``[n, 3, size, size]`` in [0, 1] to ``[n, num_features]``."""
        inputs = self.preprocessing.apply(batch.to(self.device, torch.float32))
        if self.layout == "nhwc":
            inputs = inputs.permute(0, 2, 3, 1)
        return self.run(inputs.contiguous())

    @abc.abstractmethod
    def run(self, inputs: torch.Tensor) -> Any:
        """Run the network on inputs in its layout."""

    def refused(self, inputs: torch.Tensor, reason: str) -> InputError:
        """Return the error that says that the network does not take an input."""
        return InputError(
            f"detector '{self.name}': the network refuses an input of the shape "
            f"{list(inputs.shape)}: {reason}"
        )


def choose_output(names: list[str], wanted: str | None, name: str) -> str:
    """Return the output that is used: the wanted one, or the only one.

    Raises:
        InputError: there are several, or none of that name.
    """
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        raise InputError(
            f"detector '{name}': the network has the outputs {', '.join(names)}; choose one with "
            "?output="
        )
    return wanted


def read_file(request: Request) -> bytes:
    """Read the file that a name asks for, once, so that what is checked is what is run.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    path = Path(request.target)
    if not path.is_file():
        raise InputError(f"detector '{request.name}': no such file: {path}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"detector '{request.name}': {path} cannot be read: {first_line(error)}"
        ) from error


def size_unknown(name: str) -> InputError:
    """Return the error that asks for the side of a network's input."""
    return InputError(
        f"detector '{name}': the size of its input is not in the file; add ?size=PIXELS "
        "(288 for SSCD)"
    )
