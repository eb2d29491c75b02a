"""Features of any model are audited as images are."""

import dataclasses

import numpy as np
import pytest
import torch
from audit_images import altered, picture, save_all

from lcmem_cli import FeatureSet, audit, audit_features
from lcmem_cli.engine.detectors.vectors import VectorDetector
from lcmem_cli.engine.errors import InputError

SCORES = ("cosine", "correlation", "euclidean")


class Colours(VectorDetector):
    """Mean colours of 4 x 4 parts of a picture."""

    name = "colours"
    fingerprint = "c" * 64
    input_size = 32
    num_features = 48

    def embed_batch(self, batch):
        return torch.nn.functional.avg_pool2d(batch, 8).flatten(1).numpy()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    save_all(root / "training", range(40))
    save_all(root / "real", range(100, 130))
    save_all(root / "generated", range(200, 212))
    for seed in (3, 7):
        altered(picture(seed)).save(root / "generated" / f"copy-{seed}.png")
    return root


def embedded(folder):
    paths = sorted(folder.iterdir())
    names = [path.name for path in paths]
    return FeatureSet(features=Colours().embed(paths), names=names)


@pytest.mark.parametrize("score", SCORES)
def test_features_are_audited_as_the_detector_that_made_them_would(score, sets):
    detector = Colours()
    detector.likeness = score
    expected = audit(
        sets / "generated", sets / "training", held_out=sets / "real", fpr=0.1, detector=detector
    )
    given = {name: embedded(sets / name) for name in ("generated", "training")}
    result = audit_features(**given, held_out=embedded(sets / "real"), score=score, fpr=0.1)
    for match, other in zip(result.matches, expected.matches, strict=True):
        assert dataclasses.replace(match, score=0, match_id="") == dataclasses.replace(
            other, score=0, match_id=""
        )
        assert match.score == pytest.approx(other.score, abs=1e-6)
    assert result.rule.threshold == pytest.approx(expected.rule.threshold, abs=1e-6)
    assert result.metrics.auth_pct == expected.metrics.auth_pct
    assert {"copy-3.png", "copy-7.png"} <= {match.query for match in result.flagged}


def test_names_and_identities_are_optional(sets):
    features = {name: embedded(sets / name).features for name in ("generated", "training", "real")}
    result = audit_features(
        generated=torch.from_numpy(features["generated"]).half(),
        training=features["training"].astype(np.float64),
        held_out=features["real"],
        fpr=0.1,
    )
    assert [match.query for match in result.matches[::5]] == [str(n) for n in range(14)]
    assert result.training.num_identities is None and result.num_exact_copies == 0
    alone = audit_features(generated=features["generated"], training=features["training"], fpr=0.1)
    assert alone.null.kind == "leave-one-out"
    patients = [str(number // 2) for number in range(40)]
    known = audit_features(
        generated=features["generated"],
        training=FeatureSet(features=features["training"], ids=patients),
        fpr=0.1,
    )
    assert known.training.num_identities == 20 and known.null.num_scores == 20
    assert {match.match_id for match in known.matches} <= set(patients)


def test_equal_features_are_flagged_and_leave_the_null(sets):
    training, real = (embedded(sets / name).features for name in ("training", "real"))
    mixed = np.concatenate([real, training[:2]])
    result = audit_features(generated=training[5:8], training=training, held_out=mixed, fpr=0.1)
    assert result.num_flagged == 3 and result.num_exact_copies == 0
    assert [match.match for match in result.flagged] == ["5", "6", "7"]
    assert len(result.null.removed) == 2 and result.null.num_scores == len(real)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "dot"}, "cosine, correlation or euclidean"),
        ({"generated": np.zeros((2, 3))}, "different lengths"),
        ({"generated": np.zeros((0, 48))}, "the generated set holds no features"),
        ({"generated": np.full((2, 48), np.nan)}, "not finite"),
        ({"generated": FeatureSet(features=np.ones((2, 48)), names=["a"])}, "1 names of the gen"),
        ({"fpr": 0.001}, "needs at least 999 real images"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message, sets):
    given = {name: embedded(sets / name) for name in ("generated", "training")}
    given |= {"held_out": embedded(sets / "real"), "fpr": 0.1, **change}
    with pytest.raises(Exception, match=message) as caught:
        audit_features(**given)
    assert isinstance(caught.value, InputError) or "finite" in message
