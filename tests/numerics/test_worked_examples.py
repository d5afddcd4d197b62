"""Examples small enough to do by hand: the sums stand in the docstrings, and our code and its NumPy reference agree.

ln, exp and cos are what a pocket calculator gives for them; everything else is adding and multiplying.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ulm import registry
from ulm.components import loss
from ulm.components.attend import attend, naive
from ulm.components.contracts import Mask, ModelDims, Places
from ulm.components.position.t5 import bucket
from ulm.reference import attention as by_the_book
from ulm.reference.feedforward import balance_loss
from ulm.reference.lookup import reference
from ulm.reference.loss import cross_entropy
from ulm.reference.mask import causal_table
from ulm.reference.position import Position

BY_HAND = {"rtol": 0.0, "atol": 6e-4}  # the figures of this file are written to three decimals
EYE_2, EYE_4 = np.eye(2), np.eye(4)


def tensor(values: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


def component(slot: str, kind: str, weights: dict[str, Any], *more: Any, sizes: dict[str, int], **settings: Any) -> Any:
    """A kind in float64, with exactly these weights."""
    dims = ModelDims(**{"d_model": 1, "num_layers": 1, "vocab_size": 3, "context_tokens": 8, "head_dim": 1, **sizes})
    built = registry.find(slot, kind)(registry.configure(slot, {"kind": kind, **settings}), dims, *more).double()
    built.load_state_dict({name: tensor(value) for name, value in weights.items()}, strict=True)
    return built


def both_attentions(kind: str, weights: dict[str, Any], x_TD: Any, num_heads: int = 1, **settings: Any) -> list[Any]:
    """What a kind makes of one causal row, as out_TD, by our code and by the reference, without positions."""
    x_BTD, heads = tensor(x_TD)[None], {"num_heads": num_heads, "num_kv_heads": num_heads}
    head_dim, num_tokens = len(weights["q.weight"]) // num_heads, x_BTD.shape[1]
    sizes = {"d_model": x_BTD.shape[2], "head_dim": head_dim, **heads}
    none = component("position", "none", {}, sizes=sizes)
    ours = component("attention", kind, weights, none, 0, sizes=sizes, head_dim=head_dim, **heads, **settings)
    positions_BT = torch.arange(num_tokens)[None]
    expected = reference("attention", kind)(
        x_BTD.numpy(),
        {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()},
        registry.configure("attention", {"kind": kind, "head_dim": head_dim, **heads, **settings}).model_dump(),
        positions_BT=positions_BT.numpy(),
        allowed_BTS=causal_table(num_tokens, num_tokens)[None],
        position=Position(),
    )
    return [ours(x_BTD, positions_BT=positions_BT, mask=Mask())[0].detach(), expected[0]]


def both_positions(kind: str, sizes: dict[str, int], weights: dict[str, Any] | None = None, **settings: Any) -> tuple:
    """A kind of position, ours and the reference's."""
    weights = weights or {}
    spec = {
        "d_model": sizes.get("d_model", 1),
        "context_tokens": 8,
        "attention": {"num_heads": sizes.get("num_heads", 1), "head_dim": sizes.get("head_dim", 1)},
        "position": registry.configure("position", {"kind": kind, **settings}).model_dump(),
    }
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    return component("position", kind, weights, sizes=sizes, **settings), reference("position", kind)(arrays, spec)


# ---- softmax and weighted sums


def test_the_softmax_of_2_0_and_minus_2():
    """exp: 7.389, 1, 0.135, together 8.524; shares 7.389 / 8.524 = 0.867, 0.117, 0.016."""
    expected = [0.867, 0.117, 0.016]
    np.testing.assert_allclose(tensor([2, 0, -2]).softmax(-1), expected, **BY_HAND)
    np.testing.assert_allclose(by_the_book.softmax(np.array([2.0, 0.0, -2.0])), expected, **BY_HAND)
    # As attention: q k = 4, 0, -4 in four dimensions, divided by sqrt(4); the values are the axes, so the shares show.
    q, k = tensor([2, 0, 0, 0]).view(1, 1, 1, 4), tensor([[2, 0, 0, 0], [0, 2, 0, 0], [-2, 0, 0, 0]]).view(1, 3, 1, 4)
    _all_forms_give(q, k, tensor(EYE_4[:3]).view(1, 3, 1, 4), np.ones((1, 1, 3), bool), [*expected, 0.0])


def test_weights_of_07_02_and_01_over_three_values():
    """0.7 (1, 2) + 0.2 (3, 4) + 0.1 (5, 6) = (0.7 + 0.6 + 0.5, 1.4 + 0.8 + 0.6) = (1.8, 2.8).

    The softmax of ln 0.7, ln 0.2, ln 0.1 is 0.7, 0.2, 0.1, for they sum to 1.
    """
    q = tensor([2**0.5, 0]).view(1, 1, 1, 2)  # divided by sqrt(2), its scores are the keys' first numbers
    k = tensor([[np.log(0.7), 0], [np.log(0.2), 0], [np.log(0.1), 0]]).view(1, 3, 1, 2)
    v = tensor([[1, 2], [3, 4], [5, 6]]).view(1, 3, 1, 2)
    _all_forms_give(q, k, v, np.ones((1, 1, 3), bool), [1.8, 2.8])


QUERIES = [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
KEYS = [[2, 2, 0, 0], [0, 2, 2, 0], [0, 0, 2, 2]]
VALUES = [[1, 0, 0, 10], [0, 1, 0, 20], [0, 0, 1, 30]]


def test_three_queries_against_three_keys_in_four_dimensions():
    """q k^T = (4 2 0; 2 4 2; 0 2 4), divided by sqrt(4): (2 1 0; 1 2 1; 0 1 2).

    exp: 7.389, 2.718, 1, together 11.107: shares 0.665, 0.245, 0.090 of the first query, backwards of the third.
    exp: 2.718, 7.389, 2.718, together 12.826: shares 0.212, 0.576, 0.212 of the second.
    The values are an axis each and 10, 20, 30: 0.6652 * 10 + 0.2447 * 20 + 0.0900 * 30 = 14.248; 20; 40 - 14.248.
    """
    expected = [[0.665, 0.245, 0.090, 14.248], [0.212, 0.576, 0.212, 20.0], [0.090, 0.245, 0.665, 25.752]]
    q, k, v = (tensor(x).view(1, 3, 1, 4) for x in (QUERIES, KEYS, VALUES))
    _all_forms_give(q, k, v, np.ones((1, 3, 3), bool), expected)


def test_the_same_three_queries_when_none_looks_ahead():
    """The first sees itself alone: its value. The second has scores 1, 2: exp 2.718, 7.389, together 10.107, shares
    0.269, 0.731; 0.2689 * 10 + 0.7311 * 20 = 17.311. The third sees all, as before.
    """
    expected = [[1.0, 0.0, 0.0, 10.0], [0.269, 0.731, 0.0, 17.311], [0.090, 0.245, 0.665, 25.752]]
    q, k, v = (tensor(x).view(1, 3, 1, 4) for x in (QUERIES, KEYS, VALUES))
    _all_forms_give(q, k, v, causal_table(3, 3)[None], expected)
    np.testing.assert_allclose(attend(q, k, v, Mask())[0, :, 0], expected, **BY_HAND)


class Table:
    """A mask by a table of booleans."""

    is_causal = False

    def __init__(self, allowed_BTS: np.ndarray) -> None:
        self.allowed_BTS = torch.as_tensor(allowed_BTS)

    def allowed(self, pair: Any) -> torch.Tensor:
        return self.allowed_BTS


def _all_forms_give(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed_BTS: np.ndarray, expected: Any, **scores: Any
) -> None:
    """Our attention, its naive form and the reference have this outcome, of one row and one head."""
    mask = Mask((Table(allowed_BTS),), Places(*(torch.arange(x.shape[1])[None] for x in (q, k))))
    found = [form(q, k, v, mask, **scores) for form in (attend, naive)]
    given = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in scores.items()}
    found.append(by_the_book.attend(q.numpy(), k.numpy(), v.numpy(), allowed_BTS, **given))
    for out_BTHE in found:
        np.testing.assert_allclose(np.asarray(out_BTHE)[0, :, 0], np.atleast_2d(expected), **BY_HAND)


def test_a_sink_takes_half_of_the_attention_of_two_equal_keys():
    """Scores 0 and 0, a sink of ln 2: exp 1, 1, 2, together 4. A quarter of each value, and half of it to nobody."""
    q, k = tensor([0, 0]).view(1, 1, 1, 2), tensor([[1, 0], [0, 1]]).view(1, 2, 1, 2)
    v = tensor([[4, 0], [0, 8]]).view(1, 2, 1, 2)
    _all_forms_give(q, k, v, np.ones((1, 1, 2), bool), [1.0, 2.0], sinks_H=tensor([np.log(2)]))


def test_a_soft_cap_of_2_makes_scores_of_2_and_0_into_1523_and_0():
    """2 tanh(2 / 2) = 1.523; exp 4.587 and 1, together 5.587: shares 0.821 and 0.179, where the softmax has 0.881."""
    q, k = tensor([2 * 2**0.5, 0]).view(1, 1, 1, 2), tensor([[1, 0], [0, 1]]).view(1, 2, 1, 2)
    _all_forms_give(q, k, tensor(EYE_2).view(1, 2, 1, 2), np.ones((1, 1, 2), bool), [0.821, 0.179], soft_cap=2.0)


# ---- whole layers of attention


def test_two_heads_are_concatenated_and_mixed_by_the_output_matrix():
    """Tokens (1, 0, 2, 1) and (0, 1, 4, 1); the values are the tokens, two numbers to a head.

    Head 1 has no queries: all scores are 0, and the second token takes half of each: (1 + 0) / 2, (0 + 1) / 2.
    Head 2 has scores 0 and ln 4: shares 1/5, 4/5, so (2 + 4 * 4) / 5 = 3.6 and 1. The first token sees itself alone.
    Concatenated: (1, 0, 2, 1) and (0.5, 0.5, 3.6, 1). The output matrix adds the heads, and subtracts them:
    (1 + 2, 0 + 1, 1 - 2, 0 - 1) = (3, 1, -1, -1), and (4.1, 1.5, -3.1, -0.5).
    """
    weights = {
        "q.weight": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2**0.5 * np.log(4)], [0, 0, 0, 0]],
        "k.weight": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
        "v.weight": EYE_4,
        "out.weight": [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, -1, 0], [0, 1, 0, -1]],
    }
    for out_TD in both_attentions("gqa", weights, [[1, 0, 2, 1], [0, 1, 4, 1]], num_heads=2):
        np.testing.assert_allclose(out_TD, [[3, 1, -1, -1], [4.1, 1.5, -3.1, -0.5]], **BY_HAND)


def test_a_window_of_2_over_4_tokens():
    """Without queries all keys in sight share equally; tokens that are axes show the shares: itself and one back."""
    weights = {"q.weight": 0 * EYE_4, "k.weight": EYE_4, "v.weight": EYE_4, "out.weight": EYE_4}
    expected = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]]
    for out_TD in both_attentions("sliding", weights, EYE_4, window_tokens=2):
        np.testing.assert_allclose(out_TD, expected, **BY_HAND)


def test_a_window_of_1_with_the_first_token_kept_in_sight():
    weights = {"q.weight": 0 * EYE_4, "k.weight": EYE_4, "v.weight": EYE_4, "out.weight": EYE_4}
    expected = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0.5, 0, 0, 0.5]]
    for out_TD in both_attentions("sliding", weights, EYE_4, window_tokens=1, num_sink_tokens=1):
        np.testing.assert_allclose(out_TD, expected, **BY_HAND)


def test_linear_attention_of_three_tokens():
    """phi = elu + 1: x + 1 above 0, exp(x) below. Queries and keys are the tokens (0, 1), (ln 1/2, 0), (1, 2), so
    phi is (1, 2), (1/2, 1), (2, 3). Values are the second number, once and twice: (1, 2), (0, 0), (2, 4).

    Token 2: products (1/2, 1)(1, 2) = 2.5 and (1/2, 1)(1/2, 1) = 1.25, shares 2/3 and 1/3: 2/3 (1, 2).
    Token 3: products 2 + 6 = 8, 1 + 3 = 4, 4 + 9 = 13, together 25: (8 * 1 + 13 * 2) / 25 = 1.36, and twice that.
    """
    weights = {"q.weight": EYE_2, "k.weight": EYE_2, "v.weight": [[0, 1], [0, 2]], "out.weight": EYE_2}
    for out_TD in both_attentions("linear", weights, [[0, 1], [np.log(0.5), 0], [1, 2]]):
        np.testing.assert_allclose(out_TD, [[1, 2], [0.667, 1.333], [1.36, 2.72]], **BY_HAND)


# ---- positions


def test_rope_turns_1_0_by_one_radian_at_position_1():
    """theta^0 = 1 is the frequency of the first pair at any theta: cos 1 = 0.540, sin 1 = 0.841 at position 1.

    At position 2: cos 2 = -0.416, sin 2 = 0.909. In four dimensions pairs are (0, 2) and (1, 3), and the second pair
    has the frequency 10,000^(-2/4) = 0.01: cos 0.01 = 1.000, sin 0.01 = 0.010.
    """
    of_two, of_four = ([[1, 0], [0.540, 0.841], [-0.416, 0.909]], [0.540, 1.000, 0.841, 0.010])
    positions_BT = torch.tensor([[0, 1, 2]])
    x_BTHE = tensor([1, 0]).expand(1, 3, 1, 2)
    ours, books = both_positions("rope", {"head_dim": 2})
    np.testing.assert_allclose(ours.rotate(x_BTHE, positions_BT)[0, :, 0], of_two, **BY_HAND)
    np.testing.assert_allclose(books.rotate(x_BTHE.numpy(), positions_BT.numpy())[0, :, 0], of_two, **BY_HAND)
    x_BTHE, positions_BT = tensor([1, 1, 0, 0]).view(1, 1, 1, 4), torch.tensor([[1]])
    ours, books = both_positions("rope", {"head_dim": 4})
    np.testing.assert_allclose(ours.rotate(x_BTHE, positions_BT)[0, 0, 0], of_four, **BY_HAND)
    np.testing.assert_allclose(books.rotate(x_BTHE.numpy(), positions_BT.numpy())[0, 0, 0], of_four, **BY_HAND)


def test_sinusoids_at_position_1_in_four_dimensions():
    """Waves of 1 and 10,000^(-2/4) = 0.01 a step, sine and cosine side by side: 0.841, 0.540, 0.010, 1.000."""
    ours, books = both_positions("sinusoidal", {"d_model": 4})
    x_BTD, positions_BT = torch.zeros(1, 2, 4).double(), torch.tensor([[0, 1]])
    expected = [[0, 1, 0, 1], [0.841, 0.540, 0.010, 1.000]]
    np.testing.assert_allclose(ours.embed(x_BTD, positions_BT)[0], expected, **BY_HAND)
    np.testing.assert_allclose(books.embed(x_BTD.numpy(), positions_BT.numpy())[0], expected, **BY_HAND)


def test_alibi_has_slopes_of_a_half_to_a_256th_for_eight_heads():
    """2^(-8/8), 2^(-16/8), …; three tokens back the first head loses 3/2, the second 3/4. Of twelve heads the last
    four have every other slope of sixteen: 2^(-1/2) = 0.707, 2^(-3/2) = 0.354, 0.177, 0.088.
    """
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    positions_BT, positions_BS = torch.tensor([[3]]), torch.tensor([[0, 1, 2, 3]])
    for num_heads, slopes in ((8, eight), (12, [*eight, 0.707, 0.354, 0.177, 0.088])):
        ours, books = both_positions("alibi", {"num_heads": num_heads})
        expected = [[-3 * slope, -2 * slope, -slope, 0] for slope in slopes]
        np.testing.assert_allclose(ours.bias(positions_BT, positions_BS)[0, :, 0], expected, atol=2e-3, rtol=0)
        bias_BHTS = books.bias(positions_BT.numpy(), positions_BS.numpy())
        np.testing.assert_allclose(bias_BHTS[0, :, 0], expected, atol=2e-3, rtol=0)  # three times a rounded slope


def test_the_buckets_of_t5_by_a_table():
    """Eight buckets, all from 16 on in the last. Distances 0 to 3 have one each; the other four begin at 4, 5.66, 8
    and 11.3, each sqrt(2) = (16 / 4)^(1/4) times the one before. A key that comes later counts as distance 0.
    """
    expected = [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7]
    assert [bucket(distance, 8, 16) for distance in range(19)] == expected
    weights = {"weight": np.arange(8.0)[:, None]}  # each bucket's weight is its number
    ours, books = both_positions("t5", {"num_heads": 1}, weights, num_buckets=8, max_distance=16)
    positions_BT, positions_BS = torch.tensor([[18]]), torch.arange(19, -1, -1)[None]  # 19 comes later
    for bias_BHTS in (
        ours.bias(positions_BT, positions_BS).detach().numpy(),
        books.bias(positions_BT.numpy(), positions_BS.numpy()),
    ):
        assert bias_BHTS[0, 0, 0].tolist() == [0, *expected]


# ---- layers of single tokens


def test_rmsnorm_and_layernorm_of_3_and_4():
    """(9 + 16) / 2 = 12.5, its root 3.536: 3 / 3.536 = 0.849, 4 / 3.536 = 1.131. Mean 3.5, deviation 0.5: -1 and 1."""
    x_BTD, weights = tensor([3, 4]).view(1, 1, 2), {"weight": [1, 1]}
    for kind, more, expected in (("rmsnorm", {}, [0.849, 1.131]), ("layernorm", {"bias": [0, 0]}, [-1, 1])):
        ours = component("norm", kind, {**weights, **more}, sizes={"d_model": 2})(x_BTD)
        np.testing.assert_allclose(ours[0, 0].detach(), expected, **BY_HAND)
        arrays = {name: np.array(value) for name, value in {**weights, **more}.items()}
        books = reference("norm", kind)(x_BTD.numpy(), arrays, registry.configure("norm", kind).model_dump())
        np.testing.assert_allclose(books[0, 0], expected, **BY_HAND)


def test_a_token_that_goes_to_two_of_four_experts():
    """Router scores 2, 0, 1, -1: experts 1 and 3, with shares exp 2 / (exp 2 + exp 1) = 0.731 and 0.269. Expert n
    answers n: silu(ln 3) = ln 3 * 3/4 = 0.824, times n / 0.824. So 0.731 * 1 + 0.269 * 3 = 1.538.

    Its balance: f = (1/2, 0, 1/2, 0); P, the softmax of all four, = 7.389, 1, 2.718, 0.368 over 11.475 = 0.644, 0.087,
    0.237, 0.032. 4 (0.644 + 0.237) / 2 = 1.762, where equally busy experts have 1. A hundredth of it is the loss.
    """
    scores, gate = [2.0, 0.0, 1.0, -1.0], np.log(3)
    weights = {"router.weight": np.array(scores)[:, None]}
    for e in range(4):
        weights |= {f"experts.{e}.gate.weight": [[gate]], f"experts.{e}.up.weight": [[(e + 1) / (0.75 * gate)]]}
        weights[f"experts.{e}.out.weight"] = [[1.0]]
    settings = {"num_experts": 4, "experts_per_token": 2, "d_hidden": 1, "balance": 0.01}
    ours = component("feedforward", "moe", weights, 0, sizes={}, **settings)
    x_BTD = torch.ones(1, 1, 1).double()
    assert ours(x_BTD).item() == pytest.approx(1.538, abs=6e-4)
    assert ours.auxiliary_losses[-1].item() == pytest.approx(0.01762, abs=6e-6)
    arrays = {name: np.array(value) for name, value in weights.items()}
    assert reference("feedforward", "moe")(x_BTD.numpy(), arrays, settings).item() == pytest.approx(1.538, abs=6e-4)
    assert balance_loss(np.array([scores]), 2) == pytest.approx(1.762, abs=6e-4)


# ---- the loss


def test_the_cross_entropy_of_the_first_three_characters_of_abc():
    """p(a) = 1/2, p(b | a) = 1/4, p(c | ab) = 1/8: -ln p = 0.693 + 1.386 + 2.079 = 4.159 nats, 1.386 = ln 4 each.

    That is as uncertain as four characters that are equally likely: 2 bits each. The gradient of a slot by its logits
    is p with 1 taken from the target's: (1/2 - 1, 1/4, 1/4) at the first.
    """
    probabilities = [[1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 4, 1 / 4], [3 / 4, 1 / 8, 1 / 8]]
    abc_BT = torch.tensor([[0, 1, 2]])
    logits_BTV = tensor(np.log(probabilities))[None].requires_grad_()
    head = torch.nn.Identity()  # the hidden states are the logits
    summed = loss.summed_nats(logits_BTV, abc_BT, head, 3)
    assert summed.item() == pytest.approx(4.159, abs=6e-4)
    summed.backward()
    np.testing.assert_allclose(logits_BTV.grad[0, 0], [-0.5, 0.25, 0.25], **BY_HAND)
    found = loss.nats_per_target(logits_BTV, abc_BT, head, 3)
    np.testing.assert_allclose(found[0], [0.693, 1.386, 2.079], **BY_HAND)
    assert cross_entropy(logits_BTV.detach().numpy(), abc_BT.numpy()) == pytest.approx(1.386, abs=6e-4)
