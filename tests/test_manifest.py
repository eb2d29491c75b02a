"""Filelists: what is read, what is refused and with which words, and the split by identity."""

import collections
import gzip
import importlib
import os
import pkgutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Listener
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lcmem_cli import cli
from lcmem_cli.cli.options import Options, TableOptions
from lcmem_cli.engine.data import tables
from lcmem_cli.engine.data.filelist import make_filelist
from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.data.manifest import (
    Manifest,
    Record,
    load_manifest,
    split_by_identity,
    write_manifest,
)
from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.data.tables import ListColumns
from lcmem_cli.engine.errors import InputError, ManifestError, UnreadableImageError


@pytest.fixture
def images(tmp_path):
    for name in ("a", "b", "c", "d"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder, text, name="list.csv"):
    path = folder / name
    path.write_text(text)
    return path


def test_columns_in_any_order_and_case_others_ignored(images):
    path = write(images, "Note,ID,PATH,split,ds_name\nx,1,a.png,train,s\ny,2,b.png,Test,s\n")
    manifest = load_manifest(path)
    assert manifest.records == (
        Record("a.png", "1", "TRAIN", "s"),
        Record("b.png", "2", "TEST", "s"),
    )
    assert manifest.paths() == [images / "a.png", images / "b.png"]
    assert manifest.ds_names == ("s",)


def test_csv_and_parquet_hold_the_same(images):
    first = load_manifest(write(images, "path,id\na.png,1\nb.png,1\nc.png,2\nd.png,3\n"))
    for name in ("copy.parquet", "copy.csv"):
        write_manifest(first, images / name)
        assert load_manifest(images / name).records == first.records


PROBLEMS = {
    "path,person\na.png,1\n": "no column 'id' in the first line",
    "path;id\na.png;1\n": "separated by ';'",
    "path,id,Splt\na.png,1,TRAIN\n": "'splt' is not known|'Splt' is not known; did you mean",
    "path,id\n": "no images, only a header",
    "path,id\na.png\n": "another number of cells than the header's 2",
    "path,id\na.png,\n": r"1 empty cell\(s\) in column 'id'",
    "path,id,Split\na.png,1,TRIAN\n": "unknown Split 'TRIAN'.*did you mean 'TRAIN'",
    "path,id\na.png,1\na.png,2\n": "1 duplicate path",
    "path,id,Split\na.png,1,TRAIN\nb.png,1,TEST\n": "1 id.* in (two|more than one) split",
    "path,id\na.png,1\nzz.png,2\nyy.png,3\n": "2 .*zz.png",
    "path,id\na.png,1\n../secret.png,2\n": "outside|leave",
    'path,id\n"a.png,1\n': "not valid CSV",
}


@pytest.mark.parametrize("text", PROBLEMS)
def test_a_bad_list_is_refused_with_its_problem(run_cli, images, text):
    path = write(images, text)
    with pytest.raises(ManifestError, match=PROBLEMS[text]) as caught:
        load_manifest(path)
    assert str(path) in str(caught.value)
    refused = run_cli("manifest", path, "-o", images / "out.csv", exit_code=2)
    assert "Traceback" not in refused.stderr
    assert not (images / "out.csv").exists()


def test_every_problem_is_reported_at_once(images):
    path = write(
        images, "path,id,Split\na.png,1,TRAIN\na.png,1,TEST\nmissing.png,2,TRAIN\n../x.png,3,VALL\n"
    )
    with pytest.raises(ManifestError) as caught:
        load_manifest(path)
    text = str(caught.value)
    for part in ("a.png", "missing.png", "../x.png", "VALL"):
        assert part in text


def test_names_that_leave_the_base_folder_through_a_link_are_refused(images):
    outside = images.parent / f"{images.name}-outside"
    outside.mkdir()
    Image.new("RGB", (4, 4)).save(outside / "x.png")
    path = write(images, f"path,id\na.png,1\n{outside / 'x.png'},2\n")
    with pytest.raises(ManifestError, match=r"x\.png"):
        load_manifest(path)
    inside = write(images, f"path,id\n{images / 'a.png'},1\nb.png,2\n")
    assert load_manifest(inside).paths()[0] == images / "a.png"


def test_a_missing_list_names_the_nearest_folder(run_cli, images):
    refused = run_cli("manifest", images / "no" / "where", "-o", images / "o.csv", exit_code=2)
    assert "no such folder" in refused.stderr and str(images) in refused.stderr
    (images / "filelist.csv").write_text("path,id\na.png,1\n")
    with pytest.raises(ManifestError, match=r"did you mean 'filelist\.csv'"):
        load_manifest(images / "filelst.csv")


def test_folders_an_identity_each_and_loose_images(images):
    (images / "p1" / "deep").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(images / "p1" / "x.jpg")
    Image.new("RGB", (4, 4)).save(images / "p1" / "deep" / "y.png")
    (images / ".hidden").mkdir()
    Image.new("RGB", (4, 4)).save(images / ".hidden" / "z.png")
    (images / "notes.txt").write_text("no image")
    found = {r.path: r.id for r in load_manifest(images, need_split=False).records}
    assert found == {
        "a.png": "a.png", "b.png": "b.png", "c.png": "c.png", "d.png": "d.png",
        "p1/x.jpg": "p1", "p1/deep/y.png": "p1",
    }  # fmt: skip
    empty = images / "empty"
    empty.mkdir()
    with pytest.raises(ManifestError, match="no images"):
        load_manifest(empty)
    with pytest.raises(ManifestError, match="--basedir has no effect"):
        load_manifest(images, basedir=images)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_images_without_a_suffix_are_listed(tmp_path, kind):
    Image.new("RGB", (4, 4)).save(tmp_path / "sample", format=kind)
    (tmp_path / "LICENSE").write_text("none")
    assert [record.path for record in load_manifest(tmp_path).records] == ["sample"]


def test_dicom_files_without_a_suffix_are_listed(tmp_path):
    mark = bytes(128) + b"DICM"
    for name, content in {
        "a/IM0001": mark, "a/1.2.840.113619.2": mark, "a/README": b"no image", "a/notes.txt": mark,
        "b/1.dcm": b"", "a/empty.7": b"", "DICOMDIR": mark, "a/dicomdir": mark,
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "a" / "pipe")
    found = load_manifest(tmp_path).records
    assert [record.path for record in found] == [
        "a/1.2.840.113619.2", "a/IM0001", "a/notes.txt", "b/1.dcm"
    ]  # fmt: skip


def test_a_format_without_its_library_is_listed_and_named(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"\0\0\0\x18ftypheic")
    assert [record.path for record in load_manifest(tmp_path).records] == ["a.png", "b.jpg"]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnreadableImageError, match=r"HEIC needs the extra \[formats\]"):
        load_image(tmp_path / "b.jpg")


def test_select_and_its_errors(images):
    manifest = load_manifest(
        write(images, "path,id,Split,ds_name\na.png,1,TRAIN,s\nb.png,2,TEST,t\n")
    )
    assert [r.path for r in manifest.select("TEST").records] == ["b.png"]
    assert [r.path for r in manifest.select(ds_names=["s"]).records] == ["a.png"]
    with pytest.raises(InputError, match="did you mean 'TEST'"):
        manifest.select("TSET")
    with pytest.raises(InputError, match="no data set 'u'"):
        manifest.select(ds_names=["u"])


def test_the_command_writes_a_split_that_reads_back(run_cli, image_folder, tmp_path):
    run_cli("manifest", image_folder, "-o", image_folder / "list.csv", "--seed", 3)
    manifest = load_manifest(image_folder / "list.csv")
    assert len(manifest) == 72
    again = split_by_identity(load_manifest(image_folder, need_split=False).records, seed=3)
    assert {r.path: r.split for r in manifest.records} == {r.path: r.split for r in again}
    kept = ("manifest", image_folder / "list.csv", "-o", image_folder / "kept.csv", "--seed", 4)
    assert "has a split already, which is kept" in run_cli(*kept).stdout
    assert load_manifest(image_folder / "kept.csv").records == manifest.records
    refused = run_cli(*kept, "--id-regex", "id", exit_code=2)
    assert "has a split, made for the ids that it lists" in refused.stderr


def test_ids_are_found_in_file_names(tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for patient in range(8):
        for image in range(3):
            (flat / f"p{patient:02d}_{image}.png").write_bytes(b"")
    listening = Listener()
    plain = make_filelist(flat, tmp_path / "plain.csv", reporter=listening)
    assert sum(size.identities for size in plain.splits.values()) == 24
    assert "every image counts as an identity of its own" in listening.warnings[0]
    listening = Listener()
    for regex in ("^(p[0-9]+)_", "^p[0-9]+", "^(p0[0-3])_|^(p0[4-7])_"):
        found = make_filelist(flat, tmp_path / "list.csv", id_regex=regex, reporter=listening)
        assert sum(size.identities for size in found.splits.values()) == 8
        records = load_manifest(tmp_path / "list.csv", basedir=flat).records
        assert {record.id for record in records} == {f"p{number:02d}" for number in range(8)}
        assert len({(record.id, record.split) for record in records}) == 8
    assert not listening.warnings
    for regex, words in (
        ("(", "no regular"),
        ("x", "finds no id in 'p0"),
        ("p(x)?", "finds no id"),
    ):
        with pytest.raises(InputError, match=words):
            make_filelist(flat, tmp_path / "no.csv", id_regex=regex)
    assert not (tmp_path / "no.csv").exists()


def test_subfolders_of_one_image_each_are_identities(tmp_path):
    for number in range(8):
        (tmp_path / "images" / f"p{number}").mkdir(parents=True)
        (tmp_path / "images" / f"p{number}" / "x.png").write_bytes(b"")
    listening = Listener()
    make_filelist(tmp_path / "images", tmp_path / "list.csv", reporter=listening)
    assert not listening.warnings


def test_splits_that_stay_empty_are_warned_of(tmp_path):
    for number in range(2):
        (tmp_path / "images" / "one").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "one" / f"{number}.png").write_bytes(b"")
    listening = Listener()
    make_filelist(tmp_path / "images", tmp_path / "list.csv", reporter=listening)
    assert listening.warnings == ["no image in VAL and TEST: too few identities to split"]


identities = st.lists(
    st.tuples(st.sampled_from(["s", "t"]), st.integers(0, 12), st.integers(1, 3)),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(identities, st.integers(0, 1000))
def test_splits_are_disjoint_complete_and_do_not_depend_on_the_order(groups, seed):
    records = [
        Record(f"{s}/{i}/{n}/{k}", str(i), None, s)
        for n, (s, i, count) in enumerate(groups)
        for k in range(count)
    ]
    first = split_by_identity(records, seed=seed)
    splits = collections.defaultdict(set)
    for record in first:
        splits[record.identity].add(record.split)
    assert all(len(found) == 1 and None not in found for found in splits.values())
    backwards = split_by_identity(records[::-1], seed=seed)
    assert {r.path: r.split for r in first} == {r.path: r.split for r in backwards}


def test_the_digest_is_of_the_rows(images):
    rows = (Record("a.png", "1"), Record("b.png", "2"))
    digest = Manifest(rows, images, images).digest
    assert Manifest(rows, images / "x", images / "y").digest == digest
    assert Manifest(rows[::-1], images, images).digest != digest


def test_a_small_parquet_file_cannot_unpack_to_more_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_BYTES", 1_000_000)
    table = pa.table({"path": ["x" * 10_000 + ".png"] * 1000, "id": ["a"] * 1000})
    pq.write_table(table, tmp_path / "list.parquet")
    assert (tmp_path / "list.parquet").stat().st_size < 50_000
    with pytest.raises(ManifestError, match=r"10,0.* bytes unpacked"):
        load_manifest(tmp_path / "list.parquet", need_split=False)


NAMED = ListColumns(path="Image Index", id="Patient ID", split="fold", dataset="from", sep=";")


def test_columns_are_taken_under_the_names_that_are_given(images):
    text = "Image Index;id;Patient ID;fold;from\na.png;x;1;valid;s\nb.png;y;2;Testing;s\n"
    manifest = load_manifest(write(images, text), columns=NAMED)
    assert manifest.records == (Record("a.png", "1", "VAL", "s"), Record("b.png", "2", "TEST", "s"))
    path = write(images, "file\tPatient\na.png\t1\nb.png\t2\n", "list.tsv")
    for sep in (None, "tab"):
        columns = ListColumns(path="file", id="file", sep=sep)
        assert [r.id for r in load_manifest(path, columns=columns).records] == ["a.png", "b.png"]


def test_columns_of_parquet_and_of_packed_csv(images):
    table = pa.table({"file": ["a.png"], "person": [7]})
    pq.write_table(table, images / "list.parquet")
    (images / "list.csv.gz").write_bytes(gzip.compress(b"file,person\na.png,7\n"))
    for name in ("list.parquet", "list.csv.gz"):
        columns = ListColumns(path="file", id="person")
        assert load_manifest(images / name, columns=columns, need_split=False).records == (
            Record("a.png", "7"),
        )
    with pytest.raises(ManifestError, match="--sep has no effect on a Parquet file"):
        load_manifest(images / "list.parquet", columns=ListColumns(path="file", sep=";"))
    (images / "list.csv.gz").write_bytes(gzip.compress(b"file,person\na.png,7\n" * 9)[:-9])
    with pytest.raises(ManifestError, match="cannot be read"):
        load_manifest(images / "list.csv.gz")


def test_a_packed_list_that_unpacks_to_too_much_is_refused(images, monkeypatch):
    monkeypatch.setattr(tables, "MAX_BYTES", 3000)
    path = images / "list.csv.gz"
    path.write_bytes(gzip.compress(b"path,id\n" + b"a.png,1\n" * 1000))
    with pytest.raises(ManifestError, match="more than the limit of 3,000"):
        load_manifest(path)
    path.write_bytes(gzip.compress(b"a" * (2 << 20), 9))
    with pytest.raises(ManifestError, match="a line of"):
        load_manifest(path)


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("Image Index,id\na.png,1\n", ListColumns(), "'path'.*; name the one .* --path-column"),
        ("path,id\na.png,1\n", ListColumns(id="Patient"), "no column 'Patient' in the first line"),
        ("path,id\na.png,1\n", ListColumns(split="fold"), "no column 'fold'"),
        ("path,id\na.png,1\n", ListColumns(sep=";"), "separated by ','; expected ';'"),
        ("path,dx\na.png,1\n", ListColumns(), r"1 problem\(s\)"),
    ],
)
def test_a_column_that_is_not_there_is_named(images, text, columns, message):
    with pytest.raises(ManifestError, match=message):
        load_manifest(write(images, text), columns=columns)


def test_columns_have_no_effect_without_a_list(run_cli, images, tmp_path):
    with pytest.raises(ManifestError, match="is a folder, which has no columns"):
        load_manifest(images, columns=NAMED)
    with pytest.raises(InputError, match="--sep must be one character"):
        ListColumns(sep=";;")
    refused = run_cli(
        "audit", images, "--against", images, "--id-column", "x", "-o", tmp_path / "a", exit_code=2
    )
    assert "--path-column and the like has no effect: none of the sets" in refused.stderr


def test_every_command_with_a_list_takes_its_columns():
    names = [module.name for module in pkgutil.iter_modules(cli.__path__, "lcmem_cli.cli.")]
    kinds = {
        kind
        for name in names
        for kind in vars(importlib.import_module(name)).values()
        if isinstance(kind, type) and issubclass(kind, Options) and hasattr(kind, "basedir")
    }
    assert len(kinds) > 10 and all(issubclass(kind, TableOptions) for kind in kinds)


def test_commands_read_lists_with_columns_of_their_own(run_cli, tmp_path):
    rows = ["file;person;fold"]
    for number in range(18):
        name = f"{number}.png"
        draw_scene(number // 2, side=32).save(tmp_path / name)
        rows.append(f"{name};p{number // 2};{('train', 'valid', 'test')[number // 6]}")
    listed = write(tmp_path, "\n".join(rows) + "\n")
    given = (
        "--path-column", "file", "--id-column", "person", "--split-column", "fold", "--sep", ";",
    )  # fmt: skip
    out = tmp_path / "out"
    run_cli("check", "--filelist", listed, *given)
    run_cli("audit", listed, "--against", listed, "--null", "leave-one-out", "--fpr", "0.3",
            "--detector", "ncc", "--input-size", "16", *given, "-o", out / "audit")  # fmt: skip
    run_cli("index", "build", listed, "--detector", "ncc", *given, "-o", out / "index")
    run_cli("index", "query", out / "index", listed, *given)
    run_cli("benchmark", "--filelist", listed, "--detectors", "mse", *given, "-o", out / "bench")
    run_cli("robustness", "--filelist", listed, "--detectors", "mse", "--fit-rate", "0.5", *given,
            "-o", out / "robust")  # fmt: skip
    run_cli("latents", "--filelist", listed, "--codec", "embedded", "--size", "32", *given,
            "-o", out / "latents")  # fmt: skip
    run_cli("manifest", listed, *given, "-o", out / "list.csv")
    assert load_manifest(out / "list.csv", basedir=tmp_path).records[6] == Record(
        "6.png", "p3", "VAL"
    )
