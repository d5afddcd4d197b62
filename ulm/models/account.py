"""What a model costs: parameters and FLOPs, by stated conventions."""

from __future__ import annotations

from typing import Any

from torch import nn

from ulm.spec import ModelSpec


def _num_padding(table: nn.Parameter, vocab_size: int) -> int:
    """Numbers in the rows that pad a table beyond the vocabulary; no token and no logit uses them."""
    return table[vocab_size:].numel()


def num_parameters(model: Any) -> int:
    """All parameters at the true vocabulary, tied tables once; rows of padding are not counted."""
    tables = {id(table): table for table in (model.embedding.weight, model.head.weight)}
    padding = sum(_num_padding(table, model.vocab_size) for table in tables.values())
    return sum(p.numel() for p in model.parameters()) - padding


def train_flops_per_token(model: Any, context_tokens: int) -> float:
    """6 x parameters in matrices (output head included, tied or not) + attention scores and values.

    The input embedding is a look-up and costs nothing; tied, its matrix is counted once, as the head. Attention:
    12 x layers x heads x head_dim x context / 2, the half for causality (PaLM, arXiv 2204.02311, appendix B).
    """
    spec: ModelSpec = model.spec
    look_up = None if model.embedding.weight is model.head.weight else model.embedding.weight
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and p is not look_up)
    matrices -= _num_padding(model.head.weight, model.vocab_size)
    width = getattr(spec.attention, "num_heads", 1) * spec.head_dim
    return 6.0 * matrices + 12.0 * spec.num_layers * width * context_tokens / 2
