"""Images in archives, arrays and tables: the same answers as from a folder, and no surprises."""

import gzip
import io
import json
import re
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lcmem_cli import audit
from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.data.sources import access, arrays, base, opened
from lcmem_cli.engine.data.sources.access import GZIP_BITS, Inflated
from lcmem_cli.engine.data.tables import ListColumns
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.errors import ManifestError, UnreadableImageError

COUNT, SIDE = 12, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve drawn images in six subfolders."""
    made = tmp_path_factory.mktemp("sources") / "images"
    for number in range(COUNT):
        file = made / f"p{number // 2}" / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_scene(number, side=SIDE).save(file)
    return made


def files_of(folder):
    return sorted(folder.rglob("*.png"))


def as_zip(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in files_of(folder):
            packed.write(file, file.relative_to(folder))
        packed.writestr("p0/", "")
        packed.writestr("__MACOSX/._x.png", b"x")
        packed.writestr("README", b"no image")
    return path


def as_tar(folder, path):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as packed:
        for file in files_of(folder):
            packed.add(file, f"./{file.relative_to(folder)}")
        link = tarfile.TarInfo("p0/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        packed.addfile(link)
    return path


def pixels_of(folder):
    return np.stack([np.asarray(Image.open(file)) for file in files_of(folder)])


def as_arrays(folder, path):
    pixels, labels = pixels_of(folder), np.arange(COUNT)
    if path.suffix == ".npy":
        np.save(path, pixels)
    elif "packed" in path.name:
        np.savez_compressed(path, pixels, labels)
    elif "float" in path.name:
        np.savez(path, (pixels / 127.5 - 1).astype(np.float32), labels)
    else:
        np.savez(path, pixels, labels)
    return path


def as_table(folder, structured=True, named=True):
    data = [file.read_bytes() for file in files_of(folder)]
    names = [str(file.relative_to(folder)) if named else None for file in files_of(folder)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": b, "path": n} for b, n in zip(data, names, strict=True)]
    column = pa.array(cells, kind) if structured else pa.array(data)
    return pa.table({"label": [str(i) for i in range(COUNT)], "image": column})


def as_parquet(folder, path):
    pq.write_table(as_table(folder, "bytes" not in path.name), path, row_group_size=5)
    return path


def as_dataset(folder, path):
    path.mkdir()
    (path / "state.json").write_text("{}")
    table = as_table(folder, named=False)
    for number, part in enumerate((table.slice(0, 7), table.slice(7))):
        name = path / f"data-{number:05d}-of-00002.arrow"
        with pa.OSFile(str(name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part, max_chunksize=3)
    return path


def as_shards(folder, path):
    files = files_of(folder)
    for number in range(3):
        with tarfile.open(path.parent / f"shard-{number:03d}.tar", "w") as packed:
            for file in files[4 * number : 4 * number + 4]:
                packed.add(file, file.name)
                for suffix, text in ((".json", json.dumps({"patient": file.stem})), (".cls", "3")):
                    info = tarfile.TarInfo(file.stem + suffix)
                    info.size = len(text)
                    packed.addfile(info, io.BytesIO(text.encode()))
    return path


def as_text(folder, path):
    path.write_text("".join(f"{file}\n\n" for file in files_of(folder)))
    return path


FORMS = {
    "images.zip": as_zip,
    "images.tar": as_tar,
    "images.tar.gz": as_tar,
    "samples.npz": as_arrays,
    "packed.npz": as_arrays,
    "float.npz": as_arrays,
    "samples.npy": as_arrays,
    "images.parquet": as_parquet,
    "bytes.parquet": as_parquet,
    "dataset": as_dataset,
    "shard-{000..002}.tar": as_shards,
}


@pytest.fixture(scope="module", params=FORMS)
def form(request, folder, tmp_path_factory):
    """The same images in another form."""
    return FORMS[request.param](folder, tmp_path_factory.mktemp("form") / request.param)


def scores(generated, against, tmp_path=None):
    result = audit(
        generated, against, null="leave-one-out", fpr=0.3, detector="ncc", input_size=16,
        output=tmp_path,
    )  # fmt: skip
    return [round(match.score, 6) for match in result.matches], result


def test_an_audit_of_every_form_gives_the_scores_of_the_folder(folder, form):
    expected, _ = scores(folder, folder)
    found, result = scores(form, form)
    assert sorted(found) == sorted(expected)
    assert all("::" in match.query and "::" in match.match for match in result.matches)
    assert result.generated.num_images == COUNT and not result.generated.unreadable
    mixed, _ = scores(form, folder)
    assert sorted(mixed) == sorted(expected)


def test_pixels_of_every_form_are_those_of_the_files(folder, form):
    expected = [np.asarray(load_image(file)).tobytes() for file in files_of(folder)]
    paths = load_manifest(form, need_split=False).paths()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda path: np.asarray(load_image(path)).tobytes(), paths))
        again = list(pool.map(lambda path: np.asarray(load_image(path)).tobytes(), paths[::-1]))
    assert found == expected and again == expected[::-1]


def test_subfolders_of_an_archive_are_identities(folder, tmp_path):
    for name in ("images.zip", "images.tar.gz"):
        listed = load_manifest(FORMS[name](folder, tmp_path / name), need_split=False)
        assert listed.records[0].path == f"{name}::p0/000.png"
        assert {record.id for record in listed.records} == {f"p{i}" for i in range(6)}
    with pytest.raises(ManifestError, match="--basedir has no effect"):
        load_manifest(tmp_path / "images.zip", basedir=tmp_path)


def test_contents_of_members_are_those_of_the_files(folder, tmp_path):
    detector = load_detector("ncc", device="cpu", input_size=16)
    packed = load_manifest(as_zip(folder, tmp_path / "images.zip"), need_split=False).paths()
    compute = Compute(reporter=Compute().reporter)
    a, b = (embed_files(detector, paths, compute) for paths in (files_of(folder), packed))
    assert list(a.content_hashes) == list(b.content_hashes)


# --- metadata ------------------------------------------------------------------------------------


def test_metadata_give_identities(folder, tmp_path):
    shards = as_shards(folder, tmp_path / "shard-{000..002}.tar")
    listed = load_manifest(
        shards, columns=ListColumns(id="patient", dataset="cls"), need_split=False
    )
    assert listed.records[5].id == "005" and listed.records[5].ds_name == "3"
    for name in ("samples.npz", "images.parquet"):
        form = FORMS[name](folder, tmp_path / name)
        listed = load_manifest(form, columns=ListColumns(id="label"), need_split=False)
        assert [record.id for record in listed.records] == [str(i) for i in range(COUNT)]
    with pytest.raises(ManifestError, match="no 'person' in its metadata, which hold 'patient'"):
        load_manifest(shards, columns=ListColumns(id="person"))
    with pytest.raises(ManifestError, match="--path-column and --sep have no effect"):
        load_manifest(shards, columns=ListColumns(path="x"))


def test_a_text_lists_paths_each_an_identity(folder, tmp_path):
    text = as_text(folder, tmp_path / "list.txt")
    listed = load_manifest(text, basedir=folder, need_split=False)
    assert [record.id for record in listed.records] == [str(file) for file in files_of(folder)]
    expected, _ = scores(folder, folder)
    result = audit(
        text, folder, basedir=folder, null="leave-one-out", fpr=0.3, detector="ncc", input_size=16
    )
    assert sorted(round(match.score, 6) for match in result.matches) == sorted(expected)
    assert result.generated.num_identities is None
    text.write_text("path,id\np0/000.png,7\n")
    assert load_manifest(text, basedir=folder, need_split=False).records[0].id == "7"
    text.write_text("../x.png\np0/nosuch.png\n")
    with pytest.raises(ManifestError, match=r"(?s)leave the base folder.*nosuch"):
        load_manifest(text, basedir=folder)


def test_a_filelist_may_name_members(folder, tmp_path):
    as_zip(folder, tmp_path / "images.zip")
    listed = tmp_path / "list.csv"
    listed.write_text("path,id\nimages.zip::p0/000.png,1\n")
    assert load_image(load_manifest(listed).paths()[0]).size == (SIDE, SIDE)
    listed.write_text("path,id\nimages.zip::p0/nosuch.png,1\n")
    with pytest.raises(ManifestError, match="nosuch"):
        load_manifest(listed)


# --- what is damaged or hostile ------------------------------------------------------------------


HOSTILE = ("../x.png", "/etc/x.png", "a/../../x.png", "C:/x.png", "a\\x.png")


def unreadable(path, message):
    with pytest.raises(UnreadableImageError, match=message):
        load_image(path)


@pytest.mark.parametrize("name", ["images.zip", "images.tar", "images.parquet"])
def test_a_damaged_member_is_listed_and_the_others_are_read(folder, tmp_path, name):
    path = FORMS[name](folder, tmp_path / name)
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT") if name != "images.zip" else content.index(b"p0/001.png") + 60
    content[start + 8 : start + 120] = bytes(112)
    path.write_bytes(content)
    _, result = scores(path, folder)
    assert len(result.generated.unreadable) == 1
    assert result.generated.num_images == COUNT
    assert result.generated.unreadable[0].path.startswith(f"{name}::p0/")


def test_an_archive_cut_short_is_refused_or_its_last_image_unreadable(folder, tmp_path):
    for name in ("images.zip", "images.tar", "images.tar.gz", "images.parquet"):
        path = FORMS[name](folder, tmp_path / name)
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(ManifestError, match=re.escape(str(path))):
            load_manifest(path)
    path = as_arrays(folder, tmp_path / "samples.npy")
    path.write_bytes(path.read_bytes()[:-100])
    unreadable(Path(f"{path}::{COUNT - 1:06d}"), "ends in the middle")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_lead_out_are_refused(tmp_path, name):
    packed = tmp_path / "hostile.zip"
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr(name, b"x")
    with pytest.raises(ManifestError, match="lead out of the archive"):
        load_manifest(packed)
    tarred = tmp_path / "hostile.tar"
    with tarfile.open(tarred, "w") as file:
        file.addfile(tarfile.TarInfo(name))
    with pytest.raises(ManifestError, match="lead out of the archive"):
        load_manifest(tarred)


def test_names_that_stand_twice_are_refused(tmp_path):
    packed = tmp_path / "twice.zip"
    with zipfile.ZipFile(packed, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("a.png", b"x")
        file.writestr("a.png", b"y")
    with tarfile.open(tmp_path / "twice.tar", "w") as file:
        file.addfile(tarfile.TarInfo("a.png"))
        file.addfile(tarfile.TarInfo("./a.png"))
    for path in (packed, tmp_path / "twice.tar"):
        with pytest.raises(ManifestError, match=r"stand for several images: 'a\.png'"):
            load_manifest(path)


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "MAX_MEMBER_BYTES", 1 << 20)
    packed = tmp_path / "bomb.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb.png", bytes(2 << 20))
    unreadable(load_manifest(packed).paths()[0], "2,097,152 bytes, more than the limit")
    tarred = tmp_path / "bomb.tar.gz"
    with tarfile.open(tarred, "w:gz") as file:
        info = tarfile.TarInfo("bomb.png")
        info.size = 2 << 20
        file.addfile(info, io.BytesIO(bytes(2 << 20)))
    unreadable(load_manifest(tarred).paths()[0], "2,097,152 bytes, more than the limit")
    np.save(tmp_path / "bomb.npy", np.zeros((1, 1024, 1024, 3), np.uint8))
    unreadable(load_manifest(tmp_path / "bomb.npy").paths()[0], "more than the limit")


def test_a_header_that_unpacks_to_too_much_is_refused(tmp_path):
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.XHDTYPE, 64 << 20
    (tmp_path / "header.tar.gz").write_bytes(gzip.compress(info.tobuf() + bytes(64 << 20)))
    with pytest.raises(ManifestError, match="a header of"):
        load_manifest(tmp_path / "header.tar.gz")


def test_arrays_that_would_run_code_or_are_no_images_are_refused(tmp_path):
    cases = {
        "objects": (np.array([{}], object), "Python objects"),
        "flat": (np.zeros((4, 4), np.uint8), r"expected one array of images"),
        "first": (np.zeros((4, 3, 8, 8), np.uint8), "1, 3 or 4 channels"),
        "ints": (np.zeros((4, 8, 8, 3), np.int64), "values of int64"),
        "wide": (np.full((4, 8, 8, 3), 200.0), "values from 200 to 200"),
    }
    for name, (array, message) in cases.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ManifestError, match=message):
            load_manifest(tmp_path / f"{name}.npy")


def test_floating_point_is_rounded_to_the_nearest():
    values = np.array([[[-1.0, 0.0, 1.0]]])
    assert arrays.to_bytes(values, (-1.0, 1.0)).tolist() == [[[0, 128, 255]]]
    assert arrays.to_bytes(values, (0.0, 1.0)).tolist() == [[[0, 0, 255]]]


def test_a_row_that_is_only_a_path_is_not_followed(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": None, "path": "/etc/hostname"}], kind)
    pq.write_table(pa.table({"image": cells}), tmp_path / "paths.parquet")
    unreadable(load_manifest(tmp_path / "paths.parquet").paths()[0], "no image, only the path")


def test_archives_of_other_kinds_and_missing_shards_are_named(tmp_path):
    (tmp_path / "images.7z").write_bytes(b"7z")
    with pytest.raises(ManifestError, match="this kind of archive is not read"):
        load_manifest(tmp_path / "images.7z")
    (tmp_path / "s-0.tar").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"2 of 3 files are missing, the first is .*s-1\.tar"):
        load_manifest(tmp_path / "s-{0..2}.tar")
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as file:
        file.writestr("a.png", b"x")
    content = bytearray((tmp_path / "e.zip").read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "e.zip").write_bytes(content)
    with pytest.raises(ManifestError, match="is encrypted"):
        load_manifest(tmp_path / "e.zip")


# --- reading in place ----------------------------------------------------------------------------


def test_a_compressed_stream_is_read_at_any_place(tmp_path, monkeypatch):
    monkeypatch.setattr(access, "_FIRST_SPACING", 1 << 17)
    monkeypatch.setattr(access, "_MOST_POINTS", 4)
    content = np.random.default_rng(0).integers(0, 16, 3 << 20, np.uint8).tobytes()
    path = tmp_path / "x.gz"
    half = len(content) // 2
    path.write_bytes(gzip.compress(content[:half], 1) + gzip.compress(content[half:], 1))
    stream = Inflated(path, GZIP_BITS)

    def read(place):
        return stream.read_at(place, 5000)

    places = np.random.default_rng(1).integers(0, len(content) - 5000, 40).tolist()
    with ThreadPoolExecutor(4) as pool:
        for place, found in zip(places, pool.map(read, places), strict=True):
            assert found == content[place : place + 5000]
    assert stream.read_at(len(content) - 10, 100) == content[-10:]
    assert len(stream._places) <= 5


def test_an_archive_that_changes_is_read_anew(folder, tmp_path):
    path = as_zip(folder, tmp_path / "images.zip")
    assert len(load_manifest(path)) == COUNT
    with zipfile.ZipFile(path, "a") as packed:
        packed.write(files_of(folder)[0], "more.png")
    assert len(load_manifest(path)) == COUNT + 1


def test_images_in_memory_are_a_source_like_the_others(folder):
    class Pictures:
        names = ("a", "b")

        def read(self, name):
            return arrays.encoded(np.asarray(draw_scene(self.names.index(name), side=SIDE)))

        def metadata(self, name):
            return {"person": name.upper()}

    place = opened.mount("pictures", Pictures())
    other = opened.mount("pictures", Pictures())
    assert place != other
    try:
        listed = load_manifest(place, columns=ListColumns(id="person"), need_split=False)
        assert [record.id for record in listed.records] == ["A", "B"]
        _, result = scores(place, folder)
        best = {match.query: match.match for match in result.matches if match.rank == 1}
        assert best == {"pictures::a": "p0/000.png", "pictures::b": "p0/001.png"}
    finally:
        opened.unmount(place)
        opened.unmount(other)
    unreadable(Path(f"{place}::a"), "no such file")


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture
def generated(tmp_path):
    """A zip of images that are not those of the folder."""
    for number in range(COUNT):
        file = tmp_path / "others" / "p0" / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_scene(100 + number, side=SIDE).save(file)
    return as_zip(tmp_path / "others", tmp_path / "images.zip")


def test_members_that_are_kept_are_copied(run_cli, folder, generated, tmp_path):
    out = tmp_path / "out"
    run_cli("audit", generated, "--against", folder, "--fpr", "0.3", "--detector", "ncc",
            "--input-size", "16", "-o", out / "audit")  # fmt: skip
    keep = ("filter", out / "audit", "--reject-over", "2")
    kept = run_cli(*keep, "-o", out / "kept", "--copy", "--json")
    assert json.loads(kept.stdout)["num_kept"] == COUNT
    copied = out / "kept" / "kept" / "images.zip" / "p0" / "000.png"
    assert copied.read_bytes() == (tmp_path / "others" / "p0" / "000.png").read_bytes()
    run_cli(*keep, "-o", out / "kept", "--copy")
    copied.write_bytes(b"other")
    refused = run_cli(*keep, "-o", out / "kept", "--copy", exit_code=2)
    assert "something else is here already" in refused.stderr
    linked = run_cli(*keep, "-o", out / "links", "--link", exit_code=2)
    assert "no files of their own; use --copy" in linked.stderr


def test_commands_take_archives_and_their_members(run_cli, folder, tmp_path):
    packed = as_zip(folder, tmp_path / "images.zip")
    out = tmp_path / "out"
    run_cli("audit", packed, "--against", folder, "--fpr", "0.3", "--detector", "ncc",
            "--input-size", "16", "-o", out / "audit")  # fmt: skip
    page = (out / "audit" / "report.html").read_text()
    assert "images.zip::p0/000.png" in page and "data:image" in page
    pair = run_cli("infer", f"{packed}::p0/000.png", folder / "p0" / "000.png", "--detector", "ncc",
                   "--save", out / "pair.png", "--json")  # fmt: skip
    assert json.loads(pair.stdout)
    missing = run_cli("infer", f"{packed}::nosuch.png", folder / "p0" / "000.png", exit_code=2)
    assert "no such file" in missing.stderr
    run_cli("index", "build", packed, "--detector", "ncc", "-o", out / "index")
    asked = run_cli(
        "index", "query", out / "index", f"{packed}::p3/007.png", "--no-verify", "--json"
    )
    matches = next(iter(json.loads(asked.stdout)["matches"].values()))
    assert matches[0]["path"].endswith("images.zip::p3/007.png")
    run_cli("manifest", packed, "-o", out / "list.csv")
    assert len(load_manifest(out / "list.csv", basedir=tmp_path)) == COUNT


def test_verification_reads_members(run_cli, folder, tmp_path):
    packed = as_zip(folder, tmp_path / "images.zip")
    shown = run_cli("audit", packed, "--against", packed, "--fpr", "0.3", "--verify", "--no-adapt",
                    "-o", tmp_path / "audit", "--json")  # fmt: skip
    assert json.loads(shown.stdout)["verified"]
