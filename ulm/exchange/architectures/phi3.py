"""Phi3ForCausalLM: a Llama with LongRoPE, which may turn a part of each head alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from ulm.components.position import longrope, rope
from ulm.errors import ConfigError
from ulm.exchange.architectures import _llama, _rope
from ulm.exchange.contract import Config
from ulm.exchange.plain import Plain, Turning, one
from ulm.exchange.rewrites import Rewrite
from ulm.exchange.weights import Rule, stacked
from ulm.registry import KindConfig, register


@register("architecture", KindConfig)
class Phi3:
    """As transformers' Phi3Config has it: arXiv 2404.14219, section 2.

    Which factors hold, transformers finds by each text's length, vLLM and llama.cpp by the length they serve; ours
    follow from the spec's context. So those that hold are written as both, and the three agree.
    """

    name: ClassVar[str] = "Phi3ForCausalLM"
    model_type: ClassVar[str] = "phi3"
    preference: ClassVar[int] = 3
    defaults: ClassVar[Config] = {
        "vocab_size": 32_064, "hidden_size": 3_072, "intermediate_size": 8_192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4_096, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "sliding_window": None, "attention_dropout": 0.0, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "original_max_position_embeddings": 4_096,
    }  # fmt: skip
    rewrites: ClassVar[tuple[Rewrite, ...]] = ()

    def config(self, settings: Plain) -> Config:
        """config.json; see the contract."""
        turning = one(settings, "position.turning")
        said, original = self._parameters(turning, settings)
        return {
            **_llama.sizes(settings),
            "original_max_position_embeddings": original,
            "rope_parameters": said,
            "rope_theta": said["rope_theta"],
            "rope_scaling": None if said["rope_type"] == "default" else said,
            "partial_rotary_factor": said["partial_rotary_factor"],
            "rms_norm_eps": _llama.eps(settings),
            "hidden_act": "silu",
            "sliding_window": one(settings, "attention.window_tokens"),
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        }

    @staticmethod
    def _parameters(turning: Turning | None, settings: Plain) -> tuple[Config, int]:
        """rope_parameters, and the first context: by its share of the other all find how long queries and keys get."""
        context_tokens = settings["context_tokens"]
        width = one(settings, "attention.head_dim") or (2 * len(turning.frequencies) if turning else 1)
        part = 2 * len(turning.frequencies) / width if turning else 1.0
        config = turning.config if turning else None
        usual = _rope.parameters(turning)
        if turning is None or isinstance(config, rope.Config) and usual["rope_type"] == "default":
            return {**usual, "partial_rotary_factor": part}, context_tokens
        assert isinstance(config, rope.Config | longrope.Config)
        # transformers' Phi3Config takes no other scaling than this one, which can be any.
        unscaled = config.frequencies(width)
        original = context_tokens
        if isinstance(config, rope.Config):
            found = [frequency / slower for frequency, slower in zip(unscaled, rope.scaled(config, width), strict=True)]
        else:
            found = list(config.factors_at(context_tokens) or (1.0,) * len(unscaled))
            original = min(config.original_context_tokens or context_tokens, context_tokens)
        said = {
            "rope_theta": config.theta,
            "rope_type": "longrope",
            "type": "longrope",
            "partial_rotary_factor": part,
            "short_factor": found,
            "long_factor": found,
            "original_max_position_embeddings": original,
        }
        return said, original

    def fields(self, config: Config) -> dict[str, Any]:
        """The spec's fields; see the contract."""
        fields = _llama.fields(config)
        said = _rope.given(config)
        if said.get("rope_type") in ("longrope", "su"):
            position: dict[str, Any] = {
                "kind": "longrope",
                "theta": said["rope_theta"],
                "short_factors": said["short_factor"],
                "long_factors": said["long_factor"],
                # of the two places this is the one that transformers reads
                "original_context_tokens": config["original_max_position_embeddings"],
                "attention_factor": said.get("attention_factor"),
            }
        else:
            position = _rope.position(said)
        part = said.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        rotary_dim = part * fields["attention"]["head_dim"]
        if rotary_dim % 2:
            raise ConfigError("config.json: partial_rotary_factor", f"{part} of a head is no even number", "another")
        if part != 1:
            position["rotary_dim"] = int(rotary_dim)
        if (window := config["sliding_window"]) is not None:
            fields["attention"] |= {"kind": "sliding", "window_tokens": window}
        return {
            **fields,
            "position": position,
            "feedforward": {"kind": "swiglu", "d_hidden": config["intermediate_size"]},
            "norm": {"kind": "rmsnorm", "eps": config["rms_norm_eps"]},
        }

    def rules(self, settings: Plain) -> Iterator[Rule]:
        """How weights are stored; see the contract."""
        yield from _llama.rules(settings, attention={"out": "o_proj"}, feedforward={"out": "down_proj"})
        width, num_kv = one(settings, "attention.head_dim"), one(settings, "attention.num_kv_heads")
        sizes = [one(settings, "attention.num_heads") * width, num_kv * width, num_kv * width]
        d_hidden = one(settings, "feedforward.d_hidden")
        for layer in range(settings["num_layers"]):
            block, theirs = f"blocks.{layer}", f"model.layers.{layer}"
            qkv = [f"{block}.attention.{part}.weight" for part in "qkv"]
            yield stacked(f"{theirs}.self_attn.qkv_proj.weight", qkv, sizes)
            gated = [f"{block}.feedforward.{part}.weight" for part in ("gate", "up")]
            yield stacked(f"{theirs}.mlp.gate_up_proj.weight", gated, [d_hidden, d_hidden])
