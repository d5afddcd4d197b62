"""What every engine keeps to. Kinds are found by listing their folder: a new one is tested without a new test."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.contracts import Engine, GenerateRequest, TokenChunk
from tests.small_members import CONTEXT_TOKENS, small_member, the_tokenizer
from ulm import registry
from ulm.errors import ContextLengthError, MemberDownError, ModelNotFoundError, RequestError, UlmError, UnsupportedError
from ulm.models.sampling import Sampling
from ulm.tokenizers.char import char_tokenizer

ENGINES = [kind for kind in registry.kinds("engine") if kind != "vllm"]
FP32_BATCHING = 2e-5  # float32 sums in another order
SUM_OF_PROBABILITIES = 1e-5  # of float32 logarithms
PROMPT = (256, *b"the quick brown fox ")
ASKED = GenerateRequest(PROMPT, {"a": 1.0}, 24, num_top_logprobs=3)
HOT = Sampling(temperature=1.0, seed=4)
every_engine = pytest.mark.parametrize("kind", ENGINES)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two members with one tokenizer, and one with another."""
    folder = tmp_path_factory.mktemp("members")
    char = char_tokenizer(["the quick brown fox"])
    made = {name: small_member(folder, seed) for seed, name in enumerate("ab")}
    return {**made, "other": small_member(folder, 2, char, vocab_size=char.vocab_size)}


def asked(kind: str, checkpoints: dict[str, Path], body: Callable[[Engine], Awaitable[Any]], **settings: Any) -> Any:
    """What a body gives with an engine that holds the members."""

    async def run() -> Any:
        configured = registry.configure("engine", {"kind": kind, **settings})
        engine: Engine = registry.find("engine", kind)(configured)
        try:
            for name, checkpoint in checkpoints.items():
                await engine.load(name, str(checkpoint))
            return await body(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


async def chunks_of(engine: Engine, request: GenerateRequest) -> list[TokenChunk]:
    return [chunk async for chunk in engine.generate(request)]


async def whole(engine: Engine, request: GenerateRequest) -> TokenChunk:
    return TokenChunk.joined(await chunks_of(engine, request))


@every_engine
def test_an_answer_is_what_next_logprobs_and_score_say_of_its_tokens(kind: str, checkpoints: dict[str, Path]) -> None:
    async def body(engine: Engine) -> Any:
        found = await whole(engine, ASKED)
        text = (*PROMPT, *found.tokens)
        rows = [await engine.next_logprobs("a", text[:n]) for n in range(len(PROMPT), len(text))]
        return found, rows, await engine.score("a", text)

    found, rows, scores = asked(kind, checkpoints, body)
    assert len(found.tokens) == len(found.logprobs) == len(rows) == ASKED.max_tokens
    assert len(scores) == len(PROMPT) + len(found.tokens) - 1
    for token, entry, row_V, score in zip(found.tokens, found.logprobs, rows, scores[len(PROMPT) - 1 :], strict=True):
        assert row_V.dtype == np.float32 and row_V.shape == (the_tokenizer().vocab_size,)
        assert np.isfinite(row_V).all() and np.exp(row_V).sum() == pytest.approx(1, abs=SUM_OF_PROBABILITIES)
        assert token == entry.token == int(row_V.argmax())
        assert [entry.logprob, score] == pytest.approx([float(row_V[token])] * 2, abs=FP32_BATCHING)
        likeliest = np.sort(row_V)[::-1][:3].tolist()
        assert [value for _, value in entry.top] == pytest.approx(likeliest, abs=FP32_BATCHING)
        assert all(value == pytest.approx(float(row_V[at]), abs=FP32_BATCHING) for at, value in entry.top)


@every_engine
@pytest.mark.parametrize("stop", [(), ("n f",)], ids=["no stop", "a stop"])
def test_an_answer_given_in_windows_is_the_answer_given_in_one(
    kind: str, stop: tuple[str, ...], checkpoints: dict[str, Path]
) -> None:
    request = replace(ASKED, stop=stop, sampling=replace_bias(HOT))

    async def body(engine: Engine) -> Any:
        in_one, generated, windows = await whole(engine, request), (), []
        while not windows or (windows[-1].finish_reason == "length" and len(generated) < request.max_tokens):
            size = min(5, request.max_tokens - len(generated))
            windows.append(await whole(engine, replace(request, generated=generated, max_tokens=size)))
            generated += windows[-1].tokens
        return in_one, windows

    in_one, windows = asked(kind, checkpoints, body)
    joined = TokenChunk.joined(windows)
    assert (joined.tokens, joined.logprobs, joined.finish_reason) == (
        in_one.tokens,
        in_one.logprobs,
        in_one.finish_reason,
    )
    assert in_one.text.endswith(windows[-1].text)


def replace_bias(sampling: Sampling) -> Sampling:
    """Penalties and a bias beside it."""
    return sampling.model_copy(update={"frequency_penalty": 0.5, "logit_bias": ((102, 20.0),)})


@every_engine
def test_a_stream_is_the_whole_in_pieces_with_one_end_for_each_choice(kind: str, checkpoints: dict[str, Path]) -> None:
    request = replace(ASKED, n=3, sampling=HOT, echo=True, prompt_logprobs=1)

    async def body(engine: Engine) -> Any:
        return await chunks_of(engine, request), await chunks_of(engine, replace(request, stream=False))

    stream, at_once = asked(kind, checkpoints, body)
    assert len(stream) > len(at_once) == 3
    assert TokenChunk.by_choice(stream) == TokenChunk.by_choice(at_once)
    assert [chunk.index for chunk in sorted(at_once, key=lambda c: c.index)] == [0, 1, 2]
    assert all(chunk.text.startswith("the quick brown fox ") for chunk in at_once)
    assert len(stream[0].prompt_logprobs) == len(PROMPT) - 1
    assert all(math.isfinite(entry.logprob) for entry in stream[0].prompt_logprobs)


@every_engine
def test_what_cannot_be_answered_is_refused_by_its_own_error(kind: str, checkpoints: dict[str, Path]) -> None:
    async def body(engine: Engine) -> None:
        refusals: tuple[tuple[dict[str, Any], type[UlmError], str], ...] = (
            ({"weights": {"x": 1.0}}, ModelNotFoundError, "no member 'x'"),
            ({"tokens": (1, 2), "weights": {"a": 0.5, "other": 0.5}}, UnsupportedError, "must share a tokenizer"),
            ({"tokens": (1,) * CONTEXT_TOKENS}, ContextLengthError, f"context is {CONTEXT_TOKENS} tokens"),
            ({"tokens": (1, 400)}, RequestError, "there is no token 400"),
            ({"generated": (400,)}, RequestError, "there is no token 400"),
            ({"max_tokens": 0}, RequestError, "max_tokens: 0 asks for nothing"),
        )
        for change, error, message in refusals:
            with pytest.raises(error, match=message):
                await whole(engine, replace(ASKED, **change))
        for look in (engine.score, engine.next_logprobs, engine.embed):
            with pytest.raises(RequestError, match="there is no token 400"):
                await look("a", (1, 400))
            with pytest.raises(ModelNotFoundError, match="no member 'x'"):
                await look("x", (1, 2))

    asked(kind, checkpoints, body)


@every_engine
def test_members_come_go_and_are_described(kind: str, checkpoints: dict[str, Path]) -> None:
    async def body(engine: Engine) -> Any:
        before = await engine.members()
        await engine.unload("b")
        await engine.reload("a", str(checkpoints["b"]))
        return before, await engine.members(), await engine.embed("a", PROMPT), await engine.embed("a", PROMPT[:4])

    before, after, one, other = asked(kind, checkpoints, body)
    assert set(before) == {"a", "b", "other"} and set(after) == {"a", "other"}
    info = before["a"]
    assert (info.context_tokens, info.vocab_size) == (CONTEXT_TOKENS, the_tokenizer().vocab_size)
    assert after["a"].digest == before["b"].digest != info.digest and info.num_parameters > 0
    assert one.dtype == np.float32 and one.shape == other.shape and not np.array_equal(one, other)


@every_engine
def test_who_leaves_is_forgotten_and_a_deadline_and_the_end_end_answers(
    kind: str, checkpoints: dict[str, Path]
) -> None:
    async def body(engine: Engine) -> Any:
        leaving = engine.generate(ASKED)
        await anext(leaving)
        await leaving.aclose()  # type: ignore[attr-defined]
        for _ in range(500):
            stats = await engine.stats()
            if not (stats["running"] or stats["waiting"]):
                break
            await asyncio.sleep(0.01)
        late = await whole(engine, replace(ASKED, deadline_s=0.0))
        await engine.close()
        with pytest.raises(MemberDownError, match="the engine was closed"):
            await whole(engine, ASKED)
        return stats, late

    stats, late = asked(kind, checkpoints, body)
    assert (stats["running"], stats["waiting"]) == (0, 0) and stats["generated_tokens"] >= 1
    assert (late.finish_reason, late.degraded) == ("length", "ended by its deadline")


# ---- echo alone


def echoed(prompt: bytes, checkpoints: dict[str, Path], **fields: Any) -> TokenChunk:
    request = GenerateRequest((256, *prompt), {"a": 1.0}, **{"max_tokens": 24, **fields})
    found: TokenChunk = asked("echo", checkpoints, lambda engine: whole(engine, request))
    return found


def test_echo_says_the_prompt_in_a_circle_and_one_that_ends_as_it_begins_overlaps_itself(
    checkpoints: dict[str, Path],
) -> None:
    assert echoed(b"one two ", checkpoints).text == "one two one two one two "
    assert echoed(b"abcab", checkpoints, max_tokens=7).text == "cabcabc"
    assert echoed(b"", checkpoints).finish_reason == "stop", "nothing goes on with its end"
    assert echoed(b"one two ", checkpoints, stop=("o o",)).text == "one tw"


def test_echo_takes_its_delay_for_each_token(checkpoints: dict[str, Path]) -> None:
    async def body(engine: Engine) -> float:
        started_s = asyncio.get_running_loop().time()
        await whole(engine, replace(ASKED, max_tokens=5))
        return asyncio.get_running_loop().time() - started_s

    assert asked("echo", checkpoints, body, delay_ms=20) >= 5 * 0.02
