"""Text to token ids and back: vLLM's /tokenize and /detokenize, which OpenAI's API lacks."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Self

from pydantic import Field, model_validator

from serve.api.prompts import Chat
from serve.api.schema import Body, ChatMessage, Many, Text, Token
from serve.catalog import Catalog
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


def tokenized(catalog: Catalog, body: TokenizeBody, allowed: Container[str] | None = None) -> dict[str, Any]:
    """The ids that a prompt is to a model, of those `allowed`."""
    model = catalog.model(body.model, allowed=allowed)
    tokenizer = model.tokenizer
    if body.messages is not None:
        messages = Chat([message.plain() for message in body.messages]).messages
        tokens = tokenizer.encode_chat(messages, add_generation_prompt=body.add_generation_prompt)
    else:
        tokens = tokenizer.encode(body.prompt)
    if body.add_special_tokens:
        tokens = [tokenizer.eot_id, *tokens]
    spelled = [tokenizer.decode([token], spell_special=True) for token in tokens] if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": model.context_tokens, "tokens": tokens, "token_strs": spelled}


def detokenized(catalog: Catalog, body: DetokenizeBody, allowed: Container[str] | None = None) -> dict[str, Any]:
    """The text of ids; special tokens have none."""
    tokenizer = catalog.model(body.model, allowed=allowed).tokenizer
    wrong = next((token for token in body.tokens if token >= tokenizer.vocab_size), None)
    if wrong is not None:
        problem = f"tokens: there is no token {wrong}: the vocabulary has {tokenizer.vocab_size}"
        raise RequestError(problem, param="tokens")
    return {"prompt": tokenizer.decode(body.tokens)}
