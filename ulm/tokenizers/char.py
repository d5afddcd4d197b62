"""Characters as tokens: ids in the order of code points, then <|endoftext|>, then other special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models

from ulm.tokenizers.chat import CHAT_TEMPLATE
from ulm.tokenizers.kinds import Characters
from ulm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer, check_section


def char_tokenizer(
    alphabet: Iterable[str], special_tokens: Sequence[str] = (), chat_template: str = CHAT_TEMPLATE
) -> Tokenizer:
    """A tokenizer of the characters that `alphabet`, characters or whole texts, holds; it refuses all others."""
    check_section(special_tokens, chat_template)
    chars = sorted({char for text in alphabet for char in text})
    # Without an <unk> in the vocabulary, Hugging Face's reader refuses an unknown character too.
    inner = tokenizers.Tokenizer(models.WordLevel({char: index for index, char in enumerate(chars)}))
    inner.pre_tokenizer = Characters.pre_tokenizer()
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([END_OF_TEXT, *special_tokens])
    return Tokenizer(inner, "char", chat_template)
