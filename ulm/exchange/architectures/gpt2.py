"""GPT2LMHeadModel: LayerNorm, learned positions, heads of their own keys and values, GELU, biases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from ulm.errors import ConfigError
from ulm.exchange.architectures import _llama
from ulm.exchange.contract import Config
from ulm.exchange.plain import Plain, one
from ulm.exchange.rewrites import Rewrite, with_all_heads, with_biases, with_table
from ulm.exchange.weights import Rule, same, stacked, turned
from ulm.registry import KindConfig, register

# Ours by theirs, the one that an export writes first.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "gelu_new": {"kind": "gelu", "approximate": True},
    "gelu_pytorch_tanh": {"kind": "gelu", "approximate": True},
    "gelu": {"kind": "gelu", "approximate": False},
    "relu": {"kind": "relu"},
    "relu2": {"kind": "relu2"},
}


@register("architecture", KindConfig)
class GPT2:
    """As transformers' GPT2Config has it (Radford and others, 2019). Heads are d_model / num_heads wide."""

    name: ClassVar[str] = "GPT2LMHeadModel"
    model_type: ClassVar[str] = "gpt2"
    preference: ClassVar[int] = 7
    defaults: ClassVar[Config] = {
        "vocab_size": 50_257, "n_positions": 1_024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
        "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
    }  # fmt: skip
    rewrites: ClassVar[tuple[Rewrite, ...]] = (with_table, with_biases, with_all_heads)

    def config(self, settings: Plain) -> Config:
        """config.json; see the contract."""
        kind, tanh = one(settings, "feedforward.kind"), one(settings, "feedforward.approximate", False)
        has = {"kind": kind, "approximate": tanh} if kind == "gelu" else {"kind": kind}
        return {
            "vocab_size": settings["vocab_size"],
            "n_positions": settings["context_tokens"],
            "n_ctx": settings["context_tokens"],
            "n_embd": settings["d_model"],
            "n_layer": settings["num_layers"],
            "n_head": one(settings, "attention.num_heads", 1),
            "n_inner": one(settings, "feedforward.d_hidden"),
            "activation_function": next((name for name, ours in ACTIVATIONS.items() if ours == has), "gelu_new"),
            "layer_norm_epsilon": _llama.eps(settings),
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": settings["embedding.tied"],
        }

    def fields(self, config: Config) -> dict[str, Any]:
        """The spec's fields; see the contract."""
        activation = config["activation_function"]
        if activation not in ACTIVATIONS:
            remedy = f"one of {', '.join(ACTIVATIONS)}"
            raise ConfigError("config.json: activation_function", f"ours has no {activation!r}", remedy)
        num_heads = config["n_head"]
        return {
            "vocab_size": config["vocab_size"],
            "context_tokens": config["n_positions"],
            "d_model": config["n_embd"],
            "num_layers": config["n_layer"],
            "embedding": {"kind": "token", "tied": config["tie_word_embeddings"]},
            "position": "learned",
            "attention": {"kind": "gqa", "num_heads": num_heads, "num_kv_heads": num_heads, "bias": True},
            "feedforward": {**ACTIVATIONS[activation], "d_hidden": config["n_inner"], "bias": True},
            "norm": {"kind": "layernorm", "eps": config["layer_norm_epsilon"]},
            "head": "logits",
        }

    def rules(self, settings: Plain) -> Iterator[Rule]:
        """How weights are stored; see the contract. Matrices are in x out; queries, keys and values are one."""
        yield same("transformer.wte.weight", "embedding.weight")
        yield same("transformer.wpe.weight", "position.weight")
        if not settings["embedding.tied"]:
            yield same("lm_head.weight", "head.weight")
        width = settings["d_model"]
        for part in ("weight", "bias"):
            yield same(f"transformer.ln_f.{part}", f"norm.{part}")
        for layer in range(settings["num_layers"]):
            block, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
            for part, rule in (("weight", turned), ("bias", same)):
                yield same(f"{theirs}.ln_1.{part}", f"{block}.attention_norm.{part}")
                yield same(f"{theirs}.ln_2.{part}", f"{block}.feedforward_norm.{part}")
                qkv = [f"{block}.attention.{name}.{part}" for name in "qkv"]
                yield stacked(f"{theirs}.attn.c_attn.{part}", qkv, [width] * 3, is_turned=True)
                yield rule(f"{theirs}.attn.c_proj.{part}", f"{block}.attention.out.{part}")
                yield rule(f"{theirs}.mlp.c_fc.{part}", f"{block}.feedforward.up.{part}")
                yield rule(f"{theirs}.mlp.c_proj.{part}", f"{block}.feedforward.out.{part}")
