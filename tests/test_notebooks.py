"""The notebooks of the docs run from their first cell to their last."""

import ast
import json
from typing import Any

import pytest
from test_docs import ROOT

from lcmem_cli.engine.data.scenes import draw_scene

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


SHOWING = """
from lcmem_cli import audit, show_progress
audit("set", "set", detector="mse", input_size=16, null="leave-one-out", fpr=0.1, verify=False,
      cache=False, batch_size=1, reporter=show_progress()).num_queries
"""


@pytest.mark.slow
def test_a_notebook_shows_one_bar_of_all_sets_and_the_warnings(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    from nbformat.v4 import new_code_cell, new_notebook

    (tmp_path / "set").mkdir()
    for number in range(150):
        draw_scene(number).save(tmp_path / "set" / f"{number}.png")
    notebook = new_notebook(cells=[new_code_cell(SHOWING)])
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}})
    shown = []
    keep = client.process_message
    client.process_message = lambda message, *rest: shown.append(message) or keep(message, *rest)
    client.execute()
    texts = [message["content"].get("data", {}).get("text/html", "") for message in shown]
    assert any("embedding (mse)" in text and "/300" in text for text in texts)
    assert any("warning: Generated and training set are the same" in text for text in texts)
    assert notebook.cells[0].outputs[-1].data["text/plain"] == "150"
