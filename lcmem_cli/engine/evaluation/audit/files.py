"""The files of an audit: ``audit.json``, the match tables and the page."""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.documents import check_document, read_document
from lcmem_cli.engine.errors import CorruptFileError, InputError
from lcmem_cli.engine.evaluation.audit.exposed import COLUMNS as EXPOSED_COLUMNS
from lcmem_cli.engine.evaluation.audit.exposed import rows as exposed_rows
from lcmem_cli.engine.evaluation.audit.gate import write_junit
from lcmem_cli.engine.evaluation.audit.groups import COLUMNS as GROUP_COLUMNS
from lcmem_cli.engine.evaluation.audit.groups import rows as group_rows
from lcmem_cli.engine.evaluation.audit.request import AuditSettings
from lcmem_cli.engine.evaluation.audit.result import (
    AuditResult,
    FlagRule,
    Match,
    NullSummary,
    SetSummary,
    Times,
)
from lcmem_cli.engine.evaluation.audit.sets import Embedded
from lcmem_cli.engine.evaluation.audit.shares import draw_shares
from lcmem_cli.engine.files import (
    CSV_OPTIONS,
    atomic_path,
    found_from,
    seen_from,
    sha256_file,
    unguarded,
    write_csv,
    write_json,
    write_text,
)
from lcmem_cli.engine.report.html import (
    MAX_PAIRS,
    Distribution,
    Pictures,
    altered_among,
    render_report,
)
from lcmem_cli.engine.report.panels import laid_over
from lcmem_cli.engine.report.thumbnails import SIDES, make_thumbnails
from lcmem_cli.engine.runs import CONFIG_NAME, as_written, write_run_files
from lcmem_cli.engine.store.integrity import check_file, naming_damage

if TYPE_CHECKING:
    from PIL.Image import Image

JSON_NAME = "audit.json"
CSV_NAME = "matches.csv"
PARQUET_NAME = "matches.parquet"
REPORT_NAME = "report.html"
CHECKSUMS_NAME = "checksums.json"
EXPOSED_NAME = "exposed.csv"
GROUPS_NAME = "groups.csv"
CURVE_NAME = "groups"
JUNIT_NAME = "junit.xml"
NUMBERS = (
    "turn",
    "scale",
    "share_of_training",
    "share_of_query",
    "correlation",
    "brightness",
    "contrast",
    "sharpness",
    "inliers",
)
"""Fields of ``Evidence`` that have columns."""
COLUMNS = (
    "query",
    "rank",
    "match",
    "match_id",
    "score",
    "p_value",
    "flagged",
    "same_picture",
    "edit",
    "evidence",
    "mirrored",
    *NUMBERS,
)
_SETS = ("generated", "training", "held_out")
_REMEDY = "run the audit again"
_NOT_ASKED = {"top_k", "fail_on", "group_by", "cache", "fingerprint", "adapted_to"}
"""Settings that change no finding, or that come of one: an audit may differ in them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditDocument:
    """What is read again of ``audit.json``; see ``AuditResult``."""

    format: Literal["lcmem-audit"]
    schema: Literal[3]
    fingerprint: str
    adapted_to: int | None
    verified: bool
    rule: FlagRule
    null: NullSummary
    num_queries: int
    num_flagged: int
    share_flagged: float
    confidence_interval: tuple[float, float]
    excess_interval: tuple[float, float] | None
    num_exact_copies: int
    num_same_pixels: int
    num_altered: int | None
    num_alike: int
    num_exposed_images: int
    comparable: bool | None
    generated: SetSummary
    training: SetSummary
    times: Times
    flagged: tuple[Match, ...]


def write_audit(
    folder: Path,
    result: AuditResult,
    settings: AuditSettings,
    *,
    embedded: Embedded,
    distribution: Distribution,
    absolute_paths: bool = False,
) -> None:
    """Write everything; the checksums last, so that where they stand the rest does too.

    Args:
        folder: made if missing.
        result: what was found.
        settings: what the audit was asked to do.
        embedded: the sets, whose images are shown.
        distribution: scores to draw.
        absolute_paths: name the sets by absolute paths, not as seen from the folder.
    """
    for name in (CHECKSUMS_NAME, JSON_NAME):
        (folder / name).unlink(missing_ok=True)
    shown = str if absolute_paths else functools.partial(seen_from, folder)
    write_run_files(folder, settings.with_paths(shown).model_dump(by_alias=True))
    rows = (map(_cell, _row(match).values()) for match in result.matches)
    write_csv(folder / CSV_NAME, COLUMNS, map(list, rows))
    write_parquet(folder / PARQUET_NAME, result.matches)
    exposed = [*result.exposed_images, *result.exposed_identities]
    write_csv(folder / EXPOSED_NAME, EXPOSED_COLUMNS, exposed_rows(exposed))
    (folder / JUNIT_NAME).unlink(missing_ok=True)
    if result.gate is not None:
        write_junit(folder / JUNIT_NAME, result.gate)
    names = [CONFIG_NAME, CSV_NAME, PARQUET_NAME, EXPOSED_NAME, REPORT_NAME, JSON_NAME]
    names += _write_groups(folder, result)
    pictures = _pictures(result, embedded)
    curve = folder / f"{CURVE_NAME}.png"
    page = render_report(result, pictures, distribution, curve=curve if curve.is_file() else None)
    write_text(folder / REPORT_NAME, page)
    document = result.to_dict()
    for name in _SETS:
        images = document[name]
        if images is not None:
            named = images["source"]  # what the user typed, absolute or not
            images["source"] = shown(named) if Path(named).is_absolute() else named
            images["folder"] = shown(images["folder"])
    write_json(folder / JSON_NAME, document)
    write_json(folder / CHECKSUMS_NAME, {name: sha256_file(folder / name) for name in names})


def _write_groups(folder: Path, result: AuditResult) -> list[str]:
    """Write the figures of groups, if there are any; return the names of the tables."""
    for name in (GROUPS_NAME, f"{CURVE_NAME}.png", f"{CURVE_NAME}.pdf"):
        (folder / name).unlink(missing_ok=True)
    grouping = result.grouping
    if grouping is None:
        return []
    write_csv(folder / GROUPS_NAME, GROUP_COLUMNS, group_rows(grouping))
    rate = result.rule.rate if result.rule.kind == "fpr" else None
    label = grouping.by.partition("(")[0].strip("_-. ") or grouping.by
    draw_shares(
        grouping.groups, folder / CURVE_NAME, rate=rate, label=label, ordered=grouping.ordered
    )
    return [GROUPS_NAME]


def _check(folder: Path, name: str, *, remedy: str = _REMEDY) -> None:
    """Refuse a file of an audit that is not what the audit wrote.

    Raises:
        CorruptFileError: it was edited or damaged, or the audit was not finished.
    """
    sums = read_document(folder / CHECKSUMS_NAME, dict[str, str], remedy=remedy)
    with naming_damage(folder / name, remedy):
        check_file(folder / name, sums[name])


def _pictures(result: AuditResult, embedded: Embedded) -> Pictures:
    """Draw the images of the page small, each once."""
    sets, compute = embedded.sets, embedded.compute
    numbers: dict[Path | _LaidOver, int] = {}
    generated: dict[str, int] = {}
    training: dict[str, int] = {}
    aligned: dict[str, int] = {}
    for match in result.flagged[:MAX_PAIRS]:
        query, original = sets.generated.file_of[match.query], sets.training.file_of[match.match]
        generated[match.query] = numbers.setdefault(query, len(numbers))
        training[match.match] = numbers.setdefault(original, len(numbers))
        if match.outline and match.evidence is not None:
            item = _LaidOver(query, original, match.evidence.matrix)
            aligned[match.query] = numbers.setdefault(item, len(numbers))
    images = sets.held_out if result.null.kind == "held-out" else sets.training
    assert images is not None
    real: dict[str, int] = {}
    for shown in (*result.null.closest, *altered_among(result.null)):
        original = sets.training.file_of[shown.match]
        real[shown.path] = numbers.setdefault(images.file_of[shown.path], len(numbers))
        training[shown.match] = numbers.setdefault(original, len(numbers))
    thumbnails = make_thumbnails(
        list(numbers), _draw, workers=compute.num_workers, reporter=compute.reporter
    )
    return Pictures(
        uris=thumbnails.uris,
        generated=generated,
        training=training,
        laid_over=aligned,
        real=real,
    )


class _LaidOver(NamedTuple):
    """A generated image in the frame of its training image, not drawn yet."""

    query: Path
    training: Path
    matrix: tuple[tuple[float, ...], tuple[float, ...]]


def _draw(item: Path | _LaidOver) -> Image:
    if isinstance(item, Path):
        return load_image(item, size=SIDES[0])
    training = load_image(item.training, size=SIDES[0])
    training.thumbnail((SIDES[0], SIDES[0]))
    return laid_over(load_image(item.query, size=SIDES[0]), training.size, item.matrix)


def _row(match: Match) -> dict[str, Any]:
    """Return the cells of a match by column; ``None`` where something is not known."""
    evidence = match.evidence
    shown = evidence if match.same_picture else None  # of other pairs an alignment says nothing
    plain = {name: getattr(match, name) for name in COLUMNS[: COLUMNS.index("evidence")]}
    return {
        **plain,
        "evidence": None if evidence is None else evidence.value,
        **{name: getattr(shown, name, None) for name in ("mirrored", *NUMBERS)},
    }


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def write_parquet(path: Path, matches: Sequence[Match]) -> None:
    """Write the matches as Parquet, whose text is UTF-8; names that are not are escaped."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = dict.fromkeys(("score", "p_value", "evidence", *NUMBERS), pa.float64())
    kinds |= dict.fromkeys(("rank", "inliers"), pa.int32())
    kinds |= dict.fromkeys(("flagged", "same_picture", "mirrored"), pa.bool_())
    rows = [_row(match) for match in matches]

    def column(name: str) -> pa.Array:
        values = [row[name] for row in rows]
        if name not in kinds:
            values = [text.encode("utf-8", "backslashreplace").decode("utf-8") for text in values]
        return pa.array(values, kinds.get(name, pa.string()))

    table = pa.table({name: column(name) for name in COLUMNS})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def refuse_other_audit(folder: Path, settings: AuditSettings) -> None:
    """Refuse a folder that holds an audit of other sets, or by other settings.

    Args:
        folder: that is to be written to.
        settings: what the audit is asked to do.

    Raises:
        InputError: there is another audit, or its settings are gone.
        CorruptFileError: its settings are damaged.
    """
    if not (folder / JSON_NAME).is_file():
        return
    remedy = "choose another folder, or pass --overwrite to replace it"
    before = read_settings(folder, remedy=f"its folder holds another audit; {remedy}")
    there = as_written(before.model_dump(by_alias=True))
    wanted = as_written(settings.model_dump(by_alias=True))
    for name in settings.model_dump(by_alias=True, exclude=_NOT_ASKED):
        old, new = (values.get(name, "not set") for values in (there, wanted))
        if old != new:
            raise InputError(
                f"{folder}: holds another audit ({name.replace('_', '-')}: {old} there, {new} "
                f"now); {remedy}"
            )


def read_settings(folder: Path, *, remedy: str = _REMEDY) -> AuditSettings:
    """Read what a finished audit was asked to do.

    Raises:
        InputError: no such file.
        CorruptFileError: it is damaged or edited, or of another version.
    """
    settings = read_document(folder / CONFIG_NAME, AuditSettings, remedy=remedy)
    _check(folder, CONFIG_NAME, remedy=remedy)
    return settings.with_paths(functools.partial(found_from, folder))


def read_audit(folder: Path) -> AuditDocument:
    """Read an audit back; its matches are read by ``read_best_matches``.

    Raises:
        InputError: no finished audit in the folder, or one of another schema.
        CorruptFileError: the file is damaged or edited, or of another version.
    """
    path = folder / JSON_NAME
    if not path.is_file():
        raise InputError(f"{folder}: no {JSON_NAME} here; expected the folder of a finished audit")
    document = read_document(path, AuditDocument, remedy=_REMEDY)
    _check(folder, JSON_NAME)
    generated, training = (
        dataclasses.replace(images, folder=found_from(folder, images.folder))
        for images in (document.generated, document.training)
    )
    return dataclasses.replace(document, generated=generated, training=training)


def read_best_matches(folder: Path, document: AuditDocument) -> list[Match]:
    """Read the best match of each generated image from ``matches.csv``.

    Evidence is read of flagged ones only.

    Args:
        folder: of the audit.
        document: its ``audit.json``, which the table must belong to.

    Raises:
        CorruptFileError: the table is damaged or edited, or another audit's.
    """
    path = folder / CSV_NAME
    flagged = {match.query: match for match in document.flagged}
    try:
        with path.open(**CSV_OPTIONS) as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if row.get("rank") == "1"]
            columns = tuple(reader.fieldnames or ())
    except (OSError, csv.Error) as error:
        raise CorruptFileError(f"{path}: cannot be read ({error}); {_REMEDY}") from error
    if columns != COLUMNS or len(rows) != document.num_queries:
        raise CorruptFileError(
            f"{path}: does not belong to {folder / JSON_NAME} ({len(rows)} images, "
            f"{document.num_queries} expected); {_REMEDY}"
        )
    matches = []
    for row in rows:
        cells = {k: unguarded(cell) if isinstance(cell, str) else cell for k, cell in row.items()}
        query = cells["query"]
        source = f"{path}, the row of {query!r}"
        cells |= {"exact": False, "evidence": None}
        match = check_document(cells, Match, source=source, remedy=_REMEDY)
        if match.query in flagged:
            known = flagged[match.query]
            match = dataclasses.replace(
                match, exact=known.exact, tier=known.tier, evidence=known.evidence
            )
        matches.append(match)
    _check(folder, CSV_NAME)
    return matches
