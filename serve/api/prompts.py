"""What a body asks about, as token ids of a model's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ulm.errors import RequestError
from ulm.models.generate import prompt_tokens, room
from ulm.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chat:
    """Messages, for the tokenizer's chat template."""

    messages: list[dict[str, str]]

    def __len__(self) -> int:
        """Characters, about."""
        return sum(len(message["content"]) + 20 for message in self.messages)


Prompt = str | list[int] | Chat


def read_prompt(prompt: Prompt, tokenizer: Tokenizer, context_tokens: int) -> list[int]:
    """The ids. RequestError by name for ids of no token, and where they are surely more than the context."""
    text: Any = tokenizer.render_chat(prompt.messages) if isinstance(prompt, Chat) else prompt
    if isinstance(text, str) and len(text) > context_tokens * tokenizer.max_token_bytes:  # not worth tokenizing
        room(len(text) // tokenizer.max_token_bytes, context_tokens)
    if isinstance(text, list) and len(text) > context_tokens:  # nor worth looking at one by one
        room(len(text), context_tokens)
    if isinstance(prompt, Chat):  # from the messages: in the rendered prompt nothing tells their text apart
        return [tokenizer.eot_id, *tokenizer.encode_chat(prompt.messages)]
    tokens = prompt_tokens(tokenizer, prompt)
    if not tokens or any(token >= tokenizer.vocab_size for token in tokens):
        raise RequestError("prompt: token ids must be below the vocabulary's size, at least one", param="prompt")
    return tokens
