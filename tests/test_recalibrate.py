"""Fitting a checkpoint to other images: what changes, and that nothing else does."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import random_checkpoint
from scipy.special import logit

from lcmem_cli import load_detector
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.recalibrate import recentre
from lcmem_cli.engine.models.checkpoint import load_checkpoint, save_checkpoint
from lcmem_cli.engine.models.codec import load_codec
from lcmem_cli.engine.models.siamese import NetworkSpec


def make(path, backbone="resnet10t"):
    spec = NetworkSpec(
        backbone=backbone, in_channels=3, num_features=8, input_size=32, normalisation="sample"
    )
    return save_checkpoint(path, random_checkpoint(spec, load_codec("none"), image_size=32))


def before_sigmoid(file, paths):
    detector = load_detector(f"lcmem:{file}", device="cpu")
    embedded = embed_files(detector, paths)
    return logit(np.asarray(embedded.features, dtype=np.float64)[embedded.rows])


def test_recentring_moves_the_mean_of_train_to_zero_and_nothing_else(
    run_cli, image_folder, tmp_path
):
    saved = make(tmp_path / "start.safetensors")
    out = tmp_path / "centred.safetensors"
    options = ("--filelist", image_folder, "-o", out)
    run_cli("calibrate", tmp_path / "start.safetensors", *options, "--recentre")
    manifest = load_manifest(image_folder)
    for split in ("TRAIN", "TEST"):
        paths = manifest.select(split).paths()
        start = before_sigmoid(tmp_path / "start.safetensors", paths)
        centred = before_sigmoid(out, paths)
        moved = start - centred
        np.testing.assert_allclose(moved, np.broadcast_to(moved[:1], moved.shape), atol=1e-4)
        if split == "TRAIN":
            assert np.abs(start.mean(axis=0)).max() > 0.01
            np.testing.assert_allclose(centred.mean(axis=0), 0, atol=1e-4)
    loaded = load_checkpoint(out)
    changed = [k for k, v in saved.network_state.items() if not v.equal(loaded.network_state[k])]
    assert changed == ["backbone.fc.bias"]
    assert loaded.fingerprint != saved.fingerprint
    assert {t.fingerprint for t in loaded.thresholds} == {loaded.fingerprint}
    recorded = json.loads(run_cli("info", out, "--json").stdout)["training"]["recentred"]
    assert recorded["num_images"] == len(manifest.select("TRAIN").records)


def test_recentring_refuses_what_it_cannot_do(image_folder, tmp_path):
    checkpoint = make(tmp_path / "start.safetensors")
    manifest = load_manifest(image_folder).select("TRAIN")
    with pytest.raises(InputError, match="no TRAIN image"):
        recentre(checkpoint, dataclasses.replace(manifest, records=()))
    manifest.paths()[0].write_bytes(b"no image")
    with pytest.raises(InputError, match=manifest.paths()[0].name):
        recentre(checkpoint, manifest)
    convolutional = make(tmp_path / "conv.safetensors", "dla34")
    with pytest.raises(InputError, match="dla34 does not end in one linear layer"):
        recentre(convolutional, manifest)
