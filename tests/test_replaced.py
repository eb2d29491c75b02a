"""Files that are replaced while they are read: nothing is kept under another content's name."""

import csv
import os
import shutil
import threading

import numpy as np
import pytest
from conftest import Listener, draw_identity
from PIL import Image

from lcmem_cli import Index, load_detector
from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data import images, loading, reading
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.files import sha256_bytes, sha256_file
from lcmem_cli.engine.store.features import FeatureCaches
from lcmem_cli.engine.store.latents import LatentStore
from lcmem_cli.engine.verification.bank import read_bank

pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def swap_after_reading(monkeypatch, image_folder):
    """Replace one file by another's content as soon as it has been read; return its old content."""
    victim, other = image_folder / "id03" / "1.png", image_folder / "id07" / "2.png"
    before = victim.read_bytes()

    def read_then_swap(path, **options):
        found = read_bytes(path, **options)
        if path == victim:
            victim.write_bytes(other.read_bytes())
        return found

    read_bytes = reading.read_bytes
    monkeypatch.setattr(loading, "read_bytes", read_then_swap)
    return victim, before


def test_an_audit_keeps_what_it_has_read(
    run_cli, image_folder, swap_after_reading, monkeypatch, tmp_path
):
    victim, before = swap_after_reading
    asked = tmp_path / "asked"
    asked.mkdir()
    draw_identity(99, 0).save(asked / "a.png")
    draw_identity(98, 0).save(asked / "b.png")
    with Image.open(victim) as image:
        image.save(asked / "copy.bmp")
    command = (
        "audit", asked, "--against", image_folder, "--fpr", 0.1, "--detector", "phash",
        "--no-verify",
    )  # fmt: skip
    run_cli(*command, "-o", tmp_path / "swapped")
    assert victim.read_bytes() != before
    victim.write_bytes(before)
    monkeypatch.undo()
    for name, cached in (("cached", ()), ("anew", ("--no-cache",))):
        run_cli(*command, *cached, "-o", tmp_path / name)
    swapped, cached, anew = (
        list(csv.DictReader((tmp_path / name / "matches.csv").open()))
        for name in ("swapped", "cached", "anew")
    )
    assert cached == anew
    (copied,) = [row for row in cached if row["query"] == "copy.bmp" and row["rank"] == "1"]
    assert copied["match"].endswith("id03/1.png") and copied["flagged"] == "true"
    assert copied["same_picture"] == "true"
    (copied,) = [row for row in swapped if row["query"] == "copy.bmp" and row["rank"] == "1"]
    assert copied["same_picture"] != "true"  # the file that is there now has not
    scores = [
        [(row["query"], row["match"], row["score"]) for row in rows] for rows in (swapped, anew)
    ]
    assert scores[0] == scores[1]


def test_an_index_keeps_what_it_has_read(run_cli, image_folder, swap_after_reading, tmp_path):
    victim, before = swap_after_reading
    run_cli("index", "build", image_folder, "-o", tmp_path / "index", "--detector", "phash")
    index = Index.open(tmp_path / "index")
    (entry,) = [entry for entry in index.entries if entry.path == str(victim)]
    assert entry.content_hash == sha256_bytes(before) != sha256_file(victim)
    victim.write_bytes(before)
    expected = embed_files(load_detector("phash", device="cpu"), [victim]).features[0]
    np.testing.assert_array_equal(index.features[entry.row], expected)


def test_every_file_is_opened_once(run_cli, image_folder, tiny_codec, monkeypatch, tmp_path):
    opened = []
    paths = sorted(image_folder.rglob("*.png"))
    (image_folder / "id00" / "copy.png").write_bytes(paths[0].read_bytes())

    def open_image(path):
        opened.append(path)
        return inner(path)

    inner = reading.open_image
    monkeypatch.setattr(reading, "open_image", open_image)
    monkeypatch.setattr(images, "open_image", open_image)
    detector = load_detector("phash", device="cpu")
    cache = FeatureCaches(tmp_path / "cache")
    wanted = sorted(image_folder.rglob("*.png"))
    for passes in (len(paths), 0):
        found = embed_files(detector, wanted, Compute(cache=cache, workers=3))
        assert sorted(opened) == wanted and found.encoder_passes == passes
        opened.clear()
    folder = tmp_path / "index"
    for command in (
        ("build", image_folder, "-o", folder, "--detector", "phash"),
        ("add", folder, image_folder),
    ):
        run_cli("index", *command)
        assert sorted(opened) == wanted
        opened.clear()
    run_cli("latents", "--filelist", image_folder, "--codec", tiny_codec, "--size", 16,
            "-o", tmp_path / "latents")  # fmt: skip
    assert sorted(opened) == wanted


def test_files_that_are_swapped_all_the_time(run_cli, image_folder, tiny_codec, tmp_path):
    """Two pictures change places for as long as several commands run."""
    pair = [image_folder / "id00" / "0.png", image_folder / "id05" / "1.png"]
    originals = [path.read_bytes() for path in pair]
    for identity in range(8, 24):
        shutil.rmtree(image_folder / f"id{identity:02d}")
    detector = load_detector("phash", device="cpu")
    copies = [tmp_path / "first.png", tmp_path / "second.png"]
    for copy, data in zip(copies, originals, strict=True):
        copy.write_bytes(data)
    truth = dict(zip(map(sha256_file, copies), embed_files(detector, copies).features, strict=True))
    stop = threading.Event()

    def swap():
        turn = 0
        while not stop.wait(0.0005):  # the commands read between any two swaps
            turn += 1
            for path, data in zip(pair, originals[:: 1 if turn % 2 else -1], strict=True):
                temporary = tmp_path / f"new-{path.parent.name}"
                temporary.write_bytes(data)
                os.replace(temporary, path)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for turn in range(6):
            target = tmp_path / f"index{turn}"
            run_cli(
                "index", "build", image_folder, "-o", target, "--detector", "phash",
                "--max-unreadable", 2,
            )  # fmt: skip
            run_cli(
                "latents", "--filelist", image_folder, "--codec", tiny_codec, "--size", 16,
                "-o", tmp_path / f"latents{turn}",
            )  # fmt: skip
    finally:
        stop.set()
        thread.join()
    latent_of = {}
    for turn in range(6):
        index = Index.open(tmp_path / f"index{turn}")
        for entry in index.entries:
            if entry.content_hash in truth:
                np.testing.assert_array_equal(index.features[entry.row], truth[entry.content_hash])
        store = LatentStore.open(tmp_path / f"latents{turn}")
        for row, content in enumerate(store.contents):
            latent = store.latents([row])
            np.testing.assert_array_equal(latent_of.setdefault(content, latent), latent)


def test_a_file_that_changed_before_its_keypoints_were_sought_is_named(image_folder):
    files = sorted(image_folder.rglob("*.png"))[:3]
    hashes = [sha256_file(path) for path in files]
    files[1].write_bytes(files[2].read_bytes())
    listening = Listener()
    bank = read_bank(files, hashes, Compute(reporter=listening))
    assert [bool(row.any()) for row in bank.rows] == [True, False, True]
    (warning,) = listening.warnings
    assert warning.startswith(f"{files[1]} has changed since it was embedded: no evidence")
