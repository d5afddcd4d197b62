"""What a file's name says of it: its format, its compression, and its stem without both."""

from __future__ import annotations

from ulm.recipes.corpus import Format

_SUFFIXES: dict[Format, str] = {
    "txt": ".txt .text .rst .tex .log",
    "md": ".md .markdown",
    "html": ".html .htm .xhtml",
    "code": ".py .pyi .js .mjs .jsx .ts .tsx .c .h .cc .cpp .hpp .cs .java .kt .scala .swift .go .rs .rb .php .pl .lua "
    ".r .jl .hs .ml .ex .erl .clj .zig .sh .bash .sql .css",
    "jsonl": ".jsonl .ndjson",
    "csv": ".csv",
    "tsv": ".tsv",
    "parquet": ".parquet",
    "epub": ".epub",
    "pdf": ".pdf",
}
FORMATS: dict[str, Format] = {suffix: form for form, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
TABLES = ("csv", "tsv")
ROWS = ("jsonl", *TABLES, "parquet", "dataset")
BOOKS = ("epub", "pdf")
UNCOMPRESSED = ("parquet", *BOOKS)  # they compress by themselves, and are read from any place within


def by_name(name: str) -> tuple[str, Format | None, str | None]:
    """(stem, format, compression) of a file name: `train.jsonl.gz` is ("train", "jsonl", "gz")."""
    stem, suffix = _cut_suffix(name)
    compression = COMPRESSIONS.get(suffix)
    if compression is not None:
        name = stem
        stem, suffix = _cut_suffix(stem)
    form = FORMATS.get(suffix)
    if form in UNCOMPRESSED and compression is not None:
        form = None
    return (name if form is None else stem), form, compression


def _cut_suffix(name: str) -> tuple[str, str]:
    stem, dot, suffix = name.rpartition(".")
    return (stem, (dot + suffix).lower()) if stem else (name, "")
