"""Members come, change and go while the engine works: answers keep the weights they began with, memory comes back."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ulm
from serve.contracts import GenerateRequest, TokenChunk
from serve.engines.local.engine import LocalEngine
from serve.engines.local.flat import MAX_SLOTS
from tests.engine import answer, with_engine
from tests.small_members import LINEAR, a_prompt, small_member, small_model, the_tokenizer
from ulm.checkpoints import store
from ulm.errors import ArtefactError, ConfigError, ModelNotFoundError, OverloadedError, UnsupportedError
from ulm.tokenizers.byte import byte_tokenizer

# The model beside the engine has rounded weights, too, so that what is left is what keys and values lose in bfloat16:
# 2^-9 of scores that are tens, through weights that are large on purpose (measured: 0.1).
BFLOAT16_LOGPROBS = 0.15
ROW_LOGPROBS = 2e-4  # rows decoded beside others sum in another order
CHAT = "{% for message in messages %}{{ message.role }} {{ message.content }}{% endfor %}"
LONG = 400  # tokens of an answer that goes on for a second at least


def ask(member: str = "a", number: int = 0, max_tokens: int = 16, **fields: Any) -> GenerateRequest:
    """A request whose logprobs are compared bit for bit."""
    return GenerateRequest(a_prompt(number, 21), {member: 1.0}, max_tokens, num_top_logprobs=0, **fields)


def nearly(one: TokenChunk, other: TokenChunk) -> bool:
    """The same, but for the last bits of logprobs."""
    logprobs = [entry.logprob for entry in other.logprobs]
    is_near = [entry.logprob for entry in one.logprobs] == pytest.approx(logprobs, abs=ROW_LOGPROBS)
    return is_near and replace(one, logprobs=()) == replace(other, logprobs=())


def alone(checkpoint: Path, number: int = 0, max_tokens: int = 16, **settings: Any) -> TokenChunk:
    """What a member's answer is where nobody else is."""

    async def body(engine: LocalEngine) -> TokenChunk:
        return await answer(engine, ask("a", number, max_tokens))

    return with_engine({"a": checkpoint}, body, **settings)


def weight_bytes(checkpoint: Path, num_members: int) -> int:
    """A limit that holds so many members of a float32 checkpoint."""
    num_parameters = sum(t.numel() for t in store.read_weights(checkpoint).values())
    return 4 * num_parameters * num_members


async def until(is_so: Callable[[], Any]) -> None:
    """Returns when it is so; the test's own time limit ends what never is."""
    while not await is_so():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("overrides", [{}, LINEAR], ids=["pages", "rows"])
def test_reload_leaves_answers_under_way_their_weights_and_gives_new_ones_the_new(
    overrides: dict[str, Any], tmp_path: Path
) -> None:
    old, new = (small_member(tmp_path, seed, **overrides) for seed in (0, 1))

    async def body(engine: LocalEngine) -> Any:
        under_way = engine.generate(ask(max_tokens=60))
        chunks = [await anext(under_way)]
        waiting = asyncio.create_task(answer(engine, ask(number=1)))  # has come before the reload, too
        await asyncio.sleep(0)
        info = await engine.reload("a", str(new))
        after = await answer(engine, ask())  # the same text as before, whose pages are cached
        chunks += [chunk async for chunk in under_way]
        return TokenChunk.joined(chunks), await waiting, after, info

    before, waiting, after, info = with_engine({"a": old}, body)
    equal = nearly if overrides else operator.eq
    assert equal(before, alone(old, max_tokens=60))
    assert equal(waiting, alone(old, number=1))
    assert equal(after, alone(new)) and not equal(after, alone(old))
    assert info.checkpoint == str(new)


def test_reload_of_another_shape_or_tokenizer_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    first, deeper = small_member(tmp_path), small_member(tmp_path, num_layers=3)
    other = small_member(tmp_path, 1, tokenizer=byte_tokenizer(chat_template=CHAT))

    async def body(engine: LocalEngine) -> Any:
        under_way = asyncio.create_task(answer(engine, ask(max_tokens=60)))
        with pytest.raises(ConfigError, match=r"another spec than member 'a', .*\(unload the member"):
            await engine.reload("a", str(deeper))
        with pytest.raises(ConfigError, match="another tokenizer than member 'a'"):
            await engine.reload("a", str(other))
        return await under_way, await answer(engine, ask()), await engine.members()

    under_way, after, members = with_engine({"a": first}, body)
    assert under_way == alone(first, max_tokens=60) and after == alone(first)
    assert members["a"].checkpoint == str(first)


def test_an_unknown_member_is_named_whatever_is_asked_of_it(tmp_path: Path) -> None:
    checkpoint = small_member(tmp_path)

    async def body(engine: LocalEngine) -> None:
        for asked in (
            answer(engine, ask("b")),
            answer(engine, GenerateRequest((1, 2), {"a": 0.5, "b": 0.5}, 4)),
            engine.score("b", (1, 2)),
            engine.next_logprobs("b", (1, 2)),
            engine.embed("b", (1, 2)),
            engine.reload("b", str(checkpoint)),
            engine.unload("b"),
        ):
            with pytest.raises(ModelNotFoundError, match="no member 'b'"):
                await asked
        with pytest.raises(ConfigError, match="no checkpoint 'nowhere'"):
            await engine.load("b", "nowhere")
        assert list(await engine.members()) == ["a"]

    with_engine({"a": checkpoint}, body)


@pytest.mark.parametrize("overrides", [{}, LINEAR], ids=["pages", "rows"])
def test_unload_finishes_what_is_under_way_and_then_gives_all_memory_back(
    overrides: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint, other = (small_member(tmp_path, seed, **overrides) for seed in (0, 1))

    async def body(engine: LocalEngine) -> Any:
        loaded = await engine.stats()
        under_way = engine.generate(ask(max_tokens=60))
        chunks = [await anext(under_way)]
        await engine.unload("b")
        less = await engine.stats()
        await engine.unload("a")
        with pytest.raises(ModelNotFoundError):
            await answer(engine, ask())
        chunks += [chunk async for chunk in under_way]

        async def is_gone() -> bool:
            return (await engine.stats())["kv_cache_bytes"] == 0  # without any further request

        await until(is_gone)
        return TokenChunk.joined(chunks), loaded, less, await engine.stats()

    found, loaded, less, none = with_engine({"a": checkpoint, "b": other}, body)
    assert found == alone(checkpoint, max_tokens=60)
    assert 0 < less["weight_bytes"] < loaded["weight_bytes"] and loaded["kv_cache_bytes"] > 0
    for name in ("weight_bytes", "kv_cache_bytes", "kv_cache_used_bytes", "members", "running", "waiting"):
        assert none[name] == 0, name


def test_under_a_memory_limit_the_member_used_longest_ago_is_put_away_and_comes_back_when_asked(tmp_path: Path) -> None:
    checkpoints = {name: small_member(tmp_path, seed) for seed, name in enumerate("abc")}
    limit = weight_bytes(checkpoints["a"], 2)

    async def body(engine: LocalEngine) -> Any:
        found = {}
        for name in "abcab":
            found[name] = await answer(engine, ask(name))
            stats = await engine.stats()
            assert stats["members"] == 2 and stats["weight_bytes"] < 1.5 * limit
        await answer(engine, ask("a"))
        assert sorted(engine._members.loaded) == ["a", "b"]
        await answer(engine, ask("c"))  # b was used longer ago than a
        assert sorted(engine._members.loaded) == ["a", "c"]
        assert sorted(await engine.members()) == ["a", "b", "c"], "put away is not forgotten"
        return found, stats

    found, stats = with_engine(checkpoints, body, max_weight_bytes=limit)
    assert stats["evictions"] >= 3
    for name, checkpoint in checkpoints.items():
        assert found[name] == alone(checkpoint), name


def test_a_member_that_finds_all_room_at_work_is_refused_for_now_and_a_larger_one_for_good(tmp_path: Path) -> None:
    fields = {"context_tokens": 512}
    first, second = (small_member(tmp_path, seed, **fields) for seed in (0, 1))
    large = small_member(tmp_path, num_layers=4, **fields)

    async def body(engine: LocalEngine) -> Any:
        under_way = engine.generate(ask("a", max_tokens=LONG))
        chunks = [await anext(under_way)]
        with pytest.raises(OverloadedError, match=r"member 'b': .* do not fit beside the .* of members at work"):
            await engine.load("b", str(second))
        with pytest.raises(UnsupportedError, match=r"member 'large': .* max_weight_bytes is"):
            await engine.load("large", str(large))
        assert list(await engine.members()) == ["a"]
        chunks += [chunk async for chunk in under_way]
        await engine.load("b", str(second))
        return TokenChunk.joined(chunks), await answer(engine, ask("b")), await answer(engine, ask("a"))

    limit = weight_bytes(first, 1)
    long, b, a = with_engine({"a": first}, body, max_weight_bytes=limit)
    assert long == alone(first, max_tokens=LONG) and b == alone(second) and a == alone(first)


def test_a_mixture_that_could_never_be_held_is_refused_and_one_that_could_is_brought_back_whole(tmp_path: Path) -> None:
    checkpoints = {name: small_member(tmp_path, seed) for seed, name in enumerate("abcd")}
    three, two = (GenerateRequest((1, 2, 3), {m: 1.0 for m in members}, 4) for members in ("abc", "cd"))

    async def body(engine: LocalEngine) -> Any:
        with pytest.raises(UnsupportedError, match=r"member '.' together with .*: .* max_weight_bytes is"):
            await asyncio.wait_for(answer(engine, three), 30)
        for request in (two, replace(two, weights={"a": 0.5, "b": 0.5}), two):
            found = await asyncio.wait_for(answer(engine, request), 30)
        assert sorted(engine._members.loaded) == ["c", "d"]
        return found

    found = with_engine(checkpoints, body, max_weight_bytes=weight_bytes(checkpoints["a"], 2))
    assert found == with_engine({m: checkpoints[m] for m in "cd"}, lambda engine: answer(engine, two))


def test_a_reload_fits_where_its_old_weights_were(tmp_path: Path) -> None:
    old, new = (small_member(tmp_path, seed) for seed in (0, 1))

    async def body(engine: LocalEngine) -> TokenChunk:
        await engine.reload("a", str(new))
        return await answer(engine, ask())

    assert with_engine({"a": old}, body, max_weight_bytes=weight_bytes(old, 1)) == alone(new)


def test_members_of_two_specs_loaded_at_once_answer_at_once(tmp_path: Path) -> None:
    checkpoints = {
        name: small_member(tmp_path, seed, **overrides)
        for seed, (name, overrides) in enumerate({"a": {}, "b": {}, "deep": {"num_layers": 3}, "sums": LINEAR}.items())
    }

    async def body(engine: LocalEngine) -> Any:
        await asyncio.gather(*(engine.load(name, str(path)) for name, path in checkpoints.items()))
        found = await asyncio.gather(*(answer(engine, ask(name, number)) for name in checkpoints for number in (0, 1)))
        return found, list(await engine.members())

    found, members = with_engine({}, body)
    assert sorted(members) == sorted(checkpoints)
    expected = [alone(path, number) for path in checkpoints.values() for number in (0, 1)]
    assert list(found[:6]) == expected[:6]
    assert all(nearly(*pair) for pair in zip(found[6:], expected[6:], strict=True))


def test_a_damaged_checkpoint_is_named_and_leaves_no_trace(tmp_path: Path) -> None:
    fine, flipped = (small_member(tmp_path, seed) for seed in range(2))
    content = bytearray((flipped / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (flipped / "model.safetensors").write_bytes(content)
    whole = store.snapshot(small_model(), the_tokenizer(), copy=True)
    store.write(replace(whole, weights=dict(list(whole.weights.items())[1:])), lacking := tmp_path / "lacking")
    ulm.save(small_model(vocab_size=300), the_tokenizer(), wide := tmp_path / "wide")

    async def body(engine: LocalEngine) -> Any:
        before = await engine.stats()
        under_way = asyncio.create_task(answer(engine, ask(max_tokens=60)))
        for damaged, problem in (
            (flipped, "model.safetensors"),
            (lacking, "is None, the spec's model has"),
            (wide, "its tokenizer has 257 tokens, its model 300"),
        ):
            for change in (engine.load("b", str(damaged)), engine.reload("a", str(damaged))):
                with pytest.raises((ArtefactError, ConfigError), match=f"{problem}|another spec"):
                    await change
        assert list(await engine.members()) == ["a"]
        return await under_way, before["weight_bytes"], (await engine.stats())["weight_bytes"]

    under_way, before, after = with_engine({"a": fine}, body)
    assert under_way == alone(fine, max_tokens=60) and before == after


def test_a_load_that_nobody_waits_for_any_more_is_whole(tmp_path: Path) -> None:
    checkpoints = {name: small_member(tmp_path, seed) for seed, name in enumerate("abc")}

    async def body(engine: LocalEngine) -> Any:
        for delay_s in (0.0, 0.003, 0.01):
            loading = asyncio.create_task(engine.load("a", str(checkpoints["a"])))
            await asyncio.sleep(delay_s)
            loading.cancel()
            await engine.load("b", str(checkpoints["b"]))
            assert await answer(engine, ask("b")) == expected["b"]
            if "a" in await engine.members():
                assert await answer(engine, ask("a")) == expected["a"]
                await engine.unload("a")
            await engine.unload("b")
        return await engine.stats()

    expected = {name: alone(path) for name, path in checkpoints.items()}
    assert with_engine({}, body)["weight_bytes"] == 0, "no slot is lost"


def test_a_bfloat16_engine_gives_what_the_model_gives_on_rounded_weights(tmp_path: Path) -> None:
    checkpoint, model = small_member(tmp_path), small_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # scales of norms stay as they are, on a CPU
                parameter.copy_(parameter.bfloat16().float())
    prompt = a_prompt(0, 40)

    async def body(engine: LocalEngine) -> Any:
        return await engine.score("a", prompt), await engine.next_logprobs("a", prompt), await engine.stats()

    scores, following, stats = with_engine({"a": checkpoint}, body, dtype="bfloat16")
    _, _, whole = with_engine({"a": checkpoint}, body)
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([prompt]))[0].log_softmax(-1)
    expected = [float(logprobs_TV[at, token]) for at, token in enumerate(prompt[1:])]
    assert scores == pytest.approx(expected, abs=BFLOAT16_LOGPROBS)
    assert following == pytest.approx(logprobs_TV[-1].numpy(), abs=BFLOAT16_LOGPROBS)
    assert stats["weight_bytes"] < 0.6 * whole["weight_bytes"]


def test_more_members_than_a_stack_has_slots_are_answered_by_another(tmp_path: Path) -> None:
    first, last = (small_member(tmp_path, seed, num_layers=1) for seed in (0, 1))

    async def body(engine: LocalEngine) -> Any:
        for number in range(MAX_SLOTS):
            await engine.load(f"m{number}", str(first))
        await engine.load("last", str(last))
        asked = [ask(name, max_tokens=4) for name in ("m0", f"m{MAX_SLOTS - 1}", "last")]
        found = await asyncio.gather(*(answer(engine, request) for request in asked))
        for number in range(0, MAX_SLOTS, 2):
            await engine.unload(f"m{number}")
        await engine.load("again", str(last))  # into a slot that was another's
        return found, await answer(engine, ask("again", max_tokens=4)), await engine.stats()

    found, again, stats = with_engine({}, body, kv_cache_bytes=1 << 20)
    expected = alone(first, max_tokens=4), alone(first, max_tokens=4), alone(last, max_tokens=4)
    assert tuple(found) == expected
    assert again == expected[2] and stats["members"] == MAX_SLOTS // 2 + 2
