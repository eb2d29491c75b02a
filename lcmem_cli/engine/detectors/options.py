"""Options inside a detector's name: ``onnx:model.onnx?size=288&mean=0.5,0.5,0.5``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from lcmem_cli.engine.config import read_toml
from lcmem_cli.engine.errors import InputError, nearest

_OPTIONS = re.compile(r"\?(?=[a-z]+=)")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_MAX_SIDE = 4096
_CONFIG = "config"
_LABEL = "label"
_PATHS = (_CONFIG, "adapt", "codec", "weights")
_UNQUOTED = "".join(c for c in map(chr, range(33, 127)) if c not in "%&,") + " "

SCORES = ("cosine", "correlation", "euclidean")
LAYOUTS = ("nchw", "nhwc")
CHANNELS = ("rgb", "bgr")
PRECISIONS = ("fp32", "bf16", "fp16")


class ParsedName(NamedTuple):
    """A detector's name in its parts.

    Attributes:
        kind: what stands before the first colon or the options.
        target: what stands after the colon, perhaps empty.
        options: texts by key.
    """

    kind: str
    target: str
    options: Mapping[str, str]


def parse_name(name: str) -> ParsedName:
    """Split ``kind[:target][?key=value&key=value]``.

    The options begin at the last question mark that a key follows. A target that is a file as it
    stands is never split. In a value ``%26`` stands for an ampersand, ``%2C`` for a comma (which
    would part names in a list) and ``%25`` for a per cent sign.

    Raises:
        InputError: an option without value, or one that is given twice.
    """
    kind, colon, target = name.partition(":")
    if not colon:
        kind, _, text = name.partition("?")
        return ParsedName(kind, "", _read(name, text))
    if _is_file(target):
        return ParsedName(kind, target, {})
    marks = [match.start() for match in _OPTIONS.finditer(target)]
    if not marks:
        return ParsedName(kind, target, {})
    return ParsedName(kind, target[: marks[-1]], _read(name, target[marks[-1] + 1 :]))


def absolute_name(name: str) -> str:
    """Return a detector's name with the files and folders in it as absolute paths.

    So it means the same wherever it is read again. What cannot be read as a name stays as it is.
    """
    try:
        kind, target, options = parse_name(name)
    except InputError:
        return name
    values = {
        key: _absolute(value) if key in _PATHS and _is_there(value) else value
        for key, value in options.items()
    }
    if Path(target).suffix and _is_file(target):
        target = _absolute(target)  # other targets are names, also where a folder is so called
    return join_name(kind, target, values)


def join_name(kind: str, target: str, options: Mapping[str, str]) -> str:
    """Return the name of which ``parse_name`` makes these parts."""
    text = "&".join(
        f"{key}={quote(value, safe=_UNQUOTED, errors='surrogateescape')}"
        for key, value in options.items()
    )
    return kind + (f":{target}" if target else "") + (f"?{text}" if text else "")


def take_label(name: str) -> tuple[str, str]:
    """Return what a study shows a detector as, and the name to load it by.

    Args:
        name: perhaps with the option ``label=TEXT``; without it the name is its own label.

    Raises:
        InputError: the options cannot be read.
    """
    kind, target, options = parse_name(name)
    if _LABEL not in options:
        return name, name
    rest = {key: value for key, value in options.items() if key != _LABEL}
    return options[_LABEL], join_name(kind, target, rest)


def _absolute(text: str) -> str:
    return str(Path(text).absolute())


def _is_there(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # a name that is too long, or holds NUL
        return False


def _is_file(text: str) -> bool:
    return _is_there(text) and Path(text).is_file()


def split_names(text: str) -> tuple[str, ...]:
    """Split a list of detectors at its commas, but not at those between numbers of an option.

    Example:
        >>> split_names("mse, onnx:a.onnx?size=224&mean=0.5,0.5,0.5")
        ('mse', 'onnx:a.onnx?size=224&mean=0.5,0.5,0.5')
    """
    names: list[str] = []
    for part in text.split(","):
        part = part.strip()
        if names and _NUMBER.fullmatch(part.partition("&")[0]):
            names[-1] += f",{part}"
        elif part:
            names.append(part)
    return tuple(names)


def read_options(
    name: str, given: Mapping[str, str], allowed: Sequence[str], *, config: bool = False
) -> dict[str, Any]:
    """Check options and bring each to its type.

    Args:
        name: the detector's name, for messages.
        given: texts by key.
        allowed: keys that this detector understands.
        config: also understand ``config=FILE.toml``, whose keys are the same; those in the name
            win.

    Returns:
        Values of the keys that were given: ``size`` int; ``mean`` and ``std`` three floats;
        all others text.

    Raises:
        InputError: an unknown key or a value that is not valid.
        ConfigError: the TOML file cannot be read.
    """
    values: dict[str, Any] = dict(given)
    if config and _CONFIG in values:
        values = {**read_toml(Path(values.pop(_CONFIG))), **values}
    known = [*allowed, _CONFIG] if config else list(allowed)
    result = {}
    for key, value in values.items():
        if key not in allowed:
            hint = nearest(key, known) if known else "it has no options"
            if key == _LABEL:
                hint = "it names a detector in the tables of benchmark and robustness only"
            raise InputError(f"detector '{name}': unknown option '{key}'; {hint}")
        try:
            result[key] = _CONVERTERS[key](value)
        except (TypeError, ValueError) as error:
            raise InputError(f"detector '{name}': {key} must be {error}, not {value!r}") from None
    return result


def _read(name: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in text.split("&") if text else ():
        key, sign, value = part.partition("=")
        if not sign or not key or not value:
            raise InputError(f"detector '{name}': '{part}' is no option; expected key=value")
        if key in options:
            raise InputError(f"detector '{name}': option {key} is given twice")
        options[key] = unquote(value, errors="surrogateescape")
    return options


def _side(value: Any) -> int:
    expected = f"a whole number of pixels in [1, {_MAX_SIDE}]"
    try:
        side = int(value) if isinstance(value, (str, int)) else 0
    except ValueError:
        side = 0
    if not 1 <= side <= _MAX_SIDE or isinstance(value, bool):
        raise ValueError(expected)
    return side


def _triple(
    value: Any, *, expected: str = "three numbers such as 0.5,0.5,0.5"
) -> tuple[float, ...]:
    try:
        parts = value.split(",") if isinstance(value, str) else list(value)
        numbers = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(expected) from None
    if len(numbers) != 3 or not all(abs(number) < 1e6 for number in numbers):  # also refuses NaN
        raise ValueError(expected)
    return numbers


def _scales(value: Any) -> tuple[float, ...]:
    expected = "three numbers above 0 such as 0.5,0.5,0.5"
    numbers = _triple(value, expected=expected)
    if min(numbers) <= 0:
        raise ValueError(expected)
    return numbers


def _text(value: Any) -> str:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise ValueError("text")
    return str(value)


def _one_of(choices: Sequence[str]) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return str(value)

    return convert


_CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "size": _side,
    "mean": _triple,
    "std": _scales,
    "score": _one_of(SCORES),
    "layout": _one_of(LAYOUTS),
    "channels": _one_of(CHANNELS),
    "output": _text,
    "weights": _text,
    "codec": _text,
    "adapt": _text,
    "precision": _one_of(PRECISIONS),
}
