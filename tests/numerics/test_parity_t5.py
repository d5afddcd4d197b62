"""T5's relative positions are those of x-transformers and of transformers' T5, alone and in a whole decoder."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from tests.numerics._stock import CONTEXT_TOKENS, NUM_LAYERS, VOCAB_SIZE, built, drawn
from ulm import registry
from ulm.components.contracts import ModelDims
from ulm.exchange.weights import Weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.script, which it calls while it is imported
    from x_transformers import Decoder, TransformerWrapper
    from x_transformers.x_transformers import RelativePositionBias

RELATIVE = 1e-4  # of the largest logit: the bound asked for; sums in another order make 1e-6 in float32
FLOOR = 0.5  # of the logits' standard deviation: below it models agree on anything
HEADS, HEAD_DIM = 3, 32
SCALE = HEAD_DIM**0.5  # x-transformers multiplies its bias by it, because T5 does not divide its scores by it
NUM_LEFT = 7  # tokens of padding
BUCKETS = [(32, 128), (32, 40), (64, 1_000), (16, 100), (8, 12)]  # how many, and the distance that is the last one's

every_table = pytest.mark.parametrize(("num_buckets", "max_distance"), BUCKETS)
both_ways = pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])


def position_of(num_buckets: int, max_distance: int, bidirectional: bool, num_heads: int) -> torch.nn.Module:
    fields = {"num_buckets": num_buckets, "max_distance": max_distance, "bidirectional": bidirectional}
    dims = ModelDims(d_model=96, num_layers=1, vocab_size=2, context_tokens=8, head_dim=HEAD_DIM, num_heads=num_heads)
    return registry.find("position", "t5")(registry.configure("position", {"kind": "t5", **fields}), dims)


@both_ways
@every_table
@torch.no_grad()
def test_the_bias_of_every_distance_equals_that_of_x_transformers(num_buckets, max_distance, bidirectional):
    theirs = drawn(RelativePositionBias(SCALE, not bidirectional, num_buckets, max_distance, HEADS))
    position = position_of(num_buckets, max_distance, bidirectional, HEADS)
    position.weight.copy_(theirs.relative_attention_bias.weight * SCALE)
    num_keys = max_distance + 50
    num_queries = num_keys - 10  # the queries are the last of the keys
    queries_BT, keys_BS = torch.arange(num_keys - num_queries, num_keys)[None], torch.arange(num_keys)[None]
    found_BHTS = position.bias(queries_BT, keys_BS)
    assert torch.equal(found_BHTS[0], theirs(num_queries, num_keys))
    assert len(found_BHTS[0, 0].unique()) == num_buckets - bidirectional  # of two for distance 0, one is never used


@both_ways
@every_table
@torch.no_grad()
def test_every_distance_is_in_the_bucket_of_transformers_T5(num_buckets, max_distance, bidirectional):
    position = position_of(num_buckets, max_distance, bidirectional, num_heads=1)
    position.weight.copy_(torch.arange(num_buckets)[:, None])  # a bucket's bias is its number
    distances_S = torch.arange(-2 * max_distance, 2 * max_distance + 1)  # of the key from the query
    found_S = position.bias(torch.zeros(1, 1, dtype=torch.long), distances_S[None]).flatten().long()
    expected_S = T5Attention._relative_position_bucket(distances_S, bidirectional, num_buckets, max_distance)
    assert found_S.tolist() == expected_S.tolist()


def renamed_from_x_transformers(weights: Weights) -> Weights:
    """Its attention and feed-forward layers are numbered in one row; its norms multiply by 1 + gamma."""
    scaled = {name: 1 + w if "gamma" in name else w * SCALE if "rel_pos" in name else w for name, w in weights.items()}
    names = {
        "token_emb.emb.": "embedding.",
        "attn_layers.rel_pos.relative_attention_bias.": "position.",
        "attn_layers.final_norm.gamma": "norm.weight",
        "to_logits.": "head.",
    }
    for layer in range(NUM_LAYERS):
        attention, feedforward = (f"attn_layers.layers.{2 * layer + n}." for n in (0, 1))
        names |= {
            f"{attention}0.0.gamma": f"blocks.{layer}.attention_norm.weight",
            f"{attention}1.to_": f"blocks.{layer}.attention.",
            f"{feedforward}0.0.gamma": f"blocks.{layer}.feedforward_norm.weight",
            f"{feedforward}1.ff.0.0.": f"blocks.{layer}.feedforward.up.",
            f"{feedforward}1.ff.2.": f"blocks.{layer}.feedforward.out.",
        }
    found = {}
    for name, weight in scaled.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = weight
    return found


def a_pair(max_distance: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A decoder of x-transformers, its last bucket from 20 tokens on, and ours from the same weights."""
    layers = Decoder(
        dim=96,
        depth=NUM_LAYERS,
        heads=HEADS,
        attn_dim_head=HEAD_DIM,
        rel_pos_bias=True,
        rel_pos_num_buckets=8,
        rel_pos_max_distance=20,
    )
    theirs = drawn(TransformerWrapper(num_tokens=VOCAB_SIZE, max_seq_len=CONTEXT_TOKENS, attn_layers=layers))
    spec = {
        "d_model": 96,
        "embedding": {"kind": "token", "tied": False},
        "position": {"kind": "t5", "num_buckets": 8, "max_distance": max_distance},
        "attention": {"kind": "gqa", "num_heads": HEADS, "num_kv_heads": HEADS},
        "feedforward": {"kind": "gelu", "bias": True},
        "norm": {"kind": "layernorm", "bias": False},
        "head": "logits",
    }
    return theirs, built(spec, renamed_from_x_transformers(dict(theirs.named_parameters())))


@torch.no_grad()
def relative_error(max_distance: int, num_left: int) -> float:
    """Of our logits of two texts, the second with padding before it."""
    theirs, model = a_pair(max_distance)
    tokens_BT = torch.randint(VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(6))
    is_token_BT = torch.ones_like(tokens_BT)
    is_token_BT[1, :num_left] = 0
    expected = theirs(tokens_BT, mask=is_token_BT.bool())[is_token_BT == 1]
    found = model(tokens_BT, is_token_BT - 1)[is_token_BT == 1]
    assert expected.std() > FLOOR
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("num_left", [0, NUM_LEFT], ids=["whole rows", "padding on the left"])
def test_a_whole_decoder_with_relative_positions_gives_the_logits_of_x_transformers(num_left):
    assert relative_error(20, num_left) < RELATIVE


def test_one_distance_in_another_bucket_shows_in_the_logits():
    assert relative_error(19, 0) > RELATIVE
