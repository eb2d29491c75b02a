import csv
import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath

import pytest
from audit_images import SmallCorrelation, save_all
from typer.testing import CliRunner

from lcmem_cli.cli.app import app
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.errors import CorruptFileError, InputError, LcmemError
from lcmem_cli.engine.evaluation.audit.files import read_settings
from lcmem_cli.engine.evaluation.audit.filter import filter_audit, target_names
from lcmem_cli.engine.evaluation.audit.run import audit
from lcmem_cli.engine.files import LOCK_NAME

ODD_NAME = os.fsdecode(b'odd\n,"\xff.png')


@pytest.fixture
def audited(tmp_path):
    """Six generated images in two subfolders: two exact copies, one unreadable beside them."""
    save_all(tmp_path / "train", range(20))
    save_all(tmp_path / "held-out", range(1000, 1040))
    save_all(tmp_path / "generated" / "a", range(2000, 2002))
    save_all(tmp_path / "generated" / "b", range(2002, 2004))
    shutil.copy(tmp_path / "train" / "00001.png", tmp_path / "generated" / "b" / "copy.png")
    shutil.copy(tmp_path / "train" / "00002.png", tmp_path / "generated" / "b" / ODD_NAME)
    (tmp_path / "generated" / "broken.png").write_bytes(b"nothing")
    audit(
        tmp_path / "generated",
        tmp_path / "train",
        held_out=tmp_path / "held-out",
        fpr=0.025,
        detector=SmallCorrelation(),
        sensitivity=0,
        output=tmp_path / "audit",
    )
    return tmp_path


def rows_of(path):
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def state(folder):
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != LOCK_NAME  # which older filelock leaves there
    }


def test_lists_hold_every_readable_image_once(audited):
    before = state(audited / "generated")
    result = filter_audit(audited / "audit", audited / "out")
    keep, reject = rows_of(audited / "out" / "keep.csv"), rows_of(audited / "out" / "reject.csv")
    assert (len(keep), len(reject)) == (result.num_kept, result.num_rejected)
    assert {"b/copy.png", f"b/{ODD_NAME}"} <= {row["id"] for row in reject}
    listed = {Path(row["path"]) for row in keep + reject}
    readable = {p for p in before if p.name != "broken.png"}
    assert listed == {path.absolute() for path in readable} and len(keep + reject) == 6
    assert [row["path"] for row in rows_of(audited / "out" / "unreadable.csv")] == [
        str(audited / "generated" / "broken.png")
    ]
    assert [item.path for item in result.unreadable] == ["broken.png"]
    assert not (audited / "out" / "kept").exists()
    assert state(audited / "generated") == before


def test_sets_and_audit_can_be_moved_together(audited, run_cli):
    command = (
        "audit", audited / "generated", "--against", audited / "train",
        "--held-out", audited / "held-out", "--fpr", 0.025, "--detector", "phash",
    )  # fmt: skip
    run_cli(*command, "-o", audited / "relative")
    run_cli(*command, "-o", audited / "relative")  # the same sets, though named otherwise
    for name in ("audit.json", "config.toml"):
        assert str(audited) not in (audited / "relative" / name).read_text()
    run_cli(*command, "--absolute-paths", "-o", audited / "absolute")
    document = json.loads((audited / "absolute" / "audit.json").read_text())
    assert document["training"]["folder"] == str((audited / "train").resolve())
    moved = audited.with_name(audited.name + "-moved")
    audited.rename(moved)
    done = run_cli("filter", moved / "relative", "-o", moved / "out", "--copy", "--json")
    assert json.loads(done.stdout)["basedir"] == str((moved / "generated").resolve())
    assert (moved / "out" / "kept" / "a" / "02000.png").is_file()
    failed = run_cli("filter", moved / "absolute", "-o", moved / "none", "--copy", exit_code=1)
    assert "no longer where the audit found them" in failed.stderr


@pytest.mark.parametrize("transfer", ["copy", "link"])
def test_kept_files_are_copied_or_linked_in_their_subfolders(audited, transfer):
    before = state(audited / "generated")
    for _ in range(2):  # the second time everything is there already
        result = filter_audit(audited / "audit", audited / "out", transfer=transfer)
    kept = rows_of(audited / "out" / "keep.csv")
    assert result.num_transferred == len(kept) > 0
    for row in kept:
        target = audited / "out" / "kept" / row["id"]
        assert target.is_symlink() == (transfer == "link")
        assert target.read_bytes() == Path(row["path"]).read_bytes()
    files = [path for path in (audited / "out" / "kept").rglob("*") if path.is_file()]
    assert len(files) == len(kept)
    assert state(audited / "generated") == before


def test_a_file_in_the_way_is_never_overwritten(audited):
    target = audited / "out" / "kept" / "a" / "02000.png"
    target.parent.mkdir(parents=True)
    target.write_text("mine")
    for transfer in ("copy", "link"):
        with pytest.raises(InputError, match=r"02000.png: something else is here"):
            filter_audit(audited / "audit", audited / "out", transfer=transfer)
    assert target.read_text() == "mine"


def test_a_link_that_points_to_the_original_is_not_copied_over(audited):
    original = audited / "generated" / "a" / "02000.png"
    content = original.read_bytes()
    target = audited / "out" / "kept" / "a" / "02000.png"
    target.parent.mkdir(parents=True)
    target.symlink_to(original)
    with pytest.raises(InputError, match="something else is here"):
        filter_audit(audited / "audit", audited / "out", transfer="copy")
    assert original.read_bytes() == content


def test_kept_files_that_have_gone_are_named(audited):
    (audited / "generated" / "a" / "02001.png").unlink()
    with pytest.raises(LcmemError, match=r"1 kept images are no longer[\s\S]*02001.png") as caught:
        filter_audit(audited / "audit", audited / "out", transfer="copy")
    assert caught.value.exit_code == 1
    assert (audited / "out" / "keep.csv").is_file()


def test_names_never_leave_the_folder_nor_collide():
    names = ["a/x.png", "A/X.png", "/etc/passwd", "../up.png", "b/../../up.png", "a/y.png"]
    targets = target_names(names)
    assert targets[0] == PurePosixPath("a/x.png") and targets[5] == PurePosixPath("a/y.png")
    assert len({str(target).casefold() for target in targets}) == len(names)
    assert not any(target.is_absolute() or ".." in target.parts for target in targets)
    assert target_names(names) == targets


def test_limits_replace_the_flags_but_exact_copies_stay_rejected(audited):
    everything = filter_audit(audited / "audit", audited / "out", reject_p=1.0)
    assert (everything.num_kept, everything.num_rejected) == (0, 6)
    only_exact = filter_audit(audited / "audit", audited / "out", reject_over=2.0)
    assert (only_exact.num_kept, only_exact.num_rejected) == (4, 2)
    assert "score over 2" in only_exact.rule
    scores = sorted(float(row["score"]) for row in rows_of(audited / "out" / "keep.csv"))
    half = filter_audit(audited / "audit", audited / "out", reject_over=scores[1])
    assert half.num_kept == 2


def test_bad_input_is_refused(audited):
    with pytest.raises(InputError, match=r"no audit\.json here"):
        filter_audit(audited / "train", audited / "out")
    with pytest.raises(InputError, match="exclude each other"):
        filter_audit(audited / "audit", audited / "out", reject_over=0.1, reject_p=0.1)
    with pytest.raises(InputError, match="finite"):
        filter_audit(audited / "audit", audited / "out", reject_over=float("nan"))
    with pytest.raises(InputError, match=r"--reject-p must lie in \[0, 1\], not 5"):
        filter_audit(audited / "audit", audited / "out", reject_p=5)
    assert not (audited / "out").exists()


def test_files_that_an_earlier_rule_kept_are_not_left_among_the_kept(audited):
    filter_audit(audited / "audit", audited / "out", reject_over=2.0, transfer="copy")
    before = state(audited / "out")
    with pytest.raises(InputError, match="not among the images that are kept now"):
        filter_audit(audited / "audit", audited / "out", reject_p=1.0, transfer="copy")
    assert state(audited / "out") == before
    assert (
        filter_audit(
            audited / "audit", audited / "out", reject_over=2.0, transfer="copy"
        ).num_transferred
        == 4
    )


def test_damaged_or_foreign_audits_are_refused(audited):
    path, table = audited / "audit" / "audit.json", audited / "audit" / "matches.csv"
    text, lines = path.read_text(), table.read_bytes()
    table.write_bytes(lines[: len(lines) // 2])
    with pytest.raises(CorruptFileError, match=r"matches.csv"):
        filter_audit(audited / "audit", audited / "out")
    table.write_bytes(lines)
    path.write_text(json.dumps(json.loads(text) | {"schema": 99}))
    with pytest.raises(InputError, match="schema 99"):
        filter_audit(audited / "audit", audited / "out")
    document = json.loads(text)
    for damaged in (document | {"flagged": [{}]}, document | {"generated": {}}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(
            CorruptFileError, match=r"audit\.json: damaged, .*(flagged\.0|generated)\."
        ):
            filter_audit(audited / "audit", audited / "out")
    path.write_text(text)
    for number in (b",abc", b",nan,"):
        table.write_bytes(lines.replace(b",0.", number, 1))
        with pytest.raises(
            CorruptFileError, match=r"matches\.csv, the row of .*: damaged, .*score"
        ):
            filter_audit(audited / "audit", audited / "out")
    for damaged in (text[:50], "[]"):
        path.write_text(damaged)
        with pytest.raises(CorruptFileError, match="not valid"):
            filter_audit(audited / "audit", audited / "out")


def test_results_that_were_edited_decide_nothing(audited):
    """A score, a threshold or a setting that still reads well, but is not what the audit wrote."""
    folder = audited / "audit"
    for name, before, after in (
        ("matches.csv", b",0.", b",0.0"),
        ("audit.json", b'"threshold": 0.', b'"threshold": 0.9'),
        ("config.toml", b"seed = 0", b"seed = 1"),
    ):
        content = (folder / name).read_bytes()
        assert before in content
        (folder / name).write_bytes(content.replace(before, after, 1))
        with pytest.raises(CorruptFileError, match=f"{name}: .*does not match its checksum"):
            if name == "config.toml":
                read_settings(folder)
            else:
                filter_audit(folder, audited / "out")
        (folder / name).write_bytes(content)
    filter_audit(folder, audited / "out")
    (folder / "checksums.json").unlink()
    with pytest.raises(InputError, match=r"checksums\.json: no such file; run the audit again"):
        filter_audit(folder, audited / "out")


def test_the_command_prints_counts_and_json(audited):
    def command(*arguments):
        return CliRunner().invoke(app, ["filter", *(str(argument) for argument in arguments)])

    shown = command(audited / "audit", "-o", audited / "out", "--copy")
    assert shown.exit_code == 0, shown.output
    assert "rejected (flagged by the audit)" in shown.stdout
    assert "1 could not be read" in shown.stdout
    assert f"keep.csv with --basedir {audited / 'generated'}" in " ".join(shown.stdout.split())
    assert load_manifest(audited / "out" / "keep.csv", basedir=audited / "generated").records
    document = json.loads(command(audited / "audit", "-o", audited / "out", "--json").stdout)
    assert document["num_kept"] + document["num_rejected"] == 6
    assert command(audited / "audit", "-o", audited / "out", "--copy", "--link").exit_code == 2


FORMULAS = ("=1+1.png", "-x.png", "+y.png", "@z.png", "'=q.png", "''@q.png")


def test_names_that_spreadsheets_would_compute_are_text_and_are_read_back(tmp_path):
    save_all(tmp_path / "train", range(20))
    save_all(tmp_path / "held-out", range(1000, 1040))
    save_all(tmp_path / "generated", range(2000, 2000 + len(FORMULAS)))
    for image, name in zip(sorted((tmp_path / "generated").iterdir()), FORMULAS, strict=True):
        image.rename(image.with_name(name))
    audit(
        tmp_path / "generated",
        tmp_path / "train",
        held_out=tmp_path / "held-out",
        fpr=0.025,
        detector=SmallCorrelation(),
        output=tmp_path / "audit",
    )
    table = tmp_path / "audit" / "matches.csv"
    for row in rows_of(table):
        assert row["query"].startswith("'") and float(row["score"]) <= 1
        assert not any(cell.startswith(("=", "+", "@")) for cell in row.values())
    result = filter_audit(tmp_path / "audit", tmp_path / "out", transfer="copy", reject_over=2.0)
    assert result.num_kept == len(FORMULAS)
    assert {path.name for path in (tmp_path / "out" / "kept").iterdir()} == set(FORMULAS)
    kept = load_manifest(tmp_path / "out" / "keep.csv", basedir=Path(result.basedir))
    assert {Path(record.path).name for record in kept.records} == set(FORMULAS)
