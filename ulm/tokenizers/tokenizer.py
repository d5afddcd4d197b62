"""A tokenizer as every part uses it: text to ids and back, bytes per token, the chat template, a digest.

All kinds are stored as Hugging Face `tokenizer.json`, so that other tools open them unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import jinja2.sandbox
import tokenizers

from ulm import artefacts
from ulm.errors import ArtefactError, RequestError

END_OF_TEXT = "<|endoftext|>"
FILES = ("tokenizer.json", "chat_template.jinja")
# Before any tuning a chat is text with names; the stop string is part of the convention.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}Assistant:"
)
CHAT_STOP = "\nUser:"


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, as byte-level vocabularies spell their tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


class Tokenizer:
    """Byte-level: any valid Unicode text comes back unchanged, and text that spells a special token stays text."""

    def __init__(self, inner: tokenizers.Tokenizer, kind: str, chat_template: str = CHAT_TEMPLATE) -> None:
        self.inner, self.kind, self.chat_template = inner, kind, chat_template
        inner.encode_special_tokens = True
        self.vocab_size: int = inner.get_vocab_size()
        end = inner.token_to_id(END_OF_TEXT)
        if end is None:
            raise ArtefactError(f"the tokenizer has no {END_OF_TEXT} token; make it with `ulm tokenizer train`")
        self.eot_id: int = end

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special tokens are added."""
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, on all cores."""
        return [list(e.ids) for e in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each token stands for; none for special tokens."""
        byte_of = {char: byte for byte, char in byte_alphabet().items()}
        table = [b""] * self.vocab_size
        for token, index in self.inner.get_vocab(with_added_tokens=True).items():
            if token != END_OF_TEXT:
                table[index] = bytes(byte_of[char] for char in token)
        return table

    @cached_property
    def max_token_bytes(self) -> int:
        """Length of the longest token: no text of n bytes has fewer than n / max_token_bytes tokens."""
        return max(map(len, self.token_bytes))

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes[t] for t in tokens).decode("utf-8", errors="replace")

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that a chat becomes."""
        try:
            # the block trimming of transformers, so that an exported or imported template renders the same there
            around = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            template = around.from_string(self.chat_template)
            return template.render(messages=list(messages), add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the stored form."""
        return artefacts.digest_json({"tokenizer": self.inner.to_str(), "chat_template": self.chat_template})

    def write(self, folder: Path) -> None:
        """The files of FILES, into a folder that an artefact is being made in."""
        (folder / FILES[0]).write_text(self.inner.to_str(pretty=True), encoding="utf-8")
        (folder / FILES[1]).write_text(self.chat_template, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Tokenizer:
        """The tokenizer of an artefact that holds FILES (a tokenizer, a checkpoint, a corpus)."""
        try:
            inner = tokenizers.Tokenizer.from_file(str(folder / FILES[0]))
            template = (folder / FILES[1]).read_text(encoding="utf-8")
        except Exception as error:  # noqa: BLE001  tokenizers raises bare Exception for every fault of a file
            raise ArtefactError(f"{folder / FILES[0]}: not a readable tokenizer: {error}") from None
        return cls(inner, "byte" if inner.get_vocab_size() == 257 else "bpe", template)

    def save(self, root: Path) -> Path:
        """Store under tokenizers/<digest>; returns that folder. Storing twice changes nothing."""
        place = root / "tokenizers" / self.digest
        if not place.is_dir():
            with artefacts.new_folder(place) as folder:
                self.write(folder)
                files = artefacts.digest_files(folder)
                manifest = {"kind": self.kind, "vocab_size": self.vocab_size, "digest": self.digest, "files": files}
                artefacts.write_json(folder / "manifest.json", {"format_version": artefacts.FORMAT_VERSION, **manifest})
        return place
