"""What a model costs: parameters and FLOPs, by stated conventions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ulm import registry
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

    Tables of tokens and positions are looked up and cost nothing; a tied one is counted once, as the head. Attention:
    12 x layers x heads x head_dim x context / 2, the half for causality (PaLM, arXiv 2204.02311, appendix B).
    """
    spec: ModelSpec = model.spec
    look_ups = {id(p) for part in (model.embedding, model.position) for p in part.parameters()} - {
        id(model.head.weight)
    }
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in look_ups)
    matrices -= _num_padding(model.head.weight, model.vocab_size)
    width = getattr(spec.attention, "num_heads", 1) * spec.head_dim
    return 6.0 * matrices + 12.0 * spec.num_layers * width * context_tokens / 2


def on_meta(spec: ModelSpec) -> Any:
    """The spec's model without its weights: for counting."""
    with torch.device("meta"):
        return registry.find("model", spec.model)(spec)


def activation_bytes(spec: ModelSpec, precision: str = "float32", *, checkpoint: bool = False) -> int:
    """Bytes that one row of `context_tokens` more keeps for its backward pass, counted on a model without data.

    Of the eager model; a compiled one keeps less. The chunked loss keeps one hidden state more, which is counted.
    """
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    with FakeTensorMode():
        model = registry.find("model", spec.model)(spec)
        if precision == "pure_bfloat16":
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        model.checkpoint_activations = checkpoint
        # What does not grow with the rows is no row's: weights that autocast has cast, tables of angles.
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            one, two = (_kept_bytes(model, rows, spec.context_tokens) for rows in (1, 2))
    return two - one


def _kept_bytes(model: Any, rows: int, context_tokens: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, the model's own tensors left out."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    held: list[Any] = []  # or a storage's address would be used again

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # views of one storage are kept once
            kept[storage._cdata] = storage.nbytes()
        held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        x_BTD = model.hidden(torch.zeros(rows, context_tokens, dtype=torch.long))
    return sum(kept.values()) + 2 * x_BTD.numel() * x_BTD.element_size()
