"""A backbone that shows an earlier stage beside its last features."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import timm
import torch
from conftest import random_checkpoint
from torch.nn import functional as F

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.augment import Augmentation
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.detectors.export import export_checkpoint
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.errors import CheckpointError, InputError
from lcmem_cli.engine.models.checkpoint import (
    load_checkpoint,
    save_checkpoint,
)
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.siamese import NetworkSpec, SiameseNetwork, TwoLevelBackbone
from lcmem_cli.engine.training.initialise import align_stem, copy_backbone, project_features
from lcmem_cli.engine.training.last_layer import adapt
from lcmem_cli.engine.training.teacher import Member, Teacher, normalise_pixels

pytestmark = pytest.mark.usefixtures("no_drawing")


def spec_of(backbone="resnet10t", **changes):
    spec = NetworkSpec(
        backbone=backbone, in_channels=3, num_features=8, input_size=64, normalisation="none",
        inner_stride=16,
    )  # fmt: skip
    return dataclasses.replace(spec, **changes)


def images(num, side=64):
    return torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(num))


@pytest.mark.parametrize(
    "backbone", ["resnet10t", "tf_efficientnet_lite0", "convnext_atto", "mobilenetv3_small_050"]
)
def test_it_reads_the_last_features_and_mean_and_deviation_of_the_stage(backbone):
    torch.manual_seed(0)
    network = SiameseNetwork(spec_of(backbone)).eval()
    # The same numbers by timm's own ways: a model without a classifier, and one of stages.
    last = timm.create_model(backbone, pretrained=False, num_classes=0).eval()
    stages = timm.create_model(backbone, pretrained=False, features_only=True).eval()
    number = stages.feature_info.reduction().index(16)
    state = {k.removeprefix("trunk."): v for k, v in network.backbone.state_dict().items()}
    last.load_state_dict({k: state[k] for k in last.state_dict()})
    flat = {
        k.replace("stages_", "stages.").replace("stem_", "stem."): k for k in stages.state_dict()
    }
    stages.load_state_dict({flat[k]: v for k, v in state.items() if k in flat})
    with torch.no_grad():
        pooled, inner = last(images(2)).numpy(), stages(images(2))[number].numpy()
        descriptors = [
            pooled / np.sqrt(np.abs(pooled) + 0.01),
            inner.mean(axis=(2, 3)),
            np.log(inner.var(axis=(2, 3)) + 0.01),
        ]
        alike = [
            (d - d.mean(axis=1, keepdims=True)) / np.sqrt(d.var(axis=1, keepdims=True) + 1e-5)
            for d in descriptors
        ]
        rows = torch.from_numpy(np.concatenate(alike, axis=1).astype(np.float32))
        expected = torch.sigmoid(network.backbone.get_classifier()(rows))
        np.testing.assert_allclose(network(images(2)), expected, atol=1e-4)


@pytest.mark.parametrize(("side", "num_bands"), [(64, 3), (64, 2), (100, 5), (32, 4)])
def test_bands_tell_how_high_in_the_image_a_thing_is(side, num_bands):
    torch.manual_seed(0)
    trunk = timm.create_model("resnet10t", pretrained=False, num_classes=0).eval()
    without = TwoLevelBackbone(trunk, 16, None).eval()
    banded = TwoLevelBackbone(trunk, 16, None, num_bands).eval()
    assert banded.widths == [*without.widths, 256 * num_bands]
    with torch.no_grad():
        found = banded(images(3, side))
        [inner] = trunk.forward_intermediates(images(3, side), indices=[3], intermediates_only=True)
        pooled = F.adaptive_avg_pool2d(inner, (num_bands, 1)).flatten(1)
        assert torch.equal(found[:, : sum(without.widths)], without(images(3, side)))
    expected = (pooled - pooled.mean(dim=1, keepdim=True)) / (
        pooled.var(dim=1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    np.testing.assert_allclose(found[:, sum(without.widths) :], expected, atol=1e-4)


def test_a_silent_channel_has_a_gradient():
    network = SiameseNetwork(spec_of(in_channels=1))
    for parameter in network.backbone.trunk.parameters():
        torch.nn.init.zeros_(parameter)
    network(torch.zeros(2, 1, 64, 64)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_scaled_features_are_compared_by_direction():
    network = SiameseNetwork(spec_of(feature_rms=1.5)).eval()
    with torch.no_grad():
        before = torch.logit(network(images(3)))
        np.testing.assert_allclose(before.square().mean(dim=1).sqrt(), 1.5, rtol=1e-4)
        network.backbone.projection.weight.mul_(7)
        network.backbone.projection.bias.mul_(7)
        np.testing.assert_allclose(torch.logit(network(images(3))), before, rtol=1e-3, atol=1e-4)


def test_a_stride_that_the_backbone_does_not_have_is_named():
    with pytest.raises(InputError, match="no stage of stride 5; it has 2, 4, 8, 16, 32"):
        SiameseNetwork(spec_of(inner_stride=5))
    with pytest.raises(InputError, match=r"network\.inner_stride"):
        TwoLevelBackbone(torch.nn.Identity(), 16, 8)


@pytest.mark.parametrize(("feature_rms", "inner_bands"), [(None, None), (1.5, None), (1.5, 3)])
def test_a_checkpoint_of_two_levels_is_saved_exported_and_adapted(
    image_folder, tmp_path, monkeypatch, feature_rms, inner_bands
):
    # To a network with random weights nearly all images are one picture.
    monkeypatch.setattr("lcmem_cli.engine.detectors.adapted.ONE_PICTURE", 1.01)
    spec = spec_of(feature_rms=feature_rms, inner_bands=inner_bands)
    checkpoint = random_checkpoint(spec, load_codec("none"), image_size=64)
    saved = save_checkpoint(tmp_path / "two.safetensors", checkpoint)
    read = load_checkpoint(tmp_path / "two.safetensors")
    assert read.network == saved.network and read.network.inner_stride == 16
    with torch.no_grad():
        assert torch.equal(read.build()(images(2)), saved.build()(images(2)))
    exported = export_checkpoint(tmp_path / "two.safetensors", tmp_path / "two.pt2")
    assert exported.max_difference is not None and exported.max_difference <= 1e-4
    adapted = adapt(read, load_manifest(image_folder).select("TRAIN"))
    changed = [
        key for key, value in read.network_state.items()
        if not value.equal(adapted.network_state[key])
    ]  # fmt: skip
    assert sorted(changed) == ["backbone.projection.bias", "backbone.projection.weight"]
    assert adapted.network == read.network
    paths = load_manifest(image_folder).select("TRAIN").paths()
    pixels = torch.stack([to_tensor(load_image(path), 64) for path in paths])
    with torch.no_grad():
        means = [c.build().backbone(pixels).mean(dim=0).abs().max() for c in (read, adapted)]
    assert means[0] > 1e-2 and means[1] < 1e-4


@pytest.mark.parametrize("feature_rms", [0.0, -1.5, 11.0, float("nan")])
def test_a_feature_length_that_is_none_is_refused(tmp_path, feature_rms):
    spec = spec_of(feature_rms=feature_rms)
    made = random_checkpoint(spec, load_codec("none"), image_size=64)
    with pytest.raises(CheckpointError):
        save_checkpoint(tmp_path / "odd.safetensors", made)
        load_checkpoint(tmp_path / "odd.safetensors")


def test_weights_of_one_level_do_not_fit_two():
    one = random_checkpoint(spec_of(inner_stride=None), load_codec("none"), image_size=64)
    two = dataclasses.replace(one, network=spec_of())
    with pytest.raises(CheckpointError, match=r"missing: backbone\.projection"):
        two.build()


@pytest.mark.parametrize(("inner_bands", "widths"), [(None, []), (2, [512])])
def test_the_student_starts_where_the_teacher_sees_both_levels(
    image_folder, tmp_path, inner_bands, widths
):
    paths = sorted(image_folder.rglob("*.png"))
    torch.manual_seed(3)
    pretrained = timm.create_model("resnet10t", pretrained=False).eval()
    teacher, pooled = Teacher.fit(
        [Member.of("resnet10t", pretrained, 16, inner_bands)], paths, num_features=8, seed=1
    )
    teacher.save(tmp_path / "teacher.safetensors")
    levels = Teacher.load(tmp_path / "teacher.safetensors").members[0].pool(paths)
    assert [level.shape[1] for level in levels] == [512, 256, 256, *widths]
    assert torch.equal(torch.cat(levels, dim=1), pooled)
    network = SiameseNetwork(spec_of(in_channels=4, inner_bands=inner_bands)).eval()
    pixels = images(12)
    latents = torch.cat([pixels * 3 - 1, pixels[:, :1]], dim=1)
    assert copy_backbone(network, pretrained)
    assert align_stem(network, pretrained, iter([(pixels, latents)])) > 0.99
    project_features(network, teacher, iter([latents]))
    levels = TwoLevelBackbone(pretrained, 16, None, inner_bands).eval()
    with torch.no_grad():
        expected = levels(normalise_pixels(pretrained, pixels)) @ teacher.start.T
        ours = torch.logit(network(latents))
    expected = expected - expected.mean(dim=0)
    assert F.cosine_similarity(ours, expected, dim=1).min() > 0.98


def test_each_level_has_the_same_say_whatever_its_scale(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    last, inner = torch.randn(60, 5, generator=generator), torch.randn(60, 3, generator=generator)
    member = Member.of("resnet10t", timm.create_model("resnet10t", pretrained=False), 16)
    starts = []
    for scale in (1, 1000):
        monkeypatch.setattr(Member, "pool", lambda *_, scale=scale, **__: [last, inner * scale])
        starts.append(Teacher.fit([member], [], num_features=4, seed=1)[0].start)
    plain, scaled = starts
    expected = plain / torch.tensor([1.0] * 5 + [1000.0] * 3)
    np.testing.assert_allclose(scaled, expected, rtol=1e-3, atol=1e-6)


def test_directions_that_edits_move_count_less_at_the_start(image_folder):
    paths = sorted(image_folder.rglob("*.png"))
    torch.manual_seed(3)
    member = Member.of("resnet10t", timm.create_model("resnet10t", pretrained=False), 16)
    strong = Augmentation.from_preset("strong")
    plain, pooled = Teacher.fit([member], paths, num_features=8, seed=1)
    aware, _ = Teacher.fit([member], paths, num_features=8, seed=1, altered=strong)
    assert torch.equal(plain.mean, aware.mean)
    again, _ = Teacher.fit(
        [member], paths, num_features=8, seed=1, altered=strong, compute=Compute(workers=0)
    )
    assert torch.equal(aware.start, again.start)
    # Copies altered with other seeds than those that it was fitted to.
    copies = torch.cat(
        member.pool(paths, transform=lambda image, row: strong(image, seed=1000 + row)), dim=1
    )

    def moved(teacher):
        return ((copies - pooled) @ teacher.start.T).square().sum() / (
            ((pooled - teacher.mean) @ teacher.start.T).square().sum()
        )

    assert moved(aware) < 0.9 * moved(plain)


def test_two_processes_alter_and_pool_what_one_does(image_folder):
    paths = sorted(image_folder.rglob("*.png"))[:5]
    model = timm.create_model("resnet10t", pretrained=False)
    member = Member.of("resnet10t", model, 16)
    strong = Augmentation.from_preset("strong")
    sent = []

    class Scripted(Ranks):
        """A process of two whose partner's part is what ``sent`` holds."""

        def gather(self, value):
            sent.append(value)
            return [value, sent[0]]

    def pool(ranks):
        compute = Compute(ranks=ranks)
        return member.pool(paths, compute, transform=lambda x, row: strong(x, seed=row))

    with contextlib.suppress(ValueError):  # its own part stands in for its partner's here
        pool(Scripted(1, 2))
    for one, two in zip(pool(Ranks()), pool(Scripted(0, 2)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
