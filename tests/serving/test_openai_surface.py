"""What OpenAI's clients may ask beside the plain answer: choices, penalties, echoes, names, embeddings, token ids."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from openai import LengthFinishReasonError, OpenAI
from pydantic import BaseModel, ValidationError

import ulm
from serve.engines.local.engine import Config, LocalEngine
from tests.openai_api import catalog_of, client_of, complete, echoes, events
from ulm.errors import ConfigError
from ulm.models.generate import prompt_tokens
from ulm.recipes.base import validate
from ulm.recipes.serve import Defaults, ServeRecipe
from ulm.swarm.manifest import Swarm

FLOAT32 = {"rel": 0.0, "abs": 2e-5}
DEFAULTS = {
    "cut": Defaults(top_k=5, min_p=0.1),
    "warm": Defaults(temperature=0.0, max_tokens=3),
    "e01": Defaults(max_tokens=5, temperature=0.0),
}


@pytest.fixture(scope="module")
def client(swarm: Swarm) -> Iterator[TestClient]:
    engine = LocalEngine(Config(kind="local", device="cpu", threads=1, compile_after_steps=None))
    for name in swarm.members:
        asyncio.run(engine.load(name, str(swarm.checkpoint(name))))
    engines = dict.fromkeys(swarm.members, engine)
    aliases = {"cut": "e00", "gpt-4o": "swarm/route", "warm": "e00", "text-embedding-3-small": "seed"}
    with client_of(catalog_of(swarm, engines, aliases=aliases, defaults=DEFAULTS)) as made:
        yield made
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def official(client: TestClient) -> OpenAI:
    """The official client, over the application in this process."""
    return OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)


@pytest.fixture(scope="module")
def expert(swarm: Swarm) -> Any:
    return ulm.load(swarm.checkpoint("e00"))


@pytest.mark.parametrize("model", ["e00", "swarm/mixture"])
@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_the_draws_of_one_seed_after_another(client: TestClient, model: str, stream: bool) -> None:
    hot = {"model": model, "temperature": 1.0, "max_tokens": 8}
    alone = [complete(client, **hot, seed=seed)["choices"][0]["text"] for seed in (7, 8, 9)]
    if stream:
        body = {"prompt": "The", "n": 3, "seed": 7, **hot}
        found = ["", "", ""]
        for piece in events(client, "/v1/completions", body):
            for choice in piece["choices"]:
                found[choice["index"]] += choice["text"]
    else:
        answer = complete(client, n=3, seed=7, **hot)
        found = [choice["text"] for choice in answer["choices"]]
        assert answer["usage"]["completion_tokens"] == sum(call["tokens_out"] for call in answer["ulm"]["calls"]) // (
            len({call["member"] for call in answer["ulm"]["calls"]})
        )
    assert found == alone and len(set(found)) == 3


def test_the_best_of_several_draws_is_the_likeliest(client: TestClient) -> None:
    hot = {"temperature": 1.5, "max_tokens": 6, "logprobs": 0}
    draws = [complete(client, **hot, seed=seed)["choices"][0] for seed in range(4)]
    best = max(draws, key=lambda choice: np.mean(choice["logprobs"]["token_logprobs"]))
    answer = complete(client, **hot, seed=0, best_of=4)
    (found,) = answer["choices"]
    assert found["text"] == best["text"]
    drawn = sum(len(draw["logprobs"]["tokens"]) for draw in draws)
    assert answer["usage"]["completion_tokens"] == drawn, "those that were not given were work, too"


MANY = 200_000
MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("completions", {"prompt": [{}] * MANY}),
    ("completions", {"prompt": [[{}] * MANY] * 2}),
    ("completions", {"prompt": "a", "stop": [0] * MANY}),
    ("completions", {"prompt": "a", "logit_bias": {f"a{n}": 0 for n in range(MANY)}}),
    ("completions", {"prompt": "a", "ulm": {"members": [0] * MANY}}),
    ("completions", {"prompt": "a", "ulm": {"budget": {f"a{n}": 0 for n in range(MANY)}}}),
    ("completions", {"prompt": "a", **{f"a{n}": 0 for n in range(MANY)}}),
    ("chat/completions", {"messages": [{}] * MANY}),
    ("chat/completions", {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    ("chat/completions", {"messages": [{"role": "user", "content": "", **{f"a{n}": 0 for n in range(MANY)}}]}),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": ""}], "metadata": {f"a{n}": 0 for n in range(MANY)}},
    ),
    ("responses", {"input": [{}] * MANY}),
    ("responses", {"input": "a", "include": ["a"] * MANY}),
    ("responses", {"input": "a", "metadata": {f"a{n}": 0 for n in range(MANY)}}),
    ("embeddings", {"input": [{}] * MANY}),
    ("tokenize", {"messages": [{}] * MANY}),
    ("detokenize", {"tokens": [-1] * MANY}),
]


@pytest.mark.parametrize(
    ("path", "body"), MISTAKES, ids=lambda given: given if isinstance(given, str) else ",".join(given)[:30]
)
def test_a_body_of_many_mistakes_is_refused_for_the_first(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    """An error for each would take a minute and gigabytes for 4 MB of them."""
    counted: list[int] = []
    errors_of = RequestValidationError.errors

    def errors(error: RequestValidationError) -> Any:
        counted.append(len(errors_of(error)))
        return errors_of(error)

    monkeypatch.setattr(RequestValidationError, "errors", errors)
    assert client.post(f"/v1/{path}", json={"model": "e00", **body}).status_code == 400
    assert counted and counted[0] <= 4, "one for each form that a field may have"


SETTINGS: list[dict[str, Any]] = [
    {"frequency_penalty": 1.5},
    {"presence_penalty": -2.0},
    {"repetition_penalty": 1.7},
    {"temperature": 1.0, "min_p": 0.2, "seed": 3},
    {"temperature": 0.7, "top_k": 5, "seed": 4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_every_setting_gives_what_the_plain_generator_gives(
    client: TestClient, expert: Any, settings: dict[str, Any]
) -> None:
    oracle = ulm.generate(*expert, "The", max_tokens=20, **settings)
    assert complete(client, max_tokens=20, **settings)["choices"][0]["text"] == oracle.text


def test_a_bias_is_by_token_and_top_k_has_two_ways_to_say_all(client: TestClient, expert: Any) -> None:
    banned = expert[1].encode(complete(client, max_tokens=1)["choices"][0]["text"])[0]
    found = complete(client, max_tokens=4, logit_bias={str(banned): -100})["choices"][0]["text"]
    assert found == ulm.generate(*expert, "The", max_tokens=4, logit_bias={banned: -100}).text
    forced = complete(client, max_tokens=3, logit_bias={str(banned): 100}, logprobs=0)["choices"][0]
    assert forced["text"] == expert[1].decode([banned] * 3)
    assert all(logprob < -0.01 for logprob in forced["logprobs"]["token_logprobs"][1:]), "the model's own, unbiased"
    hot = {"temperature": 1.0, "seed": 5}
    assert (
        len({complete(client, **hot, **more)["choices"][0]["text"] for more in ({}, {"top_k": -1}, {"top_k": 0})}) == 1
    )


def test_a_negative_seed_is_a_seed(client: TestClient) -> None:
    texts = [complete(client, temperature=1.0, seed=seed)["choices"][0]["text"] for seed in (-1, -1, -2)]
    assert texts[0] == texts[1] != texts[2]


# ---- echoes: what harnesses score with


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("given_as", ["text", "ids", "ids of a text's start"])
def test_an_echo_gives_the_prompt_with_the_log_probabilities_of_its_tokens(
    client: TestClient, expert: Any, stream: bool, given_as: str
) -> None:
    model, tokenizer = expert
    text = "Return the value"
    as_ids = given_as != "text"
    tokens = tokenizer.encode(text) if given_as == "ids" else prompt_tokens(tokenizer, text)
    body = {"model": "e00", "prompt": tokens if as_ids else text, "echo": True, "logprobs": 2, "max_tokens": 2}
    if stream:
        choices = [piece["choices"][0] for piece in events(client, "/v1/completions", {**body, "temperature": 0})]
        found = {
            "text": "".join(choice["text"] for choice in choices),
            "logprobs": {
                name: [entry for choice in choices for entry in choice["logprobs"][name]]
                for name in choices[0]["logprobs"]
            },
        }
    else:
        found = complete(client, **body)["choices"][0]
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([tokens]))[0].log_softmax(-1)
    expected = [float(logprobs_TV[i, token]) for i, token in enumerate(tokens[1:])]
    shown = tokens if as_ids else tokens[1:]
    logprobs = found["logprobs"]
    assert found["text"].startswith(text) and "".join(logprobs["tokens"]) == found["text"]
    assert logprobs["tokens"][: len(shown)] == [tokenizer.decode([token]) for token in shown]
    given = logprobs["token_logprobs"][: len(shown)]
    if as_ids:  # nothing stands before the first
        assert given.pop(0) is None and logprobs["top_logprobs"][0] is None
    assert given == pytest.approx(expected, **FLOAT32)
    offsets = np.cumsum([0, *map(len, logprobs["tokens"][:-1])]).tolist()
    assert logprobs["text_offset"] == offsets and len(logprobs["tokens"]) == len(shown) + 2


def test_an_echo_alone_generates_nothing_and_a_mixtures_is_the_mixtures(client: TestClient, swarm: Swarm) -> None:
    alone = complete(client, prompt="The value of", echo=True, logprobs=0, max_tokens=0)
    (choice,) = alone["choices"]
    assert choice["text"] == "The value of" and alone["usage"]["completion_tokens"] == 0
    assert choice["finish_reason"] == "length" and None not in choice["logprobs"]["token_logprobs"]
    weighed = {"model": "swarm/mixture", "ulm": {"top_k": 3}, "prompt": "The value of", "echo": True, "logprobs": 0}
    mixed = complete(client, **weighed, max_tokens=1)
    weights = {call["member"]: call["weight"] for call in mixed["ulm"]["calls"]}
    models = {name: ulm.load(swarm.checkpoint(name)) for name in weights}
    tokens = prompt_tokens(next(iter(models.values()))[1], "The value of")
    with torch.no_grad():
        p_TV = sum(w * models[name][0](torch.tensor([tokens]))[0].softmax(-1) for name, w in weights.items())
    expected = [float(p_TV[i, token].log()) for i, token in enumerate(tokens[1:])]
    found = mixed["choices"][0]["logprobs"]["token_logprobs"][: len(expected)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_each_choice_has_the_echo_and_each_member_of_a_broadcast_its_own(client: TestClient) -> None:
    body = {"prompt": "The value", "echo": True, "logprobs": 0, "max_tokens": 2}
    twice = complete(client, **body, n=2, temperature=1.0)["choices"]
    assert [c["text"].startswith("The value") for c in twice] == [True, True]
    assert twice[0]["logprobs"]["token_logprobs"][:2] == twice[1]["logprobs"]["token_logprobs"][:2]
    members = ("e00", "e01")
    both = complete(client, **body, model="swarm/broadcast", ulm={"members": members})["choices"]
    alone = [complete(client, **body, model=member)["choices"][0] for member in members]
    for choice, one in zip(both, alone, strict=True):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(one["logprobs"]["token_logprobs"], **FLOAT32)


# ---- names and defaults


def test_an_alias_answers_under_its_own_name_and_says_what_it_stands_for(client: TestClient) -> None:
    listed = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert (listed["gpt-4o"]["root"], listed["e00"]["root"]) == ("swarm/route", "e00")
    assert client.get("/v1/models/gpt-4o").json() == listed["gpt-4o"]
    answer = complete(client, model="gpt-4o")
    assert (answer["model"], answer["ulm"]["strategy"]) == ("gpt-4o", "route")
    missing = client.get("/v1/models/gpt-5")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_defaults_hold_where_a_request_says_nothing(client: TestClient) -> None:
    def asked(model: str, path: str = "/v1/completions", **more: Any) -> Any:
        body = {"model": model, **({"prompt": "The"} if path == "/v1/completions" else {}), **more}
        return client.post(path, json=body).json()

    greedy = complete(client, max_tokens=3)["choices"][0]["text"]
    assert asked("warm")["choices"][0]["text"] == greedy
    assert asked("warm", max_tokens=2)["usage"]["completion_tokens"] == 2
    assert asked("e00")["usage"]["completion_tokens"] == 16, "the alias has defaults, not its model"
    hot = [asked("warm", temperature=1.0, seed=seed, max_tokens=8)["choices"][0]["text"] for seed in range(4)]
    assert len(set(hot)) > 1
    assert asked("cut", temperature=0, max_tokens=3)["choices"][0]["text"] == greedy, (
        "cuts are nothing to greedy answers"
    )
    messages = [{"role": "user", "content": "Hi"}]
    chat = {"path": "/v1/chat/completions", "messages": messages}
    assert asked("e01", **chat)["usage"]["completion_tokens"] <= 5
    assert asked("e01", **chat, max_completion_tokens=2)["usage"]["completion_tokens"] <= 2


def test_names_that_lead_nowhere_are_refused(swarm: Swarm) -> None:
    with pytest.raises(ConfigError, match=r"aliases.gpt-4: no model 'swarm/rote' is served \(did you mean"):
        catalog_of(swarm, echoes(swarm), aliases={"gpt-4": "swarm/rote"})
    with pytest.raises(ConfigError, match=r"defaults.e09: no such model is served"):
        catalog_of(swarm, echoes(swarm), defaults={"e09": Defaults()})
    for wrong in ({"aliases": {"a b": "e00"}}, {"defaults": {"e00": {"temperature": 3}}}, {"aliases": {"": "e00"}}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            validate(ServeRecipe, {"name": "x", "swarm": "x", **wrong})


# ---- token ids and embeddings


def test_token_ids_are_those_that_completions_read(client: TestClient, expert: Any) -> None:
    tokenizer = expert[1]
    for path in ("/v1/tokenize", "/tokenize"):
        found = client.post(path, json={"model": "e00", "prompt": "Grüße, 😀", "return_token_strs": True}).json()
        assert found["tokens"] == prompt_tokens(tokenizer, "Grüße, 😀") and found["count"] == len(found["tokens"])
        assert found["max_model_len"] == 96 and found["token_strs"][0] == "<|endoftext|>"
    back = client.post("/v1/detokenize", json={"model": "e00", "tokens": found["tokens"]}).json()
    assert back == {"prompt": "Grüße, 😀"}
    plain = client.post("/v1/tokenize", json={"model": "e00", "prompt": "", "add_special_tokens": False}).json()
    assert plain["tokens"] == []
    chat = {"model": "swarm", "messages": [{"role": "user", "content": "Hi <|endoftext|>"}]}
    as_chat = client.post("/v1/tokenize", json=chat).json()
    answer = client.post("/v1/chat/completions", json={**chat, "max_tokens": 1}).json()
    assert as_chat["count"] == answer["usage"]["prompt_tokens"]
    assert as_chat["tokens"].count(tokenizer.eot_id) == 1, "what a message says stays text"
    for body in ({"prompt": "a", **chat}, {"model": "e00"}, {"model": "e00", "messages": []}):
        assert client.post("/v1/tokenize", json=body).status_code == 400
    assert client.post("/v1/detokenize", json={"model": "e00", "tokens": [512]}).json()["error"]["param"] == "tokens"
    assert client.post("/v1/detokenize", json={"model": "e00", "tokens": [-1]}).status_code == 400


def test_an_embedding_is_the_models_mean_state_of_length_one(official: OpenAI, swarm: Swarm) -> None:
    model, tokenizer = ulm.load(swarm.checkpoint("seed"))
    texts = ["import json", "The value of a string"]
    for encoding in ("float", "base64"):
        found = official.embeddings.create(model="text-embedding-3-small", input=texts, encoding_format=encoding)
        for text, item in zip(texts, found.data, strict=True):
            with torch.no_grad():
                state_D = model.hidden(torch.tensor([prompt_tokens(tokenizer, text)]))[0].mean(0)
            raw = item.embedding
            given = np.frombuffer(base64.b64decode(raw), "<f4") if isinstance(raw, str) else np.array(raw)
            assert given == pytest.approx((state_D / state_D.norm()).numpy(), abs=1e-5)
        assert found.usage.prompt_tokens == sum(len(prompt_tokens(tokenizer, text)) for text in texts)


def test_wrong_embeddings_are_refused_by_name(client: TestClient, swarm: Swarm) -> None:
    def refused(**change: Any) -> Any:
        response = client.post("/v1/embeddings", json={"model": "e00", "input": "a", **change})
        assert response.status_code == 400, response.text
        return response.json()["error"]

    assert "several; ask a member, such as e00" in refused(model="swarm")["message"]
    assert refused(dimensions=3)["param"] == "dimensions"
    assert refused(input="word " * 500)["code"] == "context_length_exceeded"
    for wrong in ([], "", [""], ["a"] * 65, [[]], [-1], {"a": 1}):
        refused(input=wrong)
    whole = client.post("/v1/embeddings", json={"model": "e00", "input": [5] * 96})
    assert whole.status_code == 200, "a text may fill the context"


# ---- the official client


def test_the_official_client_reads_every_kind_of_answer(official: OpenAI) -> None:
    listed = {model.id: model for model in official.models.list()}
    assert {"swarm", "gpt-4o", "e00"} <= set(listed) and all(model.created for model in listed.values())
    messages: Any = [{"role": "user", "content": "Hi"}]
    asked: dict[str, Any] = {"model": "gpt-4o", "messages": messages, "max_completion_tokens": 6, "temperature": 0}
    chat = official.chat.completions.create(**asked, logprobs=True, top_logprobs=2, user="me", n=1)
    text = chat.choices[0].message.content
    assert chat.usage and chat.usage.completion_tokens <= 6 and chat.choices[0].logprobs
    with official.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.current_completion_snapshot.usage == chat.usage
    assert said == text
    legacy = official.completions.create(model="e00", prompt="The", max_tokens=4, logprobs=1, echo=True, temperature=0)
    assert legacy.choices[0].text.startswith("The") and legacy.choices[0].logprobs


def test_a_response_is_the_chats_answer_whole_and_by_events(official: OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = official.chat.completions.create(model="e00", messages=messages, max_tokens=6, temperature=0)
    asked: dict[str, Any] = {"model": "e00", "instructions": "Be brief.", "input": "Hi", "max_output_tokens": 6}
    whole = official.responses.create(**asked, temperature=0, top_logprobs=2, metadata={"a": "b"})
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.status, whole.incomplete_details and whole.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert whole.usage and chat.usage and whole.usage.input_tokens == chat.usage.prompt_tokens
    assert (whole.metadata, whole.instructions, whole.max_output_tokens) == ({"a": "b"}, "Be brief.", 6)
    (message,) = whole.output
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs
    assert logprobs and len(logprobs) == 6 and all(len(entry.top_logprobs) == 2 for entry in logprobs)
    seen = list(official.responses.create(**asked, temperature=0, stream=True))
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    deltas = [event for event in seen if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text and len(deltas) > 1
    order = [event.type for event in seen if event.type != "response.output_text.delta"]
    assert order == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    last: Any = seen[-1]
    assert last.response.output_text == whole.output_text and last.response.usage == whole.usage
    ids = {event.item_id for event in deltas}
    assert ids == {last.response.output[0].id}, "one message under one id"
    again: Any = [{"role": "user", "content": "Hi"}, *whole.output, {"role": "user", "content": "And?"}]
    longer = official.responses.create(model="e00", input=again, max_output_tokens=2)
    assert longer.usage and longer.usage.input_tokens > whole.usage.input_tokens


def test_a_response_that_ends_by_itself_is_complete(swarm: Swarm) -> None:
    """An echo says the prompt again, in which the next message of a user ends it."""
    with client_of(catalog_of(swarm, echoes(swarm))) as http:
        client = OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)
        said: Any = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
        with client.responses.stream(model="e00", input=said) as stream:
            found: Any = stream.get_final_response()
    assert (found.status, found.incomplete_details, found.output[0].status) == ("completed", None, "completed")


class Book(BaseModel):
    title: str


def test_what_the_stream_helpers_make_of_an_answer_that_was_cut(official: OpenAI) -> None:
    """As docs/endpoint.md tells: asked for the whole they raise, as OpenAI's own answers would have them."""
    with official.responses.stream(model="e00", input="Hi", max_output_tokens=3, temperature=0) as responses:
        assert [event.type for event in responses][-1] == "response.incomplete"
        with pytest.raises(RuntimeError, match=r"Didn't receive a `response\.completed` event"):
            responses.get_final_response()
    messages: Any = [{"role": "user", "content": "Hi"}]
    asked: dict[str, Any] = {"model": "e00", "messages": messages, "max_completion_tokens": 3, "temperature": 0}
    with official.chat.completions.stream(**asked) as chat:
        assert [event.type for event in chat][-1] == "content.done"
        assert chat.current_completion_snapshot.choices[0].finish_reason == "length"
        with pytest.raises(LengthFinishReasonError):
            chat.get_final_completion()
    with (
        pytest.raises(LengthFinishReasonError),
        official.chat.completions.stream(**asked, response_format=Book) as chat,
    ):
        chat.until_done()
    with (
        pytest.raises(ValidationError),
        official.responses.stream(model="e00", input="Hi", max_output_tokens=3, text_format=Book) as responses,
    ):
        responses.until_done()


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_message_with_more_than_text_is_told_that_only_text_is_read(client: TestClient, role: str) -> None:
    text = "only text is read here"
    image = {"type": "image_url", "image_url": {"url": "data:geheim"}}
    for path, place, parts in (
        ("chat/completions", "messages", [{"type": "text", "text": "What is it?"}, image]),
        ("chat/completions", "messages", [{"type": "input_audio", "input_audio": {"data": "geheim"}}]),
        ("tokenize", "messages", [{"type": "file", "file": {"file_id": "geheim"}}]),
        ("responses", "input", [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "geheim"}]),
        ("responses", "input", [{"type": "geheim"}]),
    ):
        body = {"model": "e00", place: [{"role": role, "content": parts}]}
        refused = client.post(f"/v1/{path}", json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, place) and text in error["message"], error
        assert "geheim" not in refused.text
    others: list[Any] = [7, [7], [{}], [{"type": 7}], [{"type": "text"}], None]
    for path, place in (("chat/completions", "messages"), ("responses", "input")):
        for content in others:
            refused = client.post(f"/v1/{path}", json={"model": "e00", place: [{"role": role, "content": content}]})
            assert refused.status_code == 400 and text not in refused.text, "that is another mistake"


def test_a_response_of_several_members_has_a_message_of_each(client: TestClient) -> None:
    body = {"model": "swarm/broadcast", "input": "Hi", "max_output_tokens": 3, "temperature": 0}
    found = client.post("/v1/responses", json=body).json()
    assert len(found["output"]) == 4 and len({item["id"] for item in found["output"]}) == 4
    assert found["ulm"]["strategy"] == "broadcast"


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"input": ""}, None),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "word " * 500}, "prompt"),
    ],
)
def test_what_a_response_cannot_be_is_refused(client: TestClient, change: dict[str, Any], place: str | None) -> None:
    response = client.post("/v1/responses", json={"model": "e00", "input": "Hi", **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == place
