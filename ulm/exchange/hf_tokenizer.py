"""The tokenizer of a Hugging Face folder as ours, where it is a byte-level BPE; the end of text gets our name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from ulm.errors import ArtefactError, ConfigError
from ulm.tokenizers.chat import CHAT_TEMPLATE, check_template
from ulm.tokenizers.kinds import kind_of
from ulm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer

KNOWN = "byte-level BPEs, as of GPT-2, Llama 3, Qwen, OLMo and others, are known; SentencePiece's are not"


def read_tokenizer(folder: Path, config: dict[str, Any]) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer of tokenizer.json, and what of it is another than there. ArtefactError where it cannot be ours."""
    path = folder / "tokenizer.json"
    about = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    stored = read_json(path)
    notes = []
    # Ids before and after a text are ours to add, and a length is the model's.
    stored |= {"post_processor": None, "padding": None, "truncation": None}
    added = stored.get("added_tokens")
    names = [token.get("content") for token in added] if isinstance(added, list) else []
    end = _end_of_text(about, config, stored)
    if END_OF_TEXT not in names:
        if end is None:
            raise ArtefactError(f"{path}: no end of text: neither tokenizer_config.json nor config.json names one")
        _rename(stored, end, END_OF_TEXT)
        notes.append(f"the end of text, {end} there, is {END_OF_TEXT} here")
    elif end not in (END_OF_TEXT, None):
        notes.append(f"the end of text is {END_OF_TEXT} here, and {end} there")
    try:
        inner = tokenizers.Tokenizer.from_str(json.dumps(stored))
    except Exception as error:  # noqa: BLE001  tokenizers raises bare Exception for every fault of a file
        raise ArtefactError(f"{path}: not a readable tokenizer: {error}") from None
    kind = kind_of(inner)
    if kind is None:
        raise ArtefactError(f"{path}: a tokenizer of another make; {KNOWN}")
    template, problem = _template(folder, about)
    if end is not None:
        template = template.replace(end, END_OF_TEXT)
    return Tokenizer(inner, kind, template), (*notes, *problem)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ArtefactError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; a folder that transformers' save_pretrained made") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtefactError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ArtefactError(f"{path}: no object of settings")
    return found


def _end_of_text(about: dict[str, Any], config: dict[str, Any], stored: dict[str, Any]) -> str | None:
    """What the folder calls the token that ends a text."""
    named = about.get("eos_token")
    if isinstance(named, dict):
        named = named.get("content")
    if isinstance(named, str) and named:
        return named
    ids = config.get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    added = stored.get("added_tokens")
    of_id = {token.get("id"): token.get("content") for token in added} if isinstance(added, list) else {}
    found = of_id.get(first)
    return found if isinstance(found, str) else None


def _rename(stored: dict[str, Any], name: str, new: str) -> None:
    """Give a special token another name, wherever tokenizer.json has it."""
    for token in stored.get("added_tokens") or []:
        if token.get("content") == name:
            token |= {"content": new, "special": True}
    vocabulary = (stored.get("model") or {}).get("vocab")
    if isinstance(vocabulary, dict) and name in vocabulary:
        stored["model"]["vocab"] = {new if token == name else token: index for token, index in vocabulary.items()}


def _template(folder: Path, about: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The chat template, and why it is not the folder's where it is not."""
    path, given = folder / "chat_template.jinja", about.get("chat_template")
    if path.is_file():
        given = path.read_text(encoding="utf-8", errors="replace")
    if isinstance(given, list):  # several by name
        given = next((entry.get("template") for entry in given if entry.get("name") == "default"), None)
    if not isinstance(given, str):
        return CHAT_TEMPLATE, ()
    try:
        check_template(given)
    except ConfigError as error:
        return CHAT_TEMPLATE, (f"the folder's chat template is left out: {error.problem}",)
    return given, ()
