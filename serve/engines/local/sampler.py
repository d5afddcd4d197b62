"""The next tokens of a whole batch at once, each the one that `ulm.models.sampling.choose` takes for its row alone.

What makes this exact: every cut is a lowest score, so values suffice and nobody needs the order of equal ones; and
probabilities are whole numbers of grid steps, so sums are the same in any order, whatever stands beside a row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve.contracts import TokenLogprob
from ulm.models.sampling import Sampling, mass_bits, uniforms

NUM_DRAWS = 32  # random numbers made at a time: one costs nearly as much as all of them
NUM_CANDIDATES = 256  # looked at first for top_p; in text nine tenths of the probability mostly lie in fewer


class Penalties:
    """What logit bias and penalties change in an answer's next scores, kept up with its tokens.

    Row by row: the tokens concerned, and of each its bias, repetition penalty, frequency and presence terms.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._places: dict[int, int] = {}
        self._counts: list[int] = []
        self._tokens = np.zeros(64, dtype=np.int64)
        self._terms = np.zeros((4, 64))
        for token, bias in sampling.logit_bias:
            at = self._place(token)  # first, for it may make the terms anew
            self._terms[0, at] = bias
        if sampling.repetition_penalty != 1:
            for token in prompt:
                at = self._place(token)
                self._terms[1, at] = sampling.repetition_penalty

    def append(self, token: int) -> None:
        """The answer has one more token."""
        at = self._place(token)
        self._counts[at] += 1
        self._terms[1, at] = self._sampling.repetition_penalty
        self._terms[2, at] = self._sampling.frequency_penalty * self._counts[at]
        self._terms[3, at] = self._sampling.presence_penalty

    @property
    def tokens(self) -> np.ndarray:
        """int64, of length M: the tokens whose scores change, each once."""
        return self._tokens[: len(self._places)]

    @property
    def terms(self) -> np.ndarray:
        """float64, (4, M): bias, repetition penalty, frequency and presence terms."""
        return self._terms[:, : len(self._places)]

    def _place(self, token: int) -> int:
        at = self._places.setdefault(token, len(self._places))
        if at == len(self._counts):
            if at == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
                self._terms = np.concatenate([self._terms, np.zeros_like(self._terms)], axis=1)
            self._tokens[at] = token
            self._terms[1, at] = 1.0
            self._counts.append(0)
        return at


@dataclass(eq=False)
class Row:
    """How the next token of one answer is chosen. `index` counts the tokens that the answer has."""

    sampling: Sampling
    index: int = 0
    penalties: Penalties | None = None  # where no score changes
    allowed: NDArray[np.bool_] | None = None  # of every token, whether it may be the next one; None: all may
    _draws: list[float] = field(default_factory=list)
    _first: int = 0  # the index of the first of them

    @classmethod
    def of(cls, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int] = ()) -> Row:
        """The row of an answer to `prompt` that has `generated` already."""
        row = cls(sampling, penalties=Penalties(sampling, prompt) if sampling.changes_scores else None)
        for token in generated:
            row.append(token)
        return row

    def append(self, token: int) -> None:
        """The answer has one more token."""
        self.index += 1
        if self.penalties is not None:
            self.penalties.append(token)

    def may_take(self, token: int) -> bool:
        """Whether it is allowed: where no score of a row is a number, one that is not comes out."""
        return self.allowed is None or bool(self.allowed[token])

    def draw(self) -> float:
        """The random number of the next token."""
        if not 0 <= self.index - self._first < len(self._draws):
            self._first, self._draws = self.index, uniforms(self.sampling.seed, self.index, NUM_DRAWS)
        return self._draws[self.index - self._first]


def choose_all(logits_BV: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of every row, from float32 logits on any device; they are left as they are.

    For a mixture of members, its row holds the mixture's log-probabilities.
    """
    scores_BV, vocab_size = logits_BV.detach().contiguous(), logits_BV.shape[1]
    if any(row.allowed is not None for row in rows):
        scores_BV = _allowed(scores_BV, rows)
    if any(row.penalties is not None for row in rows):
        scores_BV = _changed(scores_BV, rows)
    groups: dict[str, list[int]] = {}  # by the row's own settings alone, so that others cannot change its token
    for at, row in enumerate(rows):
        groups.setdefault(_group(row.sampling, vocab_size), []).append(at)
    tokens = [0] * len(rows)
    for group, places in groups.items():
        scores_NV = scores_BV if len(places) == len(rows) else scores_BV[torch.tensor(places).to(scores_BV.device)]
        if group == "greedy":
            found = _first_largest(scores_NV)
        else:
            found = (_draw_cut if group == "cut" else _draw_open)(scores_NV, [rows[at] for at in places])
        for at, token in zip(places, found, strict=True):
            tokens[at] = token
    return tokens


def _group(sampling: Sampling, vocab_size: int) -> str:
    if sampling.temperature == 0:
        return "greedy"
    if sampling.min_p > 0 or (sampling.top_k is not None and sampling.top_k < vocab_size):
        return "cut"
    return "nucleus" if sampling.top_p < 1 else "open"


def logprobs_of(logits_BV: Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """Each row's chosen token with its log-probability, and the `num_top` likeliest tokens of that row.

    Under the model itself, as `ulm.generate` has them: float32, nothing penalised or cut. Of equally likely tokens the
    one with the lower id comes first.
    """
    if not tokens:
        return []
    logprobs_BV = logits_BV.detach().log_softmax(-1)
    chosen = logprobs_BV.gather(1, torch.tensor(tokens).to(logprobs_BV.device)[:, None])[:, 0].tolist()
    if not any(num_top):
        return [TokenLogprob(token, logprob) for token, logprob in zip(tokens, chosen, strict=True)]
    sizes = [min(max(1, size), logprobs_BV.shape[1]) for size in num_top]
    values_NK, tokens_NK = _at_least(logprobs_BV, _kth_largest(logprobs_BV, sizes))
    values_NK, order_NK = values_NK.sort(dim=-1, descending=True, stable=True)
    values, likely = values_NK.tolist(), tokens_NK.gather(1, order_NK).tolist()
    return [
        TokenLogprob(token, chosen[at], tuple(zip(likely[at][:size], values[at][:size], strict=True)))
        for at, (token, size) in enumerate(zip(tokens, num_top, strict=True))
    ]


class _Drawn:
    """Rows that draw; their settings as columns, on the scores' device."""

    def __init__(self, rows: Sequence[Row], scores_NK: Tensor, vocab_size: int) -> None:
        self.rows, self._steps = rows, 2.0 ** mass_bits(vocab_size)
        self._best_N1 = scores_NK.amax(-1, keepdim=True).double()
        self._temperature_N1 = self.column([row.sampling.temperature for row in rows])

    def column(self, values: Sequence[float]) -> Tensor:
        """One float64 of each row."""
        return torch.from_numpy(np.array(values, dtype=np.float64)[:, None]).to(self._best_N1.device)

    def some(self, chosen_N: Tensor) -> _Drawn:
        """Some of the rows."""
        some = copy.copy(self)
        some.rows = [self.rows[at] for at in chosen_N.tolist()]
        some._best_N1, some._temperature_N1 = self._best_N1[chosen_N], self._temperature_N1[chosen_N]
        return some

    def masses(self, scores_NK: Tensor) -> Tensor:
        """Probabilities of scores of each row, as whole numbers of grid steps in float64."""
        mass_NK = scores_NK.double().sub_(self._best_N1).div_(self._temperature_N1)
        return mass_NK.exp_().mul_(self._steps).round_()

    def places(self, mass_NK: Tensor) -> Tensor:
        """Where the cumulative distribution reaches each row's random number."""
        below_NK = mass_NK.cumsum(-1)
        drawn_N1 = self.column([row.draw() for row in self.rows]) * below_NK[:, -1:]
        places_N1 = torch.searchsorted(below_NK, drawn_N1, right=True)
        return torch.where(below_NK[:, -1:] > 0, places_N1, 0)[:, 0]  # in a row of NaN or -inf there is no place


def _draw_open(scores_NV: Tensor, rows: Sequence[Row]) -> list[int]:
    """Tokens of rows that may draw any, or that have top_p alone."""
    drawn = _Drawn(rows, scores_NV, scores_NV.shape[1])
    return drawn.places(_within_top_p(scores_NV, drawn.masses(scores_NV), drawn)).tolist()


def _draw_cut(scores_NV: Tensor, rows: Sequence[Row]) -> list[int]:
    """Tokens of rows that have top_k or min_p, and maybe top_p. The few that are left go on on the CPU."""
    settings, vocab_size = [row.sampling for row in rows], scores_NV.shape[1]
    lowest_N1 = _kth_largest(scores_NV, [s.top_k or vocab_size for s in settings])
    if any(s.min_p > 0 for s in settings):
        below_best = [[s.temperature * math.log(s.min_p) if s.min_p > 0 else -math.inf] for s in settings]
        best_N1 = scores_NV.amax(-1, keepdim=True).cpu().numpy()
        lowest_N1 = np.maximum(lowest_N1, (best_N1 + np.array(below_best)).astype(np.float32))
    scores_NK, tokens_NK = _at_least(scores_NV, lowest_N1)
    drawn = _Drawn(rows, scores_NK, vocab_size)
    places_N = drawn.places(_within_top_p(scores_NK, drawn.masses(scores_NK), drawn))
    return tokens_NK.gather(1, places_N[:, None])[:, 0].tolist()


def _within_top_p(scores_NK: Tensor, mass_NK: Tensor, drawn: _Drawn) -> Tensor:
    """The masses, 0 outside of each row's nucleus."""
    shares = [row.sampling.top_p for row in drawn.rows]
    if min(shares) == 1:
        return mass_NK
    share_N1 = drawn.column(shares)
    # a row without top_p keeps all it has, and is not sorted for it
    needed_N1 = torch.where(share_N1 < 1, share_N1 * mass_NK.sum(-1, keepdim=True), 0.0)
    lowest_N1 = torch.where(share_N1 < 1, _nucleus(scores_NK, drawn, needed_N1, NUM_CANDIDATES), -torch.inf)
    return torch.where(scores_NK >= lowest_N1, mass_NK, 0.0)


def _nucleus(scores_NV: Tensor, drawn: _Drawn, needed_N1: Tensor, num_candidates: int) -> Tensor:
    """The lowest score, as lowest_N1, of the fewest tokens whose mass reaches `needed_N1`; most need no sorted row."""
    width = min(num_candidates, scores_NV.shape[1])
    largest_NK = _largest(scores_NV, width)
    num_short_N1 = (drawn.masses(largest_NK).cumsum(-1) < needed_N1).sum(-1, keepdim=True)
    lowest_N1 = largest_NK.gather(1, num_short_N1.clamp(max=width - 1))
    if width < scores_NV.shape[1]:
        short_N = (num_short_N1[:, 0] == width).nonzero()[:, 0]
        if len(short_N):
            more = (scores_NV[short_N], drawn.some(short_N), needed_N1[short_N])
            lowest_N1[short_N] = _nucleus(*more, 16 * num_candidates)
    return lowest_N1


def _on_cpu(scores_NV: Tensor) -> bool:
    """Whether NumPy can look at the scores, too; the results are the same."""
    return scores_NV.device.type == "cpu"


def _first_largest(scores_NV: Tensor) -> list[int]:
    if _on_cpu(scores_NV):  # nine times as fast as torch 2.13 on two cores with AVX-512
        found: list[int] = scores_NV.numpy().argmax(-1).tolist()
        return found
    return scores_NV.argmax(-1).tolist()


def _largest(scores_NV: Tensor, count: int) -> Tensor:
    """The `count` largest values of each row, largest first."""
    if not _on_cpu(scores_NV):
        return scores_NV.topk(count).values
    # NumPy selects and sorts float32 with vector instructions: two to ten times as fast as torch 2.13
    split = scores_NV.shape[1] - count
    scores = scores_NV.numpy()
    largest = np.partition(scores, split, axis=-1)[:, split:] if split else scores
    return torch.from_numpy(np.sort(largest, axis=-1)).flip(-1)


def _kth_largest(scores_NV: Tensor, sizes: Sequence[int]) -> np.ndarray:
    """Of row n the `sizes[n]`-th largest value, as lowest_N1 on the CPU; -inf for as many as there are."""
    vocab_size = scores_NV.shape[1]
    most = max((size for size in sizes if size < vocab_size), default=0)
    if most == 0:
        return np.full((len(sizes), 1), -np.inf, dtype=np.float32)
    largest_NK = _largest(scores_NV, most).cpu().numpy()
    if min(sizes) == max(sizes):
        return largest_NK[:, -1:]
    sizes_N1 = np.array(sizes)[:, None]
    found_N1 = np.take_along_axis(largest_NK, np.minimum(sizes_N1, most) - 1, 1)
    return np.where(sizes_N1 < vocab_size, found_N1, np.float32(-np.inf))


def _at_least(scores_NV: Tensor, lowest_N1: np.ndarray) -> tuple[Tensor, Tensor]:
    """Each row's scores that reach its lowest, in order of token, as (scores_NK, tokens_NK) on the CPU.

    Rows that have fewer than K are filled up with scores of -inf.
    """
    num_rows, vocab_size = scores_NV.shape
    if _on_cpu(scores_NV):  # NumPy is quicker to find few among many
        kept_M = np.flatnonzero(scores_NV.numpy() >= lowest_N1)
        score_M = scores_NV.numpy().reshape(-1)[kept_M]
    else:
        found_M = (scores_NV >= torch.from_numpy(lowest_N1).to(scores_NV.device)).view(-1).nonzero()[:, 0]
        kept_M, score_M = found_M.cpu().numpy(), scores_NV.view(-1)[found_M].cpu().numpy()
    if num_rows == 1 and len(kept_M):
        return torch.from_numpy(score_M[None]), torch.from_numpy(kept_M[None])
    ends_N = np.searchsorted(kept_M, vocab_size * np.arange(1, num_rows + 1))
    counts_N = np.diff(ends_N, prepend=0)
    width = max(1, int(counts_N.max()))  # a row of NaN has none
    row_M = np.repeat(np.arange(num_rows), counts_N)
    place_M = np.arange(len(kept_M)) + (np.arange(num_rows) * width - ends_N + counts_N)[row_M]
    scores_NK = np.full((num_rows, width), -np.inf, dtype=np.float32)
    tokens_NK = np.zeros((num_rows, width), dtype=np.int64)
    scores_NK.reshape(-1)[place_M] = score_M
    tokens_NK.reshape(-1)[place_M] = kept_M - row_M * vocab_size
    return torch.from_numpy(scores_NK), torch.from_numpy(tokens_NK)


def _allowed(logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
    """A copy of the logits, -inf where a row may not go on."""
    bound = [(at, row.allowed) for at, row in enumerate(rows) if row.allowed is not None]
    forbidden_NV = torch.from_numpy(~np.stack([allowed for _, allowed in bound])).to(logits_BV.device)
    places_N = torch.tensor([at for at, _ in bound], device=logits_BV.device)
    scores_BV = logits_BV.clone()
    scores_BV[places_N] = logits_BV[places_N].masked_fill(forbidden_NV, -torch.inf)
    return scores_BV


def _changed(logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
    """A copy of the logits with bias and penalties: in float64 where a score changes, then float32, as the oracle."""
    changed = [(at, row.penalties) for at, row in enumerate(rows) if row.penalties is not None]
    device = logits_BV.device
    row_M = np.repeat([at for at, _ in changed], [len(penalties.tokens) for _, penalties in changed])
    token_M = np.concatenate([penalties.tokens for _, penalties in changed])
    places_M = torch.from_numpy(row_M * logits_BV.shape[1] + token_M).to(device)
    terms_FM = torch.from_numpy(np.concatenate([penalties.terms for _, penalties in changed], axis=1)).to(device)
    bias_M, repetition_M, frequency_M, presence_M = terms_FM
    scores_BV = logits_BV.clone()
    found_M = scores_BV.view(-1)[places_M].double() + bias_M
    found_M = torch.where(found_M > 0, found_M / repetition_M, found_M * repetition_M)
    scores_BV.view(-1)[places_M] = (found_M - frequency_M - presence_M).float()
    return scores_BV
