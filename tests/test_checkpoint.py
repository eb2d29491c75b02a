import dataclasses
import json
import struct

import numpy as np
import pytest
import torch
from conftest import random_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import Conv2dSame
from torchvision.models import convnext_tiny

from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.errors import CheckpointError, CorruptFileError, InputError, LcmemError
from lcmem_cli.engine.models import checkpoint as ckpt
from lcmem_cli.engine.models import siamese
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.convert import convert_reference, rename
from lcmem_cli.engine.models.siamese import (
    NetworkSpec,
    SiameseNetwork,
    normalise,
    optimise_for_inference,
)
from lcmem_cli.engine.results import Threshold
from lcmem_cli.engine.training import stages


@pytest.fixture(scope="module")
def reference():
    """A torchvision ConvNeXt as the published code builds it, with a head."""
    torch.manual_seed(1)
    model = convnext_tiny()
    model.features[0][0] = torch.nn.Conv2d(4, 96, 4, 4)
    model.classifier[2] = torch.nn.Linear(768, 512)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    head = torch.nn.Linear(512, 1)
    return model.eval(), head


def layout(reference, kind):
    model, head = reference
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"fc_end.{k}": v for k, v in head.state_dict().items()}
    if kind == "stage2":
        state["vae.encoder.conv_in.weight"] = torch.zeros(2, 2)
    if kind == "prefixed":
        return {"state_dict": {f"module.{k}": v for k, v in state.items()}}
    return state


@pytest.mark.parametrize("kind", ["flat", "prefixed", "stage2"])
def test_a_converted_checkpoint_reproduces_torchvisions_forward(reference, kind, tmp_path):
    torch.save(layout(reference, kind), tmp_path / "r.pth")
    convert_reference(tmp_path / "r.pth", tmp_path / "c.safetensors")
    detector = Detector.load(tmp_path / "c.safetensors", device="cpu")
    latents = torch.randn(3, 4, 32, 32) * 3 + 1
    model, head = reference
    with torch.no_grad():
        expected = torch.sigmoid(model(normalise(latents, "sample")))
        probability = torch.sigmoid(head((expected[:1] - expected[1:2]).abs()))
    found = detector.embed_latents(latents)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    score = detector.score_features(found[:1], found[1:2])
    np.testing.assert_allclose(score, probability[0], atol=1e-5)
    matrix = detector.score_matrix(found, found)
    assert matrix.shape == (3, 3)
    np.testing.assert_allclose(matrix[0, 1], score[0], atol=1e-6)


def test_missing_and_unexpected_weights_are_named(reference, tmp_path):
    state = layout(reference, "flat")
    del state["model.features.1.0.block.0.bias"]
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(
        CheckpointError, match=r"1 missing: backbone\.stages\.0\.blocks\.0\.conv_dw"
    ):
        convert_reference(tmp_path / "m.pth", tmp_path / "x.safetensors")
    state = layout(reference, "flat") | {"model.extra": torch.zeros(1)}
    torch.save(state, tmp_path / "u.pth")
    with pytest.raises(CheckpointError, match=r"unexpected weight 'model\.extra'"):
        convert_reference(tmp_path / "u.pth", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_code_in_a_pickle_is_never_executed(tmp_path, run_cli):
    torch.save({"model.x": Malicious()}, tmp_path / "bad.pth")
    out = run_cli("convert", tmp_path / "bad.pth", tmp_path / "x.safetensors", exit_code=2)
    assert "would execute code" in out.stderr


@pytest.mark.parametrize("key", ["model.features.9.0.weight", "fc_end", "", "vae.x"])
def test_unknown_keys_have_no_place(key):
    with pytest.raises(CheckpointError, match="unexpected weight"):
        rename(key, "file")


def tiny(tmp_path, codec):
    from lcmem_cli.engine.models.codec_loading import load_codec

    loaded = load_codec(str(codec))
    spec = NetworkSpec(
        backbone="resnet10t", in_channels=4, num_features=8, input_size=16, normalisation="sample"
    )
    checkpoint = random_checkpoint(spec, loaded, image_size=32)
    return ckpt.save_checkpoint(tmp_path / "tiny.safetensors", checkpoint), checkpoint.build()


def test_a_checkpoint_reads_back_and_scores_like_the_network(tmp_path, tiny_codec):
    saved, network = tiny(tmp_path, tiny_codec)
    detector = Detector.load(tmp_path / "tiny.safetensors", device="cpu")
    assert detector.fingerprint == saved.fingerprint
    images = torch.rand(5, 3, 32, 32).mul(255).round() / 255
    features = detector.embed(images)
    with torch.no_grad():
        latents = detector.codec.encode(images)
        expected = network(latents)
        logits = network.logits(expected[:4], expected[1:])
    np.testing.assert_allclose(features, expected, atol=1e-5)
    scores = detector.score_features(features[:4], features[1:])
    np.testing.assert_allclose(scores, torch.sigmoid(logits), atol=1e-5)
    np.testing.assert_allclose(detector.embed(images, batch_size=2), features, atol=1e-6)


def test_a_changed_weight_is_noticed(tmp_path, tiny_codec):
    tiny(tmp_path, tiny_codec)
    path = tmp_path / "tiny.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 64
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="does not match its fingerprint"):
        ckpt.load_checkpoint(path)


def test_a_changed_weight_of_the_codec_inside_is_noticed(run_cli, tmp_path):
    original = ckpt.embedded_checkpoint()
    tensors = load_file(original)
    tensors["codec.encoder.conv_in.weight"][0, 0, 0, 0] += 1
    path = tmp_path / "edited.safetensors"
    header = json.dumps(ckpt.read_header(original))
    save_file(tensors, path, metadata={ckpt.HEADER_KEY: header})
    image = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(image)
    run_cli("infer", image, image)
    for arguments in (("info", path), ("infer", image, image, "--checkpoint", path)):
        assert "recorded hash" in run_cli(*arguments, exit_code=1).stderr
    found = json.loads(run_cli("check", "--checkpoint", path, "--json", exit_code=2).stdout)
    assert any("recorded hash" in finding["what"] for finding in found["findings"])


def test_many_images_may_be_adapted_to(tmp_path, tiny_codec):
    saved, _ = tiny(tmp_path, tiny_codec)
    digests = tuple(f"{number:064x}" for number in range(200_000))
    path = tmp_path / "adapted.safetensors"
    ckpt.save_checkpoint(path, dataclasses.replace(saved, adapted_to=digests))
    loaded = ckpt.load_checkpoint(path)
    assert loaded.adapted_to == digests and loaded.fingerprint == saved.fingerprint
    assert ckpt.load_checkpoint(tmp_path / "tiny.safetensors").adapted_to == ()


def test_halving_changes_the_fingerprint_and_drops_thresholds(tmp_path, tiny_codec):
    saved, _ = tiny(tmp_path, tiny_codec)
    halved = ckpt.halve(saved)
    assert halved.fingerprint != saved.fingerprint and halved.thresholds == ()
    size = (tmp_path / "tiny.safetensors").stat().st_size
    ckpt.save_checkpoint(tmp_path / "half.safetensors", halved)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * size


def test_the_same_weights_at_another_size(tmp_path, tiny_codec):
    saved, network = tiny(tmp_path, tiny_codec)
    larger = saved.at_size(48)
    assert larger.fingerprint not in ("", saved.fingerprint) and larger.thresholds == ()
    ckpt.save_checkpoint(tmp_path / "larger.safetensors", larger)
    detector = Detector.load(tmp_path / "larger.safetensors", device="cpu")
    assert detector.input_size == 48
    images = torch.rand(2, 3, 48, 48).mul(255).round() / 255
    with torch.no_grad():
        expected = network(detector.codec.encode(images))
    np.testing.assert_allclose(detector.embed(images), expected, atol=1e-5)
    assert saved.at_size(32).fingerprint == saved.fingerprint
    with pytest.raises(InputError, match="multiple of the codec's downsampling 2"):
        saved.at_size(47)


def test_other_safetensors_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not an lcmem checkpoint"):
        ckpt.load_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        ckpt.load_checkpoint(tmp_path / "nosuch.safetensors")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_refused_without_a_traceback(tmp_path_factory, data, with_length):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data if with_length else data)
    with pytest.raises(LcmemError):
        ckpt.load_checkpoint(path)


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=4))
def test_any_header_is_refused_without_a_traceback(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    fields = ("format", "network", "codec", "codec_config", "image_size", "thresholds", "training")
    header = dict.fromkeys(fields, value) | {"format": 1, "stage": "stage1", "fingerprint": ""}
    save_file({"network.x": torch.zeros(1)}, path, metadata={"lcmem": json.dumps(header)})
    with pytest.raises(LcmemError):
        ckpt.load_checkpoint(path)


def test_sample_normalisation_is_as_stated():
    latents = torch.randn(2, 3, 8, 8) * 7 + 4
    latents[1, 2] = 3.3  # a constant channel; its mean in float32 is not 3.3
    assert latents[1, 2].mean() != 3.3
    done = normalise(latents, "sample")
    np.testing.assert_allclose(done.mean(dim=(2, 3)), 0, atol=1e-6)
    expected = torch.full((2, 3), 0.5)
    expected[1, 2] = 0.0
    np.testing.assert_allclose(done.flatten(2).std(dim=2), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "inner_stride", "inner_bands", "num_left"),
    # The last convolution of resnet10t's stem is no sibling of the normalisation after it.
    [
        ("resnet10t", None, None, 1), ("tf_efficientnet_lite0", None, None, 0),
        ("convnext_atto", None, None, None), ("tf_efficientnet_lite0", 16, None, 0),
        ("tf_efficientnet_lite0", 8, 3, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("side", [32, 50, 37])  # even all the way, even then odd, odd
def test_folding_for_inference_changes_no_feature(
    backbone, inner_stride, inner_bands, num_left, side
):
    torch.manual_seed(0)
    spec = NetworkSpec(
        backbone=backbone, in_channels=4, num_features=8, input_size=32, normalisation="sample",
        inner_stride=inner_stride, inner_bands=inner_bands,
    )  # fmt: skip
    network = SiameseNetwork(spec).eval()
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
    folded = optimise_for_inference(network)
    padded = [m for m in folded.modules() if isinstance(m, Conv2dSame)]
    assert not padded and folded.is_mirrored == backbone.startswith("tf_")
    latents = torch.randn(3, 4, side, side)
    with torch.no_grad():
        np.testing.assert_allclose(folded(latents), network(latents), atol=1e-5)
    left = [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if num_left is None:
        assert folded is network and not norms
    else:
        assert len(left) == num_left < len(norms)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", 5), ("achieved_fpr", "x"), ("num_negatives", "many"), ("value", [1]),
        ("kind", ["a"]), ("rate", None), ("more", 1),
    ],
)  # fmt: skip
def test_thresholds_of_another_type_are_refused(tmp_path, field, value):
    path = tmp_path / "c.safetensors"
    spec = NetworkSpec(
        backbone="resnet10t", in_channels=3, num_features=4, input_size=32, normalisation="none"
    )
    saved = ckpt.save_checkpoint(path, random_checkpoint(spec, load_codec("none"), image_size=32))
    threshold = Threshold(
        value=0.5, kind="fpr", rate=0.01, fingerprint=saved.fingerprint, fitted_on="x",
        num_positives=1, num_negatives=200, achieved_fpr=0.01, achieved_recall=None,
    )  # fmt: skip
    ckpt.save_checkpoint(path, dataclasses.replace(saved, thresholds=(threshold,)))
    assert ckpt.load_checkpoint(path).thresholds == (threshold,)
    header = ckpt.read_header(path)
    header["thresholds"][0][field] = value
    save_file(load_file(path), path, metadata={"lcmem": json.dumps(header)})
    with pytest.raises(LcmemError):
        ckpt.load_checkpoint(path)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    spec = NetworkSpec(
        backbone="resnet10t", in_channels=3, num_features=4, input_size=32, normalisation="none"
    )
    made = random_checkpoint(spec, load_codec("none"), image_size=32)
    deep: dict = {}
    for _ in range(80):
        deep = {"in": deep}
    for wrong in ({"image_size": 80_000}, {"training": deep}):
        with pytest.raises(CheckpointError, match="not written"):
            ckpt.save_checkpoint(tmp_path / "c.safetensors", dataclasses.replace(made, **wrong))
    assert not list(tmp_path.iterdir())


def test_a_long_line_of_ancestors_is_cut():
    training: dict = {"epoch": 0}
    for number in range(1, 60):
        before = {"fingerprint": str(number), "training": training}
        training = {"epoch": number, "started_from": before}
        training = stages._history(training, 8)
    seen = 0
    while "started_from" in training:
        training, seen = training["started_from"]["training"], seen + 1
    assert seen == 8


def test_a_file_that_names_a_larger_network_builds_none(tmp_path, monkeypatch):
    spec = NetworkSpec(
        backbone="resnet10t", in_channels=3, num_features=7, input_size=32, normalisation="none"
    )
    made = random_checkpoint(spec, load_codec("none"), image_size=32)
    larger = dataclasses.replace(made, network=dataclasses.replace(spec, backbone="resnet50"))
    devices = []

    def build(wanted):
        devices.append(torch.empty(()).device.type)
        return SiameseNetwork(wanted)

    monkeypatch.setattr(siamese, "SiameseNetwork", build)
    with pytest.raises(CheckpointError, match="do not fit"):
        larger.build()
    assert devices == ["meta"]
    made.build()
    assert devices == ["meta", "meta", "cpu"]


def test_a_backbone_that_needs_values_to_be_built_is_loaded_all_the_same(monkeypatch):
    # Some models read numbers out of tensors, which have none on the meta device.
    spec = NetworkSpec(
        backbone="convnext_atto", num_features=8, in_channels=4, input_size=32, normalisation="none"
    )
    state = SiameseNetwork(spec).state_dict()
    build = siamese.build_backbone

    def reads_values(*arguments, **options):
        if torch.empty(()).is_meta:
            raise InputError("it cannot be built")
        return build(*arguments, **options)

    monkeypatch.setattr(siamese, "build_backbone", reads_values)
    siamese._without_memory.cache_clear()
    loaded = siamese.build_network(spec, state, source="file")
    siamese._without_memory.cache_clear()
    torch.testing.assert_close(loaded.state_dict(), state)
