"""Near-duplicates within a set, through the command line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from audit_images import small_network
from PIL import Image

from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.models.checkpoint import save_checkpoint

SIDE = 128
IMAGES = 20


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pictures, and copies of some that are mirrored, cropped, compressed, larger or equal."""
    folder = tmp_path_factory.mktemp("duplicates") / "training"
    folder.mkdir()
    for number in range(IMAGES):
        draw_scene(number, side=SIDE).save(folder / f"{number:02d}.png")
    originals = [Image.open(folder / f"{number:02d}.png") for number in range(IMAGES)]
    originals[3].transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "x-mirrored.png")
    originals[5].crop((8, 4, 120, 124)).save(folder / "x-cropped.png")
    originals[7].save(folder / "x-compressed.jpg", quality=70)
    originals[9].resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC).save(
        folder / "x-larger.png"
    )
    originals[11].save(folder / "x-pixels.png", compress_level=1)
    shutil.copy(folder / "13.png", folder / "x-file.png")
    originals[3].save(folder / "x-second.jpg", quality=80)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    save_checkpoint(folder.parent / "net.safetensors", small_network())
    return folder


def arguments(training: Path, output: Path) -> list[object]:
    detector = f"lcmem:{training.parent / 'net.safetensors'}"
    return ["duplicates", training, "--detector", detector, "-o", output]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_planted_duplicates_are_grouped_about_the_image_to_keep(training, tmp_path, run_cli):
    out = tmp_path / "out"
    shown = run_cli(*arguments(training, out), exit_code=0)
    assert "7 of 28 images show what another one shows, in 6 groups; 20 are kept." in shown.stdout
    found = {row["path"]: row for row in rows(out / "duplicates.csv")}
    assert {path: (row["kept"], row["relation"]) for path, row in found.items()} == {
        "x-mirrored.png": ("03.png", "same picture, altered"),
        "x-second.jpg": ("03.png", "same picture, altered"),
        "x-cropped.png": ("05.png", "same picture, altered"),
        "x-compressed.jpg": ("07.png", "same picture, altered"),
        "09.png": ("x-larger.png", "same picture, altered"),
        "x-pixels.png": ("11.png", "same pixels"),
        "x-file.png": ("13.png", "identical file"),
    }
    assert found["x-mirrored.png"]["edit"] == "mirrored"
    assert found["x-mirrored.png"]["group"] == found["x-second.jpg"]["group"] == "1"
    assert "% of the kept image" in found["x-cropped.png"]["edit"]
    document = json.loads((out / "duplicates.json").read_text())
    assert document["format"] == "lcmem-duplicates" and document["schema"] == 1
    assert [item["path"] for item in document["unreadable"]] == ["broken.png"]
    kept = {row["path"] for row in rows(out / "keep.csv")}
    every = {file.name for file in training.iterdir()}
    assert kept == every - set(found) - {"broken.png"}


def test_the_list_to_keep_is_a_filelist_without_duplicates(training, tmp_path, run_cli):
    run_cli(*arguments(training, tmp_path / "first"))
    given = arguments(tmp_path / "first" / "keep.csv", tmp_path / "second")
    given[3] = f"lcmem:{training.parent / 'net.safetensors'}"
    shown = run_cli(*given, "--basedir", training, "--json")
    result = json.loads(shown.stdout)
    assert result["duplicates"] == [] and result["num_kept"] == result["num_images"] == IMAGES


def test_another_result_is_not_replaced_unasked(training, tmp_path, run_cli):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "duplicates.json").write_text("{}")
    shown = run_cli(*arguments(training, tmp_path / "out"), exit_code=2)
    assert "--overwrite" in shown.stderr


def test_the_list_to_keep_names_the_folder_of_each_image(tmp_path, run_cli):
    for folder in ("cats", "dogs"):  # few large ones, which an audit takes for classes
        (tmp_path / "set" / folder).mkdir(parents=True)
        for number in range(11):
            picture = draw_scene(100 * len(folder) + ord(folder[0]) + 7 * number, side=48)
            picture.save(tmp_path / "set" / folder / f"{number}.png")
    shown = run_cli("duplicates", tmp_path / "set", "--detector", "phash", "-o", tmp_path / "out")
    assert "classes" not in shown.stderr
    assert {row["id"] for row in rows(tmp_path / "out" / "keep.csv")} == {"cats", "dogs"}
