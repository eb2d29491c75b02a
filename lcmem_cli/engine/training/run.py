"""The folder of a training run: who may write it, and which run may be continued in it."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.config import (
    ConfigT,
    FinetuneConfig,
    Section,
    Stage1Config,
    load_config,
    resumable_settings,
)
from lcmem_cli.engine.data.loading import iter_images
from lcmem_cli.engine.data.manifest import Manifest
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.documents import read_document
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.files import folder_lock, write_json
from lcmem_cli.engine.results import Unreadable
from lcmem_cli.engine.runs import CONFIG_NAME, write_run_files

RUN_NAME = "run.json"
HISTORY_NAME = "history.csv"
_CHECK_SIZE = 16


@dataclasses.dataclass(frozen=True)
class _Record:
    """What ``run.json`` says of the run of a folder."""

    run_digest: str
    settings: dict[str, Any]
    data_digest: str


def load_run_config(
    name: str | None,
    kind: type[ConfigT],
    *,
    default: str,
    overrides: Sequence[str] = (),
    output: Path,
    resume: bool,
) -> ConfigT:
    """Load the config of a training: of the run that is continued, unless another is named.

    Args:
        name: shipped name or path; ``None``: the run's own, and ``default`` where there is no run.
        kind: the config class that the caller needs.
        default: shipped name.
        overrides: ``section.key=value`` strings; they win over the file.
        output: run folder.
        resume: whether a run there is continued.

    Raises:
        ConfigError: the file or an override is wrong, or the file is of another kind.
        InputError: no such config.
    """
    if name is None:
        own = resume and all((output / file).is_file() for file in (RUN_NAME, CONFIG_NAME))
        name = str(output / CONFIG_NAME) if own else default
    return load_config(name, kind, overrides=overrides)


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

    The digest covers the data and the config, but not the keys of ``NOT_THE_STUDY``, which may
    change when a run moves to another machine, nor those of ``AFTER_TRAINING`` and ``HOW_LONG``.

    Args:
        output: run folder; made if missing.
        config: resolved config.
        data_digest: identifies data and initial weights.
        resume: whether a run in the folder may be continued.
        ranks: processes; only the first locks and writes.

    Raises:
        InputError: the folder holds a run and ``resume`` is off, or it holds another run, or more
            epochs than the config asks for.
        FolderBusyError: another process is writing there.
    """
    ranks = ranks or Ranks()
    settings = resumable_settings(config)
    text = json.dumps([settings, data_digest], sort_keys=True)
    run = _Record(hashlib.sha256(text.encode()).hexdigest(), settings, data_digest)
    lock = folder_lock(output) if ranks.is_main else contextlib.nullcontext()
    with lock:
        record = output / RUN_NAME
        if record.is_file():
            known = _read_record(record)
            if not resume:
                raise InputError(
                    f"{output}: holds a training run already; continue it with --resume, or choose "
                    "another folder"
                )
            if known.run_digest != run.run_digest:
                raise _another_run(output, known, config)
            _check_epochs(output, config)
        ranks.barrier()
        if ranks.is_main:
            write_run_files(output, config.model_dump(mode="json"))
            write_json(record, dataclasses.asdict(run))
        ranks.barrier()
        yield run.run_digest


def check_continues(output: Path, config: Section) -> bool:
    """Return whether a folder holds a run, which a config would continue.

    Whether data and initial weights are the same too is only known to the training itself.

    Raises:
        InputError: the run there has other settings, or more epochs than the config asks for.
        CorruptFileError: its record is damaged.
    """
    record = output / RUN_NAME
    if not record.is_file():
        return False
    known = _read_record(record)
    if _what_differs(known, config):
        raise _another_run(output, known, config)
    _check_epochs(output, config)
    return True


def _check_epochs(output: Path, config: Section) -> None:
    """Refuse to call a run one of fewer epochs than it has.

    Raises:
        InputError: it has more.
    """
    if not isinstance(config, (Stage1Config, FinetuneConfig)):
        return
    try:
        with (output / HISTORY_NAME).open(newline="", encoding="utf-8") as file:
            trained = sum(1 for _ in csv.DictReader(file))
    except (OSError, ValueError):  # none is finished
        return
    asked = config.schedule.epochs
    if trained > asked:
        raise InputError(
            f"{output}: {trained} epochs are trained already, more than schedule.epochs = {asked}; "
            "ask for as many or more, or choose another folder"
        )


def _another_run(output: Path, known: _Record, config: Section) -> InputError:
    """Say in what the run of a folder differs from the one that is started now."""
    differing = _what_differs(known, config)
    what = f"another {', '.join(differing)}" if differing else "other data or initial weights"
    return InputError(
        f"{output}: holds a run with {what} than given now; resume with the same, or choose "
        "another folder"
    )


def _what_differs(known: _Record, config: Section) -> list[str]:
    """Name the settings in which a recorded run differs from a config, with both values."""
    there, now = _flat(known.settings), _flat(resumable_settings(config))
    return [
        f"{key} ({there.get(key, 'unset')} there, {now.get(key, 'unset')} now)"
        for key in sorted(dict(there.items() ^ now.items()))
    ]


def _flat(settings: Any, prefix: str = "") -> dict[str, str]:
    """Return the values of nested tables as JSON, by dotted keys."""
    if not isinstance(settings, dict):
        return {prefix: json.dumps(settings)} if prefix else {}
    found: dict[str, str] = {}
    for key, value in settings.items():
        found.update(_flat(value, f"{prefix}.{key}" if prefix else key))
    return found


def _read_record(path: Path) -> _Record:
    return read_document(path, _Record, remedy="choose another folder, or remove this one")


def readable_part(manifest: Manifest, compute: Compute) -> tuple[Manifest, tuple[Unreadable, ...]]:
    """Decode every image once, so that no training dies of one hours later."""
    bad: dict[int, str] = {}
    with compute.reporter.task("checking images", len(manifest), unit="image") as task:
        for batch in iter_images(
            manifest.paths(), _CHECK_SIZE, workers=compute.num_workers, batch_size=64
        ):
            bad.update(batch.unreadable)
            task.advance(len(batch.indices) + len(batch.unreadable))
    kept = tuple(r for row, r in enumerate(manifest.records) if row not in bad)
    unreadable = tuple(
        Unreadable(path=manifest.records[row].path, reason=reason) for row, reason in bad.items()
    )
    return Manifest(kept, manifest.basedir, manifest.source), unreadable
