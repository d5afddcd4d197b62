"""Plain generation, one token at a time: slow, short, and the oracle that every engine is held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ulm.errors import ContextLengthError
from ulm.models.sampling import Sampling, choose
from ulm.models.text_stream import TextStream
from ulm.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generated:
    """An answer. `logprobs` are the chosen tokens' under the model itself (temperature 1, nothing cut off), in nats."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str  # stop: <|endoftext|> or a stop string; length: max_tokens or the end of the context


def prompt_tokens(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Ids of a prompt. Text begins a document, so <|endoftext|> stands before it, as in training; ids stay as given."""
    return [tokenizer.eot_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)


def room(num_prompt_tokens: int, context_tokens: int) -> int:
    """How many tokens can follow a prompt; ContextLengthError if none."""
    if num_prompt_tokens >= context_tokens:
        raise ContextLengthError(
            f"This model's context is {context_tokens} tokens, and the prompt has {num_prompt_tokens}: shorten it",
            param="prompt",
            code="context_length_exceeded",
        )
    return context_tokens - num_prompt_tokens


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = (),
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Generated:
    """Continue a prompt by at most `max_tokens` tokens. The same seed gives the same answer.

    The settings are those of `Sampling`; a wrong one raises RequestError.
    """
    sampling = Sampling.model_validate(
        {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "logit_bias": logit_bias,
            "seed": seed,
        }
    )
    sampling.check(model.spec.vocab_size)
    prompt_ids = prompt_tokens(tokenizer, prompt)
    max_tokens = min(max_tokens, room(len(prompt_ids), model.spec.context_tokens))
    device = next(model.parameters()).device
    cache, stream = model.new_cache(batch=1), TextStream(tokenizer, stop)
    text, finish_reason = "", "length"
    tokens: list[int] = []
    logprobs: list[float] = []
    new_BT = torch.tensor([prompt_ids], device=device)
    while len(tokens) < max_tokens:
        logits_V = model.step(new_BT, cache)[0, -1].float().cpu()
        token = choose(logits_V, sampling, len(tokens), prompt_ids, tokens)
        if token == tokenizer.eot_id:
            finish_reason = "stop"
            break
        tokens.append(token)
        logprobs.append(float(logits_V.log_softmax(-1)[token]))
        text += stream.push(token)
        if stream.stopped:
            finish_reason = "stop"
            break
        new_BT = torch.tensor([[token]], device=device)
    return Generated(text + stream.finish(), tokens, logprobs, finish_reason)
