"""What Llama and those that are nearly one have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ulm.errors import ConfigError
from ulm.exchange.architectures import _rope
from ulm.exchange.plain import Plain, one
from ulm.exchange.weights import Rule, same

NORMS_BEFORE = {"attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm"}


def sizes(settings: Plain) -> dict[str, Any]:
    """The sizes of config.json."""
    return {
        "vocab_size": settings["vocab_size"],
        "hidden_size": settings["d_model"],
        "intermediate_size": one(settings, "feedforward.d_hidden", 0),
        "num_hidden_layers": settings["num_layers"],
        "num_attention_heads": one(settings, "attention.num_heads", 1),
        "num_key_value_heads": one(settings, "attention.num_kv_heads", 1),
        "max_position_embeddings": settings["context_tokens"],
        "tie_word_embeddings": settings["embedding.tied"],
        "attention_dropout": 0.0,
    }


def widths(settings: Plain) -> dict[str, Any]:
    """Sizes, and the width of a head, for architectures that leave it open."""
    return {**sizes(settings), "head_dim": one(settings, "attention.head_dim", 0)}


def turning(settings: Plain) -> dict[str, Any]:
    """What turns queries and keys, for transformers 5 and, as rope_theta and rope_scaling, for what is older."""
    said = _rope.parameters(one(settings, "position.turning"))
    scaling = {key: value for key, value in said.items() if key != "rope_theta"}
    old = {"rope_scaling": scaling} if said["rope_type"] != "default" else {}
    return {"rope_parameters": said, "rope_theta": said["rope_theta"], **old}


def eps(settings: Plain) -> float:
    """Of the norms."""
    return float(one(settings, "final_norm.eps") or one(settings, "norm.eps", 1e-6))


def fields(c: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, heads and embeddings of a spec."""
    num_heads = c["num_attention_heads"]
    if c["hidden_size"] % num_heads:  # transformers refuses it even where head_dim is given
        problem = f"{c['hidden_size']} is no multiple of its {num_heads} heads"
        raise ConfigError("config.json: hidden_size", problem, "which transformers asks for")
    return {
        "vocab_size": c["vocab_size"],
        "context_tokens": c["max_position_embeddings"],
        "d_model": c["hidden_size"],
        "num_layers": c["num_hidden_layers"],
        "embedding": {"kind": "token", "tied": c["tie_word_embeddings"]},
        "attention": {
            "kind": "gqa",
            "num_heads": num_heads,
            "num_kv_heads": c.get("num_key_value_heads") or num_heads,
            "head_dim": c.get("head_dim") or c["hidden_size"] // num_heads,
        },
        "head": "logits",
    }


def rules(
    settings: Plain,
    *,
    norms: Mapping[str, str] = NORMS_BEFORE,
    feedforward: Mapping[str, str] | None = None,
    attention: Mapping[str, str] | None = None,
    norm: Any = same,
) -> Iterator[Rule]:
    """Names of the weights: tables, then each layer's norms, attention and feed-forward."""
    yield same("model.embed_tokens.weight", "embedding.weight")
    if not settings["embedding.tied"]:
        yield same("lm_head.weight", "head.weight")
    yield from _with_bias("model.norm", "norm", has_bias=bool(settings.get("final_norm.bias")), rule=norm)
    if attention is None:
        attention = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
    if feedforward is None:
        feedforward = {"gate": "gate_proj", "up": "up_proj", "out": "down_proj"}
    for layer in range(settings["num_layers"]):
        block, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        for ours, name in norms.items():
            has_bias = bool(one(settings, "norm.bias"))
            yield from _with_bias(f"{theirs}.{name}", f"{block}.{ours}", has_bias=has_bias, rule=norm)
        for ours, name in attention.items():
            has_bias = bool(one(settings, "attention.bias"))
            yield from _with_bias(f"{theirs}.self_attn.{name}", f"{block}.attention.{ours}", has_bias=has_bias)
        if one(settings, "attention.qk_norm"):
            for part in "qk":
                yield norm(f"{theirs}.self_attn.{part}_norm.weight", f"{block}.attention.{part}_norm.weight")
        for ours, name in feedforward.items():
            has_bias = bool(one(settings, "feedforward.bias"))
            yield from _with_bias(f"{theirs}.mlp.{name}", f"{block}.feedforward.{ours}", has_bias=has_bias)


def _with_bias(theirs: str, ours: str, *, has_bias: bool, rule: Any = same) -> Iterator[Rule]:
    yield rule(f"{theirs}.weight", f"{ours}.weight")
    if has_bias:
        yield rule(f"{theirs}.bias", f"{ours}.bias")
