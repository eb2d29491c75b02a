"""From an audit to lists of generated images to keep and to reject."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from lcmem_cli.engine.data.paths import paths_outside
from lcmem_cli.engine.errors import CorruptFileError, InputError, LcmemError
from lcmem_cli.engine.evaluation.audit.files import read_audit
from lcmem_cli.engine.files import atomic_path, folder_lock, is_temporary, sha256_file, write_csv
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Unreadable

KEEP_NAME = "keep.csv"
REJECT_NAME = "reject.csv"
UNREADABLE_NAME = "unreadable.csv"
KEPT_FOLDER = "kept"
COLUMNS = ("path", "id", "score", "p_value", "match", "match_id")

Transfer = Literal["none", "copy", "link"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterResult(Result):
    """Which images are kept.

    Attributes:
        rule: why an image is rejected, in words.
        num_kept: images in ``keep.csv``.
        num_rejected: images in ``reject.csv``.
        num_transferred: kept images that were copied or linked.
        transfer: ``none``, ``copy`` or ``link``.
        output: the folder written to.
        basedir: the audited folder; with it as ``--basedir`` the lists are filelists.
        unreadable: images that the audit could not read; neither kept nor rejected.
    """

    rule: str
    num_kept: int
    num_rejected: int
    num_transferred: int
    transfer: Transfer
    output: str
    basedir: str
    unreadable: tuple[Unreadable, ...]


def filter_audit(
    audit_folder: Path,
    output: Path,
    *,
    transfer: Transfer = "none",
    reject_over: float | None = None,
    reject_p: float | None = None,
    reporter: Reporter = SILENT,
) -> FilterResult:
    """Write ``keep.csv``, ``reject.csv`` and ``unreadable.csv``; perhaps copy or link the kept.

    Without a limit of its own the audit's flags decide. Paths are absolute, and ``id`` is the
    path as the audit lists it; with ``--basedir`` the lists are filelists. Kept files
    go to ``kept/`` under the output folder, in the same subfolders; originals are only read.

    Args:
        audit_folder: output of ``audit``.
        output: made if missing.
        transfer: what to do with the kept files; links are symbolic.
        reject_over: reject what scores above this, instead of what is flagged.
        reject_p: reject p-values of at most this, instead of what is flagged.
        reporter: told the progress.

    Raises:
        InputError: no audit there, both limits, a limit out of range, or a file in the way.
        CorruptFileError: the audit's files were damaged or edited.
        LcmemError: kept files that no longer exist (the lists are written).
    """
    if reject_over is not None and reject_p is not None:
        raise InputError("--reject-over and --reject-p exclude each other: give one of them")
    for name, limit in (("--reject-over", reject_over), ("--reject-p", reject_p)):
        if limit is not None and not math.isfinite(limit):
            raise InputError(f"{name} must be a finite number, not {limit}")
    if reject_p is not None and not 0 <= reject_p <= 1:
        raise InputError(f"--reject-p must lie in [0, 1], not {reject_p:g}; for example 0.01")
    document, rows = read_audit(audit_folder)
    try:
        folder = Path(document["generated"]["folder"])
        exact = {match["query"] for match in document["flagged"] if match["exact"]}
        unreadable = tuple(Unreadable(**item) for item in document["generated"]["unreadable"])
    except (KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{audit_folder}: its audit.json was damaged or edited ({error!r}); run the audit again"
        ) from error
    outside = paths_outside([row["query"] for row in rows], folder)
    if outside:
        raise CorruptFileError(
            f"{audit_folder}: lists {len(outside):,} file(s) outside of the audited folder "
            f"{folder}, the first is {outside[0]!r}: it was edited; run the audit again"
        )
    kept: list[list[str]] = []
    rejected: list[list[str]] = []
    for row in rows:
        if reject_over is not None:
            reject = float(row["score"]) > reject_over or row["query"] in exact
        elif reject_p is not None:
            reject = float(row["p_value"]) <= reject_p or row["query"] in exact
        else:
            reject = row["flagged"] == "true"
        path = str(folder / row["query"])
        line = [path, *(row[name] for name in ("query", *COLUMNS[2:]))]
        (rejected if reject else kept).append(line)
    targets = target_names([line[1] for line in kept])
    with folder_lock(output):
        if transfer != "none":
            _refuse_others(output / KEPT_FOLDER, targets)
        write_csv(output / KEEP_NAME, COLUMNS, kept)
        write_csv(output / REJECT_NAME, COLUMNS, rejected)
        write_csv(
            output / UNREADABLE_NAME,
            ("path", "reason"),
            ([str(folder / item.path), item.reason] for item in unreadable),
        )
        count = 0
        if transfer != "none":
            count = _transfer(kept, targets, output / KEPT_FOLDER, transfer, reporter)
    return FilterResult(
        rule=_rule(reject_over, reject_p),
        num_kept=len(kept),
        num_rejected=len(rejected),
        num_transferred=count,
        transfer=transfer,
        output=str(output),
        basedir=str(folder),
        unreadable=unreadable,
    )


def target_names(names: Sequence[str]) -> list[PurePosixPath]:
    """Return a distinct relative path inside one folder for each name.

    Names stay as they are where that is safe. An absolute name, or one that climbs out with
    ``..``, loses its folders and gets a hash of the whole name; so does a name that differs from
    an earlier one only in case, which many file systems do not tell apart.
    """
    taken: set[str] = set()
    targets = []
    for name in names:
        pure = PurePosixPath(name)
        target = pure
        if pure.is_absolute() or ".." in pure.parts or str(pure).casefold() in taken:
            digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
            target = PurePosixPath(f"{digest}-{pure.name[-100:]}")
        taken.add(str(target).casefold())
        targets.append(target)
    return targets


def _refuse_others(folder: Path, targets: Sequence[PurePosixPath]) -> None:
    """Refuse a folder of kept files that holds one which is not to be kept."""
    wanted = {folder / name for name in targets}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            if path not in wanted and not is_temporary(name):
                raise InputError(
                    f"{path}: not among the images that are kept now, perhaps from an earlier run "
                    f"with another rule; remove {folder} or choose another output folder"
                )


def _transfer(
    kept: Sequence[Sequence[str]],
    targets: Sequence[PurePosixPath],
    folder: Path,
    transfer: Transfer,
    reporter: Reporter,
) -> int:
    missing = []
    with reporter.task("kept files", len(kept), unit="files") as task:
        for line, name in zip(kept, targets, strict=True):
            source, target = Path(line[0]), folder / name
            if not source.is_file():
                missing.append(str(source))
            elif transfer == "link":
                _link(source, target)
            else:
                _copy(source, target)
            task.advance()
    if missing:
        names = "".join(f"\n  {name}" for name in missing[:10])
        raise LcmemError(
            f"{len(missing)} kept images are no longer where the audit found them; the lists are "
            f"written{names}"
        )
    return len(kept)


def _copy(source: Path, target: Path) -> None:
    if target.is_symlink() or target.exists():
        if target.is_symlink() or not target.is_file() or _differ(source, target):
            raise _in_the_way(target)
        return
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def _link(source: Path, target: Path) -> None:
    if target.is_symlink() and os.readlink(target) == str(source):
        return
    if target.is_symlink() or target.exists():
        raise _in_the_way(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)


def _differ(source: Path, target: Path) -> bool:
    return source.stat().st_size != target.stat().st_size or (
        sha256_file(source) != sha256_file(target)
    )


def _in_the_way(target: Path) -> InputError:
    return InputError(
        f"{target}: something else is here already; choose another output folder or remove it"
    )


def _rule(reject_over: float | None, reject_p: float | None) -> str:
    if reject_over is not None:
        return f"score over {reject_over:g}, or the same file as a training image"
    if reject_p is not None:
        return f"p-value of at most {reject_p:g}, or the same file as a training image"
    return "flagged by the audit"
