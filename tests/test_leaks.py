"""Leaks of a test set through the command line: copies, shared patients, gates and words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from audit_images import small_network
from PIL import Image

from lcmem_cli.engine.data.folders import meant
from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.models.checkpoint import save_checkpoint

SIDE = 128
PATIENTS = 45


def listed(path: Path, rows: list[str]) -> None:
    path.write_text("\n".join(["path,id", *rows]) + "\n")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training list of 45 patients, a test list that leaks, and one that does not."""
    root = tmp_path_factory.mktemp("leaks")
    for name in ("train", "test", "clean"):
        (root / name).mkdir()
    rows = []
    for number in range(PATIENTS):
        for view in range(2):
            draw_scene(10 * number + view, side=SIDE).save(root / "train" / f"{number}-{view}.png")
            rows.append(f"train/{number}-{view}.png,p{number:02d}")
    listed(root / "train.csv", rows)
    for name, first in (("test", 2000), ("clean", 3000)):
        for number in range(8):
            draw_scene(first + number, side=SIDE).save(root / name / f"{number}.png")
    shutil.copy(root / "train" / "3-0.png", root / "test" / "same.png")
    with Image.open(root / "train" / "5-1.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "test" / "mirrored.png")
    with Image.open(root / "train" / "7-0.png") as image:
        image.crop((4, 4, 124, 124)).resize((SIDE, SIDE)).save(root / "test" / "cropped.png")
    names = [*(f"{number}.png" for number in range(8)), "same.png", "mirrored.png", "cropped.png"]
    ids = ["p11", *(f"q{number}" for number in range(1, len(names)))]
    listed(root / "test.csv", [f"test/{n},{i}" for n, i in zip(names, ids, strict=True)])
    listed(root / "clean.csv", [f"clean/{number}.png,q{number}" for number in range(8)])
    save_checkpoint(root / "net.safetensors", small_network())
    return root


def arguments(root: Path, test: str, output: Path) -> list[object]:
    return [
        "leaks", root / test, "--against", root / "train.csv", "--fpr", "0.05", "--no-adapt",
        "--detector", f"lcmem:{root / 'net.safetensors'}", "-o", output,
    ]  # fmt: skip


def test_copies_and_shared_patients_of_a_leaking_test_set(sets, tmp_path, run_cli):
    given = arguments(sets, "test.csv", tmp_path / "out")
    shown = run_cli(*given, "--fail-on", "altered", exit_code=3)
    assert "lcmem gate altered: FAILED - 3 of 11 test images copied" in shown.stdout
    assert "1 identity stands in both test and training list: p11." in shown.stdout
    assert "1 test image is byte for byte a training image." in shown.stdout
    assert "generated" not in shown.stdout
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert document["task"] == "leaks" and document["leaked_identities"] == ["p11"]
    copies = {one["query"]: one["match"] for one in document["flagged"] if one["tier"] != "alike"}
    assert copies == {
        "test/same.png": "train/3-0.png",
        "test/mirrored.png": "train/5-1.png",
        "test/cropped.png": "train/7-0.png",
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert "leaks of a test set" in page and "<title>Leaks: " in page


def test_a_clean_test_set_passes(sets, tmp_path, run_cli):
    given = arguments(sets, "clean.csv", tmp_path / "out")
    shown = run_cli(*given, "--fail-on", "altered", exit_code=0)
    assert "PASSED - 0 of 8 test images copied" in shown.stdout
    assert "in both test and training list" not in shown.stdout
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert document["leaked_identities"] == []


@pytest.mark.parametrize(
    ("folders_are", "identities"), [("identities", 45), ("classes", None), ("auto", 45)]
)
def test_subfolders_are_what_the_user_says(sets, tmp_path, run_cli, folders_are, identities):
    for number in range(PATIENTS):
        folder = tmp_path / "train" / f"p{number:02d}"
        folder.mkdir(parents=True)
        for view in range(2):
            shutil.copy(sets / "train" / f"{number}-{view}.png", folder)
    given = ["leaks", sets / "clean", "--against", tmp_path / "train", "-o", tmp_path / "out"]
    shown = run_cli(
        *given, "--folders-are", folders_are, "--fpr", "0.05", "--detector", "ncc",
        "--input-size", "32",
    )  # fmt: skip
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert document["training"]["num_identities"] == identities
    taken_for = "classes" if identities is None else "identities"
    assert document["training"]["folders_are"] == taken_for
    assert ("subfolders are classes" in shown.stderr) is (identities is None)


def test_few_large_subfolders_are_classes():
    paths = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(30)]
    assert meant(paths, "auto") == "classes" and meant(paths, "identities") == "identities"
    assert meant(paths[:6], "auto") == "identities"
    many = [f"p{number}/0.png" for number in range(20)]
    assert meant(many, "auto") == "identities"
    assert meant([*many, *(f"p0/{number}.png" for number in range(1, 52))], "auto") == "classes"


def test_folders_have_no_ids_to_compare(sets, tmp_path, run_cli):
    run_cli(*arguments(sets, "clean", tmp_path / "out"), exit_code=0)
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert document["leaked_identities"] is None
    assert any(text.startswith("Whether test and training") for text in document["does_not_show"])
