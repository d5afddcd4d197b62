"""Which tokens form which training rows: a pure function of corpus digest, split, documents, context and seed.

A document of n tokens is the sequence <|endoftext|> t1 … tn <|endoftext|>, whose n + 1 last tokens are targets. It is
cut into pieces of `context_tokens` targets; what is left over is packed with others into rows. A piece of m targets
takes m slots: its inputs are the m tokens before its targets, so pieces overlap by one token, need no separator, and
every token is a target exactly once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from ulm.corpus.manifest import Corpus
from ulm.corpus.order import Ints, RowClass, mix
from ulm.errors import ConfigError

NO_TARGET = -100  # as in ulm/components/loss.py; to import it from there would bring torch


@dataclass(frozen=True)
class Batch:
    """B rows of `context_tokens` slots. segments_BT numbers the pieces of a row from 0; -1 is padding."""

    inputs_BT: Ints
    targets_BT: Ints
    segments_BT: Ints


@dataclass(frozen=True)
class Version:
    """A corpus, by its digest; its documents are the first `num_documents` of each corpus that extends it."""

    digest: str
    num_documents: int


class RowPlan:
    """All rows of one split. Sources of different weight never share a row."""

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        context_tokens: int,
        pieces: Pieces,
        row_of_piece: Ints,
        parts: list[tuple[RowClass, ...]],  # the classes of each version
    ) -> None:
        self.context_tokens, self.parts = context_tokens, parts
        self.classes = [rows for part in parts for rows in part]
        self._tokens, self._eot = corpus.tokens(split), corpus.tokenizer.eot_id
        self._pieces = pieces.take(np.argsort(row_of_piece, kind="stable"))
        counts = np.bincount(row_of_piece, minlength=sum(c.num_rows for c in self.classes))
        self._first_piece = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._targets_before = np.concatenate([[0], np.cumsum(self._pieces.sizes)])[self._first_piece]

    @classmethod
    def make(
        cls,
        corpus: Corpus,
        split: str,
        *,
        context_tokens: int,
        seed: int = 0,
        documents: Ints | None = None,
        versions: Sequence[Version] = (),
    ) -> Self:
        """The plan of a split's documents, or of those among `documents` (rows of documents.parquet).

        With `versions` (the corpora that this one extends, oldest first, and itself) the documents that each added
        have a plan of their own, one after another: the first rows are those of the oldest version's own plan.
        """
        table = corpus.documents
        versions = versions or [Version(corpus.digest, table.num_rows)]
        chosen = _in_split(corpus, split, documents)
        numbers = table["num_tokens"].to_numpy()[chosen].astype(np.int64)
        firsts = table["first_token"].to_numpy()[chosen].astype(np.int64)
        pieces = Pieces.cut(chosen, firsts, numbers, context_tokens)
        weights = np.asarray([corpus.weights[s] for s in table["source"].take(chosen).to_pylist()], float)
        weight_of_piece = weights[np.searchsorted(chosen, pieces.documents)]
        row_of_piece, num_rows, parts, before = np.empty(len(pieces.sizes), np.int64), 0, [], 0
        for version in versions:
            inside = slice(*np.searchsorted(chosen, [before, version.num_documents]))
            key = _key(version.digest, split, context_tokens, seed, chosen[inside])
            is_new = (before <= pieces.documents) & (pieces.documents < version.num_documents)
            classes = []
            for weight in sorted(set(weights[inside].tolist())):
                mine = np.flatnonzero(is_new & (weight_of_piece == weight))
                rows, count = _pack(pieces.take(mine), context_tokens, key)
                row_of_piece[mine] = rows + num_rows
                classes.append(RowClass(num_rows, count, weight))
                num_rows += count
            parts.append(tuple(classes))
            before = version.num_documents
        return cls(corpus, split, context_tokens, pieces, row_of_piece, parts)

    @property
    def num_rows(self) -> int:
        """Rows of the plan, each once."""
        return len(self._first_piece) - 1

    @property
    def padding_share(self) -> float:
        """Slots without a target, of all."""
        slots = self.num_rows * self.context_tokens
        return 1 - int(self._targets_before[-1]) / slots if slots else 0.0

    def num_targets(self, rows: Ints) -> Ints:
        """Targets in each of these rows."""
        counts: Ints = self._targets_before[rows + 1] - self._targets_before[rows]
        return counts

    def batch(self, rows: Ints) -> Batch:
        """The tokens of these rows, in this order."""
        shape = (len(rows), self.context_tokens)
        inputs_BT = np.full(shape, self._eot, np.int64)
        targets_BT = np.full(shape, NO_TARGET, np.int64)
        segments_BT = np.full(shape, -1, np.int64)
        pieces, read = self._pieces, self._tokens.read
        firsts, lasts = self._first_piece[rows].tolist(), self._first_piece[rows + 1].tolist()
        for b, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            slot = 0
            for segment, piece in enumerate(range(first, last)):
                size, offset, length = (int(x[piece]) for x in (pieces.sizes, pieces.offsets, pieces.lengths))
                # The piece spans offset … offset + size of its sequence, whose index i is token i - 1.
                begin, end = max(offset, 1), min(offset + size, length)
                sequence = np.full(size + 1, self._eot, np.int64)
                sequence[begin - offset : end - offset + 1] = read(
                    int(pieces.firsts[piece]) + begin - 1, end - begin + 1
                )
                inputs_BT[b, slot : slot + size] = sequence[:-1]
                targets_BT[b, slot : slot + size] = sequence[1:]
                segments_BT[b, slot : slot + size] = segment
                slot += size
        return Batch(inputs_BT, targets_BT, segments_BT)

    def locate(self, row: int, slot: int) -> tuple[int, int] | None:
        """Document row and token index (num_tokens: its closing <|endoftext|>) of a slot's target; None for padding."""
        for piece in range(int(self._first_piece[row]), int(self._first_piece[row + 1])):
            size = int(self._pieces.sizes[piece])
            if slot < size:
                return int(self._pieces.documents[piece]), int(self._pieces.offsets[piece]) + slot
            slot -= size
        return None


@dataclass(frozen=True)
class Pieces:
    """Parallel arrays, one entry a piece."""

    documents: Ints  # row of documents.parquet
    firsts: Ints  # the document's first token in its split
    lengths: Ints  # the document's tokens
    offsets: Ints  # of the piece's first input, in the sequence that begins with <|endoftext|>
    sizes: Ints  # targets

    @classmethod
    def cut(cls, documents: Ints, firsts: Ints, lengths: Ints, context_tokens: int) -> Self:
        """All pieces of these documents, in order."""
        counts = -(-(lengths + 1) // context_tokens)
        of = np.repeat(np.arange(len(documents)), counts)
        number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        offsets = number * context_tokens
        sizes = np.minimum(context_tokens, lengths[of] + 1 - offsets)
        return cls(documents[of], firsts[of], lengths[of], offsets, sizes)

    def take(self, index: npt.NDArray[np.intp]) -> Pieces:
        """Some of them, in the order of `index`."""
        return Pieces(*(x[index] for x in (self.documents, self.firsts, self.lengths, self.offsets, self.sizes)))


def _in_split(corpus: Corpus, split: str, documents: Ints | None) -> Ints:
    table = corpus.documents
    inside = pc.equal(table["split"], split).to_numpy(zero_copy_only=False).astype(bool)
    if documents is None:
        return np.flatnonzero(inside)
    chosen = np.unique(documents).astype(np.int64)
    if len(chosen) != len(documents) or (len(chosen) and not 0 <= chosen[0] <= chosen[-1] < len(inside)):
        raise ConfigError("documents", "not a list of distinct rows of documents.parquet", f"0 to {len(inside) - 1}")
    kept: Ints = chosen[inside[chosen]]
    return kept


def _key(digest: str, split: str, context_tokens: int, seed: int, chosen: Ints) -> np.uint64:
    documents = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
    text = f"{digest} {split} {documents} {context_tokens} {seed}".encode()
    return np.uint64(int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))


def _pack(pieces: Pieces, context_tokens: int, key: np.uint64) -> tuple[Ints, int]:
    """Row of each piece, from 0, and the number of rows. Full pieces are rows; equal remainders are shuffled by key."""
    rows = np.empty(len(pieces.sizes), np.int64)
    full = pieces.sizes == context_tokens
    num_full = int(full.sum())
    rows[full] = np.arange(num_full)
    rest = np.flatnonzero(~full)
    rest = rest[np.lexsort((mix(pieces.documents[rest], key), -pieces.sizes[rest]))]
    packed, num_packed = best_fit(pieces.sizes[rest], context_tokens)
    rows[rest] = packed + num_full
    return rows, num_full + num_packed


def best_fit(sizes: Ints, capacity: int) -> tuple[Ints, int]:
    """Best-fit-decreasing bin packing: the bin of each item and the number of bins. `sizes` must not increase.

    Each item goes where the least room is left after it. Items of one size are placed together: a bin that takes
    one of them leaves less room than any other, so it takes them until no more fit (Johnson, 1973).
    """
    bins = np.empty(len(sizes), np.int64)
    open_bins: list[Ints] = [np.zeros(0, np.int64) for _ in range(capacity + 1)]  # by room left
    has_room = np.zeros(capacity + 1, bool)
    num_bins, at = 0, 0
    distinct, counts = np.unique(-sizes, return_counts=True)
    for size, left in zip((-distinct).tolist(), counts.tolist(), strict=True):
        while left:
            room = size + int(np.argmax(has_room[size:]))
            if not has_room[room]:
                room = capacity
                needed = -(-left // (capacity // size))
                open_bins[room], num_bins = np.arange(num_bins, num_bins + needed), num_bins + needed
            fits = room // size
            used, kept = np.split(open_bins[room], [-(-left // fits)])
            placed = min(left, len(used) * fits)
            bins[at : at + placed] = np.repeat(used, fits)[:placed]
            open_bins[room], has_room[room] = kept, len(kept) > 0
            in_last = placed - (len(used) - 1) * fits
            for some, taken in ((used[:-1], fits), (used[-1:], in_last)):
                rest = room - taken * size
                open_bins[rest] = np.concatenate([open_bins[rest], some])
                has_room[rest] = rest > 0 and len(open_bins[rest]) > 0
            at, left = at + placed, left - placed
    return bins, num_bins
