"""Files of several images: pages of a TIFF, frames of an animation or of a DICOM series.

``scan.tif#3`` names the third image of ``scan.tif``, counted from one. A file that really has such
a name is taken for itself.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lcmem_cli.engine.data.sources.opened import is_there

_NUMBERED = re.compile(r"(.+)#([1-9]\d*)", re.DOTALL)


def split_frame(path: Path) -> tuple[Path, int]:
    """Return the file behind a path, and which of its images is meant, counted from 0."""
    match = _NUMBERED.fullmatch(path.name)
    if match is None or os.path.exists(path) or is_there(path):
        return path, 0
    return path.with_name(match[1]), int(match[2]) - 1


def has_file(path: Path) -> bool:
    """Return whether the file behind a path is there, or such an image in a source."""
    return is_there(split_frame(path)[0])


def name_frame(path: str, frame: int) -> str:
    """Return the name of one image of a file, counted from 0."""
    return f"{path}#{frame + 1}"


def strip_frame(path: str) -> str:
    """Return a listed path without the number of a frame."""
    match = _NUMBERED.fullmatch(path)
    return path if match is None else match[1]
