"""What clients of OpenAI's API rely on, as checks of any endpoint, by the official Python client and plain HTTP.

A check takes an Endpoint and raises where it does not hold. `checked` runs them all; docs/conformance.md has the table
for ours, ray.serve.llm and vLLM (`ulm bench conformance`), and tests/serving/test_clients.py holds ours to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

TIMEOUT_S = 120.0
SHAPE = {"message", "type", "param", "code"}
YES_NO = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"]}
FORMAT = {"name": "answer", "schema": {**YES_NO, "additionalProperties": False}, "strict": True}
TALK: Any = [{"role": "user", "content": "The value of"}]
LEFT_OVER = 1e-3  # log-probabilities of one text asked twice may part by so much in float32


class Endpoint:
    """Where to ask, and for which model; `tokens` gives the ids of a text in its tokenizer."""

    def __init__(self, url: str, model: str, tokens: Callable[[str], list[int]]) -> None:
        self.url, self.model, self.tokens = url.rstrip("/"), model, tokens
        direct: Any = {"trust_env": False, "timeout": TIMEOUT_S}  # no proxy stands between
        self.http = httpx.Client(base_url=self.url, **direct)
        self.openai = openai.OpenAI(
            base_url=url, api_key="none", max_retries=0, http_client=httpx.Client(**direct), timeout=TIMEOUT_S
        )

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.openai.close()

    def complete(self, prompt: Any = "The value of", **more: Any) -> Any:
        """A greedy completion of eight tokens, unless said otherwise."""
        asked = {"model": self.model, "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
        return self.openai.completions.create(**asked)

    def chat(self, messages: Any = TALK, **more: Any) -> Any:
        """A greedy chat completion of eight tokens, unless said otherwise."""
        length = {} if "max_tokens" in more else {"max_completion_tokens": 8}
        asked = {"model": self.model, "messages": messages, "temperature": 0, **length, **more}
        return self.openai.chat.completions.create(**asked)

    def post(self, path: str, **body: Any) -> httpx.Response:
        """The raw answer."""
        return self.http.post(path, json={"model": self.model, **body})


Check = Callable[[Endpoint], None]


@dataclass(frozen=True)
class Said:
    """A check by name."""

    group: str
    what: str
    run: Check


CHECKS: list[Said] = []


def check(group: str, what: str) -> Callable[[Check], Check]:
    """Enter a check."""

    def enter(function: Check) -> Check:
        CHECKS.append(Said(group, what, function))
        return function

    return enter


def checked(at: Endpoint) -> Iterator[tuple[Said, str | None]]:
    """Each check, and what does not hold; None where all does."""
    for said in CHECKS:
        try:
            said.run(at)
        except Exception as error:  # noqa: BLE001  whatever a client meets is the result
            lines = str(error).strip().splitlines()
            yield said, f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
        else:
            yield said, None


def refused(answer: httpx.Response, status: int, **fields: Any) -> None:
    """A refusal in OpenAI's shape, with this status and these fields."""
    assert answer.status_code == status, f"{answer.status_code} in place of {status}"
    error = answer.json().get("error")
    assert isinstance(error, dict) and error.keys() >= SHAPE, f"not OpenAI's shape: {answer.text[:120]}"
    assert isinstance(error["message"], str) and error["message"], "no message"
    found = {name: error[name] for name in fields}
    assert found == fields, f"{found} in place of {fields}"


def events_of(answer: httpx.Response) -> list[str]:
    """The data of a stream."""
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.headers["content-type"]
    return [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]


# ---- models


@check("Models", "list: id, object, created, owned_by")
def _(at: Endpoint) -> None:
    cards = at.http.get("models").json()
    assert cards["object"] == "list" and cards["data"]
    for card in cards["data"]:
        assert card["object"] == "model" and isinstance(card["created"], int) and card["owned_by"]
    assert at.model in [card.id for card in at.openai.models.list()]


@check("Models", "one by its id")
def _(at: Endpoint) -> None:
    card = at.openai.models.retrieve(at.model)
    assert card.id == at.model and isinstance(card.created, int)


@check("Models", "an unknown one is 404 in OpenAI's shape")
def _(at: Endpoint) -> None:
    refused(at.http.get("models/nobody"), 404, code="model_not_found")


# ---- completions


@check("Completions", "a text is continued, with usage")
def _(at: Endpoint) -> None:
    answer = at.complete()
    (choice,) = answer.choices
    assert answer.object == "text_completion" and isinstance(choice.text, str)
    assert choice.finish_reason in ("stop", "length") and answer.model == at.model
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens <= 8


@check("Completions", "token ids are continued as their text is")
def _(at: Endpoint) -> None:
    ids = at.tokens("The value of")
    one, other = at.complete(ids), at.complete([ids])
    assert one.choices[0].text == other.choices[0].text and one.usage.prompt_tokens == len(ids)


@check("Completions", "several prompts, in order")
def _(at: Endpoint) -> None:
    prompts = ["The value of", "A list is", "import json"]
    answer = at.complete(prompts)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = [at.complete(prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in answer.choices] == alone


@check("Completions", "n: several choices, that differ")
def _(at: Endpoint) -> None:
    answer = at.complete(n=3, temperature=1.0, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens > answer.usage.prompt_tokens, "all choices count"


@check("Completions", "seed: the same draw again, and another by another")
def _(at: Endpoint) -> None:
    one, same, other = (at.complete(temperature=1.0, seed=seed, max_tokens=16).choices[0].text for seed in (7, 7, 8))
    assert one == same != other


@check("Completions", "negative seeds, which OpenAI's API has")
def _(at: Endpoint) -> None:
    at.complete(temperature=1.0, seed=-5)


@check("Completions", "stop: ends before the string, reason stop")
def _(at: Endpoint) -> None:
    text = at.complete(max_tokens=24).choices[0].text
    mark = text[len(text) // 2 :][:2]
    (choice,) = at.complete(max_tokens=24, stop=[mark]).choices
    assert choice.finish_reason == "stop" and choice.text == text[: text.index(mark)]


@check("Completions", "max_tokens: exactly so many, reason length")
def _(at: Endpoint) -> None:
    answer = at.complete(max_tokens=5, logit_bias={})
    assert answer.usage.completion_tokens == 5 and answer.choices[0].finish_reason == "length"


@check("Completions", "max_tokens is 16 where none is given")
def _(at: Endpoint) -> None:
    answer = at.openai.completions.create(model=at.model, prompt="The value of", temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 16


@check("Completions", "logprobs: tokens, values, alternatives, offsets")
def _(at: Endpoint) -> None:
    answer = at.complete(logprobs=3)
    found, text = answer.choices[0].logprobs, answer.choices[0].text
    assert "".join(found.tokens) == text and len(found.tokens) == answer.usage.completion_tokens
    assert all(value <= 0 for value in found.token_logprobs)
    assert all(3 <= len(top) <= 4 for top in found.top_logprobs)
    places = [sum(map(len, found.tokens[:n])) for n in range(len(found.tokens))]
    assert [offset - found.text_offset[0] for offset in found.text_offset] == places


@check("Completions", "echo: the prompt before the answer")
def _(at: Endpoint) -> None:
    plain = at.complete().choices[0].text
    assert at.complete(echo=True).choices[0].text == "The value of" + plain


@check("Completions", "echo with logprobs: a value for each token of a text but its first")
def _(at: Endpoint) -> None:
    ids = at.tokens("The value of")
    answer = at.complete(ids, echo=True, logprobs=1, max_tokens=1)
    values = answer.choices[0].logprobs.token_logprobs
    assert len(values) == len(ids) + 1 and values[0] is None
    assert all(value <= 0 for value in values[1:])


@check("Completions", "echo with max_tokens 0: a text is scored, nothing is added")
def _(at: Endpoint) -> None:
    answer = at.complete(echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == "The value of", f"{answer.choices[0].text!r}"
    assert answer.usage.completion_tokens == 0, f"{answer.usage.completion_tokens} completion_tokens"
    values = answer.choices[0].logprobs.token_logprobs
    assert len(values) == len(at.tokens("The value of")), f"{len(values)} values"


@check("Completions", "a choice's logprobs are those of the same text echoed")
def _(at: Endpoint) -> None:
    ids = at.tokens("The value of")
    answer = at.complete(ids, max_tokens=1, logprobs=1).choices[0]
    echoed = at.complete(ids, max_tokens=1, logprobs=1, echo=True).choices[0]
    assert echoed.logprobs.token_logprobs[-1] == pytest.approx(answer.logprobs.token_logprobs[0], abs=LEFT_OVER)


@check("Completions", "logit_bias: +100 is always chosen, -100 never")
def _(at: Endpoint) -> None:
    (token,) = at.tokens("e")
    always = at.complete(logit_bias={str(token): 100}).choices[0].text
    assert always == "e" * 8
    first = at.complete(max_tokens=1, logprobs=0).choices[0].text
    (banned,) = at.tokens(first)
    assert at.complete(max_tokens=1, logit_bias={str(banned): -100}).choices[0].text != first


@check("Completions", "penalties change what is repeated")
def _(at: Endpoint) -> None:
    (e,), (a,) = at.tokens("e"), at.tokens("a")
    for name in ("frequency_penalty", "presence_penalty"):
        for lead in range(51):  # after e another e is likely; with one of these it is ahead by less than the penalty
            asked = {"logit_bias": {str(e): 50, str(a): 50 + lead}, "max_tokens": 2}
            prompt = [*at.tokens("The value of"), e, e, e]
            plain, changed = (at.complete(prompt, **asked, **{name: value}).choices[0].text for value in (0, 2))
            if (plain, changed) == ("ee", "ea"):
                break
        else:
            raise AssertionError(f"{name} changes nothing")


@check("Completions", "best_of: the likeliest of several")
def _(at: Endpoint) -> None:
    answer = at.complete(best_of=4, n=1, temperature=1.0, seed=3)
    assert len(answer.choices) == 1


@check("Completions", "user is taken")
def _(at: Endpoint) -> None:
    at.complete(user="somebody")


# ---- streams


@check("Streams", "server-sent events that end with [DONE]")
def _(at: Endpoint) -> None:
    said = events_of(at.post("completions", prompt="The value of", max_tokens=8, temperature=0, stream=True))
    assert said[-1] == "[DONE]" and all(json.loads(line)["choices"] for line in said[:-1])


@check("Streams", "pieces of a completion are the whole one")
def _(at: Endpoint) -> None:
    pieces = [piece.choices[0] for piece in at.complete(stream=True)]
    (whole,) = at.complete().choices
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [whole.finish_reason]


@check("Streams", "a usage chunk without choices, when asked")
def _(at: Endpoint) -> None:
    chunks = list(at.complete(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == at.complete().usage
    assert not any(chunk.usage for chunk in chunks[:-1])


@check("Streams", "no usage where it is not asked")
def _(at: Endpoint) -> None:
    assert not any(chunk.usage for chunk in at.complete(stream=True))


@check("Streams", "several choices at once")
def _(at: Endpoint) -> None:
    asked = {"n": 2, "temperature": 1.0, "seed": 5}
    texts = {0: "", 1: ""}
    for chunk in at.complete(stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [texts[0], texts[1]] == [choice.text for choice in at.complete(**asked).choices]


@check("Streams", "logprobs in pieces are those of the whole")
def _(at: Endpoint) -> None:
    found = [c.choices[0].logprobs for c in at.complete(stream=True, logprobs=2) if c.choices]
    whole = at.complete(logprobs=2).choices[0].logprobs
    tokens = [token for piece in found if piece for token in piece.tokens]
    assert tokens == whole.tokens
    values = [value for piece in found if piece for value in piece.token_logprobs]
    assert values == pytest.approx(whole.token_logprobs, abs=LEFT_OVER)


@check("Streams", "a chat's first piece has the role, its last the reason")
def _(at: Endpoint) -> None:
    chunks = [chunk for chunk in at.chat(stream=True) if chunk.choices]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == at.chat().choices[0].message.content


@check("Streams", "a refusal is a status, and no stream")
def _(at: Endpoint) -> None:
    refused(at.http.post("completions", json={"model": "nobody", "prompt": "a", "stream": True}), 404)


# ---- chat completions


@check("Chat", "a message is answered, with usage")
def _(at: Endpoint) -> None:
    answer = at.chat()
    (choice,) = answer.choices
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant" and isinstance(choice.message.content, str)
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@check("Chat", "system and developer messages, and texts in parts")
def _(at: Endpoint) -> None:
    user = {"role": "user", "content": [{"type": "text", "text": "The value"}, {"type": "text", "text": " of"}]}
    for role in ("system", "developer"):
        at.chat([{"role": role, "content": "Be short."}, user])


@check("Chat", "max_completion_tokens, and max_tokens as before")
def _(at: Endpoint) -> None:
    for name in ("max_completion_tokens", "max_tokens"):
        assert at.chat(**{name: 3}).usage.completion_tokens <= 3


@check("Chat", "logprobs and top_logprobs, with bytes")
def _(at: Endpoint) -> None:
    answer = at.chat(logprobs=True, top_logprobs=2).choices[0]
    entries = answer.logprobs.content
    assert "".join(entry.token for entry in entries) == answer.message.content
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == answer.message.content


@check("Chat", "n, seed and stop")
def _(at: Endpoint) -> None:
    assert len(at.chat(n=2, temperature=1.0, seed=1, stop=["\n\n"]).choices) == 2


@check("Chat", "the client's own stream helper gathers it")
def _(at: Endpoint) -> None:
    asked: Any = {"model": at.model, "messages": TALK, "seed": 1, "stop": ["e", "a", " ", "."]}  # to its end, and soon
    with at.openai.chat.completions.stream(**asked) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.role == "assistant"


@check("Chat", "response_format json_schema: the answer is of the schema")
def _(at: Endpoint) -> None:
    (choice,) = at.chat(
        response_format={"type": "json_schema", "json_schema": FORMAT}, max_completion_tokens=64
    ).choices
    assert isinstance(found := _object(choice), str) or found["answer"] in ("yes", "no")


@check("Chat", "response_format json_object: the answer is an object, or was cut")
def _(at: Endpoint) -> None:
    (choice,) = at.chat(response_format={"type": "json_object"}, max_completion_tokens=64).choices
    assert isinstance(_object(choice), str | dict)


def _object(choice: Any) -> Any:
    """What an answer in JSON holds; of one that was cut, how it begins."""
    text = choice.message.content
    assert text.lstrip().startswith("{"), text[:40]
    return text if choice.finish_reason == "length" else json.loads(text)


@check("Chat", "a schema that is none is refused")
def _(at: Endpoint) -> None:
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    refused(at.post("chat/completions", messages=TALK, response_format=wrong), 400)


# ---- other routes


@check("Embeddings", "of texts and of token ids, each of length one")
def _(at: Endpoint) -> None:
    vectors = at.openai.embeddings.create(model=at.model, input=["The value of", "A list"], encoding_format="float")
    assert [item.index for item in vectors.data] == [0, 1]
    for item in vectors.data:
        assert sum(value * value for value in item.embedding) == pytest.approx(1.0, abs=1e-3)
    at.openai.embeddings.create(model=at.model, input=[at.tokens("A list")], encoding_format="float")


@check("Embeddings", "base64 as floats, to float32")
def _(at: Endpoint) -> None:
    plain = at.openai.embeddings.create(model=at.model, input="A list", encoding_format="float").data[0].embedding
    assert at.openai.embeddings.create(model=at.model, input="A list").data[0].embedding == pytest.approx(plain)


@check("Responses", "a text is answered")
def _(at: Endpoint) -> None:
    answer = at.openai.responses.create(model=at.model, input="The value of", max_output_tokens=16, temperature=0)
    assert answer.object == "response" and answer.usage is not None and answer.output_text


@check("Responses", "named events in order")
def _(at: Endpoint) -> None:
    asked: Any = {"model": at.model, "input": "The value of", "max_output_tokens": 16, "temperature": 0}
    events = list(at.openai.responses.create(**asked, stream=True))
    assert events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == at.openai.responses.create(**asked).output_text


@check("Tokens", "/tokenize and /detokenize are each other's inverse")
def _(at: Endpoint) -> None:
    ids, text, root = at.tokens("The value of"), "The value of", at.url.removesuffix("/v1")
    answers = [at.post(f"{base}/tokenize", prompt=text, add_special_tokens=False) for base in (at.url, root)]
    assert ids in [answer.json()["tokens"] for answer in answers if answer.is_success], "it has no /tokenize"
    answers = [at.post(f"{base}/detokenize", tokens=ids) for base in (at.url, root)]
    assert text in [answer.json()["prompt"] for answer in answers if answer.is_success], "it has no /detokenize"


# ---- refusals

WRONG: Mapping[str, dict[str, Any]] = {
    "a temperature above 2": {"temperature": 3},
    "a top_p of 0": {"top_p": 0},
    "n of 0": {"n": 0},
    "a max_tokens below 0": {"max_tokens": -1},
    "more than four stop strings": {"stop": ["a", "b", "c", "d", "e"]},
    "a bias beyond 100": {"logit_bias": {"5": 101}},
    "a bias of no token": {"logit_bias": {"999999": 1}},
    "a field of another type": {"max_tokens": "many"},
    "a field that does not exist": {"max_tokenz": 5},
    "a penalty beyond 2": {"presence_penalty": 3},
    "stream_options without stream": {"stream_options": {"include_usage": True}},
    "too many logprobs": {"logprobs": 10_000},
}


def _wrong(fields: dict[str, Any]) -> Check:
    def run(at: Endpoint) -> None:
        refused(at.post("completions", **{"prompt": "The value of", "max_tokens": 2, **fields}), 400)

    return run


for what, fields in WRONG.items():
    check("Refusals (400, OpenAI's shape)", what)(_wrong(fields))


@check("Refusals (400, OpenAI's shape)", "no messages")
def _(at: Endpoint) -> None:
    refused(at.post("chat/completions", messages=[]), 400)


@check("Refusals (400, OpenAI's shape)", "a role that does not exist")
def _(at: Endpoint) -> None:
    refused(at.post("chat/completions", messages=[{"role": "wizard", "content": "a"}]), 400)


@check("Refusals (400, OpenAI's shape)", "a body that is no JSON")
def _(at: Endpoint) -> None:
    given = {"content": b'{"model": ', "headers": {"content-type": "application/json"}}
    refused(at.http.post("completions", **given), 400)


@check("Refusals (400, OpenAI's shape)", "a prompt beyond the context: context_length_exceeded")
def _(at: Endpoint) -> None:
    long = "word " * 20_000
    refused(at.post("completions", prompt=long, max_tokens=2), 400, code="context_length_exceeded")


@check("Other refusals", "an unknown model is 404 model_not_found, of param model")
def _(at: Endpoint) -> None:
    asked = {"model": "nobody", "prompt": "a"}
    refused(at.http.post("completions", json=asked), 404, code="model_not_found", param="model")


@check("Other refusals", "an unknown path is 404 in OpenAI's shape")
def _(at: Endpoint) -> None:
    refused(at.http.get("nothing"), 404)


@check("Other refusals", "a method that a path does not have is 405 in OpenAI's shape")
def _(at: Endpoint) -> None:
    refused(at.http.get("completions"), 405)


@check("Other refusals", "an error's code is a string, or null")
def _(at: Endpoint) -> None:
    asked = {"prompt": "a", "max_tokens": 1}
    for fields in ({"model": "nobody"}, {"temperature": 5}, {"n": "many"}):
        code = at.post("completions", **{**asked, **fields}).json()["error"]["code"]
        assert code is None or isinstance(code, str), f"{code!r}"


@check("Other refusals", "the client raises its own types of error")
def _(at: Endpoint) -> None:
    with pytest.raises(openai.NotFoundError):
        at.openai.completions.create(model="nobody", prompt="a")
    with pytest.raises(openai.BadRequestError):
        at.complete(temperature=5)


@check("Headers", "x-request-id on answers and refusals, one each")
def _(at: Endpoint) -> None:
    answers = [at.http.get("models"), at.http.get("models/nobody")]
    ids = [answer.headers.get_list("x-request-id") for answer in answers]
    assert all(len(found) == 1 for found in ids) and ids[0] != ids[1], f"{ids}"


@check("Headers", "openai-processing-ms")
def _(at: Endpoint) -> None:
    assert float(at.post("completions", prompt="a", max_tokens=1).headers["openai-processing-ms"]) >= 0
