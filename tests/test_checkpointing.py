"""Gradient checkpointing: less memory, the same loss, gradients and statistics."""

import copy

import pytest
import torch

from lcmem_cli.engine import config as cfg
from lcmem_cli.engine.errors import ConfigError, InputError
from lcmem_cli.engine.models.siamese import NetworkSpec, SiameseNetwork, use_checkpointing
from lcmem_cli.engine.training.losses import TrainingLoss, pair_loss
from lcmem_cli.engine.training.run import open_training_folder
from lcmem_cli.engine.training.step import StepPlan, forward_backward


def network(backbone, drop_path_rate=0.0, inner_stride=None):
    torch.manual_seed(0)
    spec = NetworkSpec(
        backbone=backbone, in_channels=4, num_features=8, input_size=32, normalisation="sample",
        inner_stride=inner_stride,
    )  # fmt: skip
    return SiameseNetwork(spec, drop_path_rate=drop_path_rate).train()


def loss_of(a, b, head):
    pair = pair_loss(a, b, head, alpha=0.8, temperature=0.07, negatives="all")
    return TrainingLoss(*pair, retention=pair.total.new_zeros(()))


def step(model, parts):
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 6, 4, 32, 32, generator=generator)
    return forward_backward(model, loss_of, a, b, StepPlan(num_pairs=6, parts=parts, step_seed=3))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("backbone", "inner_stride"),
    [
        ("resnet10t", None), ("convnext_atto", None), ("tf_efficientnet_lite0", None),
        ("convnext_atto", 16), ("tf_efficientnet_lite0", 16),
    ],
)  # fmt: skip
def test_loss_gradients_and_statistics_are_those_without(backbone, inner_stride, parts):
    plain = network(backbone, drop_path_rate=0.3, inner_stride=inner_stride)
    saving = copy.deepcopy(plain)
    use_checkpointing(saving)
    passes = []
    convolutions = [m for m in saving.backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    inside = convolutions[len(convolutions) // 2]
    inside.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    losses = [step(model, parts) for model in (plain, saving)]
    # Each part runs again in the backward pass, and once without gradient where there are several.
    assert len(passes) == parts * (2 if parts == 1 else 3)
    assert all(torch.equal(x, y) for x, y in zip(*losses, strict=True))
    for (name, x), y in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert x.grad is not None and torch.equal(x.grad, y.grad), name
    for (name, x), y in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(x, y), name


def test_computing_in_parts_counts_each_part_once():
    model = network("resnet10t")
    step(model, 3)
    counts = {int(v) for n, v in model.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts == {3}


def test_a_backbone_that_cannot_is_named():
    with pytest.raises(InputError, match=r"runtime\.checkpointing: timm's dla46_c does not"):
        use_checkpointing(network("dla46_c"))


def test_it_is_no_part_of_the_study(tmp_path):
    digests = set()
    for number, value in enumerate(("true", "false")):
        config = cfg.load_config(
            "stage1", cfg.Stage1Config, overrides=[f"runtime.checkpointing={value}"]
        )
        with open_training_folder(tmp_path / str(number), config, "d", resume=False) as digest:
            digests.add(digest)
    assert len(digests) == 1


def test_it_has_no_effect_on_a_codec():
    with pytest.raises(ConfigError, match=r"runtime\.checkpointing: has no effect"):
        cfg.validate({"kind": "codec", "runtime": {"checkpointing": True}}, source="x")
