"""Which commands several processes of a launcher may run."""

from __future__ import annotations

import typer

from lcmem_cli.engine.distributed import launched
from lcmem_cli.engine.errors import InputError

IN_PROCESSES = frozenset(
    {"latents", "train-stage1", "finetune", "benchmark", "robustness", "audit", "leaks", "index"}
)
"""Commands that share their work; of ``index`` those that embed."""


def require_one_process(command: str) -> None:
    """Refuse to run as one of several processes, each of which would do and write the same.

    Raises:
        InputError: a launcher started several; the first of them says so.
        Exit: in the others.
    """
    rank, size = launched()
    if size > 1 and rank == 0:
        raise InputError(f"{command} runs in one process: start it without torchrun")
    if size > 1:
        raise typer.Exit(InputError.exit_code)
