"""Starcoder2ForCausalLM: LayerNorm, rotary positions, shared key and value heads, GELU, biases, perhaps a window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from ulm.exchange.architectures import _llama, _rope
from ulm.exchange.contract import Config
from ulm.exchange.plain import Plain, one
from ulm.exchange.rewrites import Rewrite, with_biases, with_sharper_queries
from ulm.exchange.weights import Rule
from ulm.registry import KindConfig, register


@register("architecture", KindConfig)
class Starcoder2:
    """As transformers' Starcoder2Config has it: arXiv 2402.19173, section 6. Heads are d_model / num_heads wide."""

    name: ClassVar[str] = "Starcoder2ForCausalLM"
    model_type: ClassVar[str] = "starcoder2"
    preference: ClassVar[int] = 4
    defaults: ClassVar[Config] = {
        "vocab_size": 49_152, "hidden_size": 3_072, "intermediate_size": 12_288, "num_hidden_layers": 30,
        "num_attention_heads": 24, "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4_096, "norm_epsilon": 1e-5, "tie_word_embeddings": True, "use_bias": True,
        "sliding_window": None, "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
    }  # fmt: skip
    rewrites: ClassVar[tuple[Rewrite, ...]] = (with_biases, with_sharper_queries)

    def config(self, settings: Plain) -> Config:
        """config.json; see the contract."""
        return {
            **_llama.sizes(settings),
            **_llama.turning(settings),
            "norm_epsilon": _llama.eps(settings),
            "hidden_act": "gelu_pytorch_tanh" if one(settings, "feedforward.approximate") else "gelu",
            "use_bias": bool(one(settings, "attention.bias")),
            "sliding_window": one(settings, "attention.window_tokens"),
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
        }

    def fields(self, config: Config) -> dict[str, Any]:
        """The spec's fields; see the contract."""
        fields = _llama.fields({**config, "head_dim": None})
        bias, window = config["use_bias"], config["sliding_window"]
        attention = {**fields["attention"], "bias": bias}
        if window is not None:
            attention |= {"kind": "sliding", "window_tokens": window}
        return {
            **fields,
            "attention": attention,
            "position": _rope.position(_rope.given(config)),
            "feedforward": {
                "kind": "gelu",
                "d_hidden": config["intermediate_size"],
                "bias": bias,
                "approximate": config["hidden_act"] == "gelu_pytorch_tanh",
            },
            "norm": {"kind": "layernorm", "eps": config["norm_epsilon"]},
        }

    def rules(self, settings: Plain) -> Iterator[Rule]:
        """How weights are stored; see the contract."""
        return _llama.rules(settings, feedforward={"up": "c_fc", "out": "c_proj"})
