"""The configuration of a ulm model: its sizes under the usual names, and the whole spec that it is made from."""

from __future__ import annotations

from dataclasses import field
from itertools import cycle, islice
from typing import Any

from transformers import PreTrainedConfig

LAYER_SLOTS = ("position", "attention", "feedforward", "norm", "norm_placement")


class UlmConfig(PreTrainedConfig):
    """`spec` says what the model is; what stands beside it repeats a part of that for tools that read no spec."""

    model_type = "ulm"
    keys_to_ignore_at_inference = ["past_key_values"]  # a plain list is the base's form

    spec: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 8_192
    hidden_size: int = 96
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 3
    num_key_value_heads: int = 1
    head_dim: int = 32
    max_position_embeddings: int = 256
    tie_word_embeddings: bool = True
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """What each block of weights is made of, first to last: the spec's pattern again and again, or its slots."""
        usual = {slot: self.spec[slot] for slot in LAYER_SLOTS}
        pattern = [{**usual, **entry} for entry in self.spec["blocks"] for _ in range(entry["repeat"])] or [usual]
        return list(islice(cycle(pattern), self.num_hidden_layers // self.layers_per_block))

    @property
    def layers_per_block(self) -> int:
        """Layers in a row that share one block's weights."""
        return int(self.spec["layers_per_block"])
