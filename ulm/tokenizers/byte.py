"""Bytes as tokens: id b is byte b, id 256 is <|endoftext|>, other special tokens follow. No training, any text."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models

from ulm.tokenizers.chat import CHAT_TEMPLATE
from ulm.tokenizers.kinds import Bytes, byte_alphabet
from ulm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer, check_section


def byte_tokenizer(special_tokens: Sequence[str] = (), chat_template: str = CHAT_TEMPLATE) -> Tokenizer:
    """The byte tokenizer: a BPE without merges, so that every reader of tokenizer.json knows it.

    Raises ConfigError, like the other kinds, for special tokens not spelled <|name|> and for an unusable template.
    """
    check_section(special_tokens, chat_template)
    inner = tokenizers.Tokenizer(models.BPE(vocab={char: byte for byte, char in byte_alphabet().items()}, merges=[]))
    inner.pre_tokenizer = Bytes.pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT, *special_tokens])
    return Tokenizer(inner, "byte", chat_template)
