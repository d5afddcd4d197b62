"""Chats as text: the Jinja templates of `transformers`, in a sandbox."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import jinja2.sandbox

from ulm.errors import ConfigError, RequestError

# Before any tuning a chat is text with names; the stop string is part of the convention.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
CHAT_STOP = "\nUser:"

# What a template's own expressions raise, beside Jinja's: 1 / 0, "a" + 1, range beyond the sandbox's bound.
FAULTS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def render_chat(template: str, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
    """The text of a chat: with `add_generation_prompt` up to where the answer begins, else the whole transcript.

    Raises RequestError for a template that fails on these messages.
    """
    try:
        return _compiled(template).render(messages=list(messages), add_generation_prompt=add_generation_prompt)
    except FAULTS as error:
        raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from None


def marked(messages: Sequence[Mapping[str, str]], mark: str) -> list[dict[str, str]]:
    """The messages with `mark` inside whatever they say like a special token; none of them may hold it before."""
    return [{key: re.sub(r"<(?=\||\Z)", "<" + mark, said) for key, said in message.items()} for message in messages]


def check_template(template: str) -> None:
    """Nothing, or ConfigError for a template that fails on a plain chat or leaves out what its messages say."""
    said = [("user", "one question"), ("assistant", "its answer"), ("user", "a further question")]
    messages = [{"role": role, "content": content} for role, content in said]
    place = "tokenizer.chat_template"
    for add_generation_prompt in (True, False):
        try:
            text = render_chat(template, messages, add_generation_prompt=add_generation_prompt)
        except RequestError as error:
            raise ConfigError(place, str(error), "Jinja, as in transformers") from None
        if lost := [content for _, content in said if content not in text]:
            problem = f"a message that says {lost[0]!r} is not shown"
            raise ConfigError(place, problem, "write {{ message.content }} for every message of messages")


@lru_cache(maxsize=16)  # a corpus renders one template a hundred thousand times
def _compiled(template: str) -> jinja2.Template:
    # the block trimming of transformers, so that an exported or imported template renders the same there
    around = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return around.from_string(template)
