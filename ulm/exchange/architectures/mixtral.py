"""MixtralForCausalLM: a Llama whose feed-forward layers are mixtures of experts, perhaps with a window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from ulm.errors import ConfigError
from ulm.exchange.architectures import _llama
from ulm.exchange.architectures.llama import Llama
from ulm.exchange.contract import Config
from ulm.exchange.plain import Plain, one
from ulm.exchange.rewrites import Rewrite, with_sharper_queries
from ulm.exchange.weights import Rule, same
from ulm.registry import KindConfig, register


@register("architecture", KindConfig)
class Mixtral:
    """As transformers' MixtralConfig has it: arXiv 2401.04088, section 2."""

    name: ClassVar[str] = "MixtralForCausalLM"
    model_type: ClassVar[str] = "mixtral"
    preference: ClassVar[int] = 9
    defaults: ClassVar[Config] = {
        "vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8, "attention_dropout": 0.0,
        "router_jitter_noise": 0.0, "rope_theta": 1_000_000.0,
    }  # fmt: skip
    rewrites: ClassVar[tuple[Rewrite, ...]] = (with_sharper_queries,)

    def config(self, settings: Plain) -> Config:
        """config.json; see the contract."""
        left_out = {"attention_bias", "mlp_bias"}
        like_llama = {key: value for key, value in Llama().config(settings).items() if key not in left_out}
        return {
            **like_llama,
            "num_local_experts": one(settings, "feedforward.num_experts", 2),
            "num_experts_per_tok": max(2, one(settings, "feedforward.experts_per_token", 2)),  # see `fields`
            "sliding_window": one(settings, "attention.window_tokens"),
            "router_jitter_noise": 0.0,
        }

    def fields(self, config: Config) -> dict[str, Any]:
        """The spec's fields; see the contract."""
        fields = Llama().fields(config)
        if config["num_experts_per_tok"] == 1:
            problem = "with one expert a token theirs is weighed 1, ours by its probability"
            raise ConfigError("config.json: num_experts_per_tok", problem, "two at least")
        if (window := config["sliding_window"]) is not None:
            fields["attention"] |= {"kind": "sliding", "window_tokens": window}
        experts = {
            "kind": "moe",
            "num_experts": config["num_local_experts"],
            "experts_per_token": config["num_experts_per_tok"],
            "d_hidden": config["intermediate_size"],
        }
        return {**fields, "feedforward": experts}

    def rules(self, settings: Plain) -> Iterator[Rule]:
        """How weights are stored; see the contract."""
        yield from _llama.rules(settings, feedforward={})
        for layer in range(settings["num_layers"]):
            block, theirs = f"blocks.{layer}.feedforward", f"model.layers.{layer}.block_sparse_moe"
            yield same(f"{theirs}.gate.weight", f"{block}.router.weight")
            for number in range(one(settings, "feedforward.num_experts")):
                for part, name in (("gate", "w1"), ("out", "w2"), ("up", "w3")):
                    weight = f"{block}.experts.{number}.{part}.weight"
                    yield same(f"{theirs}.experts.{number}.{name}.weight", weight)
