"""Olmo2ForCausalLM: a Llama that norms what its sub-layers give, and queries and keys of all heads at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from ulm.exchange.architectures import _llama
from ulm.exchange.architectures.llama import Llama
from ulm.exchange.contract import Config
from ulm.exchange.plain import Plain
from ulm.exchange.rewrites import Rewrite, with_sharper_queries
from ulm.exchange.weights import Rule
from ulm.registry import KindConfig, register

NORMS = {"attention_norm": "post_attention_layernorm", "feedforward_norm": "post_feedforward_layernorm"}


@register("architecture", KindConfig)
class Olmo2:
    """As transformers' Olmo2Config has it: arXiv 2501.00656, section 2. A head is as wide as d_model / num_heads."""

    name: ClassVar[str] = "Olmo2ForCausalLM"
    model_type: ClassVar[str] = "olmo2"
    preference: ClassVar[int] = 2
    defaults: ClassVar[Config] = {
        "vocab_size": 50_304, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2_048, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0,
    }  # fmt: skip
    rewrites: ClassVar[tuple[Rewrite, ...]] = (with_sharper_queries,)

    def config(self, settings: Plain) -> Config:
        """config.json; see the contract."""
        left_out = {"mlp_bias", "head_dim"}
        return {key: value for key, value in Llama().config(settings).items() if key not in left_out}

    def fields(self, config: Config) -> dict[str, Any]:
        """The spec's fields; see the contract."""
        fields = Llama().fields({**config, "head_dim": None})
        normed = {"qk_norm": "whole", "qk_norm_eps": config["rms_norm_eps"]}
        return {**fields, "attention": {**fields["attention"], **normed}, "norm_placement": "output"}

    def rules(self, settings: Plain) -> Iterator[Rule]:
        """How weights are stored; see the contract."""
        return _llama.rules(settings, norms=NORMS)
