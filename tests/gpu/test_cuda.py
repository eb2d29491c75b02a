"""What only a CUDA device can show; on it, run: pytest -m gpu tests/gpu"""

import json

import numpy as np
import pytest
import torch
from conftest import codec_of

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.precision import resolve_precision
from lcmem_cli.engine.store import device_search
from lcmem_cli.engine.store.latents import LatentStore, encode_latents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SINGLE, HALF = 1e-3, 0.05
"""Bounds of a feature in [0, 1] beside the CPU's."""
SMALL = (
    "--set=image.size=48",
    "--set=network.backbone=resnet10t",
    "--set=schedule.epochs=1",
    "--set=schedule.batch_size=4",
    "--set=runtime.device=cuda",
)


@pytest.fixture
def filelist(image_folder, run_cli):
    path = image_folder / "list.csv"
    run_cli("manifest", image_folder, "-o", path)
    return path


@pytest.mark.parametrize("name", ["lcmem", "joint", "random"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", SINGLE), ("auto", HALF)])
def test_features_are_those_of_the_cpu(name, precision, bound):
    expected = load_detector(name, device="cpu")
    found = load_detector(name, device="cuda", precision=precision)
    size = expected.input_size
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    a, b = expected.embed_batch(images), found.embed_batch(images)
    assert np.abs(a - b).max() < bound * max(1.0, float(np.abs(a).max()))
    assert (found.fingerprint == expected.fingerprint) == (precision == "fp32")


@pytest.mark.parametrize("name", ["lcmem", "joint", "random"])
def test_search_finds_what_the_cpu_finds(name, monkeypatch):
    monkeypatch.setattr(device_search, "LEAST_PAIRS", 1)
    on_cpu, on_card = (load_detector(name, device=device) for device in ("cpu", "cuda"))
    rng = np.random.default_rng(0)
    bank = rng.random((20_000, on_cpu.num_features), dtype=np.float32)
    queries = bank[:50] + rng.normal(0, 1e-2, (50, bank.shape[1])).astype(np.float32)
    expected, found = (detector.top_k(queries, bank, 5) for detector in (on_cpu, on_card))
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", SINGLE), ("auto", HALF)])
def test_latents_are_those_of_the_cpu(filelist, tiny_codec, tmp_path, precision, bound):
    stores = {}
    for device, asked in (("cpu", "fp32"), ("cuda", precision)):
        compute = Compute(device=device, precision=asked)
        codec = load_codec(str(tiny_codec), device=device)
        encode_latents(load_manifest(filelist), codec, tmp_path / device, compute, image_size=48)
        stores[device] = LatentStore.open(tmp_path / device)
    rows = range(len(stores["cpu"]))
    a, b = (store.latents(list(rows)) for store in stores.values())
    assert (a - b).abs().max() < bound * a.abs().max()
    assert stores["cuda"].precision == resolve_precision(precision, "cuda")


def test_a_step_of_each_stage(filelist, tiny_codec, tmp_path, run_cli):
    latents, stage1, tuned = (tmp_path / name for name in ("latents", "stage1", "tuned"))
    listed = ["--filelist", filelist]
    run_cli("latents", *listed, "--codec", tiny_codec, "--size", 48, "-o", latents)
    run_cli("train-stage1", "--latents", latents, codec_of(latents), "-o", stage1, *SMALL)
    run_cli("finetune", stage1 / "checkpoint.safetensors", *listed, "-o", tuned, *SMALL[2:])
    for folder in (stage1, tuned):
        assert (folder / "checkpoint.safetensors").is_file()
        assert json.loads((folder / "environment.json").read_text())
