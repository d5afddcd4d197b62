"""The chunked training loss equals the plain one, in value and gradients, also across the borders of its chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ulm.components import loss
from ulm.reference.attention import softmax
from ulm.reference.loss import cross_entropy

B, T, D, V = 2, 100, 8, 97
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}  # logits are turned to float32 before the softmax, whatever the model's dtype


@pytest.fixture(params=["one chunk", "chunks of 64 tokens"])
def chunks(request, monkeypatch):
    if request.param != "one chunk":
        monkeypatch.setattr(loss, "CPU_CHUNK", 1)


@pytest.fixture
def given():
    """States far enough apart that some targets are certain and some hopeless, a head, targets, and who is scored."""
    generator = torch.Generator().manual_seed(0)
    x_BTD = (torch.randn(B, T, D, generator=generator) * 3).double().requires_grad_()
    head = torch.nn.Linear(D, V, bias=False).double()
    with torch.no_grad():
        head.weight.normal_(generator=generator)
    targets_BT = torch.randint(V, (B, T), generator=generator)
    scored_BT = torch.rand(B, T, generator=generator) < 0.7
    return x_BTD, head, targets_BT, scored_BT


def test_summed_and_single_nats_equal_the_reference(chunks, given):
    x_BTD, head, targets_BT, scored_BT = given
    masked_BT = targets_BT.masked_fill(~scored_BT, loss.NO_TARGET)
    logits_BTV = head(x_BTD).detach().numpy()
    mean = cross_entropy(logits_BTV, targets_BT.numpy(), scored_BT.numpy())
    summed = loss.summed_nats(x_BTD, masked_BT, head, V)
    np.testing.assert_allclose(summed.detach() / scored_BT.sum(), mean, **FLOAT32)
    nats_BT = loss.nats_per_target(x_BTD, masked_BT, head, V)
    assert nats_BT.shape == (B, T)
    assert nats_BT[~scored_BT].abs().max() == 0
    np.testing.assert_allclose(nats_BT.double().sum() / scored_BT.sum(), mean, **FLOAT32)
    with torch.no_grad():
        np.testing.assert_allclose(loss.summed_nats(x_BTD, masked_BT, head, V), summed.detach(), **FLOAT32)


def test_gradients_are_softmax_minus_the_target(chunks, given):
    x_BTD, head, targets_BT, scored_BT = given
    (loss.summed_nats(x_BTD, targets_BT.masked_fill(~scored_BT, loss.NO_TARGET), head, V) / 3).backward()
    weight_VD, x = head.weight.detach().numpy(), x_BTD.detach().numpy()
    error_BTV = (softmax(x @ weight_VD.T) - np.eye(V)[targets_BT]) * scored_BT.numpy()[..., None] / 3
    np.testing.assert_allclose(x_BTD.grad, error_BTV @ weight_VD, **FLOAT32)
    np.testing.assert_allclose(head.weight.grad, np.einsum("btv,btd->vd", error_BTV, x), **FLOAT32)


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary():
    assert cross_entropy(np.zeros((1, 3, V)), np.array([[0, 50, 96]])) == pytest.approx(np.log(97))
