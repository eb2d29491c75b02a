"""Exported networks compute what the checkpoint computes, alone and as a detector."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import Listener, random_checkpoint
from diffusers import AutoencoderKL

from lcmem_cli.engine.detectors import export as export_module
from lcmem_cli.engine.detectors import joint, lcmem
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.detectors.export import export_checkpoint
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.errors import (
    CorruptFileError,
    InputError,
    LcmemError,
    MissingExtraError,
    WeightsUnavailableError,
    WriteError,
)
from lcmem_cli.engine.models import checkpoint as ckpt
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.export_header import ExportHeader
from lcmem_cli.engine.models.siamese import NetworkSpec, SiameseNetwork
from lcmem_cli.engine.results import Threshold

SIDE = 32
needs_onnxruntime = pytest.mark.skipif(
    not (find_spec("onnxruntime") and find_spec("onnxscript")),
    reason="the extra [onnx] is not installed",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_codec) -> Path:
    """A small random checkpoint with a threshold."""
    codec = load_codec(str(tiny_codec))
    spec = NetworkSpec(
        backbone="test_resnet",
        in_channels=4,
        num_features=8,
        input_size=SIDE // codec.spec.downsampling,
        normalisation="sample",
    )
    unfitted = random_checkpoint(spec, codec, image_size=SIDE).with_fingerprint()
    threshold = Threshold(
        value=0.5, kind="fpr", rate=0.01, fingerprint=unfitted.fingerprint, fitted_on="drawn",
        num_positives=5, num_negatives=500, achieved_fpr=0.01, achieved_recall=0.6,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    ckpt.save_checkpoint(path, dataclasses.replace(unfitted, thresholds=(threshold,)))
    return path


@pytest.fixture(scope="module")
def onnx_file(checkpoint) -> Path:
    path = checkpoint.with_suffix(".onnx")
    result = export_checkpoint(checkpoint, path)
    assert result.max_difference is not None and result.max_difference <= 1e-4
    assert (result.num_checked, result.format, result.opset > 0) == (4, "onnx", True)
    assert result.num_bytes == path.stat().st_size
    return path


@pytest.fixture
def exported_once(onnx_file, monkeypatch) -> None:
    """What the exporter makes of the checkpoint, without the seconds that it takes."""
    content = onnx_file.read_bytes()
    monkeypatch.setattr(export_module, "_to_onnx", lambda program, header: (content, 20))


def images(num: int, side: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num)
    coarse = torch.rand(num, 3, 7, 7, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


def score_without_lcmem(features: np.ndarray, header: dict) -> float:
    """Score the first two rows as README says."""
    a, b = features[:2]
    logit = np.abs(a - b) @ header["head_weight"] + header["head_bias"]
    return float(1 / (1 + np.exp(-logit)))


@needs_onnxruntime
def test_onnx_computes_what_the_checkpoint_computes(checkpoint, onnx_file):
    import onnxruntime

    detector = Detector.load(checkpoint, device="cpu")
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    for num in (1, 3):
        found = session.run(["features"], {"images": images(num).numpy()})[0]
        assert found.dtype == np.float32 and found.shape == (num, 8)
        np.testing.assert_allclose(found, detector.embed_batch(images(num)), atol=1e-4)
    header = json.loads(session.get_modelmeta().custom_metadata_map["lcmem"])
    assert header["image_size"] == SIDE and header["fingerprint"] == detector.fingerprint
    assert header["thresholds"] == [dataclasses.asdict(t) for t in detector.thresholds]
    expected = detector.embed_batch(images(3))
    score = detector.score_features(expected[:1], expected[1:2])[0]
    assert score_without_lcmem(found, header) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("shape", [(3, 6, 5, 7), (3, 6, 9)])
@pytest.mark.parametrize("affine", [True, False])
def test_means_in_stages_normalise_as_torch_does(affine, shape):
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.GroupNorm(2, 6, eps=1e-3, affine=affine)
    if affine:
        norm.weight.data, norm.bias.data = torch.rand(2, 6, generator=generator)
    maps = torch.randn(shape, generator=generator) * 2 + 1
    holder = torch.nn.Sequential(torch.nn.Sequential(norm))
    expected = holder(maps)
    export_module._stage_group_norms(holder)
    assert not isinstance(holder[0][0], torch.nn.GroupNorm)
    torch.testing.assert_close(holder(maps), expected)


@pytest.mark.parametrize("backbone", ["resnetv2_50d_gn", "efficientnet_b3_gn"])
def test_means_in_stages_leave_norms_that_do_more(backbone):
    """Those of timm derive from torch's and hold an activation."""
    torch.manual_seed(0)
    network = timm.create_model(backbone, pretrained=False).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(image)
        export_module._stage_group_norms(network)
        torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)


@needs_onnxruntime
def test_a_codec_with_attention_is_exported(tiny_codec, tmp_path):
    torch.manual_seed(0)
    config = AutoencoderKL.load_config(tiny_codec) | {"mid_block_add_attention": True}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "codec")
    codec = load_codec(str(tmp_path / "codec"))
    spec = NetworkSpec(
        backbone="test_resnet", in_channels=4, num_features=8, input_size=16, normalisation="sample"
    )
    ckpt.save_checkpoint(
        tmp_path / "x.safetensors", random_checkpoint(spec, codec, image_size=SIDE)
    )
    result = export_checkpoint(tmp_path / "x.safetensors", tmp_path / "x.onnx")
    assert result.max_difference is not None and result.max_difference <= 1e-4


@needs_onnxruntime
def test_an_onnx_file_says_nothing_of_this_machine(onnx_file):
    import onnx

    model = onnx.load(onnx_file)
    assert [prop.key for prop in model.metadata_props] == ["lcmem"]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(Path(export_module.__file__).parent).encode() not in onnx_file.read_bytes()
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["N", 3, SIDE, SIDE]
    onnx.checker.check_model(model)


def test_a_torch_export_archive_computes_what_the_checkpoint_computes(checkpoint, tmp_path):
    path = tmp_path / "new" / "tiny.pt2"
    result = export_checkpoint(checkpoint, path)
    assert result.max_difference <= 1e-4 and result.opset is None
    extra = {"lcmem.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    detector = Detector.load(checkpoint, device="cpu")
    for num in (1, 3):
        found = program(images(num)).detach().numpy()
        np.testing.assert_allclose(found, detector.embed_batch(images(num)), atol=1e-4)
    score = detector.score_features(found[:1], found[1:2])[0]
    assert score_without_lcmem(found, json.loads(extra["lcmem.json"])) == pytest.approx(score)
    assert "stack_trace" not in path.read_bytes().decode("latin-1")
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny.pt2"]
    again = export_checkpoint(checkpoint, tmp_path / "again.pt2")
    assert again.sha256 == result.sha256


@needs_onnxruntime
@pytest.mark.slow
def test_the_embedded_model_is_exported_from_the_command_line(tmp_path, run_cli):
    target = tmp_path / "embedded.onnx"
    result = json.loads(run_cli("export", target, "--json").stdout)
    assert result["max_difference"] <= 1e-4 and result["path"] == str(target)
    embedded, exported = Detector.load(device="cpu"), load_detector(f"onnx:{target}", device="cpu")
    assert result["fingerprint"] == embedded.fingerprint
    batch = images(3, embedded.input_size)
    batch[2, :, 60:] = 0  # a plain background, whose sums are the hardest
    features, expected = exported.embed_batch(batch), embedded.embed_batch(batch)
    np.testing.assert_allclose(features, expected, atol=1e-4)
    scores = embedded.score_matrix(expected, expected)
    np.testing.assert_allclose(exported.score_matrix(features, features), scores, atol=2e-3)
    usual, fast = (load_detector(name, device="cpu") for name in ("joint", f"joint:{target}"))
    np.testing.assert_allclose(fast.embed_batch(batch), usual.embed_batch(batch), atol=1e-4)
    assert fast.fingerprint != usual.fingerprint and fast.name == f"joint:{target}"


@needs_onnxruntime
def test_the_joint_detector_takes_no_export_but_of_the_embedded_model(onnx_file, tmp_path):
    with pytest.raises(InputError, match="an export of another model than the embedded one"):
        load_detector(f"joint:{onnx_file}")
    with pytest.raises(InputError, match="no such file"):
        load_detector(f"joint:{tmp_path / 'no.onnx'}")
    import onnx

    foreign = onnx.load(onnx_file)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match="was not made by lcmem export"):
        load_detector(f"joint:{tmp_path / 'foreign.onnx'}")


@needs_onnxruntime
def test_the_joint_detector_takes_an_export_of_the_embedded_model(
    checkpoint, onnx_file, monkeypatch
):
    for module in (joint, lcmem):
        monkeypatch.setattr(module, "locate_checkpoint", lambda name: checkpoint)
    usual, fast = (load_detector(name, device="cpu") for name in ("joint", f"joint:{onnx_file}"))
    np.testing.assert_allclose(fast.embed_batch(images(3)), usual.embed_batch(images(3)), atol=1e-4)
    assert fast.fingerprint != usual.fingerprint and fast.name == f"joint:{onnx_file}"


@needs_onnxruntime
def test_an_export_is_a_detector_with_its_own_head_and_thresholds(checkpoint, onnx_file):
    original = Detector.load(checkpoint, device="cpu")
    detector = load_detector(f"onnx:{onnx_file}", device="cpu")
    features, expected = detector.embed_batch(images(3)), original.embed_batch(images(3))
    matrix = detector.score_matrix(features, features)
    np.testing.assert_allclose(matrix, original.score_matrix(expected, expected), atol=1e-4)
    pairs = detector.score_features(features[:2], features[1:])
    np.testing.assert_allclose(pairs, [matrix[0, 1], matrix[1, 2]], atol=1e-6)
    np.testing.assert_allclose(
        detector.top_k(features, features, 1).scores[:, 0], matrix.max(axis=1), atol=1e-6
    )
    (threshold,) = detector.thresholds
    assert threshold.decide(0.6, detector.fingerprint)
    assert detector.fingerprint != original.fingerprint
    cosine = load_detector(f"onnx:{onnx_file}?score=cosine", device="cpu")
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(cosine.score_matrix(features, features), unit @ unit.T, atol=1e-6)
    assert cosine.thresholds == () and cosine.fingerprint != detector.fingerprint
    with pytest.raises(InputError, match="leave mean out"):
        load_detector(f"onnx:{onnx_file}?mean=0.5,0.5,0.5")
    with pytest.raises(InputError, match="32 pixels a side, not 64"):
        load_detector(f"onnx:{onnx_file}?size=64")


@needs_onnxruntime
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this lcmem reads 1; export the checkpoint again"),
        ({"head_weight": [1.0]}, "the file was edited"),
        ({"image_size": 64}, "the file was edited"),
        ({"head_bias": "much"}, "head_bias"),
        ({"head_bias": float("nan")}, "head_bias: .*finite"),
        ({"image_size": 10**9}, "image_size: .*4096"),
        ({"thresholds": [{"value": 1}]}, "thresholds.0.kind: Field required"),
        (None, "not valid"),
    ],
)
def test_a_damaged_header_is_refused(onnx_file, tmp_path, change, message):
    import onnx

    model = onnx.load(onnx_file)
    header = json.loads(model.metadata_props[0].value)
    model.metadata_props[0].value = "[]" if change is None else json.dumps(header | change)
    onnx.save(model, tmp_path / "edited.onnx")
    with pytest.raises((InputError, CorruptFileError), match=message):
        load_detector(f"onnx:{tmp_path / 'edited.onnx'}")


def test_the_header_reads_back_the_same():
    header = ExportHeader(
        fingerprint="f", image_size=8, head_weight=(0.1, -2.0), head_bias=0.3, thresholds=(),
        codec="c", adapted_to=("a",),
    )  # fmt: skip
    assert ExportHeader.from_json(header.to_json(), source="s") == header


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_an_export_that_computes_something_else_is_not_written(
    checkpoint, tmp_path, monkeypatch, suffix, request
):
    if suffix == "onnx":
        if not find_spec("onnxruntime"):
            pytest.skip("the extra [onnx] is not installed")
        request.getfixturevalue("exported_once")
    embed = LCMemDetector.embed_batch
    monkeypatch.setattr(LCMemDetector, "embed_batch", lambda self, b: embed(self, b) + 0.01)
    with pytest.raises(LcmemError, match=r"not written.*up to 0\.01") as caught:
        export_checkpoint(checkpoint, tmp_path / f"wrong.{suffix}")
    assert caught.value.exit_code == 1 and not list(tmp_path.iterdir())


def test_values_that_are_not_numbers_are_no_agreement(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(LCMemDetector, "embed_batch", lambda self, b: np.full((len(b), 8), np.nan))
    with pytest.raises(LcmemError, match="not written"):
        export_checkpoint(checkpoint, tmp_path / "nan.pt2")
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_traced_says_so(checkpoint, tmp_path, monkeypatch):
    forward = SiameseNetwork.forward

    def branching(self, latents):
        return forward(self, latents) if float(latents.sum()) < 1e9 else latents

    monkeypatch.setattr(SiameseNetwork, "forward", branching)
    with pytest.raises(LcmemError, match="cannot be traced"):
        export_checkpoint(checkpoint, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(
        export_module, "find_spec", lambda wanted: None if wanted == name else find_spec(wanted)
    )


def test_a_missing_exporter_names_the_extra(checkpoint, tmp_path, monkeypatch):
    without(monkeypatch, "onnxscript")
    with pytest.raises(MissingExtraError, match=r"lcmem\[onnx\]"):
        export_checkpoint(checkpoint, tmp_path / "x.onnx")


@needs_onnxruntime
def test_without_onnxruntime_nothing_is_compared_and_that_is_said(
    checkpoint, exported_once, tmp_path, monkeypatch
):
    without(monkeypatch, "onnxruntime")
    listener = Listener()
    result = export_checkpoint(checkpoint, tmp_path / "x.onnx", reporter=listener)
    assert (result.max_difference, result.num_checked) == (None, 0)
    assert len(listener.warnings) == 1 and "was not compared" in listener.warnings[0]


def test_a_codec_that_is_nowhere_is_the_usual_error(checkpoint, tmp_path, tiny_codec, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = ckpt.load_checkpoint(checkpoint)
    bare = dataclasses.replace(
        loaded,
        codec=dataclasses.replace(loaded.codec, name="nobody/nothing"),
        codec_config=None,
        codec_state=None,
    )
    ckpt.save_checkpoint(tmp_path / "bare.safetensors", bare)
    with pytest.raises(WeightsUnavailableError, match="codec 'nobody/nothing'"):
        export_checkpoint(tmp_path / "bare.safetensors", tmp_path / "bare.pt2")
    assert not (tmp_path / "bare.pt2").exists()
    found = export_checkpoint(
        tmp_path / "bare.safetensors", tmp_path / "bare.pt2", codec=str(tiny_codec)
    )
    assert found.max_difference <= 1e-4


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        export_module, "load_lcmem", lambda *args, **options: pytest.fail("too late")
    )
    with pytest.raises(WriteError, match="cannot be written"):
        export_checkpoint(None, tmp_path / "file" / "out.onnx")


def test_the_command_line_shows_what_was_written(run_cli, checkpoint, tmp_path):
    shown = run_cli("export", checkpoint, tmp_path / "x.pt2").stdout
    assert "images [N, 3, 32, 32]" in shown and "compared   4 random images" in shown
    assert ckpt.load_checkpoint(checkpoint).fingerprint in shown
    for arguments, message in (
        ((), "give the file to write"),
        (("x.safetensors",), "ends in .onnx or .pt2"),
        ((tmp_path / "no.safetensors", tmp_path / "x.pt2"), "cannot be read"),
    ):
        assert message in run_cli("export", *arguments, exit_code=2).stderr


def test_networks_too_large_for_onnx_are_refused(checkpoint, tmp_path, monkeypatch):
    if not find_spec("onnxscript"):
        pytest.skip("the extra [onnx] is not installed")
    monkeypatch.setattr(export_module, "_MAX_ONNX_BYTES", 1000)
    with pytest.raises(InputError, match=r"export to \.pt2"):
        export_checkpoint(checkpoint, tmp_path / "x.onnx")
