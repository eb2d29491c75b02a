"""A guard says of each image what an audit says of it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from audit_images import SmallCorrelation, altered, picture, save_all, small_network
from PIL import Image, ImageOps
from test_docs import ROOT, fences

from lcmem_cli import FlaggedShare, Guard, audit, load_detector, log_flagged_share
from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.indexing import add_to_index
from lcmem_cli.engine.models.checkpoint import save_checkpoint
from lcmem_cli.engine.store.index import Index


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """30 scenes in training, 25 held out; generated: 4 fresh, 3 altered, 1 file and 1 PNG copy."""
    root = tmp_path_factory.mktemp("guard")
    for name, seeds in (("training", range(30)), ("real", range(100, 125))):
        (root / name).mkdir()
        for seed in seeds:
            draw_scene(seed, side=72).save(root / name / f"{seed:03}.png")
    generated = root / "generated"
    generated.mkdir()
    for seed in range(200, 204):
        draw_scene(seed, side=72).save(generated / f"fresh-{seed}.png")
    ImageOps.mirror(draw_scene(3, side=72)).save(generated / "mirrored.png")
    draw_scene(4, side=72).crop((4, 4, 64, 66)).save(generated / "cropped.png")
    draw_scene(5, side=72).convert("L").save(generated / "grey.png")
    (generated / "same-file.png").write_bytes((root / "training" / "006.png").read_bytes())
    draw_scene(7, side=72).save(generated / "same-pixels.png", compress_level=0)
    return root


def as_judged(match):
    """Return what an audit and a guard both tell of an image, but its name."""
    fields = ("rank", "match", "match_id", "p_value", "flagged", "exact", "tier")
    told = {field: getattr(match, field) for field in fields}
    return told | {"edit": match.edit, "score": pytest.approx(match.score, abs=1e-5)}


@pytest.fixture(scope="module")
def finished(sets):
    """A verified audit: its result, and its folder."""
    result = audit(
        sets / "generated", sets / "training", held_out=sets / "real", fpr=0.1,
        sensitivity=0, output=sets / "audit",
    )  # fmt: skip
    return result, sets / "audit"


def best_of(result):
    return [match for match in result.matches if match.rank == 1]


def check_equal(result, verdicts):
    assert list(map(as_judged, verdicts)) == list(map(as_judged, best_of(result)))


def test_a_verdict_is_that_of_the_audit(finished, sets):
    result, folder = finished
    guard = Guard.from_audit(folder)
    assert guard.verified and 4 <= result.num_flagged < len(best_of(result))
    verdicts = guard.check(sets / "generated" / match.query for match in best_of(result))
    check_equal(result, verdicts)
    tiers = {verdict.tier for verdict in verdicts}
    assert {"identical file", "same pixels", "same picture, altered", None} <= tiers
    assert any("mirrored" in verdict.edit for verdict in verdicts)
    assert all(load_image(verdict.file).size == (72, 72) for verdict in verdicts)


def test_a_verdict_without_verification_over_a_part_of_the_training_set(sets, tmp_path):
    result = audit(
        sets / "generated", sets / "training", null="split", fpr=0.2, detector="phash",
        sensitivity=0, output=tmp_path / "a",
    )  # fmt: skip
    assert result.null.num_not_searched and result.num_flagged
    guard = Guard.from_audit(tmp_path / "a")
    check_equal(result, guard.check(sets / "generated" / m.query for m in best_of(result)))


def test_images_in_memory_are_judged_as_their_files(finished, sets):
    guard = Guard.from_audit(finished[1])
    paths = sorted((sets / "generated").iterdir())
    expected = guard.check(paths)
    images = [load_image(path) for path in paths]
    for number, (verdict, known) in enumerate(zip(guard.check(images), expected, strict=True)):
        assert verdict.query == str(number) and verdict.flagged == known.flagged
        if known.exact:  # only a file can be the same file
            assert (verdict.tier, verdict.exact) == ("same pixels", False)
        else:
            assert as_judged(verdict) == as_judged(known)
    same_size = [i for i, image in enumerate(images) if image.size == (72, 72)]
    stacked = np.stack([np.asarray(images[i]) for i in same_size])
    tensor = torch.from_numpy(np.moveaxis(stacked, -1, 1).copy()) / 127.5 - 1
    accepted = guard.accept(tensor, value_range=(-1, 1))
    assert accepted.dtype == np.bool_
    assert accepted.tolist() == [not expected[i].flagged for i in same_size]


def test_a_fitted_guard_is_that_of_the_audit_with_the_same_sets(finished, sets, tmp_path):
    result, _ = finished
    (tmp_path / "training").mkdir()
    for path in (sets / "training").iterdir():
        (tmp_path / "training" / path.name).write_bytes(path.read_bytes())
    add_to_index(tmp_path / "training", tmp_path / "index", load_detector("joint"))
    guard = Guard.fit(Index.open(tmp_path / "index"), sets / "real", fpr=0.1)
    threshold = pytest.approx(result.rule.threshold, abs=1e-6)  # batches of others round otherwise
    assert guard.rule.threshold == threshold and guard.comparable == result.comparable
    assert dataclasses.replace(guard.rule, threshold=result.rule.threshold) == result.rule
    assert guard.detector.fingerprint == result.fingerprint and guard.verified
    verdicts = guard.check(sets / "generated" / match.query for match in best_of(result))
    for verdict, match in zip(verdicts, best_of(result), strict=True):
        assert verdict.match.endswith(f"/{match.match}")  # an index lists absolute paths
        told = as_judged(match) | {"match": verdict.match, "match_id": verdict.match_id}
        assert as_judged(verdict) == told
    assert len(repr(guard)) < 400 and "joint" in repr(guard)
    for path in (tmp_path / "training").iterdir():
        path.unlink()
    gone = guard.check(sets / "generated" / "mirrored.png")  # in memory: its candidates' keypoints
    assert gone[0].flagged and "mirrored" in gone[0].edit


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A guard that is quick to ask: a correlation of few pixels, not verified."""
    root = tmp_path_factory.mktemp("small")
    save_all(root / "training", range(12))
    save_all(root / "real", range(50, 80))
    return Guard.fit(root / "training", root / "real", fpr=0.1, detector=SmallCorrelation())


def test_a_blank_image_is_not_judged(small):
    verdicts = small.check([Image.new("RGB", (9, 9), "red"), picture(0), Image.new("L", (8, 8))])
    assert [verdict.is_blank for verdict in verdicts] == [True, False, True]
    assert [verdict.flagged for verdict in verdicts] == [False, True, False]
    assert [verdict.query for verdict in verdicts] == ["0", "1", "2"]
    assert (verdicts[0].p_value, verdicts[0].match) == (1, "")
    assert small.check([]) == [] and small.accept([]).shape == (0,)


def test_what_an_audit_no_longer_stands_on_is_refused(tmp_path):
    save_all(tmp_path / "training", range(12))
    save_all(tmp_path / "real", range(50, 80))
    save_all(tmp_path / "generated", range(90, 93))
    options = {"held_out": tmp_path / "real", "fpr": 0.1, "detector": "ncc", "input_size": 16}
    sets = (tmp_path / "generated", tmp_path / "training")
    audit(*sets, output=tmp_path / "fdr", bh=True, **options)
    with pytest.raises(InputError, match="no threshold for single images"):
        Guard.from_audit(tmp_path / "fdr")
    audit(*sets, output=tmp_path / "fpr", **options)
    assert Guard.from_audit(tmp_path / "fpr").check(picture(3))[0].flagged
    (tmp_path / "training" / "00003.png").unlink()
    with pytest.raises(InputError, match="are others than the audit's; run the audit again"):
        Guard.from_audit(tmp_path / "fpr")
    with pytest.raises(InputError, match=r"no audit\.json here"):
        Guard.from_audit(tmp_path / "training")


def test_files_that_are_gone_cannot_be_verified(tmp_path):
    save_checkpoint(tmp_path / "small.safetensors", small_network())
    name = f"lcmem:{tmp_path / 'small.safetensors'}"
    for folder, seeds in (("training", range(8)), ("real", range(50, 62)), ("generated", [90])):
        save_all(tmp_path / folder, seeds)
    add_to_index(tmp_path / "training", tmp_path / "index", load_detector(name))
    result = audit(
        tmp_path / "generated", tmp_path / "index", held_out=tmp_path / "real", fpr=0.2,
        adapt=False, sensitivity=0, output=tmp_path / "a",
    )  # fmt: skip
    assert result.verified and Guard.from_audit(tmp_path / "a").verified
    (tmp_path / "training" / "00000.png").unlink()
    with pytest.raises(InputError, match="1 files are gone"):
        Guard.from_audit(tmp_path / "a")


def test_the_metric_counts_flagged_images(small):
    metric = FlaggedShare(small)
    assert math.isnan(metric.compute())
    metric.update([picture(0), altered(picture(1)), picture(300)])
    metric.update(np.asarray(picture(301)))
    assert (metric.num_flagged, metric.num_images, metric.compute()) == (2, 4, 0.5)
    low, high = metric.interval()
    assert 0.06 < low < 0.5 < high < 0.94
    assert repr(metric) == "<FlaggedShare: 2 of 4 images>"
    metric.reset()
    assert metric.num_images == 0 and math.isnan(metric.compute())


def test_the_share_is_logged_every_so_many_steps(small):
    logged = []
    on_step = log_flagged_share(
        small,
        sample=lambda: [picture(len(logged)), picture(400)],
        log=lambda values, *, step: logged.append((step, values)),
        every=2,
    )
    for step in range(1, 6):
        on_step(step)
    assert [step for step, _ in logged] == [2, 4]
    assert logged[0][1] == {"flagged_share": 0.5, "flagged_share_by_chance": 0.1}


@pytest.fixture(scope="module")
def pipeline():
    """A real pipeline of diffusers with random weights: noise of some colours."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipeline = DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=50))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_diffusion_pipeline_samples_anew_what_it_has_memorised(pipeline, tmp_path):
    def sample(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(
            batch_size=len(generators), generator=generators, num_inference_steps=2
        ).images

    memorised = [3, 5]  # seeds whose samples are training images
    for name, seeds in (("training", [*memorised, *range(100, 118)]), ("real", range(200, 225))):
        (tmp_path / name).mkdir()
        for seed, image in zip(seeds, sample(seeds), strict=True):
            image.save(tmp_path / name / f"{seed}.png")
    guard = Guard.fit(tmp_path / "training", tmp_path / "real", fpr=0.04)
    names: dict[str, object] = {}
    for body in fences(ROOT / "docs" / "python.md", "python"):
        if "def sample_kept" in body:
            exec(
                compile(f"from PIL import Image\nfrom lcmem_cli import Guard\n{body}", "", "exec"),
                names,
            )
    asked = []

    def next_seeds(count):
        asked.append([*range(sum(map(len, asked)), sum(map(len, asked)) + count)])
        return sample(asked[-1])

    kept = names["sample_kept"](next_seeds, guard, 6)
    flagged = [v for v in guard.check(sample(range(8))) if v.flagged]
    assert {int(verdict.query) for verdict in flagged} >= set(memorised)
    assert [verdict.match for verdict in flagged[:2]] == ["3.png", "5.png"]
    assert len(kept) == 6 and asked[0] == [0, 1, 2, 3, 4, 5] and len(asked) > 1
    assert guard.accept(kept).all()
