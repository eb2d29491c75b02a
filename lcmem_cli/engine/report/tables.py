"""Tables of text, and how LaTeX writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_HEADER = "% needs \\usepackage{booktabs}; the best of each column is bold\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as they are shown.

    Attributes:
        title: of the table.
        columns: headings; the first column holds names.
        rows: one cell a column.
        best: per column index, the row index of the best value.
        remarks: what stands below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: Mapping[int, int] = dataclasses.field(default_factory=dict)
    remarks: Sequence[str] = ()


def to_latex(tables: Sequence[Table]) -> str:
    """Return tables for a paper, as ``table`` environments of the package booktabs."""
    return _HEADER + "\n".join(_environment(table) for table in tables)


def _environment(table: Table) -> str:
    rows = [
        [
            f"\\textbf{{{_escaped(cell)}}}" if table.best.get(column) == number else _escaped(cell)
            for column, cell in enumerate(row)
        ]
        for number, row in enumerate(table.rows)
    ]
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_escaped(table.title)}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        "\\toprule",
        " & ".join(map(_escaped, table.columns)) + " \\\\",
        "\\midrule",
        *(" & ".join(row) + " \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
        *(f"% {remark}" for remark in table.remarks),
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return "".join(_SPECIAL.get(c, c) for c in plain)
