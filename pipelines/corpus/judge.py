"""What becomes of each document: duplicates dropped, splits assigned, everything counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.corpus.dedup import KEY_BYTES, groups_of, keepers
from pipelines.corpus.near import clusters
from pipelines.corpus.part import ROWS, SAMPLE_CHARS, Tally, read_rows, read_texts
from pipelines.corpus.reading.unit import Unit
from pipelines.corpus.split import assign
from ulm.corpus.manifest import SPLITS, Corpus
from ulm.errors import ConfigError
from ulm.recipes.corpus import NearDuplicates, Split

MAX_LISTED = 1_000  # dropped files and lines that a manifest names; all are counted
MAX_SAMPLES = 5  # dropped texts that a manifest shows, of each reason
MAX_SHOWN_CLUSTERS = 10
RANK_BASE = -1  # who stays of duplicates: what is there already, then by the files' own split as below
RANKS = np.array([2, 1, 0, 3], np.int8)  # of train, val, test, and files that name none: held-out text stays held out


@dataclass(frozen=True)
class Base:
    """The documents of a corpus that is extended, as duplicates are found by."""

    keys: NDArray[np.bytes_]
    split: NDArray[np.int8]

    @classmethod
    def none(cls) -> Base:
        """No corpus is extended."""
        return cls(np.zeros(0, f"S{KEY_BYTES}"), np.zeros(0, np.int8))

    @classmethod
    def read(cls, parts: Sequence[Path], corpus: Corpus) -> Base:
        """The fingerprints of a corpus (base.py)."""
        keys = [np.load(part / "keys.npy") for part in parts]
        split = [SPLITS.index(name) for name in corpus.documents["split"].to_pylist()]
        return cls(np.concatenate(keys) if keys else cls.none().keys, np.array(split, np.int8))


class Judgement:
    """The rows of all parts and what becomes of them; each method is one stage and counts what it drops.

    Documents are numbered in corpus order; those of the base come before all others.
    """

    def __init__(
        self, parts: Sequence[Path], accounts: Sequence[dict[str, Any]], units: list[Unit], names: list[str], base: Base
    ) -> None:
        self.parts, self.units, self.names, self.base = list(parts), units, names, base
        tables = [read_rows(part) for part in parts]
        self.starts = np.cumsum([0, *(table.num_rows for table in tables)])  # first row of each part, and the end
        self.rows = pa.concat_tables(tables, promote_options="none") if tables else ROWS.empty_table()
        self.tallies = _added_up(accounts)
        self.samples = self._samples_of(accounts)
        self.row_of = np.flatnonzero(self.rows["key"].is_valid().to_numpy())  # of each document
        unit = self.rows["unit"].to_numpy()[self.row_of]
        self._own = np.array([-1 if u.split is None else SPLITS.index(u.split) for u in units], np.int8)[unit]
        self._rank = np.concatenate([np.full(len(base.keys), RANK_BASE, np.int8), RANKS[self._own]])
        self.alive = np.ones(len(self.row_of), np.bool_)
        self.near: dict[str, Any] | None = None
        self._together = np.zeros((0, 2), np.int64)  # pairs of documents that no split may part
        self._listed: list[tuple[int, str]] = []
        self.split = np.full(len(self.row_of), -1, np.int8)  # index into SPLITS of each document, -1 for dropped ones

    @cached_property
    def keys(self) -> NDArray[np.bytes_]:
        """Of each document."""
        return _fixed(self.rows["key"].take(pa.array(self.row_of)))

    @cached_property
    def ids(self) -> list[str]:
        """Of each document, in hex."""
        return [value.hex() for value in self.rows["id"].take(pa.array(self.row_of)).to_pylist()]

    @cached_property
    def num_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each document's text."""
        sizes: NDArray[np.int64] = self.rows["num_bytes"].to_numpy()[self.row_of]
        return sizes

    @property
    def num_in(self) -> int:
        """Documents and faults that were read."""
        return self.tallies["read"].num_in

    @property
    def num_kept(self) -> int:
        """Documents that are left."""
        return int(self.alive.sum())

    def exclude(self, ids: Sequence[str], inherited: Sequence[str] = ()) -> None:
        """Drop the documents that a recipe names by id or the beginning of one, all copies of a text alike.

        Raises ConfigError for an id that no document has; `inherited` ones need not be there.
        """
        if not ids and not inherited:
            return
        known = np.array(self.ids)
        order = np.argsort(known)
        mask = np.zeros(len(known), np.bool_)
        for number, given in enumerate([*ids, *inherited]):
            first, last = np.searchsorted(known[order], [given.partition("-")[0], given.partition("-")[0] + "g"])
            if first == last and number < len(ids):
                remedy = "as `ulm corpus show` and documents.parquet have them"
                raise ConfigError(f"exclude.{number}", f"no document of these sources has the id {given!r}", remedy)
            mask[order[first:last]] = True
        self._drop("exclude", mask, "excluded")

    def drop_exact_duplicates(self) -> None:
        """Of documents with equal keys one stays."""
        leader = keepers(groups_of(np.concatenate([self.base.keys, self.keys])), self._rank)
        own = np.arange(len(leader)) != leader
        self._drop("duplicate_exact", own[len(self.base.keys) :], "duplicate_exact")

    def part_of(self, document: int) -> int:
        """The number of the part that holds a document."""
        return int(np.searchsorted(self.starts, self.row_of[document], side="right")) - 1

    def drop_near_duplicates(self, pairs: NDArray[np.int64], config: NearDuplicates) -> None:
        """Of each cluster one stays; or, if they are to stay, they are kept in one split.

        `pairs` number the base's documents and after them those that are alive.
        """
        num_base = len(self.base.keys)
        numbers = np.concatenate([np.arange(num_base), num_base + np.flatnonzero(self.alive)])
        found = clusters(len(numbers), pairs)
        sizes = np.bincount(found, minlength=len(numbers))[found]
        if config.drop:
            follows = (keepers(found, self._rank[numbers]) != np.arange(len(numbers))) & (numbers >= num_base)
        else:
            follows = self._bridges(numbers, pairs)
            left = ~follows[pairs].any(axis=1)
            self._together = numbers[pairs[left]]
        mask = np.zeros(len(self.row_of), np.bool_)
        mask[numbers[follows] - num_base] = True
        self._drop("duplicate_near", mask, "duplicate_near")
        self.near = self._near_figures(numbers, found, sizes, int(mask.sum()))

    def _bridges(self, numbers: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Documents that must go where near duplicates are to stay, lest a cluster spans two splits.

        Of a cluster that holds several splits (of files that name theirs, or of a corpus that is extended), first
        whatever is free to go elsewhere, for it may be what ties them; of what is then still tied, all but one split.
        """
        num_base = len(self.base.keys)
        place_of = np.full(num_base + len(self.row_of), -1, np.int64)
        place_of[numbers] = np.arange(len(numbers))
        pieces = place_of[self._pieces()]
        tied = np.concatenate([pairs, pieces[(pieces >= 0).all(axis=1)]])
        split = np.concatenate([self.base.split, self._own])[numbers]
        is_new = numbers >= num_base
        gone = np.zeros(len(numbers), np.bool_)
        for may_go in (is_new & (split < 0), is_new):
            group = clusters(len(numbers), tied[~gone[tied].any(axis=1)])
            leader = keepers(group, self._rank[numbers])
            other = (split >= 0) & (split != split[leader])  # a leader has a split where any of its group has one
            torn = np.isin(group, group[other & ~gone])
            gone |= torn & may_go & ((split < 0) | other)
        return gone

    def _pieces(self) -> NDArray[np.int64]:
        """Pairs of pieces of one document that was cut, the first of them and each other, numbered with the base's."""
        record = np.flatnonzero(~self.rows["digest"].is_valid().to_numpy())
        unit, line, piece = (self.rows[name].to_numpy()[record] for name in ("unit", "line", "piece"))
        paths = {(u.source, u.path): n for n, u in enumerate(self.units)}
        path = np.array([paths[u.source, u.path] for u in self.units], np.int64)[unit]
        parted = {paths[u.source, u.path] for u in self.units if u.piece > 0}  # files that are one document each
        goes_on = np.zeros(len(record), np.bool_)
        goes_on[1:] = (path[1:] == path[:-1]) & (line[1:] == line[:-1]) & (piece[1:] == piece[:-1] + 1)
        if parted:
            goes_on[1:] |= (path[1:] == path[:-1]) & np.isin(path[1:], list(parted))
        document = np.cumsum(~goes_on)  # which one each record is a piece of
        of_row = np.zeros(self.rows.num_rows, np.int64)
        of_row[record] = document
        mine = of_row[self.row_of]
        first = np.unique(mine, return_index=True)[1][np.unique(mine, return_inverse=True)[1]]
        later = np.flatnonzero(first != np.arange(len(mine)))
        found: NDArray[np.int64] = np.stack([first[later], later], axis=1) + len(self.base.keys)
        return found

    def _near_figures(
        self, numbers: NDArray[np.int64], found: NDArray[np.int64], sizes: NDArray[np.int64], dropped: int
    ) -> dict[str, Any]:
        heads = np.flatnonzero((found == np.arange(len(numbers))) & (sizes > 1))
        largest = []
        for head in heads[np.argsort(-sizes[heads], kind="stable")][:MAX_SHOWN_CLUSTERS]:
            members = numbers[found == found[head]] - len(self.base.keys)
            new = members[members >= 0]
            paths = [self._place(int(self.row_of[m])) for m in new[:3]]
            text = self.text_of(int(new[0])) if len(new) else ""
            largest.append({"documents": int(sizes[head]), "text": text[:SAMPLE_CHARS], "paths": paths})
        return {
            "clusters": len(heads),
            "documents": int((sizes > 1).sum()),
            "dropped": dropped,
            "sizes": {str(size): count for size, count in sorted(Counter(sizes[heads].tolist()).items())},
            "largest": largest,
        }

    def assign_splits(self, config: Split) -> None:
        """A split for each document that is left: its file's own, else by hash; what belongs together stays so."""
        num_base = len(self.base.keys)
        group = clusters(num_base + len(self.row_of), np.concatenate([self._together, self._pieces()]))
        leader = keepers(group, self._rank)[num_base:]
        keys = np.concatenate([self.base.keys, self.keys])[leader]
        own = np.concatenate([self.base.split, self._own])[leader]
        own = np.where(self._own >= 0, self._own, own).astype(np.int8)
        needs_train = not (self.base.split == 0).any()
        split = assign(keys[self.alive], own[self.alive], config, needs_train=needs_train)
        self.split[self.alive] = split

    def source_digests(self) -> list[list[str]]:
        """Content digests of the units of each source."""
        found: list[list[str]] = [[] for _ in self.names]
        last = self.rows.filter(self.rows["digest"].is_valid())
        for unit, digest in zip(last["unit"].to_pylist(), last["digest"].to_pylist(), strict=True):
            found[self.units[unit].source].append(digest)
        return found

    def by_source(self) -> list[dict[str, int]]:
        """What was read of each source and is left of it."""
        source = np.array([u.source for u in self.units], np.int64)
        unit = self.rows["unit"].to_numpy()
        read = source[unit[~self.rows["digest"].is_valid().to_numpy()]]
        kept = source[unit[self.row_of[self.alive]]]
        counts = (np.bincount(found, minlength=len(self.names)).tolist() for found in (read, kept))
        return [{"in": num_in, "kept": num_kept} for num_in, num_kept in zip(*counts, strict=True)]

    def unreadable_sources(self) -> list[str]:
        """Names of sources of which no unit could be opened."""
        bad = self.rows.filter(pc.starts_with(pc.fill_null(self.rows["reason"], ""), "unreadable"))
        failed = Counter(self.units[u].source for u in set(bad["unit"].to_pylist()))
        total = Counter(unit.source for unit in self.units)
        return [self.names[s] for s, count in sorted(failed.items()) if count == total[s]]

    def stages(self) -> list[dict[str, Any]]:
        """What each stage took in, gave out, changed and dropped, in order; stages that had nothing to do left out."""
        timed_only = {"fingerprint", "signature"}
        return [
            {"stage": name, **tally.as_json()}
            for name, tally in self.tallies.items()
            if name not in timed_only and (tally.num_in or name != "html")
        ]

    def dropped(self) -> dict[str, int]:
        """How many documents each reason took."""
        total = sum((tally.dropped for tally in self.tallies.values()), Counter[str]())
        return dict(sorted(total.items()))

    def listed(self) -> list[dict[str, Any]]:
        """Names and reasons of the first MAX_LISTED things that were dropped; faults of reading come first."""
        faults = np.flatnonzero(self.rows["reason"].is_valid().to_numpy())[:MAX_LISTED]
        reasons = self.rows["reason"].take(pa.array(faults)).to_pylist()
        chosen = [*zip(faults.tolist(), reasons, strict=True), *self._listed][:MAX_LISTED]
        found = []
        for row, reason in chosen:
            unit = self.units[self.rows["unit"][row].as_py()]
            rows_of = {"row": self.rows["offset"][row].as_py()} if unit.format in ("parquet", "dataset") else {}
            found.append({"source": self.names[unit.source], "path": self._place(row), **rows_of, "reason": reason})
        return found

    def text_of(self, document: int) -> str:
        """The cleaned text of a document."""
        part = self.part_of(document)
        row = int(self.row_of[document] - self.starts[part])
        return next(found.text for found in read_texts(self.parts[part]) if found.row == row)

    @cached_property
    def _lines_before(self) -> dict[int, int]:
        """Lines of a file that lie before each unit, for a file in several."""
        last = self.rows.filter(self.rows["digest"].is_valid())
        before: dict[int, int] = {}
        total = 0
        for unit, num_lines in zip(last["unit"].to_pylist(), last["line"].to_pylist(), strict=True):
            total = 0 if self.units[unit].start == 0 else total
            before[unit] = total
            total += num_lines
        return before

    def _place(self, row: int) -> str:
        """A file, and the line in it where it has lines."""
        number, line = self.rows["unit"][row].as_py(), self.rows["line"][row].as_py()
        path = self.units[number].path
        return f"{path}:{self._lines_before[number] + line}" if line else path

    def _samples_of(self, accounts: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for account in accounts:
            for reason, samples in account["samples"].items():
                kept = found.setdefault(reason, [])
                for sample in samples[: MAX_SAMPLES - len(kept)]:
                    unit = self.units[sample["unit"]]
                    kept.append({"source": self.names[unit.source], "path": unit.path, "text": sample["text"]})
        return found

    def _drop(self, stage: str, mask: NDArray[np.bool_], reason: str) -> None:
        mask = mask & self.alive
        tally = self.tallies[stage] = Tally(num_in=self.num_kept)
        self.alive &= ~mask
        tally.num_out = self.num_kept
        if not mask.any():
            return
        tally.dropped[reason] = int(mask.sum())
        gone = np.flatnonzero(mask)
        self._listed += [(int(self.row_of[d]), reason) for d in gone[: MAX_LISTED - len(self._listed)]]
        for document in gone[:MAX_SAMPLES]:
            unit = self.units[self.rows["unit"][int(self.row_of[document])].as_py()]
            sample = {"source": self.names[unit.source], "path": unit.path}
            text = self.text_of(int(document))[:SAMPLE_CHARS]
            self.samples.setdefault(reason, []).append({**sample, "text": text})

    def drop_untokenized(self, mask: NDArray[np.bool_]) -> None:
        """Drop documents with characters that the tokenizer does not know."""
        self._drop("tokenizer", mask, "unknown_character")
        self.split[mask] = -1

    def choose_sample(self, sample_bytes: int) -> NDArray[np.int64]:
        """Documents that a tokenizer is trained on: of train, by their keys, until there are bytes enough."""
        candidates = np.flatnonzero(self.split == 0)
        if not len(candidates):
            candidates = np.flatnonzero(self.split >= 0)
        order = candidates[np.argsort(self.keys[candidates], kind="stable")]
        before = np.cumsum(self.num_bytes[order]) - self.num_bytes[order]
        return np.sort(order[before < sample_bytes])


def _added_up(accounts: Sequence[dict[str, Any]]) -> dict[str, Tally]:
    tallies: dict[str, Tally] = {}
    for account in accounts:
        for name, figures in account["stages"].items():
            tallies.setdefault(name, Tally()).add(figures)
    return tallies


def _fixed(column: pa.ChunkedArray) -> NDArray[np.bytes_]:
    """A column of KEY_BYTES as NumPy has them."""
    joined = b"".join(column.to_pylist())
    return np.frombuffer(joined, dtype=f"S{KEY_BYTES}")
