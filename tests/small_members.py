"""Checkpoints of small models for tests of an engine: made in milliseconds, their logits far apart."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

import ulm
from tests.variants import spec_of
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.tokenizer import Tokenizer

CONTEXT_TOKENS = 96
LINEAR = {"attention": "linear"}  # remembers in rows, not in pages


def small_model(seed: int = 0, context_tokens: int = CONTEXT_TOKENS, **overrides: Any) -> Any:
    """A model of the byte tokenizer's vocabulary whose weights depend on `seed` alone."""
    spec = spec_of({"vocab_size": byte_tokenizer().vocab_size, **overrides}, context_tokens)
    model, generator = ulm.build(spec).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.dim() >= 2 else 1.0, 0.2, generator=generator)
    return model


def small_member(folder: Path, seed: int = 0, tokenizer: Tokenizer | None = None, **overrides: Any) -> Path:
    """The checkpoint of such a model, in a new folder within this one."""
    path = folder / f"member-{len(list(folder.iterdir()))}"
    ulm.save(small_model(seed, **overrides), tokenizer or the_tokenizer(), path)
    return path


@cache
def the_tokenizer() -> Tokenizer:
    """The one that they all have."""
    return byte_tokenizer()


def a_prompt(number: int, num_tokens: int) -> tuple[int, ...]:
    """Tokens that depend on the number: prompts of different numbers share no beginning."""
    return tuple((31 * number + 7 * at + 1) % 256 for at in range(num_tokens))
