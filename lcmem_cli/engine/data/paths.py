"""What is wrong with the paths of a list: outside of its folder, missing, named twice."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lcmem_cli.engine.data.frames import strip_frame
from lcmem_cli.engine.data.reading import why_missing
from lcmem_cli.engine.data.sources.opened import is_there
from lcmem_cli.engine.data.tables import some


def check_paths(
    listed: Sequence[str], source: Path, basedir: Path, *, max_missing: int | None
) -> list[str]:
    """Return the problems of listed paths.

    Args:
        listed: as in the list.
        source: the list, for advice.
        basedir: folder that relative ones start from.
        max_missing: files that may be missing; ``None``: any number.
    """
    usable = [path for path in listed if path.strip() and "\0" not in path]
    problems = []
    counts = collections.Counter(map(_normalised, usable))
    repeated = [path for path, count in counts.items() if count > 1]
    if repeated:
        problems.append(f"{len(repeated):,} duplicate path(s): {some(map(repr, repeated))}")
    outside = paths_outside(usable, basedir)
    if outside:
        problems.append(
            f"{len(outside):,} path(s) leave the base folder {basedir}: "
            f"{some(map(repr, outside))}; set --basedir to the folder that holds all images"
        )
    refused = set(outside)
    missing = _missing([path for path in usable if path not in refused], basedir)
    if max_missing is not None and len(missing) > max_missing:
        text = (
            f"{len(missing):,} of {len(listed):,} file(s) missing under {basedir}: "
            f"{some(map(repr, missing))}"
        )
        if odd := why_missing(basedir / missing[0]):
            text += f"; {odd}"
        elif basedir != source.parent and (source.parent / missing[0]).exists():
            text += f"; they are there relative to {source.parent}: leave out --basedir"
        elif len(missing) == len(listed):
            text += "; set --basedir to the folder that the paths start from"
        problems.append(text)
    return problems


def paths_outside(paths: Iterable[str], basedir: Path) -> list[str]:
    """Return the paths that end outside of a folder.

    A link inside the folder may point anywhere: it was put there on purpose. What is refused is an
    absolute path, or a ``..``, by which the list itself leaves the folder.
    """
    suspects = [path for path in paths if os.path.isabs(path) or ".." in path]
    lexical, real = os.path.abspath(basedir), os.path.realpath(basedir)
    outside = []
    for path in suspects:
        if ".." in path.replace(os.sep, "/").split("/"):
            inside = _is_below(os.path.realpath(os.path.join(basedir, path)), real)
        elif os.path.isabs(path):
            inside = _is_below(path, lexical) or _is_below(os.path.realpath(path), real)
        else:
            inside = True
        if not inside:
            outside.append(path)
    return outside


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)


def _normalised(path: str) -> str:
    """Return one spelling of a path; ``..`` is kept, because a link may stand before it."""
    if "//" not in path and "./" not in path and not path.endswith(("/", "/.")):
        return path
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return ("/" if path.startswith("/") else "") + "/".join(parts)


def _missing(paths: Iterable[str], basedir: Path) -> list[str]:
    """Return the paths without a file, listing each folder once instead of asking for each file."""
    by_folder: dict[str, list[str]] = collections.defaultdict(list)
    for path in paths:
        by_folder[os.path.dirname(path)].append(path)
    missing = []
    for folder, members in by_folder.items():
        try:
            present = set(os.listdir(os.path.join(basedir, folder)))
        except (OSError, ValueError):
            present = set()
        missing += [
            path
            for path in members
            if os.path.basename(path) not in present
            and strip_frame(os.path.basename(path)) not in present
            # Names may be compared without regard to case or Unicode form on this file system.
            and not os.path.exists(os.path.join(basedir, path))
            and not is_there(Path(basedir, path))
        ]
    return missing
