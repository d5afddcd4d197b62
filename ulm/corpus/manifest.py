"""An immutable corpus on disk: opened by name, digest or path, verified, its tokens and documents read."""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ulm import artefacts
from ulm.corpus.shape import check_manifest, check_shards, stand_within
from ulm.errors import ArtefactError
from ulm.recipes.base import Section
from ulm.recipes.corpus import Clean, Split
from ulm.registry import config_error
from ulm.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "val", "test")
DOCUMENTS = "documents.parquet"
REPORTS = ("report.html", "report.json")  # views of the manifest, made anew when a clustering is added: not digested
DOCUMENT_COLUMNS = (
    "id", "source", "domain", "licence", "path", "offset", "split",
    "first_token", "num_tokens", "num_source_tokens", "num_bytes",
)  # fmt: skip
NUMBER_COLUMNS = ("offset", "first_token", "num_tokens", "num_source_tokens", "num_bytes")  # the others are text

S = TypeVar("S", bound=Section)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How token ids are stored: little-endian, 16 bits where they suffice."""
    return np.dtype("<u2" if vocab_size <= 65_535 else "<u4")


class ShardReader:
    """The tokens of one split: its shards, memory-mapped and laid end to end."""

    def __init__(self, paths: list[Path], dtype: np.dtype[Any]) -> None:
        self._shards = [np.memmap(path, dtype=dtype, mode="r") for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards]).tolist()
        self.num_tokens: int = self._ends[-1] if self._ends else 0
        self._dtype = dtype

    def __len__(self) -> int:
        return self.num_tokens

    def read(self, first: int, count: int) -> NDArray[Any]:
        """Tokens first .. first + count, as stored; of one shard without a copy. Raises IndexError beyond the end."""
        if first < 0 or count < 0 or first + count > self.num_tokens:
            raise IndexError(f"tokens {first} to {first + count} of {self.num_tokens}")
        parts: list[NDArray[Any]] = []
        at = bisect_right(self._ends, first)
        while count:
            begin = first - (self._ends[at - 1] if at else 0)
            part = self._shards[at][begin : begin + count]
            parts.append(part)
            first, count, at = first + len(part), count - len(part), at + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self._dtype)


class Corpus:
    """One version of a corpus. Everything is read when it is first asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.digest: str = manifest["digest"]
        self.name: str = manifest["name"]
        self.splits: tuple[str, ...] = tuple(split for split in SPLITS if split in manifest["tokens"])
        self._readers: dict[str, ShardReader] = {}

    @classmethod
    def open(
        cls,
        text: str,
        *,
        root: Path | None = None,
        near: Path | None = None,
        place: str = "corpus",
        verify: bool = True,
    ) -> Corpus:
        """The corpus of a name, a digest (or its beginning) or a path; `verify` reads all its files once.

        Raises ConfigError at `place` if there is none, ArtefactError naming the file that is missing or damaged.
        """
        if root is None:
            from ulm import runtime

            root = runtime.root()
        folder = root / "corpora"
        found = artefacts.find(text, folder=folder, names_in=folder / "names", what="corpus", place=place, near=near)
        corpus = cls.read(found, verify=verify)
        if "/" not in text and (folder / "names" / text).is_file():
            corpus.name = text  # the manifest has the name that it was first built under
        return corpus

    @classmethod
    def read(cls, folder: Path, *, verify: bool = True) -> Corpus:
        """The corpus in a folder, whose manifest has been checked: its shards are files of that folder.

        Raises ArtefactError naming the manifest and its key, or the file.
        """
        manifest = artefacts.read_manifest(folder, "corpus")
        path = folder / "manifest.json"
        check_manifest(path, manifest)
        if DOCUMENTS not in manifest["files"]:
            raise ArtefactError(f"{path}: files.{DOCUMENTS}: missing")
        if artefacts.digest_json(manifest["content"]) != manifest["digest"]:
            raise ArtefactError(f"{path}: its content does not match its digest; the file is damaged, copy it again")
        if verify:
            artefacts.verify_files(folder, manifest["files"])
        check_shards(folder, manifest)
        return cls(folder, manifest)

    def num_tokens(self, split: str) -> int:
        """Stored tokens of a split, 0 where the corpus has none."""
        return int(self.manifest["tokens"].get(split, 0))

    def tokens(self, split: str) -> ShardReader:
        """The tokens of a split: each document's own, without any separator."""
        if split not in self._readers:
            paths = [self.folder / name for name in self.manifest["shards"].get(split, [])]
            self._readers[split] = ShardReader(paths, np.dtype(self.manifest["dtype"]))
        return self._readers[split]

    def settings(self) -> tuple[Clean, Split]:
        """How its documents were cleaned and split, for more of them; ArtefactError where it does not say that."""
        return self._section("clean", Clean), self._section("split", Split)

    def _section(self, key: str, section: type[S]) -> S:
        try:
            return section.model_validate(self.manifest.get(key))
        except ValidationError as error:
            problem = config_error(error, section, key)
            raise ArtefactError(f"{self.folder / 'manifest.json'}: {problem}; state {key} in the recipe") from None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the stored tokens."""
        return Tokenizer.read(self.folder)

    @cached_property
    def documents(self) -> pa.Table:
        """One row per document with DOCUMENT_COLUMNS, in corpus order over all splits."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / DOCUMENTS
        types = [(name, pa.int64() if name in NUMBER_COLUMNS else pa.string()) for name in DOCUMENT_COLUMNS]
        try:
            table = pq.read_table(path, columns=list(DOCUMENT_COLUMNS)).cast(pa.schema(types))
        except (pa.ArrowException, ValueError, OSError) as error:  # ValueError: of columns that are not all there
            raise ArtefactError(f"{path}: not readable: {error}") from None
        if not stand_within(table, {split: self.num_tokens(split) for split in SPLITS}):
            raise ArtefactError(f"{path}: has documents that its shards do not; copy the corpus again")
        return table

    @cached_property
    def weights(self) -> dict[str, float]:
        """How often rows of each source stand in an epoch."""
        return {source["name"]: float(source["weight"]) for source in self.manifest["sources"]}

    def document_texts(self, row: int) -> tuple[str, ...]:
        """The cleaned text of a row of `documents`; of a pair its source and its target."""
        document = self.documents.slice(row, 1).to_pylist()[0]
        tokens = self.tokens(document["split"]).read(document["first_token"], document["num_tokens"])
        at = document["num_source_tokens"]
        sides = (tokens[:at], tokens[at:]) if at else (tokens,)
        return tuple(self.tokenizer.decode(side.tolist(), spell_special=True) for side in sides)

    def document_text(self, row: int) -> str:
        """The cleaned text of a row of `documents`; of a pair its source, a line end, its target."""
        return "\n".join(self.document_texts(row))
