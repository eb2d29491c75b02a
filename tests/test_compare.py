"""Finished audits side by side, through the command line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from audit_images import altered, picture, save_all
from PIL import Image
from scipy.stats import fisher_exact


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    save_all(root / "train", range(30))
    save_all(root / "other", range(1, 31))
    save_all(root / "held-out", range(1000, 1060))
    save_all(root / "held-out-too", range(1100, 1160))
    for week, copies in (("week1", 1), ("week2", 1), ("week3", 12)):
        for number in range(30):
            image = altered(picture(number)) if number < copies else picture(9000 + number)
            (root / week).mkdir(exist_ok=True)
            image.save(root / week / f"{number}.png")
    return root


def run_audit(run_cli, root: Path, week: str, output: Path, *more: object) -> Path:
    options = {"--against": root / "train", "--held-out": root / "held-out", "--fpr": 0.05}
    options |= {"--detector": "ncc", "--input-size": 32, "-o": output}
    options |= dict(zip(more[::2], more[1::2], strict=True))
    flat = [part for pair in options.items() for part in pair]
    run_cli("audit", root / week, *flat)
    return output


@pytest.fixture
def audits(sets, tmp_path, run_cli) -> dict[str, Path]:
    return {
        week: run_audit(run_cli, sets, week, tmp_path / week)
        for week in ("week1", "week2", "week3")
    }


def test_a_repeated_weekly_audit_passes_and_a_worse_one_fails(audits, tmp_path, run_cli):
    same = run_cli("compare", audits["week1"], audits["week2"], "--fail-if-worse")
    assert same.stdout.splitlines()[-1] == ("lcmem gate worse: PASSED - none of 1 worse than week1")
    worse = run_cli(
        "compare", *audits.values(), "--fail-if-worse", "-o", tmp_path / "out", exit_code=3
    )
    assert worse.stdout.splitlines()[-1] == "lcmem gate worse: FAILED - week3 worse than week1"
    assert "week3 is worse than week1." in worse.stdout
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["audit"] for row in rows] == ["week1", "week2", "week3"]
    assert [row["worse"] for row in rows] == ["", "false", "true"]
    counts = [int(row["num_flagged"]) for row in rows]
    table = [[counts[2], 30 - counts[2]], [counts[0], 30 - counts[0]]]
    expected = fisher_exact(table, alternative="greater").pvalue
    assert float(rows[2]["p_flagged"]) == pytest.approx(expected)
    document = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert document["gate"] == "failed" and document["audits"][2]["than_first"]["worse"]
    with Image.open(tmp_path / "out" / "compare.png") as plot:
        assert plot.height > 300
    better = run_cli("compare", audits["week3"], audits["week1"], "--fail-if-worse")
    assert "PASSED" in better.stdout
    as_json = run_cli("compare", *audits.values(), "--fail-if-worse", "--json", exit_code=3)
    assert json.loads(as_json.stdout)["line"] in as_json.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--against", "other", "another training set"),
        ("--fpr", 0.1, "another rate (0.05 there, 0.1 here)"),
        ("--detector", "mse", "another detector"),
        ("--confidence", 0.9, "another confidence of the rate"),
    ],
)
def test_what_cannot_be_compared_is_refused(sets, tmp_path, run_cli, option, value, said):
    one = run_audit(run_cli, sets, "week1", tmp_path / "one")
    changed = sets / value if option == "--against" else value
    two = run_audit(run_cli, sets, "week2", tmp_path / "two", option, changed)
    shown = run_cli("compare", one, two, exit_code=2)
    assert f"{two} cannot be compared with {one}: {said}" in shown.stderr


def test_other_real_images_are_told_and_not_tested(sets, tmp_path, run_cli):
    one = run_audit(run_cli, sets, "week1", tmp_path / "one")
    two = run_audit(run_cli, sets, "week1", tmp_path / "two", "--held-out", sets / "held-out-too")
    shown = run_cli("compare", one, two)
    assert "Thresholds differ, so the shares are not tested." in shown.stdout
    assert "warning: The audits used different real images" in shown.stderr
    refused = run_cli("compare", one, two, "--fail-if-worse", exit_code=2)
    assert "the same real images" in refused.stderr


def test_folders_that_are_no_finished_audits_are_refused(audits, tmp_path, run_cli):
    assert "two audits at least" in run_cli("compare", audits["week1"], exit_code=2).stderr
    shown = run_cli("compare", audits["week1"], tmp_path / "none", exit_code=2)
    assert "expected the folder of a finished audit" in shown.stderr
    edited = shutil.copytree(audits["week2"], tmp_path / "edited")
    path = edited / "audit.json"
    path.write_text(path.read_text().replace('"num_flagged": ', '"num_flagged": 1'))
    damaged = run_cli("compare", audits["week1"], edited, exit_code=1)
    assert "does not match its checksum" in damaged.stderr
