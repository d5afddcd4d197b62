"""Gemma2ForCausalLM: norms around the sub-layers, GEGLU, capped scores and logits, a window in some layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from ulm.exchange.architectures import _llama, _rope
from ulm.exchange.contract import Config
from ulm.exchange.plain import Plain, by_layer, one
from ulm.exchange.rewrites import Rewrite, with_sharper_queries
from ulm.exchange.weights import Rule, less_one
from ulm.registry import KindConfig, register

NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "feedforward_norm": "pre_feedforward_layernorm",
    "feedforward_out_norm": "post_feedforward_layernorm",
}
WINDOW, WHOLE = "sliding_attention", "full_attention"


@register("architecture", KindConfig)
class Gemma2:
    """As transformers' Gemma2Config has it: arXiv 2408.00118, section 2."""

    name: ClassVar[str] = "Gemma2ForCausalLM"
    model_type: ClassVar[str] = "gemma2"
    preference: ClassVar[int] = 5
    defaults: ClassVar[Config] = {
        "vocab_size": 256_000, "hidden_size": 2_304, "intermediate_size": 9_216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8_192, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False,
        "query_pre_attn_scalar": 256, "sliding_window": 4_096, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0, "attention_dropout": 0.0, "use_bidirectional_attention": None,
    }  # fmt: skip
    rewrites: ClassVar[tuple[Rewrite, ...]] = (with_sharper_queries,)

    def config(self, settings: Plain) -> Config:
        """config.json; see the contract."""
        return {
            **_llama.widths(settings),
            **_llama.turning(settings),
            **common(settings),
            "attn_logit_softcapping": one(settings, "attention.soft_cap"),
            "use_bidirectional_attention": None,
        }

    def fields(self, config: Config) -> dict[str, Any]:
        """The spec's fields; see the contract."""
        fields = common_fields(config, {"soft_cap": config["attn_logit_softcapping"]})
        kinds = config.get("layer_types") or [WHOLE if n % 2 else WINDOW for n in range(config["num_hidden_layers"])]
        window = {"kind": "sliding", "window_tokens": config["sliding_window"]}
        blocks = [{"attention": window} if kind == WINDOW else {} for kind in kinds]
        return {**fields, "position": _rope.position(_rope.given(config)), "blocks": blocks}

    def rules(self, settings: Plain) -> Iterator[Rule]:
        """How weights are stored; see the contract."""
        return _llama.rules(settings, norms=NORMS, norm=less_one)


def common(settings: Plain) -> Config:
    """What Gemma-2 and 3 say of norms, feed-forward layers, scores, windows and logits."""
    windows = by_layer(settings, "attention.window_tokens")
    scale = one(settings, "attention.scale") or 1.0
    return {
        "rms_norm_eps": _llama.eps(settings),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": round(scale**-2),  # transformers takes whole numbers alone
        "sliding_window": next((window for window in windows if window), settings["context_tokens"]),
        "layer_types": [WINDOW if window else WHOLE for window in windows],
        "final_logit_softcapping": settings.get("head.cap"),
    }


def common_fields(config: Config, attention: dict[str, Any]) -> dict[str, Any]:
    """What both say, as a spec's fields."""
    fields = _llama.fields(config)
    cap = config["final_logit_softcapping"]
    scale = float(config["query_pre_attn_scalar"]) ** -0.5
    return {
        **fields,
        "embedding": {**fields["embedding"], "scaled": True},
        "attention": {**fields["attention"], **attention, "scale": scale},
        "feedforward": {"kind": "geglu", "d_hidden": config["intermediate_size"], "approximate": True},
        "norm": {"kind": "rmsnorm", "eps": config["rms_norm_eps"]},
        "norm_placement": "around",
        "head": {"kind": "soft_cap", "cap": cap} if cap else "logits",
    }
