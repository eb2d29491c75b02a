"""Finished audits side by side: generators, checkpoints, last week and this week.

Audits against one training set with one detector at one rate differ only in their generated images.
Where they share the real images as well they share the threshold. Then the numbers of flagged
images are those of independent draws, and Fisher's exact test says whether one is worse.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lcmem_cli.engine.documents import FileName
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.files import AuditDocument, read_audit
from lcmem_cli.engine.evaluation.audit.shares import SHARE_COLUMNS, Shares, draw_shares
from lcmem_cli.engine.evaluation.audit.wording import counted, percent
from lcmem_cli.engine.files import folder_lock, write_csv, write_json
from lcmem_cli.engine.results import Result

JSON_NAME = "compare.json"
CSV_NAME = "compare.csv"
PLOT_NAME = "compare"
ERROR_RATE = 0.05
"""Chance that the gate fails where no audit is worse, whatever their number (Bonferroni)."""
COLUMNS = ("audit", *SHARE_COLUMNS, "p_flagged", "p_copies", "worse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worse:
    """An audit against the first one.

    Attributes:
        p_flagged: one-sided p-value of Fisher's exact test that more is flagged.
        p_copies: the same of known copies; ``None`` where candidates were not verified.
        worse: whether one of both is below the error rate divided by all tests made.
    """

    p_flagged: float
    p_copies: float | None
    worse: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared(Shares):
    """One audit, named by its folder.

    Attributes:
        folder: as given.
        started: when it was made.
        comparable: whether its held-out and training images are of one source.
        threshold: of its scores.
        than_first: ``None`` for the first, and where thresholds differ.
    """

    folder: FileName
    started: str
    comparable: bool | None
    threshold: float | None
    than_first: Worse | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareResult(Result):
    """Audits side by side.

    Attributes:
        statement: what they say, in one sentence.
        rate: false-positive rate per image of all of them.
        training: the training set of all of them.
        audits: in the order given.
        warnings: what weakens the comparison.
        gate: how the gate ended, if one was asked for.
        line: the same in one line, for logs.
    """

    statement: str
    rate: float
    training: FileName
    audits: tuple[Compared, ...]
    warnings: tuple[str, ...]
    gate: Literal["passed", "failed", "undecided"] | None
    line: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"format": "lcmem-compare", **super().to_dict()}


def compare_audits(
    folders: Sequence[Path], *, fail_if_worse: bool = False, output: Path | None = None
) -> CompareResult:
    """Set finished audits side by side; the first is what the others are held against.

    Args:
        folders: outputs of ``audit``, two at least.
        fail_if_worse: whether the gate is to fail if one is worse than the first.
        output: folder for ``compare.json``, ``compare.csv`` and a plot.

    Raises:
        InputError: fewer than two; one that is no finished audit; audits that cannot be compared;
            or a gate on audits with different real images.
        CorruptFileError: the files of an audit were edited or damaged.
    """
    if len(folders) < 2:
        raise InputError("comparing takes two audits at least; give their folders")
    documents = [read_audit(folder) for folder in folders]
    _check_comparable(folders, documents)
    audits = _tested(_compared(folders, documents))
    share_threshold = len({one.threshold for one in audits}) == 1
    if fail_if_worse and not share_threshold:
        raise InputError(
            "--fail-if-worse takes audits with the same threshold, that is with the same real "
            "images to compare with; here they differ"
        )
    gate, line = _gate(audits) if fail_if_worse else (None, None)
    result = CompareResult(
        statement=_statement(audits, share_threshold),
        rate=documents[0].rule.rate,
        training=documents[0].training.source,
        audits=audits,
        warnings=tuple(_warnings(audits, share_threshold)),
        gate=gate,
        line=line,
    )
    if output is not None:
        with folder_lock(output):
            _write(output, result)
    return result


def _check_comparable(folders: Sequence[Path], documents: Sequence[AuditDocument]) -> None:
    """Refuse audits of which the numbers mean different things."""
    if documents[0].rule.kind != "fpr":
        raise InputError(f"{folders[0]}: holds a false-discovery rate, which is not comparable")
    first = _conditions(documents[0])
    for folder, document in zip(folders[1:], documents[1:], strict=True):
        for what, value in _conditions(document).items():
            if value != first[what]:
                raise InputError(
                    f"{folder} cannot be compared with {folders[0]}: another {what} "
                    f"({_short(first[what])} there, {_short(value)} here)"
                )


def _conditions(document: AuditDocument) -> dict[str, Any]:
    rule, null = document.rule, document.null
    return {
        "training set": document.training.digest,
        "kind of rate": rule.kind,
        "rate": rule.rate,
        "confidence of the rate": rule.confidence,
        "kind of real images": null.kind,
        "detector": document.fingerprint,
        "verification": document.verified,
    }


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _compared(folders: Sequence[Path], documents: Sequence[AuditDocument]) -> list[Compared]:
    last_parts = Counter(folder.absolute().name for folder in folders)
    audits = []
    for folder, found in zip(folders, documents, strict=True):
        name = folder.absolute().name
        audits.append(
            Compared(
                name=name if last_parts[name] == 1 else str(folder),
                folder=str(folder),
                started=found.times.started,
                num_images=found.num_queries,
                num_flagged=found.num_flagged,
                share_flagged=found.share_flagged,
                interval=found.confidence_interval,
                excess_interval=found.excess_interval,
                num_identical=found.num_exact_copies + found.num_same_pixels,
                num_altered=found.num_altered,
                num_alike=found.num_alike,
                num_exposed_images=found.num_exposed_images,
                comparable=found.comparable,
                threshold=found.rule.threshold,
            )
        )
    return audits


def _tested(audits: Sequence[Compared]) -> tuple[Compared, ...]:
    """Test each audit against the first, where all share the threshold."""
    first, *others = audits
    if any(one.threshold != first.threshold for one in others):
        return tuple(audits)
    verified = first.num_altered is not None
    limit = ERROR_RATE / (len(others) * (2 if verified else 1))
    tested = [first]
    for one in others:
        flagged = _more(one.num_flagged, one.num_images, first.num_flagged, first.num_images)
        copies = None
        if verified:
            copies = _more(one.num_copies, one.num_images, first.num_copies, first.num_images)
        worse = min(flagged, 1.0 if copies is None else copies) <= limit
        compared = Worse(p_flagged=flagged, p_copies=copies, worse=worse)
        tested.append(dataclasses.replace(one, than_first=compared))
    return tuple(tested)


def _more(count: int, total: int, before: int, total_before: int) -> float:
    from scipy.stats import fisher_exact

    table = [[count, total - count], [before, total_before - before]]
    return float(fisher_exact(table, alternative="greater").pvalue)


def _gate(audits: Sequence[Compared]) -> tuple[Literal["passed", "failed", "undecided"], str]:
    worse = [one for one in audits if one.than_first and one.than_first.worse]
    ended: Literal["passed", "failed", "undecided"] = "failed" if worse else "passed"
    if worse:
        text = f"{', '.join(one.name for one in worse)} worse than {audits[0].name}"
    else:
        text = f"none of {len(audits) - 1:,} worse than {audits[0].name}"
    if any(one.comparable is False for one in audits):
        ended, text = "undecided", "held-out and training images are not comparable"
    return ended, f"lcmem gate worse: {ended.upper()} - {text}"


def _statement(audits: Sequence[Compared], share_threshold: bool) -> str:
    first = audits[0]
    shares = ", ".join(f"{one.name} {percent(one.share_flagged)}" for one in audits[:8])
    more = ", ..." if len(audits) > 8 else ""
    if not share_threshold:
        return f"Flagged: {shares}{more}. Thresholds differ, so the shares are not tested."
    worse = [one.name for one in audits if one.than_first and one.than_first.worse]
    if worse:
        verb = "is" if len(worse) == 1 else "are"
        return f"Flagged: {shares}{more}. {', '.join(worse)} {verb} worse than {first.name}."
    return f"Flagged: {shares}{more}. None is worse than {first.name} by more than chance."


def _warnings(audits: Sequence[Compared], share_threshold: bool) -> list[str]:
    told = []
    if not share_threshold:
        told.append(
            "The audits used different real images, so their thresholds differ: a part of the "
            "difference is that of the thresholds."
        )
    for one in audits:
        if one.comparable is False:
            told.append(
                f"{one.name}: held-out and training images are not comparable, so its rate does "
                "not hold."
            )
    few = [one for one in audits if one.num_images < 100]
    if few:
        told.append(
            f"With {counted(min(one.num_images for one in few), 'image')} only a large difference "
            "can be told from chance."
        )
    return told


def _write(folder: Path, result: CompareResult) -> None:
    write_json(folder / JSON_NAME, result.to_dict())
    write_csv(folder / CSV_NAME, COLUMNS, (_cells(one) for one in result.audits))
    draw_shares(result.audits, folder / PLOT_NAME, rate=result.rate, label="audit")


def _cells(one: Compared) -> list[str]:
    tested = one.than_first
    if tested is None:
        return [*one.cells(None, None), ""]
    return [*one.cells(tested.p_flagged, tested.p_copies), str(tested.worse).lower()]
