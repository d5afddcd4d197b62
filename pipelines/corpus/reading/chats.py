"""Chat transcripts as the texts that a model is trained on."""

from __future__ import annotations

from typing import Any

from pipelines.corpus.reading.tables import Fault
from ulm.errors import UlmError

MARK = "\ufdd0"  # a noncharacter: Unicode keeps it for use inside programs
# ShareGPT's names of the roles, beside {from, value}.
_ROLES = {"human": "user", "gpt": "assistant"}


def transcript(messages: Any, template: str) -> str | Fault:
    """The text of a list of {role, content} or {from, value}, by the tokenizer's chat template.

    Special tokens of the template are to become ids, and what a message says like one is to stay text: MARK parts it.
    """
    from ulm.tokenizers.chat import marked, render_chat

    if not isinstance(messages, list):
        return Fault(f"bad_messages: {type(messages).__name__} where a list should be")
    if not messages:
        return Fault("bad_messages: an empty list")
    chat = []
    for message in messages:
        if not isinstance(message, dict):
            return Fault(f"bad_messages: a message is {type(message).__name__}, not role and content")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return Fault(f"bad_messages: role is {type(role).__name__}, content is {type(content).__name__}")
        chat.append({"role": _ROLES.get(role, role), "content": content.replace(MARK, "")})
    try:
        return render_chat(template, marked(chat, MARK), add_generation_prompt=False)
    except UlmError as error:
        return Fault(f"bad_messages: {error}")
