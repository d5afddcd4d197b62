"""What a recipe may say of a member that vLLM runs, and what of it is decided before any process starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator

from ulm import runtime
from ulm.errors import ConfigError
from ulm.models.account import cache_bytes
from ulm.registry import KindConfig
from ulm.spec import ModelSpec

BLOCK_TOKENS = 32  # of vLLM's cache; its own 128 would share few prefixes of small contexts
MAX_CACHE_BYTES = 1 << 30  # unless the recipe says more; room for one text is always made
INSTALL = (
    "`make setup` installs it beside an NVIDIA GPU, `make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu` "
    "without one; or take {kind: local}"
)


class Config(KindConfig):
    """How one member is run by vLLM; each replica is some processes of its own."""

    cpus: float = Field(
        1.0, gt=0, le=4_096
    )  # cores that it takes of Ray's, and whole ones of them as threads; fractions share
    # 0: it runs on the CPU. A fraction: so much of a card, for several members on it. 2 or more: tensor parallel.
    gpus: float = Field(0.0, ge=0, le=4_096)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as the checkpoint has it
    context_tokens: int | None = Field(None, ge=2)  # None: the model's; fewer take less memory
    kv_cache_bytes: int | None = Field(
        None, ge=1, le=1 << 50
    )  # of each replica; None: max_answers whole texts, at most 1 GiB
    max_answers: int = Field(64, ge=1)  # choices worked on at once
    max_waiting: int = Field(1_024, ge=1)  # requests beyond it are refused
    enforce_eager: bool | None = None  # None: on a CPU, where compiling takes 20 s and gains a quarter
    max_replicas: int = Field(1, ge=1)  # more are started while the ones there have about max_answers requests each

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("a fraction of one card, or a whole number of them")
        return gpus

    @property
    def tensor_parallel(self) -> int:
        """Cards that one replica is spread over."""
        return max(1, int(self.gpus))

    @property
    def is_eager(self) -> bool:
        """Whether nothing is compiled."""
        return self.gpus == 0 if self.enforce_eager is None else self.enforce_eager


def settle(config: Config, specs: Sequence[ModelSpec], dtype: str, place: str) -> Config:
    """The settings of an engine of one member, or several, with nothing left open.

    `dtype` is the checkpoints' own, `place` where the recipe has these settings. ConfigError, with the figure that
    would do, for what cannot be.
    """
    if not runtime.has_vllm():
        raise ConfigError(f"{place}.kind", "vllm is not installed here", INSTALL)
    if len(specs) > 1:
        config = _of_several(config, place)
    made_for = min(spec.context_tokens for spec in specs)
    context_tokens = config.context_tokens or made_for
    if context_tokens > made_for:
        problem = f"{context_tokens} tokens; the model was made for {made_for}"
        raise ConfigError(f"{place}.context_tokens", problem, "as many or fewer, or leave it out")
    for num_heads in {spec.num_heads for spec in specs}:
        if num_heads % config.tensor_parallel:
            problem = f"{config.gpus:g} cards cannot share {num_heads} heads equally"
            raise ConfigError(f"{place}.gpus", problem, "a number that divides them")
    if config.dtype != "auto":
        dtype = config.dtype
    num_needed = sum(text_bytes(spec, context_tokens, dtype) for spec in specs)
    kv_cache_bytes = config.kv_cache_bytes
    if kv_cache_bytes is None:
        kv_cache_bytes = max(num_needed, min(config.max_answers * num_needed, MAX_CACHE_BYTES))
    if kv_cache_bytes < num_needed:
        problem = f"{kv_cache_bytes:,} bytes; one text of {context_tokens:,} tokens in {dtype} needs {num_needed:,}"
        raise ConfigError(f"{place}.kv_cache_bytes", problem, "at least that, or fewer context_tokens")
    changed = {"dtype": dtype, "context_tokens": context_tokens, "kv_cache_bytes": kv_cache_bytes}
    return config.model_copy(update=changed)


def _of_several(config: Config, place: str) -> Config:
    """The settings of members that share an engine; ConfigError for what such an engine does not have."""
    if config.gpus > 1:
        remedy = "1 at most, or members_per_engine: 1"
        raise ConfigError(f"{place}.gpus", f"{config.gpus:g}, and members that share an engine are on one card", remedy)
    if config.enforce_eager is False:
        problem = "false, and the weights of members that share an engine change between steps"
        raise ConfigError(f"{place}.enforce_eager", problem, "leave it out, or members_per_engine: 1")
    return config.model_copy(update={"enforce_eager": True})


def text_bytes(spec: ModelSpec, context_tokens: int, dtype: str) -> int:
    """Bytes of cache that a text of so many tokens takes: keys and values of all layers, in whole blocks.

    One block more is vLLM's own, which no text gets.
    """
    of_row = cache_bytes(spec, getattr(torch, dtype))
    num_blocks = -(-context_tokens // BLOCK_TOKENS) + 1
    return of_row.per_token * num_blocks * BLOCK_TOKENS + of_row.fixed
