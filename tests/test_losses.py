import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss
from torch import nn
from torch.nn import functional as F

from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.training.losses import all_pairs_bce, nt_xent, pair_loss, rolled_bce


def features(num_pairs: int, width: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, num_pairs, width, generator=generator, dtype=torch.float64)
    return a.requires_grad_(), b.requires_grad_()


def head(width: int = 12) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(width, 1, dtype=torch.float64)


def library_loss(a, b, layer, alpha, temperature):
    """The same loss by independent means: the metric-learning library and a loop over rows."""
    n = len(a)
    labels = torch.arange(n).repeat(2)
    contrastive = NTXentLoss(temperature=temperature)(torch.cat([a, b]), labels)
    half = n // 2
    rows = []
    for i in range(n):
        if i < half:
            other, target = a[i], 1.0
        else:
            other, target = a[i - 1] if i > half else a[n - 1], 0.0
        logit = layer((other - b[i]).abs()).squeeze()
        rows.append(F.binary_cross_entropy_with_logits(logit, torch.tensor(target).double()))
    return alpha * torch.stack(rows).mean() + (1 - alpha) * contrastive


@pytest.mark.parametrize("num_pairs", [3, 4, 7, 16])
@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
def test_pair_loss_equals_the_library_in_value_and_gradient(num_pairs, alpha):
    a, b = features(num_pairs)
    layer = head()
    ours = pair_loss(a, b, layer, alpha=alpha, temperature=0.07).total
    parameters = [a, b, *layer.parameters()]
    ours_gradient = torch.autograd.grad(ours, parameters, allow_unused=True)
    theirs = library_loss(a, b, layer, alpha, 0.07)
    their_gradient = torch.autograd.grad(theirs, parameters, allow_unused=True)
    assert abs(float(ours - theirs)) < 1e-6
    for x, y in zip(ours_gradient, their_gradient, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


def test_nt_xent_of_orthogonal_pairs_is_known():
    rows = torch.eye(4)
    # Each anchor: its positive at similarity 1, and 2 * 4 - 2 negatives at similarity 0.
    expected = np.log(np.exp(1 / 0.5) + 6) - 1 / 0.5
    assert abs(float(nt_xent(rows, rows, temperature=0.5)) - expected) < 1e-6


def test_rolled_bce_never_calls_a_true_pair_negative():
    a, b = features(2)
    with pytest.raises(InputError, match="at least 3 identities"):
        rolled_bce(a, b, head())


def test_all_pairs_bce_weighs_both_classes_equally():
    a, b = features(5)
    layer = head()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(2.0)
    expected = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(2.0))) / 2
    assert abs(float(all_pairs_bce(a, b, layer)) - expected) < 1e-9


def test_shapes_that_differ_are_refused():
    a, _ = features(4)
    _, b = features(5)
    with pytest.raises(InputError, match=r"two \[B, n\] tensors"):
        pair_loss(a, b, head())
