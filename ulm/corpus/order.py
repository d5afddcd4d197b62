"""The order in which training takes rows: a pure function of the seed, so that any position can be computed at once.

Nothing is shuffled in memory and nothing is replayed: row i of epoch e is a keyed permutation of i. A run that stops
at a cursor goes on from it with any number of workers, and the same global batches follow.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
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


@dataclass(frozen=True)
class Joined:
    """Rows that a run takes too from global position `cursor` on: those of `classes`."""

    cursor: int
    classes: tuple[RowClass, ...]


@dataclass(frozen=True)
class _Leg:
    """The order from a global position on: what is left of the epoch under way there, then whole epochs."""

    first: int  # global position
    epoch: int
    rest: int  # positions to the end of that epoch, joined rows among them
    epoch_rows: int  # of every epoch after it

    def span(self, position: int) -> tuple[int, int, int]:
        """The epoch at a global position, and the positions in this leg that it begins and ends at."""
        past = position - self.first - self.rest
        if past < 0:
            return self.epoch, self.first, self.first + self.rest
        number = past // self.epoch_rows
        begin = self.first + self.rest + number * self.epoch_rows
        return self.epoch + 1 + number, begin, begin + self.epoch_rows


class Order:
    """The endless sequence of rows that a run takes, epoch after epoch.

    Where rows join, what the epoch under way has not taken yet and they are permuted together, each once as its weight
    says, for the rest of that epoch; later epochs are over all rows. What joins while such a rest is taken joins it
    in the same way.
    """

    def __init__(self, classes: Sequence[RowClass], seed: int, joined: Sequence[Joined] = ()) -> None:
        self.classes, self.seed = (*classes, *(c for more in joined for c in more.classes)), seed
        self._whole = [int(c.weight) * c.num_rows for c in self.classes]
        self._parts = [_part(c) for c in self.classes]
        self._ends = np.cumsum([w + p for w, p in zip(self._whole, self._parts, strict=True)], dtype=np.int64)
        known = len(classes)
        self._legs = [_Leg(first=0, epoch=-1, rest=0, epoch_rows=self._rows_of(known))]
        for more in joined:
            before, known = self._legs[-1], known + len(more.classes)
            assert more.cursor >= before.first, "rows join in the order of their cursors"
            epoch, _, end = before.span(more.cursor)
            epoch_rows = self._rows_of(known)
            rest = end - more.cursor + epoch_rows - before.epoch_rows
            self._legs.append(_Leg(more.cursor, epoch, rest, epoch_rows))
        self._firsts = [leg.first for leg in self._legs]

    @property
    def epoch_rows(self) -> int:
        """Rows of one epoch; the same for every epoch in which nothing joins, once all have joined."""
        return self._legs[-1].epoch_rows

    def rows(self, cursor: int, count: int) -> Ints:
        """Row indices at global positions cursor … cursor + count - 1; worker r of W takes every W-th from r on."""
        taken, end = [], cursor + count
        while cursor < end:
            number = bisect_right(self._firsts, cursor) - 1
            epoch, _, stop = self._legs[number].span(cursor)
            stop = min(end, stop, *self._firsts[number + 1 : number + 2])
            slots = self._slots(number, np.arange(cursor, stop, dtype=np.int64))
            taken.append(self._in_slots(epoch, slots))
            cursor = stop
        return np.concatenate(taken) if taken else np.zeros(0, np.int64)

    def _rows_of(self, num_classes: int) -> int:
        return int(self._ends[num_classes - 1]) if num_classes else 0

    def _slots(self, number: int, positions: Ints) -> Ints:
        """The slots at global positions of one epoch, as leg `number` has them. An epoch has a slot for each taking."""
        leg = self._legs[number]
        epoch, begin, end = leg.span(int(positions[0]))
        if begin >= leg.first + leg.rest:
            return permute(positions - begin, leg.epoch_rows, (self.seed, epoch))
        at = permute(positions - begin, end - begin, (self.seed, epoch, 0, number))  # one number more than other keys
        slots_before = self._legs[number - 1].epoch_rows
        num_left = leg.rest - (leg.epoch_rows - slots_before)
        slots = slots_before + at - num_left
        if (left := at < num_left).any():
            slots[left] = self._slots(number - 1, leg.first + at[left])
        return slots

    def _in_slots(self, epoch: int, slots: Ints) -> Ints:
        which = np.searchsorted(self._ends, slots, side="right")
        rows = np.empty_like(slots)
        for number in np.unique(which).tolist():
            rows_of, mine = self.classes[number], which == number
            local = slots[mine] - (self._ends[number] - self._whole[number] - self._parts[number])
            beyond = local >= self._whole[number]
            # A fractional weight: the first rows of a permutation of the class, another one each epoch.
            local[beyond] = permute(
                local[beyond] - self._whole[number], rows_of.num_rows, (self.seed, epoch, 1 + number)
            )
            rows[mine] = rows_of.first + local % rows_of.num_rows
        return rows


def _part(rows: RowClass) -> int:
    """Rows that are taken once more than the whole part of their weight says; of few rows of little weight, one."""
    part = round((Fraction(rows.weight) % 1) * rows.num_rows)
    return part if part or rows.weight >= 1 else min(1, rows.num_rows)


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
