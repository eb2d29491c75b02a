"""The measured figures of the docs: one JSON file, from which their tables are written.

    python tests/figures.py

writes each table and output that follows a mark ``<!-- figures: NAME -->`` anew, from
``docs/figures.json``. An entry holds the commit and the commands that made it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures.json"
CARD = ROOT / "lcmem_cli" / "assets" / "default" / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), CARD])
MARKED = re.compile(
    r"(?<=<!-- figures: )(?P<name>[\w-]+)(?P<gap> -->\n\n)((\|[^\n]*\n)+|```text\n.*?```\n)",
    re.DOTALL,
)


def figures() -> dict:
    """Return all entries by name."""
    return json.loads(FIGURES.read_text(encoding="utf-8"))


def rendered(entry: dict) -> str:
    """Return an entry as it stands in a page: a table, or the output of a command."""
    if "output" in entry:
        return "\n".join(["```text", *entry["output"], "```", ""])
    lines = [entry["columns"], ["---"] * len(entry["columns"]), *entry["rows"]]
    return "".join(f"| {' | '.join(cell or '' for cell in line)} |\n" for line in lines)


def rewritten(text: str) -> str:
    """Return a page with all its figures as the JSON file has them."""
    known = figures()
    return MARKED.sub(lambda m: m["name"] + m["gap"] + rendered(known[m["name"]]), text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
