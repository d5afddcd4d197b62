"""What families of kinds claim of themselves. Their members are found by what they are, in the listed folders."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ulm
from ulm import registry
from ulm.components.attend import naive
from ulm.components.attention import gqa
from ulm.components.attention._kernelised import BLOCK_TOKENS
from ulm.components.cache import Cache
from ulm.components.contracts import Mask, ModelDims, Pair, Places
from ulm.reference.feedforward import balance_loss
from ulm.spec import HEAD_DIMS

FLOAT64 = {"rtol": 0.0, "atol": 1e-9}  # the same sums of some hundred terms in another order, in float64
ROPE_TABLE = 1e-6  # cosines and sines are kept in float32 (6e-8 each); the scores here are of unit vectors
HEADS = {"num_heads": 4, "num_kv_heads": 2}
HEAD_DIM, D_MODEL = 8, 24


def dims_of(context_tokens: int = 1024, **sizes: int) -> ModelDims:
    given = {"d_model": D_MODEL, "num_layers": 1, "vocab_size": 3, "head_dim": HEAD_DIM, **HEADS, **sizes}
    return ModelDims(context_tokens=context_tokens, **given)


def position_of(kind: str, context_tokens: int = 1024, **settings: Any) -> Any:
    config = registry.configure("position", {"kind": kind, **settings})
    return registry.find("position", kind)(config, dims_of(context_tokens))


def attention_of(kind: str, position: str = "rope", **settings: Any) -> Any:
    """In float64, every weight drawn from one seed, so that kinds with the same parts have the same weights."""
    config = registry.configure("attention", {"kind": kind, **HEADS, "head_dim": HEAD_DIM, **settings})
    module = registry.find("attention", kind)(config, dims_of(), position_of(position), 0).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.normal_(0.0, 0.3, generator=generator)
    return module


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def causal() -> Any:
    return registry.find("mask", "causal")(registry.configure("mask", "causal"))


def one_pass(attention: Any, x_BTD: Tensor) -> Tensor:
    return attention(x_BTD, positions_BT=torch.arange(x_BTD.shape[1])[None], mask=Mask())


OF_ITS_OWN_TEXT = [
    kind for kind in ulm.kinds("attention") if not getattr(registry.find("attention", kind), "needs_source", False)
]


# ---- windows: kinds with `window_tokens` among their settings

WINDOWED = [k for k in OF_ITS_OWN_TEXT if "window_tokens" in registry.find("attention", k).Config.model_fields]
WITH = {
    "": {},
    "first tokens too": {"num_sink_tokens": 3},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": True},
    "all of these": {"num_sink_tokens": 2, "soft_cap": 1.5, "sinks": True, "qk_norm": True},
}
WINDOWED_WITH = [
    pytest.param(kind, settings, id=f"{kind} {name}".strip())
    for kind in WINDOWED
    for name, settings in WITH.items()
    if settings.keys() <= registry.find("attention", kind).Config.model_fields.keys()
]


@dataclasses.dataclass(frozen=True)
class Near:
    """The mask that a window stands for: a query sees the last few keys, itself included, and the first of the row."""

    window_tokens: int
    num_first: int
    is_causal = False

    def allowed(self, pair: Pair) -> Tensor:
        return (pair.q_position < pair.k_position + self.window_tokens) | (pair.k_position < self.num_first)


def test_there_is_a_windowed_kind():
    assert "sliding" in WINDOWED


@pytest.mark.parametrize(("kind", "settings"), WINDOWED_WITH)
@pytest.mark.parametrize(("window_tokens", "num_tokens"), [(1, 7), (2, 9), (5, 23), (16, 61), (40, 39), (40, 41)])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_a_window_is_dense_attention_under_its_mask_forward_and_backward(
    kind, settings, window_tokens, num_tokens, position, monkeypatch
):
    windowed = attention_of(kind, position, window_tokens=window_tokens, **settings)
    shared = {k: v for k, v in settings.items() if k in gqa.Config.model_fields}
    dense = attention_of("gqa", position, **shared)
    assert sorted(dict(dense.named_parameters())) == sorted(dict(windowed.named_parameters()))
    positions_BT = torch.arange(num_tokens)[None]
    mask = Mask((causal(), Near(window_tokens, settings.get("num_sink_tokens", 0))), Places(positions_BT, positions_BT))

    def scored(self, q, k, v, mask, bias_BHTS=None):
        return naive(q, k, v, mask, bias_BHTS, soft_cap=self.soft_cap, sinks_H=self.sinks)

    monkeypatch.setattr(gqa.GroupedQueryAttention, "scored", scored)  # of dense attention alone: a window keeps its own
    outcomes = []
    for attention, seen in ((windowed, Mask()), (dense, mask)):
        x_BTD = drawn(2, num_tokens, D_MODEL).requires_grad_()
        out_BTD = attention(x_BTD, positions_BT=positions_BT, mask=seen)
        out_BTD.backward(drawn(2, num_tokens, D_MODEL, seed=1))
        gradients = {name: parameter.grad for name, parameter in attention.named_parameters()}
        outcomes.append({"out": out_BTD.detach(), "x": x_BTD.grad, **gradients})
    for name, expected in outcomes[1].items():
        # Queries and keys do not matter to a token that sees itself alone.
        assert expected.abs().max() > 1e-3 or (window_tokens == 1 and name[0] in "qk")
        torch.testing.assert_close(
            outcomes[0][name], expected, **FLOAT64, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- states that do not grow: what decoding keeps is the same for any length


def held_bytes(attention: Any, max_tokens: int) -> int:
    state = attention.new_state(1, max_tokens, torch.zeros(1, dtype=torch.float64))
    values = (getattr(state, field.name) for field in dataclasses.fields(state))
    return sum(x.nbytes for x in values if isinstance(x, Tensor))


def bounded(kind: str, position: str = "rope") -> Any:
    """The kind; its window, if it has one, short against the rows of this file."""
    return attention_of(kind, position, **({"window_tokens": 37} if kind in WINDOWED else {}))


BOUNDED = [k for k in OF_ITS_OWN_TEXT if held_bytes(bounded(k), 4_000) == held_bytes(bounded(k), 8_000)]
LONG_T = 2 * BLOCK_TOKENS + 37
PREFILLS = {
    "one token at a time": [1] * LONG_T,
    "odd parts": [7, BLOCK_TOKENS + 3, 1, BLOCK_TOKENS + 1, LONG_T - 2 * BLOCK_TOKENS - 12],
    "one part, then tokens": [LONG_T - 5, 1, 1, 1, 1, 1],
}


def test_windows_and_sums_keep_the_same_memory_however_long_the_text():
    assert {"linear", "performer", *WINDOWED} <= set(BOUNDED)
    assert "gqa" not in BOUNDED


@pytest.mark.parametrize("kind", BOUNDED)
@pytest.mark.parametrize("position", ["rope", "none"])
@pytest.mark.parametrize("parts", PREFILLS.values(), ids=PREFILLS.keys())
def test_the_recurrent_form_equals_the_parallel_form_over_several_blocks(kind, position, parts):
    attention, x_BTD = bounded(kind, position), drawn(2, LONG_T, D_MODEL)
    assert sum(parts) == LONG_T > 2 * BLOCK_TOKENS
    with torch.no_grad():
        expected = one_pass(attention, x_BTD)
        torch.testing.assert_close(in_parts(attention, x_BTD, parts), expected, **FLOAT64)


def in_parts(attention: Any, x_BTD: Tensor, parts: list[int]) -> Tensor:
    """The same row read part by part, with a cache."""
    state = attention.new_state(len(x_BTD), LONG_T, x_BTD)
    cache = Cache([state], torch.zeros(len(x_BTD), dtype=torch.long), LONG_T, x_BTD.device)
    out = []
    for part_BTD in x_BTD.split(parts, dim=1):
        num_new_B = torch.full((len(x_BTD),), part_BTD.shape[1])
        places = cache.place(num_new_B, part_BTD.shape[1])
        mask = Mask((causal(),), places).dense()
        out.append(attention(part_BTD, positions_BT=places.q_positions_BT, mask=mask, cache=state))
        cache.lengths_B += num_new_B
    return torch.cat(out, dim=1)


# ---- rotary positions


def turned_scores(kind: str, num_tokens: int = 400, **settings: Any) -> Tensor:
    """q_m k_n at all pairs of positions, as scores_TS, of one query and one key of unit length."""
    position, both = position_of(kind, num_tokens, **settings), drawn(2, HEAD_DIM, seed=3)
    positions_BT = torch.arange(num_tokens)[None]
    q_TE, k_TE = (
        position.rotate((x_E / x_E.norm()).expand(1, num_tokens, 1, HEAD_DIM), positions_BT)[0, :, 0] for x_E in both
    )
    return q_TE @ k_TE.T


def turns(kind: str) -> bool:
    """Whether queries and keys go through this kind changed."""
    x_BTHE = drawn(1, 1, 1, HEAD_DIM)
    return not torch.equal(position_of(kind).rotate(x_BTHE, torch.tensor([[3]])), x_BTHE)


YARN = {"kind": "yarn", "factor": 4.0, "original_context_tokens": 100, "fast_turns": 8.0}
TURNING = {
    **{kind: (kind, {}) for kind in ulm.kinds("position") if turns(kind)},
    "rope, part of a head": ("rope", {"rotary_dim": 6}),
    "rope, linear": ("rope", {"scaling": {"kind": "linear", "factor": 4.0}}),
    "rope, ntk": ("rope", {"scaling": {"kind": "ntk", "factor": 4.0}}),
    "rope, yarn": ("rope", {"scaling": YARN}),
    "longrope, short": ("longrope", {"short_factors": [1.0, 1.5, 2.0, 4.0]}),
    "longrope, long": ("longrope", {"long_factors": [1.0, 2.0, 3.0, 8.0], "original_context_tokens": 100}),
}


@pytest.mark.parametrize(("kind", "settings"), TURNING.values(), ids=TURNING.keys())
def test_scores_of_turned_queries_and_keys_depend_on_their_distance_alone(kind, settings):
    scores_TS = turned_scores(kind, **settings)
    for shift in (1, 7, 100, 299):
        shifted_TS = scores_TS[shift:, shift:]
        same_TS = scores_TS[: len(shifted_TS), : len(shifted_TS)]
        assert (shifted_TS - same_TS).abs().max() < ROPE_TABLE
    assert scores_TS[:, 0].std() > 0.05  # and they do depend on it


def test_scaling_and_factors_are_no_words_alone():
    assert {"rope", "longrope"} <= TURNING.keys()
    tables = [turned_scores(kind, **settings) for kind, settings in TURNING.values() if settings]
    plain = turned_scores("rope")
    assert all((table - plain).abs().max() > 0.01 for table in tables)


def test_kept_first_tokens_keep_the_distances_among_themselves_and_so_do_the_others():
    kept, factors = 10, [2.0] * (HEAD_DIM // 2)
    scores_TS = turned_scores("longrope", short_factors=factors, keep_first_tokens=kept)
    plain_TS, slowed_TS = turned_scores("rope"), turned_scores("longrope", short_factors=factors)
    assert (scores_TS - plain_TS)[:kept, :kept].abs().max() < ROPE_TABLE
    assert (scores_TS - slowed_TS)[kept:, kept:].abs().max() < ROPE_TABLE
    assert (scores_TS - slowed_TS)[:kept, :kept].abs().max() > 0.01


UNIT = [1.0] * 16
UNIT_FACTORS = {
    "no factors": {},
    "short ones": {"short_factors": UNIT},
    "short ones and kept tokens": {"short_factors": UNIT, "keep_first_tokens": 5},
    "long ones": {"long_factors": UNIT, "short_factors": [3.0] * 16, "original_context_tokens": 8},
    "long ones of half a head": {"long_factors": UNIT[:8], "original_context_tokens": 8, "rotary_dim": 16},
}


@pytest.mark.parametrize("settings", UNIT_FACTORS.values(), ids=UNIT_FACTORS.keys())
def test_longrope_with_unit_factors_and_attention_factor_1_is_rope_to_the_last_bit(settings):
    fields = {"vocab_size": 97, "num_layers": 2, "context_tokens": 64}
    rope = {"kind": "rope", **{k: v for k, v in settings.items() if k == "rotary_dim"}}
    longrope = {"kind": "longrope", "attention_factor": 1.0, **settings}
    models = [ulm.build(ulm.ModelSpec.preset("nano", **fields, position=given), seed=1) for given in (rope, longrope)]
    for name, expected in models[0].position.named_buffers():
        assert torch.equal(models[1].position.get_buffer(name), expected), name
    tokens_BT = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(models[1](tokens_BT), models[0](tokens_BT))


# ---- mixture of experts


def experts_of(**settings: Any) -> Any:
    """In float64, with experts far apart."""
    config = registry.configure("feedforward", {"kind": "moe", "d_hidden": 16, **settings})
    module = registry.find("feedforward", "moe")(config, dims_of(), 0).double()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return module


def choices(module: Any, x_BTD: Tensor) -> np.ndarray:
    """The router's scores of every token, as scores_MN."""
    return module.router(x_BTD).detach().flatten(0, 1).numpy()


@pytest.mark.parametrize("experts_per_token", [1, 2, 5])
def test_what_a_token_gets_from_its_experts_does_not_depend_on_the_other_tokens(experts_per_token):
    module, x_BTD = experts_of(num_experts=5, experts_per_token=experts_per_token), drawn(3, 40, D_MODEL)
    together = module(x_BTD)
    for row, t in ((0, 0), (1, 17), (2, 39)):
        torch.testing.assert_close(module(x_BTD[row : row + 1, t : t + 1])[0, 0], together[row, t], **FLOAT64)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(module(x_BTD[:, order]), together[:, order], **FLOAT64)
    # None is dropped where all want the same expert: a hundred like this one get what it gets alone.
    crowd_BTD = torch.cat([x_BTD[:1, :1].expand(1, 100, D_MODEL), x_BTD[1:2]], dim=1)
    torch.testing.assert_close(module(crowd_BTD)[0, :100], together[0, :1].expand(100, D_MODEL), **FLOAT64)


@pytest.mark.parametrize(("num_experts", "experts_per_token"), [(8, 2), (5, 3), (4, 1), (3, 3)])
def test_the_auxiliary_loss_is_the_papers_times_its_weight(num_experts, experts_per_token):
    module = experts_of(num_experts=num_experts, experts_per_token=experts_per_token, balance=0.25)
    x_BTD = drawn(2, 30, D_MODEL)
    module(x_BTD)
    expected = 0.25 * balance_loss(choices(module, x_BTD), experts_per_token)
    assert module.auxiliary_losses[-1].item() == pytest.approx(expected, rel=1e-6)  # ours in float32, as the scores


def test_a_model_adds_up_the_auxiliary_losses_of_its_layers_for_its_last_call_alone():
    moe = {"kind": "moe", "num_experts": 4}
    fields = {"vocab_size": 97, "num_layers": 3, "context_tokens": 32, "feedforward": moe}
    model = ulm.build(ulm.ModelSpec.preset("nano", **fields), seed=0)
    tokens_BT = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(0))
    model(tokens_BT)
    model(tokens_BT)
    of_layers = [loss for block in model.blocks for loss in block.feedforward.auxiliary_losses]
    assert len(of_layers) == 3
    found = model.auxiliary_loss().item()
    assert found == pytest.approx(sum(loss.item() for loss in of_layers))
    assert 3 * 0.01 < found < 3 * 0.02  # balanced at first, nearly: 1 a layer, times 0.01
    with torch.no_grad():
        model(tokens_BT)
    assert model.auxiliary_loss() is None
    assert ulm.build(ulm.ModelSpec.preset("nano")).auxiliary_loss() is None


@pytest.mark.parametrize("experts_per_token", [1, 2])
def test_the_router_learns_from_what_its_experts_do_without_the_balance(experts_per_token):
    module = experts_of(num_experts=4, experts_per_token=experts_per_token, balance=0.0)
    module(drawn(2, 30, D_MODEL)).square().mean().backward()
    assert not module.auxiliary_losses
    assert module.router.weight.grad.abs().max() > 1e-6


def test_balanced_experts_have_a_loss_of_1_and_a_collapsed_router_as_many_as_there_are():
    balanced_MN = 20.0 * np.eye(6)[np.arange(60) % 6]  # each expert is sure of a sixth of the tokens
    assert balance_loss(balanced_MN, 1) == pytest.approx(1.0)
    assert balance_loss(20.0 * np.eye(6)[np.zeros(60, int)], 1) == pytest.approx(6.0, rel=1e-6)


def test_where_busier_experts_are_likelier_ones_the_loss_is_at_least_1():
    """Chebyshev's sum inequality; for tokens that all have the same scores it is a theorem. In general it is not: an
    expert may be chosen often by a little and be unlikely elsewhere."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        scores_MN = np.tile(generator.normal(size=(1, 6)), (8, 1))
        assert balance_loss(scores_MN, int(generator.integers(1, 7))) >= 1 - 1e-12
    little_MN = np.log([[0.51, 0.49]] * 3 + [[0.01, 0.99]])
    assert balance_loss(little_MN, 1) < 1


def test_following_the_auxiliary_loss_alone_makes_experts_equally_busy():
    module, x_BTD = experts_of(num_experts=4, experts_per_token=1, balance=1.0), drawn(4, 100, D_MODEL) + 0.5
    with torch.no_grad():
        module.router.weight[0] += 1.0  # one expert is liked by most tokens, whose numbers are rather positive
    optimizer = torch.optim.Adam([module.router.weight], lr=0.02)
    values, busiest = [], []
    for _ in range(150):
        module.auxiliary_losses.clear()
        module(x_BTD)
        optimizer.zero_grad()
        module.auxiliary_losses[0].backward()
        optimizer.step()
        values.append(module.auxiliary_losses[0].item())
        busiest.append(np.bincount(choices(module, x_BTD).argmax(-1), minlength=4).max() / 400)
    assert values[0] > 2 and busiest[0] > 0.6
    assert values[-1] < 1.05 and busiest[-1] < 0.35


# ---- random features


def test_performer_comes_nearer_to_softmax_attention_with_more_features():
    x_BTD = (
        drawn(1, 48, D_MODEL) / 4
    )  # scores that the estimate is known for: of larger ones it needs far more features
    exact = attention_of("gqa")
    expected = one_pass(exact, x_BTD).detach()
    flat = attention_of("gqa")
    torch.nn.init.zeros_(flat.q.weight)
    spread = (one_pass(flat, x_BTD).detach() - expected).square().mean().sqrt()  # of attention that looks everywhere
    errors = []
    for num_features in (64, 256, 1024, 4096):
        squares = []
        for seed in range(8):
            estimate = attention_of("performer", num_features=num_features, seed=seed)
            estimate.load_state_dict({**exact.state_dict(), "w_FE": estimate.w_FE})
            squares.append((one_pass(estimate, x_BTD).detach() - expected).square().mean())
        errors.append(math.sqrt(sum(squares) / len(squares)))
    assert errors == sorted(errors, reverse=True)
    # The error of a mean of m terms falls with 1 / sqrt(m): by 8 here. Eight seeds tell it to a fifth or so.
    assert 6 < errors[0] / errors[-1] < 11
    assert errors[-1] < spread / 8


@pytest.mark.parametrize("width", HEAD_DIMS)
def test_performers_directions_are_at_right_angles_within_a_block(width):
    config = registry.configure("attention", {"kind": "performer", **HEADS, "num_features": width + 3})
    module = registry.find("attention", "performer")(config, dims_of(head_dim=width), position_of("none"), 0)
    first = module.w_FE[:width].double()
    cosines = (first @ first.T) / first.norm(dim=1)[:, None] / first.norm(dim=1)
    assert (cosines - torch.eye(width)).abs().max() < 1e-5  # float32 numbers, sums of up to 128 of them
    assert module.w_FE.shape == (width + 3, width)
