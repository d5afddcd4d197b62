"""From texts to tokens, and from tokens to shards on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import tokenizers
from numpy.typing import NDArray

from pipelines.corpus.clean import cut
from ulm import artefacts, runtime
from ulm.corpus.manifest import token_dtype
from ulm.errors import ConfigError
from ulm.recipes.corpus import TokenizerSection
from ulm.tokenizers.bpe import default_vocab_size, train_bpe
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.tokenizer import Tokenizer

SHARD_BYTES = 256 << 20
BATCH_BYTES = 1 << 20  # of text that is encoded at once


def make_tokenizer(section: TokenizerSection, text_bytes: int, sample: Iterable[str]) -> Tokenizer:
    """The tokenizer that a recipe describes; `text_bytes` of all the text sets a vocabulary size left open."""
    if section.kind == "byte":
        return byte_tokenizer()
    return train_bpe(sample, section.vocab_size or default_vocab_size(text_bytes))


def tokenize(
    texts: Iterable[tuple[int, str]], tokenizer: Tokenizer, max_document_bytes: int
) -> Iterator[list[tuple[int, str, int, bytes]]]:
    """Batches of (row, id of the content, UTF-8 bytes, tokens as stored); a long text becomes several pieces."""
    batch: list[tuple[int, str]] = []
    filled = 0
    for row, text in texts:
        for piece in cut(text, max_document_bytes):
            batch.append((row, piece))
            filled += len(piece)
            if filled >= BATCH_BYTES:
                yield _encoded(batch, tokenizer)
                batch, filled = [], 0
    if batch:
        yield _encoded(batch, tokenizer)


def _encoded(batch: Sequence[tuple[int, str]], tokenizer: Tokenizer) -> list[tuple[int, str, int, bytes]]:
    dtype = token_dtype(tokenizer.vocab_size)
    raws = [text.encode() for _, text in batch]
    if tokenizer.kind == "byte":  # the bytes are the ids; a BPE without merges takes far longer to say so
        stored = [np.frombuffer(raw, np.uint8).astype(dtype).tobytes() for raw in raws]
    else:
        stored = [np.array(ids, dtype).tobytes() for ids in tokenizer.encode_batch([text for _, text in batch])]
    return [
        (row, hashlib.sha256(raw).hexdigest()[:32], len(raw), tokens)
        for (row, _), raw, tokens in zip(batch, raws, stored, strict=True)
    ]


def chosen_rows(batch: pa.Table, chosen: NDArray[Any], first_row: NDArray[Any]) -> pa.Table:
    """Row numbers and texts of those rows of a batch that are chosen."""
    rows = first_row[batch["unit"].to_numpy()] + batch["index"].to_numpy()
    take = chosen[rows]
    return pa.table({"row": pa.array(rows[take]), "text": batch["text"].filter(pa.array(take))})


def token_table(encoded: list[tuple[int, str, int, bytes]]) -> pa.Table:
    """A batch of `tokenize` as it travels."""
    types = {"row": pa.int64(), "id": pa.string(), "num_bytes": pa.int64(), "tokens": pa.large_binary()}
    columns = list(zip(*encoded, strict=True)) or [()] * len(types)
    return pa.table({name: pa.array(c, t) for (name, t), c in zip(types.items(), columns, strict=True)})


@lru_cache(maxsize=1)
def stored_tokenizer(stored: str, kind: str, chat_template: str) -> Tokenizer:
    """The tokenizer that travelled as these texts, kept for the next batch."""
    # Ray runs one task per core already; threads of the tokenizer's own would only contend with them.
    runtime.set_variable("TOKENIZERS_PARALLELISM", "false", keep=False)
    return Tokenizer(tokenizers.Tokenizer.from_str(stored), kind, chat_template)


class ShardWriter:
    """Writes one split's tokens, end to end, in shards of `shard_bytes`; they do not depend on how tokens arrive."""

    def __init__(self, folder: Path, split: str, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.split, self.shard_bytes = folder, split, shard_bytes
        self.num_bytes = 0
        self.digests: dict[str, str] = {}  # file name to SHA-256, of finished shards
        self.sizes: list[int] = []
        self._file: BinaryIO | None = None
        self._hash: Any = None

    def write(self, tokens: bytes) -> None:
        """Append tokens as stored."""
        view = memoryview(tokens)
        while view:
            if self._file is None:
                name = f"{self.split}-{len(self.sizes):05d}.bin"
                self._file = (self.folder / name).open("wb")
                self._hash = hashlib.sha256()
                self.sizes.append(0)
            part = view[: self.shard_bytes - self.sizes[-1]]
            self._file.write(part)
            self._hash.update(part)
            self.sizes[-1] += len(part)
            self.num_bytes += len(part)
            view = view[len(part) :]
            if self.sizes[-1] == self.shard_bytes:
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
