"""Which sources there are, by their place; and names such as ``archive.zip::inner/name.png``."""

from __future__ import annotations

import itertools
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from lcmem_cli.engine.data.sources.base import MEMBER, Source, SourceError, check_names
from lcmem_cli.engine.data.tables import PARQUET_SUFFIXES
from lcmem_cli.engine.errors import ManifestError, UnreadableImageError

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_CIFAR = "cifar"
_SUFFIXES = (
    ".zip", *_TAR_SUFFIXES, ".npz", ".npy", ".arrow", *PARQUET_SUFFIXES,
)  # fmt: skip
_OTHER_ARCHIVES = (
    ".tar.bz2", ".tar.xz", ".tar.zst", ".tbz2", ".txz", ".7z", ".rar", ".lmdb", ".h5", ".hdf5",
    ".tfrecord", ".tfrecords", ".pkl", ".pickle", ".pt", ".pth",
)  # fmt: skip
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CIFAR_NAME = re.compile(r"(data_batch_\d|test_batch)\.bin")
_MAX_SHARDS = 100_000
_MOST_OPEN = 256
_MEMORY = Path("/memory")
"""Where images in memory seem to lie, so that their names stay the same in every folder."""
_DATASET_MARKS = ("state.json", "dataset_info.json", "dataset_dict.json")

_lock = threading.Lock()
_opened: OrderedDict[Path, tuple[tuple[int, int], Source]] = OrderedDict()
_mounted: dict[Path, Source] = {}
_known_names: weakref.WeakKeyDictionary[Source, frozenset[str]] = weakref.WeakKeyDictionary()


def mount(name: str, source: Source) -> Path:
    """Make images that lie in no file known, for as long as the process lives.

    Args:
        name: what results call the source; a number is added where it is taken.
        source: the images.

    Returns:
        What stands for them wherever a source of images is taken. ``unmount`` forgets them.

    Raises:
        ManifestError: names are not unique or lead elsewhere.
    """
    check_names(Path(name), source.names)
    with _lock:
        tries = (_MEMORY / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
        place = next(place for place in tries if place not in _mounted)
        _mounted[place] = source
    return place


def unmount(place: Path) -> None:
    """Forget images that ``mount`` made known."""
    with _lock:
        _mounted.pop(place, None)


def is_mounted(place: Path) -> bool:
    """Return whether ``mount`` gave this place to images."""
    return place in _mounted


def find_shards(place: Path) -> list[Path]:
    """Return the sources behind what a user named; none where it is a folder or a filelist.

    Args:
        place: a file, ``shard-{000..123}.tar``, a folder as ``datasets`` saves one, or what
            ``mount`` returned.

    Raises:
        ManifestError: it is an archive of a kind that is not read, or a shard is missing.
    """
    if is_mounted(place):
        return [place]
    if place.is_dir():
        if not any((place / mark).is_file() for mark in _DATASET_MARKS):
            return []
        return sorted(place.rglob("*.arrow"))
    if _BRACES.search(place.name) and not place.exists():
        shards = [place.with_name(name) for name in _expanded(place.name)]
        missing = [shard for shard in shards if not shard.is_file()]
        if missing:
            raise ManifestError(
                f"{place}: {len(missing):,} of {len(shards):,} files are missing, the first is "
                f"{missing[0]}"
            )
        return shards
    if not place.is_file():
        return []
    name = place.name.casefold()
    if name.endswith(_OTHER_ARCHIVES):
        raise ManifestError(
            f"{place}: this kind of archive is not read; give a folder, .zip, .tar, .tar.gz, .npz, "
            ".npy, Parquet or Arrow"
        )
    suffix = _suffix(name)
    if suffix is None or (suffix in PARQUET_SUFFIXES and not _has_images(place)):
        return []
    return [place]


def _expanded(name: str) -> list[str]:
    match = _BRACES.search(name)
    if match is None:
        return [name]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _MAX_SHARDS:
        raise ManifestError(f"{name}: expected numbers that rise, at most {_MAX_SHARDS:,} of them")
    width = len(match[1]) if match[1].startswith("0") else 0
    before, after = name[: match.start()], name[match.end() :]
    return [
        f"{before}{number:0{width}d}{rest}"
        for rest in _expanded(after)
        for number in range(first, last + 1)
    ]


def _suffix(name: str) -> str | None:
    name = name.casefold()
    if _CIFAR_NAME.fullmatch(name):
        return _CIFAR
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)


def _has_images(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lcmem_cli.engine.data.sources.columns import image_column

    try:
        return image_column(pq.read_schema(path)) is not None
    except (pa.ArrowException, OSError, ValueError):
        return False  # the reader of filelists says what is wrong with it


def _open(place: Path, suffix: str) -> Source:
    """Open a file; its reader is imported now, so that the command line answers at once."""
    from lcmem_cli.engine.data.sources.archives import TarArchive, ZipArchive
    from lcmem_cli.engine.data.sources.arrays import ArrayFile, CifarFile
    from lcmem_cli.engine.data.sources.columns import ArrowFile, ParquetFile

    if suffix == ".zip":
        return ZipArchive(place)
    if suffix in _TAR_SUFFIXES:
        return TarArchive(place)
    if suffix in PARQUET_SUFFIXES:
        return ParquetFile(place)
    if suffix == _CIFAR:
        return CifarFile(place)
    return ArrowFile(place) if suffix == ".arrow" else ArrayFile(place)


def open_source(place: Path) -> Source:
    """Return a source, opened before or now; a file that has changed is opened anew.

    Raises:
        ManifestError: it cannot be read.
    """
    with _lock:
        if place in _mounted:
            return _mounted[place]
        status = place.stat()
        state = (status.st_mtime_ns, status.st_size)
        known = _opened.get(place)
        if known is not None and known[0] == state:
            _opened.move_to_end(place)
            return known[1]
        suffix = _suffix(place.name)
        if suffix is None:
            raise ManifestError(f"{place}: no source of images")
        source = _open(place, suffix)
        _opened[place] = (state, source)
        while len(_opened) > _MOST_OPEN:
            _opened.popitem(last=False)
        return source


def has_metadata(place: Path) -> bool:
    """Return whether a source says more of its images than their names; a folder does not."""
    shards = find_shards(place)
    source = open_source(shards[0]) if shards else None
    return source is not None and any(source.metadata(name) for name in source.names[:1])


def member_metadata(path: Path) -> Mapping[str, str]:
    """Return what a source says of an image; nothing of a file of its own."""
    member = split_member(path)
    return {} if member is None else open_source(member[0]).metadata(member[1])


def name_member(place: str, name: str) -> str:
    """Return the name of an image of a source."""
    return f"{place}{MEMBER}{name}"


def split_member(path: Path) -> tuple[Path, str] | None:
    """Return the source and the name of an image in it; ``None`` for a file of its own."""
    text = str(path)
    if MEMBER not in text:
        return None
    place, _, name = text.partition(MEMBER)
    source = Path(place)
    is_source = is_mounted(source) or (_suffix(source.name) is not None and os.path.isfile(source))
    return (source, name) if is_source else None


def is_there(path: Path) -> bool:
    """Return whether there is a file, or such an image in a source."""
    member = split_member(path)
    if member is None:
        return os.path.isfile(path)  # unlike a Path, it says False of a name that is too long
    try:
        source = open_source(member[0])
        with _lock:
            names = _known_names.get(source)
            if names is None:
                names = _known_names[source] = frozenset(source.names)
        return member[1] in names
    except (ManifestError, OSError):
        return False


def read_member(path: Path) -> bytes | None:
    """Return the bytes of an image of a source; ``None`` for a file of its own.

    Raises:
        UnreadableImageError: it is damaged, too large or not there.
    """
    member = split_member(path)
    if member is None:
        return None
    try:
        return open_source(member[0]).read(member[1])
    except KeyError:
        raise UnreadableImageError(path, f"no such image in {member[0].name}") from None
    except (SourceError, ManifestError) as error:
        raise UnreadableImageError(path, str(error)) from None
