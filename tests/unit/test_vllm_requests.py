"""What is asked of vLLM and what becomes of what it brings, without vLLM: its client is played by a script."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from serve.constrained import ANY_OBJECT, SPELLING
from serve.contracts import GenerateRequest, TokenChunk
from serve.engines.vllm.arguments import arguments_of, reading
from serve.engines.vllm.engine import Source, VllmEngine
from serve.engines.vllm.folder import exported, together
from serve.engines.vllm.settings import BLOCK_TOKENS, MAX_CACHE_BYTES, Config, settle, text_bytes
from tests.page import Page
from tests.small_members import small_member, the_tokenizer
from ulm import registry, runtime
from ulm.errors import (
    ConfigError,
    ContextLengthError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    UlmError,
    UnsupportedError,
)
from ulm.models.sampling import Sampling
from ulm.recipes import ServeRecipe
from ulm.recipes.base import validate
from ulm.spec import ModelSpec

PAGE = Page.read("vllm.md")
EOT = the_tokenizer().eot_id
PROMPT = (EOT, *b"the quick ")
ASKED = GenerateRequest(PROMPT, {"a": 1.0}, 8)
HOT = Sampling(temperature=1.0, seed=7)


@dataclass
class At:
    """vLLM's Logprob."""

    logprob: float


@dataclass
class Completion:
    """vLLM's CompletionOutput."""

    index: int
    token_ids: Sequence[int]
    finish_reason: str | None = None
    logprobs: Any = None


@dataclass
class Output:
    """vLLM's RequestOutput."""

    outputs: list[Completion]
    finished: bool = False
    prompt_logprobs: Any = None
    num_cached_tokens: int | None = 0


@dataclass
class Script:
    """A client that brings these outputs, whatever it is asked; a number waits so many seconds."""

    items: Sequence[Any]
    asked: list[tuple[tuple[int, ...], Mapping[str, Any], int]] = field(default_factory=list)
    reloaded: list[Path] = field(default_factory=list)
    num_left: int = 0  # askers that went before the end

    async def generate(
        self, tokens: Sequence[int], arguments: Mapping[str, Any], due_ms: int
    ) -> AsyncGenerator[Any, None]:
        self.asked.append((tuple(tokens), arguments, due_ms))
        self.num_left += 1
        for item in self.items:
            if isinstance(item, float):
                await asyncio.sleep(item)
            else:
                yield item
        self.num_left -= 1

    async def reload(self, folder: Path) -> None:
        self.reloaded.append(folder)

    def close(self) -> None:
        return


def said(text: bytes, index: int = 0, **fields: Any) -> Completion:
    """A piece of a choice, each of its tokens with log-probability -1 beside a likelier one."""
    return Completion(index, [*text], logprobs=[{token: At(-1.0), 1: At(-0.5)} for token in text], **fields)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("members")
    made = {name: small_member(folder, seed) for seed, name in enumerate("ab")}
    return {**made, "wide": small_member(folder, 2, d_model=192)}


@pytest.fixture
def home(root: Path) -> Iterator[Path]:
    """A root of its own, in which folders may be exported."""
    yield root


def run(script: Script, checkpoint: Path, body: Callable[[VllmEngine], Awaitable[Any]], **settings: Any) -> Any:
    return run_together(script, {"a": checkpoint}, body, **settings)


def run_together(
    script: Script, checkpoints: dict[str, Path], body: Callable[[VllmEngine], Awaitable[Any]], **settings: Any
) -> Any:
    sources = {member: Source.read(str(checkpoint)) for member, checkpoint in checkpoints.items()}
    context_tokens = min(source.spec.context_tokens for source in sources.values())
    config = Config(kind="vllm", **settings).model_copy(
        update={"dtype": "float32", "context_tokens": context_tokens, "kv_cache_bytes": 1 << 20}
    )
    return asyncio.run(_run(VllmEngine(config, sources, script, runtime.root()), body))


async def _run(engine: VllmEngine, body: Callable[[VllmEngine], Awaitable[Any]]) -> Any:
    return await body(engine)


async def chunks(engine: VllmEngine, request: GenerateRequest) -> list[TokenChunk]:
    return [chunk async for chunk in engine.generate(request)]


# ---- several members in one engine


def test_each_request_tells_an_engine_of_several_members_its_weights(checkpoints: dict[str, Path]) -> None:
    two = {"a": checkpoints["a"], "b": checkpoints["b"]}
    script = Script([Output([said(b"x", finish_reason="length")], finished=True)])
    flat = SimpleNamespace(token_ids=[1], logprobs=[-0.5])
    looked = Script([Output([Completion(0, [*b"x"], "length", flat)], finished=True)])

    async def ask(engine: VllmEngine) -> list[Any]:
        assert set(await engine.members()) == {"a", "b"}
        await chunks(engine, replace(ASKED, weights={"a": 0.75, "b": 0.25}))
        await chunks(engine, replace(ASKED, weights={"b": 2.0, "a": 0.0}))
        with pytest.raises(UnsupportedError, match="members that share a vllm engine have their weights for its whole"):
            await engine.reload("a", str(checkpoints["b"]))
        with pytest.raises(ModelNotFoundError, match="no member 'c'"):
            await chunks(engine, replace(ASKED, weights={"a": 1.0, "c": 1.0}))
        return [arguments["extra_args"]["mix"] for _, arguments, _ in script.asked]

    assert run_together(script, two, ask) == [{"a": 0.75, "b": 0.25}, {"b": 2.0}]
    run_together(looked, two, lambda engine: engine.next_logprobs("b", PROMPT))
    assert looked.asked[0][1]["extra_args"] == {"mix": {"b": 1.0}}
    alone = Script([Output([said(b"x", finish_reason="length")], finished=True)])
    run(alone, checkpoints["a"], lambda engine: chunks(engine, ASKED))
    assert "extra_args" not in alone.asked[0][1]


def test_members_that_share_an_engine_share_a_cache_a_context_and_a_tokenizer(
    checkpoints: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "has_vllm", lambda: True)
    specs = [ModelSpec.preset("nano", context_tokens=context) for context in (256, 128)]
    found = settle(Config(kind="vllm", max_answers=2), specs, "float32", "engine")
    assert (found.context_tokens, found.is_eager) == (128, True)
    assert found.kv_cache_bytes == 2 * 2 * text_bytes(specs[0], 128, "float32")
    for name, value in (("gpus", 2), ("enforce_eager", False)):
        with pytest.raises(ConfigError, match=rf"engine\.{name}: .*members that share an engine"):
            settle(Config(kind="vllm", **{name: value}), specs, "float32", "engine")
    folder = together({"x": checkpoints["a"], "y": checkpoints["wide"]}, "float32", home)
    said_there = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert list(said_there["experts"]) == ["x", "y"]
    for place in said_there["experts"].values():
        assert (folder / place / "model.safetensors").is_file()
    assert together({"x": checkpoints["a"], "y": checkpoints["wide"]}, "float32", home) == folder
    assert together({"x": checkpoints["a"]}, "float32", home) == exported(checkpoints["a"], "float32", home)


# ---- what is asked


def test_every_setting_of_sampling_reaches_vllm_under_its_name() -> None:
    sampling = Sampling(
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias={102: -3.0},
        seed=11,
    )
    found = arguments_of(replace(ASKED, sampling=sampling, num_top_logprobs=5, prompt_logprobs=2), 8, EOT)
    assert found == {
        **{"n": 1, "max_tokens": 8, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "seed": 11},
        **{"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.25, "logit_bias": {102: -3.0}},
        **{"stop_token_ids": [EOT], "logprobs": 5, "prompt_logprobs": 2, "output_kind": "DELTA"},
    }
    assert len(Sampling.model_fields) == 9, "a new setting of Sampling is mapped too"


def test_pieces_are_asked_for_only_where_somebody_looks_at_them() -> None:
    def kind(**fields: Any) -> str:
        return str(arguments_of(replace(ASKED, **fields), 8, EOT)["output_kind"])

    assert kind(stream=False) == "FINAL_ONLY"
    assert kind() == kind(stream=False, stop=("x",)) == kind(stream=False, deadline_s=1.0) == "DELTA"


def test_the_rest_of_an_answer_draws_otherwise_than_its_beginning_and_the_same_each_time() -> None:
    def seed(*generated: int) -> int:
        return int(arguments_of(replace(ASKED, sampling=HOT, generated=generated), 8, EOT)["seed"])

    assert seed() == 7 and seed(1, 2) == seed(3, 4) and len({seed(), seed(1), seed(1, 2)}) == 3


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_a_penalty_of_what_vllm_does_not_know_of_is_refused_by_name(name: str) -> None:
    penalised = replace(ASKED, sampling=Sampling(**{name: 0.5}))
    assert arguments_of(penalised, 8, EOT)[name] == 0.5
    with pytest.raises(UnsupportedError, match=f"{name}: the vllm engine does not count tokens"):
        arguments_of(replace(penalised, generated=(5,)), 8, EOT)


def test_a_schema_reaches_vllm_with_its_spelling_and_what_vllm_cannot_do_beside_it_is_refused() -> None:
    held = replace(ASKED, json_schema=ANY_OBJECT)
    sent = json.loads(arguments_of(held, 8, EOT)["structured_outputs"]["json"])
    assert sent == {"type": "object", "x-guidance": SPELLING}
    assert "structured_outputs" not in arguments_of(ASKED, 8, EOT)
    for cannot in ({"generated": (123,)}, {"num_top_logprobs": 0}, {"best_of": 2, "stream": False, "sampling": HOT}):
        with pytest.raises(UnsupportedError, match="schema.*local engine"):
            arguments_of(replace(held, **cannot), 8, EOT)


def test_json_ends_where_it_is_whole_and_an_end_before_that_is_an_error(checkpoints: dict[str, Path]) -> None:
    held = replace(ASKED, json_schema=ANY_OBJECT)
    at_the_edge = Script([Output([said(b'{"a":1}', finish_reason="length")], finished=True)])
    (chunk,) = run(at_the_edge, checkpoints["a"], lambda engine: chunks(engine, held))
    assert (chunk.text, chunk.finish_reason) == ('{"a":1}', "stop")
    too_soon = Script([Output([said(b'{"a":', finish_reason="stop")], finished=True)])
    with pytest.raises(RequestError, match="too complex to be followed further by vllm"):
        run(too_soon, checkpoints["a"], lambda engine: chunks(engine, held))


def test_a_text_is_scored_with_its_last_token_as_the_only_one_that_may_follow() -> None:
    prompt, arguments = reading((5, 6, 7), 2)
    assert prompt == (5, 6) and arguments["allowed_token_ids"] == [7] and arguments["max_tokens"] == 1


def test_whose_priority_is_higher_is_due_earlier_by_ten_seconds_a_unit(checkpoints: dict[str, Path]) -> None:
    script = Script([Output([said(b"x", finish_reason="length")], finished=True)])

    async def body(engine: VllmEngine) -> None:
        for priority in (0, 2):
            await chunks(engine, replace(ASKED, priority=priority))

    run(script, checkpoints["a"], body)
    (_, _, plain), (_, _, urgent) = script.asked
    assert plain - 20_000 <= urgent < plain - 19_000


def test_with_many_answers_open_more_tokens_come_in_a_piece(checkpoints: dict[str, Path]) -> None:
    script = Script([0.01, Output([said(b"x", finish_reason="length")], finished=True)])

    async def body(engine: VllmEngine) -> None:
        await asyncio.gather(*(chunks(engine, ASKED) for _ in range(17)))
        await chunks(engine, ASKED)

    run(script, checkpoints["a"], body)
    sizes = [arguments["stream_interval"] for _, arguments, _ in script.asked]
    assert sizes == [1] * 8 + [2] * 8 + [3] + [1]


# ---- what becomes of what it brings


def test_chunks_come_as_vllm_brings_them_and_end_with_its_reason(checkpoints: dict[str, Path]) -> None:
    prompt_logprobs = [None, *({token: At(-2.0), 3: At(-0.1)} for token in PROMPT[1:])]
    script = Script(
        [
            Output([said(b"br")], prompt_logprobs=prompt_logprobs, num_cached_tokens=4),
            Output([said(b"own", finish_reason="length")], finished=True),
        ]
    )

    async def body(engine: VllmEngine) -> Any:
        request = replace(ASKED, num_top_logprobs=1, prompt_logprobs=2, echo=True)
        return await chunks(engine, request), await engine.stats()

    (first, second), stats = run(script, checkpoints["a"], body)
    assert (first.text, second.text, second.finish_reason) == ("the quick br", "own", "length")
    assert first.logprobs[0].top == ((1, -0.5),) and first.logprobs[0].logprob == -1.0
    assert [entry.top for entry in first.prompt_logprobs] == [((3, -0.1), (token, -2.0)) for token in PROMPT[1:]]
    assert second.prompt_logprobs == ()
    assert (stats["generated_tokens"], stats["prompt_tokens"], stats["shared_prompt_tokens"]) == (5, len(PROMPT), 4)
    assert script.num_left == stats["running"] == 0, "what has ended is not aborted"


def test_the_end_of_text_is_no_token_and_a_stop_string_ends_it_within_a_piece(checkpoints: dict[str, Path]) -> None:
    ends = Script([Output([Completion(0, [*b"ab", EOT], "stop")], finished=True)])
    (chunk,) = run(ends, checkpoints["a"], lambda engine: chunks(engine, ASKED))
    assert (chunk.text, chunk.tokens, chunk.finish_reason) == ("ab", tuple(b"ab"), "stop")
    stops = Script([Output([said(b"abcd")]), Output([said(b"efgh")]), Output([said(b"never")])])
    found = TokenChunk.joined(run(stops, checkpoints["a"], lambda e: chunks(e, replace(ASKED, stop=("de",)))))
    assert (found.text, found.tokens, found.finish_reason) == ("abc", tuple(b"abcde"), "stop")
    assert stops.num_left == 1, "vLLM is told to stop, too"


def test_text_waits_for_the_rest_of_a_character_and_of_a_stop_string(checkpoints: dict[str, Path]) -> None:
    pieces = ["é".encode()[:1], "é".encode()[1:] + b"x", b"y"]
    script = Script([*(Output([said(p)]) for p in pieces), Output([said(b"", finish_reason="length")], finished=True)])
    found = run(script, checkpoints["a"], lambda engine: chunks(engine, replace(ASKED, stop=("xyz",))))
    assert [chunk.text for chunk in found] == ["", "é", "", "xy"]


def test_of_more_draws_than_asked_the_likeliest_on_average_are_given_best_first(checkpoints: dict[str, Path]) -> None:
    def drawn(index: int, *logprobs: float) -> Completion:
        return Completion(index, [65 + index] * len(logprobs), "length", [{65 + index: At(v)} for v in logprobs])

    output = Output([drawn(0, -3.0), drawn(1, -1.0, -1.0), drawn(2, -0.5, -2.0)], finished=True)
    request = replace(ASKED, n=2, best_of=3, sampling=HOT, stream=False)
    script = Script([output])
    found = run(script, checkpoints["a"], lambda engine: chunks(engine, request))
    assert [(chunk.index, chunk.text, chunk.logprobs) for chunk in found] == [(0, "BB", ()), (1, "CC", ())]
    assert (script.asked[0][1]["n"], script.asked[0][1]["logprobs"]) == (3, 0)


def test_a_deadline_ends_every_choice_with_what_there_is(checkpoints: dict[str, Path]) -> None:
    script = Script([Output([said(b"ab"), said(b"c", 1)]), 60.0])
    request = replace(ASKED, n=2, sampling=HOT, deadline_s=0.05, stream=False)
    one, two = run(script, checkpoints["a"], lambda engine: chunks(engine, request))
    assert (one.text, one.finish_reason, one.degraded) == ("ab", "length", None)
    assert (two.text, two.finish_reason, two.degraded) == ("c", "length", "ended by its deadline")
    assert script.num_left == 1


def test_an_answer_that_vllm_gives_up_is_an_error(checkpoints: dict[str, Path]) -> None:
    for items, message in (([Output([said(b"a", finish_reason="abort")], True)], "by abort"), ([], "without saying")):
        with pytest.raises(UlmError, match=message):
            run(Script(items), checkpoints["a"], lambda engine: chunks(engine, ASKED))


def test_next_logprobs_are_put_at_their_tokens(checkpoints: dict[str, Path]) -> None:
    @dataclass
    class Flat:
        token_ids: list[int]
        logprobs: list[float]

    size = the_tokenizer().vocab_size
    flat = Flat([5, *range(size)], [-9.0 - 5, *(-9.0 - token for token in range(size))])  # the chosen one comes twice
    script = Script([Output([Completion(0, [5], "length", flat)], finished=True)])
    row_V = run(script, checkpoints["a"], lambda engine: engine.next_logprobs("a", PROMPT))
    assert row_V.dtype == np.float32 and np.array_equal(row_V, -9.0 - np.arange(size, dtype=np.float32))


# ---- what is refused


def test_what_cannot_be_answered_is_refused_by_its_own_error(checkpoints: dict[str, Path]) -> None:
    context = Source.read(str(checkpoints["a"])).spec.context_tokens

    async def body(engine: VllmEngine) -> None:
        refusals: tuple[tuple[dict[str, Any], type[UlmError], str], ...] = (
            ({"weights": {"x": 1.0}}, ModelNotFoundError, "no member 'x'"),
            ({"weights": {"a": 0.5, "b": 0.5}}, ModelNotFoundError, "no member 'b'"),
            ({"tokens": (1,) * context}, ContextLengthError, f"context is {context} tokens"),
            ({"tokens": (1, 400)}, RequestError, "there is no token 400"),
            ({"generated": (400,)}, RequestError, "there is no token 400"),
            ({"generated": (*b"stop",), "stop": ("top",)}, RequestError, "this answer has ended"),
            ({"sampling": Sampling(logit_bias={400: 1.0})}, RequestError, "there is no token 400"),
        )
        for change, error, message in refusals:
            with pytest.raises(error, match=message):
                await chunks(engine, replace(ASKED, **change))
        with pytest.raises(UnsupportedError, match="embed: the vllm engine does not"):
            await engine.embed("a", PROMPT)
        with pytest.raises(UnsupportedError, match="runs a alone; add 'b' to the recipe"):
            await engine.load("b", "x")
        with pytest.raises(UnsupportedError, match="unload: a vllm engine is its member"):
            await engine.unload("a")
        await engine.close()
        with pytest.raises(UlmError, match="the engine was closed"):
            await chunks(engine, ASKED)

    script = Script([])
    run(script, checkpoints["a"], body)
    assert script.asked == [], "nothing of it has reached vLLM"


def test_who_comes_when_too_many_wait_is_told_so_at_once(checkpoints: dict[str, Path]) -> None:
    async def body(engine: VllmEngine) -> Any:
        open_ = [asyncio.create_task(chunks(engine, ASKED)) for _ in range(3)]
        await asyncio.sleep(0.01)
        stats = await engine.stats()
        with pytest.raises(OverloadedError, match="1 answers are waiting already: ask again later"):
            await chunks(engine, ASKED)
        await asyncio.gather(*open_)
        return stats, await chunks(engine, ASKED)

    script = Script([0.1, Output([said(b"x", finish_reason="length")], finished=True)])
    stats, after = run(script, checkpoints["a"], body, max_answers=2, max_waiting=1)
    assert (stats["running"], stats["waiting"]) == (2, 1) and after[-1].text == "x"


def test_other_weights_are_exported_once_and_those_of_another_shape_refused(
    checkpoints: dict[str, Path], home: Path
) -> None:
    script = Script([])

    async def body(engine: VllmEngine) -> Any:
        with pytest.raises(ConfigError, match=r"reload: .* has another spec than member 'a'.*another name"):
            await engine.reload("a", str(checkpoints["wide"]))
        for _ in range(2):
            info = await engine.reload("a", str(checkpoints["b"]))
        return info, await engine.members()

    info, members = run(script, checkpoints["a"], body)
    assert members == {"a": info} and info.checkpoint == str(checkpoints["b"])
    (folder,) = (home / "exports").iterdir()
    assert script.reloaded == [folder] * 2 and folder.name == f"{info.digest}-float32"
    with pytest.raises(UnsupportedError, match="'a' has up to 2 replicas"):
        run(script, checkpoints["a"], lambda engine: engine.reload("a", str(checkpoints["b"])), max_replicas=2)


# ---- settings and memory


def test_a_folder_is_made_once_and_then_taken_as_it_is(checkpoints: dict[str, Path], home: Path) -> None:
    folder = exported(checkpoints["a"], "bfloat16", home)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16" and config["vocab_size"] == the_tokenizer().vocab_size
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert exported(checkpoints["a"], "bfloat16", home) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in (home / "exports").iterdir()] == [folder.name]


def test_a_spec_without_a_stock_architecture_is_exported_with_ours_where_vllm_can_run_that(home: Path) -> None:
    def architecture(**overrides: Any) -> str:
        home.mkdir(exist_ok=True)
        folder = exported(small_member(home, **overrides), "float32", home)
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0])

    assert architecture() == "LlamaForCausalLM"
    assert architecture(feedforward="relu2") == "UlmForCausalLM"
    with pytest.raises(UnsupportedError, match="attention linear: vLLM has no kernel for it"):
        architecture(attention="linear")


def test_the_cache_of_a_text_is_its_keys_and_values_in_whole_blocks_and_one_of_vllms() -> None:
    spec = ModelSpec.preset("nano", context_tokens=100)
    per_token = 2 * spec.num_layers * spec.attention.num_kv_heads * spec.head_dim * 2  # type: ignore[attr-defined]
    exact = (4 + 1) * BLOCK_TOKENS * per_token
    assert exact <= text_bytes(spec, 100, "bfloat16") <= exact + per_token, "our own cache keeps one token more"
    assert text_bytes(spec, 100, "float32") == 2 * text_bytes(spec, 100, "bfloat16")


def test_too_little_memory_for_one_text_is_refused_with_the_figure_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_vllm", lambda: True)
    spec = ModelSpec.preset("nano", context_tokens=256)
    needed = text_bytes(spec, 256, "float32")
    with pytest.raises(ConfigError, match=rf"engine\.kv_cache_bytes: 65,536 bytes; .* in float32 needs {needed:,}"):
        settle(Config(kind="vllm", kv_cache_bytes=65_536), [spec], "float32", "engine")
    assert settle(Config(kind="vllm", kv_cache_bytes=needed), [spec], "float32", "engine").kv_cache_bytes == needed
    shorter = settle(Config(kind="vllm", kv_cache_bytes=needed, context_tokens=64), [spec], "float32", "engine")
    assert shorter.context_tokens == 64


def test_what_is_left_open_is_decided_by_model_and_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_vllm", lambda: True)
    spec = ModelSpec.preset("nano", context_tokens=256)
    found = settle(Config(kind="vllm", max_answers=4), [spec], "bfloat16", "engine")
    assert (found.dtype, found.context_tokens) == ("bfloat16", 256)
    assert found.kv_cache_bytes == 4 * text_bytes(spec, 256, "bfloat16")
    most = settle(Config(kind="vllm", max_answers=100_000), [spec], "bfloat16", "engine")
    assert most.kv_cache_bytes == MAX_CACHE_BYTES
    with pytest.raises(ConfigError, match=r"engine\.context_tokens: 257 tokens; the model was made for 256"):
        settle(Config(kind="vllm", context_tokens=257), [spec], "bfloat16", "engine")


def test_every_setting_stands_on_the_page_with_its_default_and_its_recipes_are_whole(root: Path) -> None:
    (rows,) = PAGE.tables("Settings")
    listed = {name.strip("`"): yaml.safe_load(default.strip("`")) for name, default, _ in rows}
    fields = {name: field.default for name, field in Config.model_fields.items() if name != "kind"}
    assert {name: None if value == "none" else value for name, value in listed.items()} == fields
    recipes = re.findall(r"^```yaml\n(.*?)^```", PAGE.text, re.DOTALL | re.MULTILINE)
    kinds = [set(validate(ServeRecipe, {"name": "t", **yaml.safe_load(text)}).own_engines()) for text in recipes]
    assert kinds == [{"large"}, {"e00"}]


def test_the_pages_refusal_is_the_one_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_vllm", lambda: True)
    spec = ModelSpec.preset("nano", context_tokens=256)
    with pytest.raises(ConfigError) as refused:
        settle(Config(kind="vllm", kv_cache_bytes=65_536), [spec], "float32", "members.large.engine")
    assert f"> {refused.value}" in PAGE.section("Memory").splitlines()


def test_cards_that_cannot_share_the_heads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_vllm", lambda: True)
    spec = ModelSpec.preset("nano", attention={"num_heads": 4, "num_kv_heads": 2, "head_dim": 32})
    with pytest.raises(ConfigError, match=r"engine\.gpus: 3 cards cannot share 4 heads equally"):
        settle(Config(kind="vllm", gpus=3), [spec], "float32", "engine")
    assert settle(Config(kind="vllm", gpus=2), [spec], "float32", "engine").tensor_parallel == 2


def test_cards_are_shares_of_one_or_whole() -> None:
    for gpus, tensor_parallel, is_eager in ((0, 1, True), (0.25, 1, False), (1, 1, False), (2, 2, False)):
        config = Config(kind="vllm", gpus=gpus)
        assert (config.tensor_parallel, config.is_eager) == (tensor_parallel, is_eager)
    assert Config(kind="vllm", gpus=1, enforce_eager=True).is_eager
    with pytest.raises(ConfigError, match=r"engine\.gpus: 1\.5: a fraction of one card, or a whole number"):
        registry.configure("engine", {"kind": "vllm", "gpus": 1.5})
