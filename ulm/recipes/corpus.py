"""Recipes of `ulm corpus build` and `ulm tokenizer train`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ulm.recipes.base import Recipe, Section


class Source(Section):
    """Where documents come from: a file or folder, or a Hugging Face dataset."""

    path: str | None = None  # a file, a folder or a glob
    dataset: str | None = None  # a hub id, or a folder that `datasets` loads like one
    config: str | None = None  # of the dataset
    split: str | None = None  # of the dataset (None: all it has); of a path: its documents' split
    format: Literal["txt", "md", "py", "jsonl", "parquet"] | None = None  # None: by file name
    text: str = "text"  # column or key that holds the text
    document: Literal["file", "line", "paragraph", "record"] | None = None  # None: file for text, record for rows
    name: str | None = None  # None: the last part of path or dataset
    domain: str | None = None  # None: the source's name
    licence: str = "unknown"
    weight: float = Field(1.0, gt=0)  # rows of this source stand so often in an epoch

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path or dataset")
        if self.config is not None and self.dataset is None:
            raise ValueError("config belongs to a dataset")
        return self


class Clean(Section):
    """Cleaning stages; each counts what it dropped and why."""

    nfc: bool = True  # Unicode NFC
    control: bool = True  # drop control characters except tab and newline
    min_document_bytes: int = Field(1, ge=1)
    max_document_bytes: int = Field(10_000_000, ge=1)  # a longer document is cut into pieces, and counted
    duplicate_exact: bool = True  # case- and space-blind


class Split(Section):
    """Shares of documents held out, by document hash. Files named train/val/test keep their own split."""

    val: float = Field(0.05, ge=0, lt=1)
    test: float = Field(0.05, ge=0, lt=1)


class TokenizerSection(Section):
    """Which tokenizer: bytes, or byte-level BPE trained on a sample of the training split."""

    kind: Literal["byte", "bpe"] = "bpe"
    vocab_size: int | None = Field(None, ge=258)  # BPE; None: by amount of text (2,048 to 16,384)
    sample_bytes: int = Field(20_000_000, ge=1_000)  # text that BPE is trained on

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if self.kind == "byte" and self.vocab_size is not None:
            raise ValueError("byte has a fixed vocabulary; leave vocab_size out")
        return self


class CorpusRecipe(Recipe):
    """What `ulm corpus build` needs."""

    sources: list[Source] = Field(min_length=1)
    clean: Clean = Clean()
    split: Split = Split()
    tokenizer: TokenizerSection | str = TokenizerSection()  # or a tokenizer's digest or path
    workers: int | None = Field(None, ge=1)  # None: the cluster's CPUs; the digest does not depend on it


class TokenizerRecipe(Recipe):
    """What `ulm tokenizer train` needs: the same sources and cleaning as a corpus."""

    sources: list[Source] = Field(min_length=1)
    clean: Clean = Clean()
    split: Split = Split()
    tokenizer: TokenizerSection = TokenizerSection()
    workers: int | None = Field(None, ge=1)
