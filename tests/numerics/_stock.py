"""A stock decoder, small and with random weights, beside the spec and the weights of ours that compute the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import ulm
from ulm import registry
from ulm.exchange.plain import plain
from ulm.exchange.weights import Weights, imported

VOCAB_SIZE = 97  # no multiple of 64, so that our tables have rows which no token has
CONTEXT_TOKENS = 48
NUM_LAYERS = 3
STD = 0.2  # of every weight: scores of keys differ by several units, logits by more than one


@dataclass(frozen=True)
class Stock:
    """An architecture of transformers and the same as a spec of ours; texts of `text_tokens` are compared."""

    config: type
    settings: dict[str, Any]
    spec: dict[str, Any]
    architecture: str  # of ulm/exchange/architectures: how its weights are stored
    text_tokens: int = 40
    decodes: bool = True  # False where a greedy text would show nothing, or outgrow the angles of its first keys


def theirs(stock: Stock) -> Any:
    """The model of transformers, with eager attention: the only one that knows soft caps."""
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = stock.config(**{"vocab_size": VOCAB_SIZE, **ends, **stock.settings})
    return drawn(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def drawn(model: Any) -> Any:
    """The model with all of its weights drawn; norms and biases around where they start, so that none is idle."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = STD * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.dim() >= 2 else parameter + noise)
    return model.eval()


def ours(stock: Stock, spec: dict[str, Any], of: Any) -> Any:
    """A model of a spec with the weights of theirs."""
    rules = registry.find("architecture", stock.architecture)().rules(plain(_spec(spec)))
    return built(spec, imported(dict(of.named_parameters()), rules, lambda name: False))


def built(spec: dict[str, Any], weights: Weights) -> Any:
    """A model of a spec with all of its weights given; rows of a table beyond the vocabulary are NaN, to be noticed."""
    model = ulm.build(_spec(spec), seed=1).eval()
    parameters = dict(model.named_parameters())
    assert weights.keys() == parameters.keys()
    with torch.no_grad():
        for name, weight in weights.items():
            given = parameters[name].fill_(math.nan)[: len(weight)]
            assert given.shape == weight.shape, name
            given.copy_(weight)
    return model


def _spec(fields: dict[str, Any]) -> ulm.ModelSpec:
    sizes = {"vocab_size": VOCAB_SIZE, "context_tokens": CONTEXT_TOKENS, "num_layers": NUM_LAYERS}
    return ulm.ModelSpec.parse({**sizes, **fields})
