"""Detectors: every score against an independent computation, and every refusal."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from lcmem_cli.engine.config import tomllib
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.detectors import backbones, registry
from lcmem_cli.engine.detectors.base import Detector
from lcmem_cli.engine.detectors.options import absolute_name, parse_name, split_names
from lcmem_cli.engine.detectors.pixel import MSE
from lcmem_cli.engine.detectors.registry import (
    DetectorKind,
    check_name,
    describe_detectors,
    load_detector,
    register_detector,
)
from lcmem_cli.engine.errors import (
    CheckpointError,
    InputError,
    LcmemError,
    MissingExtraError,
    WeightsUnavailableError,
)
from lcmem_cli.engine.models import weights
from lcmem_cli.engine.models.checkpoint import Checkpoint, save_checkpoint
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.siamese import IMAGENET_MEAN, IMAGENET_STD, NetworkSpec, SiameseNetwork

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")

SIDE = 32
PIXEL = ("mse", "ssim", "ncc", "phash")
PUBLISHED = [kind for kind in registry.detectors().values() if kind.stands_for]


def images(num: int = 5, side: int = SIDE, *, seed: int = 0) -> torch.Tensor:
    """8-bit images; the second is a copy of the first, the third a noisy one."""
    rng = np.random.default_rng(seed)
    batch = rng.integers(0, 256, (num, 3, side, side)).astype(np.float32) / 255
    smooth = torch.nn.functional.avg_pool2d(torch.from_numpy(batch), 5, 1, 2)
    smooth = (smooth * 255).round() / 255
    if num < 3:
        return smooth
    smooth[1] = smooth[0]
    smooth[2] = ((smooth[0] + 0.05 * torch.from_numpy(batch[2])).clamp(0, 1) * 255).round() / 255
    return smooth


def independent_score(kind: str, x: torch.Tensor, y: torch.Tensor) -> float:
    if kind == "mse":
        return -float(np.mean((x.double().numpy() - y.double().numpy()) ** 2))
    if kind == "ncc":
        return float(np.corrcoef(x.double().numpy().ravel(), y.double().numpy().ravel())[0, 1])
    if kind == "ssim":
        pair = (x.double()[None], y.double()[None])
        return float(structural_similarity_index_measure(*pair, data_range=1.0))
    hashes = [
        imagehash.phash(Image.fromarray((v * 255).round().byte().permute(1, 2, 0).numpy()))
        for v in (x, y)
    ]
    return 1 - (hashes[0] - hashes[1]) / 64


@pytest.mark.parametrize("kind", PIXEL)
def test_pixel_scores_are_those_of_an_independent_computation(kind: str) -> None:
    batch = images()
    detector = load_detector(kind, input_size=SIDE)
    expected = np.array([[independent_score(kind, x, y) for y in batch] for x in batch])
    eight_bit = detector.embed_batch(batch)
    assert eight_bit.dtype == detector.feature_dtype == np.uint8
    assert eight_bit.shape == (5, detector.num_features)
    np.testing.assert_allclose(detector.score_matrix(eight_bit, eight_bit), expected, atol=1e-7)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    )
    path = tmp_path_factory.mktemp("script") / "net.pt"
    torch.jit.save(torch.jit.script(network), path)
    return path


def every_detector(script: Path) -> list[tuple[str, int]]:
    return [
        *((kind, SIDE) for kind in PIXEL),
        ("random", 224),
        *((f"torchscript:{script}?size={SIDE}&score={score}", SIDE) for score in SCORES),
    ]


SCORES = ("cosine", "correlation", "euclidean")


@pytest.mark.parametrize("number", range(len(PIXEL) + 1 + len(SCORES)))
def test_what_holds_for_every_detector(number: int, script: Path) -> None:
    name, side = every_detector(script)[number]
    detector = load_detector(name, input_size=SIDE)
    assert (detector.input_size, detector.name) == (side, name)
    batch = images(6, side)
    features = detector.embed_batch(batch)
    matrix = detector.score_matrix(features, features)
    assert matrix.shape == (6, 6)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    first, second = (index.ravel() for index in np.indices((6, 6)))
    pairs = detector.score_features(features[first], features[second]).reshape(6, 6)
    np.testing.assert_allclose(pairs, matrix, atol=1e-12)
    assert matrix[0, 1] == matrix[0, 0]  # the second image is a copy of the first
    assert (np.diag(matrix)[:, None] >= matrix - 1e-12).all()
    assert matrix[0, 2] < matrix[0, 0]
    one_by_one = np.concatenate([detector.embed_batch(image[None]) for image in batch])
    np.testing.assert_allclose(detector.score_matrix(one_by_one, features), matrix, atol=1e-6)
    found = detector.top_k(features, features, 3)
    order = np.lexsort((np.broadcast_to(np.arange(6), (6, 6)), -matrix), axis=1)[:, :3]
    np.testing.assert_array_equal(found.rows, order)
    assert detector.embed_batch(batch[:0]).shape == (0, detector.num_features)
    assert detector.score_features(features[:0], features[:0]).shape == (0,)
    assert detector.score_matrix(features[:0], features).shape == (0, 6)


@pytest.mark.parametrize("kind", ("mse", "ncc"))
def test_sums_are_exact_in_blocks_of_any_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = load_detector(kind, input_size=SIDE)
    features = detector.embed_batch(images(7))
    whole = detector.score_matrix(features, features)
    monkeypatch.setattr("lcmem_cli.engine.detectors.pixel._BLOCK_ROWS", 2)
    monkeypatch.setattr("lcmem_cli.engine.detectors.pixel._BLOCK_COLUMNS", 100)
    np.testing.assert_array_equal(detector.score_matrix(features, features), whole)
    np.testing.assert_array_equal(detector.score_features(features, features), np.diag(whole))


def test_identical_images_have_no_difference_and_no_negative_zero() -> None:
    detector = load_detector("mse", input_size=SIDE)
    for features in (detector.embed_batch(images()), detector.embed(images())):
        scores = [*detector.score_features(features, features)]
        scores += [*np.diag(detector.score_matrix(features, features))]
        assert scores == [0.0] * 10 and not np.signbit(scores).any()


def test_a_constant_image_correlates_with_nothing() -> None:
    detector = load_detector("ncc", input_size=SIDE)
    batch = torch.full((2, 3, SIDE, SIDE), 0.3)
    batch[1] = images()[0]
    for features in (detector.embed_batch(batch), detector.embed(batch)):
        np.testing.assert_array_equal(detector.score_matrix(features, features), [[0, 0], [0, 1]])


def test_pixel_measures_refuse_what_they_cannot_compare() -> None:
    wide = torch.rand(2, 3, 20, 30)
    with pytest.raises(InputError, match="different sizes"):
        MSE(8).score_matrix(MSE(8).embed(wide), MSE(9).embed(wide))
    with pytest.raises(InputError, match="input size"):
        load_detector("ssim", input_size=4)


def test_pixel_fingerprints_tell_kind_and_size() -> None:
    prints = {load_detector(k, input_size=s).fingerprint for k in PIXEL for s in (32, 64)}
    assert len(prints) == 8
    assert load_detector("mse", input_size=32).fingerprint in prints


def test_random_weights_depend_on_nothing_and_change_nothing() -> None:
    torch.manual_seed(1)
    first = load_detector("random")
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    assert load_detector("random").fingerprint == first.fingerprint
    assert first.embed(images(2, 64)).std() > 0.1


def test_lists_of_names_keep_the_numbers_of_an_option_together() -> None:
    assert split_names("mse, onnx:a.onnx?size=9&mean=0.5,.5,1e-1&std=1,1,1 ,lcmem") == (
        "mse",
        "onnx:a.onnx?size=9&mean=0.5,.5,1e-1&std=1,1,1",
        "lcmem",
    )
    assert split_names("onnx:a?mean=1,1,1&size=9,mse") == ("onnx:a?mean=1,1,1&size=9", "mse")


def test_a_comma_and_an_ampersand_in_an_option_are_escaped() -> None:
    names = split_names("lcmem?adapt=a%2C%20b%26c.csv,joint?adapt=100%25")
    assert [parse_name(name).options["adapt"] for name in names] == ["a, b&c.csv", "100%"]


def test_paths_in_a_name_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b&c%").mkdir()
    (tmp_path / "net.onnx").touch()
    name = absolute_name("joint:net.onnx?adapt=a%2C b%26c%25&score=cosine")
    assert len(split_names(f"ncc,{name}")) == 2
    assert parse_name(name) == (
        "joint",
        str(tmp_path / "net.onnx"),
        {"adapt": str(tmp_path / "a, b&c%"), "score": "cosine"},
    )
    odd = os.fsdecode(b"odd\xff")
    for name in ("resnet50", "embedded", odd):
        (tmp_path / name).mkdir()
    found = parse_name(absolute_name(f"lcmem:embedded?adapt={odd}"))
    assert found == ("lcmem", "embedded", {"adapt": str(tmp_path / odd)})
    assert absolute_name("timm:resnet50") == "timm:resnet50"
    assert absolute_name(f"onnx:{'a' * 300}.onnx") == f"onnx:{'a' * 300}.onnx"
    for same in ("ncc", "lcmem", "timm:resnet50?size=9&mean=0.5,0.5,0.5", "my detector?odd"):
        assert absolute_name(same) in (same, same.replace(",", "%2C"))


def test_names_are_split_at_the_last_options_unless_the_file_is_so_called(tmp_path: Path) -> None:
    odd = tmp_path / "what?size=1"
    assert parse_name(f"onnx:{odd}").target == str(tmp_path / "what")
    assert parse_name(f"onnx:{odd}?size=2") == ("onnx", str(odd), {"size": "2"})
    odd.touch()
    assert parse_name(f"onnx:{odd}") == ("onnx", str(odd), {})
    assert parse_name("clip?weights=a?b") == ("clip", "", {"weights": "a?b"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov22", "did you mean 'dinov2'"),
        ("mse:3", "takes nothing after a colon"),
        ("onnx", "needs a file of its weights: write onnx:FILE"),
        ("mse?size=3", "has no options"),
        ("onnx:a?siz=3", "did you mean 'size'"),
        ("onnx:a?size=0", "whole number of pixels"),
        ("onnx:a?mean=1,2", "three numbers"),
        ("onnx:a?mean=nan,1,1", "three numbers"),
        ("onnx:a?std=0,1,1", "above 0"),
        ("onnx:a?score=cosin", "one of cosine"),
        ("onnx:a?size=1&size=2", "twice"),
        ("onnx:a?size=1&x", "expected key=value"),
        ("onnx:/no/such.onnx", "no such file"),
        ("torchscript:/no/such.pt", "no such file"),
        ("swav:/no/such.pt", "no such weights file"),
        ("lcmem:/no/such.safetensors", "such.safetensors"),
        ("timm:resnet5", "did you mean 'resnet50'"),
        ("timm:resnet50.a1_in2k", "did you mean 'resnet50.a1_in1k'"),
    ],
)
def test_wrong_names_say_what_is_right(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_detector(name)
    assert caught.value.exit_code == 2


def kind_of(name: str, **settings: object) -> DetectorKind:
    values = {"summary": "s", "weights": "w", "licence": "l", "build": lambda r: MSE(r.input_size)}
    return DetectorKind(name=name, **{**values, **settings})


def test_registration_checks_everything_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    register_detector(kind_of("mine"))
    detector = load_detector("mine", input_size=8)
    assert (detector.name, detector.input_size) == ("mine", 8)
    for name, message in (("mse", "exists"), ("mine", "exists"), ("My_own", "lower-case")):
        with pytest.raises(InputError, match=message):
            register_detector(kind_of(name))
    with pytest.raises(InputError, match="DetectorKind"):
        register_detector("mine")  # type: ignore[arg-type]
    register_detector(kind_of("text", build=lambda request: "no detector"))
    with pytest.raises(InputError, match="no Detector"):
        load_detector("text")

    def without_fingerprint(request: registry.Request) -> MSE:
        made = MSE(request.input_size)
        made.fingerprint = "1"
        return made

    register_detector(kind_of("bare", build=without_fingerprint))
    with pytest.raises(InputError, match="fingerprint"):
        load_detector("bare")


def test_entry_points_add_detectors_and_broken_ones_stop_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("lcmem_test_plugin")
    module.good = kind_of("good")  # type: ignore[attr-defined]
    module.bad = "text"  # type: ignore[attr-defined]
    module.taken = kind_of("mse")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lcmem_test_plugin", module)
    group = registry.ENTRY_POINT_GROUP
    points = [
        metadata.EntryPoint("good", "lcmem_test_plugin:good", group),
        metadata.EntryPoint("bad", "lcmem_test_plugin:bad", group),
        metadata.EntryPoint("gone", "lcmem_no_such_plugin:x", group),
        metadata.EntryPoint("mse", "lcmem_test_plugin:taken", group),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    assert load_detector("good", input_size=8).num_features == 192
    assert isinstance(load_detector("mse", input_size=8), MSE)
    infos = {info.name: info for info in describe_detectors()}
    assert infos["good"].status == "ready"
    assert infos["bad"].status == infos["gone"].status == "broken"
    assert "lcmem_no_such_plugin" in infos["gone"].note
    with pytest.raises(LcmemError, match="lcmem_no_such_plugin"):
        load_detector("gone")


EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "own_detector"


@pytest.fixture
def installed_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example package of the docs, as pip would install it: module, and entry points."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    site = tmp_path / "site"
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    shutil.copy(EXAMPLE / "mean_colour.py", site)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    ((group, points),) = project["entry-points"].items()
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "mean_colour", raising=False)


@pytest.mark.usefixtures("installed_example")
def test_the_example_package_of_the_docs_works_in_every_command(
    run_cli, image_folder: Path, tmp_path: Path
) -> None:
    assert "mean-colour" in run_cli("detectors").stdout
    a, b = image_folder / "id00" / "0.png", image_folder / "id01" / "0.png"
    shown = json.loads(run_cli("infer", a, b, "--detector", "mean-colour", "--json").stdout)
    colours = [to_tensor(load_image(path), 64).mean(dim=(1, 2)).numpy() for path in (a, b)]
    expected = -np.abs(colours[0] - colours[1]).sum(dtype=np.float64)
    assert shown["pairs"][0]["score"] == pytest.approx(expected, abs=1e-6)
    run_cli(
        "benchmark", "--filelist", image_folder, "--detectors", "mean-colour?label=Mine,mse",
        "--input-size", 16, "--pairs", "all", "-o", tmp_path / "out",
    )  # fmt: skip
    run_cli("index", "build", image_folder, "--detector", "mean-colour", "-o", tmp_path / "index")
    found = run_cli("index", "query", tmp_path / "index", a, "--json").stdout
    (matches,) = json.loads(found)["matches"].values()
    assert matches[0]["score"] == 0.0


class _Half(Detector):
    """Lacks the score of two rows."""

    input_size, num_features, fingerprint = 8, 3, "a" * 64

    def embed_batch(self, batch: torch.Tensor) -> Any:
        return batch.mean(dim=(2, 3)).numpy()


class _Whole(_Half):
    def score_features(self, a: Any, b: Any) -> Any:
        return -np.abs(a - b).sum(axis=1, dtype=np.float64)


def _changed(**attributes: Any) -> type[_Whole]:
    return type("Changed", (_Whole,), attributes)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (_Half, "score_features"),
        (_changed(num_features=4), r"embed_batch returns \[2, 3\], expected .* \[2, 4\]"),
        (_changed(num_features=None), "num_features must be at least 1, not None"),
        (_changed(fingerprint="mine"), "its fingerprint is no SHA-256"),
        (
            _changed(feature_dtype=np.uint8),
            "embed_batch returns float32, but feature_dtype is uint8",
        ),
        (_changed(embed_batch=lambda self, batch: batch), "embed_batch returns Tensor"),
        (_changed(embed_batch=lambda self, batch: 1 / 0), "ZeroDivisionError: division by zero"),
        (_changed(score_features=lambda self, a, b: a - b), "score_features returns"),
        (_changed(score_features=lambda self, a, b: a[:, 0]), "finite and symmetric"),
        (_changed(score_matrix=lambda self, a, b: None), "score_matrix returns NoneType"),
    ],
)
def test_a_class_that_lacks_something_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, made: type[Detector], words: str
) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    register_detector(
        DetectorKind(
            name="mine", summary="", weights="none", licence="none", build=lambda request: made()
        )
    )
    with pytest.raises(InputError, match=f"detector 'mine'.*{words}"):
        load_detector("mine")


def test_all_pairs_are_scored_row_by_row_where_nothing_else_is_written() -> None:
    a, b = np.random.default_rng(0).random((2, 7, 3)).astype(np.float32)
    matrix = _Whole().score_matrix(a, b[:5])
    expected = -np.abs(a[:, None] - b[None, :5]).sum(axis=2, dtype=np.float64)
    np.testing.assert_array_equal(matrix, expected)
    scores, rows = _Whole().top_k(a, b, 2)[:2]
    np.testing.assert_array_equal(scores[:, 0], _Whole().score_matrix(a, b).max(axis=1))
    assert rows.shape == (7, 2)


def test_the_list_says_what_can_run_here(run_cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "cached_weights", lambda hub_id: None)
    listed = json.loads(run_cli("detectors", "--json").stdout)["detectors"]
    found = {entry["name"]: entry for entry in listed}
    assert found["mse"]["status"] == "ready"
    assert found["dinov2"]["status"] == "needs a download"
    assert found["mae"]["licence"] == "CC-BY-NC-4.0"
    assert found["swav:FILE"]["status"] == "needs a file"
    assert "config" in found["onnx:FILE"]["options"]
    text = run_cli("detectors").stdout
    assert all(entry["name"].partition(":")[0].strip("[") in text for entry in listed)


def test_published_models_are_known_to_timm() -> None:
    known = set(timm.list_models(pretrained=True))
    assert {kind.stands_for for kind in PUBLISHED} <= known


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and a hub that never answers."""
    import huggingface_hub

    def no_answer(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_answer)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_weights_that_cannot_be_had_say_how_to_get_them(unreachable_hub: Path) -> None:
    for name in (*(kind.name for kind in PUBLISHED), "timm:resnet18"):
        with pytest.raises(WeightsUnavailableError, match="hf download timm/") as caught:
            load_detector(name)
        assert f"{name}?weights=FILE" in str(caught.value)


def test_weights_in_the_hub_cache_are_used_without_asking_the_hub(unreachable_hub: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(3)
    model = timm.create_model("test_resnet", pretrained=False).eval()
    folder = unreachable_hub / "models--timm--test_resnet.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(model.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    detector = load_detector("timm:test_resnet.r160_in1k")
    model.reset_classifier(0)
    batch = images(2, 160)
    inputs = (batch - torch.tensor(detector.preprocessing.mean)[:, None, None]) / torch.tensor(
        detector.preprocessing.std
    )[:, None, None]
    with torch.inference_mode():
        expected = model(inputs)
    np.testing.assert_allclose(detector.embed_batch(batch), expected, atol=1e-5)


def test_a_timm_model_from_a_file(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", pretrained=False).eval()
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    name = f"timm:test_resnet?weights={path}&size=64&mean=0.1,0.2,0.3&std=1,2,3"
    detector = load_detector(name)
    model.reset_classifier(0)
    batch = images(2, 64)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2, 3])
    with torch.inference_mode():
        expected = model((batch - mean[:, None, None]) / std[:, None, None])
    np.testing.assert_allclose(detector.embed_batch(batch), expected, atol=1e-5)
    headless = tmp_path / "headless.pth"
    torch.save(model.state_dict(), headless)
    again = load_detector(name.replace(str(path), str(headless)))
    assert again.fingerprint == detector.fingerprint
    other = load_detector(name.replace("size=64", "size=32"))
    assert other.fingerprint != detector.fingerprint
    state = model.state_dict()
    del state["bn1.weight"]
    torch.save(state, headless)
    with pytest.raises(CheckpointError, match=r"1 missing: bn1\.weight"):
        load_detector(f"timm:test_resnet?weights={headless}")


def test_a_transformer_is_told_its_input_size(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), path)
    detector = load_detector(f"timm:test_vit?weights={path}&size=64")
    assert detector.embed(images(1, 20)).shape == (1, detector.num_features)
    with pytest.raises(InputError, match="does not take 33 pixels"):
        load_detector(f"timm:test_vit?weights={path}&size=33")


def test_clip_compares_the_output_of_its_projection() -> None:
    model = registry.detectors()["clip"].stands_for
    assert timm.get_pretrained_cfg(model).num_classes == 512
    assert backbones._COMPARED_BY_PROJECTION == ("clip",)


def test_published_self_supervised_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet50", pretrained=False).eval()
    trunk = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    heads = {"projection_head.0.weight": torch.zeros(2, 2), "prototypes.weight": torch.zeros(2, 2)}
    path = tmp_path / "swav.pth.tar"
    torch.save({f"module.{k}": v for k, v in {**trunk, **heads}.items()}, path)
    swav = load_detector(f"swav:{path}")
    model.reset_classifier(0)
    batch = images(2, 224)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    with torch.inference_mode():
        expected = model((batch - mean[:, None, None]) / std[:, None, None])
    np.testing.assert_allclose(swav.embed_batch(batch), expected, atol=1e-4)

    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    online, target = {}, {}
    for key, value in trunk.items():
        first, _, rest = key.partition(".")
        online[f"encoder.{numbers[first]}.{rest}"] = value
        target[f"encoder.{numbers[first]}.{rest}"] = torch.zeros_like(value)
    online["projection.net.0.weight"] = torch.zeros(2, 2)
    torch.save({"online_network_state_dict": online, "target_network_state_dict": target}, path)
    byol = load_detector(f"byol:{path}")
    np.testing.assert_allclose(byol.embed_batch(batch), expected, atol=1e-4)

    whole = {f"target_encoder.net.{k}": torch.zeros_like(v) for k, v in trunk.items()}
    whole |= {f"online_encoder.net.{k}": v for k, v in trunk.items()}
    whole |= {"online_predictor.net.0.weight": torch.zeros(2, 2)}
    found = backbones._trunk(whole, source="file")
    assert set(found) == set(trunk) and found["conv1.weight"] is trunk["conv1.weight"]

    del trunk["layer3.0.conv2.weight"]
    torch.save({f"module.{k}": v for k, v in trunk.items()}, path)
    with pytest.raises(CheckpointError, match=r"1 missing: layer3\.0\.conv2\.weight"):
        load_detector(f"swav:{path}")
    torch.save({"fc.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="no ResNet-50"):
        load_detector(f"byol:{path}")


def test_data2vec_needs_its_extra_and_averages_the_patches(
    monkeypatch: pytest.MonkeyPatch, unreachable_hub: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"lcmem\[data2vec\]"):
        load_detector("data2vec")

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> types.SimpleNamespace:
            patches = x.flatten(2)[:, :, :4].transpose(1, 2)
            first = torch.full_like(patches[:, :1], 9)
            return types.SimpleNamespace(last_hidden_state=torch.cat([first, patches], 1))

        @classmethod
        def from_pretrained(cls, name: str, **options: object) -> Network:
            assert options["local_files_only"] and name == "folder"
            return cls()

    module = types.ModuleType("transformers")
    module.Data2VecVisionModel = Network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", module)
    with pytest.raises(WeightsUnavailableError, match="hf download facebook/data2vec"):
        load_detector("data2vec")
    batch = images(2, 224)
    features = load_detector("data2vec:folder").embed_batch(batch)
    expected = (batch.flatten(2)[:, :, :4].mean(2) - 0.5) / 0.5
    np.testing.assert_allclose(features, expected, atol=1e-6)


def test_siamese_networks_by_head_and_by_correlation(tmp_path: Path) -> None:
    spec = NetworkSpec(
        backbone="test_resnet",
        in_channels=3,
        num_features=8,
        input_size=SIDE,
        normalisation="imagenet",
    )
    torch.manual_seed(0)
    network = SiameseNetwork(spec).eval()
    path = tmp_path / "siamese.safetensors"
    save_checkpoint(
        path,
        Checkpoint(
            stage="stage1",
            network=spec,
            network_state=network.state_dict(),
            codec=load_codec("none").spec,
            codec_config=None,
            codec_state=None,
            image_size=SIDE,
        ),
    )
    batch = images()
    by_head = load_detector(f"siamese:{path}")
    features = by_head.embed_batch(batch)
    assert by_head.fingerprint == load_detector(f"lcmem:{path}").fingerprint
    with torch.inference_mode():
        expected = torch.sigmoid(network.logits(network(batch[:1]), network(batch[3:4])))
    assert by_head.score_features(features[:1], features[3:4])[0] == pytest.approx(
        float(expected), abs=1e-5
    )
    for kind in ("siamese-ntxent", "siamese-ntxent-u"):
        detector = load_detector(f"{kind}:{path}")
        np.testing.assert_array_equal(detector.embed_batch(batch), features)
        found = detector.score_matrix(features, features)
        np.testing.assert_allclose(found, np.corrcoef(features.astype(np.float64)), atol=1e-9)
        assert detector.fingerprint != by_head.fingerprint
        assert detector.thresholds == ()


def direct(script: Path, inputs: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return torch.jit.load(str(script))(inputs).flatten(1).numpy()


def test_torchscript_is_fed_as_the_options_say(script: Path) -> None:
    batch = images(3)
    name = f"torchscript:{script}?size={SIDE}&mean=0.1,0.2,0.3&std=0.5,1,2&channels=bgr"
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1, 2])
    inputs = ((batch - mean[:, None, None]) / std[:, None, None]).flip(1)
    detector = load_detector(name)
    np.testing.assert_allclose(detector.embed_batch(batch), direct(script, inputs), atol=1e-6)
    variants = [name, f"{name}&score=euclidean", name.replace("bgr", "rgb")]
    variants.append(name.replace(f"size={SIDE}", "size=40"))
    assert len({load_detector(variant).fingerprint for variant in variants}) == 4


def test_options_from_a_toml_file(script: Path, tmp_path: Path) -> None:
    config = tmp_path / "net.toml"
    config.write_text(f"size = {SIDE}\nmean = [0, 0, 0]\nstd = [1, 1, 1]\n")
    from_file = load_detector(f"torchscript:{script}?config={config}")
    in_name = load_detector(f"torchscript:{script}?size={SIDE}&mean=0,0,0&std=1,1,1")
    assert from_file.fingerprint == in_name.fingerprint
    over = load_detector(f"torchscript:{script}?config={config}&size=40")
    assert over.input_size == 40
    config.write_text("sise = 3")
    with pytest.raises(InputError, match="did you mean 'size'"):
        check_name(f"torchscript:{script}?config={config}")


class Two(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.mean((2, 3)), x.flatten(1) / 0


def test_torchscript_outputs_are_chosen_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "two.pt"
    torch.jit.save(torch.jit.script(Two()), path)
    with pytest.raises(InputError, match="outputs 0, 1"):
        load_detector(f"torchscript:{path}?size=8")
    detector = load_detector(f"torchscript:{path}?size=8&output=0&mean=0,0,0&std=1,1,1")
    np.testing.assert_allclose(
        detector.embed_batch(images(2, 8)), images(2, 8).mean((2, 3)), atol=1e-6
    )
    with pytest.raises(LcmemError, match="not finite"):
        load_detector(f"torchscript:{path}?size=8&output=1")
    torch.jit.save(torch.jit.script(torch.nn.Conv2d(3, 2, 3)), path)
    with pytest.raises(InputError, match="one row of features"):
        load_detector(f"torchscript:{path}?size=8")
    with pytest.raises(InputError, match="refuses an input"):
        load_detector(f"torchscript:{path}?size=2")
    with pytest.raises(InputError, match=r"add \?size="):
        load_detector(f"torchscript:{path}")


def test_what_is_not_torchscript_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"torch\.save, not TorchScript"):
        load_detector(f"torchscript:{path}?size=8")
    torch.save({"weight": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="execute code"):
        load_detector(f"torchscript:{path}?size=8")


def pooled_onnx(path: Path, shape: list[int | str], *, two: bool = False) -> str:
    """A network that averages each channel over the image."""
    axes = [1, 2] if shape[3] == 3 else [2, 3]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["pooled"], axes=axes, keepdims=0),
        helper.make_node("Neg", ["pooled"], ["negative"]),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], 3])
        for name in (("pooled", "negative") if two else ("negative",))
    ]
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "pool", [source], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))
    return f"onnx:{path}?mean=0,0,0&std=1,1,1"


@pytest.mark.parametrize(
    "shape",
    [["n", 3, "h", "w"], ["n", 3, SIDE, SIDE], [1, 3, SIDE, SIDE], [2, SIDE, SIDE, 3]],
)
def test_onnx_layouts_sizes_and_batches(tmp_path: Path, shape: list[int | str]) -> None:
    name = pooled_onnx(tmp_path / "net.onnx", shape)
    detector = load_detector(name if SIDE in shape else f"{name}&size={SIDE}")
    assert (detector.input_size, detector.num_features) == (SIDE, 3)
    batch = images(5)
    np.testing.assert_allclose(detector.embed_batch(batch), -batch.mean((2, 3)), atol=1e-6)


def test_onnx_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    name = pooled_onnx(path, ["n", 3, "h", "w"])
    with pytest.raises(InputError, match=r"add \?size="):
        load_detector(name)
    name = pooled_onnx(path, ["n", 3, 16, 16], two=True)
    with pytest.raises(InputError, match="outputs pooled, negative"):
        load_detector(name)
    detector = load_detector(f"{name}&output=pooled")
    assert detector.embed_batch(images(1, 16)).min() > 0
    with pytest.raises(InputError, match="16 pixels a side, not 32"):
        load_detector(f"{name}&output=pooled&size=32")
    with pytest.raises(InputError, match="which is nchw"):
        load_detector(f"{name}&output=pooled&layout=nhwc")
    path.write_bytes(b"no network")
    with pytest.raises(CheckpointError, match="cannot be loaded as ONNX"):
        load_detector(name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"lcmem\[onnx\]"):
        load_detector(name)


def model_with(nodes: list[object], weight: object) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        initializer=[weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize("place", ["initializer", "attribute"])
def test_onnx_weights_outside_the_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where onnxruntime looks for them
    values = np.eye(3, dtype=np.float32)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 3], values.tobytes(), raw=True)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["pooled"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["pooled", "w"], ["y"]),
    ]
    if place == "attribute":
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    path = Path("net.onnx")
    options = {"location": "w.bin", "size_threshold": 0, "convert_attribute": True}
    model = model_with(nodes, weight)
    if place == "attribute":
        del model.graph.initializer[:]
    onnx.save(model, str(path), save_as_external_data=True, **options)
    assert Path("w.bin").is_file()
    with pytest.raises(CheckpointError, match=r"tensor 'w' lies in another file \(w.bin\)"):
        load_detector(f"onnx:{path}")
    onnx.save_model(onnx.load(path), path)  # as the message says
    batch = images(2, 8)
    features = load_detector(f"onnx:{path}?mean=0,0,0&std=1,1,1").embed_batch(batch)
    np.testing.assert_allclose(features, batch.mean((2, 3)), atol=1e-6)


def test_infer_scores_with_any_detector(run_cli, image_folder, tmp_path):
    pair = (image_folder / "id03" / "0.png", image_folder / "id03" / "1.png")
    scored = json.loads(run_cli("infer", *pair, "--detector", "ncc", "--json").stdout)
    assert scored["detector"] == "ncc" and scored["threshold"] is None
    assert scored["pairs"][0]["score"] == pytest.approx(load_detector("ncc").score(*pair))
    both = ("--detector", "ncc", "--checkpoint", "embedded")
    assert "does not go with" in run_cli("infer", *pair, *both, exit_code=2).stderr
    hint = run_cli("infer", *pair, "--detector", "my.safetensors", exit_code=2).stderr
    assert "lcmem:my.safetensors" in hint
    (tmp_path / "same.png").write_bytes(pair[0].read_bytes())
    same = run_cli("infer", pair[0], tmp_path / "same.png", "--detector", "ncc")
    assert "byte for byte" in same.stdout
    assert "byte for byte" not in run_cli("infer", *pair, "--detector", "ncc").stdout
    deep = tmp_path / "deep.png"
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(deep)
    assert "brightness was guessed" in " ".join(
        run_cli("infer", pair[0], deep, "--detector", "ncc").stderr.split()
    )
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    done = run_cli(
        "infer", pair[0], bad, "--detector", "ncc", "--max-unreadable", 1,
        "--save", tmp_path / "pair.png",
    )  # fmt: skip
    assert "none: an image cannot be read" in done.stdout and "unreadable" in done.stdout
    assert not (tmp_path / "pair.png").exists()
    wrong = run_cli("infer", *pair, "--detector", "ncc", "--save", tmp_path / "p.jpg", exit_code=2)
    assert "ends in .png" in wrong.stderr
