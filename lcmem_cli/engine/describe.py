"""What a file or folder made by lcmem is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lcmem_cli.engine.errors import InputError


def describe(name: str | Path | None, *, verify: bool = False) -> dict[str, Any]:
    """Return plain values that describe a checkpoint (verified) or a latent store.

    Args:
        name: folder of a store, or a checkpoint, see ``locate_checkpoint``.
        verify: also compare a store's shards with their checksums.

    Raises:
        InputError: nothing there that lcmem made.
        CorruptFileError: damaged.
        WeightsUnavailableError: a checkpoint cannot be had from the hub.
    """
    from lcmem_cli.engine.models.hub import locate_checkpoint

    path = locate_checkpoint(name)
    if path.is_file():
        from lcmem_cli.engine.models.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(path)
        checkpoint.codec_model()  # is it the one that it should be?
        return {"kind": "checkpoint", "path": str(path), **checkpoint.summary()}
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    from lcmem_cli.engine.store.latents import LatentStore

    store = LatentStore.open(path)
    if verify:
        store.verify()
    splits = sorted({record.split or "-" for record in store.records})
    return {
        "kind": "latent store",
        "path": str(path),
        "num_images": len(store),
        "splits": {s: sum((r.split or "-") == s for r in store.records) for s in splits},
        "image_size": store.image_size,
        "codec": dataclasses.asdict(store.spec),
        "mean": list(store.mean),
        "std": list(store.std),
        "manifest_digest": store.manifest_digest,
        "unreadable": [dataclasses.asdict(u) for u in store.unreadable],
        "verified": verify,
    }
