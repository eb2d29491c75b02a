"""The model that ships: the same scores everywhere, small, and useful on drawn scenes."""

import json

import numpy as np
import pytest
from figures import figures

from lcmem_cli import Detector
from lcmem_cli.engine.data.images import to_tensor
from lcmem_cli.engine.data.perturb import perturb
from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.models.checkpoint import embedded_checkpoint, load_checkpoint

GOLDEN = [0.982014, 0.459418, 0.446332, 0.756534, 0.417008]


@pytest.fixture(scope="module")
def detector():
    return Detector.load(device="cpu")


@pytest.fixture(scope="module")
def images(detector):
    size = detector.input_size
    scenes = [to_tensor(draw_scene(seed, side=size), size) for seed in (1, 2, 3)]
    return [*scenes, perturb(scenes[0], "Rotation", 10.0), perturb(scenes[1], "CropResize", 0.75)]


def test_scores_are_the_same_everywhere(detector, images):
    import torch

    features = detector.embed_batch(torch.stack(images))
    np.testing.assert_allclose(detector.score_matrix(features, features)[0], GOLDEN, atol=1e-4)


def test_features_do_not_depend_on_the_batch(detector, images):
    import torch

    many = torch.stack(images * 2)  # more than the codec takes at a time
    together = detector.embed_batch(many)
    alone = np.concatenate([detector.embed_batch(image[None]) for image in many])
    # Which convolution is taken, and so its rounding, depends on the batch and the processor.
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4)
    in_eights = detector.codec.encode(many, together=8)
    assert in_eights.shape == (len(many), 12, detector.input_size // 2, detector.input_size // 2)
    torch.testing.assert_close(in_eights, detector.codec.encode(many), atol=1e-4, rtol=0)


def test_copies_score_above_other_scenes(detector, images):
    import torch

    features = detector.embed_batch(torch.stack(images))
    matrix = detector.score_matrix(features, features)
    assert matrix[0, 3] > max(matrix[0, 1], matrix[0, 2])
    assert matrix[1, 4] > max(matrix[1, 0], matrix[1, 2])


def test_the_files_are_small_and_carry_thresholds():
    folder = embedded_checkpoint().parent
    assert sum(path.stat().st_size for path in folder.iterdir()) < 15e6
    names = {threshold.name for threshold in load_checkpoint(embedded_checkpoint()).thresholds}
    assert names == {"fpr0.01", "fpr0.001", "recall0.95"}


def test_the_demonstration_runs_and_reports(run_cli, tmp_path):
    out = json.loads(run_cli("demo", "-o", tmp_path / "demo", "--json").stdout)
    assert len(out["planted"]) == 4 and "of 40 generated images (" in out["statement"]
    shown = " ".join(figures()["demo-audit"]["output"])  # in README
    assert shown.startswith(out["statement"])
    assert set(out["flagged"]) <= set(out["planted"]) and len(out["flagged"]) >= 3
    assert [p["score"] for p in out["pairs"]["pairs"]] == sorted(
        (p["score"] for p in out["pairs"]["pairs"]), reverse=True
    )
    assert (tmp_path / "demo" / "audit" / "report.html").is_file()
    refused = run_cli("demo", "-o", tmp_path, exit_code=2)
    assert "choose another folder" in refused.stderr
