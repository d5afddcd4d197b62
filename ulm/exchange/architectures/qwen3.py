"""Qwen3ForCausalLM: a Llama with normed queries and keys."""

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


@register("architecture", KindConfig)
class Qwen3:
    """As transformers' Qwen3Config has it: arXiv 2505.09388, section 2."""

    name: ClassVar[str] = "Qwen3ForCausalLM"
    model_type: ClassVar[str] = "qwen3"
    preference: ClassVar[int] = 1
    defaults: ClassVar[Config] = {
        "vocab_size": 151_936, "hidden_size": 4_096, "intermediate_size": 22_016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "attention_bias": False, "use_sliding_window": False, "attention_dropout": 0.0,
    }  # fmt: skip
    rewrites: ClassVar[tuple[Rewrite, ...]] = (with_sharper_queries,)

    def config(self, settings: Plain) -> Config:
        """config.json; see the contract."""
        like_llama = {key: value for key, value in Llama().config(settings).items() if key != "mlp_bias"}
        kinds = ["full_attention"] * settings["num_layers"]
        return {**like_llama, "use_sliding_window": False, "layer_types": kinds}

    def fields(self, config: Config) -> dict[str, Any]:
        """The spec's fields; see the contract."""
        fields = Llama().fields(config)
        normed = {"qk_norm": True, "qk_norm_eps": config["rms_norm_eps"]}
        return {**fields, "attention": {**fields["attention"], **normed}}

    def rules(self, settings: Plain) -> Iterator[Rule]:
        """How weights are stored; see the contract."""
        return _llama.rules(settings)
