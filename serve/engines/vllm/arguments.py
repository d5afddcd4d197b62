"""A request in vLLM's words: the arguments of its SamplingParams, as plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from serve.constrained import SPELLING
from serve.contracts import GenerateRequest
from ulm.errors import UnsupportedError
from ulm.models.sampling import MAX_SEED, Sampling


def arguments_of(request: GenerateRequest, max_tokens: int, eot_id: int) -> dict[str, Any]:
    """What an answer of up to `max_tokens` tokens is asked for with. UnsupportedError for what vLLM cannot do.

    The order of bias, penalties, temperature and cuts is vLLM's own and ours (ulm/models/sampling.py); the random
    numbers are vLLM's, so a seed gives another text than the local engine's, and always the same one here.
    """
    sampling, num_logprobs = request.sampling, request.num_top_logprobs
    _check_penalties(request)
    if request.num_choices > request.n and num_logprobs is None:  # the best are chosen by them
        num_logprobs = 0
    in_pieces = request.stream or request.stop or request.deadline_s is not None
    return {
        "n": request.num_choices,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
        "seed": _seed(sampling, len(request.generated)),
        "stop_token_ids": [eot_id],
        "logprobs": num_logprobs,
        "prompt_logprobs": request.prompt_logprobs,
        "output_kind": "DELTA" if in_pieces else "FINAL_ONLY",
        **_held_to(request),
    }


def mixed(weights: Mapping[str, float]) -> dict[str, Any]:
    """The argument by which an engine of several members hears of a request's weights."""
    return {"extra_args": {"mix": {member: weight for member, weight in weights.items() if weight > 0}}}


def reading(tokens: Sequence[int], num_top: int) -> tuple[Sequence[int], dict[str, Any]]:
    """A prompt and its arguments that bring the log-probabilities of all `tokens` but the first.

    The last one is what may follow the others, and only it: a text that fills the context leaves no room beyond.
    """
    return tokens[:-1], {
        "max_tokens": 1,
        "temperature": 0.0,
        "allowed_token_ids": [tokens[-1]],
        "ignore_eos": True,
        "logprobs": num_top,
        "prompt_logprobs": num_top,
        "output_kind": "FINAL_ONLY",
    }


def looking() -> dict[str, Any]:
    """Arguments that bring the log-probabilities of the whole vocabulary at the next place."""
    return {
        "max_tokens": 1,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprobs": -1,
        "flat_logprobs": True,
        "output_kind": "FINAL_ONLY",
    }


def _held_to(request: GenerateRequest) -> dict[str, Any]:
    """The schema, with how it is spelled, as vLLM's guidance backend takes it."""
    if request.json_schema is None:
        return {}
    if request.generated:
        problem = "the vllm engine begins a schema anew, and cannot go on with an answer"
        raise UnsupportedError(f"json_schema: {problem}; a member of the local engine can")
    if request.num_top_logprobs is not None or request.num_choices > request.n:
        problem = "beside a schema the vllm engine's are of the allowed tokens alone, not the model's own"
        raise UnsupportedError(f"logprobs: {problem}; a member of the local engine has those")
    return {"structured_outputs": {"json": json.dumps({**json.loads(request.json_schema), "x-guidance": SPELLING})}}


def _check_penalties(request: GenerateRequest) -> None:
    """To vLLM what was generated before is part of the prompt, which these two penalties do not look at."""
    for name in ("presence_penalty", "frequency_penalty"):
        if request.generated and getattr(request.sampling, name):
            problem = "the vllm engine does not count tokens of the answer that came before this request"
            raise UnsupportedError(f"{name}: {problem}; a member of the local engine does")


def _seed(sampling: Sampling, num_generated: int) -> int:
    """The seed itself, or one of its own for the rest of an answer, whose draws must not be those of its beginning."""
    if not num_generated:
        return sampling.seed
    digest = hashlib.sha256(f"{sampling.seed}:{num_generated}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & MAX_SEED
