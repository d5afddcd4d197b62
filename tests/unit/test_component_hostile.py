"""Settings that would hang, eat memory or make NaN are refused by name; what is finite stays finite."""

from __future__ import annotations

import copy
import time

import pytest
import torch

import ulm
from tests.variants import model_of, spec_of, tokens
from ulm.errors import ConfigError
from ulm.models.account import num_parameters, on_meta

ABSURD = {
    "position.max_distance": {"position": {"kind": "t5", "max_distance": 10**9}},
    "position.num_buckets": {"position": {"kind": "t5", "num_buckets": 10**30}},
    "blocks.0.repeat": {"blocks": [{"repeat": 10**12}]},
    "attention.num_features": {"attention": {"kind": "performer", "num_features": 10**9}},
    "feedforward.num_experts": {"feedforward": {"kind": "moe", "num_experts": 10**6}},
    "attention.num_heads": {"attention": {"num_heads": 10**8}},
    "attention.window_tokens": {"attention": {"kind": "sliding", "window_tokens": 10**30}},
    "attention.num_sink_tokens": {"attention": {"kind": "sliding", "num_sink_tokens": 10**30}},
    "attention.soft_cap": {"attention": {"soft_cap": 1e39}},
    "head.cap": {"head": {"kind": "soft_cap", "cap": 1e39}},
    "position.keep_first_tokens": {"position": {"kind": "longrope", "keep_first_tokens": 10**30}},
    "position.attention_factor": {"position": {"kind": "longrope", "attention_factor": 1e39}},
    "position.short_factors": {"position": {"kind": "longrope", "short_factors": [1e-320] * 16}},
    "position.scaling.factor": {"position": {"scaling": {"kind": "ntk", "factor": 1e300}}},
    "position.theta": {"position": {"theta": 1e300}},
    "feedforward.d_hidden": {"feedforward": {"d_hidden": 10**18}},
}


@pytest.mark.parametrize(("place", "overrides"), ABSURD.items(), ids=ABSURD)
def test_an_absurd_setting_is_refused_at_once_by_its_name(place, overrides):
    started_s = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        spec_of(overrides)
    assert place in str(caught.value) and time.monotonic() - started_s < 1


def test_a_pattern_of_many_layers_is_counted_without_building_them_all():
    started_s = time.monotonic()
    blocks = [{"repeat": 60}, {"feedforward": {"d_hidden": 4096}}]
    spec = ulm.ModelSpec.parse({"preset": "llama-like", "size": "5M", "blocks": blocks})
    assert num_parameters(on_meta(spec)) == pytest.approx(5e6, rel=0.1)
    assert time.monotonic() - started_s < 20


@pytest.mark.parametrize("kind", ["linear", "performer"])
def test_keys_too_large_for_any_feature_leave_gradients_finite(kind):
    model = model_of({"attention": kind})
    with torch.no_grad():
        for block in model.blocks:
            block.attention.k.weight.mul_(30)
    segments_BT = torch.zeros(2, 17, dtype=torch.long).index_fill(1, torch.arange(4), -1)
    (model(tokens(2, 17), segments_BT).logsumexp(-1).sum() * 65536).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_row_with_a_prefix_is_copied_whole_and_not_cut_within_it():
    model = model_of({"mask": "prefix"})
    cache = model.new_cache(2, prefix_tokens_B=torch.tensor([5, 2]))
    model.step(tokens(2, 9), cache)
    assert cache.truncate(1, 3) == 3
    cache.copy_row(0, 1)
    assert cache.prefix_tokens_B.tolist() == [5, 5]
    assert cache.truncate(1, 3) == 0 and cache.truncate(0, 6) == 6


def test_a_mixture_of_experts_can_be_copied_after_an_update():
    model = model_of({"feedforward": "moe"})
    loss = model(tokens(2, 9)).square().mean() + model.auxiliary_loss()
    loss.backward()
    assert model.auxiliary_loss() is None
    copy.deepcopy(model)


def test_normed_queries_and_keys_have_the_dtype_of_autocast():
    model = ulm.build(spec_of({"attention": {"qk_norm": True}}), seed=0)
    seen = []
    model.blocks[0].attention.q_norm.register_forward_hook(lambda _module, _given, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(1, 9))
    assert seen == [torch.bfloat16]
