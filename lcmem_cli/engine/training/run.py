"""The folder of a training run: who may write it, and which run may be continued in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lcmem_cli.engine.config import Section
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.files import folder_lock, write_json
from lcmem_cli.engine.runs import write_run_files

RUN_NAME = "run.json"


@contextlib.contextmanager
def open_training_folder(
    output: Path,
    config: Section,
    data_digest: str,
    *,
    resume: bool,
    ranks: Ranks | None = None,
) -> Iterator[str]:
    """Lock a run folder, write the resolved config into it, and yield the run's digest.

    The digest covers the config (but not the device and the number of workers, which may change
    when a run moves to another machine) and the data.

    Args:
        output: run folder; made if missing.
        config: resolved config.
        data_digest: identifies data and initial weights.
        resume: whether a run in the folder may be continued.
        ranks: processes; only the first locks and writes.

    Raises:
        InputError: the folder holds a run and ``resume`` is off, or it holds another run.
        FolderBusyError: another process is writing there.
    """
    ranks = ranks or Ranks()
    values = config.model_dump(mode="json")
    identity = {
        **values,
        "runtime": {
            k: v for k, v in values["runtime"].items() if k not in ("device", "num_workers")
        },
    }
    text = json.dumps([identity, data_digest], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    lock = folder_lock(output) if ranks.is_main else contextlib.nullcontext()
    with lock:
        record = output / RUN_NAME
        if record.is_file():
            known = json.loads(record.read_text(encoding="utf-8"))
            if not resume:
                raise InputError(
                    f"{output}: holds a training run already; continue it with --resume, or choose "
                    "another folder"
                )
            if known.get("run_digest") != digest:
                raise InputError(
                    f"{output}: holds a run with another config, data or initial weights than "
                    "given now (compare its config.toml); resume with the same, or choose another "
                    "folder"
                )
        ranks.barrier()
        if ranks.is_main:
            write_run_files(output, values)
            write_json(record, {"run_digest": digest, "data_digest": data_digest})
        ranks.barrier()
        yield digest
