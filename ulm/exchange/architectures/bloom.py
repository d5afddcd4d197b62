"""BloomForCausalLM: ALiBi, a norm of the embeddings, LayerNorm, heads of their own keys and values, GELU, biases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from ulm.exchange.architectures import _llama
from ulm.exchange.contract import Config
from ulm.exchange.plain import Plain, one
from ulm.exchange.rewrites import Rewrite, with_all_heads, with_biases
from ulm.exchange.weights import Rule, same, woven
from ulm.registry import KindConfig, register

SEQ_LENGTH = 2_048  # of the published models; an ALiBi model has no last position, and transformers' class no field


@register("architecture", KindConfig)
class Bloom:
    """As transformers' BloomConfig has it: arXiv 2211.05100, section 3.2. Feed-forward layers are 4 d_model wide.

    vLLM computes GELU exactly where this architecture has its tanh form: logits differ in the fourth digit there.
    """

    name: ClassVar[str] = "BloomForCausalLM"
    model_type: ClassVar[str] = "bloom"
    preference: ClassVar[int] = 8
    defaults: ClassVar[Config] = {
        "vocab_size": 250_880, "hidden_size": 64, "n_layer": 2, "n_head": 8, "layer_norm_epsilon": 1e-5,
        "seq_length": SEQ_LENGTH, "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": True,
        "hidden_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    rewrites: ClassVar[tuple[Rewrite, ...]] = (with_biases, with_all_heads)

    def config(self, settings: Plain) -> Config:
        """config.json; see the contract."""
        return {
            "vocab_size": settings["vocab_size"],
            "hidden_size": settings["d_model"],
            "n_layer": settings["num_layers"],
            "n_head": one(settings, "attention.num_heads", 1),
            "layer_norm_epsilon": _llama.eps(settings),
            "seq_length": settings["context_tokens"],
            "apply_residual_connection_post_layernorm": False,
            "tie_word_embeddings": settings["embedding.tied"],
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }

    def fields(self, config: Config) -> dict[str, Any]:
        """The spec's fields; see the contract."""
        num_heads = config["n_head"]
        return {
            "vocab_size": config["vocab_size"],
            "context_tokens": config["seq_length"],
            "d_model": config["hidden_size"],
            "num_layers": config["n_layer"],
            "embedding": {"kind": "token", "tied": config["tie_word_embeddings"]},
            "embedding_norm": True,
            "position": "alibi",
            "attention": {"kind": "gqa", "num_heads": num_heads, "num_kv_heads": num_heads, "bias": True},
            "feedforward": {"kind": "gelu", "bias": True, "approximate": True},
            "norm": {"kind": "layernorm", "eps": config["layer_norm_epsilon"]},
            "head": "logits",
        }

    def rules(self, settings: Plain) -> Iterator[Rule]:
        """How weights are stored; see the contract. Queries, keys and values are one, head by head."""
        yield same("transformer.word_embeddings.weight", "embedding.weight")
        if not settings["embedding.tied"]:
            yield same("lm_head.weight", "head.weight")
        num_heads = one(settings, "attention.num_heads")
        for part in ("weight", "bias"):
            yield same(f"transformer.word_embeddings_layernorm.{part}", f"embedding_norm.{part}")
            yield same(f"transformer.ln_f.{part}", f"norm.{part}")
        for layer in range(settings["num_layers"]):
            block, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
            for part in ("weight", "bias"):
                yield same(f"{theirs}.input_layernorm.{part}", f"{block}.attention_norm.{part}")
                yield same(f"{theirs}.post_attention_layernorm.{part}", f"{block}.feedforward_norm.{part}")
                qkv = [f"{block}.attention.{name}.{part}" for name in "qkv"]
                yield woven(f"{theirs}.self_attention.query_key_value.{part}", qkv, num_heads)
                yield same(f"{theirs}.self_attention.dense.{part}", f"{block}.attention.out.{part}")
                yield same(f"{theirs}.mlp.dense_h_to_4h.{part}", f"{block}.feedforward.up.{part}")
                yield same(f"{theirs}.mlp.dense_4h_to_h.{part}", f"{block}.feedforward.out.{part}")
