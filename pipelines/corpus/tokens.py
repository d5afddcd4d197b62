"""From texts to tokens, and from tokens to shards on disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.part import Text
from pipelines.corpus.reading.chats import MARK
from ulm import artefacts, runtime
from ulm.corpus.manifest import token_dtype
from ulm.errors import ConfigError, UnknownCharacterError
from ulm.recipes.corpus import TokenizerSection
from ulm.tokenizers.bpe import default_vocab_size, train_bpe
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.char import char_tokenizer
from ulm.tokenizers.tokenizer import Tokenizer

SHARD_BYTES = 256 << 20
BATCH_BYTES = 1 << 20  # of text that is encoded at once


def make_tokenizer(
    section: TokenizerSection, text_bytes: int, sample: Iterable[str], alphabet: Iterable[str] = ()
) -> Tokenizer:
    """The tokenizer that a recipe describes; `text_bytes` of all the text sets a vocabulary size left open.

    `sample` is what BPE is trained on, `alphabet` the characters that char knows.
    """
    more: dict[str, Any] = {"special_tokens": section.special_tokens}
    if section.chat_template is not None:
        more["chat_template"] = section.chat_template
    if section.kind == "byte":
        return byte_tokenizer(**more)
    if section.kind == "char":
        return char_tokenizer(alphabet, **more)
    return train_bpe(sample, section.vocab_size or default_vocab_size(text_bytes), **more)


def tokenize_part(place: Path, texts: Iterable[Text], tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokens of a part's documents, at `place`.

    tokens.bin    end to end, as stored
    counts.npy    [documents, 2]: tokens, and those of them that are a pair's source; -1 for what it cannot spell
    """
    dtype = token_dtype(tokenizer.vocab_size)
    counts: list[NDArray[np.int64]] = []
    start = time.process_time()
    with artefacts.new_folder(place) as folder:
        with (folder / "tokens.bin").open("wb") as file:
            for batch in _batches(texts):
                found, arrays = _counted(batch, tokenizer, dtype)
                counts.append(found)
                for array in arrays:
                    file.write(array.tobytes())
        all_counts = np.concatenate(counts) if counts else np.zeros((0, 2), np.int64)
        np.save(folder / "counts.npy", all_counts, allow_pickle=False)
    return {"documents": len(all_counts), "cpu_seconds": time.process_time() - start}


def _counted(
    batch: list[Text], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> tuple[NDArray[np.int64], list[NDArray[Any]]]:
    """counts.npy's rows of a batch, and the tokens of those documents that can be spelled."""
    is_pair = np.array([text.source_chars is not None for text in batch], np.bool_)
    arrays, known = _encoded([side for text in batch for side in text.sides], tokenizer, dtype)
    ends = np.cumsum(is_pair + 1)
    first = ends - (is_pair + 1)
    for number in np.flatnonzero([text.is_chat for text in batch]).tolist():
        at = int(first[number])
        arrays[at], known[at] = _encoded_chat(batch[number].text, tokenizer, dtype)
    sizes = np.array([len(array) for array in arrays], np.int64)
    found = np.stack([sizes[first] + sizes[ends - 1] * is_pair, sizes[first] * is_pair], axis=1)
    found[~(known[first] & known[ends - 1])] = -1
    spelled = np.repeat(found[:, 0] >= 0, is_pair + 1)
    return found, [array for array, ok in zip(arrays, spelled, strict=True) if ok]


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    filled = 0
    for text in texts:
        batch.append(text)
        filled += len(text.text)
        if filled >= BATCH_BYTES:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def _encoded(
    texts: list[str], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> tuple[list[NDArray[Any]], NDArray[np.bool_]]:
    """Tokens of each text, and which of them the tokenizer can spell."""
    try:
        return tokenizer.encode_arrays(texts, dtype), np.ones(len(texts), np.bool_)
    except UnknownCharacterError:  # whose?
        if len(texts) == 1:
            return [np.zeros(0, dtype)], np.zeros(1, np.bool_)
        halves = [_encoded(half, tokenizer, dtype) for half in (texts[: len(texts) // 2], texts[len(texts) // 2 :])]
        return [a for arrays, _ in halves for a in arrays], np.concatenate([known for _, known in halves])


def _encoded_chat(text: str, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> tuple[NDArray[Any], bool]:
    """Tokens of a transcript: the template's special tokens are ids."""
    try:
        return np.array(tokenizer.encode_marked(text, MARK), dtype), True
    except UnknownCharacterError:
        return np.zeros(0, dtype), False


@lru_cache(maxsize=1)
def stored_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a folder, kept for the next part."""
    # Ray runs one task per core already; threads of the tokenizer's own would only contend with them.
    runtime.set_variable("TOKENIZERS_PARALLELISM", "false", keep=False)
    return Tokenizer.read(Path(folder))


class ShardWriter:
    """Writes one split's tokens, end to end, in shards of `shard_bytes`; they do not depend on how tokens arrive.

    `before`: the shards of a corpus that is extended, which come first and stay as they are.
    """

    def __init__(
        self, folder: Path, split: str, shard_bytes: int = SHARD_BYTES, before: dict[str, str] | None = None
    ) -> None:
        self.folder, self.split, self.shard_bytes = folder, split, shard_bytes
        self.num_bytes = 0
        self.digests: dict[str, str] = dict(before or {})  # file name to SHA-256, of finished shards
        self._filled = 0
        self._file: BinaryIO | None = None
        self._hash: Any = None

    def write(self, tokens: bytes | memoryview) -> None:
        """Append tokens as stored."""
        view = memoryview(tokens)
        while view:
            if self._file is None:
                self._file = (self.folder / f"{self.split}-{len(self.digests):05d}.bin").open("wb")
                self._hash, self._filled = hashlib.sha256(), 0
            part = view[: self.shard_bytes - self._filled]
            self._file.write(part)
            self._hash.update(part)
            self._filled += len(part)
            self.num_bytes += len(part)
            view = view[len(part) :]
            if self._filled == self.shard_bytes:
                self.close()

    def close(self) -> None:
        """Finish the shard that is open."""
        if self._file is not None:
            self.digests[Path(self._file.name).name] = self._hash.hexdigest()
            self._file.close()
            self._file = None


def find_tokenizer(text: str, *, root: Path, near: Path | None) -> Tokenizer:
    """A tokenizer that stands already: by path, name, digest or its beginning. Raises ArtefactError if damaged."""
    folder = root / "tokenizers"
    place = artefacts.find(
        text, folder=folder, names_in=folder / "names", what="tokenizer", place="tokenizer", near=near
    )
    if (place / "manifest.json").is_file() and "vocab_size" in (found := artefacts.read_manifest(place, "tokenizer")):
        artefacts.verify_files(place, found.get("files", {}))
    tokenizer = Tokenizer.read(place)
    if tokenizer.vocab_size > 2**32:
        raise ConfigError("tokenizer", f"{tokenizer.vocab_size} ids do not fit 32 bits")
    return tokenizer
