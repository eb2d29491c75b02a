"""zip and tar archives, read in place; a tar of WebDataset is one.

A member is an image by the rules for files: by its suffix, else by how it begins. Hidden members,
folders and links are left out, as nothing in a link says where it leads.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from lcmem_cli.engine.data.formats import HEAD_BYTES, IMAGE_SUFFIXES, format_of
from lcmem_cli.engine.data.sources.access import GZIP_BITS, GZIP_MARK, Access, Inflated, Plain
from lcmem_cli.engine.data.sources.base import SourceError, check_names, check_size
from lcmem_cli.engine.errors import ManifestError

_METADATA_SUFFIXES = (".json", ".cls")
_MAX_METADATA_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 20


class _Archive(ABC):
    """What zip and tar have in common.

    Args:
        path: the archive.
        members: names of all files in it.
    """

    def __init__(self, path: Path, members: Sequence[str]) -> None:
        self.path = path
        listed = [name for name in members if _is_listed(name)]
        check_names(path, listed)
        self._members = frozenset(listed)
        self._names = sorted(
            filter(self._is_image, listed), key=lambda name: name.encode("utf-8", "surrogateescape")
        )

    @property
    def names(self) -> Sequence[str]:
        """The names of all images, in the order of a folder."""
        return self._names

    def metadata(self, name: str) -> Mapping[str, str]:
        """Return what WebDataset keeps of a key: the values of its ``.json``, and its ``.cls``."""
        folder, _, file = name.rpartition("/")
        key = f"{folder}/{file.partition('.')[0]}" if folder else file.partition(".")[0]
        found: dict[str, str] = {}
        for suffix in _METADATA_SUFFIXES:
            if key + suffix not in self._members:
                continue
            text = self._head(key + suffix, _MAX_METADATA_BYTES).decode("utf-8", "replace")
            if suffix == ".cls":
                found["cls"] = text.strip()
                continue
            try:
                values = json.loads(text)
            except ValueError as error:
                raise SourceError(f"{self.path}: {key}.json is no JSON ({error})") from None
            if isinstance(values, dict):
                found |= {str(column): str(value) for column, value in values.items()}
        return found

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the bytes of a member."""

    @abstractmethod
    def _head(self, name: str, size: int) -> bytes:
        """Return the first bytes of a member."""

    def _is_image(self, name: str) -> bool:
        suffix = PurePosixPath(name).suffix
        if suffix.lower() in IMAGE_SUFFIXES:
            return True
        if suffix in _METADATA_SUFFIXES:
            return False
        try:
            return format_of(self._head(name, HEAD_BYTES)) is not None
        except SourceError:
            return False


class ZipArchive(_Archive):
    """A zip archive.

    Raises:
        ManifestError: it is damaged or encrypted, or its names are unsafe or not unique.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise ManifestError(f"{path}: not a readable zip archive ({error})") from error
        infos = [info for info in self._zip.infolist() if not info.is_dir()]
        if any(info.flag_bits & 1 for info in infos):
            raise ManifestError(f"{path}: is encrypted; unpack it first")
        super().__init__(path, [info.filename for info in infos])

    def read(self, name: str) -> bytes:
        """Return the bytes of a member; see ``Source``."""
        return self._take(name, self._zip.getinfo(name).file_size)

    def _head(self, name: str, size: int) -> bytes:
        return self._take(name, size)

    def _take(self, name: str, size: int) -> bytes:
        check_size(size)
        try:
            # Threads share the handle: zipfile locks the reading, and unpacks outside of the lock.
            with self._zip.open(name) as file:
                return file.read(size)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as err:
            raise SourceError(f"damaged in the archive ({err})") from None


class TarArchive(_Archive):
    """A tar archive, plain or compressed by gzip.

    Raises:
        ManifestError: it is damaged or compressed otherwise, or its names are unsafe or not unique.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            is_packed = file.read(2) == GZIP_MARK
        self._access: Access = Inflated(path, GZIP_BITS) if is_packed else Plain(path)
        self._places: dict[str, tuple[int, int]] = {}
        names: list[str] = []
        try:
            with tarfile.open(fileobj=_File(self._access), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    vars(tar)["members"] = []  # tarfile keeps all it has seen
                    if member.isreg() and not member.issparse():
                        name = member.name.removeprefix("./")
                        names.append(name)
                        self._places[name] = (member.offset_data, member.size)
        except (tarfile.TarError, SourceError, ValueError) as error:
            raise ManifestError(
                f"{path}: not a readable tar archive, plain or compressed by gzip ({error})"
            ) from error
        super().__init__(path, names)

    def read(self, name: str) -> bytes:
        """Return the bytes of a member; see ``Source``."""
        size = self._places[name][1]
        data = self._head(name, size)
        if len(data) < size:
            raise SourceError("the archive ends in the middle of it")
        return data

    def _head(self, name: str, size: int) -> bytes:
        offset, num_bytes = self._places[name]
        size = min(size, num_bytes)
        check_size(size)
        return self._access.read_at(offset, size)


class _File(io.RawIOBase):
    """What tarfile reads: bytes by their place, as a file."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._position = 0

    def readable(self) -> bool:
        """Return true."""
        return True

    def seekable(self) -> bool:
        """Return true."""
        return True

    def tell(self) -> int:
        """Return the place."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; nothing is read."""
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; of headers, for tarfile never reads what members hold."""
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        data = self._access.read_at(self._position, size)
        self._position += len(data)
        return data


def _is_listed(name: str) -> bool:
    parts = name.split("/")
    return not any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts
    )
