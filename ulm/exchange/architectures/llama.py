"""LlamaForCausalLM: RMSNorm, rotary positions, shared key and value heads, SwiGLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from ulm.exchange.architectures import _llama, _rope
from ulm.exchange.contract import Config
from ulm.exchange.plain import Plain
from ulm.exchange.rewrites import Rewrite, with_sharper_queries
from ulm.exchange.weights import Rule
from ulm.registry import KindConfig, register


@register("architecture", KindConfig)
class Llama:
    """As transformers' LlamaConfig has it: arXiv 2302.13971, with the shared heads of arXiv 2307.09288."""

    name: ClassVar[str] = "LlamaForCausalLM"
    model_type: ClassVar[str] = "llama"
    preference: ClassVar[int] = 0
    defaults: ClassVar[Config] = {
        "vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2_048, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
    }  # fmt: skip
    rewrites: ClassVar[tuple[Rewrite, ...]] = (with_sharper_queries,)

    def config(self, settings: Plain) -> Config:
        """config.json; see the contract."""
        return {
            **_llama.widths(settings),
            **_llama.turning(settings),
            "rms_norm_eps": _llama.eps(settings),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }

    def fields(self, config: Config) -> dict[str, Any]:
        """The spec's fields; see the contract."""
        return {
            **_llama.fields(config),
            "position": _rope.position(_rope.given(config)),
            "feedforward": {"kind": "swiglu", "d_hidden": config["intermediate_size"]},
            "norm": {"kind": "rmsnorm", "eps": config["rms_norm_eps"]},
        }

    def rules(self, settings: Plain) -> Iterator[Rule]:
        """How weights are stored; see the contract."""
        return _llama.rules(settings)
