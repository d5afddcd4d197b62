"""What a model costs: parameters and FLOPs, by stated conventions."""

from __future__ import annotations

from dataclasses import dataclass
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
    of_tokens = (model.embedding.weight, model.head.weight, *getattr(model.embedding, "tables", ()))
    tables = {id(table): table for table in of_tokens}
    padding = sum(_num_padding(table, model.vocab_size) for table in tables.values())
    return sum(p.numel() for p in model.parameters()) - padding


def forward_flops_per_token(model: Any, context_tokens: int) -> float:
    """2 x parameters in the matrices that a token passes (output head included, tied or not) + attention.

    Tables of tokens, values and positions are looked up and cost nothing; a tied one is counted once, as the head. A
    block that several layers share is passed as often; of experts only those that a token is sent to. What attention
    costs beside its matrices each kind says; for full attention it is 4 x heads x head_dim x context / 2, the half for
    causality (PaLM, arXiv 2204.02311, appendix B). Norms, activations and the softmax are left out.
    """
    matrices = model.head.weight.numel() - _num_padding(model.head.weight, model.vocab_size)
    return 2.0 * matrices + sum(sum(block_flops(block, context_tokens)) for block in model.layers)


def block_flops(block: Any, context_tokens: int) -> tuple[float, float]:
    """What attention and feed-forward of one layer add to `forward_flops_per_token`."""
    attention = 2.0 * sum(p.numel() for p in own_parameters(block.attention) if p.dim() >= 2)
    passed = sum(p.numel() for p in block.feedforward.parameters() if p.dim() >= 2)
    passed -= getattr(block.feedforward, "num_idle_parameters", 0)
    return attention + block.attention.attend_flops(context_tokens), 2.0 * passed


def own_parameters(attention: Any) -> list[nn.Parameter]:
    """Those of an attention without its position's, which all layers share and only look up."""
    of_position = {id(p) for p in attention.position.parameters()}
    return [p for p in attention.parameters() if id(p) not in of_position]


def train_flops_per_token(model: Any, context_tokens: int) -> float:
    """Three forward passes: backward takes two, one for the inputs and one for the weights."""
    return 3.0 * forward_flops_per_token(model, context_tokens)


@dataclass(frozen=True)
class CacheBytes:
    """What decoding one row keeps: so much for each of its tokens, and so much however long it is."""

    per_token: int
    fixed: int


def cache_bytes(spec: ModelSpec, dtype: torch.dtype = torch.bfloat16) -> CacheBytes:
    """Bytes of a row's cache, from the states that a model without weights makes."""
    model = on_meta(spec).to(dtype)
    sizes = [model.new_cache(1, spec.context_tokens + more).nbytes for more in (0, 1)]
    per_token = sizes[1] - sizes[0]
    return CacheBytes(per_token, sizes[0] - per_token * spec.context_tokens)


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
