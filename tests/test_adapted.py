"""Detectors adapted to one kind of images by unlabelled images of it."""

import shutil
from functools import partial

import numpy as np
import pytest
from conftest import draw_identity, random_checkpoint
from scipy.linalg import fractional_matrix_power
from scipy.special import expit, logit

from lcmem_cli import audit as whole_audit
from lcmem_cli import load_detector
from lcmem_cli.engine.data.manifest import load_manifest, write_manifest
from lcmem_cli.engine.data.reading import content_hash
from lcmem_cli.engine.detectors import adapted as module
from lcmem_cli.engine.detectors.joint import ADAPTED_SCALE, JointDetector, correlation_scores
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.errors import InputError, NotAdaptableError
from lcmem_cli.engine.evaluation.audit.detector import detector_of
from lcmem_cli.engine.evaluation.inference import score_pairs
from lcmem_cli.engine.models.checkpoint import save_checkpoint
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.siamese import NetworkSpec
from lcmem_cli.engine.store.steps import from_steps, in_steps

WIDTH, LENGTH = 16, 6.0
audit = partial(whole_audit, verify=False, sensitivity=0)  # of which nothing is asked here


def make(feature_rms=1.5):
    spec = NetworkSpec(
        backbone="test_resnet", in_channels=3, num_features=WIDTH, input_size=32,
        normalisation="sample", feature_rms=feature_rms,
    )  # fmt: skip
    checkpoint = random_checkpoint(spec, load_codec("none"), image_size=32)
    return LCMemDetector(checkpoint, name="net", device="cpu")


def features_of(rows):
    """Return features as a network with ``feature_rms`` 1.5 gives them."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return expit(LENGTH * units).astype(np.float32)


def directions(features):
    rows = logit(features.astype(np.float64))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def kind(rng, count):
    """Images that share much and differ most in one direction."""
    rows = rng.normal(size=(count, WIDTH))
    rows[:, 0] += 6
    rows[:, 1] *= 5
    return features_of(rows)


@pytest.fixture
def each_counts(monkeypatch):
    """Let images count that a network with random weights takes for one picture."""
    monkeypatch.setattr(module, "ONE_PICTURE", 1.01)


@pytest.fixture
def sets(image_folder, tmp_path):
    """A generated and a training set of 24 images each, beside a held-out one."""
    for number, file in enumerate(sorted(image_folder.rglob("*.png"))):
        folder = tmp_path / ("generated", "training", "held-out")[number % 3]
        folder.mkdir(exist_ok=True)
        file.rename(folder / f"{number}.png")
    return tmp_path / "generated", tmp_path / "training"


def names(count):
    return [f"{number:064x}" for number in range(count)]


def test_the_formula_is_that_of_an_independent_implementation():
    features = kind(np.random.default_rng(0), 300)
    adaptation = module.Adaptation.fit(features, names(300), name="x")
    units = directions(features)
    weights = 1 / np.array([(units @ unit > 0.8).sum() for unit in units])
    covariance = np.cov(units, rowvar=False, aweights=weights, ddof=0)
    share = 0.1 * weights.sum() / (weights.sum() + 200)
    mixed = (1 - share) * np.eye(WIDTH) + share * covariance * WIDTH / np.trace(covariance)
    expected = (units - np.average(units, axis=0, weights=weights)) @ fractional_matrix_power(
        mixed, -0.5
    )
    expected *= LENGTH / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(adaptation(features), expit(expected), atol=1e-5)


def test_what_a_kind_shares_no_longer_counts_and_strangers_become_unlike():
    rng = np.random.default_rng(1)
    adaptation = module.Adaptation.fit(kind(rng, 200), names(200), name="x")
    others = kind(rng, 50)  # images of the kind that had no part in the fit

    def mean_likeness(rows):
        cosines = directions(rows) @ directions(rows).T
        return cosines[np.triu_indices(len(rows), 1)].mean()

    assert mean_likeness(others) > 0.3 and abs(mean_likeness(adaptation(others))) < 0.05
    spread = [np.linalg.svd(directions(f) - directions(f).mean(axis=0))[1] for f in (
        others, adaptation(others)
    )]  # fmt: skip
    assert spread[1][0] / spread[1][1] < spread[0][0] / spread[0][1]


def test_an_image_is_adapted_alike_in_any_company():
    rng = np.random.default_rng(2)
    adaptation = module.Adaptation.fit(kind(rng, 40), names(40), name="x")
    rows = kind(rng, 9)
    alone = np.concatenate([adaptation(rows[i : i + 1]) for i in range(9)])
    np.testing.assert_allclose(adaptation(rows), alone, atol=1e-6)
    lengths = np.linalg.norm(logit(alone.astype(np.float64)), axis=1)
    np.testing.assert_allclose(lengths, LENGTH, rtol=1e-4)


@pytest.mark.usefixtures("each_counts")
def test_the_order_of_the_images_makes_no_difference_but_the_images_do():
    rows = kind(np.random.default_rng(3), 30)
    order = np.random.default_rng(4).permutation(30)
    first = module.Adaptation.fit(rows, names(30), name="x")
    again = module.Adaptation.fit(rows[order], [names(30)[i] for i in order], name="x")
    assert first.fingerprint == again.fingerprint
    np.testing.assert_allclose(first.matrix, again.matrix, atol=1e-9)
    fewer = module.Adaptation.fit(rows[:29], names(29), name="x")
    assert fewer.fingerprint != first.fingerprint


def test_a_picture_stored_many_times_counts_once():
    rng = np.random.default_rng(5)
    rows = kind(rng, 40)
    plain = module.Adaptation.fit(rows, names(40), name="x")
    resaved = logit(rows[:1].astype(np.float64)) + rng.normal(scale=0.05, size=(60, WIDTH))
    more = np.concatenate([rows, features_of(resaved)])
    weights = module.picture_weights(directions(more))
    alike = module.picture_weights(directions(rows))
    assert weights.sum() == pytest.approx(alike.sum(), abs=0.5) and weights[-1] < 0.02
    again = module.Adaptation.fit(more, names(100), name="x")
    moved = (directions(plain(rows)) * directions(again(rows))).sum(axis=1)
    assert moved.min() > 0.9
    with pytest.raises(NotAdaptableError, match="1 different pictures"):
        module.Adaptation.fit(features_of(resaved), names(60), name="x")


@pytest.mark.usefixtures("each_counts")
def test_many_images_are_sampled(monkeypatch):
    monkeypatch.setattr(module, "MAX_IMAGES", 50)
    rows = kind(np.random.default_rng(6), 400)
    sampled = module.Adaptation.fit(rows, names(400), name="x")
    assert sampled.fingerprint == module.Adaptation.fit(rows, names(400), name="x").fingerprint
    chosen = np.sort(np.random.default_rng(0).choice(400, 50, replace=False))
    by_hand = module.Adaptation.fit(rows[chosen], [names(400)[i] for i in chosen], name="x")
    np.testing.assert_array_equal(sampled.matrix, by_hand.matrix)


def test_what_cannot_be_adapted_says_why():
    with pytest.raises(NotAdaptableError, match="at least 10"):
        module.Adaptation.fit(kind(np.random.default_rng(0), 9), names(9), name="x")
    free = make(feature_rms=None)
    rows = free.embed([draw_identity(number, 0) for number in range(12)])
    with pytest.raises(NotAdaptableError, match="differ in length"):
        free.adapted(rows, names(12))
    pixels = load_detector("ncc", input_size=16)
    with pytest.raises(NotAdaptableError, match="only LCMem networks, and joint"):
        pixels.adapted(np.zeros((12, pixels.num_features), np.uint8), names(12))


@pytest.mark.usefixtures("each_counts")
def test_an_adapted_detector_embeds_what_conversion_gives():
    network = make()
    images = [draw_identity(number, 0) for number in range(14)]
    rows = network.embed(images)
    detector, convert, _ = network.adapted(rows, names(14))
    np.testing.assert_allclose(detector.embed(images), convert(rows), atol=1e-6)
    assert detector.fingerprint != network.fingerprint
    scores = detector.score_matrix(convert(rows), convert(rows))
    found = detector.top_k(convert(rows), convert(rows), 1)
    np.testing.assert_array_equal(found.rows[:, 0], scores.argmax(axis=1))


@pytest.mark.usefixtures("each_counts")
def test_joint_adapts_its_network_and_keeps_its_pictures():
    network = make()
    joint = JointDetector(network)
    images = [draw_identity(number, 0) for number in range(14)]
    rows = joint.embed(images)
    detector, convert, _ = joint.adapted(rows, names(14))
    made = convert(rows)
    by_network, convert_network, _ = network.adapted(rows[:, :WIDTH], names(14))
    np.testing.assert_array_equal(made[:, :WIDTH], in_steps(convert_network(rows[:, :WIDTH])))
    np.testing.assert_array_equal(made[:, WIDTH:], rows[:, WIDTH:])
    units = from_steps(rows[:, WIDTH:])
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    pictures = correlation_scores(units @ units.T, ADAPTED_SCALE)
    expected = np.maximum(by_network.score_matrix(*(made[:, :WIDTH],) * 2), pictures)
    np.testing.assert_allclose(detector.score_matrix(made, made), expected, atol=1e-6)
    risen = correlation_scores(np.linspace(-1, 1, 2001), ADAPTED_SCALE)
    assert (np.diff(risen) > 0).all()


def test_a_name_can_ask_for_it(image_folder):
    for identity in range(16, 24):
        shutil.rmtree(image_folder / f"id{identity:02d}")
    plain = load_detector("lcmem", device="cpu")
    adapted = load_detector(f"lcmem?adapt={image_folder}", device="cpu")
    assert adapted.name == f"lcmem?adapt={image_folder}"
    again = load_detector(f"lcmem?adapt={image_folder}", device="cpu")
    assert again.fingerprint == adapted.fingerprint != plain.fingerprint
    pair = [image_folder / "id00" / "0.png", image_folder / "id01" / "0.png"]
    assert adapted.score(*pair) < plain.score(*pair)  # drawn scenes share much
    assert [t.name for t in adapted.thresholds] == ["fpr0.01", "fpr0.001", "recall0.95"]
    assert {t.fingerprint for t in adapted.thresholds} == {adapted.fingerprint}
    filelist = image_folder / "list.csv"
    write_manifest(load_manifest(image_folder), filelist)
    by_train = load_detector(f"lcmem?adapt={filelist}", device="cpu")
    assert by_train.fingerprint not in (adapted.fingerprint, plain.fingerprint)
    for path in load_manifest(filelist).select("TEST").paths():
        path.write_bytes(b"not read")
    assert (
        load_detector(f"lcmem?adapt={filelist}", device="cpu").fingerprint == by_train.fingerprint
    )
    with pytest.raises(InputError, match="unknown option 'adapt'"):
        load_detector(f"ncc?adapt={image_folder}")


@pytest.mark.usefixtures("each_counts")
def test_an_audit_adapts_to_the_bank_alone(sets, tmp_path):
    network = make()
    given = {"held_out": tmp_path / "held-out", "fpr": 0.1, "detector": network}
    result = audit(*sets, **given)
    assert result.adapted_to == 24 and any("adapted to 24" in text for text in result.shows)
    rows = {path: network.embed(path) for folder in sets for path in folder.iterdir()}
    bank = sorted(sets[1].iterdir(), key=lambda path: path.name)
    by_hand, convert, _ = network.adapted(np.concatenate([rows[p] for p in bank]), names(24))
    best = {match.query: match for match in result.matches if match.rank == 1}
    for name, match in best.items():
        pair = (convert(rows[sets[0] / name]), convert(rows[sets[1] / match.match]))
        assert match.score == pytest.approx(by_hand.score_features(*pair)[0], abs=1e-6)
    plain = audit(*sets, **given, adapt=False)
    assert plain.adapted_to is None and plain.fingerprint == network.fingerprint
    assert plain.metrics.auth_pct == result.metrics.auth_pct
    assert plain.metrics.null_auth_pct == result.metrics.null_auth_pct
    matrix = network.score_matrix(
        *(np.stack([rows[p][0] for p in sorted(f.iterdir())]) for f in sets)
    )
    own = network.score_matrix(*[np.stack([rows[p][0] for p in sorted(sets[1].iterdir())])] * 2)
    np.fill_diagonal(own, -1)
    authentic = matrix.max(axis=1) < own.max(axis=1)[matrix.argmax(axis=1)]
    assert result.metrics.auth_pct == pytest.approx(100 * authentic.mean())
    split = audit(*sets, fpr=0.1, detector=network, null="split")
    assert split.adapted_to == 24 - split.null.num_not_searched < 24
    with pytest.raises(NotAdaptableError, match="only LCMem networks"):
        audit(*sets, held_out=tmp_path / "held-out", fpr=0.1, detector="ncc", adapt=True)


@pytest.mark.usefixtures("each_counts")
@pytest.mark.parametrize("null", ["held-out", "split"])
def test_a_pair_is_judged_as_the_audit_judged_it(sets, tmp_path, monkeypatch, null):
    save_checkpoint(tmp_path / "net.safetensors", make().checkpoint)
    monkeypatch.chdir(tmp_path)
    options = {"held_out": "held-out"} if null == "held-out" else {"null": "split"}
    network = "lcmem:net.safetensors"
    result = audit(
        "generated", "training", **options, fpr=0.3, detector=network, output="audit", cache=False
    )
    assert result.adapted_to and 0 < result.num_flagged < result.num_queries
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("LCMEM_CACHE", str(tmp_path / "cache"))
    detector = detector_of(tmp_path / "audit")
    assert not (tmp_path / "cache").exists()
    best = [match for match in result.matches if match.rank == 1]
    pairs = [(sets[0] / match.query, sets[1] / match.match) for match in best]
    judged = score_pairs(detector, pairs)
    np.testing.assert_allclose(
        [pair.score for pair in judged.pairs], [match.score for match in best], atol=1e-6
    )
    apart = [abs(match.score - result.rule.threshold) > 1e-5 for match in best]
    assert sum(apart) > 20
    for pair, match, clear in zip(judged.pairs, best, apart, strict=True):
        assert pair.match is match.flagged or not clear


@pytest.mark.usefixtures("each_counts")
def test_an_audit_whose_training_set_has_changed_judges_no_pair(sets, tmp_path, run_cli):
    save_checkpoint(tmp_path / "net.safetensors", make().checkpoint)
    given = {"held_out": tmp_path / "held-out", "fpr": 0.1}
    given["detector"] = f"lcmem:{tmp_path / 'net.safetensors'}"
    audit(*sets, output=tmp_path / "audit", **given)
    plain = audit(*sets, output=tmp_path / "plain", adapt=False, **given)
    audit(*sets, output=tmp_path / "bh", bh=True, **given)
    pair = next((sets[0] / match.query, sets[1] / match.match) for match in plain.matches)
    shown = run_cli("infer", *pair, "--audit", tmp_path / "audit").stdout
    assert "(fpr0.1), fitted on the best matches of 24 real images (held-out)" in shown
    next(sets[1].iterdir()).unlink()
    with pytest.raises(InputError, match="or the training images, have changed"):
        detector_of(tmp_path / "audit")
    assert detector_of(tmp_path / "plain").fingerprint == plain.fingerprint
    with pytest.raises(InputError, match="without --bh"):
        detector_of(tmp_path / "bh")
    with pytest.raises(InputError, match=r"no audit\.json"):
        detector_of(sets[1])
    both = run_cli("infer", *pair, "--audit", tmp_path / "plain", "--detector", "ncc", exit_code=2)
    assert "--audit brings detector and threshold" in " ".join(both.stderr.split())


@pytest.mark.usefixtures("each_counts")
def test_no_null_of_images_that_the_detector_was_adapted_to(sets, tmp_path):
    network = make()
    by_training = network.adapted(
        network.embed(sorted(sets[1].iterdir())),
        [content_hash(path) for path in sorted(sets[1].iterdir())],
    ).detector
    with pytest.raises(NotAdaptableError, match="leave-one-out null"):
        audit(*sets, fpr=0.1, detector=network, adapt=True)
    assert audit(*sets, fpr=0.1, detector=network).adapted_to is None
    with pytest.raises(InputError, match="so that no rate holds"):
        audit(*sets, fpr=0.1, detector=by_training)
    held_out = {"held_out": tmp_path / "held-out", "fpr": 0.1, "detector": by_training}
    assert audit(*sets, **held_out).adapted_to is None  # adapted already
    with pytest.raises(NotAdaptableError, match="adapted already"):
        audit(*sets, **held_out, adapt=True)
