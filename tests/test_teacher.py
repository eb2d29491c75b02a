"""The teacher's projection and targets, the retention loss, and frozen statistics."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize as torchvision_normalise

from lcmem_cli.engine.data.manifest import Record
from lcmem_cli.engine.errors import CheckpointError, InputError
from lcmem_cli.engine.models.checkpoint import load_checkpoint
from lcmem_cli.engine.models.siamese import NetworkSpec, SiameseNetwork, normalise
from lcmem_cli.engine.models.whitening import SPREAD
from lcmem_cli.engine.training.initialise import align_stem, copy_backbone
from lcmem_cli.engine.training.inputs import load_teacher
from lcmem_cli.engine.training.loop import freeze_statistics
from lcmem_cli.engine.training.teacher import Member, Retention, Teacher, load_pretrained

pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "resnet10t.safetensors"
    model = timm.create_model("resnet10t", pretrained=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def teacher(weights, drawn_images):
    paths = sorted(drawn_images.rglob("*.png"))[::2]
    model = load_pretrained("resnet10t", weights)
    return Teacher.fit([Member.of("resnet10t", model)], paths, num_features=8, seed=1)


def records(*names):
    return [Record(path=f"{i}", id=f"{i}", split="TRAIN", ds_name=n) for i, n in enumerate(names)]


def test_projected_features_are_centred_and_use_the_sigmoids_range(teacher):
    fitted, pooled = teacher
    projected = (pooled - fitted.mean) @ fitted.projection.T
    np.testing.assert_allclose(projected.mean(dim=0), 0, atol=1e-3)
    np.testing.assert_allclose(projected.std(dim=0), SPREAD, rtol=1e-3)


def test_more_features_than_images_allow_are_still_fitted(weights, image_folder):
    paths = sorted(image_folder.rglob("*.png"))[:5]
    model = load_pretrained("resnet10t", weights)
    fitted, pooled = Teacher.fit([Member.of("resnet10t", model)], paths, num_features=12, seed=1)
    projected = (pooled - fitted.mean) @ fitted.projection.T
    assert projected.shape == (5, 12) and bool(projected.isfinite().all())


def test_a_panel_turns_its_targets_towards_the_students_start(
    teacher, weights, image_folder, tmp_path
):
    alone, _ = teacher
    paths = sorted(image_folder.rglob("*.png"))[::2]
    own = Member.of("resnet10t", load_pretrained("resnet10t", weights))
    torch.manual_seed(9)
    other = Member.of("resnet14t", timm.create_model("resnet14t", pretrained=False))
    fitted, pooled = Teacher.fit([own, other], paths, num_features=8, seed=1)
    assert torch.equal(fitted.start, alone.start)
    width = alone.start.shape[1]
    assert fitted.projection.shape == (8, pooled.shape[1]) and pooled.shape[1] > width
    centred = pooled - fitted.mean
    start, targets = centred[:, :width] @ fitted.start.T, centred @ fitted.projection.T
    np.testing.assert_allclose(targets.std(dim=0), SPREAD, rtol=1e-3)
    straight = F.cosine_similarity(start, targets, dim=1).mean()
    turned = F.cosine_similarity(start, targets.roll(1, dims=1), dim=1).mean()
    assert straight > 0.5 > turned
    fitted.save(tmp_path / "teacher.safetensors")
    read = Teacher.load(tmp_path / "teacher.safetensors")
    assert [member.backbone for member in read.members] == ["resnet10t", "resnet14t"]
    np.testing.assert_allclose(read.pool(paths), pooled, atol=1e-5)


def test_what_all_images_of_a_data_set_share_does_not_count(teacher):
    fitted, pooled = teacher
    rows = pooled[:12]
    listed = records(*["a"] * 6, *["b"] * 6)
    moved = rows.clone()
    moved[6:] += torch.linspace(0, 3, rows.shape[1])
    expected, targets = fitted.targets(rows, listed), fitted.targets(moved, listed)
    np.testing.assert_allclose(targets, expected, atol=1e-3)
    np.testing.assert_allclose(targets.norm(dim=1), 1, rtol=1e-5)


def test_a_saved_teacher_is_read_back(teacher, image_folder, tmp_path):
    fitted, pooled = teacher
    fitted.save(tmp_path / "teacher.safetensors")
    read = Teacher.load(tmp_path / "teacher.safetensors")
    assert torch.equal(read.projection, fitted.projection)
    again = read.pool(sorted(image_folder.rglob("*.png"))[::2])
    np.testing.assert_allclose(again, pooled, atol=1e-5)
    with pytest.raises(InputError, match="no such teacher"):
        Teacher.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="not a teacher"):
        Teacher.load(tmp_path / "bad.safetensors")
    for _ in range(6):  # a run that uses a teacher is known by the bytes of its file
        fitted.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (
            tmp_path / "teacher.safetensors"
        ).read_bytes()


@pytest.mark.parametrize(
    "header",
    [
        None, "[]", "[" * 5000, '{"backbones": []}',
        '{"backbones": ["resnet10t"], "inner_stride": null, "inner_bands": "x"}',
        '{"backbones": "resnet10t", "inner_stride": null, "inner_bands": null}',
    ],
)  # fmt: skip
def test_a_teacher_with_another_header_is_refused(header, tmp_path):
    tensors = {"mean": torch.zeros(2), "projection": torch.zeros(3, 2), "start": torch.zeros(3, 2)}
    metadata = {} if header is None else {"teacher": header}
    save_file(tensors, tmp_path / "t.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="not a teacher"):
        Teacher.load(tmp_path / "t.safetensors")


def test_weights_of_another_model_are_refused(weights):
    with pytest.raises(CheckpointError, match="missing"):
        load_pretrained("resnet18", weights)


def test_features_on_their_targets_lose_nothing_and_opposite_ones_lose_most():
    targets = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    loss = Retention(targets, records(*"aaabbb"), weight=2.0, instance_weight=0, temperature=1)
    rows = np.array([0, 4])
    on, off = torch.sigmoid(3 * targets[rows]), torch.sigmoid(-3 * targets[rows])
    assert float(loss(on, on, rows, rows)) == pytest.approx(0, abs=1e-5)
    assert float(loss(off, off, rows, rows)) == pytest.approx(4, abs=1e-5)
    assert float(loss(on, off, rows, rows)) == pytest.approx(2, abs=1e-5)


def test_the_instance_term_is_the_cross_entropy_without_relatives():
    generator = torch.Generator().manual_seed(1)
    targets = F.normalize(torch.randn(5, 4, generator=generator), dim=1)
    listed = [Record(path=f"{i}", id="same" if i < 2 else f"{i}") for i in range(5)]
    features = torch.rand(1, 4, generator=generator)
    row = np.array([1])
    options = {"weight": 1e-30, "temperature": 0.5}
    loss = Retention(targets, listed, instance_weight=1.0, **options)(features, features, row, row)
    cosines = (F.normalize(torch.logit(features), dim=1) @ targets.T)[0] / 0.5
    others = [1, 2, 3, 4]  # image 0 shows the same identity
    expected = -(cosines[1] - cosines[others].logsumexp(0))
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("normalisation", ["sample", "dataset"])
def test_the_aligned_network_equals_the_pretrained_where_latents_hold_the_pixels(
    weights, normalisation
):
    pretrained = load_pretrained("resnet10t", weights)
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    latents = torch.cat([images * 3 - 1, images[:, :1] * -2], dim=1)
    spec = NetworkSpec(
        backbone="resnet10t", in_channels=4, num_features=8, input_size=32,
        normalisation=normalisation, mean=(0.5, 0.4, 0.3, -1.0), std=(0.9, 0.8, 0.9, 0.6),
    )  # fmt: skip
    network = SiameseNetwork(spec).eval()
    assert copy_backbone(network, pretrained)
    explained = align_stem(network, pretrained, iter([(images, latents)]))
    assert explained > 0.99
    mean, std = (pretrained.pretrained_cfg[key] for key in ("mean", "std"))
    pixels = {
        "sample": normalise(images, "sample"),
        "dataset": torchvision_normalise(images, mean, std),
    }[normalisation]
    inputs = normalise(latents, normalisation, mean=network.mean, std=network.std)
    with torch.no_grad():
        expected = pretrained.forward_features(pixels)
        ours = network.backbone.forward_features(inputs)
    assert F.cosine_similarity(ours.flatten(), expected.flatten(), dim=0) > 0.99


def test_frozen_statistics_keep_rows_independent():
    spec = NetworkSpec(
        backbone="resnet10t", in_channels=4, num_features=8, input_size=16, normalisation="sample"
    )
    torch.manual_seed(0)
    network = SiameseNetwork(spec).train()
    freeze_statistics(network, trained=True)
    before = {k: v.clone() for k, v in network.state_dict().items() if "running" in k}
    latents = torch.randn(4, 4, 16, 16)
    whole = network(latents)
    alone = torch.cat([network(latents[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(alone.detach(), whole.detach(), atol=1e-5)
    assert all(torch.equal(network.state_dict()[k], v) for k, v in before.items())


def test_both_stages_with_a_teacher(run_cli, image_folder, tiny_codec, weights, tmp_path):
    for identity in range(18, 24):
        shutil.rmtree(image_folder / f"id{identity:02d}")
    run_cli(
        "latents", "--filelist", image_folder, "--codec", tiny_codec, "--size", 32,
        "-o", tmp_path / "latents",
    )  # fmt: skip
    common = [
        "--set=retention.weight=1.0", "--set=retention.instance_weight=0.5",
        "--set=optimiser.freeze_statistics=true", "--set=schedule.epochs=1",
        "--set=schedule.batch_size=8", "--set=runtime.device=cpu",
    ]  # fmt: skip
    stage1 = (
        "train-stage1", "--latents", tmp_path / "latents", "--filelist", image_folder,
        "-o", tmp_path / "stage1", f"--set=codec.name={tiny_codec}",
        "--set=image.size=32", "--set=network.backbone=resnet10t",
        f"--set=network.weights={weights}", "--set=network.align_stem=24",
        "--set=network.stem_stride=1", "--set=network.num_features=16",
        "--set=network.inner_stride=16", "--set=network.inner_bands=2",
        "--set=network.feature_rms=1.5",
        "--set=network.align_altered=strong",
        f'--set=retention.panel={{resnet10t="{weights}"}}', *common,
    )  # fmt: skip
    run_cli(*stage1)
    tuned_by = (
        "finetune", tmp_path / "stage1" / "checkpoint.safetensors", "--filelist", image_folder,
        "-o", tmp_path / "tuned", "--set=image.size=48", "--set=sampling.passes_per_epoch=2",
        "--set=augmentation.working_size=64", "--set=schedule.keep=last",
        "--set=schedule.patience=0", *common, "--set=schedule.epochs=2",
    )  # fmt: skip
    run_cli(*tuned_by)
    for stage in ("stage1", "tuned"):
        history = json.loads((tmp_path / stage / "training.json").read_text())["history"]
        assert history[0]["train_retention"] > 0
        assert history[0]["train_loss"] == pytest.approx(
            0.8 * history[0]["train_bce"]
            + 0.2 * history[0]["train_ntxent"]
            + history[0]["train_retention"],
            rel=1e-4,
        )
    assert json.loads((tmp_path / "tuned" / "training.json").read_text())["best_epoch"] == 2
    first = load_checkpoint(tmp_path / "stage1" / "checkpoint.safetensors")
    tuned = load_checkpoint(tmp_path / "tuned" / "checkpoint.safetensors")
    assert (first.image_size, tuned.image_size) == (32, 48)
    key = "backbone.trunk.layer1.0.bn1.running_mean"
    assert torch.equal(first.network_state[key], tuned.network_state[key])
    assert not torch.equal(first.network_state["head.weight"], tuned.network_state["head.weight"])
    teacher = tmp_path / "stage1" / "teacher.safetensors"
    known = teacher.read_bytes()
    run_cli(*stage1, "--resume")  # finished: nothing is made anew that the next stage is known by
    assert teacher.read_bytes() == known
    run_cli(*tuned_by, "--resume")
    tensors = load_file(teacher)
    tensors["projection"] = tensors["projection"][:5].contiguous()
    header = {"backbones": ["resnet10t"] * 2, "inner_stride": 16, "inner_bands": 2}
    narrow = tmp_path / "narrow.safetensors"
    save_file(tensors, narrow, metadata={"teacher": json.dumps(header)})
    network = load_checkpoint(tmp_path / "stage1" / "checkpoint.safetensors").build()
    with pytest.raises(InputError, match="a teacher of networks with 5 features, not 16"):
        load_teacher(narrow, network)
    teacher.unlink()
    refused = run_cli(
        "finetune", tmp_path / "stage1" / "checkpoint.safetensors", "--filelist", image_folder,
        "-o", tmp_path / "again", *common, exit_code=2,
    )  # fmt: skip
    assert "teacher" in refused.stderr
