"""The architectures of transformers whose logits ours are compared with, and the specs of ours that are the same."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import transformers

from tests.numerics._stock import CONTEXT_TOKENS, NUM_LAYERS, Stock, ours, theirs

ORIGINAL_TOKENS, LONGER = 16, 3  # longrope and YaRN: the first context, and how many times as long the other one is


# ---- GPT-2


GPT2 = Stock(
    transformers.GPT2Config,
    {"n_positions": CONTEXT_TOKENS, "n_embd": 96, "n_layer": NUM_LAYERS, "n_head": 3},
    {
        "d_model": 96,
        "embedding": "token",
        "position": "learned",
        "attention": {"kind": "gqa", "num_heads": 3, "num_kv_heads": 3, "bias": True},
        "feedforward": {"kind": "gelu", "bias": True, "approximate": True},
        "norm": "layernorm",
        "head": "logits",
    },
    "gpt2",
)

# ---- Llama and Qwen3


def _llama(rope: dict[str, Any], position: dict[str, Any], max_positions: int = CONTEXT_TOKENS, **more: Any) -> Stock:
    return Stock(
        transformers.LlamaConfig,
        {
            "hidden_size": 128,
            "intermediate_size": 160,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": max_positions,
            "rope_parameters": {"rope_theta": 1_000.0, **rope},
            "rms_norm_eps": 1e-5,
        },
        {
            "d_model": 128,
            "embedding": {"kind": "token", "tied": False},
            "position": {"kind": "rope", "theta": 1_000.0, **position},
            "attention": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2},
            "feedforward": {"kind": "swiglu", "d_hidden": 160},
            "norm": {"kind": "rmsnorm", "eps": 1e-5},
            "head": "logits",
        },
        "llama",
        **more,
    )


LLAMA = _llama({"rope_type": "default"}, {})
LLAMA_LINEAR = _llama(
    {"rope_type": "linear", "factor": 4.0},
    {"scaling": {"kind": "linear", "factor": 4.0}},
)
# transformers' NTK grows with the text: 3 * 32 / 16 - (3 - 1) = 4 for 32 tokens of a model for 16.
LLAMA_NTK = _llama(
    {"rope_type": "dynamic", "factor": 3.0},
    {"scaling": {"kind": "ntk", "factor": 4.0}},
    max_positions=16,
    text_tokens=32,
    decodes=False,
)
# Between slow and fast pairs the two differ: transformers blends by the pair's number, the paper by its turns. No pair
# of this one is between, so that all the rest is compared.
LLAMA_YARN = _llama(
    {
        "rope_type": "yarn",
        "factor": float(LONGER),
        "original_max_position_embeddings": ORIGINAL_TOKENS,
        "beta_slow": 0.5,
        "beta_fast": 0.501,
        "truncate": False,
    },
    {
        "scaling": {
            "kind": "yarn",
            "factor": LONGER,
            "original_context_tokens": ORIGINAL_TOKENS,
            "slow_turns": 0.5,
            "fast_turns": 0.501,
        }
    },
)

QWEN3 = Stock(
    transformers.Qwen3Config,
    {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
    },
    {
        "d_model": 96,
        "embedding": "token",
        "position": {"kind": "rope", "theta": 1_000_000.0},
        "attention": {"kind": "gqa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "qk_norm": True},
        "feedforward": {"kind": "swiglu", "d_hidden": 160},
        "norm": "rmsnorm",
        "head": "logits",
    },
    "qwen3",
)

# ---- Gemma-2


def _gemma2(tied: bool, **more: Any) -> Stock:
    return Stock(
        transformers.Gemma2Config,
        {
            "hidden_size": 128,
            "intermediate_size": 160,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,  # scores are divided by its root, as ours by the head's width
            "max_position_embeddings": CONTEXT_TOKENS,
            "sliding_window": 6,  # the first layer and every other one
            "attn_logit_softcapping": 4.0,  # low enough to bend most scores, as the next to bend most logits
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": tied,
        },
        {
            "d_model": 128,
            "embedding": {"kind": "token", "scaled": True, "tied": tied},
            "position": "rope",
            "attention": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "soft_cap": 4.0},
            "blocks": [{"attention": {"kind": "sliding", "window_tokens": 6}}, {}],
            "feedforward": {"kind": "geglu", "d_hidden": 160, "approximate": True},
            "norm": "rmsnorm",
            "norm_placement": "around",
            "head": {"kind": "soft_cap", "cap": 5.0},
        },
        "gemma2",
        **more,
    )


# Scaled and tied, embeddings that were not trained make a model say its last token again and again.
GEMMA2 = _gemma2(tied=True, decodes=False)
GEMMA2_UNTIED = _gemma2(tied=False)

# ---- Phi-3


def _phi3(num_pairs: int, position: dict[str, Any], **more: Any) -> Stock:
    short = [1.0 + pair / 16 for pair in range(num_pairs)]
    long = [1.0 + pair for pair in range(num_pairs)]
    spec = {
        "d_model": 128,
        "embedding": {"kind": "token", "tied": False},
        "position": {
            "kind": "longrope",
            "short_factors": short,
            "long_factors": long,
            "original_context_tokens": ORIGINAL_TOKENS,
            **position,
        },
        "attention": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2},
        "feedforward": {"kind": "swiglu", "d_hidden": 160},
        "norm": {"kind": "rmsnorm", "eps": 1e-5},
        "head": "logits",
    }
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": short,
        "long_factor": long,
        "partial_rotary_factor": num_pairs / 16,
        "original_max_position_embeddings": ORIGINAL_TOKENS,
    }
    settings = {
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LONGER * ORIGINAL_TOKENS,
        "original_max_position_embeddings": ORIGINAL_TOKENS,
        "rope_parameters": rope,
    }
    return Stock(transformers.Phi3Config, settings, spec | more.pop("spec", {}), "phi3", **more)


PHI3_LONG = _phi3(16, {})
PHI3_LONG_IN_PART = _phi3(12, {"rotary_dim": 24})  # as Phi-4-mini, which turns three quarters of each head
# In transformers a text decides which factors hold, and in ours the spec's context, while the attention factor of
# theirs stays that of the longer one.
PHI3_SHORT = _phi3(
    16,
    {"attention_factor": math.sqrt(1 + math.log(LONGER) / math.log(ORIGINAL_TOKENS))},
    spec={"context_tokens": ORIGINAL_TOKENS},
    text_tokens=ORIGINAL_TOKENS,
    decodes=False,
)

# ---- Bloom


BLOOM = Stock(
    transformers.BloomConfig,
    {"hidden_size": 96, "n_layer": NUM_LAYERS, "n_head": 3},  # three: no power of two, so not one series of slopes
    {
        "d_model": 96,
        "embedding": "token",
        "embedding_norm": True,
        "position": "alibi",
        "attention": {"kind": "gqa", "num_heads": 3, "num_kv_heads": 3, "bias": True},
        "feedforward": {"kind": "gelu", "bias": True, "approximate": True},
        "norm": "layernorm",
        "head": "logits",
    },
    "bloom",
)

STOCK = {
    "GPT-2": GPT2,
    "Llama": LLAMA,
    "Llama, linear": LLAMA_LINEAR,
    "Llama, NTK": LLAMA_NTK,
    "Llama, YaRN": LLAMA_YARN,
    "Qwen3": QWEN3,
    "Gemma-2": GEMMA2,
    "Gemma-2, untied": GEMMA2_UNTIED,
    "Phi-3, long": PHI3_LONG,
    "Phi-3, long in part": PHI3_LONG_IN_PART,
    "Phi-3, short": PHI3_SHORT,
    "Bloom": BLOOM,
}


@cache
def pair(name: str) -> tuple[Any, Any]:
    """Their model and ours."""
    stock = STOCK[name]
    model = theirs(stock)
    return model, ours(stock, stock.spec, model)
