"""The account of every variant equals counts: of stored numbers, of products as they are made, of bytes held.

Products are PyTorch's own count (FlopCounterMode) of what a model runs on a CPU. The account differs from it in two
conventions, and each difference is a formula here, so that every comparison is of equal numbers:

- a kernel is counted for all pairs of query and key that it is given, seen or not: T x T for dense attention, blocks of
  W x (2W + sinks) for a window of W. The account has the pairs that the mask leaves.
- a triangle of n x n pairs has n(n + 1)/2 of them; the account takes n^2/2, as PaLM (arXiv 2204.02311, appendix B).

Attention by feature maps is accounted for as the recurrence that its paper defines, which is what runs when a token is
decoded; whole rows go in blocks, which take more. So these kinds are compared by that step.
"""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from tests.variants import VARIANTS, VOCAB_SIZE, every_variant, model_of, spec_of, tokens
from ulm.cli.main import app
from ulm.components.attention._kernelised import Kernelised
from ulm.components.attention.sliding import SlidingWindowAttention
from ulm.models.account import (
    cache_bytes,
    forward_flops_per_token,
    num_parameters,
    on_meta,
    train_flops_per_token,
)

T = 40  # the variants' context, so that tables are as long as the row
PADDED_VOCAB_SIZE = 128  # 97 to a multiple of 64
ROUNDING = 1e-12  # relative: a row's products are divided by its tokens, in float64


def _is_recurrent(overrides) -> bool:
    return any(isinstance(block.attention, Kernelised) for block in on_meta(spec_of(overrides)).layers)


with_scores = {name: overrides for name, overrides in VARIANTS.items() if not _is_recurrent(overrides)}
every_variant_with_scores = pytest.mark.parametrize("overrides", with_scores.values(), ids=with_scores.keys())


def counted(run) -> dict[str, int]:
    """FLOPs of all matrix products of what it runs, by operator."""

    def of_attention(q_shape, k_shape, v_shape, *_, **__):
        batch, heads, new, width = q_shape
        return 2 * batch * heads * new * k_shape[2] * (width + v_shape[3])

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the counter knows those of CUDA alone
    with FlopCounterMode(display=False, custom_mapping={on_cpu: of_attention}) as counter:
        run()
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


def flops_of_pairs(attention, num_pairs: float) -> float:
    """A score and its share of a value, in every head."""
    return 4.0 * attention.num_heads * attention.head_dim * num_pairs


def is_one_more_key(attention) -> bool:
    """Whether a learned sink goes to the kernel as one more key; with a soft cap there is no kernel."""
    return getattr(attention, "sinks", None) is not None and attention.soft_cap is None


def pairs_of_the_kernel(attention, num_tokens: int) -> int:
    """Pairs that a row's kernel is given, seen or not."""
    more = is_one_more_key(attention)
    width = getattr(attention, "window_tokens", num_tokens)
    if not isinstance(attention, SlidingWindowAttention) or num_tokens <= width:
        return num_tokens * (num_tokens + more)
    num_blocks = -(-num_tokens // width)
    of_a_block = 2 * width + attention.num_sink_tokens + more
    return width * (width + more) + (num_blocks - 1) * width * of_a_block  # the first has no block before it


def keys_of_a_step(attention, num_known: int, max_tokens: int) -> int:
    """Keys that the kernel is given for one token more: all places of a ring, or what is known."""
    if isinstance(attention, SlidingWindowAttention):
        num_known = attention.num_sink_tokens + min(attention.window_tokens, max_tokens - attention.num_sink_tokens)
    return num_known + is_one_more_key(attention)


def flops_of_matrices(model) -> float:
    """Of one token, by the account: what is left of the whole without attention's part."""
    return forward_flops_per_token(model, T) - sum(block.attention.attend_flops(T) for block in model.layers)


@every_variant
def test_parameters_are_the_stored_numbers_without_the_rows_that_pad_a_vocabulary(overrides):
    model = model_of(overrides)
    stored = sum(p.numel() for p in model.parameters())
    tables = {p for part in (model.embedding, model.head) for p in part.parameters() if p.dim() == 2}
    assert {len(table) for table in tables} == {PADDED_VOCAB_SIZE}
    padding = sum((PADDED_VOCAB_SIZE - VOCAB_SIZE) * table.shape[1] for table in tables)
    assert num_parameters(model) == num_parameters(on_meta(spec_of(overrides))) == stored - padding


@every_variant_with_scores
def test_flops_of_a_row_are_those_counted_when_attention_is_counted_for_all_pairs(overrides):
    model = model_of(overrides).requires_grad_(False)
    of_pairs = sum(flops_of_pairs(block.attention, pairs_of_the_kernel(block.attention, T)) for block in model.layers)
    for batch in (1, 3):
        found = sum(counted(lambda rows=batch: model(tokens(rows, T))).values())
        assert found == batch * (T * flops_of_matrices(model) + of_pairs)


@every_variant
@pytest.mark.parametrize("num_known", [1, 11])
def test_flops_of_a_decoded_token_are_those_counted(overrides, num_known):
    model = model_of(overrides)
    cache = model.new_cache(2)
    model.step(tokens(2, num_known), cache)
    expected = flops_of_matrices(model)
    for block in model.layers:
        if isinstance(block.attention, Kernelised):
            expected += block.attention.attend_flops(T)
        else:
            expected += flops_of_pairs(block.attention, keys_of_a_step(block.attention, num_known + 1, T))
    assert sum(counted(lambda: model.step(tokens(2, 1), cache)).values()) == 2 * expected


@every_variant_with_scores
def test_attention_is_accounted_for_by_the_pairs_that_its_mask_leaves(overrides):
    attentions = [block.attention for block in on_meta(spec_of(overrides)).layers]
    for attention, num_tokens in product(attentions, (2, 5, 17, T)):
        window = min(attention.window_tokens or num_tokens, num_tokens)
        num_sinks = getattr(attention, "num_sink_tokens", 0)
        seen = sum(t - s < window or s < num_sinks for t in range(num_tokens) for s in range(t + 1))
        triangles = window, min(num_sinks, num_tokens - window)  # the window's beginning, the sinks' beyond it
        expected = flops_of_pairs(attention, seen - sum(triangles) / 2) / num_tokens
        assert attention.attend_flops(num_tokens) == pytest.approx(expected, rel=ROUNDING)


def test_attention_by_feature_maps_costs_the_same_in_a_row_of_any_length():
    for overrides in VARIANTS.values():
        if _is_recurrent(overrides):
            model = on_meta(spec_of(overrides))
            assert forward_flops_per_token(model, 40) == forward_flops_per_token(model, 4_000)


@every_variant_with_scores
def test_training_passes_every_matrix_three_times(overrides):
    model = model_of(overrides)
    found = counted(lambda: model(tokens(1, T)).sum().backward())
    of_matrices = sum(flops for operator, flops in found.items() if operator in ("aten.mm", "aten.addmm"))
    assert of_matrices == 3 * T * flops_of_matrices(model)
    assert train_flops_per_token(model, T) == 3 * forward_flops_per_token(model, T)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_cache_holds_the_bytes_of_the_account_for_every_row_and_token(overrides, dtype):
    model, size = model_of(overrides).to(dtype), cache_bytes(spec_of(overrides), dtype)
    for batch in (1, 3):
        for max_tokens in (T - 1, T, T + 1, 2 * T):
            assert model.new_cache(batch, max_tokens).nbytes == batch * (size.fixed + size.per_token * max_tokens)


@pytest.mark.parametrize(
    ("attention", "is_bounded"),
    [("gqa", False), ("linear", True), ("performer", True), ({"kind": "sliding", "window_tokens": 8}, True)],
    ids=["gqa", "linear", "performer", "sliding"],
)
def test_a_bounded_state_takes_no_bytes_per_token(attention, is_bounded):
    assert (cache_bytes(spec_of({"attention": attention})).per_token == 0) == is_bounded


def test_a_window_longer_than_the_context_grows_with_it_and_another_does_not():
    window = {"attention": {"kind": "sliding", "window_tokens": 50}}
    of_a_token = 2 * 2 * 2 * 32  # two layers, keys and values of 32 numbers, two bytes each
    assert cache_bytes(spec_of(window, context_tokens=40)).per_token == of_a_token
    assert cache_bytes(spec_of(window, context_tokens=50)).per_token == 0


@every_variant
def test_show_prints_the_account(overrides, root, tmp_path):
    spec = spec_of(overrides)
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")), encoding="utf-8")
    done = CliRunner().invoke(app, ["show", str(path)], catch_exceptions=False)
    found = json.loads(done.stdout.strip().rpartition("\n")[2])
    model, size = on_meta(spec), cache_bytes(spec)
    assert found == {
        "spec": spec.model_dump(mode="json"),
        "parameters": num_parameters(model),
        "forward_flops_per_token": forward_flops_per_token(model, T),
        "train_flops_per_token": train_flops_per_token(model, T),
        "cache_bytes_per_token": size.per_token,
        "cache_bytes_fixed": size.fixed,
        "training": None,
    }
