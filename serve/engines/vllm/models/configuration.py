"""The configuration of a folder that mixes several exported models."""

from __future__ import annotations

from transformers import PreTrainedConfig


class UlmMixtureConfig(PreTrainedConfig):
    """`experts` are folders by id, as seen from this one; each size is the largest that an expert has."""

    model_type = "ulm_mixture"

    experts: dict[str, str] | None = None
    vocab_size: int = 8_192
    hidden_size: int = 96
    num_hidden_layers: int = 3
    num_attention_heads: int = 3
    num_key_value_heads: int = 1
    head_dim: int = 32
    max_position_embeddings: int = 256
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
