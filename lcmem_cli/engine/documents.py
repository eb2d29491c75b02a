"""Reading the documents that lcmem writes as typed values, with one kind of error.

A document is JSON or TOML on disk, or a header inside another file. Its type is a frozen dataclass
or a pydantic model: keys that it does not name are ignored, all others must be there and fit. Where
a document tells its version, the type says ``format: Literal[...]`` or ``schema: Literal[...]``.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import InstanceOf, TypeAdapter, ValidationError

from lcmem_cli.engine.errors import CorruptFileError, InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DocumentT = TypeVar("DocumentT")
FileName = InstanceOf[str]
"""A file name as text. One that is not UTF-8 holds lone surrogates, which pydantic's ``str``
refuses; so only the type is checked."""
_VERSION_KEYS = (("format",), ("schema",))


def read_document(path: Path, kind: type[DocumentT], *, remedy: str) -> DocumentT:
    """Read a JSON file, or by its suffix a TOML file.

    Args:
        path: the file.
        kind: type of the document.
        remedy: what the user can do, said at the end of every error.

    Raises:
        InputError: no such file, or of another format or schema.
        CorruptFileError: not JSON or TOML, or a key is missing or does not fit.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    return parse_document(
        data, kind, source=str(path), remedy=remedy, is_toml=path.suffix == ".toml"
    )


def parse_document(
    data: bytes | str,
    kind: type[DocumentT],
    *,
    source: str,
    remedy: str,
    is_toml: bool = False,
) -> DocumentT:
    """Read a document from memory.

    Args:
        data: JSON or TOML.
        kind: type of the document.
        source: its name in messages.
        remedy: see ``read_document``.
        is_toml: whether it is TOML.

    Raises:
        InputError: it is of another format or schema.
        CorruptFileError: not JSON or TOML, or a key is missing or does not fit.
    """
    language = "TOML" if is_toml else "JSON"
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        values = tomllib.loads(text) if is_toml else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{source}: not valid {language} ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise CorruptFileError(f"{source}: not valid, expected keys and values; {remedy}")
    return check_document(values, kind, source=source, remedy=remedy)


def check_document(
    values: dict[str, Any], kind: type[DocumentT], *, source: str, remedy: str
) -> DocumentT:
    """Turn keys and values into a typed value.

    Args:
        values: of JSON, TOML, or one row of a table, whose cells are text.
        kind: type of the document.
        source: its name in messages.
        remedy: see ``read_document``.

    Raises:
        InputError: it is of another format or schema.
        CorruptFileError: a key is missing or does not fit; the message names the first.
    """
    try:
        document: DocumentT = _adapter(cast(Hashable, kind)).validate_python(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        first = problems[0]
        for problem in problems:
            if problem["loc"] in _VERSION_KEYS and problem["type"] == "literal_error":
                raise InputError(
                    f"{source}: {problem['loc'][0]} {problem['input']!r}, this lcmem reads "
                    f"{problem['ctx']['expected']}; {remedy}"
                ) from error
        key = ".".join(str(part) for part in first["loc"])
        more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
        raise CorruptFileError(
            f"{source}: damaged, or written by another version of lcmem: {key}: "
            f"{first['msg']}{more}; {remedy}"
        ) from error
    return document


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # built once a type: it costs far more than one row of a table
