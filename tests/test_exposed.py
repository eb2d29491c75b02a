"""Whose images are exposed, and gates on it, through the command line."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from audit_images import small_network
from PIL import Image, ImageEnhance

from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.evaluation.audit.result import AuditResult, DifferentPictures
from lcmem_cli.engine.evaluation.audit.run import audit
from lcmem_cli.engine.evaluation.audit.sentences import verdict
from lcmem_cli.engine.models.checkpoint import save_checkpoint

SIDE = 96
PATIENTS = 12


def patient(number: int, view: int) -> Image.Image:
    return draw_scene(10 * number + view, side=SIDE)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 patients of three images; of three patients there are copies among the generated."""
    root = tmp_path_factory.mktemp("exposed")
    for number in range(PATIENTS):
        folder = root / "training" / f"patient{number:02d}"
        folder.mkdir(parents=True)
        for view in range(3):
            patient(number, view).save(folder / f"{view}.png")
    for name, first, count in (("held-out", 1000, 24), ("generated", 2000, 9), ("clean", 3000, 9)):
        (root / name).mkdir()
        for number in range(count):
            draw_scene(first + number, side=SIDE).save(root / name / f"{number:03d}.png")
    made = root / "generated"
    shutil.copy(root / "training" / "patient03" / "1.png", made / "file.png")
    patient(3, 2).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(made / "mirrored.png")
    patient(5, 0).save(made / "pixels.png", compress_level=1)
    ImageEnhance.Brightness(patient(7, 1)).enhance(1.2).save(made / "brighter.png")
    save_checkpoint(root / "net.safetensors", small_network())
    return root


def arguments(root: Path, generated: str = "generated") -> list[object]:
    return [
        "audit", root / generated, "--against", root / "training", "--held-out",
        root / "held-out", "--fpr", "0.05", "--no-adapt", "--detector",
        f"lcmem:{root / 'net.safetensors'}", "-o", root / f"audit-{generated}",
    ]  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_exposed_csv_lists_patients_surest_first(sets, run_cli):
    shown = run_cli(*arguments(sets))
    rows = read(sets / "audit-generated" / "exposed.csv")
    patients = [row for row in rows if row["kind"] == "identity"]
    tiers = {row["name"]: row["tier"] for row in patients}
    assert tiers["patient03"] == "identical file" and tiers["patient05"] == "same pixels"
    assert tiers["patient07"] == "same picture, altered"
    certain = [row["name"] for row in patients if row["tier"] != "alike"]
    assert [row["name"] for row in patients][: len(certain)] == certain  # chance hits come last
    first = patients[0]
    assert first["name"] == "patient03" and first["num_matches"] == "2"
    assert first["matches"] == "file.png; mirrored.png"
    images = {row["name"]: row for row in rows if row["kind"] == "image"}
    assert images["patient03/2.png"]["tier"] == "same picture, altered"
    assert images["patient03/2.png"]["id"] == "patient03"
    assert "Exposed identities" in shown.stdout and "patient03" in shown.stdout
    document = json.loads((sets / "audit-generated" / "audit.json").read_text())
    assert document["exposed_identities"][0]["name"] == "patient03"
    assert document["num_exposed_identities"] == len(patients)
    page = (sets / "audit-generated" / "report.html").read_text()
    places = ["Whose images are exposed", "patient03", "Flagged pairs</h2>"]
    assert sorted(places, key=page.index) == places


@pytest.mark.parametrize(
    ("generated", "rule", "code", "ended"),
    [
        ("generated", "identical", 3, "FAILED - 2 of 13 generated images identical"),
        ("generated", "altered", 3, "FAILED - 4 of 13 generated images copied"),
        ("generated", "more-than-chance", 3, "FAILED - "),
        ("generated", "0.9", 0, "PASSED - "),
        ("clean", "identical", 0, "PASSED - 0 of 9"),
        ("clean", "altered", 0, "PASSED - 0 of 9 generated images copied"),
        ("clean", "more-than-chance", 0, "PASSED - "),
    ],
)
def test_gates_say_in_one_line_how_they_ended(sets, run_cli, generated, rule, code, ended):
    given = [*arguments(sets, generated), "--fail-on", rule]
    shown = run_cli(*given, exit_code=code)
    last = shown.stdout.splitlines()[-1]
    assert last.startswith(f"lcmem gate {rule}: {ended}")
    suite = ElementTree.parse(sets / f"audit-{generated}" / "junit.xml").getroot()
    assert suite.get("tests") == "1" and suite.get("failures") == str(int(code == 3))
    failures = suite.findall("testcase/failure")
    assert [failure.get("message") for failure in failures] == ([last] if code else [])
    quiet = run_cli(*given, "--json", "--quiet", exit_code=code)
    assert json.loads(quiet.stdout)["gate"]["line"] == last
    assert last not in quiet.stderr
    assert last in run_cli(*given, "--json", exit_code=code).stderr


def test_a_wrong_gate_is_a_usage_error(sets, run_cli):
    shown = run_cli(*arguments(sets), "--fail-on", "everything", exit_code=2)
    assert "identical, altered, more-than-chance or a share" in shown.stderr
    shown = run_cli(*arguments(sets), "--fail-on", "altered", "--no-verify", exit_code=2)
    assert "--fail-on altered needs --verify" in shown.stderr
    shown = run_cli(
        "audit", sets / "clean", "--against", sets / "training", "--held-out", sets / "held-out",
        "--fpr", "0.05", "--detector", "ncc", "--input-size", "32", "-o", sets / "none",
        "--fail-on", "altered", exit_code=2,
    )  # fmt: skip
    assert "needs verified candidates" in shown.stderr


@pytest.fixture(scope="module")
def result(sets) -> AuditResult:
    return audit(
        sets / "generated",
        sets / "training",
        held_out=sets / "held-out",
        fpr=0.05,
        adapt=False,
        detector=LCMemDetector.load(str(sets / "net.safetensors")),
    )


def test_the_verdict_speaks_of_each_tier_apart(result):
    few = dataclasses.replace(
        result, num_queries=500, num_flagged=30, num_exact_copies=5, num_same_pixels=0,
        num_altered=12, num_alike=13, comparability=None,
        pictures=DifferentPictures(num_pictures=500, num_flagged=30, num_alike=13),
    )  # fmt: skip
    assert few.more_than_chance is False
    text = verdict(few)
    assert "5 generated images are byte for byte a training image." in text
    assert "12 generated images show the same picture as a training image, altered." in text
    end = "of 13 others; chance alone would flag about 25: their number is no evidence of copying"
    assert end in text
    repeated = dataclasses.replace(
        few, pictures=DifferentPictures(num_pictures=100, num_flagged=4, num_alike=2)
    )
    assert "of 13 others (2 different pictures); chance alone would flag about 5: " in verdict(
        repeated
    )
    pictures = DifferentPictures(num_pictures=500, num_flagged=217, num_alike=200)
    many = dataclasses.replace(few, num_alike=200, num_flagged=217, pictures=pictures)
    assert many.more_than_chance and verdict(many).endswith(": this is more.")


def test_known_copies_come_before_chance_hits_of_higher_score(result):
    alike = dataclasses.replace(result.flagged[0], query="chance.png", tier="alike", score=2.0)
    sorted_again = dataclasses.replace(result, matches=(alike, *result.matches)).flagged
    assert sorted_again[0].tier == "identical file" and sorted_again[-1].tier == "alike"
