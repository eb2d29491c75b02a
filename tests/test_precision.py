"""What networks compute in: features near single precision's, and never mixed with them."""

import json

import numpy as np
import pytest
import torch
from conftest import random_checkpoint, with_threshold
from PIL import Image

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.models.checkpoint import save_checkpoint
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.siamese import NetworkSpec
from lcmem_cli.engine.precision import resolve_precision
from lcmem_cli.engine.store.features import FeatureCaches
from lcmem_cli.engine.store.latents import LatentStore, encode_latents

BOUND = 0.02
"""Of a feature, in [0, 1]: bfloat16 keeps 8 bits of each value on the way to it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    spec = NetworkSpec(
        backbone="convnext_atto",
        in_channels=3,
        num_features=8,
        input_size=32,
        normalisation="none",
    )
    path = tmp_path_factory.mktemp("precision") / "tiny.safetensors"
    made = random_checkpoint(spec, load_codec("none"), image_size=32)
    save_checkpoint(path, with_threshold(made))
    return path


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["siamese:", "siamese-ntxent:"])
def test_half_precision_is_near_single_and_another_detector(checkpoint, images, kind):
    single = load_detector(f"{kind}{checkpoint}", device="cpu")
    half = load_detector(f"{kind}{checkpoint}", device="cpu", precision="bf16")
    a, b = single.embed_batch(images), half.embed_batch(images)
    assert b.dtype == np.float32
    assert 0 < np.abs(a - b).max() < BOUND
    assert half.fingerprint != single.fingerprint
    assert not half.thresholds
    assert half.name == f"{kind}{checkpoint}?precision=bf16"
    again = load_detector(half.name, device="cpu")  # as a finished audit or an index names it
    assert again.fingerprint == half.fingerprint


def test_a_backbone_computes_in_half_precision(images):
    single = load_detector("random", device="cpu")
    half = load_detector("random", device="cpu", precision="bf16")
    a, b = single.embed_batch(images), half.embed_batch(images)
    assert 0 < np.abs(a - b).max() < BOUND * np.abs(a).max()
    assert half.fingerprint != single.fingerprint


def test_single_precision_is_the_detector_itself(checkpoint):
    plain = load_detector(f"siamese:{checkpoint}", device="cpu")
    assert plain.thresholds
    for asked in ("fp32", "auto"):
        found = load_detector(f"siamese:{checkpoint}", device="cpu", precision=asked)
        assert (found.name, found.fingerprint) == (plain.name, plain.fingerprint)


def test_features_of_two_precisions_are_kept_apart(checkpoint, tmp_path):
    Image.new("RGB", (32, 32), (200, 30, 90)).save(tmp_path / "a.png")
    compute = Compute(device="cpu", cache=FeatureCaches(tmp_path / "cache"))
    for asked in ("fp32", "bf16"):
        detector = load_detector(f"siamese:{checkpoint}", device="cpu", precision=asked)
        assert embed_files(detector, [tmp_path / "a.png"], compute).encoder_passes == 1
        assert embed_files(detector, [tmp_path / "a.png"], compute).encoder_passes == 0


def test_what_has_no_effect_or_is_contradicted_is_refused(checkpoint):
    with pytest.raises(InputError, match="no effect: detector 'mse'"):
        load_detector("mse", device="cpu", precision="bf16")
    assert load_detector("mse", device="cpu", precision="auto").name == "mse"
    with pytest.raises(InputError, match="computes in bf16"):
        load_detector(f"siamese:{checkpoint}?precision=bf16", device="cpu", precision="fp16")


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_is_half_precision_on_cuda_only(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert resolve_precision("auto", "cuda") == expected
    assert resolve_precision("fp32", "cuda") == "fp32"
    assert {resolve_precision("auto", device) for device in ("cpu", "mps")} == {"fp32"}


def test_latents_know_their_precision_and_are_not_mixed(tiny_codec, tmp_path):
    for number in range(2):
        Image.effect_noise((32, 32), 60 + number).convert("RGB").save(tmp_path / f"{number}.png")
    (tmp_path / "list.csv").write_text("path,id,Split\n0.png,a,TRAIN\n1.png,b,TRAIN\n")
    manifest = load_manifest(tmp_path / "list.csv")
    codec = load_codec(str(tiny_codec), device="cpu")
    stores = {}
    for asked in ("fp32", "bf16"):
        compute = Compute(device="cpu", precision=asked)
        made = encode_latents(manifest, codec, tmp_path / asked, compute, image_size=32)
        assert made.precision == asked
        stores[asked] = LatentStore.open(tmp_path / asked)
        assert stores[asked].precision == asked
    a, b = (store.latents([0, 1]) for store in stores.values())
    assert 0 < (a - b).abs().max() < BOUND * a.abs().max()
    with pytest.raises(InputError, match="another precision"):
        encode_latents(manifest, codec, tmp_path / "bf16", Compute(device="cpu"), image_size=32)


def test_every_command_that_takes_it_computes_in_it(checkpoint, image_folder, tmp_path, run_cli):
    name, half = f"siamese:{checkpoint}", f"siamese:{checkpoint}?precision=bf16"
    single = load_detector(name, device="cpu").fingerprint
    asked = ("--precision", "bf16", "--json")
    files = sorted(image_folder.rglob("*.png"))[:2]

    def read(*words):
        return json.loads(run_cli(*words, *asked).stdout)

    scored = read("infer", *files, "--detector", name, "--no-verify")
    assert scored["fingerprint"] != single and scored["threshold"] is None
    index = tmp_path / "index"
    assert read("index", "build", image_folder, "--detector", name, "-o", index)["detector"] == half
    run_cli("index", "query", index, files[0], "--precision", "fp32", exit_code=2)
    assert read("index", "query", index, files[0], "--no-verify")["matches"]
    audit = ("audit", image_folder, "--against", image_folder, "--no-verify", "--sensitivity", 0)
    audited = read(*audit, "--fpr", 0.5, "--detector", name, "-o", tmp_path / "audit")
    assert audited["fingerprint"] == scored["fingerprint"]
    assert audited["detector"] == half
    bench = ("benchmark", "--filelist", image_folder, "--detectors", name, "-o", tmp_path / "bench")
    (judged,) = read(*bench)["detectors"].values()
    assert judged["fingerprint"] == scored["fingerprint"]
