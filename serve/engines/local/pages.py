"""Which page holds which tokens of which sequence: shared by prefix, copied before it is written into, counted exactly.

A page is a number: the memory behind it, keys and values of `page_tokens` tokens in some layers, is the caller's. Here
stands who holds it. Sequences of one key (a member with its weights) share the pages of what they begin with; pages
that nobody holds any more are found again by their text, until their room is needed (arXiv 2309.06180, section 4.3).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from weakref import WeakValueDictionary

GONE = -1  # in a table: the page was given back, because no later token sees it


@dataclass(frozen=True)
class LayerGroup:
    """Layers that keep the same tokens, so that one table of pages serves them all. Page 0 is nobody's."""

    num_pages: int  # page 0 among them
    window_tokens: int | None = None  # the token at position p sees those at k with p - k < window_tokens; None: all
    num_sink_tokens: int = 0  # the first of a sequence, which every token sees, whatever the window

    def __post_init__(self) -> None:
        assert self.num_pages >= 1 and self.num_sink_tokens >= 0
        assert self.window_tokens is None or self.window_tokens >= 1


@dataclass(frozen=True)
class Copy:
    """A page to be copied, in all layers of a group, before this step writes."""

    group: int
    source: int
    target: int


class _Index(dict[bytes, "_Entry"]):
    """The pages of one key that can be found, by the digest of all text up to their end."""

    is_dropped = False  # then its seats live on, and what they compute is nobody else's


class _Entry:
    """One page of text that can be found: its page in every group (or GONE), and what was scored there."""

    __slots__ = ("digest", "index", "pages", "scores")

    def __init__(self, index: _Index, digest: bytes, num_groups: int) -> None:
        self.index, self.digest = index, digest
        self.pages = [GONE] * num_groups
        self.scores: Any = None

    def lose(self, group: int) -> None:
        """Be without the page of a group; an entry without any is forgotten, so that pages bound the index."""
        self.pages[group] = GONE
        if max(self.pages) == GONE:
            del self.index[self.digest]


@dataclass(eq=False, slots=True)
class Seat:
    """What one sequence of one member holds. Only `Pages` changes it."""

    key: Hashable
    tables: list[list[int]]  # by group: the page of every `page_tokens` positions, or GONE
    num_known: int  # tokens computed: their keys and values are in the pages
    shared: int  # how many of them came from the cache at opening
    scores: list[Any]  # with need_scores: payloads of the shared pages and of the one behind them
    index: _Index
    chain: list[bytes]  # digest of the text up to the end of every full page
    num_behind: list[int]  # by group: pages that are given back, sinks counted with them
    next_event: int  # below this many known tokens no page becomes full and none falls out of a window
    room: int = 0  # tokens it has pages of its own for; 0: look


class _Pool:
    """The pages of one group: which are held, by how many seats, and which can be found."""

    def __init__(self, number: int, group: LayerGroup, page_tokens: int) -> None:
        self.number = number
        self.num_pages, self.window_tokens = group.num_pages, group.window_tokens
        self.page_tokens = page_tokens
        self.num_sink_pages = _ceil_div(group.num_sink_tokens, page_tokens)
        self.free = list(range(group.num_pages - 1, 0, -1))
        self.num_holders = [0] * group.num_pages
        self.entries: dict[int, _Entry] = {}  # by page: those that can be found
        self.unused: OrderedDict[int, None] = OrderedDict()  # those of them that nobody holds, oldest first

    @property
    def num_free(self) -> int:
        return len(self.free) + len(self.unused)

    def first_seen(self, position: int) -> int:
        """The first page, sinks aside, that the token at `position` sees: all before it lie behind the window."""
        return 0 if self.window_tokens is None else max(0, position - self.window_tokens + 1) // self.page_tokens

    def keeps_always(self, page_index: int) -> bool:
        """Whether every later token sees something of that page of its sequence."""
        return self.window_tokens is None or page_index < self.num_sink_pages

    def max_held(self, num_tokens: int) -> int:
        """The most pages that a sequence holds at once on its way to `num_tokens`, one token a step."""
        num_pages = _ceil_div(num_tokens, self.page_tokens)
        if self.window_tokens is None:
            return num_pages
        # A window spans most pages when its last token is the first of a page.
        return min(num_pages, self.num_sink_pages + _ceil_div(self.window_tokens - 1, self.page_tokens) + 1)

    def take(self) -> int:
        """A page for one seat: a free one, else the least recently used of those that are only remembered."""
        if self.free:
            page = self.free.pop()
        else:
            page, _ = self.unused.popitem(last=False)
            self.entries.pop(page).lose(self.number)
        self.num_holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One seat more relies on the page."""
        if not self.num_holders[page]:
            del self.unused[page]
        self.num_holders[page] += 1

    def release(self, page: int) -> None:
        """One seat less; without any the page is free, or remembered as the most recently used."""
        self.num_holders[page] -= 1
        if not self.num_holders[page]:
            if page in self.entries:
                self.unused[page] = None
            else:
                self.free.append(page)

    def forget(self, page: int) -> None:
        """The page can no longer be found."""
        del self.entries[page]
        if page in self.unused:
            del self.unused[page]
            self.free.append(page)


class Pages:
    """All pages of some groups of layers, and who holds them. Not thread-safe: the engine's thread calls it.

    A step of a sequence: `extend`, execute the copies, compute, `advance`. Between steps it can be forked.
    """

    def __init__(self, groups: Sequence[LayerGroup], page_tokens: int) -> None:
        assert page_tokens >= 1
        self.groups, self.page_tokens = tuple(groups), page_tokens
        self._pools = [_Pool(number, group, page_tokens) for number, group in enumerate(groups)]
        # Seats and entries keep an index alive; that of a key which has neither is gone by itself.
        self._indexes: WeakValueDictionary[Hashable, _Index] = WeakValueDictionary()

    def open(
        self, key: Hashable, tokens: Sequence[int], max_shared: int | None = None, need_scores: bool = False
    ) -> Seat:
        """A seat that knows as much of `tokens` as is cached, in whole pages. It takes no page that is free.

        At most `max_shared` tokens are shared, by default all but the last, which must be run for its logits. A cached
        prefix counts where every group has the pages that the token behind it sees.

        `need_scores` shares pages that have scores, and one less than it finds: a page's last logits score the first
        token behind it, so the last page found is run again. `seat.scores` has the payloads of the shared pages and
        of that one, whose first score is found nowhere else; it is empty when nothing was found.
        """
        index = self._indexes.setdefault(key, _Index())
        limit = min(len(tokens) - 1 if max_shared is None else max_shared, len(tokens)) // self.page_tokens
        if need_scores:
            limit = min(limit + 1, len(tokens) // self.page_tokens)
        found, num_shared = self._find(index, tokens, limit, need_scores)
        shared = num_shared * self.page_tokens
        tables: list[list[int]] = []
        num_behind: list[int] = []
        for pool in self._pools:
            first = pool.first_seen(shared)
            kept = [number >= first or pool.keeps_always(number) for number in range(num_shared)]
            tables.append([found[number].pages[pool.number] if kept[number] else GONE for number in range(num_shared)])
            num_behind.append(max(first, pool.num_sink_pages))
            for page in tables[-1]:
                if page != GONE:
                    pool.hold(page)
        seat = Seat(
            key,
            tables,
            num_known=shared,
            shared=shared,
            scores=[page.scores for page in found[: num_shared + 1]] if need_scores else [],
            index=index,
            chain=[page.digest for page in found[:num_shared]],
            num_behind=num_behind,
            next_event=0,
        )
        self._plan(seat)
        return seat

    def extend(self, seat: Seat, num_tokens: int) -> list[Copy] | None:
        """Pages for the positions from `seat.num_known` up to `num_tokens`, as the copies that this needs first.

        The page written into first may be another seat's too (after a fork): then this one gets a copy. Execute copies
        of several calls in their order, before anything is written. A page that can be found is full, and therefore
        never written into. None when pages are lacking: then nothing has changed.
        """
        if num_tokens <= seat.room or num_tokens <= seat.num_known:
            return []
        num_pages = _ceil_div(num_tokens, self.page_tokens)
        place, is_begun = divmod(seat.num_known, self.page_tokens)
        copied: list[bool] = []
        for pool, table in zip(self._pools, seat.tables, strict=True):
            assert len(table) * self.page_tokens >= seat.num_known, "the seat is closed"
            copied.append(is_begun > 0 and pool.num_holders[table[place]] > 1)
            if max(0, num_pages - len(table)) + copied[-1] > pool.num_free:
                return None
        copies: list[Copy] = []
        seat.room = num_pages * self.page_tokens
        for pool, table, is_copied in zip(self._pools, seat.tables, copied, strict=True):
            if is_copied:
                copies.append(Copy(pool.number, table[place], pool.take()))
                pool.release(table[place])
                table[place] = copies[-1].target
            table.extend(pool.take() for _ in range(num_pages - len(table)))
        return copies

    def advance(self, seat: Seat, tokens: Sequence[int], scores: Mapping[int, Any] | None = None) -> None:
        """The sequence is computed as far as `tokens`, which is all of it so far, not what is new.

        Pages that are full now can be found; pages that no later token sees are given back. `scores` has payloads by
        page of the sequence, of full pages only: what the engine found for the tokens of that page.
        """
        num_known = len(tokens)
        assert num_known >= seat.num_known, "a sequence never gets shorter"
        seat.num_known = num_known
        if num_known < seat.next_event and scores is None:
            return
        for number in range(len(seat.chain), num_known // self.page_tokens):
            digest = self._digest(seat.chain[-1] if seat.chain else b"", tokens, number)
            seat.chain.append(digest)
            if not seat.index.is_dropped:
                self._remember(seat, digest, number)
        for number, payload in (scores or {}).items():
            entry = seat.index.get(seat.chain[number])
            if entry is not None and entry.scores is None:
                entry.scores = payload
        for pool, table in zip(self._pools, seat.tables, strict=True):
            assert len(table) * self.page_tokens >= num_known, "the step wrote where the seat had no pages"
            first = pool.first_seen(num_known)
            for number in range(seat.num_behind[pool.number], first):
                pool.release(table[number])
                table[number] = GONE
            seat.num_behind[pool.number] = max(seat.num_behind[pool.number], first)
        self._plan(seat)

    def fork(self, seat: Seat) -> Seat:
        """Another sequence with the same past, in the same pages; of the last one, who writes first gets a copy."""
        num_pages = _ceil_div(seat.num_known, self.page_tokens)
        tables = [table[:num_pages] for table in seat.tables]  # what lies beyond is room that the first seat was given
        for pool, table in zip(self._pools, tables, strict=True):
            for page in table:
                if page != GONE:
                    pool.hold(page)
        seat.room = 0
        return Seat(
            seat.key,
            tables,
            num_known=seat.num_known,
            shared=seat.shared,
            scores=list(seat.scores),
            index=seat.index,
            chain=list(seat.chain),
            num_behind=list(seat.num_behind),
            next_event=seat.next_event,
        )

    def close(self, seat: Seat) -> None:
        """Give back all that the seat holds. Its full pages can be found until their room is needed."""
        for pool, table in zip(self._pools, seat.tables, strict=True):
            for page in reversed(table):  # the end of a text is of use to fewer others, so it is the first to go
                if page != GONE:
                    pool.release(page)
            table.clear()
        seat.room = 0

    def drop(self, key: Hashable) -> None:
        """Nothing that was or is being computed under this key is found any more; open seats keep what they hold."""
        index = self._indexes.pop(key, None)
        if index is None:
            return
        index.is_dropped = True
        for entry in index.values():
            for pool, page in zip(self._pools, entry.pages, strict=True):
                if page != GONE:
                    pool.forget(page)
        index.clear()

    def fits(self, num_tokens: int, num_seats: int = 1) -> bool:
        """Whether that many sequences of that length, sharing nothing, can be held at once when all else is gone.

        Counted for one token a step: behind a window, a longer step holds more for its duration.
        """
        return all(num_seats * pool.max_held(num_tokens) < pool.num_pages for pool in self._pools)

    def num_free(self, group: int) -> int:
        """Pages that could be had now: free ones, and those that are only remembered."""
        return self._pools[group].num_free

    def num_used(self, group: int) -> int:
        """Pages that seats hold, each counted once."""
        return self._pools[group].num_pages - 1 - self._pools[group].num_free

    def num_cached(self, group: int) -> int:
        """Pages that can be found by their text, held or not."""
        return len(self._pools[group].entries)

    def _find(self, index: _Index, tokens: Sequence[int], limit: int, need_scores: bool) -> tuple[list[_Entry], int]:
        """What is cached of the first `limit` pages of a text, and how many of them can be shared."""
        found: list[_Entry] = []
        fitting = [0]  # numbers of pages that every group can begin behind
        runs = [0] * len(self._pools)  # pages without a gap that a group has, up to here
        digest = b""
        for number in range(limit if self._pools else 0):  # without a group nothing says what was computed
            digest = self._digest(digest, tokens, number)
            entry = index.get(digest) or _Entry(index, digest, len(self._pools))  # a gap that a window may hide
            if need_scores and entry.scores is None:
                break
            pairs = list(zip(self._pools, entry.pages, strict=True))
            if any(page == GONE and pool.keeps_always(number) for pool, page in pairs):
                break
            found.append(entry)
            runs = [0 if page == GONE else run + 1 for run, page in zip(runs, entry.pages, strict=True)]
            first_seen = (pool.first_seen((number + 1) * self.page_tokens) for pool in self._pools)
            if all(run > number - first for run, first in zip(runs, first_seen, strict=True)):
                fitting.append(number + 1)
        return found, max((n for n in fitting if n <= len(found) - need_scores), default=0)

    def _digest(self, before: bytes, tokens: Sequence[int], number: int) -> bytes:
        """The digest of all text up to the end of page `number`, from the digest up to its beginning.

        256 bits, so that equal digests are equal texts: Python's hash has 64 and no secret, and a prompt made to
        collide would be answered from somebody else's text. To compare a page's own tokens would not prevent that,
        because the text before it may be forgotten already.
        """
        page = tokens[number * self.page_tokens : (number + 1) * self.page_tokens]
        return blake2b(before + array("q", page).tobytes(), digest_size=32).digest()

    def _remember(self, seat: Seat, digest: bytes, number: int) -> None:
        """Make a full page findable in every group; where another seat computed the same first, that one stays."""
        entry = seat.index.get(digest)
        if entry is None:
            entry = seat.index[digest] = _Entry(seat.index, digest, len(self._pools))
        for pool, table in zip(self._pools, seat.tables, strict=True):
            if entry.pages[pool.number] == GONE:
                entry.pages[pool.number] = table[number]
                pool.entries[table[number]] = entry

    def _plan(self, seat: Seat) -> None:
        """Set when `advance` has something to do next."""
        seat.next_event = (len(seat.chain) + 1) * self.page_tokens
        for pool, num_behind in zip(self._pools, seat.num_behind, strict=True):
            if pool.window_tokens is not None:
                falls_behind = (num_behind + 1) * self.page_tokens + pool.window_tokens - 1
                seat.next_event = min(seat.next_event, falls_behind)


def _ceil_div(number: int, by: int) -> int:
    return -(-number // by)
