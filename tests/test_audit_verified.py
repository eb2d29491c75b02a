"""Audits that verify: the copy is found and its edit named, and everything else stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from audit_images import small_network
from PIL import Image

from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.files import read_audit, read_best_matches
from lcmem_cli.engine.evaluation.audit.result import AuditResult
from lcmem_cli.engine.evaluation.audit.run import audit
from lcmem_cli.engine.evaluation.indexing import add_to_index, query_index
from lcmem_cli.engine.evaluation.inference import score_pairs
from lcmem_cli.engine.models.checkpoint import save_checkpoint

SIDE = 96


def planted(seed: int) -> Image.Image:
    """A scene mirrored, turned by 12 degrees and cropped."""
    scene = draw_scene(seed, side=SIDE).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = scene.resize((4 * SIDE, 4 * SIDE)).rotate(12, Image.Resampling.BICUBIC)
    margin = 4 * SIDE // 12
    return turned.crop((margin, margin, 4 * SIDE - margin, 4 * SIDE - margin)).resize((SIDE, SIDE))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 training scenes, 24 held out, 8 fresh ones and three copies as generated."""
    root = tmp_path_factory.mktemp("verified")
    for name, count, first in (("training", 10, 0), ("held-out", 24, 100), ("generated", 8, 200)):
        (root / name).mkdir()
        for number in range(count):
            draw_scene(first + number, side=SIDE).save(root / name / f"{number:03d}.png")
    planted(3).save(root / "generated" / "edited.png")
    draw_scene(4, side=SIDE).save(root / "generated" / "pixels.png", compress_level=1)
    shutil.copy(root / "training" / "005.png", root / "generated" / "file.png")
    save_checkpoint(root / "net.safetensors", small_network())
    return root


def run(root: Path, **options: object) -> AuditResult:
    given = {"held_out": root / "held-out", "fpr": 0.05, "adapt": False, "cache": False}
    given["sensitivity"] = 0
    given["detector"] = LCMemDetector.load(str(root / "net.safetensors"))
    return audit(root / "generated", root / "training", **given | options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def verified(sets: Path) -> AuditResult:
    return run(sets, output=sets / "audit")


def test_the_edit_of_a_planted_copy_is_named_by_the_command(sets, tmp_path, run_cli):
    shown = run_cli(
        "audit", sets / "generated", "--against", sets / "training", "--held-out",
        sets / "held-out", "--fpr", "0.05", "--no-adapt", "--detector",
        f"lcmem:{sets / 'net.safetensors'}", "--sensitivity", "0", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    document = json.loads(shown.stdout)
    match = next(item for item in document["flagged"] if item["query"] == "edited.png")
    assert match["match"] == "003.png" and match["tier"] == "same picture, altered"
    assert match["edit"].startswith("mirrored, turned by 12 degrees, ")
    assert match["evidence"]["mirrored"] and match["evidence"]["turn"] == pytest.approx(12, abs=2)
    assert 0.3 < match["evidence"]["share_of_training"] < 0.75
    assert "verify = true" in (tmp_path / "out" / "config.toml").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "laid over the training image" in page and "mirrored, turned by 12 degrees" in page
    kept = run_cli("filter", tmp_path / "out", "-o", tmp_path / "kept")
    assert "rejected" in kept.stdout
    rejected = (tmp_path / "kept" / "reject.csv").read_text()
    assert ',"same picture, altered","mirrored, turned by 12 degrees' in rejected
    pair = sets / "generated" / "edited.png", sets / "training" / "003.png"
    said = run_cli("infer", *pair, "--audit", tmp_path / "out", "--save", tmp_path / "pair.png")
    assert "MATCH" in said.stdout
    assert "the same picture: mirrored, turned by 12 degrees" in said.stdout
    with Image.open(tmp_path / "pair.png") as drawn:
        assert drawn.width > 4 * 320  # four panels


def test_each_tier_is_counted_and_the_rate_holds(verified):
    tiers = {match.query: match.tier for match in verified.flagged}
    assert tiers["file.png"] == "identical file"
    assert tiers["pixels.png"] == "same pixels"
    assert tiers["edited.png"] == "same picture, altered"
    assert (verified.num_exact_copies, verified.num_same_pixels, verified.num_altered) == (1, 1, 1)
    assert verified.num_alike == verified.num_flagged - 3 <= 2
    assert "1 generated image shows the same picture as a training image, altered." in (
        verified.verdict
    )


def test_the_tables_hold_the_edit(sets, verified):
    best = {m.query: m for m in read_best_matches(sets / "audit", read_audit(sets / "audit"))}
    for match in verified.flagged:
        assert best[match.query] == match
    lines = (sets / "audit" / "matches.csv").read_text().splitlines()
    row = next(line for line in lines if line.startswith("edited.png,1,"))
    assert ',true,true,"mirrored, turned by 12 degrees' in row


def test_without_verification_scores_are_the_network_s(sets):
    plain = run(sets, verify=False, top_k=3)
    detector = LCMemDetector.load(str(sets / "net.safetensors"))
    assert not plain.verified and plain.num_altered is None
    for match in plain.matches[:6]:
        pair = sets / "generated" / match.query, sets / "training" / match.match
        assert match.score == pytest.approx(detector.score(*pair), abs=1e-6)
        assert match.evidence is None
    assert any("candidates were not aligned" in line for line in plain.does_not_show)


def test_batches_threads_and_leave_one_out(sets, verified):
    again = run(sets, batch_size=3, workers=3)
    for before, after in zip(verified.matches, again.matches, strict=True):
        assert (before.query, before.match, before.flagged) == (
            after.query, after.match, after.flagged
        )  # fmt: skip
        assert before.evidence == after.evidence
        assert after.score == pytest.approx(before.score, abs=1e-6)
    alone = run(sets, held_out=None, fpr=0.2)
    assert alone.null.num_scores == 10
    assert {m.query for m in alone.flagged} >= {"edited.png", "pixels.png", "file.png"}


def test_altered_copies_among_the_real_are_told_or_leave_the_null(
    sets, verified, tmp_path, monkeypatch
):
    shutil.copytree(sets / "held-out", tmp_path / "held-out")
    draw_scene(7, side=SIDE).save(tmp_path / "held-out" / "leaked.jpg", quality=95)
    told = run(sets, held_out=tmp_path / "held-out")
    assert any("but compared with: " in warning for warning in told.warnings)
    monkeypatch.setattr("lcmem_cli.engine.evaluation.audit.null.SURELY_SAME", 10.0)
    assert told.null.closest[0].path == "leaked.jpg" and told.null.closest[0].may_be_copy
    taken_out = run(sets, held_out=tmp_path / "held-out", output=tmp_path / "audit")
    page = (tmp_path / "audit" / "report.html").read_text()
    assert '" alt="Real image leaked.jpg">' in page[page.index("Taken out: altered copies") :]
    removed = [(item.path, item.match, item.kind) for item in taken_out.null.removed]
    assert removed == [("leaked.jpg", "007.png", "altered")]
    assert taken_out.rule.threshold == verified.rule.threshold < told.rule.threshold


def test_an_index_is_verified_only_while_its_files_are_there(sets, tmp_path):
    shutil.copytree(sets / "training", tmp_path / "training")
    detector = LCMemDetector.load(str(sets / "net.safetensors"))
    add_to_index(tmp_path / "training", tmp_path / "index", detector)
    asked = query_index(tmp_path / "index", sets / "generated" / "edited.png", detector, top_k=2)
    (matches,) = asked.matches.values()
    assert Path(matches[0].path).name == "003.png"
    assert matches[0].edit.startswith("mirrored, turned by 12 degrees")
    (tmp_path / "training" / "000.png").unlink()
    options = {"held_out": sets / "held-out", "fpr": 0.05, "adapt": False, "cache": False}
    result = audit(sets / "generated", tmp_path / "index", **options)
    assert not result.verified
    with pytest.raises(InputError, match="1 files are not where their index found them"):
        audit(sets / "generated", tmp_path / "index", verify=True, **options)
    with pytest.raises(InputError, match="not on the scale of probabilities"):
        run(sets, detector="ncc", verify=True)
    plain = run(sets, detector="ncc", input_size=32)
    reason = "candidates were not aligned, as scores of ncc are no probabilities"
    assert not plain.verified and any(reason in line for line in plain.does_not_show)


def test_an_index_with_keypoints_is_verified_as_its_images_are(sets, tmp_path, run_cli):
    images, index = tmp_path / "training", tmp_path / "index"
    shutil.copytree(sets / "training", images)
    name = f"lcmem:{sets / 'net.safetensors'}"
    detector = LCMemDetector.load(str(sets / "net.safetensors"))
    add_to_index(images, index, detector)  # none at first: they are added to what is there
    built = run_cli("index", "build", images, "--detector", name, "--keypoints", "-o", index)
    assert "keypoints: 70,790 bytes for each distinct image, 707,900 in all" in built.stdout
    (tmp_path / "more").mkdir()
    draw_scene(300, side=SIDE).save(tmp_path / "more" / "more.png")
    added = add_to_index(tmp_path / "more", index, detector)  # kept up without being asked for
    assert added.keypoint_bytes == 70_790

    def answers() -> tuple[object, ...]:
        options = {"held_out": sets / "held-out", "fpr": 0.05, "adapt": False, "cache": False}
        result = audit(sets / "generated", index, **options)
        asked = query_index(index, sets / "generated", detector, top_k=2)
        assert result.verified
        verified = [(m.query, m.match, m.score, m.evidence, m.flagged) for m in result.matches]
        return verified, result.rule, asked.matches  # equal pixels are told by files alone

    with_images = answers()
    assert '"keypoints": true' in run_cli("index", "check", index, "--json").stdout
    for folder in (images, tmp_path / "more"):
        shutil.rmtree(folder)
    assert answers() == with_images
    for file in (index / "keypoints").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    damaged = run_cli("index", "check", index, exit_code=1)
    assert "images are damaged or missing" in damaged.stderr


def test_pairs_tell_the_same_picture_from_another(sets):
    detector = LCMemDetector.load(str(sets / "net.safetensors"))
    copy, other = sets / "generated" / "edited.png", sets / "generated" / "000.png"
    training = sets / "training" / "003.png"
    result = score_pairs(detector, [(copy, training), (other, training)])
    assert [bool(pair.same_picture) for pair in result.pairs] == [True, False]
    assert result.pairs[0].match and "mirrored" in result.to_dict()["pairs"][0]["edit"]
    plain = score_pairs(detector, [(copy, training)], verify=False)
    assert plain.pairs[0].evidence is None and not plain.verified
