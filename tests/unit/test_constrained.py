"""Answers that are JSON of a schema: the oracle's tokens, valid JSON, and what is refused before it costs much."""

from __future__ import annotations

import asyncio
import json
import string
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ulm
from serve import constrained
from serve.constrained import ANY_OBJECT, MAX_INTEGER, MAX_SCHEMA_BYTES, MAX_USES, Constraint, Grammars, schema_text
from serve.contracts import GenerateRequest, Ledger, Member, SwarmContext, TokenChunk
from serve.engines.echo import Config as EchoConfig
from serve.engines.echo import EchoEngine
from serve.engines.local.engine import LocalEngine
from serve.engines.local.sampler import Row, choose_all
from serve.strategies._account import Account
from serve.strategies._windows import Chosen, Drive, choices
from tests.engine import answer, answers, with_engine
from tests.small_members import LINEAR, a_prompt, small_member, small_model
from ulm.errors import OverloadedError, RequestError, UlmError, UnsupportedError
from ulm.models.sampling import Sampling, choose
from ulm.recipes.serve import Budget
from ulm.swarm.mixture import mix_logprobs
from ulm.tokenizers.bpe import train_bpe
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.char import char_tokenizer
from ulm.tokenizers.tokenizer import Tokenizer

CONTEXT = 512
BYTES = byte_tokenizer()
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b", "long one"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TEXTS = [json.dumps(PERSON, indent=2), '{"name": "x", "age": 3, "kind": "a", "tags": ["b"]}'] * 4
# What makes random weights close what they open.
CLOSING = tuple((BYTES.encode(char)[0], 4.0) for char in '"}]')


def request(schema: Any = PERSON, number: int = 0, **fields: Any) -> GenerateRequest:
    text = schema if isinstance(schema, str) else schema_text(schema)
    asked = {"tokens": a_prompt(number, 9), "weights": {"m": 1.0}, "max_tokens": 200, "json_schema": text}
    return GenerateRequest(**{**asked, **fields})


def begun(tokenizer: Tokenizer, schema: Any = PERSON) -> Constraint:
    return asyncio.run(Grammars().begin(tokenizer, schema_text(schema)))


def oracle(models: dict[str, Any], tokenizer: Tokenizer, asked: GenerateRequest) -> tuple[list[int], list[float], str]:
    """Tokens, log-probabilities and the end: one text at a time, all of it read again for every token."""
    assert asked.json_schema is not None
    constraint, tokens, logprobs = begun(tokenizer, json.loads(asked.json_schema)), list[int](), list[float]()
    weight_N = torch.tensor(list(asked.weights.values()), dtype=torch.float64)
    while len(tokens) < asked.max_tokens:
        text_BT = torch.tensor([[*asked.tokens, *tokens]])
        with torch.no_grad():
            rows_NV = torch.stack([models[member](text_BT)[0, -1].float() for member in asked.weights])
        mixed_V = mix_logprobs(rows_NV.log_softmax(-1), weight_N / weight_N.sum())
        logits_V = rows_NV[0] if len(rows_NV) == 1 else mixed_V
        scores_V = torch.tensor(
            [score if may else -torch.inf for score, may in zip(logits_V, constraint.allowed(), strict=True)]
        )
        token = choose(scores_V, asked.sampling, len(tokens), asked.tokens, tokens)
        if token == tokenizer.eot_id:
            return tokens, logprobs, "stop"
        tokens.append(token)
        logprobs.append(float(logits_V.log_softmax(-1)[token]))
        constraint.append(token)
        if constraint.is_whole:
            return tokens, logprobs, "stop"
    return tokens, logprobs, "length"


SAMPLINGS = {
    "greedy": Sampling(),
    "open": Sampling(temperature=1.0, seed=3),
    "nucleus": Sampling(temperature=1.5, top_p=0.8, seed=4),
    "cut": Sampling(temperature=1.0, top_k=300, min_p=0.01, seed=5),
    "few": Sampling(temperature=1.0, top_k=3, seed=6),
    "changed": Sampling(
        temperature=0.7, repetition_penalty=1.2, frequency_penalty=0.5, logit_bias=((34, 3.0), (65, -50.0)), seed=7
    ),
}
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte": byte_tokenizer,
    "bpe": lambda: train_bpe(TEXTS, 300, ["<|user|>"]),
    "char": lambda: char_tokenizer([string.printable]),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_answer_is_the_oracles_and_json_of_the_schema(tmp_path: Path, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    size = {"vocab_size": tokenizer.vocab_size, "context_tokens": CONTEXT}
    models = {name: small_model(seed, **size) for seed, name in enumerate("mn")}
    paths = {name: small_member(tmp_path, seed, tokenizer, **size) for seed, name in enumerate("mn")}
    prompt = tuple(3 + t % 90 for t in a_prompt(1, 7))
    asked = [
        replace(request(sampling=sampling, num_top_logprobs=2), tokens=prompt, weights=weights, max_tokens=120)
        for sampling in SAMPLINGS.values()
        for weights in ({"m": 1.0}, {"m": 1.0, "n": 2.0})
    ]
    free = replace(asked[2], json_schema=None)

    async def body(engine: LocalEngine) -> Any:
        together = await asyncio.gather(*(answer(engine, one) for one in [*asked, free]))
        return together, await answer(engine, free)

    (*found, beside), alone = with_engine(paths, body)
    assert beside == alone  # a row without a constraint is not touched
    ends = set[str]()
    for one, chunk in zip(asked, found, strict=True):
        tokens, logprobs, end = oracle(models, tokenizer, one)
        assert (list(chunk.tokens), chunk.finish_reason) == (tokens, end)
        assert [entry.logprob for entry in chunk.logprobs] == pytest.approx(logprobs, abs=1e-4)
        ends.add(end)
        if end == "stop":
            jsonschema.validate(json.loads(chunk.text), PERSON)
    assert "stop" in ends
    assert any(entry.top[0][0] != entry.token for entry in found[0].logprobs)  # forbidden, and the likeliest still


# ---- any schema


NAMES = st.text(string.ascii_letters + 'é"\\ {', min_size=1, max_size=6)
INTEGERS = st.integers(-MAX_INTEGER, MAX_INTEGER)
LEAVES = st.one_of(
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 9)),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)}, *[st.integers(-999, 999)] * 2
    ),
    st.builds(lambda a, b: {"type": "number", "minimum": a, "maximum": a + b}, *[st.integers(0, 99)] * 2),
    st.builds(lambda multiple: {"type": "integer", "multipleOf": multiple, "maximum": 10**6}, st.integers(1, 30)),
    st.builds(lambda values: {"enum": values}, st.lists(NAMES | INTEGERS | st.none(), min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, st.dictionaries(NAMES, INTEGERS | st.booleans(), max_size=2)),
    st.sampled_from([{"type": "string", "pattern": "^[a-f]{2,4}-[0-9]+$"}, {"type": "string", "format": "date"}]),
)


def _object(parts: dict[str, Any], needed: int, more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": parts, "required": list(parts)[:needed], "additionalProperties": more}


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(_object, st.dictionaries(NAMES, inner, max_size=4), st.integers(0, 4), inner | st.booleans()),
        st.builds(
            lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
            inner,
            st.integers(0, 2),
            st.integers(0, 3),
        ),
        st.builds(
            lambda parts: {"type": "array", "prefixItems": parts, "items": False},
            st.lists(inner, min_size=1, max_size=3),
        ),
        st.builds(lambda values: {"type": "object", "patternProperties": {"^x[0-9]$": values}}, inner),
        st.builds(
            lambda values, most: {"additionalProperties": values, "maxProperties": most}, inner, st.integers(0, 2)
        ),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=8,
)


def test_whatever_the_schema_a_whole_answer_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.constrained.tried", lambda schema: "")  # a process for each would take minutes
    member = small_member(tmp_path, context_tokens=CONTEXT)
    ended = list[str]()

    async def body(engine: LocalEngine) -> None:
        loop = asyncio.get_running_loop()

        @settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(st.lists(SCHEMAS, min_size=4, max_size=4), st.integers(0, 2**31))
        def some(schemas: list[Any], seed: int) -> None:
            asked = [
                request(s, sampling=Sampling(temperature=1.0, seed=seed, logit_bias=CLOSING), max_tokens=300)
                for s in schemas
            ]
            together = asyncio.run_coroutine_threadsafe(_all(engine, asked), loop)
            for schema, chunk in zip(schemas, together.result(60), strict=True):
                ended.append(chunk.finish_reason or "")
                if chunk.finish_reason == "stop":
                    jsonschema.validate(json.loads(chunk.text), schema)

        await asyncio.to_thread(some)

    with_engine({"m": member}, body)
    assert ended.count("stop") > 0.8 * len(ended) >= 100


async def _all(engine: LocalEngine, asked: list[GenerateRequest]) -> list[TokenChunk]:
    return await asyncio.gather(*(answer(engine, one) for one in asked))


# ---- with what else a request may set


def test_choices_stop_strings_and_the_best_of_several_go_with_it(tmp_path: Path) -> None:
    member = small_member(tmp_path, context_tokens=CONTEXT)
    drawn = Sampling(temperature=1.0, seed=1, logit_bias=CLOSING)

    async def body(engine: LocalEngine) -> None:
        several = await answers(engine, request(sampling=drawn, n=4))
        assert len({chunk.text for chunk in several}) == 4
        for chunk in several:
            jsonschema.validate(json.loads(chunk.text), PERSON)
        best = await answers(engine, request(sampling=drawn, n=1, best_of=4, stream=False))
        assert best[0].text in {chunk.text for chunk in several}
        stopped = await answer(engine, request(sampling=drawn, stop=('"age"',)))
        assert stopped.text == several[0].text.partition('"age"')[0] and stopped.finish_reason == "stop"
        with pytest.raises(RequestError, match="no JSON") as refused:
            await answer(engine, request(echo=True))
        assert refused.value.param == "echo"

    with_engine({"m": member}, body)


@pytest.mark.parametrize("overrides", [{}, LINEAR], ids=["pages", "rows"])
def test_an_answer_goes_on_where_another_stopped(tmp_path: Path, overrides: dict[str, Any]) -> None:
    member = small_member(tmp_path, context_tokens=CONTEXT, **overrides)
    asked = request(sampling=Sampling(temperature=1.0, seed=5, logit_bias=CLOSING))

    async def body(engine: LocalEngine) -> None:
        whole = await answer(engine, asked)
        assert whole.finish_reason == "stop"
        for cut in (1, 3, len(whole.tokens) - 1):
            rest = await answer(engine, replace(asked, generated=whole.tokens[:cut]))
            assert (rest.tokens, rest.finish_reason) == (whole.tokens[cut:], "stop")
        ended = await answer(engine, replace(asked, generated=whole.tokens))
        assert (ended.tokens, ended.finish_reason) == ((), "stop")
        with pytest.raises(RequestError, match="no beginning of JSON") as refused:
            await answer(engine, replace(asked, generated=(65,)))
        assert refused.value.param == "generated"

    with_engine({"m": member}, body)


def test_members_of_several_engines_give_the_one_engines_answer(tmp_path: Path) -> None:
    paths = {name: small_member(tmp_path, seed, context_tokens=CONTEXT) for seed, name in enumerate("mn")}
    sampling = Sampling(temperature=1.0, seed=2, logit_bias=CLOSING)
    asked = replace(request(sampling=sampling), weights={"m": 0.3, "n": 0.7})

    async def body(engine: LocalEngine) -> None:
        whole = await answer(engine, asked)

        async def apart(other: LocalEngine) -> list[TokenChunk]:
            members = {n: Member(n, e, BYTES, CONTEXT) for n, e in (("m", engine), ("n", other))}
            return await driven(asked, members, lambda number: asked.weights, every_tokens=5)

        other = LocalEngine(engine.config)
        try:
            await other.load("n", str(paths["n"]))
            found = TokenChunk.joined(await apart(other))
        finally:
            await other.close()
        assert (found.text, found.tokens, found.finish_reason) == (whole.text, whole.tokens, "stop")

    with_engine(paths, body)


def test_a_member_with_another_vocabulary_goes_on_within_the_json(tmp_path: Path) -> None:
    other = train_bpe(TEXTS, 300)
    paths = {
        "m": small_member(tmp_path, 0, context_tokens=CONTEXT),
        "n": small_member(tmp_path, 1, other, vocab_size=other.vocab_size, context_tokens=CONTEXT),
    }

    async def body(engine: LocalEngine) -> list[TokenChunk]:
        members = {"m": Member("m", engine, BYTES, CONTEXT), "n": Member("n", engine, other, CONTEXT)}
        asked = request(sampling=Sampling(temperature=1.0, seed=4, top_k=20), max_tokens=400)
        return await driven(asked, members, lambda number: {"mn"[number % 2]: 1.0}, every_tokens=7)

    found = TokenChunk.joined(with_engine(paths, body))
    assert found.finish_reason == "stop"
    jsonschema.validate(json.loads(found.text), PERSON)


async def driven(
    asked: GenerateRequest, members: dict[str, Member], weights: Callable[[int], Any], every_tokens: int
) -> list[TokenChunk]:
    """An answer whose windows are given to whom `weights` says."""
    number = -1

    async def choose_next(*_: Any) -> Chosen:
        nonlocal number
        number += 1
        return Chosen(dict(weights(number)), "asked")

    drive = Drive(asked, members, SwarmContext(), Account("test", Budget()), choose_next, every_tokens)
    return [item async for item in choices(drive) if not isinstance(item, Ledger)]


def test_an_engine_that_says_its_prompt_says_so(tmp_path: Path) -> None:
    async def body() -> None:
        engine = EchoEngine(EchoConfig(kind="echo"))
        await engine.load("m", str(small_member(tmp_path)))
        with pytest.raises(UnsupportedError, match="json_schema: the echo engine"):
            await anext(aiter(engine.generate(request(max_tokens=3))))

    asyncio.run(body())


# ---- hostile schemas


def nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED: dict[str, tuple[Any, str]] = {
    "too long": ({"enum": ["x" * MAX_SCHEMA_BYTES]}, "are the most"),
    "too deep": (nested(70), "deeper than 64"),
    "deeper than Python": (nested(700), "deeper than 64"),
    "no exact number": ({"const": MAX_INTEGER + 1}, "9007199254740993, which is beyond"),
    "no schema": ({"properties": {"a": 3}}, "properties.a is no schema"),
    "unknown keyword": ({"type": "object", "requierd": ["a"]}, "requierd: this keyword is not supported"),
    "deep unknown keyword": ({"anyOf": [{"items": {"oops": 1}}]}, "anyOf.0.items.oops: this keyword"),
    "keyword that is not done": ({"not": {"type": "string"}}, "not: this keyword is not supported"),
    "llguidance's own options": ({"x-guidance": {"lenient": True}}, "x-guidance: this keyword"),
    "remote reference": ({"$ref": "http://127.0.0.1:9/a.json"}, "not present in a registry"),
    "file": ({"$ref": "file:///etc/passwd"}, "not present in a registry"),
    "reference to nothing": ({"$ref": "#/$defs/a"}, "does not exist"),
    "reference to itself": ({"$ref": "#"}, "no text is as it asks for"),
    "no value": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    "no type": ({"type": "frog"}, "Invalid type: frog"),
    "unknown format": ({"type": "string", "format": "zip-code"}, "Unknown format"),
    "no regular expression": ({"type": "string", "pattern": "("}, "unclosed group"),
    "look-around": ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    "many branches": ({"anyOf": [{"const": n} for n in range(51)]}, "no list of up to 50"),
    "overlapping oneOf": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf constraints"),
    "many items": ({"type": "array", "maxItems": 10**6}, "takes too long or too much memory"),
    "large multiple": ({"type": "integer", "multipleOf": 1_234_567}, "takes too long or too much memory"),
    "many patterns": (
        {"type": "string", "allOf": [{"pattern": f".*{c}.{{{n}}}"} for n, c in enumerate(string.ascii_letters[:20])]},
        "takes too long or too much memory",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_schema_is_refused_before_it_costs_much(name: str) -> None:
    schema, problem = REFUSED[name]
    stalls = list[float]()

    async def body() -> None:
        asked = request(schema)  # what the endpoint does first
        asked.check()
        beating = asyncio.create_task(beat(stalls))
        try:
            await Grammars().begin(BYTES, asked.json_schema or "")
        finally:
            beating.cancel()

    with pytest.raises(RequestError, match="json_schema: .*" + problem.replace("$", r"\$")) as refused:
        asyncio.run(body())
    assert refused.value.param == "json_schema"
    assert len(str(refused.value)) < 400
    assert max(stalls, default=0.0) < 1.0  # others' requests go on meanwhile; a second, for the machine may be busy


async def beat(stalls: list[float]) -> None:
    while True:
        before_s = time.monotonic()
        await asyncio.sleep(0.01)
        stalls.append(time.monotonic() - before_s)


def test_a_tree_by_references_is_allowed() -> None:
    tree = {
        "$defs": {
            "node": {"type": "object", "properties": {"left": {"$ref": "#/$defs/node"}, "value": {"type": "null"}}}
        },
        "$ref": "#/$defs/node",
    }
    constraint = begun(BYTES, tree)
    for token in BYTES.encode('{"left": {"left":{}}, "value":null}'):
        assert constraint.allowed()[token] and not constraint.is_whole
        constraint.append(token)
    assert constraint.is_whole and constraint.may_end
    assert list(np.flatnonzero(constraint.allowed())) == [BYTES.eot_id]


def test_no_answer_stays_in_white_space() -> None:
    constraint = begun(BYTES, json.loads(ANY_OBJECT))
    for token in BYTES.encode('{"a": [1, 2,3],"b":{}, '):
        assert constraint.allowed()[token]
        constraint.append(token)
    assert [chr(token) for token in np.flatnonzero(constraint.allowed())] == ['"']


def test_a_schema_that_becomes_too_complex_ends_its_own_answer_alone(tmp_path: Path) -> None:
    pattern = "|".join(f".*[a-{'mnopq'[n % 5]}].{{{n}}}x" for n in range(300))
    hostile = {"type": "string", "pattern": pattern}

    async def body(engine: LocalEngine) -> None:
        asked = request(sampling=Sampling(temperature=1.0, seed=1, logit_bias=CLOSING))
        bad = request(hostile, sampling=Sampling(temperature=1.0, seed=1), n=3)
        alone = await answer(engine, asked)
        beside, refused = await asyncio.gather(answer(engine, asked), answers(engine, bad), return_exceptions=True)
        assert beside == alone
        assert isinstance(refused, RequestError) and "too complex to be followed" in str(refused)
        stats = await engine.stats()
        assert stats["running"] == stats["waiting"] == 0
        await engine.close()
        with pytest.raises(UlmError, match="was closed"):
            await answer(engine, asked)

    with_engine({"m": small_member(tmp_path, context_tokens=CONTEXT)}, body)


def test_an_answer_may_not_take_much_longer_to_follow_than_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.constrained.TOKEN_S", 1e-9)
    constraint = begun(BYTES)
    other, (first, *text) = constraint.copy(), BYTES.encode('{"name"')
    other.append(first)
    monkeypatch.setattr(constraint._allowance, "left_s", 1e-9)
    with pytest.raises(RequestError, match="takes too long to be followed"):
        for token in text:
            other.append(token)
            other.allowed()
    with pytest.raises(RequestError, match="takes too long"):  # all choices of an answer have one allowance
        constraint.allowed()


def test_new_schemas_that_take_long_keep_no_others_waiting_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial takes up to a second: whoever sends many new schemas would stop everybody's JSON else."""
    may_end = threading.Event()

    def slow(schema: str) -> str:
        if "slow" in schema:
            may_end.wait()
        return ""

    async def body() -> None:
        grammars, known = Grammars(), schema_text({"type": "string", "pattern": "a"})
        await grammars.begin(BYTES, known)
        new = [schema_text({"type": "string", "pattern": f"slow{n}"}) for n in range(constrained.MAX_WAITING + 1)]
        waiting = [asyncio.create_task(grammars.begin(BYTES, schema)) for schema in new[:-1]]
        await asyncio.sleep(0)
        for schema in (known, schema_text({"type": "string", "maxLength": 12})):
            assert (await asyncio.wait_for(grammars.begin(BYTES, schema), 30)).allowed().any()
        with pytest.raises(OverloadedError, match="16 new schemas wait to be compiled"):
            await grammars.begin(BYTES, new[-1])
        waiting.pop().cancel()
        may_end.set()
        assert len(await asyncio.gather(*waiting)) == constrained.MAX_WAITING - 1
        await grammars.begin(BYTES, new[-1])
        grammars.close()

    monkeypatch.setattr(constrained, "tried", slow)
    asyncio.run(body())


def test_compiled_schemas_are_kept_for_a_while() -> None:
    async def body() -> None:
        grammars, text = Grammars(), schema_text(PERSON)
        constraints = [await grammars.begin(BYTES, text) for _ in range(MAX_USES + 1)]
        compiled = [constraint._compiled for constraint in constraints]
        assert len(set(map(id, compiled))) == 2 and compiled[0] is compiled[MAX_USES - 1]
        compiled[-1].is_full = True
        assert (await grammars.begin(BYTES, text))._compiled is not compiled[-1]

    asyncio.run(body())


@pytest.mark.parametrize(("alphabet", "schema"), [("abc", PERSON), (string.printable, {"enum": ["é"]})])
def test_an_alphabet_that_cannot_spell_it_is_refused(alphabet: str, schema: Any) -> None:
    with pytest.raises(UnsupportedError, match="not in the vocabulary.*byte or bpe"):
        begun(char_tokenizer([alphabet]), schema)


def test_scores_that_are_no_numbers_end_an_answer_with_an_error(tmp_path: Path) -> None:
    row = Row(Sampling(temperature=1.0), allowed=np.array([False, True, True]))
    (token,) = choose_all(torch.full((1, 3), -torch.inf), [row])
    assert not row.may_take(token)
    constraint = begun(BYTES)
    for value in (torch.nan, -torch.inf):
        with pytest.raises(UlmError, match="no numbers"):
            constraint.masked(torch.full((BYTES.vocab_size,), value))
    path, spec = tmp_path / "broken", small_model().spec
    broken = ulm.build(spec)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(torch.inf)
    ulm.save(broken, BYTES, path)

    async def body(engine: LocalEngine) -> None:
        with pytest.raises(UlmError, match="no numbers"):
            await answer(engine, request(max_tokens=5, sampling=Sampling(temperature=1.0)))

    with_engine({"m": path}, body)
