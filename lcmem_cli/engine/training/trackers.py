"""Losses of each epoch for TensorBoard and Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lcmem_cli.engine.config import RuntimeSection
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.errors import MissingExtraError

Log = Callable[[Mapping[str, float]], None]
EXTRAS = {"tensorboard": "trackers", "wandb": "wandb"}
"""The optional dependency of each tracker, whose package has the tracker's name."""
_PROJECT = "lcmem"
_FOLDER = "tensorboard"


def check_trackers(runtime: RuntimeSection) -> None:
    """Raise ``MissingExtraError`` where a tracker's package is not installed."""
    for name in runtime.trackers:
        # A folder of that name, which wandb leaves behind, is found too, but has no origin.
        if getattr(find_spec(name), "origin", None) is None:
            raise MissingExtraError(f'runtime.trackers = ["{name}"]', EXTRAS[name])


@contextlib.contextmanager
def open_trackers(
    runtime: RuntimeSection,
    folder: Path,
    config: dict[str, Any],
    run_digest: str,
    ranks: Ranks,
) -> Iterator[Log]:
    """Yield a function that takes the record of an epoch; only the first process logs.

    Args:
        runtime: names the trackers.
        folder: run folder; TensorBoard's files go to ``tensorboard`` in it.
        config: resolved config, shown by Weights & Biases.
        run_digest: a resumed run of Weights & Biases is found again by it.
        ranks: processes that share the training.

    Raises:
        MissingExtraError: a tracker's package is not installed.
    """
    check_trackers(runtime)
    opened: list[Any] = []
    if runtime.trackers and ranks.is_main:
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        PartialState(cpu=runtime.device == "cpu")  # the trackers ask it which process this is
        for name in dict.fromkeys(runtime.trackers):
            if name == "tensorboard":
                tracker = TensorBoardTracker(_FOLDER, str(folder))
            else:
                tracker = WandBTracker(
                    _PROJECT,
                    name=folder.name,
                    dir=str(folder),
                    config=config,
                    id=run_digest[:32],
                    resume="allow",
                )
            if hasattr(tracker, "start"):  # before accelerate 1.8 it is started when made
                tracker.start()
            opened.append(tracker)

    def log(record: Mapping[str, float]) -> None:
        values = {key: value for key, value in record.items() if key != "epoch"}
        for tracker in opened:
            tracker.log(values, step=int(record["epoch"]))

    try:
        yield log
    finally:
        for tracker in opened:
            tracker.finish()
