"""Byte-level BPE (arXiv 1508.07909; bytes and splitting pattern of GPT-2), trained on a sample of the corpus."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, trainers

from ulm.errors import ConfigError
from ulm.tokenizers.chat import CHAT_TEMPLATE
from ulm.tokenizers.kinds import ByteLevel, byte_alphabet
from ulm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer, check_section

# The trainer's time is quadratic in the length of a word: 10 s for one of 80 kB, hours for 1 MB.
MAX_RUN_CHARS = 1_000
LONG_RUN = re.compile(rf"\S{{{MAX_RUN_CHARS}}}|\s{{{MAX_RUN_CHARS}}}")


def default_vocab_size(text_bytes: int) -> int:
    """2,048 / 4,096 / 8,192 / 16,384 tokens for text below 2 / 16 / 256 MB / above."""
    limits = ((2_000_000, 2_048), (16_000_000, 4_096), (256_000_000, 8_192))
    return next((size for limit, size in limits if text_bytes < limit), 16_384)


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (), chat_template: str = CHAT_TEMPLATE
) -> Tokenizer:
    """A BPE of at most `vocab_size` tokens, special ones included (the first ids); equal texts, equal tokenizer.

    Text too short for that many merges gives a smaller vocabulary. For training alone, a run of more than
    MAX_RUN_CHARS characters without or of nothing but white space is cut.
    """
    check_section(special_tokens, chat_template)
    special = [END_OF_TEXT, *special_tokens]
    if vocab_size < (least := len(special) + 256):
        problem = f"{vocab_size} tokens do not hold 256 bytes and {len(special)} special tokens"
        raise ConfigError("tokenizer.vocab_size", problem, f"{least} or more")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = ByteLevel.pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(byte_alphabet().values()),
        show_progress=False,
    )
    inner.train_from_iterator((part for text in texts for part in _without_long_runs(text)), trainer)
    return Tokenizer(inner, "bpe", chat_template)


def _without_long_runs(text: str) -> Iterator[str]:
    start = 0
    for run in LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]
