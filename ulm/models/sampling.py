"""From scores to the next token: temperature, top-k, top-p, seed. Shared by the oracle and every engine."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

MAX_SEED = 2**63 - 1


class Sampling(BaseModel):
    """How to choose a token. Temperature 0 is greedy; the first of equal scores wins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(0.0, ge=0, le=100)
    top_k: int | None = Field(None, ge=1)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, le=MAX_SEED)


def choose(logprobs_V: Tensor, sampling: Sampling, index: int) -> int:
    """The `index`-th token of an answer, from its log-probabilities (unnormalised scores do as well).

    The random number is a function of (seed, index) alone, so that an answer can be continued in another process or
    batch. Top-k, then top-p over what is left, then inversion of the cumulative distribution, most likely first.
    """
    if sampling.temperature == 0:
        return int(logprobs_V.argmax())
    logprobs_V = logprobs_V.double()
    scores_V = (logprobs_V - logprobs_V.max()) / sampling.temperature  # the largest is 0 at any temperature
    if sampling.top_k is not None and sampling.top_k < len(scores_V):
        scores_V, tokens_V = scores_V.topk(sampling.top_k)
    else:
        scores_V, tokens_V = scores_V.sort(descending=True, stable=True)
    below_V = scores_V.softmax(-1).cumsum(-1)
    # the nucleus: the fewest tokens whose probability reaches top_p (arXiv 1904.09751, section 3.1)
    num_kept = int((below_V < sampling.top_p * float(below_V[-1])).sum()) + 1
    mass = float(below_V[min(num_kept, len(below_V)) - 1])
    drawn = np.random.Generator(np.random.Philox(key=sampling.seed, counter=index)).random() * mass
    position = int(torch.searchsorted(below_V, torch.tensor(drawn, dtype=below_V.dtype), right=True))
    return int(tokens_V[min(position, num_kept - 1, len(tokens_V) - 1)])
