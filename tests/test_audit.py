import csv
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from audit_images import SmallCorrelation, altered, picture, save_all, small_network
from PIL import Image, ImageOps
from scipy.special import expit
from scipy.stats import binom
from typer.testing import CliRunner

import lcmem_cli
from lcmem_cli.cli.app import app
from lcmem_cli.engine.detectors.joint import JointDetector
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.errors import FingerprintMismatchError, InputError, UnreadableLimitError
from lcmem_cli.engine.evaluation.audit import null as audit_null
from lcmem_cli.engine.evaluation.audit.files import read_audit, read_best_matches
from lcmem_cli.engine.evaluation.audit.null import smallest_rate
from lcmem_cli.engine.evaluation.audit.result import DifferentPictures, FlagRule
from lcmem_cli.engine.evaluation.audit.run import audit
from lcmem_cli.engine.evaluation.audit.search import search
from lcmem_cli.engine.evaluation.audit.sentences import verdict
from lcmem_cli.engine.evaluation.calibration import (
    chance_of,
    clopper_pearson,
    conformal_threshold,
)
from lcmem_cli.engine.evaluation.indexing import add_to_index
from lcmem_cli.engine.evaluation.set_metrics import (
    MIN_CELL_SIZE,
    Spread,
    authentic_percentage,
    copying_statistic,
    linear_scale,
    neighbour_ratios,
    num_cells,
    score_distances,
)
from lcmem_cli.engine.store.index import Index

HOSTILE_NAMES = (
    'it\'s "quoted".png',
    "<script>alert(1)</script>".replace("/", "\u2215") + ".png",
    "</script><img src=x onerror=alert(1)>".replace("/", "\u2215") + ".png",
    "new\nline, comma;\ttab.png",
    os.fsdecode(b"not-utf8-\xff\xfe.png"),
    "l" * 240 + ".png",
    "=1+1.png",
    "\u202egnp.exe.png",
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """40 training images, 30 fresh and 5 altered copies as generated, 60 held out."""
    root = tmp_path_factory.mktemp("sets")
    save_all(root / "train", range(40))
    save_all(root / "held-out", range(1000, 1060))
    save_all(root / "generated", range(2000, 2030))
    for seed in range(0, 10, 2):
        altered(picture(seed)).save(root / "generated" / f"copy-of-{seed:05d}.png")
    return root


def run(root, **options):
    options = {"held_out": root / "held-out", "fpr": 0.05, "detector": SmallCorrelation()} | options
    return audit(root / "generated", root / "train", **options)


def test_planted_copies_are_flagged_beside_their_originals(sets):
    result = run(sets)
    best = {match.query: match for match in result.matches if match.rank == 1}
    for name, match in best.items():
        if name.startswith("copy-of-"):
            assert match.flagged and not match.exact
            assert match.match == name.removeprefix("copy-of-")
            assert match.p_value == 1 / 61
    false = sum(m.flagged for name, m in best.items() if not name.startswith("copy-of-"))
    assert false <= binom.ppf(0.9999, 30, 0.05)
    assert result.num_flagged == 5 + false
    assert result.confidence_interval == clopper_pearson(result.num_flagged, 35)
    assert result.statement.startswith(f"{result.num_flagged} of 35 generated images (")
    assert "at a false-positive rate of 5 % per image" in result.statement
    assert [len(item.matches) for item in result.exposed_images][:5] == [1] * 5
    assert result.metrics.copying is not None


def filelist(path, files):
    path.write_text("path,id\n" + "".join(f"{file},{file.stem}\n" for file in files))
    return path


def test_false_flags_stay_in_their_binomial_interval_over_random_splits(tmp_path):
    files = np.array(sorted(save_all(tmp_path / "all", range(5000, 5240)).iterdir()))
    rng, rate, repeats, size = np.random.default_rng(0), 0.1, 8, 60
    detector, flagged = SmallCorrelation(), 0
    for _ in range(repeats):
        order = rng.permutation(files)
        parts = {"train": order[:40], "generated": order[40:100], "held": order[100:]}
        lists = {name: filelist(tmp_path / f"{name}.csv", part) for name, part in parts.items()}
        flagged += audit(
            lists["generated"], lists["train"], held_out=lists["held"], fpr=rate,
            detector=detector, sensitivity=0,
        ).num_flagged  # fmt: skip
    assert detector.num_embedded == len(files)  # the features of the first split serve the others
    low, high = binom.ppf([0.0005, 0.9995], repeats * size, rate)
    assert low <= flagged <= high


def test_every_query_lists_its_best_matches_in_order(sets):
    result = run(sets, top_k=3)
    assert len(result.matches) == 35 * 3
    for start in range(0, len(result.matches), 3):
        group = result.matches[start : start + 3]
        assert [match.rank for match in group] == [1, 2, 3]
        assert len({match.query for match in group}) == 1
        assert group[0].score >= group[1].score >= group[2].score
        for match in group:
            over = match.score > result.rule.threshold
            assert match.flagged == over == (match.p_value <= 0.05)


def test_files_agree_with_the_result(sets, tmp_path):
    result = run(sets, output=tmp_path, absolute_paths=True)
    document = read_audit(tmp_path)
    for field in dataclasses.fields(document):
        if field.name not in ("format", "schema"):
            assert getattr(document, field.name) == getattr(result, field.name)
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    best = read_best_matches(tmp_path, document)
    assert best == [match for match in result.matches if match.rank == 1] and len(best) == 35
    table = pq.read_table(tmp_path / "matches.parquet").to_pylist()
    with (tmp_path / "matches.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(table[0])
    assert len(lines) == len(table) == len(result.matches)
    for line, row, match in zip(lines, table, result.matches, strict=True):
        assert line["query"] == row["query"] == match.query
        assert float(line["score"]) == row["score"] == match.score
        assert (line["flagged"] == "true") == row["flagged"] == match.flagged
    assert (tmp_path / "config.toml").is_file() and (tmp_path / "environment.json").is_file()


def test_two_runs_differ_in_their_times_only(sets, tmp_path):
    for name in ("a", "b"):
        run(sets, output=tmp_path / name)
    for file in ("matches.csv", "matches.parquet", "report.html", "config.toml"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    documents = [json.loads((tmp_path / name / "audit.json").read_text()) for name in ("a", "b")]
    for document in documents:
        assert set(document.pop("times")) == {"started", "seconds"}
    assert documents[0] == documents[1]


def test_an_interrupted_audit_continues_without_embedding_again(sets, tmp_path, monkeypatch):
    from lcmem_cli.engine.evaluation.audit import files as audit_files

    run(sets, output=tmp_path / "whole")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(audit_files, "render_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(sets, output=tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "audit.json").exists()
    detector = SmallCorrelation()
    run(sets, output=tmp_path / "resumed", detector=detector)
    assert detector.num_embedded == 0
    for file in ("matches.csv", "matches.parquet", "report.html"):
        whole, resumed = (tmp_path / name / file for name in ("whole", "resumed"))
        assert whole.read_bytes() == resumed.read_bytes()


def test_a_set_against_itself_is_all_exact_copies(sets):
    result = audit(
        sets / "train",
        sets / "train",
        held_out=sets / "held-out",
        fpr=0.05,
        detector=SmallCorrelation(),
    )
    assert result.num_flagged == result.num_exact_copies == result.num_exposed_images == 40
    assert all(match.match == match.query for match in result.flagged)
    assert "40 generated images are byte for byte a training image." in result.verdict


def test_an_exact_copy_is_flagged_and_first_even_where_another_image_scores_higher(tmp_path):
    class Inverted(SmallCorrelation):
        def score_features(self, a, b):
            return -super().score_features(a, b)

        def score_matrix(self, a, b):
            return -super().score_matrix(a, b)

    save_all(tmp_path / "train", range(10))
    save_all(tmp_path / "generated", [3])
    save_all(tmp_path / "held-out", range(100, 130))
    for top_k in (1, 10):
        result = run(tmp_path, detector=Inverted(), top_k=top_k)
        assert result.matches[0].match == "00003.png"
        assert result.matches[0].exact and result.matches[0].flagged
        assert len({match.match for match in result.matches}) == top_k


def test_duplicates_are_found_and_taken_out_of_the_null(sets, tmp_path):
    shutil.copytree(sets, tmp_path / "sets")
    root = tmp_path / "sets"
    shutil.copy(root / "train" / "00007.png", root / "train" / "again.png")
    shutil.copy(root / "train" / "00008.png", root / "held-out" / "leaked.png")
    picture(9).save(root / "held-out" / "resaved.png", compress_level=1)
    shutil.copy(root / "generated" / "02000.png", root / "generated" / "twice.png")
    result, clean = run(root), run(sets)
    assert result.training.duplicates == (("00007.png", "again.png"),)
    assert result.generated.duplicates == (("02000.png", "twice.png"),)
    removed = {item.path: (item.match, item.kind) for item in result.null.removed}
    assert removed == {
        "leaked.png": ("00008.png", "exact"),
        "resaved.png": ("00009.png", "pixels"),
    }
    assert result.null.num_scores == clean.null.num_scores == 60
    assert result.rule.threshold == clean.rule.threshold
    assert result.num_queries == clean.num_queries + 1
    assert any("left out of the comparison: 2 real images." in w for w in result.warnings)
    assert result.pictures.num_pictures == clean.pictures.num_pictures
    assert any("What is beyond chance counts each picture once" in w for w in result.warnings)


def test_equal_pixels_in_other_files_are_counted_beside_equal_files(sets, tmp_path):
    shutil.copytree(sets, tmp_path / "sets")
    generated = tmp_path / "sets" / "generated"
    before = run(tmp_path / "sets")
    shutil.copy(generated.parent / "train" / "00012.png", generated / "same.png")
    for number in (21, 22):
        picture(number).save(generated / f"{number}.png", compress_level=1)
        shutil.copy(generated / f"{number}.png", generated / f"{number}-again.png")
        picture(number).save(generated / f"{number}.jpg", quality=95)
    result = run(tmp_path / "sets")
    assert result.num_exact_copies == before.num_exact_copies + 1
    assert (before.num_same_pixels, result.num_same_pixels) == (0, 4)
    assert (result.num_altered, result.num_alike) == (None, before.num_alike + 2)
    assert "1 generated image is byte for byte a training image." in result.verdict
    assert "4 generated images have the pixels of a training image" in result.verdict
    known = f"known of {result.num_alike} others ({result.pictures.num_alike} different pictures)"
    assert f"{known}; chance alone would" in result.verdict
    tiers = {match.query: match.tier for match in result.flagged}
    assert tiers["same.png"] == "identical file" and tiers["21-again.png"] == "same pixels"
    assert tiers["21.jpg"] == "alike"
    assert not any(match.evidence or match.edit for match in result.matches)


def test_generated_images_among_the_held_out_do_not_hide_themselves(sets, tmp_path):
    with pytest.raises(InputError, match="every held-out image is among the generated ones"):
        run(sets, held_out=sets / "generated")
    shutil.copytree(sets / "held-out", tmp_path / "mixed")
    for path in (sets / "generated").iterdir():
        shutil.copy(path, tmp_path / "mixed" / f"again-{path.name}")
    mixed, clean = run(sets, held_out=tmp_path / "mixed"), run(sets)
    assert mixed.flagged == clean.flagged
    assert mixed.null.num_scores == clean.null.num_scores
    assert any("left out of the comparison: 35 held-out images" in w for w in mixed.warnings)
    assert not any("among the generated" in w.lower() for w in clean.warnings)


def test_what_makes_a_finding_worth_little_is_said(sets, tmp_path):
    def warned(result, text):
        return any(text in warning for warning in result.warnings)

    for number in range(40):
        save_all(tmp_path / "people" / f"p{number}", [number, 100 + number][: 1 + number % 2])
    own = "counts as an identity of its own"
    assert warned(run(sets, held_out=None), own) and not warned(run(sets), own)
    people = audit(sets / "generated", tmp_path / "people", fpr=0.05, detector=SmallCorrelation())
    assert not warned(people, own)
    (tmp_path / "noise").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{number}.png")
    noise = audit(
        tmp_path / "noise", sets / "train", held_out=sets / "held-out", fpr=0.05,
        detector=SmallCorrelation(),
    )  # fmt: skip
    assert warned(noise, "of another kind than the real images")
    assert not warned(run(sets), "of another kind than the real images")
    itself = audit(
        sets / "train", sets / "train", held_out=sets / "held-out", fpr=0.05,
        detector=SmallCorrelation(),
    )  # fmt: skip
    assert warned(itself, "are the same images")


def test_unreadable_images_are_named_and_limited(sets, tmp_path):
    shutil.copytree(sets, tmp_path / "sets")
    (tmp_path / "sets" / "generated" / "broken.png").write_bytes(b"not an image")
    (tmp_path / "sets" / "held-out" / "empty.png").write_bytes(b"")
    result = run(tmp_path / "sets", max_unreadable=2, output=tmp_path / "out")
    assert [item.path for item in result.generated.unreadable] == ["broken.png"]
    assert result.generated.unreadable[0].reason
    assert (result.generated.num_images, result.num_queries) == (36, 35)
    assert "broken.png" in (tmp_path / "out" / "report.html").read_text()
    told = command_line(tmp_path / "sets", tmp_path / "told")
    assert "unreadable broken.png: not an image" in command(*told[2:]).stdout
    with pytest.raises(UnreadableLimitError, match=r"2 images .* allows 1[\s\S]*broken.png"):
        run(tmp_path / "sets", max_unreadable=1)


def test_brightness_that_was_guessed_stands_in_the_audit(sets, tmp_path):
    shutil.copytree(sets, tmp_path / "sets")
    file = next(iter(sorted((tmp_path / "sets" / "generated").glob("*.png"))))
    with Image.open(file) as image:
        grey = np.asarray(image.convert("L"), dtype=np.uint16)
    Image.fromarray(grey * 8).save(file)  # 11 bits in a file of 16
    result = run(tmp_path / "sets")
    counts = (result.generated.num_guessed, result.training.num_guessed)
    assert counts == (1, 0)
    assert any("guessed" in text and "1 generated image" in text for text in result.warnings)


def test_features_are_kept_unless_told_otherwise(sets, tmp_path, monkeypatch):
    for name, options in (("kept", []), ("not", ["--no-cache"])):
        monkeypatch.setenv("LCMEM_CACHE", str(tmp_path / name))
        arguments = command_line(sets, tmp_path / f"{name}-out")[2:]
        assert command(*arguments, *options).exit_code == 0
    assert any((tmp_path / "kept").rglob("*.safetensors")) and not (tmp_path / "not").exists()


def test_too_few_real_images_for_the_rate_says_what_is_needed_and_possible(sets):
    with pytest.raises(InputError, match=r"needs at least 99 .* gives 60 .* --fpr 0.0164 or more"):
        run(sets, fpr=0.01)
    assert run(sets, fpr=0.0164).rule.rate == 0.0164


@pytest.mark.parametrize("count", [1, 9, 10, 60, 98, 99, 100, 12345])
def test_the_smallest_rate_is_enough_for_its_count(count):
    assert 1 / (count + 1) <= smallest_rate(count) <= 1.002 / (count + 1)


def identity_folder(root: Path, identities: int = 12, each: int = 3) -> Path:
    """Images of one identity are alike; those of two are not."""
    for identity in range(identities):
        folder = root / f"person{identity:02d}"
        folder.mkdir(parents=True)
        base = np.asarray(picture(identity), dtype=np.int16)
        for number in range(each):
            noise = np.random.default_rng([identity, number]).integers(-25, 26, base.shape)
            Image.fromarray((base + noise).clip(0, 255).astype(np.uint8)).save(
                folder / f"{number}.png"
            )
    return root


def correlations(detector, a, b):
    return detector.score_matrix(detector.embed(a), detector.embed(b))


def test_leave_one_out_compares_with_other_identities(tmp_path):
    train = identity_folder(tmp_path / "train")
    shutil.copy(train / "person03" / "0.png", train / "person04" / "wrong-label.png")
    generated = save_all(tmp_path / "generated", range(100, 103))
    detector = SmallCorrelation()
    result = audit(generated, train, fpr=0.2, detector=detector)
    files = sorted(path for path in train.rglob("*.png") if path.name != "wrong-label.png")
    people = np.array([path.parent.name for path in files])
    people[people == "person04"] = "person03"  # they share an image, so they count as one
    scores = correlations(detector, files, files)
    scores[people[:, None] == people] = -np.inf
    best = [scores[people == person].max() for person in np.unique(people)]
    assert result.null.kind == "leave-one-out" and result.null.num_scores == len(best) == 11
    assert result.metrics.null_scores.largest == pytest.approx(scores.max())
    assert result.metrics.null_scores.median == pytest.approx(np.median(best))
    assert result.metrics.copying is None
    assert "approximate" in result.null.meaning
    assert "those of other identities" in result.statement


def test_leave_one_out_reaches_past_a_large_identity(tmp_path, monkeypatch):
    train = identity_folder(tmp_path / "train", identities=2, each=40)
    generated = save_all(tmp_path / "generated", [100])
    result = audit(generated, train, folders_are="identities", fpr=0.7, detector=SmallCorrelation())
    assert result.null.num_scores == 2
    assert result.metrics.null_scores.largest < 0.9
    # However few neighbours are asked for before an identity is searched by itself.
    monkeypatch.setattr(audit_null, "_MOST_NEIGHBOURS", 8)
    again = audit(generated, train, folders_are="identities", fpr=0.7, detector=SmallCorrelation())
    assert dataclasses.replace(again, times=result.times) == result


def test_split_searches_null_and_generated_in_the_same_bank(tmp_path):
    train = identity_folder(tmp_path / "train")
    generated = save_all(tmp_path / "generated", range(100, 106))
    for identity in range(12):
        altered(Image.open(train / f"person{identity:02d}" / "0.png")).save(
            generated / f"copy{identity:02d}.png"
        )
    result = audit(
        generated, train, null="split", fpr=0.2, detector=SmallCorrelation(), top_k=50, seed=3
    )
    searched = {match.match for match in result.matches}
    assert len(searched) == 36 - result.null.num_not_searched
    assert (result.null.num_scores, result.null.num_not_searched) == (4, 12)
    assert len({Path(name).parent.name for name in searched}) == 8  # whole identities
    for match in result.matches:
        original = match.query.replace("copy", "person").removesuffix(".png") + "/0.png"
        if match.rank == 1 and original in searched:
            assert match.flagged and match.match == original
    assert "12 training images were split off" in result.null.meaning
    again = audit(
        generated, train, null="split", fpr=0.2, detector=SmallCorrelation(), top_k=50, seed=3
    )
    assert again.matches == result.matches


def test_a_rate_that_no_split_can_give_is_refused_with_one_that_it_can(tmp_path):
    train = save_all(tmp_path / "train", range(24))
    generated = save_all(tmp_path / "generated", [100])
    with pytest.raises(InputError, match=r"gives 12 real images; these allow --fpr 0.07693"):
        audit(generated, train, null="split", fpr=0.01, detector=SmallCorrelation())
    audit(generated, train, null="split", fpr=0.07693, detector=SmallCorrelation())


def test_split_takes_at_most_half_of_the_images(tmp_path):
    train = identity_folder(tmp_path / "train", identities=1, each=30)
    for number in range(12):
        save_all(train / f"single{number:02d}", [500 + number])
    generated = save_all(tmp_path / "generated", [100])
    for seed in range(3):
        result = audit(
            generated, train, null="split", fpr=0.1, detector=SmallCorrelation(), seed=seed
        )
        assert result.null.num_not_searched == 9  # none of the thirty


def test_more_than_chance_is_said_as_rarely_as_stated(sets):
    rng, num_null, num_queries, rate = np.random.default_rng(0), 100, 1000, 0.01
    finding, said = run(sets), 0
    finding = dataclasses.replace(
        finding,
        rule=FlagRule(kind="fpr", rate=rate, threshold=0.5),
        null=dataclasses.replace(
            finding.null, num_scores=num_null, allowed=1, num_independent=num_null
        ),
        num_queries=num_queries,
        num_exact_copies=0,
    )
    for _ in range(2000):
        null, best = rng.random(num_null), rng.random(num_queries)
        flagged = int((best > conformal_threshold(null, rate)).sum())
        pictures = DifferentPictures(
            num_pictures=num_queries, num_flagged=flagged, num_alike=flagged
        )
        said += "this is more" in verdict(
            dataclasses.replace(finding, num_flagged=flagged, num_alike=flagged, pictures=pictures)
        )
    assert said <= binom.ppf(0.999, 2000, 0.025)
    assert chance_of(1, 1, num_null=99, allowed=5) == pytest.approx(0.05)
    assert chance_of(0, 9, num_null=99, allowed=5) == 1


def test_a_generator_that_repeats_itself_is_judged_by_its_pictures(sets, tmp_path):
    def judged(generated):
        return audit(
            generated, sets / "train", held_out=sets / "held-out", fpr=0.05,
            detector=SmallCorrelation(), output=tmp_path / "out", overwrite=True,
        )  # fmt: skip

    save_all(tmp_path / "generated", range(5000, 5030))
    once = judged(tmp_path / "generated")
    blend = Image.blend(picture(3), picture(7000), 0.25)
    for number in range(10):
        pixels = np.asarray(blend).astype(int) + np.random.default_rng(number).integers(-2, 3)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(tmp_path / "generated" / f"again-{number}.png")
    result = judged(tmp_path / "generated")
    assert result.num_flagged == once.num_flagged + 10
    assert result.pictures.num_flagged == once.pictures.num_flagged + 1
    assert result.pictures.num_pictures == once.pictures.num_pictures + 1
    assert once.more_than_chance is result.more_than_chance is False
    assert "different pictures" in result.verdict
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<small>of the pictures, 95 % interval</small>" in page


def test_training_sets_of_one_identity_or_one_image_cannot_make_a_null(tmp_path):
    one_person = identity_folder(tmp_path / "one", identities=1, each=20)
    generated = save_all(tmp_path / "generated", range(3))
    for null in ("split", "leave-one-out"):
        with pytest.raises(InputError, match="real images of different identities"):
            audit(
                generated, one_person, folders_are="identities", null=null, fpr=0.1,
                detector=SmallCorrelation(),
            )  # fmt: skip


def test_one_generated_and_one_training_image(tmp_path):
    save_all(tmp_path / "train", [1])
    save_all(tmp_path / "generated", [2])
    save_all(tmp_path / "held-out", range(100, 130))
    result = run(tmp_path, output=tmp_path / "out")
    assert " of 1 generated image (" in result.statement
    assert result.num_queries == 1 and len(result.matches) == 1
    assert result.metrics.auth_pct is None and result.metrics.generated_ratio is None
    assert result.metrics.share_small_ratio is None
    assert (tmp_path / "out" / "report.html").is_file()


def test_identical_images_everywhere(tmp_path):
    plain = picture(7)
    for name in ("train", "generated"):
        (tmp_path / name).mkdir()
        for number in range(4):
            plain.save(tmp_path / name / f"{number}.png")
    save_all(tmp_path / "held-out", range(100, 130))
    plain.save(tmp_path / "held-out" / "plain.png")
    result = run(tmp_path, output=tmp_path / "out")
    assert result.num_flagged == result.num_exact_copies == 4
    assert result.num_exposed_images == result.training.num_distinct == 1
    assert [item.path for item in result.null.removed] == ["plain.png"]
    assert len(result.exposed_images[0].matches) == 4


@pytest.mark.parametrize("empty", ["generated", "train", "held-out"])
def test_an_empty_set_is_refused_by_name(tmp_path, empty):
    for name in {"generated", "train", "held-out"} - {empty}:
        save_all(tmp_path / name, range(30))
    (tmp_path / empty).mkdir()
    with pytest.raises(InputError, match=empty):
        run(tmp_path)


def test_a_set_without_a_readable_image_is_refused(tmp_path):
    for name in ("generated", "held-out"):
        save_all(tmp_path / name, range(30))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"not one image of the training set[\s\S]*a.png"):
        run(tmp_path)


def test_hostile_names_survive_every_file(sets, tmp_path):
    root = tmp_path / "sets"
    shutil.copytree(sets, root)
    for number, name in enumerate(HOSTILE_NAMES):
        shutil.copy(root / "train" / f"{number:05d}.png", root / "generated" / name)
        (root / "train" / f"{number:05d}.png").rename(root / "train" / name)
    (root / "generated" / "bad\n<b>.png").write_bytes(b"nothing")
    result = run(root, output=tmp_path / "out")
    assert result.num_exact_copies == len(HOSTILE_NAMES)
    best = read_best_matches(tmp_path / "out", read_audit(tmp_path / "out"))
    matches = {match.query: match.match for match in best}
    assert {name: matches[name] for name in HOSTILE_NAMES} == {n: n for n in HOSTILE_NAMES}
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert {match["query"] for match in document["flagged"]} >= set(HOSTILE_NAMES)
    assert pq.read_table(tmp_path / "out" / "matches.parquet").num_rows == len(result.matches)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<img src=x" not in page and "<b>.png" not in page


def test_benjamini_hochberg_flags_the_copies_and_says_what_it_holds(sets, tmp_path):
    result = run(sets, bh=True, fpr=0.2)
    assert result.rule.kind == "fdr" and result.expected_by_chance is None
    assert {m.query for m in result.flagged} >= {f"copy-of-{s:05d}.png" for s in range(0, 10, 2)}
    assert "false-discovery rate of 20 %" in result.statement
    assert "Of the flagged images 20 % at most copy nothing" in result.null.meaning
    nothing = audit(
        save_all(tmp_path / "fresh", range(3000, 3030)),
        sets / "train",
        held_out=sets / "held-out",
        bh=True,
        fpr=0.02,
        detector=SmallCorrelation(),
        output=tmp_path / "out",
    )
    assert nothing.rule.threshold is None and nothing.num_flagged == 0
    assert any("can only flag 25 or more" in warning for warning in nothing.warnings)
    assert "could not have flagged fewer than 25" in nothing.verdict
    assert nothing.statement.startswith("Undecided: none of 30") and nothing.is_undecided
    assert 'class="verdict unsure"' in (tmp_path / "out" / "report.html").read_text()
    assert not result.is_undecided and not any("than at least" in line for line in nothing.shows)


def test_a_gate_that_benjamini_hochberg_cannot_fail_is_refused(sets, tmp_path):
    # 60 real images: no p-value is under 1/61, so at a rate of 0.05 the 35 pass 12 at a time
    options = {"bh": True, "fpr": 0.05, "held_out": sets / "held-out"}
    with pytest.raises(InputError, match=r"at 1 flagged image.* only flag 12 .* give 699 held-out"):
        run(sets, fail_on=0, **options)
    assert run(sets, fail_on=0.32, **options).fail_on == 0.32  # fails at 12
    with pytest.raises(InputError, match="at 11 flagged images"):
        run(sets, fail_on=0.3, **options)
    same = shutil.copytree(sets / "generated", tmp_path / "same")
    shutil.copy(sets / "train" / "00001.png", same)
    result = audit(same, sets / "train", detector=SmallCorrelation(), fail_on=0, **options)
    assert result.gate.ended == "failed" and result.num_exact_copies == 1


def test_a_folder_with_another_audit_is_refused(sets, tmp_path):
    run(sets, output=tmp_path, top_k=2)
    run(sets, output=tmp_path, fail_on=0.5)  # the same finding
    before = (tmp_path / "audit.json").read_bytes()
    with pytest.raises(
        InputError, match=r"another audit \(fpr: 0.05 there, 0.1 now\).*--overwrite"
    ):
        run(sets, output=tmp_path, fpr=0.1)
    with pytest.raises(InputError, match=r"another audit \(generated: "):
        audit(
            sets / "held-out", sets / "train", fpr=0.1, detector=SmallCorrelation(), output=tmp_path
        )
    assert (tmp_path / "audit.json").read_bytes() == before
    assert run(sets, output=tmp_path, fpr=0.1, overwrite=True).rule.rate == 0.1
    (tmp_path / "config.toml").unlink()
    with pytest.raises(
        InputError, match=r"config\.toml: no such file; .* another audit.*--overwrite"
    ):
        run(sets, output=tmp_path, fpr=0.1)


def test_how_many_real_images_are_less_close_than_any_flagged_one_is_counted(sets):
    (line,) = (line for line in run(sets, fpr=0.5).shows if "than at least" in line)
    below = int(re.search(r"than at least (\d+) of 60 real", line)[1])
    assert 30 <= below < 60  # the threshold is the 31st of 60 scores, and not exceeded by itself
    assert any("than any of 60 real images is" in line for line in run(sets, fpr=1 / 61).shows)


def test_real_images_nearer_to_the_training_set_than_the_generated_are_told(sets, tmp_path):
    for seed in range(40):
        near = Image.blend(picture(seed), picture(7000 + seed), 0.4)
        near.save(tmp_path / f"{seed:05d}.png")
    swapped = audit(
        sets / "generated", sets / "train", held_out=tmp_path, fpr=0.05,
        detector=SmallCorrelation(),
    )  # fmt: skip
    assert swapped.metrics.copying.value > 3
    assert any("lie nearer to the training set" in warning for warning in swapped.warnings)
    assert not any("lie nearer" in warning for warning in run(sets).warnings)


def test_identities_of_a_flat_folder_are_not_counted(sets, tmp_path):
    flat = run(sets)
    assert flat.num_exposed_identities is flat.training.num_identities is None
    assert any("different people" in line for line in flat.does_not_show)
    people = identity_folder(tmp_path / "people", identities=12, each=3)
    labelled = audit(
        sets / "generated", people, held_out=sets / "held-out", fpr=0.05,
        detector=SmallCorrelation(),
    )  # fmt: skip
    assert labelled.training.num_identities == 12


def test_several_pictures_of_one_identity_count_once(tmp_path, sets):
    people = identity_folder(tmp_path / "people", identities=20, each=3)
    result = run(sets, held_out=people)
    assert result.null.num_scores == 20 and result.held_out.num_images == 60
    shutil.rmtree(people / "person00")
    shutil.rmtree(people / "person01")
    with pytest.raises(InputError, match=r"at least 19 real images of different identities.* 18 "):
        run(sets, held_out=people)


def test_a_rate_with_confidence_takes_more_images_and_a_higher_threshold(sets):
    usual, sure = run(sets, fpr=0.2), run(sets, fpr=0.2, confidence=0.95)
    assert sure.rule.threshold > usual.rule.threshold and sure.rule.confidence == 0.95
    assert sure.null.allowed < usual.null.allowed and sure.null.rates[1] <= 0.25
    with pytest.raises(InputError, match=r"confidence of 99 %, needs at least 90 real images"):
        run(sets, fpr=0.05, confidence=0.99)
    for options, text in (
        ({"confidence": 1.0}, "must lie in"),
        ({"confidence": 0.95, "bh": True}, "no effect with --bh"),
        ({"confidence": 0.95, "held_out": None}, "leave-one-out"),
    ):
        with pytest.raises(InputError, match=text):
            run(sets, **options)


def test_leave_one_out_allows_whole_pairs_only(tmp_path):
    """Each image's best match is often its match's best match, so flags would come in twos."""
    generated = save_all(tmp_path / "generated", range(200, 203))
    train = save_all(tmp_path / "train", range(18))
    with pytest.raises(InputError, match="at least 19 real images"):
        audit(generated, train, fpr=0.1, detector=SmallCorrelation())
    save_all(train, [18])
    null = audit(generated, train, fpr=0.1, detector=SmallCorrelation()).null
    assert (null.num_scores, null.allowed, null.num_independent) == (19, 2, 9.5)
    assert null.independent_allowed == 1.0


def test_sets_of_another_source_are_told_and_leave_the_gate_undecided(sets, tmp_path):
    framed = tmp_path / "framed"
    framed.mkdir()
    for path in (sets / "held-out").glob("*.png"):
        ImageOps.expand(Image.open(path), 16, "white").save(framed / path.name)
    result = run(sets, held_out=framed, fail_on=0.5)
    assert result.comparable is False and result.gate.ended == "undecided"
    assert result.statement.startswith("Held-out and training images are not comparable")
    assert "width" in result.statement and "this is more" not in result.verdict
    assert result.excess_interval is None
    document = result.to_dict()
    assert document["comparable"] is False and document["gate"]["ended"] == "undecided"
    assert document["comparability"]["auc"] > 0.9
    same = run(sets, fail_on=0.5)
    assert same.comparable is True and same.gate.ended == "passed"
    assert same.excess_interval[0] < same.share_flagged < same.excess_interval[1]
    gated = command(
        "audit", sets / "generated", "--against", sets / "train", "--held-out", framed,
        "--detector", "ncc", "--input-size", "32", "--fpr", "0.05", "--fail-on", "0.5",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert gated.exit_code == 3 and "lcmem gate 0.5: UNDECIDED - " in gated.stdout


def test_identities_in_training_and_held_out_filelists_are_reported(sets, tmp_path):
    for name, folder in (("train", "train"), ("held", "held-out")):
        with (tmp_path / f"{name}.csv").open("w") as file:
            file.write("path,id\n")
            for number, path in enumerate(sorted((sets / folder).glob("*.png"))):
                file.write(f"{path},{name if number > 1 else 'person'}{number}\n")
    result = audit(
        sets / "generated",
        tmp_path / "train.csv",
        held_out=tmp_path / "held.csv",
        basedir="/",
        fpr=0.05,
        detector=SmallCorrelation(),
    )
    assert result.null.shared_identities == ("person0", "person1")
    assert any("2 identities in both" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fpr": 0}, "--fpr must lie in"),
        ({"fpr": 1.5}, "--fpr must lie in"),
        ({"fpr": 1e-309}, "no data can support it"),
        ({"null": "split"}, "--null has no effect with --held-out"),
        ({"null": "other", "held_out": None}, "--null must be split or leave-one-out"),
        ({"basedir": "."}, "--basedir has no effect"),
        ({"input_size": 512}, "--input-size 512 has no effect"),
        ({"top_k": 0}, "--top-k must be at least 1"),
        ({"fail_on": 1.0}, "--fail-on must be"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(sets, options, message):
    detector = SmallCorrelation()
    with pytest.raises(InputError, match=message):
        run(sets, detector=detector, **options)
    assert detector.num_embedded == 0


def test_processes_that_share_the_bank_find_what_one_finds():
    rng = np.random.default_rng(0)
    queries, bank = rng.normal(size=(7, 12)), rng.normal(size=(11, 12))
    detector, box, barrier = SmallCorrelation(), [None] * 3, threading.Barrier(3)

    class Threads(Ranks):
        def gather(self, value):
            box[self.rank] = value
            barrier.wait(10)
            return list(box)

    found = [None] * 3

    def work(rank):
        found[rank] = search(detector, queries, bank, 4, Threads(rank, 3))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = search(detector, queries, bank, 4, Ranks())
    for part in found:
        np.testing.assert_array_equal(part.rows, alone.rows)
        np.testing.assert_array_equal(part.scores, alone.scores)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_index_takes_the_place_of_any_set(sets, tmp_path):
    detector = SmallCorrelation()
    for name in ("train", "held-out", "generated"):
        add_to_index(sets / name, tmp_path / name, detector)
    before = detector.num_embedded
    indexed = audit(
        tmp_path / "generated",
        Index.open(tmp_path / "train"),
        held_out=tmp_path / "held-out",
        fpr=0.05,
        detector=detector,
        sensitivity=0,
        output=tmp_path / "out",
    )
    assert detector.num_embedded == before
    plain = run(sets, detector=detector)
    assert (indexed.rule, indexed.metrics) == (plain.rule, plain.metrics)
    for a, b in zip(indexed.matches, plain.matches, strict=True):
        assert Path("/", a.query) == sets / "generated" / b.query
        assert Path("/", a.match) == sets / "train" / b.match
        assert (a.score, a.p_value, a.flagged) == (b.score, b.p_value, b.flagged)
    assert "no picture" not in (tmp_path / "out" / "report.html").read_text().split("<script>")[0]
    other = SmallCorrelation()
    other.fingerprint = "6" * 64
    with pytest.raises(FingerprintMismatchError, match="made by detector small-correlation"):
        audit(sets / "generated", tmp_path / "train", fpr=0.05, detector=other)
    assert other.num_embedded == 0


def test_probabilities_are_drawn_and_subtracted_as_logits(sets, tmp_path):
    class Probability(SmallCorrelation):
        fingerprint, gives_probability = "7" * 64, True

        def score_features(self, a, b):
            return expit(10 * super().score_features(a, b))

        def score_matrix(self, a, b):
            return expit(10 * super().score_matrix(a, b))

    result = run(sets, detector=Probability(), verify=False, output=tmp_path)
    plain = run(sets)
    assert [m.query for m in result.flagged] == [m.query for m in plain.flagged]
    assert result.metrics.auth_pct == plain.metrics.auth_pct
    for name in ("smallest", "median", "largest"):
        logits = getattr(result.metrics.generated_ratio, name)
        assert logits == pytest.approx(getattr(plain.metrics.generated_ratio, name), abs=1e-5)
    assert "best-match score, on a logit scale" in (tmp_path / "report.html").read_text()


def test_ratios_of_what_is_no_distance_are_left_out(sets, tmp_path):
    class Scale(SmallCorrelation):
        fingerprint, measures_distance = "8" * 64, False

    result = run(sets, detector=Scale(), output=tmp_path)
    assert result.metrics.generated_ratio is result.metrics.null_ratio is None
    assert result.metrics.share_small_ratio is None
    assert "First to second neighbour" not in (tmp_path / "report.html").read_text()
    assert not JointDetector.measures_distance


def test_the_page_says_what_the_real_images_are(sets, tmp_path):
    run(sets, output=tmp_path / "a")
    run(sets, output=tmp_path / "b", held_out=None)
    never, others = "that the generator never saw", "each among those of other identities"
    pages = [(tmp_path / name / "report.html").read_text() for name in "ab"]
    assert never in pages[0] and others not in pages[0]
    assert never not in pages[1] and others in pages[1]


def test_an_audit_never_writes_beside_the_images(sets, tmp_path):
    before = {path: digest(path) for path in sets.rglob("*") if path.is_file()}
    run(sets, output=tmp_path)
    assert {path: digest(path) for path in sets.rglob("*") if path.is_file()} == before


def test_the_public_name_is_the_function():
    assert lcmem_cli.audit is audit


# --- the command ---------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_gate_ends_with_exit_code_three_and_still_prints_the_result(sets, tmp_path):
    arguments = [
        "audit", sets / "generated", "--against", sets / "train", "--held-out", sets / "held-out",
        "--fpr", "0.05", "--detector", "ncc", "--input-size", "32", "-o", tmp_path / "out",
        "--fail-on",
    ]  # fmt: skip
    failed = command(*arguments, "0.1")
    assert failed.exit_code == 3, failed.output
    assert "match a training image more closely than held-out" in failed.stdout
    assert "Detector ncc, flagged: score over 0." in failed.stdout
    assert failed.stdout.endswith(
        "lcmem gate 0.1: FAILED - 22.9 % of 35 generated images flagged, 10 % allowed\n"
    )
    passed = command(*arguments, "0.9")
    assert passed.exit_code == 0, passed.output
    assert (
        "lcmem gate 0.9: PASSED - 22.9 % of 35 generated images flagged, 90 % allowed"
        in passed.stdout
    )
    as_json = command(*arguments, "0.1", "--json")
    assert as_json.exit_code == 3
    document = json.loads(as_json.stdout)
    assert document["gate"]["ended"] == "failed" and document["schema"] == 3
    assert document["statement"] in failed.stdout.replace("\n", " ")


def test_the_command_reports_a_null_that_is_too_small(sets, tmp_path):
    result = command(
        "audit", sets / "generated", "--against", sets / "train", "--held-out",
        sets / "held-out", "--detector", "ncc", "-o", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 2
    assert "needs at least 99 real images of different identities" in result.stderr
    assert result.stdout == ""


WITH_A_NETWORK = ("--detector", "random")


def command_line(sets, output, detector=("--detector", "ncc", "--input-size", "32")):
    return [
        "-m", "lcmem_cli", "audit", str(sets / "generated"), "--against", str(sets / "train"),
        "--held-out", str(sets / "held-out"), "--fpr", "0.05", *detector,
        "--device", "cpu", "-o", str(output),
    ]  # fmt: skip


def same_files(a, b):
    for name in ("matches.csv", "matches.parquet", "report.html"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    documents = [json.loads((folder / "audit.json").read_text()) for folder in (a, b)]
    assert documents[0].pop("times") and documents[1].pop("times")
    assert documents[0] == documents[1]


@pytest.mark.slow
def test_a_killed_audit_ends_with_the_same_files(sets, tmp_path, monkeypatch):
    subprocess.run(
        [sys.executable, *command_line(sets, tmp_path / "whole", WITH_A_NETWORK)], check=True
    )
    monkeypatch.setenv("LCMEM_CACHE", str(tmp_path / "cache"))
    killed = command_line(sets, tmp_path / "killed", WITH_A_NETWORK)
    for milliseconds in (0, 100, 300, 1000):  # after the first features are on disk
        process = subprocess.Popen([sys.executable, *killed], stdout=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path / "cache").rglob("*.safetensors")):
            time.sleep(0.01)
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, *killed], check=True)
    same_files(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_write_what_one_writes(sets, tmp_path):
    subprocess.run(
        [sys.executable, *command_line(sets, tmp_path / "one", WITH_A_NETWORK)], check=True
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [sys.executable, *launch, *command_line(sets, tmp_path / "two", WITH_A_NETWORK)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.stdout.count("of 35 generated images (") == 1
    same_files(tmp_path / "one", tmp_path / "two")


# --- figures about the whole set -----------------------------------------------------------------


def test_authentic_percentage_of_a_known_case():
    scores = np.array([0.9, 0.5, 0.7, 0.2])
    neighbours = np.array([0.8, 0.6, 0.7, 0.3])
    assert authentic_percentage(scores, neighbours) == 50.0  # a tie is not authentic
    assert authentic_percentage(np.zeros(0), np.zeros(0)) is None
    with pytest.raises(InputError):
        authentic_percentage(scores, neighbours[:2])


def test_copying_statistic_has_the_sign_and_size_of_its_definition():
    rng = np.random.default_rng(0)
    null, same, near = rng.normal(size=200), rng.normal(size=200), rng.normal(2, 1, size=200)
    cells = np.zeros(200, dtype=int)
    assert abs(copying_statistic(same, null, cells, cells).value) < 3
    assert copying_statistic(near, null, cells, cells).value < -10
    assert copying_statistic(null, near, cells, cells).value > 10
    n = MIN_CELL_SIZE
    all_nearer = copying_statistic(
        np.full(n, 2.0), np.full(5, 1.0), np.zeros(n, int), np.zeros(5, int)
    )
    assert all_nearer.value == pytest.approx(-(n * 5 / 2) / np.sqrt(n * 5 * (n + 6) / 12))


def test_copying_statistic_weights_cells_by_held_out_images_and_skips_thin_ones():
    n = MIN_CELL_SIZE
    generated = np.concatenate([np.full(n, 2.0), np.full(n, 0.0), np.full(n - 1, 9.0)])
    generated_cells = np.repeat([0, 1, 2], [n, n, n - 1])
    held_out, held_out_cells = np.ones(60), np.repeat([0, 1, 2], [10, 30, 20])
    found = copying_statistic(generated, held_out, generated_cells, held_out_cells)

    def z(m):
        return (n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12)

    assert found.num_cells == 2
    assert found.value == pytest.approx((-10 * z(10) + 30 * z(30)) / 40)
    assert copying_statistic(np.ones(3), held_out, np.zeros(3, int), held_out_cells) is None


def test_neighbour_ratios_and_distances():
    scores = np.array([[0.9, 0.6], [1.0, 1.0], [1.2, 0.5]])
    distances = score_distances(scores, np.ones((3, 1)))
    np.testing.assert_allclose(distances, [[0.1, 0.4], [0, 0], [0, 0.5]])
    np.testing.assert_allclose(neighbour_ratios(distances[:, 0], distances[:, 1]), [0.25, 1, 0])


def test_small_helpers():
    assert linear_scale(np.array([0.0, 0.5, 1.0])).tolist() == [-40, 0, 40]
    assert [num_cells(n, 10**6) for n in (10, 100, 10**6)] == [1, 2, 10]
    assert Spread.of(np.zeros(0)) is None
    assert Spread.of(np.arange(5.0)).upper_quartile == 3


@pytest.fixture
def memorized():
    """Faces that a small diffusion model learned by heart, beside the shared data sets."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("LCMEM_DATA", beside)).parent / "memorized"
    if not root.is_dir():
        pytest.skip("the memorised faces are not on this machine (LCMEM_DATA)")
    return root


@pytest.mark.parametrize("name", ["joint", "ncc"])
def test_copies_of_a_real_generator_are_flagged_and_fresh_faces_are_not(memorized, name):
    with (memorized / "truth.csv").open(newline="") as file:
        truth = {row["name"]: row["copy"] for row in csv.DictReader(file)}
    detector = load_detector(name, input_size=64)
    options = {"held_out": memorized / "heldout", "fpr": 0.01, "detector": detector}
    generated = audit(memorized / "generated", memorized / "train", **options)
    flagged = {match.query for match in generated.flagged}
    copies = {name for name, copy in truth.items() if copy == "yes"}
    assert flagged >= copies and len(copies) == 9
    assert not flagged & {name for name, copy in truth.items() if copy == "no"}
    fresh = audit(memorized / "fresh", memorized / "train", **options)
    assert fresh.num_flagged <= binom.ppf(0.999, 60, 0.01)


def test_an_approximate_search_states_its_recall(sets):
    pytest.importorskip("faiss", reason="needs the extra [search]")
    network = LCMemDetector(small_network(), name="net")
    options = {"detector": network, "verify": False, "sensitivity": 0}
    exact = run(sets, **options)
    rough = run(sets, **options, approximate=True)
    assert any("approximate" in warning and "100.0%" in warning for warning in rough.warnings)
    assert rough.matches == exact.matches  # 40 images are one cell of the inverted file
    with pytest.raises(InputError, match="--approximate has no effect"):
        run(sets, approximate=True)


def test_the_copying_statistic_has_its_own_null():
    """A mean over cells has a standard deviation far below 1: copies hide within ±3 of it."""
    rng = np.random.default_rng(0)
    cells = np.repeat(np.arange(7), 60)
    null = rng.normal(0, 1, len(cells))
    found = [
        copying_statistic(rng.normal(0, 1, len(cells)), null, cells, cells, seed=n)
        for n in range(40)
    ]
    spread = np.std([item.value for item in found])
    assert spread < 0.6
    assert 0.6 < np.std([item.z for item in found]) < 1.5
    copied = rng.normal(0, 1, len(cells))
    copied[::5] = 6.0
    hidden = copying_statistic(copied, null, cells, cells)
    assert -3 < hidden.value < -1 and hidden.z < -3 and hidden.p_value == 1 / 1000
    flat = copying_statistic(np.ones(60), np.ones(60), cells[:60], cells[:60])
    assert flat.z is None and flat.p_value == 1.0
