"""Muon is what its papers say, resumes exactly, and learns faster than AdamW."""

from __future__ import annotations

import copy
import pydoc_data.topics

import numpy as np
import pytest
import torch

import ulm
from ulm import registry
from ulm.checkpoints import store
from ulm.components.optimizer.muon import orthogonalised
from ulm.errors import ConfigError
from ulm.reference.optimizer import State, muon, newton_schulz
from ulm.tokenizers.byte import byte_tokenizer

FLOAT32 = {"rtol": 0.0, "atol": 2e-6}  # five steps; small singular values grow 500-fold, and so do their last bits
BFLOAT16 = 0.05  # of an update's norm: torch.optim.Muon multiplies in bfloat16, 8 bits to a factor, fifteen times over
LEARNS_FASTER = 0.92  # of AdamW's loss after 60 steps; 0.83 to 0.88 over seeds 0 to 3
TEXT = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).encode()


def build(model: torch.nn.Module, lr: float = 0.01, kind: str = "muon", **fields) -> torch.optim.Optimizer:
    return registry.find("optimizer", kind).build(registry.configure("optimizer", {"kind": kind, **fields}), model, lr)


def fill_gradients(model: torch.nn.Module, step: int) -> None:
    """Low rank and noise, as gradients are; the same at every call with this step."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 2:
            noise = 0.1 * noise + torch.outer(noise[:, 0], noise[0])
        p.grad = (noise * 1e-3).to(p.dtype)


def numbers(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "fields",
    [{}, {"adamw_lr": 3e-3, "lr": 0.01}, {"scale": "original", "lr": 0.01, "adamw_lr": 3e-3, "num_iterations": 3}],
    ids=["default", "two rates", "original"],
)
def test_five_steps_of_a_whole_model_equal_the_reference_in_float32(nano, fields):
    model = nano(embedding={"tied": False})
    config = registry.configure("optimizer", {"kind": "muon", **fields})
    optimizer = registry.find("optimizer", "muon").build(config, model, 0.01)
    expected, state = copy.deepcopy(numbers(model)), State()
    for step in range(5):
        fill_gradients(model, step)
        gradients = {name: p.grad.double().numpy() for name, p in model.named_parameters()}
        expected, state = muon(expected, gradients, state, config.model_dump(), 0.01)
        optimizer.step()
    for name, found in numbers(model).items():
        np.testing.assert_allclose(found, expected[name], err_msg=name, **FLOAT32)


def test_an_update_agrees_with_torch_muon_as_far_as_bfloat16_goes(nano):
    ours, theirs = nano(), nano()
    optimizer = build(ours, weight_decay=0.0)
    hidden = [p for p in theirs.blocks.parameters() if p.dim() == 2]
    torch_muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        before = copy.deepcopy(numbers(ours))
        with torch.no_grad():
            for p, own in zip(theirs.parameters(), ours.parameters(), strict=True):
                p.copy_(own)
        for model, update in ((ours, optimizer), (theirs, torch_muon)):
            fill_gradients(model, step)
            update.step()
        for name, found in numbers(theirs).items():
            if name.startswith("blocks.") and found.ndim == 2:
                moved, difference = found - before[name], numbers(ours)[name] - found
                assert np.linalg.norm(difference) < BFLOAT16 * np.linalg.norm(moved), name


def test_embedding_head_and_vectors_move_as_by_adamw_and_matrices_do_not(nano):
    by_muon, by_adamw = nano(embedding={"tied": False}), nano(embedding={"tied": False})
    for model, kind in ((by_muon, "muon"), (by_adamw, "adamw")):
        optimizer = build(model, kind=kind)
        for step in range(3):
            fill_gradients(model, step)
            optimizer.step()
    same = {name for name, p in by_muon.named_parameters() if torch.equal(p, by_adamw.get_parameter(name))}
    others = {name for name, _ in by_muon.named_parameters()} - same
    assert {"embedding.weight", "head.weight", "norm.weight", "blocks.0.attention_norm.weight"} <= same
    assert others == {name for name, p in by_muon.blocks.named_parameters(prefix="blocks") if p.dim() == 2}


def test_matrices_are_orthogonalised_in_a_stack_as_alone_and_a_zero_one_stays_zero():
    x_NRC = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_NRC[1] = 0
    found = orthogonalised(x_NRC, 5)
    for x, turned in zip(x_NRC, found, strict=True):
        np.testing.assert_allclose(turned, newton_schulz(x.numpy(), 5), atol=1e-11)
    values = torch.linalg.svdvals(found[0])
    assert 0.6 < values.min() and values.max() < 1.25
    assert not found[1].any()


def test_an_update_is_as_large_as_adamws_usual_one(nano):
    model = nano()
    before = copy.deepcopy(numbers(model))
    fill_gradients(model, 0)
    with torch.no_grad():
        for p in model.parameters():  # of full rank: a matrix of low rank moves less
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    build(model, lr=0.01, weight_decay=0.0).step()
    for name, found in numbers(model).items():
        if name.startswith("blocks.") and found.ndim == 2:
            rms = float(np.sqrt(((found - before[name]) ** 2).mean())) / 0.01
            assert 0.15 < rms < 0.25, f"{name}: arXiv 2502.16982 aims at 0.2 to 0.4, AdamW's own"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_it_resumes_from_a_checkpoint_bit_for_bit(nano, tmp_path, dtype):
    def steps(model, optimizer, numbers):
        for step in numbers:
            fill_gradients(model, step)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] / (1 + step)
            optimizer.step()

    whole = nano().to(dtype)
    steps(whole, build(whole), range(6))
    half = nano().to(dtype)
    optimizer = build(half)
    steps(half, optimizer, range(3))
    taken = store.snapshot(half, byte_tokenizer(), step=3, optimizer=optimizer, state={"step": 3})
    steps(half, optimizer, [99])  # after the snapshot: must not show in it
    folder = store.write(taken, tmp_path / "step-00000003")
    resumed = nano(seed=7).to(dtype)
    optimizer = build(resumed, lr=9.0)
    assert store.load_training(resumed, optimizer, folder) == {"step": 3}
    assert {p.dtype for p in resumed.parameters()} == {dtype}
    steps(resumed, optimizer, range(3, 6))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_a_gradient_that_overflows_in_float16_changes_nothing(nano):
    model = nano()
    optimizer, scaler = build(model), torch.amp.GradScaler("cpu", init_scale=2.0)
    plain = nano()
    fill_gradients(plain, 0)
    build(plain).step()
    for overflows in (True, False):
        fill_gradients(model, 0)
        for p in model.parameters():
            p.grad.mul_(scaler.get_scale())
        if overflows:
            model.norm.weight.grad[0] = torch.inf
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        expected = nano() if overflows else plain
        assert all(torch.equal(p, expected.get_parameter(name)) for name, p in model.named_parameters())
        assert scaler.get_scale() == 1.0


def test_the_original_scale_needs_its_own_rates():
    with pytest.raises(ConfigError, match=r"^optimizer\.scale: original without .* \(lr, about 0\.02, and adamw_lr"):
        registry.configure("optimizer", {"kind": "muon", "scale": "original"})


def loss_after(kind: str, seed: int, num_steps: int = 60) -> float:
    """Nats a byte of Python's reference prose, over the last ten of so many steps of nano at the preset's rate."""
    spec = ulm.ModelSpec.preset("nano", vocab_size=257, context_tokens=64)
    model, lr = ulm.build(spec, seed=seed), ulm.ModelSpec.training_defaults("nano")["lr"]
    optimizer = build(model, lr=lr, kind=kind)
    schedule, share = registry.configure("schedule", "cosine"), registry.find("schedule", "cosine").share
    tokens_N = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share(schedule, step, num_steps)
        starts_B = torch.randint(len(tokens_N) - 65, (16, 1), generator=generator)
        rows_BT = tokens_N[starts_B + torch.arange(65)]
        loss = torch.nn.functional.cross_entropy(model(rows_BT[:, :-1]).flatten(0, 1), rows_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@pytest.mark.parametrize("seed", [0, 1])
def test_it_lowers_the_loss_of_real_text_faster_than_adamw_at_the_preset_rate(seed):
    assert loss_after("muon", seed) < LEARNS_FASTER * loss_after("adamw", seed)
