"""Byte-level BPE (arXiv 1508.07909; bytes and splitting pattern of GPT-2), trained on a sample of the corpus."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ulm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer, byte_alphabet


def default_vocab_size(text_bytes: int) -> int:
    """2,048 / 4,096 / 8,192 / 16,384 tokens for text below 2 / 16 / 256 MB / above."""
    limits = ((2_000_000, 2_048), (16_000_000, 4_096), (256_000_000, 8_192))
    return next((size for limit, size in limits if text_bytes < limit), 16_384)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A BPE of at most `vocab_size` tokens, <|endoftext|> included; the same texts give the same tokenizer.

    Text too short for that many merges gives a smaller vocabulary.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_alphabet().values()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner, "bpe")
