"""Every kind in a model, as it is and with its settings: what the suites over all components run through.

A new kind is found by its file; settings of its own that deserve a look are one entry in SETTINGS.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ulm
from ulm import registry
from ulm.spec import SLOTS

SETTINGS: dict[str, dict[str, Any]] = {  # by slot.kind
    "embedding.token": {"untied": {"tied": False}, "scaled": {"scaled": True}},
    "embedding.value": {"untied": {"tied": False}},
    "position.learned": {"table": {"max_tokens": 48}},
    "position.rope": {
        "linear": {"scaling": {"kind": "linear", "factor": 4.0}},
        "ntk": {"scaling": {"kind": "ntk", "factor": 4.0}},
        "yarn": {"scaling": {"kind": "yarn", "factor": 4.0, "original_context_tokens": 10, "fast_turns": 1.2}},
        "part": {"rotary_dim": 10},
    },
    "position.longrope": {
        "short": {"short_factors": [1 + n / 4 for n in range(16)], "keep_first_tokens": 4},
        "long": {"long_factors": [1 + n for n in range(16)], "original_context_tokens": 8},
    },
    "position.t5": {
        "few": {"num_buckets": 6, "max_distance": 12},
        "both ways": {"num_buckets": 8, "max_distance": 12, "bidirectional": True},
    },
    "attention.gqa": {
        "multi-head": {"num_kv_heads": 3},
        "wide heads": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
        "bias": {"bias": True},
        "qk norm": {"qk_norm": True},
        "qk norm of all heads": {"qk_norm": "whole", "qk_norm_eps": 0.1},
        "other scale": {"scale": 0.4},
        "soft cap": {"soft_cap": 5.0},
        "sinks": {"sinks": True},
        "soft cap and sinks": {"soft_cap": 5.0, "sinks": True},
    },
    "attention.sliding": {
        "window of 1": {"window_tokens": 1},
        "window of 5": {"window_tokens": 5, "num_kv_heads": 3, "qk_norm": True},
        "first tokens too": {"window_tokens": 3, "num_sink_tokens": 2},
        "other scale": {"window_tokens": 4, "scale": 0.4},
        "soft cap": {"window_tokens": 4, "soft_cap": 5.0},
        "soft cap and sinks": {"window_tokens": 4, "soft_cap": 5.0, "sinks": True},
    },
    "attention.linear": {"qk norm, multi-head": {"qk_norm": True, "num_kv_heads": 3}},
    "attention.performer": {"few features": {"num_features": 20, "seed": 1, "qk_norm": True}},
    "feedforward.moe": {
        "three of four": {"num_experts": 4, "experts_per_token": 3},
        "one of two": {"num_experts": 2, "experts_per_token": 1},
    },
}
for _kind in ("relu", "relu2", "gelu"):
    SETTINGS[f"feedforward.{_kind}"] = {"bias": {"bias": True}}
SETTINGS |= {
    "feedforward.gelu": {"bias, by tanh": {"bias": True, "approximate": True}},
    "feedforward.geglu": {"by tanh": {"approximate": True}},
    "norm.layernorm": {"no bias": {"bias": False}},
    "head.soft_cap": {"small": {"cap": 2.0}},
}
SPECS: dict[str, dict[str, Any]] = {  # what is no slot's, or takes more than one
    "two tables of values": {"num_layers": 4, "embedding": {"kind": "value", "num_tables": 2}},
    "norms after": {"norm_placement": "after"},
    "norms around": {"norm_placement": "around"},
    "norms of outputs": {"norm_placement": "output"},
    "embedding norm": {"embedding_norm": True},
    "shared layers": {"num_layers": 4, "layers_per_block": 2},
    "all layers shared": {"num_layers": 3, "layers_per_block": 3},
    "window and distances": {"attention": {"kind": "sliding", "window_tokens": 4}, "position": "alibi"},
    "linear without turning": {"attention": "linear", "position": "learned"},
    "three sliding, one full": {
        "num_layers": 5,
        "attention": {"kind": "sliding", "window_tokens": 4},
        "blocks": [{"repeat": 3}, {"attention": {"kind": "gqa"}}],
    },
    "positions of two kinds": {
        "num_layers": 4,
        "position": {"kind": "rope", "theta": 500.0},
        "blocks": [
            {"repeat": 2, "attention": {"kind": "sliding", "window_tokens": 4}, "position": {"theta": 50.0}},
            {"position": "none"},
            {"position": "alibi"},
        ],
    },
    "pattern": {
        "num_layers": 4,
        "blocks": [
            {"repeat": 2, "attention": {"num_kv_heads": 3}},
            {"norm_placement": "around", "attention": {"qk_norm": True}},
        ],
    },
}


def _in_models() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for slot in (*SLOTS, "mask"):
        for kind in ulm.kinds(slot):
            if getattr(registry.find(slot, kind), "needs_source", False):
                continue  # no kind for a decoder
            for name, settings in {"": {}, **SETTINGS.get(f"{slot}.{kind}", {})}.items():
                found[f"{slot}-{kind}" + (f"-{name}" if name else "")] = {slot: {"kind": kind, **settings}}
    return found | SPECS


VARIANTS = _in_models()
every_variant = pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
VOCAB_SIZE = 97


def spec_of(overrides: dict[str, Any], context_tokens: int = 40) -> ulm.ModelSpec:
    """A small spec of two layers, unless the overrides say otherwise."""
    return ulm.ModelSpec.preset(
        "nano", **{"vocab_size": VOCAB_SIZE, "num_layers": 2, "context_tokens": context_tokens, **overrides}
    )


def model_of(overrides: dict[str, Any], context_tokens: int = 40) -> Any:
    """Every weight drawn, so that a forgotten one shows, and large: attention looks somewhere, logits are far apart."""
    model = ulm.build(spec_of(overrides, context_tokens), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.dim() >= 2 else 1.0, 0.2, generator=generator)
    return model


def is_causal(overrides: dict[str, Any]) -> bool:
    """Whether no token's logits may depend on a later token; a prefix sees itself whole."""
    return not any(config.kind == "prefix" for config in spec_of(overrides).mask)


def tokens(batch: int, num: int) -> torch.Tensor:
    """tokens_BT that depend on their number alone."""
    return torch.randint(VOCAB_SIZE, (batch, num), generator=torch.Generator().manual_seed(num))
