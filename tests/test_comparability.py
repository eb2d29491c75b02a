"""Sets that differ are told apart, halves of one set are not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFilter

from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.evaluation.comparability import Sample, compare_sets


def sample(features, groups=None, files=None, known=True):
    groups = np.arange(len(features)) if groups is None else np.asarray(groups)
    return Sample(
        features=features,
        rows=np.arange(len(features)),
        groups=groups if known else None,
        files=files or [Path("missing")] * len(features),
    )


def normal(count, shift=0.0, seed=0, width=40):
    return np.random.default_rng(seed).normal(shift, 1, (count, width))


def test_halves_of_one_source_are_comparable_in_nearly_all_draws():
    verdicts = [
        compare_sets(sample(normal(80, seed=2 * n)), sample(normal(60, seed=2 * n + 1)), seed=n)
        for n in range(60)
    ]
    assert sum(v.comparable is True for v in verdicts) >= 57
    assert 0.45 < np.mean([v.auc for v in verdicts]) < 0.55


def test_a_shifted_source_is_told_apart():
    found = compare_sets(sample(normal(80)), sample(normal(80, 0.5, seed=1)))
    assert found.comparable is False and found.auc > 0.9 and found.p_value == 1 / 200


def test_many_pictures_of_few_identities_are_no_evidence():
    """Ten faces, ten pictures each: each face is told, their sources are not."""
    rng = np.random.default_rng(0)
    faces = [np.repeat(rng.normal(size=(25, 40)) * 3, 4, axis=0) for _ in range(2)]
    groups = np.repeat(np.arange(25), 4)
    found = compare_sets(*(sample(f + rng.normal(size=f.shape), groups) for f in faces))
    assert found.num_identities == (25, 25) and found.comparable is True
    few = compare_sets(*(sample(f[:40], groups[:40]) for f in faces))
    assert few.comparable is None and few.auc is None and few.num_identities == (10, 10)


def test_pictures_of_few_unknown_identities_are_left_out_together():
    """Without ids a classifier would know faces again; clusters of alike pictures prevent it."""
    verdicts = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        many = rng.normal(size=(30, 40)) * 3
        few = np.repeat(rng.normal(size=(10, 40)) * 3, 10, axis=0)
        few += rng.normal(size=few.shape)
        verdicts.append(compare_sets(sample(few, known=False), sample(many, known=False)))
    assert sum(found.comparable is True for found in verdicts) >= 11
    # Each picture for itself, as if ten of one face were independent:
    told = compare_sets(sample(few), sample(many))
    assert told.comparable is False
    shifted = compare_sets(sample(few + 3, known=False), sample(many, known=False))
    assert shifted.comparable is False


def test_the_result_is_the_same_for_the_same_seed():
    sets = sample(normal(50)), sample(normal(50, 0.2, seed=1))
    assert compare_sets(*sets, seed=3) == compare_sets(*sets, seed=3)


@pytest.mark.parametrize(
    ("change", "suffix", "named"),
    [
        (lambda image: image.resize((32, 32)), "png", {"width", "height"}),
        (lambda image: image.filter(ImageFilter.GaussianBlur(4)), "png", {"sharpness"}),
        (lambda image: image.convert("L"), "png", {"colourfulness"}),
    ],
)
def test_what_differs_is_named(change, suffix, named, tmp_path):
    files = []
    for kind in ("first", "second"):
        (tmp_path / kind).mkdir()
        for number in range(24):
            image = draw_scene(number + 100 * (kind == "second"))
            image = change(image) if kind == "second" else image
            image.save(tmp_path / kind / f"{number}.{suffix}")
        files.append(sorted((tmp_path / kind).iterdir()))
    found = compare_sets(
        sample(normal(24), files=files[0]), sample(normal(24, 2.0, seed=1), files=files[1])
    )
    assert found.comparable is False
    assert named <= {text.split()[0] for text in found.differences}, found.differences


def test_jpeg_quality_is_read_from_the_tables(tmp_path):
    files = []
    for kind, quality in (("first", 95), ("second", 40)):
        (tmp_path / kind).mkdir()
        for number in range(24):
            draw_scene(number).save(tmp_path / kind / f"{number}.jpg", quality=quality)
        files.append(sorted((tmp_path / kind).iterdir()))
    found = compare_sets(
        sample(normal(24), files=files[0]), sample(normal(24, 2.0, seed=1), files=files[1])
    )
    (text,) = [text for text in found.differences if text.startswith("JPEG quality")]
    first, second = (float(word) for word in text.removeprefix("JPEG quality ").split(" against "))
    assert first == pytest.approx(95, abs=1) and second == pytest.approx(40, abs=1)


def test_files_that_cannot_be_read_are_no_trait(tmp_path):
    for number in range(48):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    files = sorted(tmp_path.iterdir())
    found = compare_sets(
        sample(normal(24), files=files[:24]), sample(normal(24, 2.0, seed=1), files=files[24:])
    )
    assert found.comparable is False and found.differences == ()
