"""``lcmem push`` and ``lcmem pull``: checkpoints on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from lcmem_cli.cli import render
from lcmem_cli.cli.options import INPUT, OUTPUT, JsonOptions, argument, option

_REPO = argument("Repository of the hub, such as name/model.")


class PushOptions(JsonOptions):
    """What an upload is asked for."""

    checkpoint: str = argument("A .safetensors file, or embedded for the one in the package.")
    repo_id: str = _REPO
    revision: str | None = option(OUTPUT, "Branch to push to, made if it does not exist.", None)
    private: bool = option(
        OUTPUT, "Who sees the repository, if it is made now.", True, flags="--private/--public"
    )
    message: str | None = option(OUTPUT, "Message of the commit.", None, flags="--message -m")


class PullOptions(JsonOptions):
    """What a download is asked for."""

    repo_id: str = _REPO
    output: Path | None = argument(
        "File to write (default: leave it in the cache).", None, metavar="OUT"
    )
    revision: str | None = option(INPUT, "Branch, tag or commit (default: the main branch).", None)


def push(options: PushOptions) -> None:
    """Publish a checkpoint and a model card (its header and training config too) on the hub.

    Examples:
        lcmem push run/checkpoint.safetensors name/model
    """
    from lcmem_cli.engine.models.hub import push as run

    result = run(**options.arguments())

    def human() -> None:
        render.line(f"pushed      {', '.join(result.files)} ({result.num_bytes / 1e6:.1f} MB)")
        render.line(f"fingerprint {result.fingerprint}")
        render.line(f"commit      {result.url}")
        render.line(f"use         --checkpoint hf:{result.repo_id}@{result.commit}")

    render.emit(result, as_json=options.as_json, human=human)


def pull(options: PullOptions) -> None:
    """Fetch a checkpoint from the hub and verify it.

    Examples:
        lcmem pull name/model model.safetensors
    """
    from lcmem_cli.engine.models.hub import pull as run

    result = run(**options.arguments())

    def human() -> None:
        render.line(f"fingerprint {result.fingerprint}")
        render.line(f"commit      {result.commit}")
        render.line(f"file        {result.path} ({result.num_bytes / 1e6:.1f} MB)")

    render.emit(result, as_json=options.as_json, human=human)
