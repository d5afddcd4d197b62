"""Bytes as tokens: id b is byte b, id 256 is <|endoftext|>. No training, any text."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ulm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer, byte_alphabet


def byte_tokenizer() -> Tokenizer:
    """The one byte tokenizer: a BPE without merges, so that every reader of tokenizer.json knows it."""
    inner = tokenizers.Tokenizer(models.BPE(vocab={char: byte for byte, char in byte_alphabet().items()}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    return Tokenizer(inner, "byte")
