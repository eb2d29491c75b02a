"""From an audit to lists of generated images to keep and to reject."""

from __future__ import annotations

import dataclasses
import filecmp
import hashlib
import math
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from lcmem_cli.engine.data.paths import paths_outside
from lcmem_cli.engine.data.sources.base import MEMBER
from lcmem_cli.engine.data.sources.opened import is_there, read_member, split_member
from lcmem_cli.engine.errors import CorruptFileError, InputError, LcmemError
from lcmem_cli.engine.evaluation.audit.files import read_audit, read_best_matches
from lcmem_cli.engine.evaluation.audit.result import Match, SetSummary
from lcmem_cli.engine.files import atomic_path, folder_lock, is_temporary, write_csv
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Unreadable

KEEP_NAME = "keep.csv"
REJECT_NAME = "reject.csv"
UNREADABLE_NAME = "unreadable.csv"
KEPT_FOLDER = "kept"
COLUMNS = ("path", "id", "score", "p_value", "match", "match_id", "tier", "edit")

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rule:
    """What is rejected: scores over a limit, p-values up to one, or else what is flagged."""

    over: float | None
    p_value: float | None

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.over is not None and self.p_value is not None:
            raise InputError("--reject-over and --reject-p exclude each other: give one of them")
        for name, limit in (("--reject-over", self.over), ("--reject-p", self.p_value)):
            if limit is not None and not math.isfinite(limit):
                raise InputError(f"{name} must be a finite number, not {limit}")
        if self.p_value is not None and not 0 <= self.p_value <= 1:
            raise InputError(
                f"--reject-p must lie in [0, 1], not {self.p_value:g}; for example 0.01"
            )

    def rejects(self, match: Match) -> bool:
        """Return whether an image is rejected for its best match."""
        if self.over is not None:
            return match.exact or match.score > self.over
        if self.p_value is not None:
            return match.exact or match.p_value <= self.p_value
        return match.flagged

    @property
    def text(self) -> str:
        """The rule in words."""
        if self.over is not None:
            return f"score over {self.over:g}, or the same file as a training image"
        if self.p_value is not None:
            return f"p-value of at most {self.p_value:g}, or the same file as a training image"
        return "flagged by the audit"


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
    rule = _Rule(over=reject_over, p_value=reject_p)
    audited, matches = _read(audit_folder)
    folder = Path(audited.folder)
    kept = [match for match in matches if not rule.rejects(match)]
    rejected = [match for match in matches if rule.rejects(match)]
    with folder_lock(output):
        targets = target_names([match.query for match in kept])
        files = [
            (folder / match.query, output / KEPT_FOLDER / name)
            for match, name in zip(kept, targets, strict=True)
        ]
        if transfer == "link" and any(split_member(source) for source, _ in files):
            raise InputError(
                f"--link: the images of {audited.source} are no files of their own; use --copy"
            )
        if transfer != "none":
            _refuse_others(output / KEPT_FOLDER, {target for _, target in files})
        for name, listed in ((KEEP_NAME, kept), (REJECT_NAME, rejected)):
            write_csv(output / name, COLUMNS, (_cells(folder, match) for match in listed))
        lines = ([str(folder / item.path), item.reason] for item in audited.unreadable)
        write_csv(output / UNREADABLE_NAME, ("path", "reason"), lines)
        if transfer != "none":
            _transfer(files, transfer, reporter)
    return FilterResult(
        rule=rule.text,
        num_kept=len(kept),
        num_rejected=len(rejected),
        num_transferred=0 if transfer == "none" else len(kept),
        transfer=transfer,
        output=str(output),
        basedir=str(folder),
        unreadable=audited.unreadable,
    )


def _read(audit_folder: Path) -> tuple[SetSummary, list[Match]]:
    """Return an audit's generated set and the best match of each of its images.

    Raises:
        InputError: no audit there.
        CorruptFileError: its files were damaged, or edited to name files outside of the set.
    """
    document = read_audit(audit_folder)
    matches = read_best_matches(audit_folder, document)
    folder = Path(document.generated.folder)
    outside = paths_outside([match.query for match in matches], folder)
    if outside:
        raise CorruptFileError(
            f"{audit_folder}: lists {len(outside):,} file(s) outside of the audited folder "
            f"{folder}, the first is {outside[0]!r}: it was edited; run the audit again"
        )
    return document.generated, matches


def _cells(folder: Path, match: Match) -> list[str]:
    numbers = (repr(match.score), repr(match.p_value))
    names = [match.match, match.match_id, match.tier or "", match.edit]
    return [str(folder / match.query), match.query, *numbers, *names]


def target_names(names: Sequence[str]) -> list[PurePosixPath]:
    """Return a distinct relative path inside one folder for each name.

    Names stay as they are where that is safe. An absolute name, or one that climbs out with
    ``..``, loses its folders and gets a hash of the whole name; so does a name that differs from
    an earlier one only in case, which many file systems do not tell apart. Of an image in an
    archive, the archive's name is a folder.
    """
    taken: set[str] = set()
    targets = []
    for name in names:
        pure = PurePosixPath(name.replace(MEMBER, "/"))
        target = pure
        if pure.is_absolute() or ".." in pure.parts or str(pure).casefold() in taken:
            digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
            target = PurePosixPath(f"{digest}-{pure.name[-100:]}")
        taken.add(str(target).casefold())
        targets.append(target)
    return targets


def _refuse_others(folder: Path, wanted: Collection[Path]) -> None:
    """Refuse a folder of kept files that holds one which is not to be kept."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent) / name for name in names):
            if path not in wanted and not is_temporary(path.name):
                raise InputError(
                    f"{path}: not among the images that are kept now, perhaps from an earlier run "
                    f"with another rule; remove {folder} or choose another output folder"
                )


def _transfer(files: Sequence[tuple[Path, Path]], transfer: Transfer, reporter: Reporter) -> None:
    """Copy or link each file to its target; what is there already stays."""
    missing = []
    with reporter.task("kept files", len(files), unit="files") as task:
        for source, target in files:
            if not is_there(source):
                missing.append(source)
            elif not _is_there(source, target, transfer):
                _put(source, target, transfer)
            task.advance()
    if missing:
        names = "".join(f"\n  {name}" for name in missing[:10])
        raise LcmemError(
            f"{len(missing)} kept images are no longer where the audit found them; the lists are "
            f"written{names}"
        )


def _is_there(source: Path, target: Path, transfer: Transfer) -> bool:
    """Return whether a target stands already.

    Raises:
        InputError: something else is in its place, be it a link where a copy is wanted.
    """
    if not target.is_symlink() and not target.exists():
        return False
    if transfer == "link":
        same = target.is_symlink() and os.readlink(target) == str(source)
    else:
        same = not target.is_symlink() and target.is_file() and _is_same(source, target)
    if not same:
        raise InputError(
            f"{target}: something else is here already; choose another output folder or remove it"
        )
    return True


def _put(source: Path, target: Path, transfer: Transfer) -> None:
    if transfer == "link":
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
    else:
        with atomic_path(target) as temporary:
            data = read_member(source)
            if data is None:
                shutil.copyfile(source, temporary)
            else:
                temporary.write_bytes(data)


def _is_same(source: Path, target: Path) -> bool:
    """Return whether a file holds what an image does."""
    data = read_member(source)
    if data is not None:
        return target.read_bytes() == data
    return filecmp.cmp(source, target, shallow=False)
