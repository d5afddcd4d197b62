"""Chats as text: the Jinja templates of `transformers`, in a sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jinja2.ext
import jinja2.runtime
import jinja2.sandbox

from ulm.errors import ConfigError, RequestError

END_OF_TEXT = "<|endoftext|>"

# Before any tuning a chat is text with names; the stop string is part of the convention.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
CHAT_STOP = "\nUser:"

MAX_STEPS, MAX_CHARS, MAX_POWER = 10_000, 1_000_000, 1_000  # what loops over ranges, a product and a power may come to

# What else transformers gives a template of an exported folder: its special tokens, and nothing that was not asked for.
AS_IN_TRANSFORMERS = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT) | {
    "tools": None,
    "documents": None,
}

# What a template's own expressions raise, beside Jinja's: 1 / 0, "a" + 1, range beyond the sandbox's bound. Blocks
# within blocks, two dozen deep, are beyond Python's own compiler.
FAULTS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
    *(SyntaxError, MemoryError),
)


def render_chat(template: str, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
    """The text of a chat: with `add_generation_prompt` up to where the answer begins, else the whole transcript.

    Raises RequestError for a template that fails on these messages.
    """
    given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, "range": _bounded_range()}
    given |= AS_IN_TRANSFORMERS
    try:
        return _compiled(template).render(given)
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
    # the trimming, tags and functions of transformers, so that an exported or imported template renders the same there
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    sandbox.globals["raise_exception"] = _refuse
    sandbox.filters["tojson"] = _as_json
    return sandbox.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _as_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """JSON in which, other than in Jinja's own, nothing is spelled for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _bounded_range() -> Callable[..., range]:
    """`range` for one rendering, in which all loops over it together take MAX_STEPS steps at most."""
    left = MAX_STEPS

    def bounded(*arguments: int) -> range:
        nonlocal left
        left -= len(steps := range(*arguments))
        if left < 0:
            raise OverflowError(f"more than {MAX_STEPS:,} steps of range")
        return steps

    return bounded


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's, in which a slip in a product cannot fill the memory. It is no wall: templates are the user's own."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        lengths = [len(value) if hasattr(value, "__len__") else value for value in (left, right)]
        is_long = lengths != [left, right] and lengths[0] * lengths[1] > MAX_CHARS
        if is_long if operator == "*" else right > MAX_POWER:
            raise OverflowError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)
