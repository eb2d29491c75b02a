import json

import numpy as np
import pytest

from lcmem_cli import Index, load_detector
from lcmem_cli.engine.errors import CorruptFileError, FingerprintMismatchError
from lcmem_cli.engine.evaluation import indexing
from lcmem_cli.engine.evaluation.indexing import add_to_index, query_index


@pytest.fixture
def detector():
    return load_detector("ncc", input_size=16)


def test_adding_in_two_steps_equals_building_at_once(image_folder, tmp_path, detector, monkeypatch):
    monkeypatch.setattr(indexing, "IMAGES_PER_SEGMENT", 10)
    add_to_index(image_folder, tmp_path / "once", detector)
    later = tmp_path / "later"
    later.mkdir()
    moved = sorted(image_folder.iterdir())[12:]
    for folder in moved:
        folder.rename(later / folder.name)
    first = add_to_index(image_folder, tmp_path / "twice", detector)
    for folder in moved:
        (later / folder.name).rename(image_folder / folder.name)
    second = add_to_index(image_folder, tmp_path / "twice", detector)
    assert (first.num_added, second.num_added, second.num_known) == (36, 36, 36)
    once, twice = Index.open(tmp_path / "once"), Index.open(tmp_path / "twice")
    assert once.entries == twice.entries
    np.testing.assert_array_equal(once.features, twice.features)
    assert add_to_index(image_folder, tmp_path / "once", detector).encoder_passes == 0


def test_equal_images_share_a_row_and_a_query_finds_itself(image_folder, tmp_path, detector):
    copy = image_folder / "id00" / "copy.png"
    copy.write_bytes((image_folder / "id00" / "0.png").read_bytes())
    result = add_to_index(image_folder, tmp_path / "index", detector)
    assert (result.num_images, result.num_distinct) == (73, 72)
    asked = image_folder / "id07" / "1.png"
    best = query_index(tmp_path / "index", asked, detector, top_k=3).matches[str(asked)]
    assert best[0].path == str(asked) and best[0].score == pytest.approx(1)
    assert best[1].id == "id07" and best[0].score >= best[1].score >= best[2].score
    assert Index.open(tmp_path / "index").best_match(detector, asked).path == str(asked)


def test_another_detector_is_refused(image_folder, tmp_path, detector):
    add_to_index(image_folder, tmp_path / "index", detector)
    with pytest.raises(FingerprintMismatchError, match="cannot be compared"):
        add_to_index(image_folder, tmp_path / "index", load_detector("mse", input_size=16))


def test_a_damaged_segment_is_named(image_folder, tmp_path, detector):
    add_to_index(image_folder, tmp_path / "index", detector)
    segment = next((tmp_path / "index" / "segments").glob("*.npy"))
    data = bytearray(segment.read_bytes())
    data[-3] ^= 1
    segment.write_bytes(data)
    with pytest.raises(CorruptFileError, match=segment.name):
        Index.open(tmp_path / "index")


def test_index_commands(run_cli, image_folder, tmp_path):
    index = tmp_path / "index"
    arguments = ["index", "build", image_folder, "-o", index, "--detector", "phash", "--json"]
    assert json.loads(run_cli(*arguments).stdout)["num_images"] == 72
    assert "known already 72" in run_cli("index", "add", index, image_folder).stdout
    assert "phash" in run_cli("index", "info", index).stdout
    asked = image_folder / "id03" / "2.png"
    found = json.loads(run_cli("index", "query", index, asked, "--json").stdout)
    assert found["matches"][str(asked)][0]["path"] == str(asked)
    assert "no index there" in run_cli("index", "info", tmp_path, exit_code=2).stderr
