"""The batch's sampler: each row's token is the one that `choose` takes for it alone, whatever stands beside it."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch

from serve.contracts import TokenLogprob
from serve.engines.local import sampler
from serve.engines.local.sampler import NUM_CANDIDATES, NUM_DRAWS, Row, choose_all, logprobs_of
from ulm.models.sampling import MAX_SEED, Sampling, choose

Case = tuple[Sampling, list[int], list[int]]  # settings, prompt, generated

CUTS = list(product((None, 1, 7, 10_000), (1.0, 0.05, 0.9, 0.9999), (0.0, 0.05, 1.0)))
PENALTIES = list(product((1.0, 1.3, 0.7), (0.0, 1.5), (0.0, -0.5), ((), ((0, 4.0), (4, -100.0)))))


def every_combination(draw: random.Random, vocab_size: int) -> list[Case]:
    """Each combination of cuts and temperatures, each of penalties, and each of their kinds with each other."""
    wanted: list[tuple[float, Any, Any]] = [(0.0, CUTS[0], penalties) for penalties in PENALTIES]
    wanted += [(temperature, cut, PENALTIES[0]) for temperature in (0.2, 1.0, 3.0) for cut in CUTS]
    wanted += [(1.0, draw.choice(CUTS), penalties) for penalties in PENALTIES for _ in range(4)]
    draw.shuffle(wanted)
    cases = []
    for temperature, (top_k, top_p, min_p), (repetition, presence, frequency, bias) in wanted:
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            logit_bias=bias,
            seed=draw.randint(0, MAX_SEED),
        )
        texts = [[draw.randrange(vocab_size) for _ in range(draw.choice((0, 1, 90)))] for _ in range(2)]
        cases.append((sampling, *texts))
    return cases


def scores(kind: str, num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    logits_BV = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    return {
        "steep": 5 * logits_BV,
        "flat": 0.1 * logits_BV,
        "tied": (2 * logits_BV).round() / 2,
        "partly forbidden": torch.where(logits_BV > 1, logits_BV, -torch.inf),
        "log-probabilities": (3 * logits_BV).log_softmax(-1),
    }[kind]


KINDS = ("steep", "flat", "tied", "partly forbidden", "log-probabilities")


@pytest.mark.parametrize("vocab_size", [5, 97, 1_000, 6_000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_gets_the_oracles_token_and_the_same_one_alone(kind: str, vocab_size: int) -> None:
    draw = random.Random(vocab_size)
    cases = every_combination(draw, vocab_size)
    logits_BV = scores(kind, len(cases), vocab_size, seed=1)
    before_BV = logits_BV.clone()
    rows = [Row.of(*case) for case in cases]
    tokens = choose_all(logits_BV, rows)
    oracle = [choose(logits_V, s, len(g), p, g) for logits_V, (s, p, g) in zip(logits_BV, cases, strict=True)]
    assert tokens == oracle
    assert torch.equal(logits_BV, before_BV)
    assert [choose_all(logits_BV[at : at + 1], [row])[0] for at, row in enumerate(rows)] == tokens
    some = draw.sample(range(len(rows)), len(rows) // 3)
    assert choose_all(logits_BV[some], [rows[at] for at in some]) == [tokens[at] for at in some]


def test_what_runs_where_numpy_cannot_look_takes_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = every_combination(random.Random(3), 1_000)
    logits_BV = scores("tied", len(cases), 1_000, seed=3)
    rows, num_top = [Row.of(*case) for case in cases], [at % 4 for at in range(len(cases))]
    tokens = choose_all(logits_BV, rows)
    entries = logprobs_of(logits_BV, tokens, num_top)
    monkeypatch.setattr(sampler, "_on_cpu", lambda scores_NV: False)
    assert choose_all(logits_BV, rows) == tokens
    assert logprobs_of(logits_BV, tokens, num_top) == entries


def test_a_nucleus_wider_than_the_first_candidates_is_found_whole() -> None:
    vocab_size = 40 * NUM_CANDIDATES
    logits_BV = scores("flat", 6, vocab_size, seed=2)
    samplings = [Sampling(temperature=1.0, top_p=top_p, seed=9) for top_p in (0.001, 0.02, 0.1, 0.5, 0.95, 1.0)]
    for index in range(12):
        tokens = choose_all(logits_BV, [Row(sampling, index) for sampling in samplings])
        assert tokens == [choose(logits_BV[at], sampling, index) for at, sampling in enumerate(samplings)]


def test_an_answer_that_grows_token_by_token_is_the_oracles() -> None:
    sampling = Sampling(temperature=1.2, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3, seed=4)
    prompt, generated = [5, 5, 8], list[int]()
    row = Row.of(sampling, prompt)
    for index in range(2 * NUM_DRAWS + 5):
        logits_BV = scores("steep", 1, 200, seed=index)
        (token,) = choose_all(logits_BV, [row])
        assert token == choose(logits_BV[0], sampling, index, prompt, generated)
        generated.append(token)
        row.append(token)
        if index == NUM_DRAWS + 3:  # as after a preemption
            row = Row.of(sampling, prompt, generated)
    assert row.index == len(generated)
    assert len(set(generated)) < len(generated)  # some token was penalised more than once


def test_a_row_of_nan_leaves_the_others_their_tokens() -> None:
    logits_BV = scores("steep", 12, 300, seed=5)
    fields: list[dict[str, Any]] = [{}, {}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.5}]
    rows = [Row(Sampling(temperature=float(at > 0), seed=at, **fields[at])) for at in range(6)] * 2
    before = choose_all(logits_BV, rows)
    broken_BV = logits_BV.clone()
    broken_BV[:6] = torch.nan
    tokens = choose_all(broken_BV, rows)
    assert tokens[6:] == before[6:]
    assert all(0 <= token < 300 for token in tokens)
    assert all(0 <= token < 300 for token in choose_all(broken_BV[:6], rows[:6]))


@pytest.mark.parametrize("vocab_size", [12, 257, 8_192])
def test_logprobs_are_those_of_the_row_alone_bit_for_bit(vocab_size: int) -> None:
    logits_BV = scores("steep", 9, vocab_size, seed=6)
    tokens = [at % vocab_size for at in range(9)]
    num_top = [0, 1, 5, 0, 10, 3, 5, 2, 1]
    entries = logprobs_of(logits_BV, tokens, num_top)
    for at in range(9):
        expected = TokenLogprob.of(logits_BV[at].log_softmax(-1), tokens[at], num_top[at])
        assert (entries[at],) == expected
        assert logprobs_of(logits_BV[at : at + 1], tokens[at : at + 1], num_top[at : at + 1]) == [entries[at]]
    assert logprobs_of(logits_BV, tokens, [0] * 9) == [TokenLogprob(e.token, e.logprob) for e in entries]
    assert logprobs_of(logits_BV[:0], [], []) == []


def test_of_equally_likely_tokens_the_lower_id_is_reported_first_whatever_others_ask() -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 1.0, 3.0, 1.0, 1.0, 3.0]]).repeat(3, 1)
    entries = logprobs_of(logits_BV, [0, 1, 2], [2, 4, 100])
    assert [[token for token, _ in entry.top] for entry in entries] == [[1, 3], [1, 3, 6, 2], [1, 3, 6, 2, 4, 5, 0]]
