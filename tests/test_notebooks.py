"""The notebooks of the docs run from their first cell to their last."""

import ast
import json
from typing import Any

import pytest
from test_docs import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells(notebook) -> list[str]:
    document = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in document["cells"] if c["cell_type"] == "code"]


def run_cell(source: str, names: dict[str, Any]) -> object:
    """Run a cell and return the value of its last expression, as a notebook shows it."""
    body = ast.parse(source)
    last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
    exec(compile(body, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


def test_notebooks_are_without_outputs_and_compile():
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        document = json.loads(notebook.read_text(encoding="utf-8"))
        assert not any(cell.get("outputs") for cell in document["cells"])
        for number, source in enumerate(cells(notebook)):
            compile(source, f"{notebook.name}, cell {number}", "exec")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook_of_the_guard_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = [run_cell(source, names) for source in cells(ROOT / "docs/notebooks/guard.ipynb")]
    flagged = {match.query for match in names["result"].flagged}
    assert {"mirrored.png", "cropped.png", "turned.png"} <= flagged
    assert shown[1]._repr_html_().count("<img ") >= 6
    assert len(names["kept"]) == 4 and names["guard"].accept(names["kept"]).all()
    assert shown[6].tolist() == [False, True]
    assert names["metric"].num_images == 12
    assert [step for step, _ in names["logged"]] == [500, 1000]
