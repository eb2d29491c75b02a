"""Typed results that travel from the engine to the command line, to JSON and to reports."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lcmem_cli.engine.errors import (
    FingerprintMismatchError,
    InputError,
    UnreadableLimitError,
    install_line,
)
from lcmem_cli.engine.files import jsonable

SCHEMA_VERSION = 1
MAX_REPR = 400
_MAX_SHOWN = 60
_SINGLE = (str, int, float, bool, type(None))
_SHOWN_UNREADABLE = 10


class Result:
    """Mixin for frozen dataclasses: as JSON, as a table, and in short where it is printed."""

    def __init_subclass__(cls) -> None:
        """Keep ``dataclass`` from giving the class a representation that may take megabytes."""
        super().__init_subclass__()
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Result.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """Return the fields in at most ``MAX_REPR`` characters; of long ones their length."""
        assert dataclasses.is_dataclass(self)
        fields = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in fields)
        return shortened(f"{type(self).__name__}({shown})", MAX_REPR)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the rows of ``to_pandas``: by default one, of the fields with single values."""
        assert dataclasses.is_dataclass(self)
        fields = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return [{name: value for name, value in fields if isinstance(value, _SINGLE)}]

    def to_pandas(self) -> Any:
        """Return the result as a ``pandas.DataFrame``, which needs pandas to be installed."""
        import pandas

        return pandas.DataFrame(self.to_rows())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, with the schema version."""
        assert dataclasses.is_dataclass(self) and not isinstance(self, type)
        values: dict[str, Any] = jsonable(dataclasses.asdict(self))
        return {"schema": SCHEMA_VERSION, **values}


def shortened(text: str, length: int) -> str:
    """Return a text, cut where it has more characters than ``length``."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, _SINGLE):
        return shortened(repr(value), _MAX_SHOWN)
    if hasattr(value, "__len__"):
        return f"<{len(value):,}>"
    return f"<{type(value).__name__}>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unreadable:
    """An image that could not be used, and why."""

    path: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """A decision threshold together with what it is worth and what it belongs to.

    Attributes:
        value: a pair is called a match when ``score >= value``.
        kind: ``"fpr"`` (share of negatives at or above) or ``"recall"`` (share of positives).
        rate: the rate that was asked for, in (0, 1).
        fingerprint: of the detector whose scores it applies to.
        fitted_on: what data it was fitted on, in words.
        num_positives: positive pairs behind it.
        num_negatives: negative pairs behind it.
        achieved_fpr: share of the negatives at or above ``value`` in the fitting data.
        achieved_recall: share of the positives at or above ``value`` in the fitting data.
        unseen_fprs: how far a false-positive rate transfers: of each kind of images the share of
            negatives at or above a threshold that was fitted likewise without that kind. Empty
            where no kinds were left out.
    """

    value: float
    kind: Literal["fpr", "recall"]
    rate: float
    fingerprint: str
    fitted_on: str
    num_positives: int
    num_negatives: int
    achieved_fpr: float | None = None
    achieved_recall: float | None = None
    unseen_fprs: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not math.isfinite(self.value):
            raise InputError(f"threshold is not a finite number: {self.value}")
        if not 0 < self.rate < 1:
            raise InputError(f"threshold rate must lie in (0, 1), not {self.rate}")
        if not all(0 <= share <= 1 for share in self.unseen_fprs.values()):
            raise InputError("unseen_fprs of a threshold must lie in [0, 1]")

    @property
    def name(self) -> str:
        """Short name used by ``--threshold`` options, such as ``fpr0.01`` or ``recall0.95``."""
        return f"{self.kind}{self.rate:g}"

    @property
    def transfer(self) -> str:
        """How far its false-positive rate transfers, in words; empty where that is not known."""
        if not self.unseen_fprs:
            return ""
        lowest, *_, highest = shares = sorted(self.unseen_fprs.values())
        middle = statistics.median(shares)
        return (
            f"for other kinds of images {self.rate:.1%} became {lowest:.2%} to {highest:.2%}, "
            f"in the median {middle:.2%} ({len(shares)} kinds, each left out)"
        )

    def check(self, fingerprint: str) -> None:
        """Refuse to be used with another detector than the one it was fitted for.

        Raises:
            FingerprintMismatchError: the fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise FingerprintMismatchError(
                f"threshold {self.name} was fitted for detector {self.fingerprint[:12]} and does "
                f"not apply to {fingerprint[:12]}: scores of two detectors are on different "
                "scales; fit one for this detector (lcmem benchmark)"
            )

    def decide(self, score: float, fingerprint: str) -> bool:
        """Return whether a score of the detector with this fingerprint counts as a match."""
        self.check(fingerprint)
        return score >= self.value


def named_thresholds(
    thresholds: Sequence[Threshold], adapted: Sequence[Threshold]
) -> list[tuple[str, Threshold]]:
    """Return thresholds of a network and of the adapted network, each with its name."""
    return [(t.name, t) for t in thresholds] + [(f"{t.name} (adapted)", t) for t in adapted]


def install_hints(unreadable: Sequence[Unreadable]) -> list[str]:
    """Return how to install what some images need, once for each extra that a reason names."""
    found = re.findall(r"needs the extra \[(\w+)\]", "\n".join(item.reason for item in unreadable))
    return [
        f"{count:,} of them need the extra [{extra}]; {install_line(extra)}"
        for extra, count in collections.Counter(found).items()
    ]


def check_unreadable(
    unreadable: Sequence[Unreadable], limit: int | None, *, remark: str = ""
) -> None:
    """Fail when more images than allowed could not be read.

    Args:
        unreadable: the images.
        limit: how many are allowed; ``None``: any number.
        remark: what else to say.

    Raises:
        UnreadableLimitError: naming the first of them.
    """
    if limit is None or len(unreadable) <= limit:
        return
    shown = "".join(f"\n  {item.path}: {item.reason}" for item in unreadable[:_SHOWN_UNREADABLE])
    more = len(unreadable) - _SHOWN_UNREADABLE
    images = "1 image" if len(unreadable) == 1 else f"{len(unreadable):,} images"
    raise UnreadableLimitError(
        f"{images} could not be read, --max-unreadable allows {limit}:{shown}"
        + (f"\n  and {more} more" if more > 0 else "")
        + "".join(f"\n{hint}" for hint in install_hints(unreadable))
        + (f"\n{remark}" if remark else "")
    )
