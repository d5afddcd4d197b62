"""Recipes of `ulm corpus build`, `ulm corpus extend` and `ulm tokenizer train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from ulm.recipes.base import Recipe, Section
from ulm.recipes.clustering import CorpusClustering

Format = Literal["txt", "md", "html", "code", "jsonl", "csv", "tsv", "parquet", "epub", "pdf"]


class Source(Section):
    """Where documents come from: files here or in an object store, or a Hugging Face dataset."""

    path: str | None = None  # a file, a folder, a glob, or the URI of one (s3://, gs://, hdfs://, http://, …)
    dataset: str | None = None  # a hub id, or a folder that `datasets` loads like one
    config: str | None = None  # of the dataset
    split: str | None = None  # of the dataset (None: all it has); of a path: its documents' split
    streaming: bool = False  # of the dataset: read it row by row, without a copy on disk
    max_rows: int | None = Field(None, ge=1)  # of the dataset, of each split: the first so many
    format: Format | None = None  # None: by file name
    encoding: str | None = None  # of text files; None: UTF-8, or as a byte order mark says; "auto": guessed if neither
    columns: list[str] | None = None  # names of the columns of csv and tsv files without a header line
    text: str = "text"  # column or key that holds the text
    messages: str | None = None  # column of chat transcripts, lists of {role, content}; instead of text
    source: str | None = None  # columns of parallel text, for encoder-decoders; instead of text
    target: str | None = None
    html: bool = False  # the text column holds HTML; files named .html are HTML anyway
    document: Literal["file", "line", "paragraph", "record"] | None = None  # None: file for text, record for rows
    name: str | None = None  # None: the last part of path or dataset
    domain: str | None = None  # None: the source's name
    licence: str = "unknown"
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)  # rows of this source stand so often in an epoch

    @property
    def is_pair(self) -> bool:
        """Whether its documents are a source text and a target text."""
        return self.source is not None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path or dataset")
        for name in ("config", "streaming", "max_rows"):
            if getattr(self, name) and self.dataset is None:
                raise ValueError(f"{name} belongs to a dataset")
        return self

    @model_validator(mode="after")
    def _one_kind_of_text(self) -> Self:
        if (self.source is None) != (self.target is None):
            raise ValueError("source and target columns come together")
        given = [name for name in ("text", "messages", "source") if name in self.model_fields_set]
        if len([name for name in given if getattr(self, name) is not None]) > 1:
            raise ValueError("give one of text, messages, or source and target")
        if self.document in ("line", "paragraph") and (self.messages or self.source):
            raise ValueError("a chat or a pair of texts is one document, it has no lines or paragraphs of its own")
        return self


S = TypeVar("S", bound=Section)


def _switch(section: type[Section]) -> Any:
    """A stage that `true` turns on with its defaults and `false` or null turns off."""

    def read(given: Any) -> Any:
        return section() if given is True else None if given is False else given

    return BeforeValidator(read)


class Language(Section):
    """Documents in these languages, by fastText's lid.176 (compressed)."""

    keep: list[str] = Field(["en"], min_length=1)  # ISO 639-1 codes
    min_confidence: float = Field(0.65, ge=0, le=1)  # FineWeb's (arXiv 2406.17557, 3.3)


class GopherQuality(Section):
    """Gopher's rules of quality (arXiv 2112.11446, A.1.1); words are what white space parts."""

    min_words: int = Field(50, ge=0)
    max_words: int = Field(100_000, ge=1)
    min_mean_word_chars: float = 3.0
    max_mean_word_chars: float = 10.0
    max_symbol_word_ratio: float = 0.1  # of hashes, and of ellipses
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = Field(2, ge=0)  # of: the, be, to, of, and, that, have, with


NgramWords = Annotated[int, Field(ge=1, le=64)]


class GopherRepetition(Section):
    """Gopher's bounds on repetition (arXiv 2112.11446, table A1), as shares of the document."""

    max_duplicate_lines: float = 0.3
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_line_chars: float = 0.2
    max_duplicate_paragraph_chars: float = 0.2
    max_top_ngram_chars: dict[NgramWords, float] = {2: 0.2, 3: 0.18, 4: 0.16}
    max_duplicate_ngram_chars: dict[NgramWords, float] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}


class C4Quality(Section):
    """C4's rules (arXiv 1910.10683, 2.2); they take lines out of documents too."""

    min_line_words: int = Field(3, ge=0)
    min_sentences: int = Field(5, ge=0)
    max_word_chars: int = Field(1_000, ge=1)
    citations: bool = True  # take out Wikipedia's marks: [1], [edit], [citation needed]
    terminal_punctuation: bool = True  # drop lines that end without one
    javascript: bool = True  # drop lines that speak of it
    policy: bool = True  # drop lines on cookies and terms of use
    lorem_ipsum: bool = True  # drop documents with it
    curly_bracket: bool = True  # drop documents with one


class FineWebQuality(Section):
    """FineWeb's own rules (arXiv 2406.17557, 3.6)."""

    min_punctuated_lines: float = 0.12
    max_short_lines: float = 0.67
    short_line_chars: int = Field(30, ge=1)
    max_duplicate_line_chars: float = 0.1  # the paper's; datatrove's default is 0.01
    max_newline_word_ratio: float = 0.3  # datatrove's, which FineWeb was made with


class PersonalData(Section):
    """What is replaced by a placeholder, <email>, <phone>, <ip> or <key>; documents are never dropped for it."""

    redact: list[Literal["email", "phone", "ip", "key"]] = Field(["email", "phone", "ip", "key"], min_length=1)
    phone_region: str = "US"  # of numbers without a country code


class EvaluationSet(Section):
    """A set that training text must not hold: every string below `fields` of every record counts."""

    path: str  # a .jsonl, .parquet, .csv, .tsv or .txt file (each line a text), a folder of such, or a glob
    fields: list[str] | None = None  # None: all fields that hold text
    name: str | None = None  # None: the file's or folder's; sets of one name count together


class Decontamination(Section):
    """Documents that share an n-gram of words with an evaluation set are dropped (GPT-3, arXiv 2005.14165, C)."""

    sets: list[EvaluationSet] = Field(min_length=1)
    ngram_words: int = Field(13, ge=2, le=64)
    min_words: int = Field(5, ge=1)  # a text below ngram_words is looked for whole, below this not: too common

    @model_validator(mode="after")
    def _shortest_first(self) -> Self:
        if self.min_words > self.ngram_words:
            raise ValueError("min_words is above ngram_words; it is of texts too short for an n-gram")
        return self


class NearDuplicates(Section):
    """MinHash and LSH over n-grams of words (Broder, 1997), candidates checked by their whole signatures."""

    threshold: float = Field(0.7, gt=0, lt=1)  # Jaccard similarity of the sets of n-grams
    ngram_words: int = Field(5, ge=1, le=64)
    drop: bool = True  # false: near duplicates stay, but never part into different splits


class Clean(Section):
    """Stages in the order they run; each counts what it dropped and why. `true` takes a stage's defaults."""

    encoding: bool = True  # repair text that was decoded wrongly (mojibake)
    nfc: bool = True  # Unicode NFC
    control: bool = True  # drop control characters except tab and newline
    min_document_bytes: int = Field(1, ge=1)
    max_document_bytes: int = Field(10_000_000, ge=1_000)  # a longer document is cut into pieces, and counted
    language: Annotated[Language | None, _switch(Language)] = None
    gopher_quality: Annotated[GopherQuality | None, _switch(GopherQuality)] = None
    gopher_repetition: Annotated[GopherRepetition | None, _switch(GopherRepetition)] = None
    c4_quality: Annotated[C4Quality | None, _switch(C4Quality)] = None
    fineweb_quality: Annotated[FineWebQuality | None, _switch(FineWebQuality)] = None
    decontamination: Decontamination | None = None
    personal_data: Annotated[PersonalData | None, _switch(PersonalData)] = None
    duplicate_exact: bool = True  # case- and space-blind
    duplicate_near: Annotated[NearDuplicates | None, _switch(NearDuplicates)] = NearDuplicates()


class Split(Section):
    """Shares of documents held out, by document hash. Files named train/val/test keep their own split."""

    val: float = Field(0.05, ge=0, lt=1)
    test: float = Field(0.05, ge=0, lt=1)

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError("val and test together leave nothing to train on; their sum must be below 1")
        return self


class TokenizerSection(Section):
    """Which tokenizer: bytes, characters, or byte-level BPE, the last two from a sample of the training split."""

    kind: Literal["byte", "char", "bpe"] = "bpe"
    vocab_size: int | None = Field(None, ge=258)  # BPE; None: by amount of text (2,048 to 16,384)
    sample_bytes: int = Field(10_000_000, ge=1_000)  # text that BPE is trained on; char reads all
    special_tokens: list[str] = []  # beside <|endoftext|>; in documents they stay text
    chat_template: str | None = None  # Jinja, as in transformers; None: "User: …\nAssistant: …"

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if self.kind != "bpe" and self.vocab_size is not None:
            raise ValueError(f"{self.kind} has a vocabulary of its own size; leave vocab_size out")
        if self.kind != "bpe" and "sample_bytes" in self.model_fields_set:
            raise ValueError(f"{self.kind} is not trained on a sample; leave sample_bytes out")
        return self


class SourcesRecipe(Recipe):
    """What all that read sources have in common."""

    sources: list[Source] = Field(min_length=1)
    workers: int | None = Field(None, ge=1)  # None: the cluster's CPUs; the digest does not depend on it


class CorpusRecipe(SourcesRecipe):
    """What `ulm corpus build` needs."""

    clean: Clean = Clean()
    split: Split = Split()
    exclude: list[str] = []  # ids of documents to leave out, as documents.parquet has them
    tokenizer: TokenizerSection | str = TokenizerSection()  # or a tokenizer's name, digest or path
    clustering: CorpusClustering | None = None  # clusters of like documents beside the corpus, for a swarm


class ExtendRecipe(SourcesRecipe):
    """What `ulm corpus extend` needs: more sources for a corpus that is there. Its tokenizer stays."""

    extends: str  # name, digest or path of a corpus
    clean: Clean | None = None  # None: the corpus's own
    split: Split | None = None  # None: the corpus's own
    exclude: list[str] = []
    clustering: CorpusClustering | None = None


class TokenizerRecipe(SourcesRecipe):
    """What `ulm tokenizer train` needs: the same sources and cleaning as a corpus."""

    clean: Clean = Clean()
    split: Split = Split()
    exclude: list[str] = []
    tokenizer: TokenizerSection = TokenizerSection()
