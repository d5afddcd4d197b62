"""What the kinds of tokenizer differ in: the parts of their tokenizer.json, the bytes of a token, the ids of a text."""

from __future__ import annotations

import json
import re
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ulm.errors import UnknownCharacterError

MAX_PIECE_CHARS = 64  # longer ones hardly come again
MAX_PIECES = 1 << 17  # kept; about 200 bytes each
NUM_CODE_POINTS = 0x110000
ONLY_SPLIT = ("Split", "Digits", "Punctuation", "UnicodeScripts")  # others drop white space, or add to a text

# Unicode's White_Space, which is \s in the pattern below (Python's \s has U+001C to U+001F too).
_SPACE = r" \t\n\x0b\x0c\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_MARK = r"!-/:-@\[-`{-~"  # ASCII punctuation
# GPT-2's pattern, 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ (Radford et al., 2019;
# encoder.py of the release), where ASCII decides what matches. Elsewhere a piece runs to the next white space: several
# of its words, for every word ends there. So the pieces of a text have, end to end, the tokens of the text.
PIECES = re.compile(
    rf"""'(?:[stmd]|re|ve|ll)
    |[ ]?[A-Za-z]++(?![^\x00-\x7f])
    |[ ]?[0-9]++(?![^\x00-\x7f])
    |[ ]?[{_MARK}]++(?=[A-Za-z0-9{_SPACE}]|\Z)
    |[{_SPACE}]+(?![^{_SPACE}])
    |[{_SPACE[1:]}](?=[^{_SPACE}])
    |[{_SPACE}]?[^{_SPACE}]+""",
    re.VERBOSE,
)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, as byte-level vocabularies spell their tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


class Coder(Protocol):
    """How one tokenizer codes."""

    def spell(self, token: str) -> bytes:
        """The bytes of a token, given as the vocabulary has it."""

    def ids(self, text: str) -> NDArray[Any]:
        """Token ids of a text, as unsigned integers."""


class ByteLevel:
    """Byte-level BPE behind GPT-2's pattern. Ids of pieces are kept, for text repeats its words."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._byte_of = {char: byte for byte, char in byte_alphabet().items()}
        self._ids_of = _Pieces(inner)

    @staticmethod
    def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
        """The part that splits text into words of bytes."""
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    @classmethod
    def made(cls, inner: tokenizers.Tokenizer) -> bool:
        """Whether this Hugging Face tokenizer is of this kind."""
        return isinstance(inner.model, models.BPE) and repr(inner.pre_tokenizer) == repr(cls.pre_tokenizer())

    def spell(self, token: str) -> bytes:
        return bytes(self._byte_of[char] for char in token)

    def ids(self, text: str) -> NDArray[Any]:
        return np.frombuffer(b"".join(map(self._ids_of.__getitem__, PIECES.findall(text))), np.uint32)


class _Pieces(dict[str, bytes]):
    """Ids of the pieces met so far, as uint32."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner

    def __missing__(self, piece: str) -> bytes:
        encoded = self._inner.encode_batch_fast([piece], add_special_tokens=False)[0]  # fast: without offsets
        ids = np.array(encoded.ids, np.uint32).tobytes()
        if len(piece) <= MAX_PIECE_CHARS:
            if len(self) >= MAX_PIECES:
                self.clear()
            self[piece] = ids
        return ids


class Bytes(ByteLevel):
    """A BPE without merges: id b is byte b."""

    @staticmethod
    def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
        """The part that spells text as bytes."""
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    @classmethod
    def made(cls, inner: tokenizers.Tokenizer) -> bool:
        """Whether this Hugging Face tokenizer is of this kind."""
        alphabet = {char: byte for byte, char in byte_alphabet().items()}
        return super().made(inner) and inner.get_vocab(with_added_tokens=False) == alphabet

    def ids(self, text: str) -> NDArray[Any]:
        return np.frombuffer(text.encode(), np.uint8)


class Foreign(ByteLevel):
    """A byte-level BPE of another maker: words split by another pattern, perhaps of text in normal form C."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        super().__init__(inner)
        self._inner = inner

    @classmethod
    def made(cls, inner: tokenizers.Tokenizer) -> bool:
        """Whether this Hugging Face tokenizer is of this kind."""
        in_form = inner.normalizer is None or isinstance(inner.normalizer, normalizers.NFC)
        is_of_bytes = isinstance(inner.model, models.BPE) and _spells_bytes(inner.pre_tokenizer)
        return in_form and is_of_bytes and isinstance(inner.decoder, decoders.ByteLevel)

    def ids(self, text: str) -> NDArray[Any]:
        encoded = self._inner.encode_batch_fast([text], add_special_tokens=False)[0]  # fast: without offsets
        return np.array(encoded.ids, np.uint32)


def _spells_bytes(pre_tokenizer: Any) -> bool:
    """Whether it spells all of a text as bytes, once, and beside that only splits it."""
    if pre_tokenizer is None:
        return False
    stored = json.loads(pre_tokenizer.__getstate__())
    parts = stored["pretokenizers"] if stored["type"] == "Sequence" else [stored]
    spelling = [part for part in parts if part["type"] == "ByteLevel"]
    splitting = [part for part in parts if part["type"] in ONLY_SPLIT and part.get("behavior") != "Removed"]
    is_all = len(spelling) == 1 and len(spelling) + len(splitting) == len(parts)
    return is_all and not spelling[0]["add_prefix_space"]


class Characters:
    """One token per Unicode character; those outside the vocabulary are refused."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._id_of = np.full(NUM_CODE_POINTS, NUM_CODE_POINTS, np.uint32)  # no id is so large
        for token, index in inner.get_vocab(with_added_tokens=False).items():
            self._id_of[ord(token)] = index

    @staticmethod
    def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
        """The part that splits text into characters, line ends included."""
        return pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")

    @classmethod
    def made(cls, inner: tokenizers.Tokenizer) -> bool:
        """Whether this Hugging Face tokenizer is of this kind."""
        return isinstance(inner.model, models.WordLevel) and repr(inner.pre_tokenizer) == repr(cls.pre_tokenizer())

    def spell(self, token: str) -> bytes:
        return token.encode()

    def ids(self, text: str) -> NDArray[Any]:
        ids: NDArray[np.uint32] = self._id_of[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")]
        if unknown := np.flatnonzero(ids == NUM_CODE_POINTS)[:1].tolist():
            char = text[unknown[0]]
            raise UnknownCharacterError(
                f"character U+{ord(char):04X} {char!r} is not in the vocabulary of this tokenizer"
            )
        return ids


KINDS: dict[str, type[ByteLevel] | type[Characters]] = {
    "byte": Bytes,
    "char": Characters,
    "bpe": ByteLevel,
    "foreign": Foreign,
}


def kind_of(inner: tokenizers.Tokenizer) -> str | None:
    """The kind of a Hugging Face tokenizer, told by its parts; None for one that would code text in another way."""
    all_are_special = all(token.special for token in inner.get_added_tokens_decoder().values())
    ours = inner.normalizer is None and all_are_special
    return next((kind for kind, coder in KINDS.items() if (ours or kind == "foreign") and coder.made(inner)), None)
