"""TorchScript files, whose program is checked before it is run; see ``script_safety``."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch

from lcmem_cli.engine.detectors.external import (
    FileDetector,
    choose_output,
    read_file,
    size_unknown,
)
from lcmem_cli.engine.detectors.kinds import Request
from lcmem_cli.engine.detectors.script_safety import check_operators, repacked
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import CheckpointError, first_line


class TorchScriptDetector(FileDetector):
    """A TorchScript file that takes images and returns feature vectors.

    The option ``size`` is needed.

    Args:
        request: whose target is a file made by ``torch.jit.save``.

    Raises:
        InputError: no such file, no size, or an output that is not one vector per image.
        CheckpointError: not TorchScript, or a program that does more than compute.
    """

    def __init__(self, request: Request) -> None:
        options = request.options
        content = read_file(request)
        checked = repacked(content, source=request.target)
        if "size" not in options:
            raise size_unknown(request.name)
        self.device = torch.device(resolve_device(request.device))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # files of this kind will be around
                load: Any = torch.jit.load
                self.model: Any = load(io.BytesIO(checked), map_location=self.device)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{request.target}: cannot be loaded as TorchScript: {first_line(error)}"
            ) from error
        check_operators(self.model, source=request.target)
        self.model.eval()
        super().__init__(
            request,
            content,
            size=int(options["size"]),
            layout=options.get("layout", "nchw"),
            output=options.get("output"),
            options=options,
        )

    def run(self, inputs: torch.Tensor) -> Any:
        """Run the network and return the output that is used."""
        try:
            found = self.model(inputs)
        except RuntimeError as error:
            raise self.refused(inputs, str(error).strip().splitlines()[-1]) from error
        if isinstance(found, torch.Tensor):
            return found
        outputs = found if isinstance(found, dict) else {str(i): v for i, v in enumerate(found)}
        return outputs[choose_output(list(outputs), self.output, self.name)]
