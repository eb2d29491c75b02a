"""Files that are replaced while they are read: nothing is kept under another content's name."""

import os
import threading

import numpy as np
import pytest
from conftest import draw_identity
from PIL import Image

from lcmem_cli import Index, load_detector
from lcmem_cli.engine.data import loading
from lcmem_cli.engine.detectors import embedding
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.evaluation import indexing
from lcmem_cli.engine.files import sha256_file
from lcmem_cli.engine.store.latents import LatentStore

pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def swap_after_hashing(monkeypatch, image_folder):
    """Replace the content of one file by another's as soon as all files have been hashed."""
    victim, other = image_folder / "id03" / "1.png", image_folder / "id07" / "2.png"

    def hash_then_swap(paths, compute=loading.DEFAULT_COMPUTE):
        found = hash_files(paths, compute)
        if victim in paths:
            victim.write_bytes(other.read_bytes())
        return found

    hash_files = loading.hash_files
    monkeypatch.setattr(embedding, "hash_files", hash_then_swap)
    monkeypatch.setattr(indexing, "hash_files", hash_then_swap)
    return victim


def test_an_audit_names_the_file_and_leaves_the_cache_as_good_as_none(
    run_cli, image_folder, swap_after_hashing, monkeypatch, tmp_path
):
    victim, before = swap_after_hashing, swap_after_hashing.read_bytes()
    asked = tmp_path / "asked"
    asked.mkdir()
    draw_identity(99, 0).save(asked / "a.png")
    draw_identity(98, 0).save(asked / "b.png")
    with Image.open(victim) as image:
        image.save(asked / "copy.bmp")
    command = ("audit", asked, "--against", image_folder, "--fpr", 0.1, "--detector", "phash")
    refused = run_cli(*command, "-o", tmp_path / "o", "--max-unreadable", 0, exit_code=1)
    assert f"{victim.parent.name}/{victim.name}" in refused.stderr
    assert "has changed while it was read" in refused.stderr
    victim.write_bytes(before)
    monkeypatch.undo()
    for name, cached in (("cached", ()), ("anew", ("--no-cache",))):
        run_cli(*command, *cached, "-o", tmp_path / name)
    matches = [(tmp_path / name / "matches.csv").read_bytes() for name in ("cached", "anew")]
    assert matches[0] == matches[1] and b"copy.bmp" in matches[0]


def test_an_index_holds_no_row_of_another_content(
    run_cli, image_folder, swap_after_hashing, tmp_path
):
    victim, before = swap_after_hashing, swap_after_hashing.read_bytes()
    command = ("index", "build", image_folder, "-o", tmp_path / "index", "--detector", "phash")
    refused = run_cli(*command, exit_code=1)
    assert "has changed while it was read" in refused.stderr and victim.name in refused.stderr
    index = Index.open(tmp_path / "index")
    assert len(index) == 71 and str(victim) not in {entry.path for entry in index.entries}
    victim.write_bytes(before)


def test_files_that_are_swapped_all_the_time(run_cli, image_folder, tiny_codec, tmp_path):
    """Two pictures change places for as long as several commands run."""
    pair = [image_folder / "id00" / "0.png", image_folder / "id05" / "1.png"]
    originals = [path.read_bytes() for path in pair]
    detector = load_detector("phash", device="cpu")
    copies = [tmp_path / "first.png", tmp_path / "second.png"]
    for copy, data in zip(copies, originals, strict=True):
        copy.write_bytes(data)
    truth = dict(zip(map(sha256_file, copies), embed_files(detector, copies).features, strict=True))
    stop = threading.Event()

    def swap():
        turn = 0
        while not stop.is_set():
            turn += 1
            for path, data in zip(pair, originals[:: 1 if turn % 2 else -1], strict=True):
                temporary = tmp_path / f"new-{path.parent.name}"
                temporary.write_bytes(data)
                os.replace(temporary, path)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for turn in range(10):
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
    for turn in range(10):
        index = Index.open(tmp_path / f"index{turn}")
        for entry in index.entries:
            if entry.content_hash in truth:
                np.testing.assert_array_equal(index.features[entry.row], truth[entry.content_hash])
        store = LatentStore.open(tmp_path / f"latents{turn}")
        for row, content in enumerate(store.contents):
            latent = store.latents([row])
            np.testing.assert_array_equal(latent_of.setdefault(content, latent), latent)
