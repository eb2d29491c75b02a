"""Folders of images: what is listed of them, and what is left out."""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from lcmem_cli.engine.data.formats import IMAGE_SUFFIXES, is_image
from lcmem_cli.engine.data.tables import some
from lcmem_cli.engine.errors import ManifestError

FoldersAre = Literal["identities", "classes", "auto"]
"""What subfolders stand for; ``auto``: identities where they are plainly so."""
_MANY_FOLDERS, _FEW_IMAGES, _MOST_IMAGES = 20, 10, 50


def meant(paths: Sequence[str], folders_are: FoldersAre) -> Literal["identities", "classes"]:
    """Return whether the subfolders of a set are identities, or classes of many.

    ``auto`` takes them for identities where none holds more than 50 images, and there are 20 or
    more of them, or they hold 10 images at most in the mean. Few large folders are classes.

    Args:
        paths: of the images, relative to the set.
        folders_are: what the user says.
    """
    if folders_are != "auto":
        return folders_are
    sizes = collections.Counter(path.partition("/")[0] for path in paths if "/" in path)
    if not sizes or max(sizes.values()) > _MOST_IMAGES:
        return "classes"
    are_many = len(sizes) >= _MANY_FOLDERS
    return "identities" if are_many or sizes.total() <= _FEW_IMAGES * len(sizes) else "classes"


class Scan(NamedTuple):
    """The files of a folder tree.

    Attributes:
        images: paths relative to the folder, with ``/``, in order.
        others: files that are no images, likewise.
    """

    images: list[str]
    others: list[str]


def scan_folder(folder: Path) -> Scan:
    """List the files of a folder tree; hidden files and folders are left out.

    Raises:
        ManifestError: a folder cannot be listed.
    """
    scan = Scan([], [])
    unreadable: list[str] = []
    seen: set[str] = set()
    walk = os.walk(
        folder, followlinks=True, onerror=lambda error: unreadable.append(str(error.filename))
    )
    for parent, folders, files in walk:
        real = os.path.realpath(parent)
        if real in seen:  # a link back up the tree
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if _is_listed(name))
        relative = os.path.relpath(parent, folder)
        for name in filter(_is_listed, files):
            path = name if relative == os.curdir else f"{relative}{os.sep}{name}"
            found = scan.images if _is_image(parent, name) else scan.others
            found.append(path.replace(os.sep, "/"))
    if unreadable:
        raise ManifestError(
            f"{folder}: cannot list {len(unreadable):,} folder(s): {some(map(repr, unreadable))}"
        )
    for paths in scan:
        paths.sort(key=lambda path: path.encode("utf-8", "surrogateescape"))
    return scan


def left_out_text(folder: Path, others: list[str]) -> str:
    """Return what to tell about files that are no images."""
    return (
        f"{folder}: left out {len(others):,} file(s) that are no images by their content: "
        f"{some(others)}"
    )


def _is_image(parent: str, name: str) -> bool:
    if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
        return True  # as the next line would, without a path, which a set of millions would feel
    try:
        return is_image(Path(parent, name))
    except OSError:
        return False


def _is_listed(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"
