"""What the benchmark and the robustness study share: detectors, scoring, results folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.data.batching import NOT_EMBEDDED
from lcmem_cli.engine.data.images import is_readable
from lcmem_cli.engine.data.manifest import Manifest, Record
from lcmem_cli.engine.data.pairs import dataset_name, single_identity_datasets
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.detectors.registry import check_name, load_detector
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.errors import (
    InputError,
    MissingExtraError,
    WeightsUnavailableError,
)
from lcmem_cli.engine.files import (
    LOCK_NAME,
    atomic_path,
    dump_json,
    folder_lock,
    sha256_bytes,
    write_json,
)
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Unreadable, check_unreadable
from lcmem_cli.engine.runs import CONFIG_NAME, ENVIRONMENT_NAME, write_run_files

DEFAULT_DETECTORS = ("lcmem", "mse", "ssim", "ncc", "phash", "random")
INPUTS_NAME = "inputs.json"
THRESHOLDS_NAME = "thresholds.json"
STAGES_NAME = "stages"
_TILE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A detector that could not be run.

    Attributes:
        name: as the user named it.
        reason: why, and what to do about it.
    """

    name: str
    reason: str


class Available:
    """Detectors that can run here.

    Args:
        fingerprints: by name, in the order asked for.
        skipped: those that cannot run.
        adaptable: those that may be adapted to a kind of images.
        kept: those that are loaded: the first one, which is used next, and such as cost much to
            load.
        device: where they compute.
        input_size: of the pixel measures.
    """

    def __init__(
        self,
        fingerprints: dict[str, str],
        skipped: Sequence[Skipped],
        adaptable: Collection[str],
        kept: Mapping[str, Detector],
        *,
        device: str,
        input_size: int,
    ) -> None:
        self.fingerprints = fingerprints
        self.skipped = tuple(skipped)
        self.adaptable = frozenset(adaptable)
        self._kept = dict(kept)
        self._device = device
        self._input_size = input_size

    def take(self, name: str) -> Detector:
        """Return a detector; it is not held here any more, to save memory."""
        return self._kept.pop(name, None) or load_detector(
            name, device=self._device, input_size=self._input_size
        )


class ResultsFolder:
    """A folder that holds the results of one study, and its finished parts.

    What the study depends on is written down first; a folder of another study is refused, so
    results of different data, seeds or checkpoints never mix. Finished parts are kept, so that a
    killed study continues.

    Args:
        folder: made if missing.
        inputs: everything that the numbers depend on, except the detectors.
        fingerprints: of the detectors by name. Others may be added to a study later; one with a
            known name and another fingerprint is refused.
        results: names of the files that the study writes.
        overwrite: remove what another study has left here.

    Raises:
        InputError: the folder holds something else.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Mapping[str, Any],
        fingerprints: Mapping[str, str],
        *,
        results: Sequence[str],
        overwrite: bool,
    ) -> None:
        self.folder = folder
        self.inputs: dict[str, Any] = json.loads(dump_json(inputs))
        self.digest = sha256_bytes(dump_json(self.inputs).encode())
        ours = {INPUTS_NAME, STAGES_NAME, CONFIG_NAME, ENVIRONMENT_NAME, LOCK_NAME, *results}
        known: dict[str, str] = {}
        if (folder / INPUTS_NAME).is_file():
            before = _read_inputs(folder / INPUTS_NAME)
            known = before["detectors"]
            problem = _difference(before["inputs"], self.inputs, known, fingerprints)
            if problem and not overwrite:
                raise InputError(
                    f"{folder}: holds results of another study ({problem}); choose another folder, "
                    "or pass --overwrite to replace them"
                )
            if problem:
                known = {}
                self._remove(ours - {LOCK_NAME, INPUTS_NAME})
        else:
            foreign = sorted(p.name for p in folder.iterdir() if p.name not in ours)
            foreign = [name for name in foreign if not name.endswith(".tmp")]
            if foreign:
                raise InputError(
                    f"{folder}: not empty, and not a results folder of lcmem (it holds "
                    f"{', '.join(map(repr, foreign[:3]))}); choose another folder"
                )
        write_json(
            folder / INPUTS_NAME,
            {
                "inputs": self.inputs,
                "digest": self.digest,
                "detectors": {**known, **fingerprints},
            },
        )

    def has(self, *key: str, basedir: Path | None = None) -> bool:
        """Return whether a part is finished and whole.

        Args:
            *key: see ``save``.
            basedir: folder of the images; with it, a part that lacks an image which can be read by
                now is not finished.
        """
        arrays = self.load(*key)
        if arrays is None:
            return False
        if basedir is None or "unreadable" not in arrays:
            return True
        return not any(
            is_readable(basedir / item.path)
            for item in unpack_unreadable(arrays["unreadable"])
            if not item.reason.startswith(NOT_EMBEDDED)  # the same network gives the same again
        )

    def load(self, *key: str) -> dict[str, NDArray[Any]] | None:
        """Return the arrays of a finished part, or ``None`` where it is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._stage(key), framework="numpy") as file:
                checksum = (file.metadata() or {}).get("checksum")
                arrays: dict[str, NDArray[Any]] = {
                    name: file.get_tensor(name) for name in file.keys()
                }
        except (OSError, SafetensorError):
            return None
        return arrays if checksum == _checksum(arrays) else None

    def save(self, arrays: Mapping[str, NDArray[Any]], *key: str) -> None:
        """Keep the arrays of a finished part, named by a key such as detector and setting."""
        from safetensors.numpy import save_file

        with atomic_path(self._stage(key)) as temporary:
            save_file(dict(arrays), temporary, metadata={"checksum": _checksum(arrays)})

    def _stage(self, key: Sequence[str]) -> Path:
        name = sha256_bytes(json.dumps([self.digest, *key]).encode())[:32]
        return self.folder / STAGES_NAME / f"{name}.safetensors"

    def _remove(self, names: set[str]) -> None:
        for name in names:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def open_results(
    folder: Path,
    inputs: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    *,
    config: dict[str, Any],
    results: Sequence[str],
    overwrite: bool,
    ranks: Ranks,
) -> Iterator[ResultsFolder | None]:
    """Hold a results folder in the first process; the others get ``None``.

    Args:
        folder: made if missing.
        inputs: see ``ResultsFolder``.
        fingerprints: see ``ResultsFolder``.
        config: written as ``config.toml``.
        results: see ``ResultsFolder``.
        overwrite: see ``ResultsFolder``.
        ranks: the group of processes.

    Raises:
        InputError: the folder holds something else.
        FolderBusyError: another process writes to it.
    """
    if not ranks.is_main:
        yield None
        return
    with folder_lock(folder):
        held = ResultsFolder(folder, inputs, fingerprints, results=results, overwrite=overwrite)
        write_run_files(folder, config)
        yield held


def check_names(names: Sequence[str]) -> None:
    """Refuse unknown or repeated detector names before any work is done.

    Raises:
        InputError: a name is unknown, empty or given twice.
    """
    if not names:
        raise InputError(f"no detector named; for example {','.join(DEFAULT_DETECTORS)}")
    for name in names:
        check_name(name)
        if names.count(name) > 1:
            raise InputError(f"detector '{name}' is named twice; name each one once")


def find_detectors(
    names: Sequence[str], *, device: str, input_size: int, strict: bool, reporter: Reporter = SILENT
) -> Available:
    """Find out which detectors can run; most are loaded and let go again, to bound memory.

    Args:
        names: detectors, checked by ``check_names``.
        device: where they would compute.
        input_size: of the pixel measures.
        strict: raise where a detector's weights cannot be had, instead of leaving it out.
        reporter: warned of each that is left out.

    Raises:
        WeightsUnavailableError: with ``strict``, or when no detector is left.
        InputError: a checkpoint that is named is not there, or not one.
    """
    fingerprints: dict[str, str] = {}
    skipped: list[Skipped] = []
    adaptable: list[str] = []
    kept: dict[str, Detector] = {}
    for name in names:
        try:
            detector = load_detector(name, device=device, input_size=input_size)
            fingerprints[name] = detector.fingerprint
            if not kept or detector.adapted_to:
                kept[name] = detector
            if detector.is_adaptable:
                adaptable.append(name)
        except (WeightsUnavailableError, MissingExtraError) as error:
            if strict:
                raise
            skipped.append(Skipped(name=name, reason=str(error)))
            reporter.warn(f"detector '{name}' is left out: {error}")
    if not fingerprints:
        reasons = "\n".join(f"  {item.name}: {item.reason}" for item in skipped)
        raise WeightsUnavailableError(f"none of the detectors can run here:\n{reasons}")
    return Available(fingerprints, skipped, adaptable, kept, device=device, input_size=input_size)


def fit_records(manifest: Manifest, reporter: Reporter = SILENT) -> tuple[Record, ...]:
    """Return the records that thresholds can be fitted on: data sets with two identities or more.

    Args:
        manifest: the split to fit on.
        reporter: warned of the data sets that are left out.
    """
    left_out = single_identity_datasets(manifest.records)
    if left_out:
        reporter.warn(
            f"thresholds are fitted without {', '.join(map(repr, left_out))}: a single identity "
            "there, so no negative pair"
        )
    return tuple(r for r in manifest.records if dataset_name(r) not in set(left_out))


def content_digest(records: Sequence[Record], contents: Sequence[str | None]) -> str:
    """Return a SHA-256 over a list of images: names, identities, data sets and file contents.

    Args:
        records: the images.
        contents: SHA-256 of each file, ``None`` where it cannot be read.
    """
    lines = []
    for record, content in zip(records, contents, strict=True):
        cells = (record.path, record.id, record.split or "", record.ds_name or "")
        text = "\0".join((*cells, content or "unreadable"))
        lines.append(text.encode("utf-8", "surrogateescape"))
    return sha256_bytes(b"\0\0".join(lines))


def check_splits(split: str, fit_split: str | None) -> None:
    """Refuse to fit thresholds on what they are to be judged on.

    Raises:
        InputError: both splits are the same.
    """
    if split == fit_split:
        raise InputError(
            f"--fit-split: thresholds must not be fitted on the split that is judged ({split})"
        )


def all_unreadable(
    parts: Iterable[Iterable[Unreadable]], limit: int | None, reporter: Reporter
) -> tuple[Unreadable, ...]:
    """Return the images that any detector could not use, each once.

    Args:
        parts: of each detector.
        limit: how many are allowed; ``None``: any number.
        reporter: warned of them.

    Raises:
        UnreadableLimitError: more than allowed.
    """
    unreadable = tuple({item.path: item for part in parts for item in part}.values())
    check_unreadable(unreadable, limit)
    if unreadable:
        reporter.warn(
            f"{len(unreadable)} image(s) could not be read; they are left out, with their pairs"
        )
    return unreadable


def refuse_adapted_to(
    detector: Detector, records: Sequence[Record], contents: Iterable[str | None]
) -> None:
    """Refuse a detector that was adapted to images that it is to be judged on.

    Args:
        detector: to be judged.
        records: what it is judged on.
        contents: SHA-256 of the file of each.

    Raises:
        InputError: there are such images.
    """
    used = [r for r, c in zip(records, contents, strict=True) if c in detector.adapted_to]
    if used:
        raise InputError(
            f"{detector.name} was adapted to {len(used):,} of the images that it would be judged "
            f"on or that its thresholds would be fitted on, {used[0].path!r} first; adapt it to "
            "others, such as those of TRAIN"
        )


def pack_json(value: Any) -> NDArray[np.uint8]:
    """Return a JSON value as bytes, to be kept beside arrays."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def unpack_json(packed: NDArray[np.uint8]) -> Any:
    """Return what ``pack_json`` was given."""
    return json.loads(packed.tobytes())


def pack_unreadable(unreadable: Sequence[Unreadable]) -> NDArray[np.uint8]:
    """Return a list of unreadable images as bytes, to be kept beside arrays."""
    return pack_json([dataclasses.asdict(item) for item in unreadable])


def unpack_unreadable(packed: NDArray[np.uint8]) -> list[Unreadable]:
    """Return what ``pack_unreadable`` was given."""
    return [Unreadable(**item) for item in unpack_json(packed)]


def named_unreadable(
    records: Sequence[Record], basedir: Path, unreadable: Iterable[Unreadable]
) -> list[Unreadable]:
    """Return unreadable files under the names that the list of images gives them."""
    reasons = {item.path: item.reason for item in unreadable}
    return [
        Unreadable(path=record.path, reason=reasons[path])
        for record in records
        if (path := str(basedir / record.path)) in reasons
    ]


def score_dense(
    detector: Detector,
    features: NDArray[Any],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    groups: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Score pairs that make up most of a matrix within each group, tile by tile.

    Args:
        detector: what scores.
        features: ``[d, k]``, perhaps a memory map.
        first: ``[n]`` feature row of each first image, or -1 where it is unreadable.
        second: ``[n]`` the same for the second image.
        groups: ``[n]`` such as the data set of each pair.

    Returns:
        ``[n]``; NaN where an image is unreadable. Up to rounding the same as ``score_listed``.
    """
    scores = np.full(len(first), np.nan)
    for group in np.unique(groups):
        usable = np.flatnonzero((first >= 0) & (second >= 0) & (groups == group))
        rows, local = np.unique([first[usable], second[usable]], return_inverse=True)
        top, left = np.sort(local.reshape(2, -1), axis=0)  # scores are symmetric
        tiles = top // _TILE * (len(rows) // _TILE + 1) + left // _TILE
        order = np.argsort(tiles, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(tiles[order])) + 1):
            if not len(part):
                continue
            i, j = top[part[0]] // _TILE * _TILE, left[part[0]] // _TILE * _TILE
            matrix = detector.score_matrix(
                features[rows[i : i + _TILE]], features[rows[j : j + _TILE]]
            )
            scores[usable[part]] = matrix[top[part] - i, left[part] - j]
    return scores


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
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
    for key in sorted({**before, **now}, key=lambda key: "digest" in key):  # words say more
        if before.get(key) != now.get(key):
            if "digest" in key:
                return f"{key.removesuffix('_digest').replace('_', ' ')}: other content"
            return f"{key.replace('_', ' ')}: {before.get(key)!r} there, {now.get(key)!r} now"
    for name, fingerprint in fingerprints.items():
        if known.get(name, fingerprint) != fingerprint:
            return f"detector {name}: {known[name][:12]} there, {fingerprint[:12]} now"
    return ""
