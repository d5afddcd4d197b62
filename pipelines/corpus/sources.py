"""Which files, byte ranges and rows a recipe's sources mean, in corpus order, as units of work for readers."""

from __future__ import annotations

import codecs
import glob
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from encodings.aliases import aliases
from pathlib import Path

from pipelines.corpus.reading.formats import BOOKS, FORMATS, ROWS, TABLES, UNCOMPRESSED, by_name
from pipelines.corpus.reading.places import Found, brief, find_files
from pipelines.corpus.reading.unit import Unit, document_rule
from pipelines.corpus.split import named_split
from ulm.corpus.manifest import SPLITS
from ulm.errors import ConfigError, did_you_mean
from ulm.recipes.corpus import Source

MAX_PART_UNITS = 1_000


@dataclass(frozen=True)
class Ignored:
    """A file that is not read at all, and why; both as `brief` has them."""

    source: int
    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """All units in corpus order (source, path, offset), what was passed over, and the sources' names."""

    units: list[Unit]
    ignored: list[Ignored]
    names: list[str]


def list_sources(sources: Sequence[Source], *, near: Path | None, root: Path, max_bytes: int) -> Listing:
    """Units of all sources. Raises ConfigError where a source names nothing that exists, or cannot be meant.

    `max_bytes` is the recipe's max_document_bytes: a file that is one document comes in units of so many.
    """
    names = _names(sources)
    units: list[Unit] = []
    ignored: list[Ignored] = []
    for number, source in enumerate(sources):
        place = f"sources.{number}"
        _check(source, place)
        if source.dataset is not None:
            from pipelines.corpus.reading.hub import list_dataset

            units += list_dataset(number, source, place, near=near, root=root)
            continue
        from pipelines.corpus.reading.ranges import parts, without_twins

        assert source.path is not None
        taken, passed = _choose(number, source, place, find_files(source.path, place, near=near, root=root))
        kept, twins = without_twins(taken, source)
        ignored += passed + [_ignored(number, unit.path, f"same_rows as {twin.path}") for unit, twin in twins]
        for unit in kept:
            units += parts(unit, source, max_bytes)
    return Listing(units, ignored, names)


def share_out(units: Sequence[Unit], part_bytes: int = 4 << 20) -> list[list[int]]:
    """Runs of consecutive unit numbers of about `part_bytes`; the same for any number of workers."""
    parts: list[list[int]] = []
    filled = 0
    for number, unit in enumerate(units):
        if not parts or filled + unit.size > part_bytes or len(parts[-1]) >= MAX_PART_UNITS:
            parts.append([])
            filled = 0
        parts[-1].append(number)
        filled += unit.size
    return parts


def _names(sources: Sequence[Source]) -> list[str]:
    """A name per source, its own or the last part of its path that is no split's; no two alike."""
    names: list[str] = []
    for number, source in enumerate(sources):
        name = source.name
        if name is None:
            path = (source.path or source.dataset or "").partition("?")[0]
            parts = [part for part in Path(path).parts if not glob.has_magic(part)]
            parts = [by_name(part)[0] for part in parts if part not in (".", "..", "/")]
            if len(parts) > 1 and named_split(parts[-1]):  # news/train.jsonl is news
                del parts[-1]
            base = parts[-1] if parts else "source"
            name, count = base, 1
            while name in names:
                count += 1
                name = f"{base}-{count}"
        elif name in names:
            raise ConfigError(f"sources.{number}.name", f"{name!r} is another source's name", "give each its own")
        names.append(name)
    return names


def _check(source: Source, place: str) -> None:
    """Raises ConfigError for settings that do not fit each other."""
    if source.encoding not in (None, "auto"):
        try:
            is_text = codecs.lookup(source.encoding)._is_text_encoding  # which tells rot13 and zlib from the rest
            codecs.getincrementaldecoder(source.encoding)
        except LookupError:
            is_text = False
        if not is_text:
            remedy = did_you_mean(source.encoding.lower().replace("-", "_"), {"auto", *aliases, *aliases.values()})
            near = remedy if remedy.startswith("did") else "auto, or a codec of Python's: utf-8, utf-16, cp1252, …"
            raise ConfigError(f"{place}.encoding", f"no encoding {source.encoding!r}", near)
    if source.html and source.document in ("line", "paragraph"):
        problem = f"{source.document!r} does not fit HTML, which is one document"
        raise ConfigError(f"{place}.document", problem, "leave it out")
    if source.path is not None and source.split is not None and named_split(source.split) is None:
        raise ConfigError(f"{place}.split", f"no split {source.split!r}", did_you_mean(source.split, SPLITS))
    if source.path is not None and source.columns is not None:
        for name in ("source", "target") if source.is_pair else ("messages",) if source.messages else ("text",):
            column = getattr(source, name)
            if column not in source.columns:
                problem = f"{column!r} is not among the columns named"
                raise ConfigError(f"{place}.{name}", problem, did_you_mean(column, source.columns))


def _choose(number: int, source: Source, place: str, files: list[Found]) -> tuple[list[Unit], list[Ignored]]:
    """One unit per file that is read. A `format` takes the files of that format; where there are none, unknown ones."""
    named = [by_name(os.path.basename(file.path)) for file in files]
    formats: list[str | None] = [form for _, form, _ in named]
    if source.format is not None:
        right = {n for n, form in enumerate(formats) if form == source.format}
        right = right or ({0} if len(files) == 1 else {n for n, form in enumerate(formats) if form is None})
        formats = [source.format if n in right else None for n in range(len(files))]
    elif len(files) == 1 and formats[0] is None:
        name = os.path.basename(files[0].path)
        known = ", ".join(dict.fromkeys(FORMATS.values()))
        raise ConfigError(f"{place}.format", f"none known for {name!r}", f"name one: {known}")
    units: list[Unit] = []
    ignored: list[Ignored] = []
    for file, (stem, _, compression), form in zip(files, named, formats, strict=True):
        if form is None:
            ignored.append(_ignored(number, file.path, "unknown_format" if source.format is None else "other_format"))
        elif file.problem is not None:
            ignored.append(_ignored(number, file.path, file.problem))
        else:
            compression = None if form in UNCOMPRESSED else compression
            own = named_split(source.split) if source.split else None if form == "code" else named_split(stem)
            units.append(
                Unit(number, file.path, file.file, form, compression, own, size=file.size, version=file.version)
            )
    _check_formats(source, place, units)
    return units, ignored


def _ignored(number: int, path: str, reason: str) -> Ignored:
    return Ignored(number, brief(path), brief(reason))


def _check_formats(source: Source, place: str, units: list[Unit]) -> None:
    """Raises ConfigError for settings that do not fit the files that were found."""
    example = {unit.format: unit.path for unit in reversed(units)}
    for form, path in example.items():
        whole = form in ("html", "epub") or source.html
        own = "record" if form in ROWS else "file"
        if document_rule(form, source) not in ([own] if whole else [own, "line", "paragraph"]):
            problem = f"{source.document!r} does not fit {path} ({form})"
            raise ConfigError(f"{place}.document", problem, own if whole else f"{own}, line or paragraph")
        if form not in ROWS and (source.messages or source.is_pair):
            name = "messages" if source.messages else "source"
            raise ConfigError(f"{place}.{name}", f"{path} ({form}) has no columns", f"files of {', '.join(ROWS[:-1])}")
        if form == "pdf" and importlib.util.find_spec("pypdfium2") is None:
            problem = "pdf needs an extra that is not installed"
            raise ConfigError(f"{place}.format", problem, "pip install 'ulm[books]'")
    if source.columns is not None and units and not set(example) & set(TABLES):
        raise ConfigError(f"{place}.columns", "belongs to csv and tsv files", "leave it out")
    if source.encoding is not None and units and not set(example) - {"parquet", *BOOKS}:
        raise ConfigError(f"{place}.encoding", "belongs to text files", "leave it out")
