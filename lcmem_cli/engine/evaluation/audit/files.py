"""The files of an audit: ``audit.json``, the match tables and the page."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.documents import check_document, read_document
from lcmem_cli.engine.errors import CorruptFileError, InputError
from lcmem_cli.engine.evaluation.audit.request import AuditSettings
from lcmem_cli.engine.evaluation.audit.result import (
    AuditResult,
    FlagRule,
    Match,
    NullSummary,
    SetSummary,
)
from lcmem_cli.engine.evaluation.audit.sets import Embedded
from lcmem_cli.engine.files import (
    CSV_OPTIONS,
    atomic_path,
    unguarded,
    write_csv,
    write_json,
    write_text,
)
from lcmem_cli.engine.report.html import MAX_PAIRS, Distribution, Pictures, render_report
from lcmem_cli.engine.report.thumbnails import make_thumbnails
from lcmem_cli.engine.runs import CONFIG_NAME, as_written, write_run_files

JSON_NAME = "audit.json"
CSV_NAME = "matches.csv"
PARQUET_NAME = "matches.parquet"
REPORT_NAME = "report.html"
COLUMNS = ("query", "rank", "match", "match_id", "score", "p_value", "flagged")
_REMEDY = "run the audit again"
_NOT_ASKED = {"top_k", "fail_over", "cache", "fingerprint", "adapted_to"}
"""Settings that change no finding, or that come of one: an audit may differ in them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditDocument:
    """What is read again of ``audit.json``; see ``AuditResult``."""

    format: Literal["lcmem-audit"]
    schema: Literal[1]
    fingerprint: str
    adapted_to: int | None
    rule: FlagRule
    null: NullSummary
    num_queries: int
    generated: SetSummary
    flagged: tuple[Match, ...]


def write_audit(
    folder: Path,
    result: AuditResult,
    settings: AuditSettings,
    *,
    embedded: Embedded,
    distribution: Distribution,
) -> None:
    """Write everything; ``audit.json`` last, so that where it stands the rest does too.

    Args:
        folder: made if missing.
        result: what was found.
        settings: what the audit was asked to do.
        embedded: the sets, whose images are shown.
        distribution: scores to draw.
    """
    (folder / JSON_NAME).unlink(missing_ok=True)
    write_run_files(folder, settings.model_dump(by_alias=True))
    write_csv(folder / CSV_NAME, COLUMNS, (_cells(match) for match in result.matches))
    write_parquet(folder / PARQUET_NAME, result.matches)
    pictures = _pictures(result, embedded)
    write_text(folder / REPORT_NAME, render_report(result, pictures, distribution))
    write_json(folder / JSON_NAME, result.to_dict())


def _pictures(result: AuditResult, embedded: Embedded) -> Pictures:
    """Draw the images of the page small, each file once."""
    sets, compute = embedded.sets, embedded.compute
    numbers: dict[Path, int] = {}
    generated: dict[str, int] = {}
    training: dict[str, int] = {}
    for match in result.flagged[:MAX_PAIRS]:
        for name, files, known in (
            (match.query, sets.generated.file_of, generated),
            (match.match, sets.training.file_of, training),
        ):
            known[name] = numbers.setdefault(files[name], len(numbers))
    for copied in result.most_copied:
        file = sets.training.file_of[copied.path]
        training[copied.path] = numbers.setdefault(file, len(numbers))
    thumbnails = make_thumbnails(
        list(numbers), load_image, workers=compute.num_workers, reporter=compute.reporter
    )
    return Pictures(uris=thumbnails.uris, generated=generated, training=training)


def _cells(match: Match) -> list[str]:
    flagged = "true" if match.flagged else "false"
    numbers = (repr(match.score), repr(match.p_value))
    return [match.query, str(match.rank), match.match, match.match_id, *numbers, flagged]


def write_parquet(path: Path, matches: Sequence[Match]) -> None:
    """Write the matches as Parquet, whose text is UTF-8; names that are not are escaped."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"rank": pa.int32(), "score": pa.float64(), "p_value": pa.float64()}
    kinds["flagged"] = pa.bool_()

    def column(name: str) -> pa.Array:
        values = [getattr(match, name) for match in matches]
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
        CorruptFileError: it is damaged, or of another version.
    """
    return read_document(folder / CONFIG_NAME, AuditSettings, remedy=remedy)


def read_audit(folder: Path) -> AuditDocument:
    """Read an audit back; its matches are read by ``read_best_matches``.

    Raises:
        InputError: no finished audit in the folder, or one of another schema.
        CorruptFileError: the file is damaged, or of another version.
    """
    path = folder / JSON_NAME
    if not path.is_file():
        raise InputError(f"{folder}: no {JSON_NAME} here; expected the folder of a finished audit")
    return read_document(path, AuditDocument, remedy=_REMEDY)


def read_best_matches(folder: Path, document: AuditDocument) -> list[Match]:
    """Read the best match of each generated image from ``matches.csv``.

    Args:
        folder: of the audit.
        document: its ``audit.json``, which the table must belong to.

    Raises:
        CorruptFileError: the table is damaged or another audit's.
    """
    path = folder / CSV_NAME
    exact = {match.query for match in document.flagged if match.exact}
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
        cells["exact"] = query in exact
        matches.append(check_document(cells, Match, source=source, remedy=_REMEDY))
    return matches
