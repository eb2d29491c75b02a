"""The files of an audit: ``audit.json``, the match tables and the page."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.distributed import resolve_workers
from lcmem_cli.engine.errors import CorruptFileError, InputError
from lcmem_cli.engine.evaluation.audit.result import (
    AUDIT_FORMAT,
    AUDIT_SCHEMA,
    AuditResult,
    Match,
)
from lcmem_cli.engine.files import (
    CSV_OPTIONS,
    atomic_path,
    unguarded,
    write_csv,
    write_json,
    write_text,
)
from lcmem_cli.engine.report.html import Distribution, ReportCopied, ReportPair, render_report
from lcmem_cli.engine.report.thumbnails import make_thumbnails
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.runs import as_written, read_run_config, write_run_files

JSON_NAME = "audit.json"
CSV_NAME = "matches.csv"
PARQUET_NAME = "matches.parquet"
REPORT_NAME = "report.html"
COLUMNS = ("query", "rank", "match", "match_id", "score", "p_value", "flagged")
MAX_REPORT_PAIRS = 5000


def write_audit(
    folder: Path,
    result: AuditResult,
    *,
    generated_files: Mapping[str, Path],
    training_files: Mapping[str, Path],
    distribution: Distribution,
    settings: dict[str, Any],
    workers: int = -1,
    reporter: Reporter = SILENT,
) -> None:
    """Write everything; ``audit.json`` last, so that where it stands the rest does too.

    Args:
        folder: made if missing.
        result: what was found.
        generated_files: file of each generated image by its name in ``result``.
        training_files: file of each training image by its name in ``result``.
        distribution: scores to draw.
        settings: what the audit was asked to do.
        workers: threads for thumbnails; -1: from the CPUs.
        reporter: told the progress.
    """
    (folder / JSON_NAME).unlink(missing_ok=True)
    write_run_files(folder, settings)
    write_csv(folder / CSV_NAME, COLUMNS, (_cells(match) for match in result.matches))
    write_parquet(folder / PARQUET_NAME, result.matches)

    pictures: dict[Path, int] = {}

    def picture(path: Path) -> int:
        return pictures.setdefault(path, len(pictures))

    pairs = [
        ReportPair(
            query=match.query,
            match=match.match,
            match_id=match.match_id,
            score=match.score,
            p_value=match.p_value,
            exact=match.exact,
            query_picture=picture(generated_files[match.query]),
            match_picture=picture(training_files[match.match]),
        )
        for match in result.flagged[:MAX_REPORT_PAIRS]
    ]
    most_copied = [
        ReportCopied(
            path=copied.path,
            id=copied.id,
            count=copied.count,
            picture=picture(training_files[copied.path]),
        )
        for copied in result.most_copied
    ]
    thumbnails = make_thumbnails(
        list(pictures), load_image, workers=resolve_workers(workers), reporter=reporter
    )
    page = render_report(
        result,
        pairs=pairs,
        most_copied=most_copied,
        pictures=thumbnails.uris,
        distribution=distribution,
    )
    write_text(folder / REPORT_NAME, page)
    write_json(folder / JSON_NAME, result.to_dict())


def refuse_other_audit(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds an audit of other sets, or by other settings.

    Args:
        folder: that is to be written to.
        settings: what the audit is asked to do.

    Raises:
        InputError: there is another audit.
    """
    if not (folder / JSON_NAME).is_file():
        return
    before, now = read_run_config(folder), as_written(settings)
    for name in settings:
        there, wanted = (values.get(name, "not set") for values in (before, now))
        if there != wanted:
            raise InputError(
                f"{folder}: holds another audit ({name.replace('_', '-')}: {there} there, {wanted} "
                "now); choose another folder, or pass --overwrite to replace it"
            )


def write_parquet(path: Path, matches: Sequence[Match]) -> None:
    """Write the matches as Parquet, whose text is UTF-8; names that are not are escaped."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def text(name: str) -> list[str]:
        return [
            str(getattr(match, name)).encode("utf-8", "backslashreplace").decode("utf-8")
            for match in matches
        ]

    table = pa.table(
        {
            "query": pa.array(text("query"), pa.string()),
            "rank": pa.array([match.rank for match in matches], pa.int32()),
            "match": pa.array(text("match"), pa.string()),
            "match_id": pa.array(text("match_id"), pa.string()),
            "score": pa.array([match.score for match in matches], pa.float64()),
            "p_value": pa.array([match.p_value for match in matches], pa.float64()),
            "flagged": pa.array([match.flagged for match in matches], pa.bool_()),
        }
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read_audit(folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Read an audit back.

    Returns:
        The document of ``audit.json``, and the best match of each query from ``matches.csv``.

    Raises:
        InputError: no finished audit in the folder, or one of another schema.
        CorruptFileError: a file is damaged.
    """
    path = folder / JSON_NAME
    if not path.is_file():
        raise InputError(f"{folder}: no {JSON_NAME} here; expected the folder of a finished audit")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        known = (document.get("format"), document.get("schema"))
    except (ValueError, AttributeError) as error:
        raise CorruptFileError(f"{path}: not valid JSON ({error}); run the audit again") from error
    if known != (AUDIT_FORMAT, AUDIT_SCHEMA):
        raise InputError(
            f"{path}: format {known[0]!r}, schema {known[1]!r}; this lcmem reads {AUDIT_FORMAT!r}, "
            f"schema {AUDIT_SCHEMA}; run the audit again"
        )
    table = folder / CSV_NAME
    try:
        with table.open(**CSV_OPTIONS) as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if row.get("rank") == "1"]
            columns = tuple(reader.fieldnames or ())
    except (OSError, csv.Error) as error:
        raise CorruptFileError(f"{table}: cannot be read ({error}); run the audit again") from error
    expected = document.get("num_queries")
    if columns != COLUMNS or len(rows) != expected:
        raise CorruptFileError(
            f"{table}: does not belong to {path} ({len(rows)} images, {expected} expected); run "
            "the audit again"
        )
    rows = [{name: unguarded(row[name] or "") for name in COLUMNS} for row in rows]
    for row in rows:
        if row["flagged"] not in ("true", "false") or not _are_numbers(
            row["score"], row["p_value"]
        ):
            raise CorruptFileError(
                f"{table}: the row of {row['query']!r} is damaged; run the audit again"
            )
    return document, rows


def _are_numbers(*cells: str | None) -> bool:
    try:
        return all(math.isfinite(float(cell or "")) for cell in cells)
    except ValueError:
        return False


def _cells(match: Match) -> list[str]:
    return [
        match.query,
        str(match.rank),
        match.match,
        match.match_id,
        repr(match.score),
        repr(match.p_value),
        "true" if match.flagged else "false",
    ]
