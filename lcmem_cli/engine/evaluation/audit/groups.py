"""Groups of the generated images: checkpoints, prompts, classes, kinds, each with its own figures.

A group's interval counts its own images. The threshold is that of the whole audit. Grouped by data
set, each kind is also judged at a threshold of its own, fitted on the real images of that kind
alone: kinds whose images are more alike would else take more than their share of false flags.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lcmem_cli.engine.data.frames import split_frame
from lcmem_cli.engine.data.manifest import is_list
from lcmem_cli.engine.data.sources.base import inner_name
from lcmem_cli.engine.data.sources.opened import has_metadata, member_metadata
from lcmem_cli.engine.data.tables import STANDARD, Columns, ListColumns, as_named, read_table
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.null import Null, threshold_of
from lcmem_cli.engine.evaluation.audit.request import AuditRequest
from lcmem_cli.engine.evaluation.audit.result import (
    AuditResult,
    Group,
    Grouping,
    Match,
    OwnThreshold,
)
from lcmem_cli.engine.evaluation.audit.sets import Listing
from lcmem_cli.engine.evaluation.audit.shares import SHARE_COLUMNS
from lcmem_cli.engine.evaluation.audit.wording import counted, percent
from lcmem_cli.engine.evaluation.calibration import clopper_pearson, excess_interval

FOLDER, KIND = "folder", "ds_name"
NONE = "(none)"
"""Group of the images that have no value."""
COLUMNS = (
    "group",
    *SHARE_COLUMNS,
    "own_threshold",
    "num_flagged_own",
    "num_real",
    "num_real_flagged",
)
"""Columns of ``groups.csv``."""


def group_names(by: str, listing: Listing, columns: ListColumns = STANDARD) -> dict[str, str]:
    """Return the group of each generated image, by the image's name.

    Args:
        by: ``folder``: the first subfolder; a column of the filelist, or of what a source of images
            says; or a regular expression with a group, which is searched for in each name.
        listing: the generated set.
        columns: what a filelist calls its columns.

    Raises:
        InputError: there is no such column, or the expression is none or is found nowhere.
    """
    names = [record.path for record in listing.records]
    if by == FOLDER:
        folders = [inner_name(name).rpartition("/")[0] for name in names]
        values = [folder.partition("/")[0] for folder in folders]
    elif by in (KIND, "id"):
        values = [getattr(record, by) or "" for record in listing.records]
    elif "(" in by:
        values = _found(by, names)
    else:
        values = _column(by, listing, columns)
    if not any(values):
        raise InputError(f"--group-by {by}: no image of {listing.source} has a value")
    return dict(zip(names, [value.strip() or NONE for value in values], strict=True))


def _found(expression: str, names: Sequence[str]) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise InputError(f"--group-by {expression!r} is no regular expression: {error}") from None
    if not pattern.groups:
        raise InputError(f"--group-by {expression!r} has no group in brackets, as 'step([0-9]+)'")
    found = [pattern.search(name) for name in names]
    return ["" if match is None else match[1] or "" for match in found]


def _column(name: str, listing: Listing, columns: ListColumns) -> list[str]:
    source = Path(listing.source)
    if has_metadata(source):
        return [member_metadata(file).get(name, "") for file in listing.files]
    if not is_list(source):
        raise InputError(
            f"--group-by {name}: {source} is no filelist, so it has no columns; give 'folder', or "
            "an expression for the names, as 'step([0-9]+)'"
        )
    path = columns.path or "path"
    wanted = Columns(what="filelist", required=(path, name), separator=columns.separator)
    cells = read_table(source, wanted).cells
    paths = [as_named(cell, listing.folder) for cell in cells[path]]
    value_of = dict(zip(paths, cells[name], strict=True))
    of_files = (str(split_frame(Path(record.path))[0]) for record in listing.records)
    return [
        value_of.get(record.path, value_of.get(file, ""))
        for record, file in zip(listing.records, of_files, strict=True)
    ]


def group(
    by: str, group_of: Mapping[str, str], result: AuditResult, null: Null, request: AuditRequest
) -> Grouping:
    """Return the figures of each group.

    Args:
        by: as it was asked for.
        group_of: group of each image, by its name.
        result: what was found.
        null: real images and their best matches.
        request: its rate.
    """
    members: dict[str, list[Match]] = {}
    highest: dict[str, float] = {}
    for match in result.matches:
        highest[match.query] = max(match.score, highest.get(match.query, -math.inf))
        if match.rank == 1:
            members.setdefault(group_of[match.query], []).append(match)
    numbers = {name: _number(name) for name in members}
    ordered = len(members) > 1 and None not in numbers.values()
    groups = []
    for name, matches in members.items():
        own = _own_threshold(name, matches, highest, null, request) if by == KIND else None
        groups.append(_group(name, matches, result, own))
    if ordered:
        groups.sort(key=lambda one: numbers[one.name] or 0.0)
    else:
        groups.sort(key=lambda one: (-one.num_copies, -one.share_flagged, one.name))
    return Grouping(
        by=by, ordered=ordered, groups=tuple(groups), finding=_sentence(groups, ordered)
    )


def rows(grouping: Grouping) -> list[list[str]]:
    """Return the rows of ``groups.csv``."""
    return [
        one.cells(*((None,) * 4 if one.own is None else dataclasses.astuple(one.own)))
        for one in grouping.groups
    ]


def _number(name: str) -> float | None:
    try:
        value = float(name)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _group(
    name: str, matches: Sequence[Match], result: AuditResult, own: OwnThreshold | None
) -> Group:
    flagged = [match for match in matches if match.flagged]
    count, total, null = len(flagged), len(matches), result.null
    beyond = None
    if result.excess_interval is not None:
        beyond = excess_interval(
            count, total, num_null=null.num_independent, allowed=null.independent_allowed
        )
    tiers = [match.tier for match in flagged]
    return Group(
        name=name,
        num_images=total,
        num_flagged=count,
        share_flagged=count / total,
        interval=clopper_pearson(count, total),
        excess_interval=beyond,
        num_identical=tiers.count("identical file") + tiers.count("same pixels"),
        num_altered=tiers.count("same picture, altered") if result.verified else None,
        num_alike=tiers.count("alike"),
        num_exposed_images=len({match.match for match in flagged}),
        own=own,
    )


def _own_threshold(
    kind: str,
    matches: Sequence[Match],
    highest: Mapping[str, float],
    null: Null,
    request: AuditRequest,
) -> OwnThreshold | None:
    """Return what real images of one kind say; nothing where there are too few of it."""
    kinds = [null.images.record_of(row).ds_name for row in null.rows]
    scores = null.scores[[named == kind for named in kinds], 0]
    threshold = threshold_of(scores, null.kind, request)
    of_all = threshold_of(null.scores[:, 0], null.kind, request)
    if threshold is None or of_all is None:
        return None
    return OwnThreshold(
        threshold=threshold,
        num_flagged=sum(match.exact or highest[match.query] > threshold for match in matches),
        num_real=len(scores),
        num_real_flagged=int((scores > of_all).sum()),
    )


def _sentence(groups: Sequence[Group], ordered: bool) -> str:
    """Return what the groups say: from where on there is more than chance, or where most is."""
    sure = [one for one in groups if one.excess_interval and one.excess_interval[0] > 0]
    if not sure:
        return "In no group is more flagged than chance explains."
    if not ordered:
        names = ", ".join(one.name for one in sure[:5]) + (", ..." if len(sure) > 5 else "")
        return (
            f"More than chance in {len(sure):,} of {counted(len(groups), 'group')}: {names}. Among "
            "many groups, about one in 40 says so by chance."
        )
    first = groups.index(sure[0])
    after = [one for one in groups[first:] if one not in sure]
    held = "from there on" if not after else "not in every later group"
    one = groups[first]
    return (
        f"More than chance first at {one.name}: {one.num_flagged:,} of "
        f"{counted(one.num_images, 'image')} ({percent(one.share_flagged)}), {held}."
    )
