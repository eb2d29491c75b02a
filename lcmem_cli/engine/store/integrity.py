"""Whether a file that lcmem wrote is still what it was, told in one way by all that is stored.

Every store writes a checksum beside its data: of a whole file where it is read as one, of each row
where rows are read one by one. What does not match is named together with how to make it anew.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.errors import CorruptFileError, LcmemError
from lcmem_cli.engine.files import sha256_file


@contextlib.contextmanager
def naming_damage(path: Path, remedy: str) -> Iterator[None]:
    """Turn what is wrong with a file into an error that names it and says what to do.

    Args:
        path: the file that is read inside.
        remedy: what makes it anew.

    Raises:
        CorruptFileError: it cannot be read, or is not what was expected.
    """
    try:
        yield
    except LcmemError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path}: missing or damaged ({error}); {remedy}") from error


def check_file(path: Path, sha256: str) -> None:
    """Compare a file with its checksum.

    Raises:
        ValueError: it is another.
        OSError: it cannot be read.
    """
    if sha256_file(path) != sha256:
        raise ValueError("the content does not match its checksum")


def row_checksums(keys: NDArray[np.uint8], rows: NDArray[Any]) -> NDArray[np.uint32]:
    """Return the CRC-32 of each row with its key, ``[n]``; ``keys [n, k]``, ``rows [n, d]``."""
    sums = [
        zlib.crc32(row.tobytes(), zlib.crc32(key.tobytes()))
        for key, row in zip(keys, rows, strict=True)
    ]
    return np.asarray(sums, dtype=np.uint32)
