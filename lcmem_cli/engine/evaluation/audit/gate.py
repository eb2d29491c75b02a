"""Gates: what an audit must not find, and how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast, get_args
from xml.etree import ElementTree

from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.result import Finding, Gate, GateRule
from lcmem_cli.engine.evaluation.audit.wording import counted, percent
from lcmem_cli.engine.files import atomic_path

Named = Literal["identical", "altered", "more-than-chance"]
NAMES: tuple[str, ...] = get_args(Named)


def gate_rule(text: str | float | None) -> GateRule | None:
    """Return what a gate fails on.

    Args:
        text: one of ``NAMES``, or a share of the images in [0, 1); ``None``: there is no gate.

    Raises:
        InputError: it is neither.
    """
    if text is None or text in NAMES:
        return cast(GateRule | None, text)
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise InputError(
            f"--fail-on must be {', '.join(NAMES)} or a share of the images in [0, 1), not "
            f"'{text}'; for example 0.02"
        )
    return share


def judge(finding: Finding) -> Gate | None:
    """Return how the gate of an audit ended, if it has one.

    Each named gate also fails on what is surer: ``altered`` on identical images too. A gate that
    counts on the rate is undecided where the sets are not comparable: then no rate holds.
    """
    rule = finding.fail_on
    if rule is None:
        return None
    identical = finding.num_exact_copies + finding.num_same_pixels
    copies = identical + (finding.num_altered or 0)
    holds = finding.comparable is not False
    total = counted(finding.num_queries, finding.noun)
    found: bool | None
    if rule == "identical":
        found = identical > 0
        text = f"{identical:,} of {total} identical to a training image"
    elif rule == "altered":
        found = copies > 0 or (False if holds else None)
        text = f"{copies:,} of {total} copied, altered or not"
    elif rule == "more-than-chance":
        found = copies > 0 or finding.more_than_chance
        text = f"{finding.num_flagged:,} of {total} flagged, {copies:,} of them copies"
        if finding.expected_by_chance is not None:
            text += f", about {finding.expected_by_chance:.3g} expected by chance"
    else:
        found = finding.share_flagged > rule if holds else None
        text = f"{percent(finding.share_flagged)} of {total} flagged, {percent(rule)} allowed"
    if found is None:
        text += "; held-out and training images are not comparable"
    ended: Literal["passed", "failed", "undecided"] = (
        "undecided" if found is None else "failed" if found else "passed"
    )
    line = f"lcmem gate {_name_of(rule)}: {ended.upper()} - {text}"
    return Gate(fails_on=rule, ended=ended, line=line)


def _name_of(rule: GateRule) -> str:
    return f"{rule:g}" if isinstance(rule, float) else rule


def write_junit(path: Path, gate: Gate) -> None:
    """Write a gate as a JUnit report of one test case, which CI services show."""
    failures = str(int(gate.ended == "failed"))
    errors = str(int(gate.ended == "undecided"))
    suite = ElementTree.Element(
        "testsuite", name="lcmem", tests="1", failures=failures, errors=errors
    )
    case = ElementTree.SubElement(
        suite, "testcase", classname="lcmem.gate", name=_name_of(gate.fails_on)
    )
    if gate.ended != "passed":
        kind = "failure" if gate.ended == "failed" else "error"
        ElementTree.SubElement(case, kind, message=gate.line)
    with atomic_path(path) as temporary:
        ElementTree.ElementTree(suite).write(temporary, encoding="utf-8", xml_declaration=True)
