"""Which files, byte ranges and rows a recipe's sources mean, in corpus order, as units of work for readers."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.corpus.split import named_split
from ulm.corpus.manifest import SPLITS
from ulm.errors import ConfigError, did_you_mean
from ulm.recipes.base import resolve_path
from ulm.recipes.corpus import Source

FORMATS = {
    ".txt": "txt", ".text": "txt", ".md": "md", ".markdown": "md", ".py": "py",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
}  # fmt: skip
ROW_FORMATS = ("jsonl", "parquet", "dataset")
# The parts that a large file or dataset is read in. They are in the corpus digest: a change makes new digests.
CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 10_000


@dataclass(frozen=True)
class Unit:
    """What one reader reads at once: a file, a part of one, or rows of a dataset."""

    source: int
    path: str  # as recorded: relative to the source
    file: str  # where it is, in os.fsdecode's spelling; of a dataset: what load_dataset takes
    format: str
    document: str
    text: str  # column or key of the text
    split: str | None  # the files' own
    start: int = 0  # byte, row group or row
    end: int | None = None  # None: to the end
    row: int = 0  # number of the first row, of parquet
    size: int = 0  # bytes, to share the work out
    config: str | None = None  # of a dataset
    dataset_split: str | None = None


@dataclass(frozen=True)
class Ignored:
    """A file that is not read at all, and why."""

    source: int
    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """All units in corpus order (source, path, offset), what was passed over, and the sources' names."""

    units: list[Unit]
    ignored: list[Ignored]
    names: list[str]


def list_sources(sources: list[Source], *, near: Path | None, root: Path) -> Listing:
    """Units of all sources. Raises ConfigError where a source names nothing that exists."""
    names = _names(sources)
    units: list[Unit] = []
    ignored: list[Ignored] = []
    for number, source in enumerate(sources):
        place = f"sources.{number}"
        if source.dataset is not None:
            from pipelines.corpus.hub import list_dataset

            units += list_dataset(number, source, place, near=near, root=root)
            continue
        if source.split is not None and named_split(source.split) is None:
            raise ConfigError(f"{place}.split", f"no split {source.split!r}", did_you_mean(source.split, SPLITS))
        base, files = _files(source, place, near=near, root=root)
        taken, passed = _choose(number, source, place, base, files)
        ignored += passed
        for unit in taken:
            units += _parts(unit)
    return Listing(units, ignored, names)


def _names(sources: list[Source]) -> list[str]:
    """A name per source, its own or the last part of its path; no two alike."""
    names: list[str] = []
    for number, source in enumerate(sources):
        name = source.name
        if name is None:
            parts = [p for p in Path(source.path or source.dataset or "").parts if not glob.has_magic(p)]
            last = Path(parts[-1]) if parts else Path("source")
            base = last.stem if last.suffix.lower() in FORMATS else last.name or "source"
            name, count = base, 1
            while name in names:
                count += 1
                name = f"{base}-{count}"
        elif name in names:
            raise ConfigError(f"sources.{number}.name", f"{name!r} is another source's name", "give each its own")
        names.append(name)
    return names


def _files(source: Source, place: str, *, near: Path | None, root: Path) -> tuple[Path, list[Path]]:
    """The folder that recorded paths are relative to, and the files of a source in the order of those paths."""
    assert source.path is not None
    path = resolve_path(source.path, near=near, root=root)
    if path.is_dir():
        return path, sorted(_walk(path), key=lambda p: shown(p.relative_to(path)))
    if path.is_file():
        return path.parent, [path]
    if glob.has_magic(source.path):
        bases = [path] if Path(source.path).expanduser().is_absolute() else [(near or Path.cwd()) / path, root / path]
        for pattern in bases:
            found = [Path(p) for p in glob.glob(str(pattern), recursive=True)]
            files = {f for p in found for f in (_walk(p) if p.is_dir() else [p])}
            if files:
                depth = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
                base = Path(*pattern.parts[:depth])
                return base, sorted(files, key=lambda p: shown(p.relative_to(base)))
        raise ConfigError(f"{place}.path", f"nothing matches {source.path!r}", "a file, a folder or a glob")
    problem = "is neither a file nor a folder" if path.exists() else "does not exist"
    raise ConfigError(f"{place}.path", f"{shown(path)} {problem}", "a file, a folder or a glob, relative to the recipe")


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder; hidden ones are left out, a folder reached twice through links is read once."""
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(files) if not name.startswith("."))


def shown(path: Path) -> str:
    """A path as valid Unicode, whatever bytes a file name holds."""
    return os.fsencode(path.as_posix()).decode("utf-8", errors="backslashreplace")


def _choose(number: int, source: Source, place: str, base: Path, files: list[Path]) -> tuple[list[Unit], list[Ignored]]:
    """One unit per file that is read. A `format` takes the files of that format; where there are none, unknown ones."""
    formats = {file: FORMATS.get(file.suffix.lower()) for file in files}
    if source.format is not None:
        right = [f for f in files if formats[f] == source.format] or (
            files if len(files) == 1 else [f for f in files if formats[f] is None]
        )
        formats = {file: source.format if file in set(right) else None for file in files}
    elif len(files) == 1 and formats[files[0]] is None:
        known = ", ".join(FORMATS)
        raise ConfigError(f"{place}.format", f"none known for {files[0].name!r}", f"name one; by suffix: {known}")
    units: list[Unit] = []
    ignored: list[Ignored] = []
    for file in files:
        path, form = shown(file.relative_to(base)), formats[file]
        if form is None:
            ignored.append(Ignored(number, path, "unknown_format" if source.format is None else "other_format"))
        elif file.exists() and not file.is_file():
            ignored.append(Ignored(number, path, "not_a_file"))
        else:
            own = named_split(source.split) if source.split else None if form == "py" else named_split(file.stem)
            size = file.stat().st_size if file.exists() else 0
            document = _document(source, place, form, path)
            units.append(Unit(number, path, str(file), form, document, source.text, own, size=size))
    return _once(units, ignored), ignored


def _document(source: Source, place: str, form: str, path: str) -> str:
    rows = form in ROW_FORMATS
    if source.document is None:
        return "record" if rows else "file"
    if source.document == ("file" if rows else "record"):
        other = "record, line or paragraph" if rows else "file, line or paragraph"
        raise ConfigError(f"{place}.document", f"{source.document!r} does not fit {path} ({form})", other)
    return source.document


def _once(units: list[Unit], ignored: list[Ignored]) -> list[Unit]:
    """Without the parquet files whose rows stand beside them as .jsonl of the same name."""
    from pipelines.corpus.read import same_rows

    twins = {(os.path.splitext(u.file)[0]): u for u in units if u.format == "jsonl"}
    kept = []
    for unit in units:
        twin = twins.get(os.path.splitext(unit.file)[0]) if unit.format == "parquet" else None
        if twin is not None and same_rows(twin, unit):
            ignored.append(Ignored(unit.source, unit.path, f"same_rows as {twin.path}"))
        else:
            kept.append(unit)
    return kept


def _parts(unit: Unit) -> list[Unit]:
    """A large file in parts that many readers can take: byte ranges of line formats, row groups of parquet."""
    if unit.format == "parquet":
        from pipelines.corpus.read import row_groups

        return [replace(unit, start=start, end=end, row=row, size=size) for start, end, row, size in row_groups(unit)]
    if unit.size <= CHUNK_BYTES or not (unit.format == "jsonl" or unit.document == "line"):
        return [unit]
    starts = range(0, unit.size, CHUNK_BYTES)
    return [replace(unit, start=s, end=s + CHUNK_BYTES, size=min(CHUNK_BYTES, unit.size - s)) for s in starts]


def share_out(units: list[Unit], num_workers: int) -> list[list[tuple[int, dict[str, Any]]]]:
    """Runs of (number, unit) of about equal bytes, several per worker; the corpus does not depend on them."""
    total = sum(unit.size for unit in units)
    target = min(max(total // (8 * num_workers), 1 << 20), 32 << 20)
    groups: list[list[tuple[int, dict[str, Any]]]] = [[]]
    filled = 0
    for number, unit in enumerate(units):
        if groups[-1] and (filled + unit.size > target or len(groups[-1]) >= 1_000):
            groups.append([])
            filled = 0
        groups[-1].append((number, vars(unit)))
        filled += unit.size
    return groups
