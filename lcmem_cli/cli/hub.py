"""``lcmem push`` and ``lcmem pull``: checkpoints on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lcmem_cli.cli import render
from lcmem_cli.cli.options import JsonOption

RepoArgument = Annotated[
    str, typer.Argument(metavar="REPO_ID", help="Repository of the hub, such as name/model.")
]


def push(
    checkpoint: Annotated[
        str, typer.Argument(help="A .safetensors file, or embedded for the one in the package.")
    ],
    repo_id: RepoArgument,
    revision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--revision", help="Branch to push to, made if it does not exist."),
    ] = None,
    private: Annotated[
        bool,
        typer.Option("--private/--public", help="Who sees the repository, if it is made now."),
    ] = True,
    message: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--message", "-m", help="Message of the commit."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a checkpoint and a model card (its header and training config too) on the hub."""
    from lcmem_cli.engine.models.hub import push as run

    result = run(checkpoint, repo_id, revision=revision, private=private, message=message)

    def human() -> None:
        render.line(f"pushed      {', '.join(result.files)} ({result.num_bytes / 1e6:.1f} MB)")
        render.line(f"fingerprint {result.fingerprint}")
        render.line(f"commit      {result.url}")
        render.line(f"use         --checkpoint hf:{result.repo_id}@{result.commit}")

    render.emit(result, as_json=as_json, human=human)


def pull(
    repo_id: RepoArgument,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="[OUT]", help="File to write (default: leave it in the cache)."),
    ] = None,
    revision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--revision", help="Branch, tag or commit (default: the main branch)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a checkpoint from the hub and verify it."""
    from lcmem_cli.engine.models.hub import pull as run

    result = run(repo_id, output, revision=revision)

    def human() -> None:
        render.line(f"fingerprint {result.fingerprint}")
        render.line(f"commit      {result.commit}")
        render.line(f"file        {result.path} ({result.num_bytes / 1e6:.1f} MB)")

    render.emit(result, as_json=as_json, human=human)
