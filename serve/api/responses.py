"""POST /v1/responses in its text form: nothing is stored, no tools are called, an answer is one message a choice."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from serve.api.answers import Choice, Choices, Shape, event, ledger_json
from serve.api.prompts import Chat
from serve.api.schema import (
    MAX_TOP_LOGPROBS,
    Body,
    Format,
    GenerationBody,
    Labels,
    Many,
    NamedSchema,
    Text,
    text_alone,
)
from serve.contracts import Ledger, TokenChunk
from ulm.tokenizers.tokenizer import Tokenizer

LOGPROBS = "message.output_text.logprobs"
SHOWN = ("instructions", "max_output_tokens", "metadata", "temperature", "top_p", "user")  # of a body, in its response


class ResponseText(Body):
    """A part of a message, of ours or of the client's; what else ours have comes back with them."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: list[Any] = Field([], max_length=0)
    logprobs: list[Any] = []


class ResponseMessage(Body):
    """A message of the input; those of an earlier output may be among them."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Many[ResponseText]
    id: str | None = None
    status: str | None = None

    def plain(self) -> dict[str, str]:
        """For the chat template."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class TextFormat(Format):
    """`text.format`: the fields of a NamedSchema stand beside the type."""

    name: str | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_where_it_counts(self) -> Self:
        if self.type == "json_schema":
            NamedSchema(**self.beside_type)
        elif self.beside_type:
            raise ValueError(f"{next(iter(self.beside_type))} has an effect with a type of json_schema alone")
        return self

    @property
    def beside_type(self) -> dict[str, Any]:
        """What else was given; a schema may hold null."""
        given = {"name": self.name, "description": self.description, "schema": self.schema_, "strict": self.strict}
        return {name: value for name, value in given.items() if value is not None}


class TextSettings(Body):
    """What the text is to look like."""

    format: TextFormat = TextFormat(type="text")
    verbosity: Literal["medium"] | None = None


class ResponsesBody(GenerationBody):
    """POST /v1/responses."""

    input: Text | Many[ResponseMessage]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    include: Many[Literal["message.output_text.logprobs"]] = []
    text: TextSettings = TextSettings()
    # labels
    metadata: Labels = {}
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # neutral values only
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _messages_of_text(cls, given: Any) -> Any:
        for item in given if isinstance(given, list) else ():
            if isinstance(item, dict):
                text_alone(item.get("content"))
        return given

    @field_validator("store", mode="before")
    @classmethod
    def _nothing_is_stored(cls, given: Any) -> Any:
        if given is True:
            raise ValueError("nothing is stored here; send store: false, and the whole conversation as input")
        return given

    @model_validator(mode="after")
    def _some_input(self) -> Self:
        if not self.input and not self.instructions:
            raise ValueError("input: is empty")
        return self

    def chat(self) -> Chat:
        """Instructions and input, for the chat template."""
        said = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else None
        messages = said if said is not None else [message.plain() for message in self.input]  # type: ignore[union-attr]
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return Chat([*first, *messages])

    @property
    def most_tokens(self) -> int | None:
        """Tokens that an answer may have; None: as many as the context holds."""
        return self.max_output_tokens

    format_place: ClassVar[str] = "text.format"

    def more(self) -> dict[str, Any]:
        """Further settings of a GenerateRequest."""
        return {"json_schema": self.text.format.json_schema_of(self.text.format.schema_)}

    @property
    def num_top_logprobs(self) -> int | None:
        """How many alternatives are reported beside the chosen token; None: no logprobs."""
        return (self.top_logprobs or 0) if LOGPROBS in self.include or self.top_logprobs else None


class ResponseShape(Shape):
    """response: a message for each choice, and a stream of named events."""

    _body: ResponsesBody

    def __init__(self, body: ResponsesBody, tokenizer: Tokenizer) -> None:
        super().__init__(body, tokenizer)
        self._id, self._created_s = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._message_ids: dict[int, str] = {}
        self._sequence = 0

    def whole(self, choices: Choices, ledger: Ledger) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        is_whole = all(choice.finish_reason == "stop" for choice in choices.listed)
        counts = {"input_tokens": choices.num_prompt_tokens, "output_tokens": choices.num_tokens}
        return {
            **self._response("completed" if is_whole else "incomplete"),
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [self._message(choice) for choice in choices.listed],
            "usage": {
                **counts,
                "total_tokens": sum(counts.values()),
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
            "ulm": ledger_json(ledger),
        }

    def begin(self) -> Iterator[str]:
        """It was taken in, and has begun."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress"))

    def add(self, chunk: TokenChunk, before: Choice, is_new: bool) -> Iterator[str]:
        """A message's first and last events, and its text between them."""
        place = {"output_index": before.index}
        if is_new:
            item = {**self._message(before), "status": "in_progress", "content": []}
            yield self._event("response.output_item.added", **place, item=item)
            yield self._event("response.content_part.added", **self._within(before), part=self._part("", []))
        if chunk.text or chunk.logprobs:
            logprobs = self._entries(chunk.logprobs)
            yield self._event("response.output_text.delta", **self._within(before), delta=chunk.text, logprobs=logprobs)
        if chunk.finish_reason is not None:
            ended = replace(before, logprobs=list(before.logprobs))
            ended.add(chunk)
            part = self._part(ended.text, self._entries(ended.logprobs))
            said = {"text": ended.text, "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", **self._within(ended), **said)
            yield self._event("response.content_part.done", **self._within(ended), part=part)
            yield self._event("response.output_item.done", **place, item=self._message(ended))

    def end(self, choices: Choices, ledger: Ledger) -> Iterator[str]:
        """The whole response."""
        response = self.whole(choices, ledger)
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, message: str) -> str:
        """An error after the stream has begun."""
        return self._event("error", code="server_error", message=message, param=None)

    def _event(self, kind: str, **fields: Any) -> str:
        said = event({"type": kind, "sequence_number": self._sequence, **fields}, kind)
        self._sequence += 1
        return said

    def _within(self, choice: Choice) -> dict[str, Any]:
        return {"item_id": self._message_id(choice.index), "output_index": choice.index, "content_index": 0}

    def _message_id(self, index: int) -> str:
        return self._message_ids.setdefault(index, f"msg_{uuid.uuid4().hex}")

    def _message(self, choice: Choice) -> dict[str, Any]:
        return {
            "id": self._message_id(choice.index),
            "type": "message",
            "role": "assistant",
            "status": "completed" if choice.finish_reason == "stop" else "incomplete",
            "content": [self._part(choice.text, self._entries(choice.logprobs))],
        }

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "model": self._body.model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            **{name: getattr(self._body, name) for name in SHOWN},
            "text": {"format": {"type": self._body.text.format.type, **self._body.text.format.beside_type}},
            "top_logprobs": self._body.num_top_logprobs or 0,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "previous_response_id": None,
            "store": False,
            "background": False,
            "reasoning": None,
            "service_tier": "default",
        }
