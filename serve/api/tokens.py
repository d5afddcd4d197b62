"""Text to token ids and back: vLLM's /tokenize and /detokenize, which OpenAI's API lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self, TypeVar

from pydantic import Field, model_validator

from serve.api.access import Visit
from serve.api.prompts import Chat
from serve.api.schema import Body, ChatMessage, Many, Text, Token
from serve.api.spent import Record, counted
from serve.catalog import Catalog, Model
from ulm.errors import RequestError

MAX_IDS = 1_000_000


class TokenizeBody(Body):
    """POST /v1/tokenize: a text, or a chat."""

    model: str = Field(max_length=200)
    prompt: Text | None = None
    messages: Many[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool = True  # the <|endoftext|> that stands before a text, as completions read it
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /v1/detokenize."""

    model: str = Field(max_length=200)
    tokens: Many[Token] = Field(max_length=MAX_IDS)


Asked = TypeVar("Asked", TokenizeBody, DetokenizeBody)
Found = tuple[dict[str, Any], int]  # an answer, and the tokens that it took


async def answered(
    found_of: Callable[[Model, Asked], Found], catalog: Catalog, body: Asked, visit: Visit, record: Record
) -> dict[str, Any]:
    """The answer of one of the two below, counted and paid for."""
    model = catalog.model(body.model, allowed=visit.models)
    visit.model = model.name
    with counted(record, model.name, found_of.__name__):
        found, num_tokens = await asyncio.to_thread(found_of, model, body)
        await visit.take(num_tokens)
    return found


def tokenize(model: Model, body: TokenizeBody) -> Found:
    """The ids that a prompt is to a model."""
    tokenizer = model.tokenizer
    if body.messages is not None:
        messages = Chat([message.plain() for message in body.messages]).messages
        tokens = tokenizer.encode_chat(messages, add_generation_prompt=body.add_generation_prompt)
    else:
        tokens = tokenizer.encode(body.prompt)
    if body.add_special_tokens:
        tokens = [tokenizer.eot_id, *tokens]
    spelled = [tokenizer.decode([token], spell_special=True) for token in tokens] if body.return_token_strs else None
    count, context = len(tokens), model.context_tokens
    return {"count": count, "max_model_len": context, "tokens": tokens, "token_strs": spelled}, count


def detokenize(model: Model, body: DetokenizeBody) -> Found:
    """The text of ids; special tokens have none."""
    tokenizer = model.tokenizer
    wrong = next((token for token in body.tokens if token >= tokenizer.vocab_size), None)
    if wrong is not None:
        problem = f"tokens: there is no token {wrong}: the vocabulary has {tokenizer.vocab_size}"
        raise RequestError(problem, param="tokens")
    return {"prompt": tokenizer.decode(body.tokens)}, len(body.tokens)
