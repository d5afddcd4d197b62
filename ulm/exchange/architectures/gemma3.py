"""Gemma3ForCausalLM: Gemma-2 with normed queries and keys and other angles in layers with a window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from ulm.exchange.architectures import _llama, _rope
from ulm.exchange.architectures.gemma2 import NORMS, WHOLE, WINDOW, common, common_fields
from ulm.exchange.contract import Config
from ulm.exchange.plain import Plain, by_layer
from ulm.exchange.rewrites import Rewrite, with_sharper_queries
from ulm.exchange.weights import Rule, less_one
from ulm.registry import KindConfig, register

GLOBAL_EVERY = 6  # layers, where layer_types is left out


@register("architecture", KindConfig)
class Gemma3:
    """As transformers' Gemma3TextConfig has it: arXiv 2503.19786, section 2."""

    name: ClassVar[str] = "Gemma3ForCausalLM"
    model_type: ClassVar[str] = "gemma3_text"
    preference: ClassVar[int] = 6
    defaults: ClassVar[Config] = {
        "vocab_size": 262_208, "hidden_size": 2_304, "intermediate_size": 9_216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4_096,
        "final_logit_softcapping": None, "attn_logit_softcapping": None, "attention_dropout": 0.0,
        "use_bidirectional_attention": False,
    }  # fmt: skip
    rewrites: ClassVar[tuple[Rewrite, ...]] = (with_sharper_queries,)

    def config(self, settings: Plain) -> Config:
        """config.json; see the contract."""
        windows, turnings = (by_layer(settings, f"{key}") for key in ("attention.window_tokens", "position.turning"))
        of = {WINDOW if window else WHOLE: turning for window, turning in zip(windows, turnings, strict=True)}
        said = {kind: _rope.parameters(of.get(kind, turnings[0])) for kind in (WINDOW, WHOLE)}
        scaling = {key: value for key, value in said[WHOLE].items() if key != "rope_theta"}
        return {
            **_llama.widths(settings),
            **common(settings),
            "rope_parameters": said,
            "rope_theta": said[WHOLE]["rope_theta"],
            "rope_local_base_freq": said[WINDOW]["rope_theta"],
            **({"rope_scaling": scaling} if scaling["rope_type"] != "default" else {}),
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        }

    def fields(self, config: Config) -> dict[str, Any]:
        """The spec's fields; see the contract."""
        normed = {"qk_norm": True, "qk_norm_eps": config["rms_norm_eps"]}
        fields = common_fields(config, normed)
        said = config.get("rope_parameters") or {}
        if WHOLE not in said:
            local = {"rope_theta": config.get("rope_local_base_freq", 10_000.0)}
            said = {WHOLE: _rope.given(config, 1_000_000.0), WINDOW: local}
        else:
            _rope.check_scaling(config, said[WHOLE])
        kinds = config.get("layer_types") or [
            WINDOW if (n + 1) % GLOBAL_EVERY else WHOLE for n in range(config["num_hidden_layers"])
        ]
        window = {
            "attention": {"kind": "sliding", "window_tokens": config["sliding_window"]},
            "position": _rope.position(said[WINDOW]),
        }
        blocks = [window if kind == WINDOW else {} for kind in kinds]
        return {**fields, "position": _rope.position(said[WHOLE]), "blocks": blocks}

    def rules(self, settings: Plain) -> Iterator[Rule]:
        """How weights are stored; see the contract."""
        return _llama.rules(settings, norms=NORMS, norm=less_one)
