"""From scores to the next token, one row at a time: the oracle that every engine's sampler is held to.

Settings follow the field. Logit bias comes first, then the penalties (repetition, frequency, presence), temperature,
min-p, top-k and top-p: the order of vLLM 0.29 (v1/sample/sampler.py) and of transformers' generate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import Tensor

from ulm.errors import RequestError
from ulm.registry import config_error

MAX_SEED = 2**63 - 1

TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]  # OpenAI's bounds


class Sampling(BaseModel):
    """How to choose a token. Temperature 0 is greedy; the first of equal scores wins.

    A wrong value, and settings that contradict each other, raise RequestError with the setting's name in `param`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(0.0, ge=0, le=100)
    top_k: int | None = Field(None, ge=1)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)  # of the likeliest token's probability
    # of tokens in prompt and answer; the bounds keep every finite float32 score of a model far from overflow
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)  # of tokens in the answer, once
    frequency_penalty: float = Field(0.0, ge=-2, le=2)  # of tokens in the answer, each time
    logit_bias: tuple[tuple[TokenId, Bias], ...] = ()  # by token, in order of token; a mapping is taken, too
    seed: int = Field(0, ge=0, le=MAX_SEED)

    @model_validator(mode="wrap")
    @classmethod
    def _refused_by_name(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(given)
        except ValidationError as error:
            problem = config_error(error, cls)
            raise RequestError(str(problem), param=problem.place.partition(".")[0]) from None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _pairs(cls, given: Any) -> Any:
        return tuple(given.items()) if isinstance(given, Mapping) else given

    @field_validator("logit_bias")
    @classmethod
    def _one_bias_a_token(cls, pairs: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        token, times = Counter(token for token, _ in pairs).most_common(1)[0] if pairs else (0, 1)
        if times > 1:
            raise RequestError(f"logit_bias: token {token} has {times} biases (give it one)", param="logit_bias")
        return tuple(sorted(pairs))

    @model_validator(mode="after")
    def _greedy_cuts_nothing(self) -> Self:
        """Who asks for a draw among several tokens and for temperature 0 gets no draw, and is told.

        top_p is let through: clients of OpenAI's API send temperature 0 beside a top_p of their own as a habit.
        """
        remedy = "set a temperature above 0, or leave {} out"
        if self.temperature == 0 and self.top_k is not None and self.top_k > 1:
            problem = f"top_k: {self.top_k} has no effect at temperature 0, which is greedy"
            raise RequestError(f"{problem} ({remedy.format('top_k')})", param="top_k")
        if self.temperature == 0 and self.min_p > 0:
            problem = f"min_p: {self.min_p:g} has no effect at temperature 0, which is greedy"
            raise RequestError(f"{problem} ({remedy.format('min_p')})", param="min_p")
        return self

    @property
    def changes_scores(self) -> bool:
        """Whether any score is changed before the temperature: by a penalty or a bias."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias)

    def check(self, vocab_size: int) -> None:
        """RequestError for a bias of a token that a vocabulary of this size does not have."""
        if self.logit_bias and (token := self.logit_bias[-1][0]) >= vocab_size:
            problem = f"logit_bias: there is no token {token}: the vocabulary has {vocab_size}"
            raise RequestError(f"{problem} (token ids from 0 to {vocab_size - 1})", param="logit_bias")

    def choice(self, number: int) -> Sampling:
        """The settings of one of several answers to a prompt: number 0 has the seed itself, the next the next."""
        return self.model_copy(update={"seed": (self.seed + number) % (MAX_SEED + 1)})


def uniforms(seed: int, index: int, count: int = 1) -> list[float]:
    """The random numbers, from 0 up to 1, of the tokens `index`, `index` + 1, … of an answer: `count` of them.

    Functions of (seed, index) alone, so that an answer can be continued in another process or batch: the first number
    of each of Philox's blocks of four.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=index)).random(4 * count)[::4].tolist()


def mass_bits(vocab_size: int) -> int:
    """The finest grid, 2^-bits of the likeliest token, on which float64 adds the masses of a vocabulary exactly."""
    return 53 - vocab_size.bit_length()


def choose(
    logits_V: Tensor, sampling: Sampling, index: int, prompt: Sequence[int] = (), generated: Sequence[int] = ()
) -> int:
    """The `index`-th token of an answer, from the model's logits; `prompt` and `generated` are what penalties look at.

    Log-probabilities do as well, as for a mixture of models; only the repetition penalty tells them from other logits.

    - Every cut is a lowest score, and all tokens at it are kept: tokens with equal scores stay or go together.
    - A token's probability is a whole number of grid steps (`mass_bits`). Such numbers have the same sum in any order,
      so an engine may add them as it likes, on any device, and choose the same token. A token less likely than one
      step, about 1e-12 of the likeliest at V = 8,192, is never drawn.
    - The draw inverts the cumulative distribution in order of token id.
    """
    scores_V = changed_scores(logits_V, sampling, prompt, generated)
    if sampling.temperature == 0:
        return int(scores_V.argmax())
    best = float(scores_V.max())
    kept_V = torch.ones_like(scores_V, dtype=torch.bool)
    if sampling.min_p > 0:  # p >= min_p * p_best (arXiv 2407.01082), as scores
        kept_V &= scores_V >= torch.tensor(best + sampling.temperature * math.log(sampling.min_p)).to(scores_V)
    if sampling.top_k is not None and sampling.top_k < len(scores_V):
        kept_V &= scores_V >= scores_V.topk(sampling.top_k).values[-1]
    relative_V = ((scores_V.double() - best) / sampling.temperature).exp()  # the largest is 1 at any temperature
    mass_V = torch.where(kept_V, (relative_V * 2.0 ** mass_bits(len(scores_V))).round(), 0.0)
    if sampling.top_p < 1:  # the fewest tokens whose probability reaches top_p (arXiv 1904.09751, section 3.1)
        order_V = scores_V.argsort(descending=True)
        below_V = mass_V[order_V].cumsum(-1)
        num_short = int((below_V < sampling.top_p * float(below_V[-1])).sum())
        mass_V = torch.where(scores_V >= scores_V[order_V[num_short]], mass_V, 0.0)
    below_V = mass_V.cumsum(-1)
    drawn = uniforms(sampling.seed, index)[0] * float(below_V[-1])
    return int((below_V > drawn).int().argmax())  # the first; token 0 where all scores are -inf


def changed_scores(
    logits_V: Tensor, sampling: Sampling, prompt: Sequence[int] = (), generated: Sequence[int] = ()
) -> Tensor:
    """Scores after bias and penalties: computed in float64, then float32, as a model's logits are.

    Repetition: CTRL, arXiv 1909.05858, section 4.1, but a negative score is multiplied, as transformers and vLLM do.
    Frequency and presence: OpenAI's formula, mu[j] - c[j] * frequency - (c[j] > 0) * presence.
    """
    if not sampling.changes_scores:
        return logits_V.float()
    scores_V = logits_V.to(torch.float64, copy=True)
    for token, bias in sampling.logit_bias:
        scores_V[token] += bias
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *generated}), dtype=torch.long, device=scores_V.device)
        found = scores_V[seen]
        penalty = sampling.repetition_penalty
        scores_V[seen] = torch.where(found > 0, found / penalty, found * penalty)
    if sampling.frequency_penalty or sampling.presence_penalty:
        given = torch.tensor(generated, dtype=torch.long, device=scores_V.device)
        tokens, counts = given.unique(return_counts=True)
        scores_V[tokens] = scores_V[tokens] - sampling.frequency_penalty * counts.double() - sampling.presence_penalty
    return scores_V.float()
