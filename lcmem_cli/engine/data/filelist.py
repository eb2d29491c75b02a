"""Writing filelists: of a folder, with a split by identity, or of a publisher's tables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from lcmem_cli.engine.data.folders import scan_folder
from lcmem_cli.engine.data.manifest import (
    SPLITS,
    Frames,
    Manifest,
    Record,
    check_identities,
    load_manifest,
    split_by_identity,
    tells_identities,
    write_manifest,
)
from lcmem_cli.engine.data.publishers import LAYOUTS, read_publisher
from lcmem_cli.engine.data.sources.opened import find_shards
from lcmem_cli.engine.data.tables import STANDARD, ListColumns, some
from lcmem_cli.engine.errors import InputError, ManifestError, nearest
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result

VAL_OF_TRAIN = (0.8, 0.2, 0.0)
"""TRAIN's part for TRAIN and VAL, close to that of ``SPLIT_SHARES``."""


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
    columns: ListColumns = STANDARD,
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
        columns: see ``load_manifest``.
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
        source,
        basedir=basedir,
        columns=columns,
        need_split=False,
        frames=frames,
        reporter=reporter,
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
    return _written(manifest, output, kept_split=kept_split, reporter=reporter)


def make_publisher_filelist(
    publisher: str,
    tables: Sequence[Path],
    output: Path,
    *,
    basedir: Path | None = None,
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> FilelistResult:
    """Write the filelist of a published data set, with its identities and its official split.

    Where the tables tell fewer than two splits, or some identities are in two, a split by identity
    is made. Where they tell TRAIN and TEST but no VAL, a seeded fifth of TRAIN's identities is VAL.

    Args:
        publisher: key of ``publishers.LAYOUTS``.
        tables: the publisher's tables.
        output: CSV or Parquet file to write.
        basedir: folder, at any depth, or archive that holds the images; by default the folder of
            the first table.
        seed: of what is drawn.
        reporter: warned of images without a row and rows without an image, which are left out.

    Raises:
        InputError: no such publisher.
        ManifestError: the tables cannot be read, or none of the images is there.
    """
    if publisher not in LAYOUTS:
        raise InputError(f"--from {publisher}: not known; {nearest(publisher, LAYOUTS)}")
    layout = LAYOUTS[publisher]
    entries = read_publisher(layout, tables)
    folder, paths = _images_of(tables[0].parent if basedir is None else basedir)
    records, unknown, seen = [], [], set()
    for path in paths:
        image = layout.image_of(path)
        entry = None if image is None else entries.get(image)
        if entry is None:
            unknown.append(path)
            continue
        seen.add(image)
        records.append(Record(path, str(entry.id), entry.split, publisher))
    if not records:
        expected = f"; expected names such as {next(iter(entries))!r}" if entries else ""
        raise ManifestError(
            f"{folder}: none of its images is in the tables{expected}; set --basedir to the folder "
            "of the images"
        )
    if unknown:
        reporter.warn(f"left out {len(unknown):,} image(s) of no table: {some(unknown)}")
    if len(seen) < len(entries):
        reporter.warn(
            f"{len(entries) - len(seen):,} of {len(entries):,} images of the tables are not there"
        )
    records, kept_split = _with_official_split(records, seed, reporter)
    manifest = Manifest(tuple(records), folder, tables[0])
    write_manifest(manifest, output)
    return _written(manifest, output, kept_split=kept_split, reporter=reporter)


def make_cifar_filelist(
    batches: Sequence[Path], output: Path, *, seed: int = 0, reporter: Reporter = SILENT
) -> FilelistResult:
    """Write the filelist of CIFAR-10's batches, the binary version: each image its own identity.

    Args:
        batches: ``data_batch_1.bin`` to ``data_batch_5.bin`` (TRAIN) and ``test_batch.bin`` (TEST),
            in one folder.
        output: CSV or Parquet file to write.
        seed: of the fifth of TRAIN that becomes VAL.
        reporter: warned of a split that is empty.

    Raises:
        ManifestError: one is no such batch.
    """
    folder = batches[0].parent
    records = []
    for batch in batches:
        if batch.parent != folder or not find_shards(batch):
            raise ManifestError(
                f"{batch}: expected batches of the binary version in one folder, such as "
                "data_batch_1.bin and test_batch.bin; the Python version is pickled, which could "
                "run code, and is not read"
            )
        split = "TEST" if batch.name.startswith("test") else "TRAIN"
        for record in load_manifest(batch, need_split=False).records:
            records.append(Record(record.path, record.path, split, "cifar10"))
    records, kept_split = _with_official_split(records, seed, reporter)
    manifest = Manifest(tuple(records), folder, batches[0])
    write_manifest(manifest, output)
    return _written(manifest, output, kept_split=kept_split, reporter=reporter)


def _images_of(source: Path) -> tuple[Path, list[str]]:
    """Return the images of a folder or of an archive, and the folder that their paths start from.

    Raises:
        ManifestError: there is no such folder.
    """
    if find_shards(source):
        listed = load_manifest(source, need_split=False)
        return listed.basedir, [record.path for record in listed.records]
    if not source.is_dir():
        raise ManifestError(f"--basedir: no such folder or archive: {source}")
    return source, scan_folder(source).images


def _with_official_split(
    records: list[Record], seed: int, reporter: Reporter
) -> tuple[list[Record], bool]:
    """Return the records with a split, and whether it is the publisher's."""
    splits = {record.split for record in records}
    mixed = check_identities(records)
    if mixed:
        reporter.warn(f"{mixed[0]}; the official split is replaced by one by identity")
    if mixed or None in splits or len(splits) < 2:
        return split_by_identity(records, seed=seed), False
    if splits == {"TRAIN", "TEST"}:
        train = [record for record in records if record.split == "TRAIN"]
        divided = iter(split_by_identity(train, seed=seed, shares=VAL_OF_TRAIN))
        records = [next(divided) if r.split == "TRAIN" else r for r in records]
        reporter.warn("the publisher has no VAL: a fifth of TRAIN's identities is VAL")
    return records, True


def _written(
    manifest: Manifest, output: Path, *, kept_split: bool, reporter: Reporter
) -> FilelistResult:
    splits = {}
    for name in SPLITS:
        part = manifest.select(name).records
        splits[name] = SplitSize(images=len(part), identities=len({r.identity for r in part}))
    empty = [name for name, size in splits.items() if not size.images]
    if empty:
        reason = "the list's split has none" if kept_split else "too few identities to split"
        reporter.warn(f"no image in {' and '.join(empty)}: {reason}")
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
