"""What one reader reads at once, and how its content is to be taken."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.corpus.reading.formats import ROWS
from ulm.recipes.corpus import Source


@dataclass(frozen=True)
class Unit:
    """What one reader reads at once: a file, a part of one, or rows of a dataset."""

    source: int
    path: str  # as recorded: relative to the source
    file: str  # where it is: a local path in os.fsdecode's spelling, a URI, or what load_dataset takes
    format: str  # of a file's content, or "dataset"
    compression: str | None = None  # "gz" or "zst"
    split: str | None = None  # the file's own
    start: int = 0  # byte, row group or row; of a streamed dataset: its shard
    end: int | None = None  # None: to the end; of a streamed dataset: the number of its shards
    row: int = 0  # number of the first row, of parquet and datasets
    piece: int = 0  # number of this piece of a file that is one document
    size: int = 0  # bytes, to share the work out
    dataset_split: str | None = None
    version: str | None = None  # changes with the content, to know an unfinished build's files and datasets again


def document_rule(form: str, source: Source) -> str:
    """What one document is in files of a format: file, line, paragraph or record."""
    return source.document or ("record" if form in ROWS else "file")


def is_html(unit: Unit, source: Source) -> bool:
    """Whether the unit's texts are HTML, to be given whole and made plain before anything else."""
    return unit.format in ("html", "epub") or source.html
