"""Audits by group: checkpoints, columns, folders and kinds, through the command line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from audit_images import altered, picture, save_all
from PIL import Image

STEPS = {100: 0, 900: 2, 2000: 6}
"""Altered copies among the eight images of each training step."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("groups")
    save_all(root / "train", range(30))
    save_all(root / "held-out", range(1000, 1060))
    (root / "generated").mkdir()
    for step, copies in STEPS.items():
        for number in range(8):
            image = altered(picture(number)) if number < copies else picture(5000 + step + number)
            image.save(root / "generated" / f"step{step}_{number}.png")
    return root


def arguments(root: Path, generated: Path, output: Path) -> list[object]:
    return [
        "audit", generated, "--against", root / "train", "--held-out", root / "held-out",
        "--detector", "ncc", "--input-size", "32", "--fpr", "0.05", "--sensitivity", "0",
        "-o", output,
    ]  # fmt: skip


def read(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["group"]: row for row in csv.DictReader(file)}


def test_steps_in_names_give_a_curve_over_training(sets, tmp_path, run_cli):
    given = arguments(sets, sets / "generated", tmp_path / "out")
    shown = run_cli(*given, "--group-by", "step([0-9]+)")
    rows = read(tmp_path / "out" / "groups.csv")
    assert list(rows) == ["100", "900", "2000"]  # by number, not by letter
    for step, copies in STEPS.items():
        flagged = int(rows[str(step)]["num_flagged"])
        assert copies <= flagged <= copies + 2
        assert float(rows[str(step)]["low"]) <= flagged / 8 <= float(rows[str(step)]["high"])
    assert "More than chance first at " in shown.stdout and "By group" in shown.stdout
    grouping = json.loads((tmp_path / "out" / "audit.json").read_text())["grouping"]
    assert grouping["ordered"] and [one["num_images"] for one in grouping["groups"]] == [8] * 3
    with Image.open(tmp_path / "out" / "groups.png") as plot:
        assert plot.width > plot.height > 300
    page = (tmp_path / "out" / "report.html").read_text()
    assert "By group: step([0-9]+)" in page and "data:image/png;base64," in page
    run_cli(*given)  # the same finding; groups that were not asked for are not left there
    assert not list((tmp_path / "out").glob("groups.*"))


def test_a_column_of_the_list_or_the_folder_groups_too(sets, tmp_path, run_cli):
    listed = tmp_path / "list.csv"
    lines = ["path,id,Prompt"]
    for file in sorted((sets / "generated").iterdir()):
        prompt = "a face" if file.name.startswith("step2000") else ""
        step = file.name.partition("_")[0]
        lines.append(f"made/{step}/{file.name},{file.stem},{prompt}")
        folder = tmp_path / "made" / step
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)
    listed.write_text("\n".join(lines) + "\n")
    run_cli(*arguments(sets, listed, tmp_path / "a"), "--group-by", "prompt")
    rows = read(tmp_path / "a" / "groups.csv")
    assert {name: row["num_images"] for name, row in rows.items()} == {
        "a face": "8",
        "(none)": "16",
    }
    assert next(iter(rows)) == "a face"  # most flagged first
    run_cli(*arguments(sets, tmp_path / "made", tmp_path / "b"), "--group-by", "folder")
    assert set(read(tmp_path / "b" / "groups.csv")) == {f"step{step}" for step in STEPS}


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ("prompt", "is no filelist, so it has no columns"),
        ("epoch([0-9]+)", "no image of"),
        ("step([0-9]+", "is no regular expression"),
        ("(?:step)", "has no group in brackets"),
        ("folder", "no image of"),
    ],
)
def test_groups_that_are_not_there_are_refused(sets, tmp_path, run_cli, by, said):
    given = arguments(sets, sets / "generated", tmp_path / "out")
    shown = run_cli(*given, "--group-by", by, exit_code=2)
    assert said in shown.stderr and not (tmp_path / "out").exists()


def test_a_kind_with_enough_real_images_gets_a_threshold_of_its_own(tmp_path, run_cli):
    """Kind b is one picture with noise, so its real images are all nearer than those of kind a."""

    def noisy(seed: int) -> Image.Image:
        return Image.blend(picture(77), picture(seed), 0.3)

    lists = {name: ["path,id,ds_name"] for name in ("train", "held", "made")}
    for name, first, count in (("train", 0, 15), ("held", 1000, 60), ("made", 2000, 12)):
        for kind, draw in (("a", picture), ("b", noisy), ("c", picture)):
            for seed in range(first, first + (count if kind != "c" else 3)):
                file = tmp_path / f"{name}-{kind}-{seed}.png"
                draw(seed + 50_000 * (kind == "c")).save(file)
                lists[name].append(f"{file},{file.stem},{kind}")
    for name, lines in lists.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    shown = run_cli(
        "audit", tmp_path / "made.csv", "--against", tmp_path / "train.csv", "--held-out",
        tmp_path / "held.csv", "--detector", "ncc", "--input-size", "32", "--fpr", "0.05",
        "--group-by", "ds_name", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    document = json.loads(shown.stdout)
    own = {one["name"]: one["own"] for one in document["grouping"]["groups"]}
    assert own["c"] is None  # three real images are too few
    assert own["a"]["threshold"] < document["rule"]["threshold"] < own["b"]["threshold"]
    assert own["a"]["num_real"] == own["b"]["num_real"] == 60
    assert own["a"]["num_real_flagged"] == 0 and own["b"]["num_real_flagged"] > 3
    rows = read(tmp_path / "out" / "groups.csv")
    assert float(rows["b"]["own_threshold"]) == own["b"]["threshold"]
    assert rows["c"]["own_threshold"] == ""


def test_the_memorised_faces_give_one_curve(shared_data, tmp_path, run_cli):
    folder = shared_data.parent / "memorized"
    if not folder.is_dir():
        pytest.skip("the memorised faces are not on this machine")
    run_cli(
        "audit", folder / "generated", "--against", folder / "train", "--held-out",
        folder / "heldout", "--detector", "ncc", "--input-size", "64", "--group-by",
        "step([0-9]+)", "-o", tmp_path / "out",
    )  # fmt: skip
    rows = read(tmp_path / "out" / "groups.csv")
    flagged = [int(row["num_flagged"]) for row in rows.values()]
    assert list(rows) == ["00700", "01400", "02100", "02800"]
    assert flagged == sorted(flagged) and flagged[0] == 0 and flagged[-1] > 8
