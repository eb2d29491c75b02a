"""Verification: planted copies are found with their edit; other pictures and blank ones are not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.perturb import TRANSFORMS, generator
from lcmem_cli.engine.files import sha256_file
from lcmem_cli.engine.store.features import FeatureCaches
from lcmem_cli.engine.store.search import TopK
from lcmem_cli.engine.verification.bank import FeatureBank, IndexKeypoints, read_bank, read_indexed
from lcmem_cli.engine.verification.candidates import PictureSearch, merged
from lcmem_cli.engine.verification.evidence import (
    SAME_PICTURE,
    Evidence,
    describe,
    find_alignments,
)
from lcmem_cli.engine.verification.features import LocalFeatures, local_features, unpacked
from lcmem_cli.engine.verification.verify import ALIGNMENT, fuse, verify


def picture(seed: int, width: int = 200, height: int = 200) -> Image.Image:
    """Draw a picture with texture at all scales and some shapes."""
    rng = np.random.default_rng(seed)
    canvas = np.zeros((height, width), np.float64)
    for cells in (4, 8, 16, 32, 64):
        noise = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        canvas += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / cells**0.5
    for _ in range(12):
        x, y = int(rng.integers(width - 40)), int(rng.integers(height - 40))
        canvas[y : y + int(rng.integers(8, 40)), x : x + int(rng.integers(8, 40))] += rng.normal()
    canvas -= canvas.min()
    return Image.fromarray(np.uint8(255 * canvas / canvas.max())).convert("RGB")


def edited(image: Image.Image, *steps: tuple[str, float]) -> Image.Image:
    """Apply edits of the robustness suite one after another."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    rng = generator(3)
    for name, strength in steps:
        pixels = TRANSFORMS[name].apply(pixels, strength, rng).clamp(0, 1)
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def evidence(query: Image.Image, training: Image.Image) -> Evidence:
    """Align two pictures of which an alignment must be found."""
    found = find_alignments(local_features(query), [local_features(training)])[0]
    assert found is not None
    return describe(found)


def test_a_copy_in_place() -> None:
    result = evidence(picture(1), picture(1))
    assert result.same_picture and not result.mirrored
    assert abs(result.turn) < 0.5 and result.scale == pytest.approx(1, abs=0.01)
    assert result.share_of_training > 0.97 and result.correlation > 0.99
    assert result.text() == "in place"


@pytest.mark.parametrize(
    ("name", "strength", "text"),
    [
        ("GaussianBlur", 2.0, "in place, blurred"),
        ("Brightness", 1.15, "in place, brighter"),
        ("Brightness", 0.6, "in place, darker, less contrast"),
        ("Contrast", 1.5, "in place, more contrast"),
        ("Noise", 0.2, "in place, noise or sharpened"),
        ("JPEGCompression", 60.0, "in place"),
        ("HorizontalFlip", 1.0, "mirrored"),
    ],
)
def test_altered_grey_values_are_named(name: str, strength: float, text: str) -> None:
    image = picture(1)
    dim = image.point(lambda value: value * 0.7)  # so that none is clipped
    assert evidence(edited(dim, (name, strength)), dim).text() == text


def test_the_share_of_a_smooth_picture_is_not_that_of_its_texture() -> None:
    smooth = Image.linear_gradient("L").convert("RGB").resize((200, 200))
    smooth.paste(picture(1, 90, 90), (60, 60))
    crop = smooth.crop((20, 20, 180, 180)).resize((200, 200))
    assert evidence(crop, smooth).share_of_training == pytest.approx(0.64, abs=0.05)


@pytest.mark.parametrize("degrees", [12.0, -30.0, 90.0, 180.0])
@pytest.mark.parametrize("mirrored", [False, True])
def test_turns_and_mirroring_are_named(degrees: float, mirrored: bool) -> None:
    steps = [("HorizontalFlip", 1.0)] * mirrored + [("Rotation", degrees)]
    result = evidence(edited(picture(2), *steps), picture(2))
    assert result.same_picture and result.mirrored is mirrored
    assert abs((result.turn - degrees + 180) % 360 - 180) < 1
    assert ("mirrored" in result.text()) is mirrored
    assert f"turned by {degrees:.0f} degrees" in result.text().replace("-180", "180")


def test_a_mirrored_turned_crop_has_its_share_and_outline() -> None:
    image = picture(3)
    box = (30, 50, 30 + 150, 50 + 150)
    turned = image.crop(box).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((200, 200))
    result = evidence(edited(turned, ("Rotation", 10.0)), image)
    assert result.same_picture and result.mirrored
    assert result.turn == pytest.approx(10, abs=1)
    assert result.share_of_training == pytest.approx(0.75**2, abs=0.1)
    assert result.scale == pytest.approx(200 / 150, rel=0.03)
    places = np.array(result.outline)
    assert places.min() > 0.05 and places[:, 0].mean() == pytest.approx(105 / 200, abs=0.1)
    assert places[:, 1].mean() == pytest.approx(125 / 200, abs=0.1)


def test_a_training_image_pasted_into_another_picture() -> None:
    page = picture(4)
    page.paste(picture(5).resize((110, 110)), (70, 20))
    result = evidence(page, picture(5))
    assert result.same_picture
    assert result.share_of_training > 0.9
    assert result.share_of_query == pytest.approx(0.55**2, abs=0.05)
    (a, _, c), (_, e, f) = result.matrix
    assert (a, e) == pytest.approx((200 / 110, 200 / 110), rel=0.03)
    assert (c, f) == pytest.approx((-70 / 110, -20 / 110), abs=0.03)


def test_half_of_a_picture_before_another_background() -> None:
    mixed = picture(6)
    mixed.paste(picture(7).crop((0, 0, 100, 200)), (0, 0))
    result = evidence(mixed, picture(7))
    assert result.same_picture and abs(result.turn) < 1
    assert 0.4 < result.share_of_training < 0.65
    assert np.array(result.outline)[:, 0].max() < 0.7


@pytest.mark.parametrize(
    ("name", "strength"), [("Noise", 0.2), ("GaussianBlur", 6.0), ("LowResolution", 6.0)]
)
def test_small_pictures_are_found_where_keypoints_fail(name: str, strength: float) -> None:
    image = picture(8, 64, 64)
    copy, other = edited(image, (name, strength)), picture(9, 64, 64)
    candidates = [local_features(image), local_features(other)]
    found = find_alignments(local_features(copy), list(candidates))
    assert found[0] is not None
    assert found[0].value > (-np.inf if found[1] is None else found[1].value) + 2


def test_other_pictures_are_no_evidence() -> None:
    features: list[LocalFeatures | None] = [local_features(picture(seed)) for seed in range(20, 28)]
    for number, query in enumerate(features):
        assert query is not None
        others = [item for item in features if item is not query]
        values = [found.value for found in find_alignments(query, others) if found is not None]
        assert max(values, default=-np.inf) < SAME_PICTURE, number


@pytest.mark.parametrize("colour", ["black", "white", "red"])
def test_blank_pictures_are_no_evidence(colour: str) -> None:
    blank, image = Image.new("RGB", (100, 80), colour), picture(1)
    for query, training in ((blank, blank), (blank, image), (image, blank)):
        found = find_alignments(local_features(query), [local_features(training)])[0]
        assert found is None or found.value < 0


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 3), (7, 5)])
def test_tiny_and_thin_pictures_do_no_harm(size: tuple[int, int]) -> None:
    features = local_features(picture(1).resize(size))
    for query, training in ((features, features), (features, local_features(picture(1)))):
        found = find_alignments(query, [training])[0]
        assert found is None or np.isfinite(found.value)


def test_features_are_packed_without_loss() -> None:
    features = local_features(picture(1, 200, 120))
    again = unpacked(features.packed())
    assert again is not None
    for field in dataclasses.fields(LocalFeatures):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(features, field.name))
    assert unpacked(np.zeros_like(features.packed())) is None


def test_mirrored_features_are_those_of_the_mirrored_picture() -> None:
    image = picture(1)
    mirrored = local_features(image).mirrored()
    found = find_alignments(mirrored, [local_features(image)])[0]
    assert found is not None and describe(found).mirrored
    flipped = local_features(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    np.testing.assert_array_equal(mirrored.picture, flipped.picture)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training images, two altered copies, another picture, and no picture at all."""
    path = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        picture(number).save(path / f"train{number}.png")
    edited(picture(0), ("Rotation", 20.0)).save(path / "query0.png")
    edited(picture(2), ("VerticalFlip", 1.0), ("Noise", 0.1)).save(path / "query1.png")
    picture(50).save(path / "query2.png")
    (path / "query3.png").write_bytes(b"no picture")
    return path


def banks(folder: Path, compute: Compute) -> tuple[FeatureBank, FeatureBank]:
    """Read both sets."""
    sets = []
    for name in ("query", "train"):
        files = sorted(folder.glob(f"{name}*.png"))
        sets.append(read_bank(files, [sha256_file(file) for file in files], compute))
    return sets[0], sets[1]


CANDIDATES = np.array([[0, 1, 2], [1, 2, 0], [2, 1, 0], [0, 1, 2]])


def test_verify_finds_the_source(folder: Path) -> None:
    found = verify(*banks(folder, Compute()), CANDIDATES)
    assert found.values.shape == (4, 3)
    assert list(CANDIDATES[[0, 1], found.values[:2].argmax(axis=1)]) == [0, 2]
    assert (found.values[:2].max(axis=1) > SAME_PICTURE).all()
    assert (found.values[2] < SAME_PICTURE).all()
    assert found.found.nbytes == 12 * ALIGNMENT.itemsize <= 12 * 160
    assert (found.values[3] == -np.inf).all() and found.evidence(3, 0) is None
    first = found.evidence(0, 0)
    assert first is not None and first.turn == pytest.approx(20, abs=1)


def test_threads_cache_and_order_change_nothing(folder: Path, tmp_path: Path) -> None:
    expected = verify(*banks(folder, Compute(workers=0)), CANDIDATES, Compute(workers=0)).values
    for workers in (1, 4):
        for _ in range(2):  # the second time from the cache
            compute = Compute(workers=workers, cache=FeatureCaches(tmp_path))
            values = verify(*banks(folder, compute), CANDIDATES, compute).values
            np.testing.assert_array_equal(values, expected)
    turned = verify(*banks(folder, Compute()), CANDIDATES[:, ::-1], Compute(workers=3)).values
    np.testing.assert_array_equal(turned[:, ::-1], expected)
    queries, training = banks(folder, Compute())
    for number, row in enumerate(expected):  # of a single query threads share the candidates
        alone = FeatureBank(queries.rows[number : number + 1])
        found = verify(alone, training, CANDIDATES[number : number + 1], Compute(workers=3))
        np.testing.assert_array_equal(found.values[0], row)


def test_a_bank_of_some_images_reads_only_these(folder: Path) -> None:
    files = [folder / "train2.png", folder / "train0.png"]
    bank = read_bank(files, [sha256_file(file) for file in files]).numbered([2, 0])
    assert len(bank.rows) == 2 and bank[2] is not None
    expected = local_features(Image.open(files[0]))
    np.testing.assert_array_equal(bank[2].descriptors, expected.descriptors)


def test_a_replaced_file_has_no_features_and_none_are_kept(folder: Path, tmp_path: Path) -> None:
    file = folder / "train0.png"
    before, original = sha256_file(file), file.read_bytes()
    file.write_bytes((folder / "train2.png").read_bytes())
    compute = Compute(cache=FeatureCaches(tmp_path))
    assert read_bank([file], [before], compute)[0] is None
    file.write_bytes(original)
    again = read_bank([file], [before], Compute(cache=FeatureCaches(tmp_path)))[0]
    assert again is not None
    expected = local_features(Image.open(file))
    np.testing.assert_array_equal(again.descriptors, expected.descriptors)


def test_an_index_has_features_of_what_it_found_and_of_no_other_content(
    folder: Path, tmp_path: Path
) -> None:
    files = [folder / "train0.png", folder / "train2.png", folder / "train1.png"]
    hashes = [sha256_file(file) for file in files]
    compute = Compute(cache=FeatureCaches(tmp_path / "cache"))
    (tmp_path / "index").mkdir()
    before = read_indexed(tmp_path / "index", files, hashes, compute)
    files[0].write_bytes(files[1].read_bytes())
    files[2].unlink()
    after = read_indexed(tmp_path / "index", files, hashes, compute)  # in a warm cache too
    assert after[0] is None and after[1] is not None and after[2] is None
    keypoints = IndexKeypoints(tmp_path / "index")
    keypoints.keep(files[1:2], hashes[1:2])
    keypoints.store.put_many([hashes[0], hashes[2]], before.rows[[0, 2]])
    kept = read_indexed(tmp_path / "index", files, hashes)
    assert kept[0] is None  # another content lies there
    np.testing.assert_array_equal(kept.rows[1:], before.rows[1:])


def test_fused_scores_keep_the_larger() -> None:
    scores = np.array([[0.3, 0.9, 0.2]])
    fused = fuse(scores, np.array([[-np.inf, -5.0, 9.0]]))
    assert fused[0, 0] == 0.3 and fused[0, 1] == 0.9 and fused[0, 2] > 0.95


def grey(image: Image.Image) -> np.ndarray:
    """Shrink as a detector does."""
    return np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float64)


def search_of(groups: np.ndarray | None = None) -> PictureSearch:
    """Search 40 pictures by picture."""
    bank = np.stack([grey(picture(seed)) for seed in range(40)])
    return PictureSearch(lambda rows: bank[rows], len(bank), groups)


TURNED = [("Rotation", 20.0), ("Rotation", 90.0), ("HorizontalFlip", 1.0), ("Combination", 1.5)]


def test_turned_and_mirrored_copies_are_candidates_by_picture() -> None:
    copies = np.stack([grey(edited(picture(n), step)) for n, step in enumerate(TURNED)])
    search = search_of()
    found = search.nearest(copies, 3)
    assert found.rows[:, 0].tolist() == [0, 1, 2, 3]
    assert (found.scores == np.rint(found.scores)).all()  # whole: the same in any order
    for number in range(len(copies)):
        alone = search.nearest(copies[number : number + 1], 3)
        np.testing.assert_array_equal(alone.rows[0], found.rows[number])


def test_candidates_by_picture_are_never_of_the_own_identity() -> None:
    groups = np.arange(40) // 2
    bank = np.stack([grey(picture(seed)) for seed in range(40)])
    found = search_of(groups).nearest(bank, 39, groups)
    usable = np.isfinite(found.scores)
    assert usable.sum(axis=1).tolist() == [38] * 40
    assert not (groups[found.rows] == groups[:, None])[usable].any()


def test_candidates_by_score_and_picture_take_turns() -> None:
    by_score = np.array([[9, 8, 7, 6, 5, 4, 3], [2, 1, -1, -1, -1, -1, -1]])
    scores = np.array([[5.0, 4, 3, 2, -np.inf], [5.0, 4, 3, 2, 1]])
    by_picture = TopK(scores, np.array([[8, 1, 4, 2, 7], [1, 2, 3, 4, 5]]))
    mixed = merged(by_score, by_picture, 6)
    assert mixed[0].tolist() == [9, 1, 8, 4, 7, 2, 6]  # 8 is known, so 1 is the best new one
    assert mixed[1].tolist() == by_score[1].tolist()  # it has all there are
