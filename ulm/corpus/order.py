"""The order in which training takes rows: a pure function of the seed, so that any position can be computed at once.

Nothing is shuffled in memory and nothing is replayed: row i of epoch e is a keyed permutation of i. A run that stops
at a cursor goes on from it with any number of workers, and the same global batches follow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
ROUNDS = 6  # four make a Feistel network a strong pseudorandom permutation (Luby and Rackoff, 1988); two to spare


@dataclass(frozen=True)
class RowClass:
    """Rows first … first + num_rows - 1 stand `weight` times in an epoch."""

    first: int
    num_rows: int
    weight: float = 1.0


class Order:
    """The endless sequence of rows that a run takes, epoch after epoch."""

    def __init__(self, classes: Sequence[RowClass], seed: int) -> None:
        self.classes, self.seed = tuple(classes), seed
        self._whole = [int(c.weight) * c.num_rows for c in self.classes]
        self._parts = [round((Fraction(c.weight) % 1) * c.num_rows) for c in self.classes]
        self._ends = np.cumsum([w + p for w, p in zip(self._whole, self._parts, strict=True)], dtype=np.int64)

    @property
    def epoch_rows(self) -> int:
        """Rows of one epoch; the same for every epoch."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, cursor: int, count: int) -> Ints:
        """Row indices at global positions cursor … cursor + count - 1; worker r of W takes every W-th from r on."""
        taken = []
        while count > 0:
            epoch, start = divmod(cursor, self.epoch_rows)
            some = min(count, self.epoch_rows - start)
            taken.append(self._of_epoch(epoch, np.arange(start, start + some, dtype=np.int64)))
            cursor, count = cursor + some, count - some
        return np.concatenate(taken) if taken else np.zeros(0, np.int64)

    def _of_epoch(self, epoch: int, positions: Ints) -> Ints:
        slots = permute(positions, self.epoch_rows, (self.seed, epoch))
        which = np.searchsorted(self._ends, slots, side="right")
        rows = np.empty_like(slots)
        for number, rows_of in enumerate(self.classes):
            mine = which == number
            local = slots[mine] - (self._ends[number] - self._whole[number] - self._parts[number])
            beyond = local >= self._whole[number]
            # A fractional weight: the first rows of a permutation of the class, another one each epoch.
            local[beyond] = permute(
                local[beyond] - self._whole[number], rows_of.num_rows, (self.seed, epoch, 1 + number)
            )
            rows[mine] = rows_of.first + local % max(1, rows_of.num_rows)
        return rows


def permute(index: Ints, size: int, key: tuple[int, ...]) -> Ints:
    """Where each index below `size` goes under a keyed permutation of 0 … size - 1, in constant memory.

    A Feistel network over pairs (left, right) with left * width + right = index and addition modulo the sides;
    what lands beyond `size` goes round again (cycle walking: Black and Rogaway, 2002).
    """
    if size <= 1:
        return index.copy()
    width = int(np.ceil(np.sqrt(size)))
    height = -(-size // width)
    keys = _round_keys(key)
    result = index.astype(np.int64)
    todo = np.arange(len(result))
    while len(todo):
        left, right = np.divmod(result[todo], width)
        for number, round_key in enumerate(keys):
            if number % 2:
                right = (right + (mix(left, round_key) % np.uint64(width)).astype(np.int64)) % width
            else:
                left = (left + (mix(right, round_key) % np.uint64(height)).astype(np.int64)) % height
        result[todo] = left * width + right
        todo = todo[result[todo] >= size]
    return result


def _round_keys(key: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    text = ",".join(map(str, key)).encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=8 * ROUNDS).digest(), dtype="<u8").astype(np.uint64)


def mix(values: Ints, key: np.uint64) -> npt.NDArray[np.uint64]:
    """64 well-mixed bits of each value under a key: the finalizer of splitmix64 (Steele et al., 2014)."""
    z = values.astype(np.uint64) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def batch_digest(rows: Ints) -> str:
    """SHA-256 of a global batch's row indices in order, as little-endian int64."""
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
