"""Copies in grey, in a frame, blank pictures and pages: what infer and audits say of them."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from conftest import Listener
from PIL import Image, ImageDraw

from lcmem_cli import audit, load_detector
from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.evaluation.indexing import add_to_index, query_index
from lcmem_cli.engine.evaluation.inference import score_pairs


@pytest.fixture(scope="module")
def detector():
    return load_detector("lcmem", device="cpu")


def scene(seed, side=160):
    return draw_scene(seed, side=side)


def test_a_copy_in_grey_or_between_bars_is_a_match(detector, tmp_path):
    scene(3).save(tmp_path / "a.png")
    scene(3).convert("L").save(tmp_path / "grey.png")
    scene(4).convert("L").save(tmp_path / "other.png")
    framed = Image.new("RGB", (300, 260), (8, 8, 8))
    framed.paste(scene(3), (60, 40))
    framed.save(tmp_path / "framed.png")
    framed.convert("L").save(tmp_path / "both.png")
    names = ("grey", "framed", "both", "other")
    pairs = [(tmp_path / "a.png", tmp_path / f"{name}.png") for name in names]
    found = score_pairs(detector, pairs, workers=0).pairs
    assert [pair.match for pair in found] == [True, True, True, False]
    assert [pair.form for pair in found[:3]] == [
        "in grey", "without bars", "without bars and in grey"
    ]  # fmt: skip
    turned = score_pairs(detector, [(b, a) for a, b in pairs], workers=0).pairs
    assert [pair.score for pair in turned] == pytest.approx([pair.score for pair in found])


def test_joint_greys_as_programs_do(tmp_path):
    joint = load_detector("joint", device="cpu")
    colourful = np.asarray(scene(7)).copy()
    colourful[..., 1] = 255 - colourful[..., 1]
    image = Image.fromarray(colourful)
    features = joint.embed([image, image.convert("L")])
    pictures = features[:, joint.network.num_features :]
    assert float(pictures[0] @ pictures[1]) > 0.999


def test_a_blank_picture_matches_only_its_equal(detector, tmp_path):
    for name, colour in {"red": "red", "green": "green", "black": "black"}.items():
        Image.new("RGB", (60, 60), colour).save(tmp_path / f"{name}.png")
    Image.new("L", (90, 30)).save(tmp_path / "dark.jpg")
    scene(3).save(tmp_path / "a.png")
    pairs = [("red", "green"), ("red", "a"), ("black", "dark"), ("a", "a")]
    files = [
        tuple(tmp_path / (f"{n}.jpg" if n == "dark" else f"{n}.png") for n in p) for p in pairs
    ]
    listening = Listener()
    result = score_pairs(detector, files, workers=0, reporter=listening)
    assert [pair.match for pair in result.pairs] == [False, False, True, True]
    assert sorted(path.rsplit("/", 1)[1] for path in result.blank) == [
        "black.png", "dark.jpg", "green.png", "red.png"
    ]  # fmt: skip
    assert any("4 image(s) show nothing" in text for text in listening.warnings)


def test_a_match_of_pages_is_told_to_be_worth_little(detector, tmp_path):
    page = Image.new("RGB", (300, 420), "white")
    ImageDraw.Draw(page).text((20, 20), "once upon a time " * 2, fill="black", font_size=20)
    page.save(tmp_path / "a.png")
    page.save(tmp_path / "b.jpg", quality=80)
    listening = Listener()
    pages = [(tmp_path / "a.png", tmp_path / "b.jpg")]
    assert score_pairs(detector, pages, reporter=listening).pairs[0].same_picture
    assert not listening.warnings  # alignment tells that it is the same page
    score_pairs(detector, pages, verify=False, reporter=listening)
    assert any("not fitted on pictures of this kind" in text for text in listening.warnings)
    listening = Listener()
    scene(1).save(tmp_path / "c.png")
    scene(1).save(tmp_path / "d.jpg", quality=90)
    score_pairs(detector, [(tmp_path / "c.png", tmp_path / "d.jpg")], reporter=listening)
    assert not listening.warnings


def test_blank_images_stand_aside_in_audits_and_indexes(tmp_path):
    for name, seeds in (
        ("train", range(12)),
        ("generated", range(10, 14)),
        ("real", range(20, 40)),
    ):
        (tmp_path / name).mkdir()
        for seed in seeds:
            scene(seed, 64).save(tmp_path / name / f"{seed}.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "train" / "page.png")
    for number in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / "generated" / f"blocked{number}.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "generated" / "white.png")
    result = audit(
        tmp_path / "generated", tmp_path / "train", held_out=tmp_path / "real", fpr=0.1,
        detector="phash",
    )  # fmt: skip
    assert [item.path for item in result.generated.blank] == [
        "blocked0.png", "blocked1.png", "white.png",
    ]  # fmt: skip
    assert [(item.path, item.colour) for item in result.training.blank] == [("page.png", "#ffffff")]
    assert not any(
        "blocked" in match.query or match.match == "page.png" for match in result.matches
    )
    assert any("3 generated images showing nothing" in text for text in result.warnings)
    assert any("white.png has its equal among the training" in text for text in result.warnings)
    added = add_to_index(tmp_path / "train", tmp_path / "index", load_detector("phash"))
    assert added.num_images == 12
    answers = query_index(tmp_path / "index", tmp_path / "generated", load_detector("phash"))
    assert not any("blocked" in path for path in answers.matches)


def test_pages_are_audited_one_by_one(run_cli, tmp_path):
    for name, seeds in (("train", range(12)), ("generated", [1]), ("real", range(20, 40))):
        (tmp_path / name).mkdir()
        for seed in seeds:
            scene(seed, 64).save(tmp_path / name / f"{seed}.png")
    pages = [scene(seed, 64) for seed in (50, 5)]
    pages[0].save(tmp_path / "generated" / "p.tif", save_all=True, append_images=pages[1:])
    command = ["audit", tmp_path / "generated", "--against", tmp_path / "train", "--held-out",
               tmp_path / "real", "--fpr", 0.1, "--detector", "phash", "--json"]  # fmt: skip
    first = run_cli(*command, "-o", tmp_path / "first")
    assert "only the first was used" in first.stderr
    run_cli(*command, "-o", tmp_path / "all", "--frames", "all")
    with (tmp_path / "all" / "matches.csv").open() as file:
        best = {row["query"]: row for row in csv.DictReader(file) if row["rank"] == "1"}
    assert best["p.tif#2"]["match"] == "5.png" and best["p.tif#2"]["flagged"] == "true"
    assert set(best) == {"1.png", "p.tif#1", "p.tif#2"}
    shown = run_cli("infer", tmp_path / "train" / "5.png", f"{tmp_path}/generated/p.tif#2")
    assert "MATCH" in shown.stdout


def test_what_c_libraries_write_becomes_events(tmp_path):
    code = (
        "import os, sys\n"
        "from lcmem_cli.cli import render\n"
        'render.configure(quiet=False, debug=False, log_format="json")\n'
        "os.write(2, b'from below\\nand more\\n')\n"
        "sys.stderr.write('from python\\n')\n"
        "os.write(2, b'without an end')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in ran.stderr.splitlines()]
    told = {event["message"] for event in events}
    assert told == {"from below", "and more", "from python", "without an end"}


def test_every_line_of_a_run_on_a_damaged_tiff_is_an_event(server, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 9), np.uint8))
    data = bytearray((tmp_path / "a.tif").read_bytes())
    place = data.index(b"\x03\x01\x03\x00")  # the tag of compression
    data[place + 8] = 3  # a fax page
    (tmp_path / "a.tif").write_bytes(bytes(data))
    ran = server.run("--log-format", "json", "infer", tmp_path / "a.tif", tmp_path / "a.tif")
    assert ran.stderr.strip()
    for line in ran.stderr.splitlines():
        json.loads(line)


def test_missing_extras_are_told_once(run_cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for name in "ab":
        (tmp_path / f"{name}.dcm").write_bytes(bytes(128) + b"DICM")
    refused = run_cli("infer", tmp_path / "a.dcm", tmp_path / "b.dcm", exit_code=1)
    assert refused.stderr.count("pip install 'lcmem[dicom]'") == 1
    assert refused.stderr.count("needs the extra [dicom]") == 2


def test_a_codec_is_found_where_its_files_are(tiny_codec, tmp_path):
    from lcmem_cli.engine.errors import InputError
    from lcmem_cli.engine.models.codec_loading import load_codec

    usual = load_codec(str(tiny_codec))
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tiny_codec, pipeline / "vae")
    (pipeline / "model_index.json").write_text("{}")
    half = tmp_path / "half"
    shutil.copytree(tiny_codec, half)
    weights = half / "diffusion_pytorch_model.safetensors"
    weights.rename(half / "diffusion_pytorch_model.fp16.safetensors")
    for place in (
        pipeline,
        pipeline / "vae" / weights.name,
        half,
        half / "diffusion_pytorch_model.fp16.safetensors",
    ):
        assert load_codec(str(place)).spec.weights_hash == usual.spec.weights_hash
    shutil.copy(pipeline / "vae" / weights.name, pipeline / "vae" / "model.safetensors")
    with pytest.raises(InputError, match=r"expected diffusion_pytorch_model\.safetensors"):
        load_codec(str(pipeline / "vae" / "model.safetensors"))
    with pytest.raises(InputError, match="no diffusers autoencoder there"):
        load_codec(str(tmp_path))
