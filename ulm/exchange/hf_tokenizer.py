"""The tokenizer of a Hugging Face folder as ours, where it is a byte-level BPE; the end of text gets our name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tokenizers

from ulm.errors import ArtefactError, ConfigError, UnknownCharacterError
from ulm.tokenizers.chat import CHAT_TEMPLATE, check_template
from ulm.tokenizers.kinds import byte_alphabet, kind_of
from ulm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer

MAX_JSON_BYTES = 1 << 28  # the largest vocabularies take some 50 MB
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")  # that transformers gives a chat template
KNOWN = "byte-level BPEs, as of GPT-2, Llama 3, Qwen, OLMo and others, are known; SentencePiece's are not"


def read_tokenizer(folder: Path, config: dict[str, Any]) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer of tokenizer.json, and what of it is another than there. ArtefactError where it cannot be ours."""
    path = folder / "tokenizer.json"
    about = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    stored = read_json(path)
    notes = []
    # Ids before and after a text are ours to add, and a length is the model's.
    stored |= {"post_processor": None, "padding": None, "truncation": None}
    added = stored.get("added_tokens", [])
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ArtefactError(f"{path}: added_tokens is no list of tokens")
    names = [token.get("content") for token in added]
    end = _end_of_text(about, config, added)
    if END_OF_TEXT not in names:
        if end is None:
            raise ArtefactError(f"{path}: no end of text: neither tokenizer_config.json nor config.json names one")
        _rename(stored, end, END_OF_TEXT)
        notes.append(f"the end of text, {end} there, is {END_OF_TEXT} here")
    else:
        if end not in (END_OF_TEXT, None):
            notes.append(f"the end of text is {END_OF_TEXT} here, and {end} there")
        end = END_OF_TEXT  # the other stays what it is, and so does what a chat has of it
    try:
        inner = tokenizers.Tokenizer.from_str(json.dumps(stored))
    except Exception as error:  # noqa: BLE001  tokenizers raises bare Exception for every fault of a file
        raise ArtefactError(f"{path}: not a readable tokenizer: {error}") from None
    kind = kind_of(inner)
    if kind is None:
        raise ArtefactError(f"{path}: a tokenizer of another make; {KNOWN}")
    if flaw := _flaw(inner, added):
        raise ArtefactError(f"{path}: {flaw}")
    template, problem = _template(folder, about, end)
    tokenizer = Tokenizer(inner, kind, template)
    if spelled := [name for name, index in tokenizer.special_ids.items() if index in _ids(tokenizer, name)]:
        raise ArtefactError(f"{path}: text that spells the special token {spelled[0]!r} would become it")
    return tokenizer, (*notes, *problem)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ArtefactError where there is none."""
    if not path.is_file():  # nor a pipe, which nobody may write to, or a device without end
        raise ArtefactError(f"{path}: no such file; a folder that transformers' save_pretrained made")
    try:
        if (num_bytes := path.stat().st_size) > MAX_JSON_BYTES:
            raise ArtefactError(f"{path}: {num_bytes:,} bytes; such a file has {MAX_JSON_BYTES:,} at most")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, numbers too long
        raise ArtefactError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ArtefactError(f"{path}: no object of settings")
    return found


def _end_of_text(about: dict[str, Any], config: dict[str, Any], added: list[dict[str, Any]]) -> str | None:
    """What the folder calls the token that ends a text."""
    if (named := _content(about.get("eos_token"))) is not None:
        return named
    ids = config.get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    found = next((token.get("content") for token in added if token.get("id") == first), None)
    return found if isinstance(found, str) else None


def _content(named: Any) -> str | None:
    """A token as tokenizer_config.json says it, by its text or with more about it."""
    named = named.get("content") if isinstance(named, dict) else named
    return named if isinstance(named, str) and named else None


def _flaw(inner: tokenizers.Tokenizer, added: list[dict[str, Any]]) -> str | None:
    """Why texts would not come back, or ids be others than those that the model learned; None where all is well."""
    words, model = inner.get_vocab(with_added_tokens=False), inner.model
    ids = sorted(inner.get_vocab(with_added_tokens=True).values())
    if ids != list(range(len(ids))):
        return "its ids are not 0, 1, 2 and so on without a gap"
    if moved := [token for token in added if inner.token_to_id(token["content"]) != token["id"]]:
        return f"{moved[0]['content']!r} is given id {moved[0]['id']}, where the next one that is free is another"
    if stripped := [token for token in added if not token["special"] and (token["lstrip"] or token["rstrip"])]:
        return f"the token {stripped[0]['content']!r} takes the white space beside it along, which is lost then"
    if not isinstance(model, tokenizers.models.BPE):
        return None if all(len(word) == 1 for word in words) else "it has words, where one of characters is known"
    if model.dropout:
        return f"model.dropout is {model.dropout:g}: it splits a text in another way each time"
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return "its tokens are spelled with a prefix or a suffix that no text has"
    alphabet = byte_alphabet()
    if lost := [byte for byte, char in alphabet.items() if char not in words and byte not in NEVER_IN_UTF8]:
        return f"it has no token for the byte 0x{lost[0]:02X}, which would be lost"
    names, chars = {token["content"] for token in added}, set(alphabet.values())
    if foreign := next((word for word in words if not (word in names or chars.issuperset(word))), None):
        return f"its token {foreign!r} is not spelled by bytes"
    return None


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except UnknownCharacterError:  # of a char tokenizer, to which it is no text then
        return []


def _rename(stored: dict[str, Any], name: str, new: str) -> None:
    """Give a special token another name, wherever tokenizer.json has it."""
    for token in stored["added_tokens"]:
        if token.get("content") == name:
            token |= {"content": new, "special": True}
    model = stored.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict) and name in vocabulary:
        stored["model"]["vocab"] = {new if token == name else token: index for token, index in vocabulary.items()}


def _template(folder: Path, about: dict[str, Any], end: str) -> tuple[str, tuple[str, ...]]:
    """The chat template with our name of the token `end`, and why it is not the folder's where it is not."""
    path, given = folder / "chat_template.jinja", about.get("chat_template")
    if path.is_file():
        given = path.read_text(encoding="utf-8", errors="replace")
    if isinstance(given, list):  # several by name
        named = [entry for entry in given if isinstance(entry, dict) and entry.get("name") == "default"]
        given = named[0].get("template") if named else None
    if not isinstance(given, str):
        return CHAT_TEMPLATE, ()
    given = _with_named(given.replace(end, END_OF_TEXT), folder, about, end)
    try:
        check_template(given)
    except ConfigError as error:
        return CHAT_TEMPLATE, (f"the folder's chat template is left out: {error.problem}",)
    return given, ()


def _with_named(template: str, folder: Path, about: dict[str, Any], end: str) -> str:
    """A template that says itself what the folder calls the tokens that it names: transformers would tell it."""
    path = folder / "special_tokens_map.json"
    told = {**(read_json(path) if path.is_file() else {}), **about}
    lines = []
    for name in (name for name in NAMED if re.search(rf"\b{name}\b", template)):
        token = _content(told.get(name)) or ""
        said = json.dumps(END_OF_TEXT if token == end else token, ensure_ascii=False)
        lines.append(f"{{% set {name} = {said} %}}\n")  # a line end after a block is no part of the text
    return "".join(lines) + template
