"""TorchScript files.

Such a file holds a program. It is run by torch's own interpreter, which knows torch's operators and
nothing of Python, so it is far from the freedom of a pickle; still, use files only from those you
trust. A plain pickle is never loaded.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from typing import Any

import torch

from lcmem_cli.engine.detectors.external import (
    FileDetector,
    choose_output,
    read_file,
    size_unknown,
)
from lcmem_cli.engine.detectors.kinds import Request
from lcmem_cli.engine.distributed import resolve_device
from lcmem_cli.engine.errors import CheckpointError, first_line


class TorchScriptDetector(FileDetector):
    """A TorchScript file that takes images and returns feature vectors.

    The option ``size`` is needed.

    Args:
        request: whose target is a file made by ``torch.jit.save``.

    Raises:
        InputError: no such file, no size, or an output that is not one vector per image.
        CheckpointError: not TorchScript.
    """

    def __init__(self, request: Request) -> None:
        options = request.options
        content = read_file(request)
        _check_archive(content, source=request.target)
        if "size" not in options:
            raise size_unknown(request.name)
        self.device = torch.device(resolve_device(request.device))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # files of this kind will be around
                load: Any = torch.jit.load
                self.model: Any = load(io.BytesIO(content), map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{request.target}: cannot be loaded as TorchScript: {first_line(error)}"
            ) from error
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


def _check_archive(content: bytes, *, source: str) -> None:
    """Refuse everything but the archive that ``torch.jit.save`` writes.

    Raises:
        CheckpointError: saying what the file seems to be.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{source}: not TorchScript (an archive made by torch.jit.save). If it is a pickle, "
            "loading it would execute code from the file; export the network with torch.jit.trace"
        ) from error
    if "constants.pkl" not in names or not any(name.startswith("code/") for name in names):
        raise CheckpointError(
            f"{source}: a file of torch.save, not TorchScript: it holds weights but no network. "
            "Weights of a timm model: timm:NAME?weights=FILE; others: export the network with "
            "torch.jit.trace"
        )
