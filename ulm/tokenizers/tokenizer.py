"""A tokenizer as every part uses it: text to ids and back, bytes per token, the chat template, a digest.

All kinds are stored as Hugging Face `tokenizer.json`, so that other tools open them unchanged.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from numpy.typing import DTypeLike, NDArray

from ulm import artefacts
from ulm.errors import ArtefactError, ConfigError
from ulm.tokenizers.chat import CHAT_TEMPLATE, check_template, marked, render_chat
from ulm.tokenizers.chat import END_OF_TEXT as END_OF_TEXT  # where all look for it
from ulm.tokenizers.kinds import KINDS, Coder, kind_of

FILES = ("tokenizer.json", "chat_template.jinja")
# A letter beside a bar: no word of GPT-2's pattern spells it, so that no BPE can learn it as a token of text.
SPECIAL = re.compile(r"<\|[A-Za-z][A-Za-z0-9_-]*\|>")
FIRST_MARK = 0xE000  # private use characters, and those after


class Tokenizer:
    """Text comes back unchanged, and text that spells a special token stays text.

    A byte or BPE tokenizer takes any valid Unicode text; char raises UnknownCharacterError outside its alphabet.
    """

    def __init__(self, inner: tokenizers.Tokenizer, kind: str, chat_template: str = CHAT_TEMPLATE) -> None:
        self.inner, self.kind, self.chat_template = inner, kind, chat_template
        inner.encode_special_tokens = True
        self.vocab_size: int = inner.get_vocab_size()
        added = inner.get_added_tokens_decoder()
        self.special_ids = {token.content: index for index, token in added.items() if token.special}
        self._plain_ids = {token.content: index for index, token in added.items() if not token.special}
        if END_OF_TEXT not in self.special_ids:
            raise ArtefactError(f"the tokenizer has no {END_OF_TEXT} token; make it with `ulm tokenizer train`")
        self.eot_id: int = self.special_ids[END_OF_TEXT]

    @cached_property
    def _coder(self) -> Coder:
        return KINDS[self.kind](self.inner)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special tokens are added."""
        return list(self._coder.ids(text).tolist())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Iterable[str], dtype: DTypeLike) -> list[NDArray[Any]]:
        """Token ids of many texts as arrays, on one core; `dtype` must hold the vocabulary."""
        return [self._coder.ids(text).astype(dtype) for text in texts]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each token stands for; none for special tokens."""
        table = [b""] * self.vocab_size
        for token, index in self.inner.get_vocab(with_added_tokens=True).items():
            if token in self._plain_ids:  # spelled as it is, where other tokens are in the vocabulary's own way
                table[index] = token.encode()
            elif token not in self.special_ids:
                table[index] = self._coder.spell(token)
        return table

    @cached_property
    def max_token_bytes(self) -> int:
        """Length of the longest token, special ones as a chat spells them.

        So no text or rendered chat of n bytes has fewer than n / max_token_bytes tokens.
        """
        return max(map(len, [*self.token_bytes, *self.special_ids]))

    def decode(self, tokens: Iterable[int], *, spell_special: bool = False) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD. Special tokens are no text unless spelled."""
        table = self._spelled if spell_special else self.token_bytes
        return b"".join(map(table.__getitem__, tokens)).decode("utf-8", errors="replace")

    @cached_property
    def _spelled(self) -> list[bytes]:
        table = list(self.token_bytes)
        for token, index in self.special_ids.items():
            table[index] = token.encode()
        return table

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt that a chat becomes, or the transcript; RequestError if the template refuses the messages."""
        return render_chat(self.chat_template, messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a rendered chat: special tokens of the template are their ids, those in messages stay text."""
        # A mark that the chat does not hold splits what a message says like the beginning of a special token.
        plain = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        held = set(plain)
        mark = next(char for char in map(chr, itertools.count(FIRST_MARK)) if char not in held)
        text = self.render_chat(marked(messages, mark), add_generation_prompt=add_generation_prompt)
        return self.encode_marked(text, mark)

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Token ids of a chat rendered from `marked` messages: special tokens are ids where no mark parts them."""
        tokens: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, self.special_ids))})", text):
            special = self.special_ids.get(part)
            tokens += self.encode(part.replace(mark, "")) if special is None else [special]
        return tokens

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
        kind = kind_of(inner)
        if kind is None:
            kinds = ", ".join(KINDS)
            raise ArtefactError(f"{folder / FILES[0]}: of no known kind, which are {kinds}")
        return cls(inner, kind, template)

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


def check_section(special_tokens: Sequence[str], chat_template: str) -> None:
    """Nothing, or ConfigError for special tokens or a chat template that no tokenizer takes."""
    for index, token in enumerate(special_tokens):
        place = f"tokenizer.special_tokens.{index}"
        if token == END_OF_TEXT:
            raise ConfigError(place, f"every tokenizer has {END_OF_TEXT}", "leave it out")
        if not SPECIAL.fullmatch(token):
            remedy = "like <|user|>: between <| and |> a letter, then letters, digits, _ and -"
            raise ConfigError(place, f"{token!r} is not spelled as a special token", remedy)
        if token in special_tokens[:index]:
            raise ConfigError(place, f"{token} stands twice")
    check_template(chat_template)
