"""The results folder of a study: what it belongs to, and the parts that are finished."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.files import (
    LOCK_NAME,
    atomic_path,
    dump_json,
    folder_lock,
    sha256_bytes,
    write_json,
)
from lcmem_cli.engine.results import Unreadable
from lcmem_cli.engine.runs import CONFIG_NAME, ENVIRONMENT_NAME, write_run_files

INPUTS_NAME = "inputs.json"
STAGES_NAME = "stages"


class PartKey(NamedTuple):
    """Which part of a study's scores.

    Attributes:
        detector: name that it is shown under.
        fingerprint: of the detector.
        setting: such as an edit; empty where a detector has one part only.
    """

    detector: str
    fingerprint: str
    setting: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Scores by a detector; NaN where an image is unreadable.

    Attributes:
        test: ``[n]`` of the pairs that are judged.
        fit: ``[m]`` of those that thresholds are fitted on; ``None`` where there are none.
        unreadable: images that the detector could not use.
        adapted_to: see ``DetectorResult``.
    """

    test: NDArray[np.float64]
    fit: NDArray[np.float64] | None = None
    unreadable: tuple[Unreadable, ...] = ()
    adapted_to: dict[str, int] | None = None


class ResultsFolder:
    """Keeps the finished parts of a study, so that a killed one continues.

    Args:
        folder: that of the study's results.
        digest: SHA-256 of everything that the scores depend on, except the detectors.
        others: fingerprints by name of detectors of earlier runs, which were not named now.
    """

    def __init__(self, folder: Path, digest: str, others: Mapping[str, str]) -> None:
        self.folder = folder
        self.digest = digest
        self.others = others

    def load(self, key: PartKey) -> Part | None:
        """Return a finished part, or ``None`` where it is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(key), framework="numpy") as file:
                facts = json.loads((file.metadata() or {}).get("facts", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, ValueError, SafetensorError):
            return None
        if facts.pop("checksum", None) != _checksum(arrays, facts):
            return None
        unreadable = tuple(Unreadable(**item) for item in facts["unreadable"])
        return Part(**arrays, unreadable=unreadable, adapted_to=facts["adapted_to"])

    def save(self, key: PartKey, part: Part) -> None:
        """Keep a finished part."""
        from safetensors.numpy import save_file

        arrays = {"test": part.test} if part.fit is None else {"test": part.test, "fit": part.fit}
        unreadable = [dataclasses.asdict(item) for item in part.unreadable]
        facts: dict[str, Any] = {"unreadable": unreadable, "adapted_to": part.adapted_to}
        facts["checksum"] = _checksum(arrays, facts)
        with atomic_path(self._path(key)) as temporary:
            # One entry only: the library writes several in an order that changes from run to run.
            save_file(arrays, temporary, metadata={"facts": json.dumps(facts)})

    def _path(self, key: PartKey) -> Path:
        # The digest is part of the name, so that a part of other inputs is never found.
        name = sha256_bytes(json.dumps([self.digest, *filter(None, key)]).encode())[:32]
        return self.folder / STAGES_NAME / f"{name}.safetensors"


@contextlib.contextmanager
def open_results(
    folder: Path,
    inputs: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    *,
    config: dict[str, Any],
    results: Sequence[str],
    overwrite: bool,
) -> Iterator[ResultsFolder]:
    """Hold a results folder.

    What the study depends on is written down first; a folder of another study is refused, so
    results of different data, seeds or checkpoints never mix.

    Args:
        folder: made if missing.
        inputs: everything that the numbers depend on, except the detectors.
        fingerprints: of the detectors by name. Others may be added to a study later; one with a
            known name and another fingerprint is refused.
        config: written as ``config.toml``.
        results: names of the files that the study writes.
        overwrite: remove what another study, or another detector, has left here.

    Raises:
        InputError: the folder holds something else.
        FolderBusyError: another process writes to it.
    """
    inputs = json.loads(dump_json(inputs))  # as they are read again
    digest = sha256_bytes(dump_json(inputs).encode())
    ours = {INPUTS_NAME, STAGES_NAME, CONFIG_NAME, ENVIRONMENT_NAME, LOCK_NAME, *results}
    with folder_lock(folder):
        known: dict[str, str] = {}
        if (folder / INPUTS_NAME).is_file():
            before = _read_inputs(folder / INPUTS_NAME)
            known = before["detectors"]
            problem = _difference(before["inputs"], inputs, known, fingerprints)
            if problem and not overwrite:
                raise InputError(
                    f"{folder}: holds results of another study ({problem}); choose another folder, "
                    "or pass --overwrite to replace them"
                )
            if overwrite:
                known = {}
            if problem:
                # The record stays until it is replaced: without it the rest would look foreign.
                _remove(folder / name for name in ours - {LOCK_NAME, INPUTS_NAME})
        else:
            _refuse_foreign(folder, ours)
        others = {name: known[name] for name in known if name not in fingerprints}
        detectors = {**others, **fingerprints}
        write_json(
            folder / INPUTS_NAME, {"inputs": inputs, "digest": digest, "detectors": detectors}
        )
        write_run_files(folder, config)
        yield ResultsFolder(folder, digest, others)


def _refuse_foreign(folder: Path, ours: set[str]) -> None:
    names = (path.name for path in folder.iterdir())
    foreign = sorted(name for name in names if name not in ours and not name.endswith(".tmp"))
    if foreign:
        raise InputError(
            f"{folder}: not empty, and not a results folder of lcmem (it holds "
            f"{', '.join(map(repr, foreign[:3]))}); choose another folder"
        )


def _remove(paths: Iterator[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _checksum(arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\0{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read_inputs(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found["inputs"], dict) and isinstance(found["detectors"], dict):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: damaged; remove the folder, or choose another one")


def _difference(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    known: Mapping[str, str],
    fingerprints: Mapping[str, str],
) -> str:
    """Say in what two studies differ; empty if they are the same."""
    # Digests come last: what is named in words, such as the seed, says more.
    for key in sorted({**before, **now}, key=lambda key: "digest" in key):
        if before.get(key) != now.get(key):
            if "digest" in key:
                return f"{key.removesuffix('_digest').replace('_', ' ')}: other content"
            return f"{key.replace('_', ' ')}: {before.get(key)!r} there, {now.get(key)!r} now"
    for name, fingerprint in fingerprints.items():
        if known.get(name, fingerprint) != fingerprint:
            return f"detector {name}: {known[name][:12]} there, {fingerprint[:12]} now"
    return ""
