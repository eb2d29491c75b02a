"""The joint detector: the larger of network and correlation, exactly searched."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit, logit

from lcmem_cli import audit, load_detector
from lcmem_cli.engine.data.images import to_tensor
from lcmem_cli.engine.data.perturb import perturb
from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.detectors import adapted as adapting
from lcmem_cli.engine.detectors.base import resize_batch
from lcmem_cli.engine.detectors.joint import (
    LUMINANCE,
    RISE,
    SCALE,
    correlation_scores,
)
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.indexing import add_to_index
from lcmem_cli.engine.store import search
from lcmem_cli.engine.store.steps import NUM_STEPS, in_steps


@pytest.fixture(scope="module")
def joint():
    return load_detector("joint", device="cpu")


@pytest.fixture(scope="module")
def scenes(joint):
    side = joint.input_size
    return torch.stack([to_tensor(draw_scene(seed, side=side), side) for seed in range(6)])


def test_the_score_is_the_larger_of_both_parts(joint, scenes):
    network = load_detector("lcmem", device="cpu")
    features = joint.embed(scenes)
    scores = joint.score_matrix(features, features)
    expected = network.score_matrix(network.embed(scenes), network.embed(scenes))
    small = torch.nn.functional.interpolate(
        scenes, size=(32, 32), mode="bilinear", antialias=True, align_corners=False
    )
    grey = small.mean(dim=1).flatten(1).numpy()
    fisher = np.arctanh(np.corrcoef(grey).clip(-1, 1 - 1e-9))
    hard = np.maximum(SCALE.hard_slope * fisher + SCALE.hard_offset, SCALE.plateau + RISE * fisher)
    expected = np.maximum(expected, expit(np.minimum(SCALE.slope * fisher + SCALE.offset, hard)))
    off = ~np.eye(len(scenes), dtype=bool)
    np.testing.assert_allclose(
        joint.score_matrix(features, features)[off], expected[off], rtol=1e-4
    )
    assert (joint.score_matrix(features, features).diagonal() > 0.999).all()
    a, b = np.nonzero(off)
    np.testing.assert_allclose(
        joint.score_features(features[a], features[b]), scores[a, b], atol=1e-9
    )


def test_the_scale_of_correlation_rises_everywhere():
    scores = correlation_scores(np.linspace(-1, 1, 2001))
    assert (np.diff(scores) > 0).all() and 0 < scores[0] and scores[-1] <= 1
    assert logit(correlation_scores(np.tanh(1.7))) == pytest.approx(SCALE.plateau, abs=0.03)


def test_either_part_alone_finds_its_kind_of_copy(joint, scenes):
    noisy = torch.stack([perturb(scenes[0], "Noise", 0.3, seed=1)])
    turned = torch.stack([perturb(scenes[1], "HorizontalFlip", 1.0)])
    bank = joint.embed(scenes)
    for copy, source in ((noisy, 0), (turned, 1)):
        found = joint.top_k(joint.embed(copy), bank, 1)
        assert found.rows[0, 0] == source and logit(found.scores[0, 0]) > 1


@pytest.mark.parametrize("k", [1, 3, 40, 90])
def test_the_search_equals_the_sorted_matrix(joint, k):
    generator = np.random.default_rng(k)
    bank = generator.random((80, joint.num_features), dtype=np.float32)
    bank[:, joint.network.num_features :] -= 0.5
    bank[:, joint.network.num_features :] /= 10  # shorter than 1
    bank[40:60] = bank[:20]  # equal scores, ordered by row
    queries = bank[:25] + generator.normal(0, 0.01, (25, joint.num_features)).astype(np.float32)
    queries, bank = in_steps(queries), in_steps(bank)
    found = joint.top_k(queries, bank, k)
    matrix = np.stack([joint.score_features(np.broadcast_to(q, bank.shape), bank) for q in queries])
    order = np.argsort(-matrix, axis=1, kind="stable")[:, :k]
    assert np.array_equal(found.rows, order)
    np.testing.assert_allclose(found.scores, np.take_along_axis(matrix, order, 1), atol=1e-12)


def test_a_search_refuses_features_that_are_not_in_steps(joint):
    rows = np.zeros((3, joint.num_features), np.float32)
    with pytest.raises(InputError, match="int16 steps, not float32"):
        joint.top_k(rows, rows, 1)


def test_one_query_finds_what_it_finds_among_many(joint):
    generator = np.random.default_rng(0)
    bank = generator.uniform(0, 1, (600, joint.num_features))
    pictures = bank[:, joint.network.num_features :]
    pictures -= 0.5
    pictures[100:500] = pictures[0] + generator.normal(0, 2e-4, (400, pictures.shape[1]))
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    bank = in_steps(bank)
    many = joint.top_k(bank[:20], bank, 50)  # of the first, hundreds differ by rounding alone
    for number in range(20):
        one = joint.top_k(bank[number : number + 1], bank, 50)
        np.testing.assert_array_equal(one.rows[0], many.rows[number])
        np.testing.assert_array_equal(one.scores[0], many.scores[number])
    assert joint.top_k(bank[:0], bank, 3).rows.shape == (0, 3)


def simulated(joint, scenes, count, seed):
    """Features of each scene, moved as much as scenes differ: a crowd around each."""
    generator = np.random.default_rng(seed)
    known, width = joint.embed(scenes).astype(np.float64), joint.network.num_features
    known[:, :width] = logit(known[:, :width])
    rows = known[generator.integers(0, len(known), count)]
    rows += generator.normal(0, 0.7, rows.shape) * known.std(axis=0)
    before, pictures = rows[:, :width], rows[:, width:]
    before *= np.linalg.norm(known[0, :width]) / np.linalg.norm(before, axis=1, keepdims=True)
    before[:] = expit(before)
    pictures -= pictures.mean(axis=1, keepdims=True)
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    return in_steps(rows)


def test_rounding_moves_scores_by_less_than_stated(joint, scenes):
    """Against parts computed in double precision of features in single precision."""
    network, width = joint.network, joint.network.num_features
    rows = joint.embed(scenes)
    assert rows.nbytes <= len(scenes) * 4 * joint.num_features / 2  # half of single precision
    precise = network.embed(scenes)
    rounded = network.score_matrix(rows[:, :width], rows[:, :width])
    moved = np.abs(logit(rounded) - logit(network.score_matrix(precise, precise)))
    assert moved.max() < np.abs(network.weight).sum() / NUM_STEPS < 0.0007
    grey = torch.einsum(
        "nchw,c->nhw", resize_batch(scenes, 32).double(), torch.tensor(LUMINANCE).double()
    )
    kept = joint.pictures(rows).reshape(len(rows), -1)
    moved = np.corrcoef(kept) - np.corrcoef(grey.flatten(1).numpy())
    assert np.abs(moved).max() < 1e-4 < 32 / NUM_STEPS < 0.001


@pytest.mark.parametrize("is_adapted", [False, True])
def test_an_approximate_search_finds_most_and_scores_it_exactly(
    joint, scenes, monkeypatch, is_adapted
):
    pytest.importorskip("faiss", reason="needs the extra [search]")
    bank = simulated(joint, scenes, 6000, seed=1)
    queries = bank[:60].copy()  # copies of the one part or the other
    others = simulated(joint, scenes, 60, seed=2)
    width = joint.network.num_features
    queries[:30, width:], queries[30:, :width] = others[:30, width:], others[30:, :width]
    exact, rough = joint, joint.approximate()
    if is_adapted:
        monkeypatch.setattr(adapting, "ONE_PICTURE", 1.01)  # a crowd is no single picture
        names = [f"{number:064x}" for number in range(len(bank))]
        (exact, convert, _), (rough, _, _) = (d.adapted(bank, names) for d in (exact, rough))
        bank, queries = convert(bank), convert(queries)
    found, expected = rough.top_k(queries, bank, 4), exact.top_k(queries, bank, 4)
    is_found = found.rows[:, 0] == expected.rows[:, 0]
    assert found.recall == is_found.mean() >= 0.9 and expected.recall == 1
    for column in range(4):
        np.testing.assert_array_equal(
            found.scores[:, column], exact.score_features(queries, bank[found.rows[:, column]])
        )
    assert (np.diff(found.scores, axis=1) <= 0).all() and not joint.network.is_approximate
    monkeypatch.setattr(search, "_SHARD_ROWS", 2500)  # as of a bank that is larger by far
    in_shards = rough.top_k(queries, bank, 4)
    assert (in_shards.rows[:, 0] == expected.rows[:, 0]).mean() == in_shards.recall >= 0.9
    few = rough.top_k(queries[:3], bank[:50], 90)  # all of a small bank
    np.testing.assert_array_equal(few.rows, exact.top_k(queries[:3], bank[:50], 90).rows)


def test_images_of_one_colour_correlate_with_nothing(joint, scenes):
    flat = torch.full_like(scenes[:2], 0.3)
    flat[1] = 0.8
    features = joint.embed(torch.cat([flat, scenes[:1]]))
    assert not features[:2, joint.network.num_features :].any()
    assert np.isfinite(joint.score_matrix(features, features)).all()


def test_an_audit_takes_the_joint_detector_or_that_of_its_index(tmp_path):
    for name, seeds in (("train", range(8)), ("generated", range(4, 10)), ("real", range(20, 32))):
        (tmp_path / name).mkdir()
        for seed in seeds:
            draw_scene(seed, side=64).save(tmp_path / name / f"{seed}.png")
    result = audit(tmp_path / "generated", tmp_path / "train", held_out=tmp_path / "real", fpr=0.1)
    assert result.detector == "joint" and result.num_flagged == 4
    if find_spec("faiss"):
        sets = (tmp_path / "generated", tmp_path / "train")
        rough = audit(*sets, held_out=tmp_path / "real", fpr=0.1, approximate=True, sensitivity=0)
        assert rough.detector == "joint"
        assert any("best match of 100.0%" in text for text in rough.warnings)
        assert rough.matches == result.matches
    add_to_index(tmp_path / "train", tmp_path / "index", load_detector("phash"))
    indexed = audit(tmp_path / "generated", tmp_path / "index", held_out=tmp_path / "real", fpr=0.1)
    assert indexed.detector == "phash"


def test_the_joint_detector_takes_no_checkpoint():
    with pytest.raises(InputError, match="takes nothing after a colon"):
        load_detector("joint:some.safetensors")


def test_pictures_of_any_mode_are_embedded(joint):
    rows = joint.embed([Image.new("L", (9, 5), 80), Image.new("RGBA", (300, 20), (9, 8, 7, 0))])
    assert rows.shape == (2, joint.num_features) and rows.dtype == joint.feature_dtype == np.int16
