"""Writing the filelist of a folder, with identities found in its paths and a split by identity."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from lcmem_cli.engine.data.manifest import (
    SPLITS,
    Frames,
    Manifest,
    Record,
    load_manifest,
    split_by_identity,
    tells_identities,
    write_manifest,
)
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSize:
    """How many images and identities a split has."""

    images: int
    identities: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilelistResult(Result):
    """A filelist that was written.

    Attributes:
        output: the file.
        basedir: folder that its paths are relative to.
        kept_split: whether the source had a split, which was kept.
        splits: size of ``TRAIN``, ``VAL`` and ``TEST``.
    """

    output: str
    basedir: str
    kept_split: bool
    splits: dict[str, SplitSize]


def make_filelist(
    source: Path,
    output: Path,
    *,
    basedir: Path | None = None,
    id_regex: str | None = None,
    seed: int = 0,
    frames: Frames = "first",
    reporter: Reporter = SILENT,
) -> FilelistResult:
    """Write the filelist of a folder, or of a list without a split, with a split by identity.

    Args:
        source: see ``load_manifest``.
        output: CSV or Parquet file to write.
        basedir: see ``load_manifest``.
        id_regex: regular expression that is searched for in each path; the first of its groups that
            is found, or all of it where it has none, is the identity.
        seed: of the split.
        frames: see ``load_manifest``.
        reporter: warned of what the split cannot keep apart, and of what is no image.

    Raises:
        InputError: the expression does not fit, or would change the identities of a given split.
        ManifestError: see ``load_manifest``.
    """
    listed = load_manifest(
        source, basedir=basedir, need_split=False, frames=frames, reporter=reporter
    )
    kept_split = listed.records[0].split is not None
    records = list(listed.records)
    if id_regex is not None:
        if kept_split:
            raise InputError(f"--id-regex: {source} has a split, made for the ids that it lists")
        records = _named_by(records, id_regex)
    if not kept_split:
        records = split_by_identity(records, seed=seed)
    manifest = Manifest(tuple(records), listed.basedir, listed.source)
    write_manifest(manifest, output)
    if id_regex is None and len(records) > 1 and not tells_identities(source, records):
        reporter.warn(
            "every image counts as an identity of its own, so pictures of one person or object may "
            "be in several splits; put those of each into a folder, or tell them by --id-regex"
        )
    splits = {}
    for name in SPLITS:
        part = manifest.select(name).records
        splits[name] = SplitSize(images=len(part), identities=len({r.identity for r in part}))
    empty = [name for name, size in splits.items() if not size.images]
    if empty:
        reporter.warn(f"no image in {' and '.join(empty)}: too few identities to split")
    return FilelistResult(
        output=str(output), basedir=str(manifest.basedir), kept_split=kept_split, splits=splits
    )


def _named_by(records: Sequence[Record], id_regex: str) -> list[Record]:
    try:
        pattern = re.compile(id_regex)
    except re.error as error:
        raise InputError(f"--id-regex {id_regex!r} is no regular expression: {error}") from None
    named = []
    for record in records:
        found = pattern.search(record.path)
        groups = (found.groups() or (found[0],)) if found else ()
        name = next(filter(None, groups), None)
        if name is None:
            raise InputError(f"--id-regex {id_regex!r} finds no id in {record.path!r}")
        named.append(record._replace(id=name))
    return named
