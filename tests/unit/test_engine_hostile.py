"""What a hostile client, a broken part or bad luck does to one answer stays with that answer; nobody waits for ever."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ulm
from serve.contracts import GenerateRequest, TokenChunk
from serve.engines.local import compiled
from serve.engines.local.engine import Config, LocalEngine
from serve.engines.local.stack import Stack
from tests.engine import answer, answers, with_engine
from tests.small_members import CONTEXT_TOKENS, LINEAR, a_prompt, small_member, small_model, the_tokenizer
from ulm import runtime
from ulm.errors import ContextLengthError, RequestError, UlmError
from ulm.models.sampling import Sampling

MIXTURE_LOGPROBS = 1e-4  # float32, as the issue has it: other orders of sums, through two members
SOON_S = 60.0  # longer than anything here takes; whoever waits so long waits for ever
FINE = GenerateRequest(a_prompt(0, 21), {"a": 1.0}, 24, num_top_logprobs=2)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three members of one spec, and one that remembers in rows."""
    folder = tmp_path_factory.mktemp("members")
    made = {name: small_member(folder, seed) for seed, name in enumerate("abc")}
    return {**made, "sums": small_member(folder, 3, **LINEAR)}


@pytest.fixture(scope="module")
def fine(checkpoints: dict[str, Path]) -> TokenChunk:
    """What the harmless request gives where nobody else is."""
    return with_engine({"a": checkpoints["a"]}, lambda engine: answer(engine, FINE))


async def soon(awaitable: Any) -> Any:
    """What it gives, or a failed test: nothing may hang."""
    return await asyncio.wait_for(awaitable, SOON_S)


async def is_idle(engine: LocalEngine) -> bool:
    """Returns True once nobody runs or waits, and no sequence holds memory."""
    for _ in range(2_000):
        stats = await engine.stats()
        if not (stats["running"] or stats["waiting"] or stats["kv_cache_used_bytes"]):
            return True
        await asyncio.sleep(0.005)
    return False


# ---- requests that mean nothing

NAN, INF, HOT = math.nan, math.inf, Sampling(temperature=1)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a token beyond the vocabulary": ({"tokens": (1, 257)}, "there is no token 257: the vocabulary has 257"),
    "a negative token": ({"tokens": (1, -1, 2)}, "there is no token -1"),
    "a huge token": ({"tokens": (1, 2**62)}, "there is no token 4611686018427387904"),
    "a token that no integer holds": ({"tokens": (1, 2**70)}, "token ids are whole numbers"),
    "half a token": ({"tokens": (1, 1.5)}, "token ids are whole numbers"),
    "text for tokens": ({"tokens": ("a",)}, "token ids are whole numbers"),
    "an empty prompt": ({"tokens": ()}, "The prompt has no tokens"),
    "no tokens to make": ({"max_tokens": 0}, "max_tokens: 0 asks for nothing"),
    "fewer than none": ({"max_tokens": -1}, "max_tokens: -1 is below 0"),
    "no weights": ({"weights": {}}, "at least one member needs a weight above zero"),
    "weights of zero": ({"weights": {"a": 0.0, "b": 0.0}}, "at least one member needs a weight above zero"),
    "a negative weight": ({"weights": {"a": 1.0, "b": -0.5}}, "-0.5 of 'b' is no weight"),
    "a weight of NaN": ({"weights": {"a": NAN}}, "nan of 'a' is no weight"),
    "an infinite weight": ({"weights": {"a": INF}}, "inf of 'a' is no weight"),
    "an infinite sum": ({"weights": {"a": 1e308, "b": 1e308}}, "their sum must be finite"),
    "no choices": ({"n": 0}, "n: 0 is not within 1 to"),
    "too many choices": ({"n": 129}, "n: 129 is not within 1 to 128"),
    "equal choices": ({"n": 2}, "2 choices at temperature 0 would all be the same"),
    "best of fewer": ({"n": 3, "best_of": 2, "stream": False}, "best_of: 2 is not within n, which is 3"),
    "the best in a stream": ({"best_of": 2}, "best_of: the best are known at the end only"),
    "a stop string of nothing": ({"stop": ("x", "")}, "a stop string of nothing"),
    "a deadline in the past": ({"deadline_s": -0.1}, "deadline_s: -0.1 is no time from now on"),
    "a deadline of NaN": ({"deadline_s": NAN}, "deadline_s: nan is no time"),
    "a priority of NaN": ({"priority": NAN}, "priority: nan is beyond"),
    "too high a priority": ({"priority": 101}, r"priority: 101 is beyond \+-100"),
    "too many top logprobs": ({"num_top_logprobs": 101}, "num_top_logprobs: 101 is not within 0 to 100"),
    "fewer prompt logprobs than none": ({"prompt_logprobs": -1}, "prompt_logprobs: -1 is not within"),
    "a generated token beyond the vocabulary": ({"generated": (1, 257)}, "generated: there is no token 257"),
    "choices that go on": ({"generated": (1,), "n": 2, "sampling": HOT}, "an answer that goes on has one choice"),
    "an answer that goes on, with its prompt": ({"generated": (1,), "echo": True}, "its prompt was given before"),
    "an answer that has ended": ({"generated": tuple(b"a stop"), "stop": ("stop",)}, "this answer has ended"),
    "a bias for no token": ({"sampling": Sampling(logit_bias=((400, 1.0),))}, "there is no token 400"),
}


@pytest.fixture(scope="module")
def refusals(checkpoints: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """What each of REFUSED met in one engine, beside a harmless answer."""

    async def body(engine: LocalEngine) -> Any:
        beside = asyncio.create_task(answer(engine, FINE))
        met: dict[str, Any] = {}
        for name, (fields, _) in REFUSED.items():
            try:
                met[name] = await soon(answers(engine, replace(FINE, **fields)))
            except Exception as error:  # noqa: BLE001  looked at by the tests
                met[name] = error
        return {**met, "beside": await beside, "after": await answer(engine, FINE)}

    yield with_engine({name: checkpoints[name] for name in "ab"}, body)


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_means_nothing_is_refused_by_name(name: str, refusals: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=REFUSED[name][1]):
        raise refusals[name] if isinstance(refusals[name], Exception) else AssertionError("it was answered")


def test_refused_requests_leave_others_as_they_would_be(refusals: dict[str, Any], fine: TokenChunk) -> None:
    assert refusals["beside"] == refusals["after"] == fine


def test_scores_and_looks_refuse_unknown_tokens_as_answers_do(checkpoints: dict[str, Path]) -> None:
    async def body(engine: LocalEngine) -> None:
        for look in (engine.score, engine.next_logprobs, engine.embed):
            with pytest.raises(RequestError, match="there is no token 257"):
                await soon(look("a", (1, 257)))
            with pytest.raises(RequestError, match="no tokens"):
                await soon(look("a", ()))
            with pytest.raises(ContextLengthError, match=f"context is {CONTEXT_TOKENS} tokens"):
                await soon(look("a", (1,) * (CONTEXT_TOKENS + 1)))
        assert await engine.score("a", (1,)) == []

    with_engine({"a": checkpoints["a"]}, body)


def test_what_is_strange_and_allowed_is_answered(checkpoints: dict[str, Path], fine: TokenChunk) -> None:
    async def body(engine: LocalEngine) -> Any:
        endless = await soon(answer(engine, replace(FINE, max_tokens=2**62)))
        stops = tuple(f"never-{n}" for n in range(1_000))
        stopped = await soon(answer(engine, replace(FINE, stop=stops)))
        late = await soon(answer(engine, replace(FINE, deadline_s=0.0)))
        tiny = await soon(answer(engine, replace(FINE, weights={"a": 1e-320, "b": 1e-320})))
        odd = await soon(answer(engine, replace(FINE, weights={"a": 3.0, "b": 3.0})))
        return endless, stopped, late, tiny, odd

    endless, stopped, late, tiny, odd = with_engine({name: checkpoints[name] for name in "ab"}, body)
    assert endless.tokens[:24] == fine.tokens and endless.finish_reason in ("stop", "length")
    assert len(endless.tokens) <= CONTEXT_TOKENS - len(FINE.tokens)
    assert stopped == fine
    assert (late.tokens, late.finish_reason, late.degraded) == ((), "length", "ended by its deadline")
    assert tiny == odd, "weights count by their shares"
    assert max(entry.logprob for entry in odd.logprobs) <= 0


# ---- clients that leave


def test_who_leaves_before_or_after_the_first_chunk_holds_nothing(checkpoints: dict[str, Path]) -> None:
    long = replace(FINE, max_tokens=70)

    async def body(engine: LocalEngine) -> None:
        never = engine.generate(long)
        await never.aclose()  # before anything was asked
        twice = engine.generate(long)
        await anext(twice)
        await twice.aclose()
        await twice.aclose()
        for delay_s in (0.0, 0.0, 0.001, 0.003):
            tasks = [asyncio.create_task(answer(engine, long)) for _ in range(8)]
            tasks += [asyncio.create_task(engine.embed("a", FINE.tokens)) for _ in range(2)]
            await asyncio.sleep(delay_s)
            before = (await engine.stats())["generated_tokens"]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert await is_idle(engine)
            made = (await engine.stats())["generated_tokens"] - before
            assert made < 8 * 20, f"{made} tokens were made for nobody"
        assert all(m.num_users == 0 for m in engine._members.loaded.values())

    with_engine({"a": checkpoints["a"]}, body)


def test_an_event_loop_that_is_closed_in_the_middle_takes_no_one_along(
    checkpoints: dict[str, Path], fine: TokenChunk
) -> None:
    engine = LocalEngine(Config(kind="local", device="cpu", threads=1, compile_after_steps=None))
    asyncio.run(engine.load("a", str(checkpoints["a"])))

    async def nothing() -> None:
        await asyncio.sleep(0)

    for _ in range(3):
        loop = asyncio.new_event_loop()
        chunks, request = (
            engine.generate(replace(FINE, max_tokens=70)),
            replace(FINE, n=4, sampling=Sampling(temperature=1)),
        )
        loop.run_until_complete(anext(chunks))  # one that runs
        asking = loop.create_task(answer(engine, request))  # one that has just asked
        loop.run_until_complete(nothing())
        loop.close()
        asking._log_destroy_pending = False  # type: ignore[attr-defined]  it is left behind on purpose
        del chunks, asking

    async def after() -> Any:
        return await soon(answer(engine, FINE)), await is_idle(engine)

    assert asyncio.run(after()) == (fine, True)
    asyncio.run(engine.close())


def test_several_event_loops_share_an_engine(checkpoints: dict[str, Path], fine: TokenChunk) -> None:
    engine = LocalEngine(Config(kind="local", device="cpu", threads=1, compile_after_steps=None))
    found: list[Any] = []

    def client(member: str) -> None:
        async def ask() -> Any:
            await engine.load(member, str(checkpoints["a"]))
            return [await answer(engine, replace(FINE, weights={member: 1.0})) for _ in range(4)]

        found.append(asyncio.run(ask()))

    clients = [threading.Thread(target=client, args=(f"m{n}",)) for n in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(SOON_S)
    asyncio.run(engine.close())
    assert len(found) == 4
    assert all(each == fine for several in found for each in several)


def test_close_ends_answers_under_way_by_name_and_refuses_later_calls(checkpoints: dict[str, Path]) -> None:
    async def run() -> None:
        engine = LocalEngine(Config(kind="local", device="cpu", threads=1, compile_after_steps=None))
        for name in "ab":
            await engine.load(name, str(checkpoints[name]))
        chunks = engine.generate(replace(FINE, max_tokens=70))
        await anext(chunks)
        waiting = [asyncio.create_task(answer(engine, replace(FINE, max_tokens=70))) for _ in range(4)]
        loading = [asyncio.create_task(engine.load(f"c{n}", str(checkpoints["c"]))) for n in range(3)]
        await asyncio.sleep(0)
        await soon(engine.close())
        with pytest.raises(UlmError, match="the engine was closed"):
            async for _ in chunks:
                pass
        for ended in await soon(asyncio.gather(*waiting, *loading, return_exceptions=True)):
            if isinstance(ended, Exception):
                assert str(ended) == "the engine was closed"
        checkpoint = str(checkpoints["a"])
        for late in (
            answer(engine, FINE),
            engine.score("a", (1, 2)),
            engine.embed("a", (1, 2)),
            engine.next_logprobs("a", (1, 2)),
            engine.load("d", checkpoint),
            engine.reload("a", checkpoint),
            engine.unload("a"),
            engine.members(),
            engine.stats(),
        ):
            with pytest.raises(UlmError, match="the engine was closed"):
                await soon(late)
        await soon(engine.close())  # once more

    asyncio.run(run())


def test_statistics_can_be_asked_while_members_come_and_go(checkpoints: dict[str, Path]) -> None:
    async def body(engine: LocalEngine) -> None:
        async def change() -> None:
            for number in range(25):
                await engine.load(f"m{number}", str(checkpoints["a"]))
            for number in range(25):
                await engine.unload(f"m{number}")

        changing = asyncio.create_task(change())
        while not changing.done():
            assert (await engine.stats())["weight_bytes"] >= 0
            await asyncio.sleep(0)
        await changing

    with_engine({}, body)


# ---- parts that fail


def test_a_step_that_fails_ends_its_answers_and_the_engine_works_on(
    checkpoints: dict[str, Path], fine: TokenChunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass takes the answers in it along; those of other specs go on."""
    run, broken = Stack.run, threading.Event()

    def fail(self: Stack, work: Any) -> Any:
        if broken.is_set():
            raise RuntimeError("a kernel gave up")
        return run(self, work)

    monkeypatch.setattr(Stack, "run", fail)
    sums = replace(FINE, weights={"sums": 1.0}, max_tokens=50)
    several = replace(FINE, n=3, sampling=Sampling(temperature=1.0))

    async def body(engine: LocalEngine) -> Any:
        unharmed = asyncio.create_task(answer(engine, sums))
        under_way = engine.generate(replace(FINE, max_tokens=70))
        await anext(under_way)
        tasks = [asyncio.create_task(answer(engine, request)) for request in (several, FINE)]
        tasks.append(asyncio.create_task(answer(engine, replace(FINE, weights={"a": 0.5, "sums": 0.5}))))
        await asyncio.sleep(0)
        broken.set()
        with pytest.raises(RuntimeError, match="a kernel gave up"):
            async for _ in under_way:
                pass
        ended = await soon(asyncio.gather(*tasks, return_exceptions=True))
        broken.clear()
        whole = await soon(unharmed)
        return ended, whole, await soon(answer(engine, FINE)), await is_idle(engine)

    ended, whole, after, idle = with_engine({name: checkpoints[name] for name in ("a", "sums")}, body)
    assert [str(error) for error in ended] == ["a kernel gave up"] * 3
    alone = with_engine({"sums": checkpoints["sums"]}, lambda engine: answer(engine, sums))
    assert whole.tokens == alone.tokens and whole.finish_reason == alone.finish_reason
    assert after == fine and idle


def test_a_scheduler_that_fails_ends_its_answers_and_the_engine_works_on(
    checkpoints: dict[str, Path], fine: TokenChunk
) -> None:
    async def body(engine: LocalEngine) -> Any:
        choose, engine._scheduler._choose = engine._scheduler._choose, None  # type: ignore[assignment,method-assign]
        ended = await soon(asyncio.gather(*(answer(engine, FINE) for _ in range(3)), return_exceptions=True))
        engine._scheduler._choose = choose  # type: ignore[method-assign]
        return ended, await soon(answer(engine, FINE)), await is_idle(engine)

    ended, after, idle = with_engine({"a": checkpoints["a"]}, body)
    assert [type(error) for error in ended] == [TypeError] * 3 and after == fine and idle


# ---- mixtures, held to whole forward passes

MODELS = {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"seed": 2}, "sums": {"seed": 3, **LINEAR}}


def mixed(tokens: tuple[int, ...], weights: dict[str, float]) -> torch.Tensor:
    """log(sum_j w_j p_j) after every prefix, as logprobs_TV, from each member's logits of the whole text."""
    with torch.no_grad():
        rows = [small_model(**MODELS[m])(torch.tensor([tokens]))[0].double().log_softmax(-1) for m in weights]
    total = sum(weights.values())
    return torch.stack([row + math.log(weights[m] / total) for row, m in zip(rows, weights, strict=True)]).logsumexp(0)


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": 2.0, "b": 1.0, "c": 1.0}, {"a": 0.4, "sums": 0.6}])
def test_logprobs_of_a_mixture_are_those_of_the_weighted_sum(
    weights: dict[str, float], checkpoints: dict[str, Path]
) -> None:
    """Of the tokens drawn, of the likeliest, and of the prompt's; for every choice, of members of one spec or two."""
    prompt, top = a_prompt(5, 37), 4
    sampling = Sampling(temperature=1.0, seed=5)
    request = GenerateRequest(prompt, weights, 20, sampling, num_top_logprobs=top, prompt_logprobs=top, n=3)

    async def body(engine: LocalEngine) -> Any:
        return await answers(engine, request)

    found = with_engine({m: checkpoints[m] for m in weights}, body, max_batch_tokens=16)
    assert len({chunk.tokens for chunk in found}) == 3, "choices differ"
    assert len(found[0].prompt_logprobs) == len(prompt) - 1
    for chunk in found:
        text = (*prompt, *chunk.tokens)
        logprobs_TV = mixed(text, weights)
        entries = [*found[0].prompt_logprobs, *chunk.logprobs]
        assert [entry.token for entry in entries] == list(text[1:])
        for at, entry in enumerate(entries):
            assert entry.logprob == pytest.approx(float(logprobs_TV[at, entry.token]), abs=MIXTURE_LOGPROBS)
            best = logprobs_TV[at].topk(top).values.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best, abs=MIXTURE_LOGPROBS)
            for token, value in entry.top:
                assert value == pytest.approx(float(logprobs_TV[at, token]), abs=MIXTURE_LOGPROBS)


def test_an_answer_goes_on_with_other_weights_as_members_leave_and_join(checkpoints: dict[str, Path]) -> None:
    prompt, every = a_prompt(6, 20), 4
    turns = [{"a": 0.6, "b": 0.4}, {"b": 0.3, "c": 0.7}, {"c": 0.5, "a": 0.5}, {"b": 1.0}, {"a": 0.2, "b": 0.8}]

    async def body(engine: LocalEngine) -> Any:
        found: list[Any] = []
        for weights in turns:
            generated = tuple(entry.token for entry in found)
            window = GenerateRequest(prompt, weights, every, num_top_logprobs=0, generated=generated)
            found += (await answer(engine, window)).logprobs
        return found

    found = with_engine({name: checkpoints[name] for name in "abc"}, body)
    assert len(found) == every * len(turns), "the test needs an answer of full length"
    text = (*prompt, *(entry.token for entry in found))
    for turn, weights in enumerate(turns):
        logprobs_TV = mixed(text, weights)
        for at in range(every * turn, every * (turn + 1)):
            expected = float(logprobs_TV[len(prompt) - 1 + at, found[at].token])
            assert found[at].logprob == pytest.approx(expected, abs=MIXTURE_LOGPROBS)


def test_the_order_of_weights_does_not_matter(checkpoints: dict[str, Path]) -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}

    async def body(engine: LocalEngine) -> Any:
        orders = (weights, dict(reversed(weights.items())), {m: weights[m] for m in "bca"})
        return [await answer(engine, replace(FINE, weights=order, num_top_logprobs=9)) for order in orders]

    first, second, third = with_engine({name: checkpoints[name] for name in "abc"}, body)
    assert first == second == third, "bit for bit"


# ---- text and stops


def test_a_stream_is_the_whole_in_pieces_and_echo_puts_the_prompt_before_it(checkpoints: dict[str, Path]) -> None:
    request = GenerateRequest(tuple(b"Once upon a time"), {"a": 1.0}, 40, num_top_logprobs=1, prompt_logprobs=1)

    async def body(engine: LocalEngine) -> Any:
        stream = [chunk async for chunk in engine.generate(replace(request, echo=True))]
        whole = [chunk async for chunk in engine.generate(replace(request, echo=True, stream=False))]
        return stream, whole, await answer(engine, request)

    stream, whole, plain = with_engine({"a": checkpoints["a"]}, body)
    assert len(stream) > 20 and len(whole) == 1
    assert TokenChunk.joined(stream) == whole[0]
    assert whole[0].text == "Once upon a time" + plain.text
    assert [chunk.finish_reason for chunk in stream[:-1]] == [None] * (len(stream) - 1)


def test_stop_strings_across_tokens_end_an_answer_before_them(checkpoints: dict[str, Path]) -> None:
    """Bytes are tokens here, so that every stop string of two characters lies across a border."""
    request = replace(FINE, num_top_logprobs=None, max_tokens=60, sampling=Sampling(logit_bias=ASCII))

    async def body(engine: LocalEngine) -> Any:
        full = await answer(engine, request)
        stops = [full.text[at : at + 3] for at in (2, 9, 20)]
        asked = [replace(request, stop=stop) for stop in (*((s,) for s in stops), tuple(reversed(stops)), ("ZZZZ",))]
        found = await asyncio.gather(*(answer(engine, each) for each in asked))
        streams = [[c.text async for c in engine.generate(each)] for each in asked]
        return full, asked, found, streams

    full, asked, found, streams = with_engine({"a": checkpoints["a"]}, body)
    assert len(full.text) == 60
    for request, chunk, stream in zip(asked, found, streams, strict=True):
        ends = [full.text.index(stop) for stop in request.stop if stop in full.text]
        assert chunk.text == "".join(stream) == full.text[: min(ends, default=60)]
        assert chunk.finish_reason == ("stop" if ends else "length")
        oracle = ulm.generate(
            small_model(), the_tokenizer(), list(request.tokens), max_tokens=60, stop=request.stop, logit_bias=ASCII
        )
        assert (oracle.text, oracle.finish_reason, tuple(oracle.tokens)) == (
            chunk.text,
            chunk.finish_reason,
            chunk.tokens,
        )


ASCII = tuple((token, 40.0) for token in range(97, 123))  # letters, so that characters are tokens

# ---- passes compiled in the background


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_answers_before_during_and_after_compiling_are_the_plain_ones(
    checkpoints: dict[str, Path], fine: TokenChunk
) -> None:
    if not runtime.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile has no compiler or no Python headers here")

    async def body(engine: LocalEngine) -> Any:
        found, num_during, stats = [], 0, await engine.stats()
        while not stats["compiled_shapes"]:
            found.append(await answer(engine, FINE))
            stats = await engine.stats()
            num_during += bool(stats["compiling"])
        assert num_during, "answers were given while it compiled"
        before = len(found)
        mixture = replace(FINE, weights={"a": 0.5, "b": 0.5})
        found += [await answer(engine, FINE) for _ in range(2)]
        return found[:before], found[before:], await answer(engine, mixture)

    settings = {"compile_after_steps": 1, "max_compile_s": 1e-3}  # one size alone: behind it the time is spent
    before, after, mixture = with_engine({name: checkpoints[name] for name in "ab"}, body, **settings)
    assert all(chunk == fine for chunk in before), "the plain pass goes on meanwhile"
    assert all(chunk == fine for chunk in after), "bit for bit"
    logprobs_TV = mixed((*FINE.tokens, *mixture.tokens), {"a": 0.5, "b": 0.5})
    for at, entry in enumerate(mixture.logprobs, len(FINE.tokens) - 1):
        assert entry.logprob == pytest.approx(float(logprobs_TV[at, entry.token]), abs=MIXTURE_LOGPROBS)


@pytest.mark.parametrize("member", ["a", "sums"])
def test_a_pass_is_untouched_by_what_torch_fx_exchanges_while_another_thread_traces(
    member: str, checkpoints: dict[str, Path]
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def traced(x: torch.Tensor) -> torch.Tensor:
        entered.set()
        leave.wait(SOON_S)
        return x

    async def body(engine: LocalEngine) -> Any:
        request = replace(FINE, weights={member: 1.0})
        before = await answer(engine, request)
        tracing = threading.Thread(target=torch.fx.symbolic_trace, args=(traced,))
        tracing.start()
        try:
            assert entered.wait(SOON_S) and torch.nn.Module.__call__ is not call, "it is exchanged"
            return before, await answer(engine, request)
        finally:
            leave.set()
            tracing.join()

    call = torch.nn.Module.__call__
    before, during = with_engine({member: checkpoints[member]}, body)
    assert before == during


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_any_number_of_stacks_is_compiled_and_a_dropped_ones_memory_is_given_back() -> None:
    """By itself Dynamo compiles one function eight times, and keeps what it was called with."""
    if not runtime.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile has no compiler or no Python headers here")
    spec, held = small_model(num_layers=1).spec, []
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            how = {"dtype": torch.float32, "device": torch.device("cpu"), "kv_cache_bytes": 1 << 20}
            stack = Stack(spec, **how, max_batch_tokens=16)  # type: ignore[arg-type]
            compiled._compiled(stack, 1, 0)
            compiled._compiled(stack, 2, 0)
            held.append(weakref.ref(stack.stores[0].k_pages))
            del stack
            gc.collect()
    assert [pages() for pages in held] == [None, None]


def test_where_compiling_fails_the_plain_pass_goes_on_and_it_is_said_once(
    checkpoints: dict[str, Path], fine: TokenChunk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("the compiler is ill")

    monkeypatch.setattr(compiled, "_compiled", fail)
    monkeypatch.setattr(runtime, "can_compile", lambda device: True)

    async def body(engine: LocalEngine) -> Any:
        return [await answer(engine, FINE) for _ in range(3)], await engine.stats()

    with caplog.at_level(logging.INFO):
        found, stats = with_engine({"a": checkpoints["a"]}, body, compile_after_steps=1)
    assert found == [fine] * 3 and stats["compiled_shapes"] == 0
    said = [record for record in caplog.records if "the compiler is ill" in record.getMessage()]
    assert len(said) == 1 and said[0].levelno == logging.WARNING
    assert not [record for record in caplog.records if "are compiled, in" in record.getMessage()]
