"""Documents that hold text of an evaluation set, found by n-grams of words (GPT-3, arXiv 2005.14165, appendix C).

Of each text of a set the index holds every n-gram of 13 words, and of a shorter text all its words as one n-gram. Words
are blind to case, punctuation and white space (pipelines/corpus/ngrams.py), and the texts go through the same repair of
encoding and characters as documents. An entry begins with as many words as the shortest entry has; most places of a
document are ruled out by these alone.

Shape letters: W words, T texts, H entries of the index, S distinct beginnings of entries, K places.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.corpus.ngrams import batch_word_hashes, ngram_hashes
from pipelines.corpus.split import named_split
from pipelines.corpus.stages import Verdict
from pipelines.corpus.stages.characters import unify
from pipelines.corpus.stages.encoding import repair
from ulm import artefacts
from ulm.errors import ConfigError, did_you_mean
from ulm.recipes.base import resolve_path
from ulm.recipes.corpus import Clean, Decontamination, EvaluationSet

READ_TEXTS = 4_096  # hashed at a time
SLOTS_PER_START = 16  # of the table that most places fail at: one false pass in so many

Hashes = NDArray[np.uint64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class NgramIndex:
    """Hashes of what evaluation sets hold."""

    names: list[str]  # of the sets
    lengths: list[int]  # words of the entries, ascending
    hash_H: Hashes  # ascending, no two alike
    set_H: NDArray[np.uint16]  # the first set that holds the entry
    start_S: Hashes  # of the first lengths[0] words of all entries, ascending

    @classmethod
    def build(
        cls, config: Decontamination, *, near: Path | None, root: Path, place: str, clean: Clean | None = None
    ) -> NgramIndex:
        """The index of a recipe's sets. Raises ConfigError where one cannot be read or holds nothing to look for.

        `clean`: what becomes of the documents that will be looked up; None takes the defaults.
        """
        names, sizes, words, sets = [], [], [], []
        for number, chosen in enumerate(config.sets):
            here = f"{place}.sets.{number}"
            files = _files(chosen.path, f"{here}.path", near=near, root=root)
            names.append(chosen.name or _name(chosen.path))
            longest, texts = 0, _texts(files, chosen, here)
            while batch := list(islice(texts, READ_TEXTS)):
                words_W, offset_T1 = batch_word_hashes(_as_documents(batch, clean or Clean()))
                sizes.append(np.diff(offset_T1))
                words.append(words_W)
                sets.append(np.full(len(batch), number, dtype=np.uint16))
                longest = max(longest, *sizes[-1].tolist())
            if longest < config.min_words:
                problem = f"no text of {config.min_words} words in {chosen.path}"
                raise ConfigError(f"{here}.path", problem, "a set with longer texts, other fields, or lower min_words")
        return cls._of_words(names, np.concatenate(words), np.concatenate(sizes), np.concatenate(sets), config)

    @classmethod
    def _of_words(
        cls, names: list[str], words_W: Hashes, size_T: Ints, set_T: NDArray[np.uint16], config: Decontamination
    ) -> NgramIndex:
        end_T = np.cumsum(size_T)
        end_W, set_W = np.repeat(end_T, size_T), np.repeat(set_T, size_T)
        short_T = (size_T >= config.min_words) & (size_T < config.ngram_words)
        places = {n: (end_T - n)[short_T & (size_T == n)] for n in np.unique(size_T[short_T]).tolist()}
        full_K = np.flatnonzero(np.arange(len(words_W)) + config.ngram_words <= end_W)
        if len(full_K):
            places[config.ngram_words] = full_K
        lengths = sorted(places)
        place_K = np.concatenate([places[n] for n in lengths])
        hash_K = np.concatenate([ngram_hashes(words_W, n)[places[n]] for n in lengths])
        by_hash = np.lexsort((set_W[place_K], hash_K))
        hash_H, first = np.unique(hash_K[by_hash], return_index=True)
        set_H = set_W[place_K][by_hash][first]
        return cls(names, lengths, hash_H, set_H, np.unique(ngram_hashes(words_W, lengths[0])[place_K]))

    def save(self, folder: Path) -> None:
        """Write it as a folder of .npy files, which `open` maps."""
        with artefacts.new_folder(folder) as new:
            artefacts.write_json(new / "index.json", {"names": self.names, "lengths": self.lengths})
            for name in ("hash_H", "set_H", "start_S"):
                np.save(new / f"{name}.npy", getattr(self, name))

    @classmethod
    def open(cls, folder: Path) -> NgramIndex:
        """A stored index; its arrays stay in the file and are shared by all processes that open it."""
        about = json.loads((folder / "index.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("hash_H", "set_H", "start_S")}
        return cls(about["names"], about["lengths"], **arrays)

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides verdicts: names, lengths and entries."""
        about = artefacts.digest_json({"names": self.names, "lengths": self.lengths})
        hasher = hashlib.sha256(about.encode())
        for array, little_endian in ((self.hash_H, "<u8"), (self.set_H, "<u2")):
            hasher.update(array.astype(little_endian).tobytes())
        return hasher.hexdigest()

    def first_sets(self, words_W: Hashes, offset_N1: Ints) -> list[int | None]:
        """The first of the sets that share an entry with each text; text n is words offset[n] to offset[n + 1]."""
        end_W = np.repeat(offset_N1[1:], np.diff(offset_N1))
        place_K = self._candidates(words_W)
        found_N = np.full(len(offset_N1) - 1, len(self.names), dtype=np.int64)
        for n in self.lengths:
            whole_K = place_K[place_K + n <= end_W[place_K]]  # an n-gram ends in the text it began in
            entry_K = _find(self.hash_H, _hashes_at(words_W, whole_K, n))
            hit = np.flatnonzero(entry_K >= 0)
            text_K = np.searchsorted(offset_N1, whole_K[hit], side="right") - 1
            np.minimum.at(found_N, text_K, self.set_H[entry_K[hit]])
        return [number if number < len(self.names) else None for number in found_N.tolist()]

    def _candidates(self, words_W: Hashes) -> Ints:
        """The places where the words of an entry's beginning stand."""
        hash_W = ngram_hashes(words_W, self.lengths[0])
        place_K = np.flatnonzero(self._slots[hash_W & np.uint64(len(self._slots) - 1)])
        return place_K[_find(self.start_S, hash_W[place_K]) >= 0]

    @cached_property
    def _slots(self) -> NDArray[np.bool_]:
        """Whether any beginning has these last bits."""
        slots = np.zeros(1 << (len(self.start_S) * SLOTS_PER_START).bit_length(), dtype=np.bool_)
        slots[self.start_S & np.uint64(len(slots) - 1)] = True
        return slots


def decontaminate(texts: Sequence[str], index: NgramIndex) -> list[Verdict]:
    """Each text, and the first evaluation set that it shares an n-gram with."""
    found = index.first_sets(*batch_word_hashes(texts))
    return [
        (text, None if number is None else f"decontamination: {index.names[number]}")
        for text, number in zip(texts, found, strict=True)
    ]


def _as_documents(texts: Sequence[str], clean: Clean) -> list[str]:
    """The texts with their characters as documents have them when they are looked up; no document has surrogates."""
    texts = [text.encode(errors="replace").decode() for text in texts]
    if clean.encoding:
        texts = [text for text, _ in repair(texts)]
    return [text for text, _ in unify(texts, clean)]


def _hashes_at(words_W: Hashes, place_K: Ints, n: int) -> Hashes:
    """The hashes of the n-grams that start at some places."""
    runs = words_W[place_K[:, None] + np.arange(n)]
    return ngram_hashes(runs.reshape(-1), n)[::n]


def _find(sorted_H: Hashes, hash_K: Hashes) -> Ints:
    """Where each hash stands in a sorted array, -1 for nowhere."""
    entry_K = np.minimum(np.searchsorted(sorted_H, hash_K), len(sorted_H) - 1)
    return np.where(sorted_H[entry_K] == hash_K, entry_K, -1)


def _name(path: str) -> str:
    """The last part of a path that says something: `blimp` of blimp/*.jsonl, of blimp.jsonl and of blimp/test.jsonl."""
    parts = [part for part in Path(path).parts if not glob.has_magic(part)] or ["set"]
    name = Path(parts[-1]).stem
    return parts[-2] if named_split(name) and len(parts) > 1 else name


def _files(path: str, place: str, *, near: Path | None, root: Path) -> list[Path]:
    """The files of a set. None is passed over but hidden ones: raises ConfigError for one that cannot be read."""
    try:
        found = [resolve_path(path, near=near, root=root, place=place)]
        if glob.has_magic(path) and not found[0].exists():
            given = os.path.expanduser(path)
            patterns = [os.path.join(glob.escape(str(folder)), given) for folder in (near or Path.cwd(), root)]
            found = [Path(name) for pattern in patterns for name in glob.glob(pattern, recursive=True)]
        inside = [file for one in found for file in (one.rglob("*") if one.is_dir() else [one])]
        files = sorted({file for file in inside if file.is_file() and not file.name.startswith(".")})
    except (OSError, RuntimeError) as error:  # a name that is too long; ~ of a user that nobody is
        raise ConfigError(place, f"{path[:100]!r} cannot be looked up: {error}"[:300], KINDS) from None
    if not files:
        raise ConfigError(place, f"no file at {path!r}", f"a file, a folder or a glob; {KINDS}")
    for file in files:
        if file.suffix.lower() not in READERS:
            raise ConfigError(place, f"{file} is of no kind that is read", f"name others, or a glob; {KINDS}")
    return files


def _texts(files: Sequence[Path], chosen: EvaluationSet, place: str) -> Iterator[str]:
    """Every string of a set, or below some fields of its records."""
    known: set[str] = set()
    for file in files:
        try:
            for record in READERS[file.suffix.lower()](file, chosen.fields is not None):
                if chosen.fields is None:
                    yield from _strings(record)
                elif isinstance(record, dict):
                    known |= record.keys()
                    yield from _strings([record.get(field) for field in chosen.fields])
        except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
            raise ConfigError(f"{place}.path", f"{file} cannot be read: {error}", "mend it, or leave it out") from error
    for field in chosen.fields or []:
        if field not in known:
            raise ConfigError(f"{place}.fields", f"no record has a field {field!r}", did_you_mean(field, known))


def _strings(value: Any) -> Iterator[str]:
    """All strings within a value, in order; names of fields are not among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _read_jsonl(file: Path, has_names: bool) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error


def _read_parquet(file: Path, has_names: bool) -> Iterator[Any]:
    for batch in pq.ParquetFile(file).iter_batches(READ_TEXTS):
        yield from batch.to_pylist()


def _read_csv(file: Path, has_names: bool) -> Iterator[Any]:
    """Its rows, by the names in the first if they are asked for; else that one is a row like others."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
        if has_names:
            yield from csv.DictReader(lines, delimiter=delimiter, restkey="")
        else:
            yield from csv.reader(lines, delimiter=delimiter)


def _read_txt(file: Path, has_names: bool) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from lines


READERS = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_txt,
}
KINDS = f"kinds: {', '.join(READERS)}"
