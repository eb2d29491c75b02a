import json

import numpy as np
import pytest
from audit_images import small_network
from conftest import Listener, draw_identity, random_checkpoint

from lcmem_cli import Index, load_detector
from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.detectors import adapted as adapting
from lcmem_cli.engine.errors import (
    CorruptFileError,
    FingerprintMismatchError,
    InputError,
    UnreadableLimitError,
)
from lcmem_cli.engine.evaluation import indexing
from lcmem_cli.engine.evaluation.audit.sets import list_set
from lcmem_cli.engine.evaluation.indexing import add_to_index, query_index
from lcmem_cli.engine.models.checkpoint import save_checkpoint
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.siamese import NetworkSpec
from lcmem_cli.engine.store import index as index_store
from lcmem_cli.engine.store.search import TopK


@pytest.fixture
def detector():
    return load_detector("ncc", input_size=16)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


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
    found = Index.open(tmp_path / "index").search(detector, detector.embed(asked), 1)
    assert found[0][0].path == str(asked)


def test_another_detector_is_refused(image_folder, tmp_path, detector):
    add_to_index(image_folder, tmp_path / "index", detector)
    with pytest.raises(FingerprintMismatchError, match="cannot be compared"):
        add_to_index(image_folder, tmp_path / "index", load_detector("mse", input_size=16))


def test_what_a_killed_addition_left_is_cut_off(image_folder, tmp_path, detector, monkeypatch):
    monkeypatch.setattr(indexing, "IMAGES_PER_SEGMENT", 10)
    add_to_index(image_folder, tmp_path / "once", detector)

    def killed(self, images, hashes, features):
        if len(self) == 30:
            with (self.folder / "features.bin").open("ab") as file:
                file.write(b"half of a row")
            raise KeyboardInterrupt
        return append(self, images, hashes, features)

    append = Index.append
    monkeypatch.setattr(Index, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        add_to_index(image_folder, tmp_path / "killed", detector)
    monkeypatch.setattr(Index, "append", append)
    assert add_to_index(image_folder, tmp_path / "killed", detector).num_known == 30
    assert contents(tmp_path / "killed") == contents(tmp_path / "once")


def test_known_contents_are_not_embedded_again(image_folder, tmp_path, detector):
    add_to_index(image_folder, tmp_path / "index", detector)
    copies = tmp_path / "copies" / "id"
    copies.mkdir(parents=True)
    for number, file in enumerate(sorted(image_folder.rglob("*.png"))[:5]):
        (copies / f"{number}.png").write_bytes(file.read_bytes())
    result = add_to_index(tmp_path / "copies", tmp_path / "index", detector)
    assert (result.num_added, result.encoder_passes, result.num_distinct) == (5, 0, 72)


def test_a_file_that_changed_is_added_with_its_new_content(image_folder, tmp_path, detector):
    add_to_index(image_folder, tmp_path / "index", detector)
    changed = image_folder / "id00" / "0.png"
    draw_identity(99, 0).save(changed)
    listening = Listener()
    result = add_to_index(
        image_folder, tmp_path / "index", detector, compute=Compute(reporter=listening)
    )
    assert (result.num_added, result.num_changed, result.num_known) == (1, 1, 71)
    assert "another content" in listening.warnings[0]
    match = Index.open(tmp_path / "index").search(detector, detector.embed(changed), 1)[0][0]
    assert match.score == pytest.approx(1) and match.row == 72


def test_unreadable_images_are_listed_and_asked_for_again(image_folder, tmp_path, detector):
    broken = image_folder / "id01" / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UnreadableLimitError, match=r"broken\.png"):
        add_to_index(image_folder, tmp_path / "index", detector)
    draw_identity(1, 9).save(broken)
    result = add_to_index(image_folder, tmp_path / "index", detector)
    assert (result.num_added, result.num_known, result.num_changed) == (1, 72, 0)


@pytest.mark.parametrize("place", [3, -3])
def test_damaged_features_are_named(image_folder, tmp_path, detector, place):
    add_to_index(image_folder, tmp_path / "index", detector)
    features = tmp_path / "index" / "features.bin"
    data = bytearray(features.read_bytes())
    data[place] ^= 1
    features.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"features\.bin: .* 00000000\.json"):
        Index.open(tmp_path / "index")
    features.write_bytes(data[:-100])
    with pytest.raises(CorruptFileError, match=r"features\.bin"):
        Index.open(tmp_path / "index")


def test_a_large_index_is_opened_without_reading_all_of_it(tmp_path, detector, monkeypatch):
    monkeypatch.setattr(index_store, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(index_store, "_SAMPLED_BLOCKS", 5)
    index = Index.create(tmp_path, detector="ncc", fingerprint=detector.fingerprint)
    rows = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
    names = [str(number) for number in range(400)]
    index.append([(name, name, name, None) for name in names], names, rows)
    features = tmp_path / "features.bin"
    data = bytearray(features.read_bytes())
    data[50 * 16] ^= 1  # of row 50, which is in none of the five blocks
    features.write_bytes(data)
    opened = Index.open(tmp_path)

    class Answering:
        name, fingerprint = "ncc", detector.fingerprint

        def top_k(self, queries, bank, k):
            return TopK(np.ones((1, 1)), queries[:, :1].astype(np.int64))

    assert opened.search(Answering(), np.array([[7]]), 1)[0][0].path == "7"
    for read in (lambda: opened.search(Answering(), np.array([[51]]), 1), opened.verify):
        with pytest.raises(CorruptFileError, match=r"features\.bin: .* 00000000\.json"):
            read()


def test_index_check_reads_all_of_it(run_cli, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_store, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(index_store, "_SAMPLED_BLOCKS", 5)
    index = tmp_path / "index"
    run_cli("index", "build", image_folder, "-o", index, "--detector", "phash")
    assert json.loads(run_cli("index", "check", index, "--json").stdout)["verified"]
    features = index / "features.bin"
    data = bytearray(features.read_bytes())
    data[len(data) // 3] ^= 1
    features.write_bytes(data)
    run_cli("index", "info", index)
    assert "do not match their checksum" in run_cli("index", "check", index, exit_code=1).stderr


def test_a_missing_or_damaged_segment_is_named(image_folder, tmp_path, detector, monkeypatch):
    monkeypatch.setattr(indexing, "IMAGES_PER_SEGMENT", 30)
    add_to_index(image_folder, tmp_path / "index", detector)
    segments = tmp_path / "index" / "segments"
    whole = (segments / "00000001.json").read_text()
    (segments / "00000001.json").write_text(whole[:-20])
    with pytest.raises(CorruptFileError, match=r"00000001\.json: missing or damaged"):
        Index.open(tmp_path / "index")
    (segments / "00000001.json").unlink()
    with pytest.raises(CorruptFileError, match=r"00000001\.json: missing or damaged"):
        Index.open(tmp_path / "index")


def test_features_of_another_kind_and_an_empty_index_are_refused(tmp_path, detector):
    index = Index.create(tmp_path, detector="ncc", fingerprint=detector.fingerprint)
    with pytest.raises(InputError, match="empty"):
        index.search(detector, np.zeros((1, 4), np.float32), 1)
    index.append([("a", "a", "0", None)], ["0"], np.zeros((1, 4), np.float32))
    with pytest.raises(InputError, match="4 numbers"):
        index.append([("b", "b", "1", None)], ["1"], np.zeros((1, 5), np.float32))


def test_names_need_not_be_text(tmp_path, detector):
    name = b"caf\xe9'\n\".png".decode("utf-8", "surrogateescape")
    index = Index.create(tmp_path, detector="ncc", fingerprint=detector.fingerprint)
    index.append([(name, "a", "0", None)], ["0"], np.zeros((1, 4), np.float32))
    assert Index.open(tmp_path).entries[0].path == name


def test_index_commands(run_cli, image_folder, tmp_path):
    index = tmp_path / "index"
    arguments = ["index", "build", image_folder, "-o", index, "--detector", "phash", "--json"]
    assert json.loads(run_cli(*arguments).stdout)["num_images"] == 72
    assert "known already 72" in run_cli("index", "add", index, image_folder).stdout
    assert "known already 72" in run_cli(*arguments[:-1]).stdout
    part = ("index", "build", image_folder / "id03", "-o", index, "--detector", "phash")
    assert "69 image(s) that are not listed now" in run_cli(*part, exit_code=2).stderr
    assert "phash" in run_cli("index", "info", index).stdout
    asked = image_folder / "id03" / "2.png"
    found = json.loads(run_cli("index", "query", index, asked, "--json").stdout)
    assert found["matches"][str(asked)][0]["path"] == str(asked)
    for other in (tmp_path, asked):
        assert "no index there" in run_cli("index", "info", other, exit_code=2).stderr


def test_an_index_finds_its_detectors_file_from_anywhere(
    run_cli, image_folder, tmp_path, monkeypatch
):
    spec = NetworkSpec(
        backbone="test_resnet", in_channels=3, num_features=8, input_size=32, normalisation="none"
    )
    save_checkpoint(
        tmp_path / "net.safetensors", random_checkpoint(spec, load_codec("none"), image_size=32)
    )
    monkeypatch.chdir(tmp_path)
    detector = ("--detector", "lcmem:net.safetensors")
    run_cli("index", "build", image_folder / "id03", "-o", "index", *detector)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    asked = image_folder / "id03" / "1.png"
    found = json.loads(run_cli("index", "query", "../index", asked, "--json").stdout)
    assert len(found["matches"][str(asked)]) == 3


def test_a_query_with_an_unreadable_image_can_be_made_to_fail(run_cli, image_folder, tmp_path):
    index, asked = tmp_path / "index", tmp_path / "asked"
    run_cli("index", "build", image_folder / "id03", "-o", index, "--detector", "phash")
    asked.mkdir()
    (asked / "a.png").write_bytes((image_folder / "id03" / "0.png").read_bytes())
    (asked / "b.png").write_bytes(b"no image")
    done = run_cli("index", "query", index, asked, "--json")
    assert len(json.loads(done.stdout)["unreadable"]) == 1
    refused = run_cli("index", "query", index, asked, "--max-unreadable", 0, exit_code=1)
    assert "b.png" in refused.stderr
    (tmp_path / "list.csv").write_text("path,id\na.png,1\n")
    listed = ("index", "query", index, tmp_path / "list.csv", "--basedir", asked, "--json")
    assert len(json.loads(run_cli(*listed).stdout)["matches"]) == 1


def test_an_approximate_query_finds_the_image_itself(run_cli, image_folder, tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="needs the extra [search]")
    save_checkpoint(tmp_path / "net.safetensors", small_network())
    network = f"lcmem:{tmp_path / 'net.safetensors'}"
    index, asked = tmp_path / "index", image_folder / "id03" / "2.png"
    run_cli("index", "build", image_folder, "-o", index, "--detector", network)
    found = json.loads(run_cli("index", "query", index, asked, "--approximate", "--json").stdout)
    assert found["matches"][str(asked)][0]["path"] == str(asked)
    assert found["search_recall"] == 1.0
    assert (
        "best match found for 100.0%"
        in run_cli("index", "query", index, asked, "--approximate").stdout
    )
    monkeypatch.setattr(adapting, "ONE_PICTURE", 1.01)  # random weights take all for one picture
    adapted, index = load_detector(f"{network}?adapt={image_folder}"), tmp_path / "adapted"
    add_to_index(image_folder, index, adapted)
    exact, rough = (
        query_index(index, asked, adapted, approximate=approximate) for approximate in (False, True)
    )
    assert rough.matches == exact.matches  # 72 images are one cell of the inverted file


def test_equal_ids_of_two_data_sets_stay_two_identities(image_folder, tmp_path, detector):
    lines = ["path,id,Split,ds_name"]
    for record in load_manifest(image_folder).records:
        lines.append(f"{record.path},7,TRAIN,{'ab'[record.id > 'id05']}")
    filelist = image_folder / "two.csv"
    filelist.write_text("\n".join(lines))
    add_to_index(filelist, tmp_path / "index", detector)
    listed, indexed = (list_set(s, what="training") for s in (filelist, tmp_path / "index"))
    assert [r.identity for r in indexed.records] == [r.identity for r in listed.records]
    assert len({r.identity for r in indexed.records}) == 2
