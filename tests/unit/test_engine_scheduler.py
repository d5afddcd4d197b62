"""Whatever else is under way, whoever comes, leaves or has to wait: each answer is the one it would be alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ulm
from serve.contracts import GenerateRequest, MemberInfo, TokenChunk
from serve.engines.local.answer import PRIORITY_S, Answer
from serve.engines.local.members import Loaded
from serve.engines.local.paged import PAGE_TOKENS
from serve.engines.local.rows import Rows
from serve.engines.local.scheduler import Scheduler
from serve.engines.local.stack import Stack
from tests.variants import spec_of
from ulm.checkpoints import store
from ulm.errors import ContextLengthError, OverloadedError
from ulm.models.sampling import Sampling
from ulm.models.text_stream import TextStream
from ulm.tokenizers.byte import byte_tokenizer

CONTEXT_TOKENS = 96
ROW_LOGPROBS = 2e-4  # rows read together sum in another order than one by one
SPECS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"attention": {"kind": "sliding", "window_tokens": 20, "num_sink_tokens": 2}},
    "both": {
        "num_layers": 3,
        "attention": {"kind": "sliding", "window_tokens": 8},
        "blocks": [{"repeat": 2}, {"attention": {"kind": "gqa"}}],
    },
    "sums": {"attention": "linear"},
}


@cache
def tensors(name: str, seed: int) -> tuple[ulm.ModelSpec, dict[str, torch.Tensor]]:
    """A small spec and weights for it, large enough that logits are far apart."""
    spec = spec_of({**SPECS[name], "vocab_size": byte_tokenizer().vocab_size}, CONTEXT_TOKENS)
    model, generator = ulm.build(spec, seed=seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.dim() >= 2 else 1.0, 0.2, generator=generator)
    return spec, store.tensors(model)


class Engine:
    """A scheduler with members, stepped by hand."""

    def __init__(self, name: str = "full", num_pages: int = 64, num_members: int = 3, **limits: int) -> None:
        spec = tensors(name, 0)[0]
        self.scheduler = Scheduler(**{"max_answers": 8, "max_batch_tokens": 16, "max_waiting": 1_000, **limits})
        how = {"dtype": torch.float32, "device": torch.device("cpu")}
        if name == "sums":
            self.runners: list[Any] = [
                Rows(spec, **how, kv_cache_bytes=1 << 24, max_rows=4, num_prefixes=2) for _ in range(num_members)
            ]
        else:
            page_bytes = 2 * PAGE_TOKENS * spec.num_kv_heads * spec.head_dim * 4 * spec.num_layers
            stack = Stack(
                spec,
                **how,
                kv_cache_bytes=num_pages * page_bytes,
                max_batch_tokens=self.scheduler.max_batch_tokens,
            )
            self.runners = [stack] * num_members
        self.members: dict[str, Loaded] = {}
        for number, runner in enumerate(self.runners):
            slot = 0 if name == "sums" else number
            runner.used_slots.add(slot)
            runner.put(slot, tensors(name, number)[1])
            info = MemberInfo("", "", spec.context_tokens, spec.vocab_size, 0)
            self.members[f"m{number}"] = Loaded(
                f"m{number}", Path(), spec, byte_tokenizer(), runner, slot, number, 0, info
            )
        self.chunks: dict[Answer, list[TokenChunk]] = {}

    def add(self, request: GenerateRequest) -> Answer:
        """Queue a request."""
        request.check()
        answer = Answer(request, {m: self.members[m] for m, w in request.weights.items() if w > 0})
        self.scheduler.add(answer)
        self.chunks[answer] = []
        return answer

    def step(self) -> bool:
        """One step; what it gave is noted."""
        is_busy = self.scheduler.step()
        for answer, item in self.scheduler.outbox:
            if isinstance(item, Exception):
                raise item
            self.chunks[answer].append(item)
        self.scheduler.outbox.clear()
        return is_busy

    def finish(self, limit: int = 3_000) -> None:
        """Steps until nothing is left to do."""
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError(f"still busy after {limit} steps")

    def result(self, answer: Answer) -> list[TokenChunk]:
        """What an answer gave, a chunk a choice."""
        return sorted(TokenChunk.by_choice(self.chunks[answer]), key=lambda chunk: chunk.index)

    def has_ended(self, answer: Answer) -> bool:
        """Whether an answer has given its last chunk, of one choice."""
        return bool(self.chunks[answer]) and self.chunks[answer][-1].finish_reason is not None

    @property
    def is_empty(self) -> bool:
        """Whether no memory is held, and nobody is at work."""
        held = sum(runner.stats()["kv_cache_used_bytes"] for runner in self.runners)
        return held == 0 and not self.scheduler.running and all(m.num_users == 0 for m in self.members.values())


_ALONE: dict[tuple[str, GenerateRequest], list[tuple[Any, ...]]] = {}


def alone(name: str, request: GenerateRequest) -> list[tuple[Any, ...]]:
    """What a request gives in an engine of its own with all the memory it could want, in steps of another size."""
    key = name, replace(request, weights=tuple(sorted(request.weights.items())), stream=False, priority=0)  # type: ignore[arg-type]
    if key not in _ALONE:
        engine = Engine(name, max_batch_tokens=CONTEXT_TOKENS)
        answer = engine.add(replace(request, stream=False))
        engine.finish()
        _ALONE[key] = summary(engine.result(answer))
    return _ALONE[key]


def summary(chunks: list[TokenChunk]) -> list[tuple[Any, ...]]:
    return [(c.text, c.tokens, c.logprobs, c.finish_reason, c.prompt_logprobs) for c in chunks]


texts = st.integers(1, 60).flatmap(
    lambda n: st.integers(0, 3).map(lambda s: tuple((s * 31 + 7 * j) % 256 for j in range(n)))
)
samplings = st.one_of(
    st.just(Sampling()),
    st.builds(Sampling, temperature=st.just(0.9), top_p=st.sampled_from([1.0, 0.8]), seed=st.integers(0, 3)),
    st.builds(Sampling, temperature=st.just(1.2), repetition_penalty=st.just(1.3), frequency_penalty=st.just(0.5)),
)
mixtures = st.sampled_from([{"m0": 1.0}, {"m1": 1.0}, {"m0": 0.7, "m1": 0.3}, {"m0": 0.2, "m1": 0.3, "m2": 0.5}])


@st.composite
def requests(draw: Any) -> GenerateRequest:
    sampling = draw(samplings)
    prompt_logprobs = draw(st.sampled_from([None, None, 0, 2]))
    return GenerateRequest(
        draw(texts),
        draw(mixtures),
        draw(st.integers(1 if prompt_logprobs is None else 0, 30)),
        sampling,
        num_top_logprobs=draw(st.sampled_from([None, 0, 3])),
        n=draw(st.sampled_from([1, 1, 2, 3])) if sampling.temperature else 1,
        prompt_logprobs=prompt_logprobs,
        echo=draw(st.booleans()),
        priority=draw(st.integers(-2, 2)),
        stream=draw(st.booleans()),
    )


events = st.lists(st.tuples(requests(), st.integers(0, 6), st.one_of(st.none(), st.integers(0, 12))), max_size=9)


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(events=events, num_pages=st.integers(24, 60), max_batch_tokens=st.integers(1, 40))
def test_an_answer_is_the_same_in_any_company(name: str, events: Any, num_pages: int, max_batch_tokens: int) -> None:
    """Random requests at random times, some cancelled, in a cache too small for all: bit for bit what each is alone.

    For sums a row's last bits depend on whether it is decoded beside others, so there tokens alone are compared.
    """
    engine = Engine(name, num_pages=num_pages, max_batch_tokens=max_batch_tokens)
    kept: list[tuple[GenerateRequest, Answer]] = []
    leaving: list[tuple[int, Answer]] = []
    now = 0
    for request, wait, stays in events:
        try:
            answer = engine.add(request)
        except ContextLengthError:
            continue  # refused at once: it would not fit an empty cache
        if stays is None:
            kept.append((request, answer))
        else:
            leaving.append((now + stays, answer))
        for _ in range(wait):
            engine.step()
            now += 1
            for when, leaver in leaving:
                leaver.cancelled |= when <= now
    for _, leaver in leaving:
        leaver.cancelled = True
    engine.finish()
    for request, answer in kept:
        found, expected = summary(engine.result(answer)), alone(name, request)
        if name == "sums":
            found, expected = ([(text, tokens) for text, tokens, *_ in each] for each in (found, expected))
        assert found == expected
    assert engine.is_empty


letters = tuple((token, 40.0) for token in range(97, 123))  # so that every token is a character


@st.composite
def whole_answers(draw: Any) -> tuple[GenerateRequest, int | None]:
    """A request for one answer of letters, and where in it a stop string begins."""
    sampling = draw(samplings).model_copy(update={"logit_bias": letters})
    request = GenerateRequest(draw(texts), draw(mixtures), draw(st.integers(2, 34)), sampling, num_top_logprobs=2)
    return request, draw(st.one_of(st.none(), st.integers(0, 30)))


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(whole_answers(), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_an_answer_given_in_windows_is_the_answer_given_in_one(
    name: str, asked: tuple[GenerateRequest, int | None], sizes: list[int], is_new: bool
) -> None:
    """Whatever the windows, penalties, draws and stop strings across their borders; in the same engine or in others."""
    request, stop_at = asked
    if stop_at is not None:
        text = alone(name, request)[0][0]
        request = replace(request, stop=("never", text[stop_at : stop_at + 4] or "ever"))
    ((text, tokens, logprobs, finish_reason, _),) = alone(name, request)
    generated: tuple[int, ...] = ()
    entries: tuple[Any, ...] = ()
    ended, engine = None, Engine(name)
    for size in itertools.chain(sizes, itertools.repeat(max(sizes))):
        left = request.max_tokens - len(generated)
        if not left or ended == "stop":
            break
        before = TextStream(byte_tokenizer(), request.stop)
        certain = "".join(before.push(token) for token in generated)
        engine = Engine(name) if is_new else engine
        answer = engine.add(replace(request, generated=generated, max_tokens=min(size, left)))
        engine.finish()
        (chunk,) = engine.result(answer)
        ended, generated, entries = chunk.finish_reason, generated + chunk.tokens, entries + chunk.logprobs
    assert (generated, ended) == (tokens, finish_reason)
    assert certain + chunk.text == text, "the last window's text is what was not certain before it"
    if name == "sums":  # its last bits depend on whether tokens are read together
        assert [entry.logprob for entry in entries] == pytest.approx([e.logprob for e in logprobs], abs=ROW_LOGPROBS)
    else:
        assert entries == logprobs
    assert engine.is_empty


def test_a_window_that_goes_on_reads_only_what_is_not_remembered() -> None:
    engine = Engine()
    first = GenerateRequest(tuple(range(1, 50)), {"m0": 1.0}, 16, stream=False)
    answer = engine.add(first)
    engine.finish()
    (found,) = engine.result(answer)
    before = engine.scheduler.num_steps
    engine.add(replace(first, generated=found.tokens, max_tokens=4))
    engine.finish()
    assert engine.scheduler.num_steps - before == 4, "65 tokens in steps of 16 would be five before the first new one"


def test_memory_that_is_lacking_is_taken_from_the_last_to_come_and_given_back_to_it_later() -> None:
    engine = Engine(num_pages=12)
    long = [GenerateRequest((1 + n,) * 40, {"m0": 1.0}, 50, stream=False) for n in range(3)]
    answers = [engine.add(request) for request in long]
    ended: list[int] = []
    while engine.step():
        ended += [n for n, a in enumerate(answers) if engine.has_ended(a) and n not in ended]
    assert engine.scheduler.num_preemptions > 0
    assert ended + [n for n in range(3) if n not in ended] == [0, 1, 2], "who came first, ended first"
    for request, answer in zip(long, answers, strict=True):
        assert summary(engine.result(answer)) == alone("full", request)


def test_a_cancelled_answer_frees_its_memory_in_the_next_step() -> None:
    engine = Engine()
    answer = engine.add(GenerateRequest((1, 2, 3), {"m0": 0.5, "m1": 0.5}, 80))
    engine.step()
    assert not engine.is_empty
    answer.cancelled = True
    engine.step()
    assert engine.is_empty and not engine.scheduler.waiting


def test_a_request_larger_than_the_cache_is_refused_at_once_and_others_go_on() -> None:
    engine = Engine(num_pages=8)
    fine = GenerateRequest((1, 2, 3), {"m0": 1.0}, 10, stream=False)
    answer = engine.add(fine)
    engine.step()
    with pytest.raises(ContextLengthError, match=r"3 sequences of up to 96 tokens do not fit .*kv_cache_bytes"):
        engine.add(GenerateRequest((1,) * 50, {"m0": 0.4, "m1": 0.3, "m2": 0.3}, 80))
    engine.finish()
    assert summary(engine.result(answer)) == alone("full", fine)


def test_too_many_waiting_requests_are_refused_by_name() -> None:
    engine = Engine(max_waiting=2)
    for _ in range(2):
        engine.add(GenerateRequest((1, 2), {"m0": 1.0}, 4))
    with pytest.raises(OverloadedError, match="2 requests are waiting already"):
        engine.add(GenerateRequest((1, 2), {"m0": 1.0}, 4))


def test_a_higher_priority_goes_first_and_a_lower_one_still_ends() -> None:
    engine = Engine(max_answers=1)
    answers = {p: engine.add(GenerateRequest((1, 2, p + 5), {"m0": 1.0}, 6, priority=p)) for p in (-1, 0, 1)}
    ended: list[int] = []
    while engine.step():
        ended += [
            p for p, a in answers.items() if engine.chunks[a] and engine.chunks[a][-1].finish_reason and p not in ended
        ]
    ended += [p for p in answers if p not in ended]
    assert ended == [1, 0, -1]


def test_nobody_waits_for_ever_under_a_stream_of_higher_priority() -> None:
    engine = Engine(max_answers=1)
    low = engine.add(GenerateRequest((1, 2), {"m0": 1.0}, 2, priority=-1))
    for n in range(200):
        rival = engine.add(GenerateRequest((3, n % 250), {"m0": 1.0}, 2, priority=0))
        rival.received_s = rival.due_s = low.due_s - PRIORITY_S + 0.2 * n  # so much later did it come
        engine.scheduler.waiting.sort(key=lambda a: a.due_s)
        engine.step()
        engine.step()
        if engine.chunks[low]:
            break
    assert engine.chunks[low], "waiting counts as priority"
    assert 40 < n < 70


def test_a_full_cache_of_one_spec_does_not_keep_another_waiting() -> None:
    engine, other = Engine(num_pages=8), Engine("window")
    engine.members["w"] = replace(other.members["m0"], id="w")
    busy = [engine.add(GenerateRequest((n,) * 30, {"m0": 1.0}, 60)) for n in range(4)]
    engine.step()
    quick = engine.add(GenerateRequest((9,), {"w": 1.0}, 1))
    for _ in range(3):
        engine.step()
    assert engine.chunks[quick] and not all(engine.chunks[a] for a in busy)


def test_a_shared_prompt_is_read_once() -> None:
    engine = Engine()
    prompt = tuple(range(1, 50))
    first = engine.add(GenerateRequest(prompt, {"m0": 1.0}, 4, stream=False))
    engine.finish()
    before = engine.scheduler.num_steps
    again = engine.add(GenerateRequest(prompt, {"m0": 1.0}, 4, stream=False))
    engine.finish()
    assert engine.scheduler.num_steps - before == 4, "one step for what is left of the prompt, not four"
    assert summary(engine.result(first)) == summary(engine.result(again))
    assert engine.runners[0].stats()["shared_prompt_tokens"] == 48


def test_scores_of_a_known_prompt_are_not_computed_again() -> None:
    engine = Engine()
    prompt = tuple(range(1, 80))
    asked = GenerateRequest(prompt, {"m0": 1.0}, 0, prompt_logprobs=0, stream=False)
    first = engine.add(asked)
    engine.finish()
    before = engine.scheduler.num_steps
    other = replace(asked, tokens=(*prompt[:70], 5, 6))
    again, changed = engine.add(asked), engine.add(other)
    engine.finish()
    assert engine.scheduler.num_steps - before <= 4, "78 and 71 tokens in steps of 16 would be ten"
    assert summary(engine.result(again)) == summary(engine.result(first))
    assert summary(engine.result(changed)) == alone("full", other)


def test_a_step_is_one_pass_for_all_members_of_a_spec_and_all_experts_of_a_mixture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine()
    passes: list[set[int]] = []
    run = engine.runners[0].run
    monkeypatch.setattr(
        engine.runners[0], "run", lambda work: passes.append({piece.seat.key[0] for piece in work}) or run(work)
    )
    for weights in ({"m0": 1.0}, {"m1": 1.0}, {"m0": 0.2, "m1": 0.3, "m2": 0.5}):
        engine.add(GenerateRequest((1, 2, 3), weights, 5))
    for num_steps in (1, 2, 3):
        engine.step()
        assert passes == [{0, 1, 2}] * num_steps


def test_choices_share_the_pages_of_their_prompt() -> None:
    engine = Engine(num_pages=64)
    prompt = tuple(range(1, 65))
    engine.add(GenerateRequest(prompt, {"m0": 1.0}, 20, Sampling(temperature=1.0), n=8))
    while len(engine.scheduler.running) == 0 or len(engine.scheduler.running[0].choices) < 8:
        engine.step()
    engine.step()
    pages = engine.runners[0].pages.num_used(0)
    assert pages <= 4 + 8 * 2, "four pages of the prompt, and a few of each choice's own"


def test_best_of_gives_the_likeliest_first() -> None:
    engine = Engine()
    sampling = Sampling(temperature=1.5, seed=3)
    asked = GenerateRequest((1, 2, 3), {"m0": 1.0}, 8, sampling, num_top_logprobs=0, n=5, stream=False)
    every = alone("full", asked)
    means = sorted(
        (sum(e.logprob for e in logprobs) / max(1, len(tokens)), text) for text, tokens, logprobs, *_ in every
    )
    answer = engine.add(replace(asked, n=2, best_of=5))
    engine.finish()
    assert [chunk.text for chunk in engine.result(answer)] == [text for _, text in reversed(means)][:2]
