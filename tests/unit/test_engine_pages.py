"""Pages of the engine's cache: every token reads its own past, no page is lost or lent twice, prefixes are found."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.engines.local.pages import Copy, LayerGroup, Pages, Seat

PAGE = 4
# What 2000 texts more may leave behind: the interpreter's own caches differ by a few kB, an index that grew by 400 B.
MAX_GROWTH_BYTES = 30_000


def run(pages: Pages, seat: Seat, tokens: Sequence[int], step_tokens: int = 1, **scores: object) -> list[Copy]:
    """Compute a sequence as far as `tokens`, and say what had to be copied."""
    copies: list[Copy] = []
    while seat.num_known < len(tokens):
        end = min(len(tokens), seat.num_known + step_tokens)
        made = pages.extend(seat, end)
        assert made is not None
        copies += made
        pages.advance(seat, tokens[:end])
    if scores:
        pages.advance(seat, tokens, **scores)  # type: ignore[arg-type]
    return copies


def computed(pages: Pages, tokens: Sequence[int], key: Hashable = "member", **scores: object) -> Seat:
    """A seat that has computed a text."""
    seat = pages.open(key, tokens)
    run(pages, seat, tokens, **scores)
    return seat


def remember(pages: Pages, tokens: Sequence[int], key: Hashable = "member", **scores: object) -> None:
    """Compute a text and leave it in the cache."""
    pages.close(computed(pages, tokens, key, **scores))


def found(pages: Pages, tokens: Sequence[int], key: Hashable = "member", **asked: object) -> int:
    """How many tokens are shared, all of them allowed."""
    seat = pages.open(key, tokens, **{"max_shared": len(tokens), **asked})  # type: ignore[arg-type]
    pages.close(seat)
    return seat.shared


def sees(group: LayerGroup, position: int, key_position: int) -> bool:
    """Whether a token attends to another, by definition."""
    if key_position > position:
        return False
    near = group.window_tokens is None or position - key_position < group.window_tokens
    return near or key_position < group.num_sink_tokens


def counts(pages: Pages) -> list[tuple[int, int, int]]:
    return [(pages.num_free(g), pages.num_used(g), pages.num_cached(g)) for g in range(len(pages.groups))]


# ----- every rule at once, against a memory that knows what was written where


@dataclass
class Running:
    """A seat and what the test knows of it."""

    seat: Seat
    key: str
    generation: int
    tokens: list[int] = field(default_factory=list)


FULL, NARROW = LayerGroup(12), LayerGroup(9, window_tokens=3)
MIXES = (
    [FULL],
    [NARROW],
    [LayerGroup(9, window_tokens=1)],
    [FULL, LayerGroup(10, window_tokens=6, num_sink_tokens=2)],
    [LayerGroup(8, window_tokens=9), LayerGroup(11, window_tokens=4, num_sink_tokens=5)],
    [FULL, NARROW, LayerGroup(14, window_tokens=8)],
)
TEXTS = st.lists(st.integers(0, 1), max_size=18)  # of two letters, so that many begin alike


class Program(RuleBasedStateMachine):
    """Any sequence of calls. A cell of memory remembers whose text it was written for, as far as it goes."""

    @initialize(groups=st.sampled_from(MIXES), page_tokens=st.sampled_from([1, 3, 4]))
    def begin(self, groups: list[LayerGroup], page_tokens: int) -> None:
        self.pages, self.page_tokens = Pages(groups, page_tokens), page_tokens
        self.memory: dict[tuple[int, int, int], tuple[str, int, tuple[int, ...]]] = {}
        self.sequences: list[Running] = []
        self.generations = {"a": 0, "b": 0}

    def pick(self, data: st.DataObject) -> Running:
        return self.sequences[data.draw(st.integers(0, len(self.sequences) - 1), label="sequence")]

    def is_there(self, sequence: Running, tokens: list[int], position: int) -> None:
        """The token at `position` reads its own text at every place that it sees."""
        for number, group in enumerate(self.pages.groups):
            table = sequence.seat.tables[number]
            for place in range(min(position + 1, len(tokens))):
                if sees(group, position, place):
                    cell = (number, table[place // self.page_tokens], place % self.page_tokens)
                    expected = (sequence.key, sequence.generation, tuple(tokens[: place + 1]))
                    assert self.memory.get(cell) == expected, (cell, place)

    @rule(key=st.sampled_from("ab"), tokens=TEXTS, data=st.data())
    def open(self, key: str, tokens: list[int], data: st.DataObject) -> None:
        max_shared = data.draw(st.none() | st.integers(0, len(tokens)), label="max_shared")
        before = counts(self.pages)
        seat = self.pages.open(key, tokens, max_shared, need_scores=data.draw(st.booleans(), label="need_scores"))
        assert seat.num_known == seat.shared and seat.shared % self.page_tokens == 0
        assert seat.shared <= (max(0, len(tokens) - 1) if max_shared is None else max_shared)
        assert [cached for _, _, cached in before] == [cached for _, _, cached in counts(self.pages)]
        for number, payload in enumerate(seat.scores):
            assert payload == tuple(tokens[: (number + 1) * self.page_tokens])
        self.sequences.append(Running(seat, key, self.generations[key], tokens[: seat.shared]))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), new=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def step(self, data: st.DataObject, new: list[int]) -> None:
        """Some tokens more, of which the last may prove wrong (a draft that was refused)."""
        sequence = self.pick(data)
        seat, tokens = sequence.seat, sequence.tokens + new
        before, tables = counts(self.pages), [list(table) for table in seat.tables]
        held = [(g, page) for s in self.sequences for g, table in enumerate(s.seat.tables) for page in table]
        place, begun = divmod(seat.num_known, self.page_tokens)
        lacking = False
        for number, table in enumerate(tables):
            num_new = max(0, -(-len(tokens) // self.page_tokens) - len(table))
            num_copies = int(begun > 0 and held.count((number, table[place])) > 1)
            lacking |= num_new + num_copies > before[number][0]
        copies = self.pages.extend(seat, len(tokens))
        assert (copies is None) == lacking
        if copies is None:
            assert counts(self.pages) == before and seat.tables == tables
            return
        for copy in copies:
            for offset in range(self.page_tokens):
                self.memory[copy.group, copy.target, offset] = self.memory.get(
                    (copy.group, copy.source, offset), ("", 0, ())
                )
        for position in range(seat.num_known, len(tokens)):
            for number, table in enumerate(seat.tables):
                cell = (number, table[position // self.page_tokens], position % self.page_tokens)
                self.memory[cell] = (sequence.key, sequence.generation, tuple(tokens[: position + 1]))
        for position in range(seat.num_known, len(tokens)):
            self.is_there(sequence, tokens, position)
        sequence.tokens = tokens[: data.draw(st.integers(len(sequence.tokens), len(tokens)), label="kept")]
        scores = None
        if data.draw(st.booleans(), label="with scores"):
            full = range(len(sequence.tokens) // self.page_tokens)
            scores = {number: tuple(sequence.tokens[: (number + 1) * self.page_tokens]) for number in full}
        self.pages.advance(seat, sequence.tokens, scores)
        assert seat.num_known == len(sequence.tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence, before = self.pick(data), counts(self.pages)
        seat = self.pages.fork(sequence.seat)
        assert counts(self.pages) == before
        self.sequences.append(Running(seat, sequence.key, sequence.generation, list(sequence.tokens)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        self.pages.close(sequence.seat)
        self.sequences.remove(sequence)

    @rule(key=st.sampled_from("ab"))
    def drop(self, key: str) -> None:
        self.pages.drop(key)
        self.generations[key] += 1

    @invariant()
    def every_sequence_reads_its_own_past(self) -> None:
        for sequence in self.sequences:
            self.is_there(sequence, sequence.tokens, len(sequence.tokens))

    @invariant()
    def just_the_pages_that_are_never_seen_again_are_given_back(self) -> None:
        for sequence in self.sequences:
            num_known = len(sequence.tokens)
            for group, table in zip(self.pages.groups, sequence.seat.tables, strict=True):
                for index, page in enumerate(table):
                    places = range(index * self.page_tokens, (index + 1) * self.page_tokens)
                    seen = any(place >= num_known or sees(group, num_known, place) for place in places)
                    assert (page != -1) == seen and page != 0

    @invariant()
    def counts_are_exact(self) -> None:
        for number, (free, used, cached) in enumerate(counts(self.pages)):
            held = {page for sequence in self.sequences for page in sequence.seat.tables[number]} - {-1}
            assert used == len(held)
            assert used + free == self.pages.groups[number].num_pages - 1
            assert cached <= used + free

    @invariant()
    def a_page_in_two_seats_holds_the_same_for_both(self) -> None:
        holders: dict[tuple[int, int], tuple[str, int, list[int]]] = {}
        for sequence in self.sequences:
            for number, table in enumerate(sequence.seat.tables):
                for index, page in enumerate(table):
                    end = min(len(sequence.tokens), (index + 1) * self.page_tokens)
                    text = (sequence.key, sequence.generation, sequence.tokens[:end])
                    if page != -1:
                        assert holders.setdefault((number, page), text)[:2] == text[:2]
                        mine, other = text[2], holders[number, page][2]
                        assert mine[: len(other)] == other[: len(mine)]

    def teardown(self) -> None:
        if hasattr(self, "pages"):
            for sequence in self.sequences:
                self.pages.close(sequence.seat)
            for number, group in enumerate(self.pages.groups):
                assert self.pages.num_used(number) == 0
                assert self.pages.num_free(number) == group.num_pages - 1


TestAnyProgram = Program.TestCase
TestAnyProgram.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@settings(deadline=None)
@given(
    texts=st.lists(TEXTS, max_size=6),
    asked=TEXTS,
    max_shared=st.integers(0, 18),
    groups=st.sampled_from(
        [
            [LayerGroup(999)],
            [LayerGroup(999, window_tokens=5)],
            [LayerGroup(999), LayerGroup(999, window_tokens=7, num_sink_tokens=2)],
        ]
    ),
)
def test_while_nothing_is_evicted_the_longest_prefix_in_whole_pages_is_found(
    texts: list[list[int]], asked: list[int], max_shared: int, groups: list[LayerGroup]
) -> None:
    pages = Pages(groups, PAGE)
    for text in texts:
        remember(pages, text)
    alike = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(t, asked, strict=False))) for t in texts]
    longest = min(max_shared, max(alike, default=0)) // PAGE * PAGE
    assert pages.open("member", asked, max_shared).shared == longest


# ----- sharing


def test_a_prefix_is_found_without_its_last_token_which_must_be_run() -> None:
    pages = Pages([LayerGroup(20)], PAGE)
    first = computed(pages, range(12))
    second = pages.open("member", range(12))
    assert (second.shared, second.num_known) == (8, 8)
    assert second.tables[0] == first.tables[0][:2]
    assert pages.num_used(0) == 3
    assert found(pages, range(12)) == 12
    assert found(pages, range(12), max_shared=7) == 4
    assert found(pages, [*range(8), 99, 99, 99, 99]) == 8
    assert found(pages, []) == 0


def test_neither_another_members_pages_nor_the_same_tokens_elsewhere_are_found() -> None:
    pages = Pages([LayerGroup(20)], PAGE)
    remember(pages, [*[1] * 4, *[2] * 4, *[1] * 4], key="a")
    assert found(pages, [1] * 4, key="b") == 0
    assert found(pages, [2] * 4, key="a") == 0
    assert found(pages, [*[1] * 4, *[1] * 4], key="a") == 4
    assert found(pages, [*[1] * 4, *[2] * 4, *[1] * 4], key="a") == 12


def test_texts_made_to_collide_in_pythons_hash_are_told_apart() -> None:
    mine, hostile = [-1, 5, 6, 7], [-2, 5 + 2**61 - 1, 6, 7]
    assert hash(tuple(mine)) == hash(tuple(hostile))  # hash(-1) == hash(-2), and integers count modulo 2**61 - 1
    pages = Pages([LayerGroup(20)], PAGE)
    remember(pages, [*mine, 1, 2, 3, 4])
    assert found(pages, [*hostile, 1, 2, 3, 4]) == 0
    remember(pages, [*hostile, 1, 2, 3, 4])
    assert pages.num_cached(0) == 4


def test_of_two_seats_that_compute_the_same_both_keep_theirs_and_the_first_is_found() -> None:
    pages = Pages([LayerGroup(20)], PAGE)
    first, second = pages.open("member", range(8)), pages.open("member", range(8))
    run(pages, first, range(8))
    run(pages, second, range(8))
    assert not {*first.tables[0]} & {*second.tables[0]}
    assert (pages.num_used(0), pages.num_cached(0)) == (4, 2)
    third = pages.open("member", range(8), max_shared=8)
    assert third.tables == first.tables
    pages.close(second)
    assert (pages.num_used(0), pages.num_free(0)) == (2, 17)


def test_a_draft_that_was_refused_is_not_found() -> None:
    pages = Pages([LayerGroup(20)], PAGE)
    seat = pages.open("member", [])
    assert pages.extend(seat, 8) == []
    pages.advance(seat, [1, 2, 3])
    assert pages.num_cached(0) == 0
    pages.advance(seat, [1, 2, 3, 9, 9])
    assert found(pages, [1, 2, 3, 9]) == 4
    assert found(pages, [1, 2, 3, 4]) == 0


def test_a_model_without_groups_shares_nothing() -> None:
    pages = Pages([], PAGE)
    remember(pages, range(8))
    assert found(pages, range(8)) == 0


# ----- what is forgotten, and when


def test_the_least_recently_used_text_is_forgotten_first_and_from_its_end() -> None:
    pages = Pages([LayerGroup(7)], PAGE)
    old, young = [1] * 8, [2] * 8
    remember(pages, old)
    remember(pages, young)
    assert found(pages, old) == 8  # asked for last here and below, so it stays longer
    seat = pages.open("other", [])
    run(pages, seat, [3] * 8)
    assert (found(pages, young), found(pages, old)) == (8, 8)  # two pages were free all the time
    run(pages, seat, [3] * 9)
    assert (found(pages, young), found(pages, old)) == (4, 8)
    run(pages, seat, [3] * 13)
    assert (found(pages, young), found(pages, old)) == (0, 8)
    run(pages, seat, [3] * 17)
    assert (found(pages, young), found(pages, old)) == (0, 4)


def test_a_page_that_a_seat_holds_is_never_taken() -> None:
    pages = Pages([LayerGroup(5)], PAGE)
    remember(pages, [1] * 8)
    remember(pages, [2] * 8)
    reader = pages.open("member", [1] * 8, max_shared=8)
    writer = pages.open("member", [])
    assert pages.extend(writer, 12) is None
    run(pages, writer, [3] * 8)
    assert not {*reader.tables[0]} & {*writer.tables[0]}
    assert (found(pages, [1] * 8), found(pages, [2] * 8)) == (8, 0)


def test_what_stands_behind_a_page_that_was_forgotten_is_found_when_it_is_computed_again() -> None:
    pages = Pages([LayerGroup(6)], PAGE)
    first, second = pages.open("member", [1] * 12), pages.open("member", [1] * 12)
    run(pages, first, [1] * 4)
    run(pages, second, [1] * 12)  # found of it are the later pages: of the first page, the first seat's
    pages.close(first)
    eater = computed(pages, [5] * 8, key="other")
    assert found(pages, [1] * 12) == 0
    pages.close(eater)
    remember(pages, [1] * 4)
    assert found(pages, [1] * 12) == 12


def test_none_for_lack_of_pages_in_the_last_group_leaves_all_as_it_was() -> None:
    pages = Pages([LayerGroup(20), LayerGroup(4)], PAGE)
    remember(pages, [1] * 4)
    seat = computed(pages, [2] * 6)
    before, tables = counts(pages), [list(table) for table in seat.tables]
    assert pages.extend(seat, 14) is None
    assert counts(pages) == before and seat.tables == tables and seat.num_known == 6
    assert found(pages, [1] * 4) == 4
    assert pages.extend(seat, 12) == []
    assert found(pages, [1] * 4) == 0


def test_the_memory_of_the_index_does_not_grow_with_the_texts() -> None:
    pages = Pages([LayerGroup(9), LayerGroup(9, window_tokens=3)], PAGE)

    def serve(numbers: range) -> None:
        for number in numbers:
            remember(pages, [number, *range(14)], key=number % 7)
            remember(pages, range(6), key=("a key of its own", number))

    serve(range(500))
    gc.collect()
    tracemalloc.start()
    serve(range(500, 600))  # the tracer sees all pages made anew
    before, _ = tracemalloc.get_traced_memory()
    serve(range(600, 1600))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < MAX_GROWTH_BYTES


# ----- forks


def test_after_a_fork_who_writes_first_copies_and_the_other_writes_in_place() -> None:
    pages = Pages([LayerGroup(20), LayerGroup(20, window_tokens=2)], PAGE)
    first = computed(pages, range(6))
    second = pages.fork(first)
    shared = [list(table) for table in first.tables]
    assert second.tables == shared and second.tables is not first.tables
    assert pages.extend(second, 6) == [] and second.tables == shared  # nothing is written yet
    copies = pages.extend(second, 7)
    assert copies == [Copy(g, shared[g][1], second.tables[g][1]) for g in range(2)]
    assert first.tables == shared and second.tables[0][0] == shared[0][0]
    assert pages.extend(first, 7) == []
    assert first.tables == shared


def test_a_fork_at_the_end_of_a_page_copies_nothing() -> None:
    pages = Pages([LayerGroup(20)], PAGE)
    first = computed(pages, range(8))
    second = pages.fork(first)
    assert run(pages, second, [*range(8), 50]) == [] == run(pages, first, [*range(8), 60])
    assert first.tables[0][:2] == second.tables[0][:2] and first.tables[0][2] != second.tables[0][2]


def test_a_page_whose_other_holder_is_gone_is_written_in_place() -> None:
    pages = Pages([LayerGroup(20)], PAGE)
    first = computed(pages, range(6))
    second = pages.fork(first)
    pages.close(first)
    assert run(pages, second, range(8)) == []
    assert pages.num_used(0) == 2


def test_room_that_was_given_before_a_fork_is_not_shared() -> None:
    pages = Pages([LayerGroup(6)], PAGE)
    first = pages.open("member", [])
    assert pages.extend(first, 16) == []
    pages.advance(first, range(6))
    second = pages.fork(first)
    assert (len(first.tables[0]), len(second.tables[0])) == (4, 2)
    (copy,) = run(pages, first, range(16))
    assert copy.source == second.tables[0][1] and pages.num_free(0) == 0


def test_pages_that_a_seat_has_left_over_are_no_substitute_for_that_of_a_copy() -> None:
    pages = Pages([LayerGroup(5)], PAGE)
    first = pages.open("member", [])
    assert pages.extend(first, 16) == []
    pages.advance(first, range(6))
    second = pages.fork(first)
    assert pages.extend(first, 7) is None
    pages.close(second)
    assert pages.extend(first, 7) == []


def test_a_copy_needs_a_page_too() -> None:
    pages = Pages([LayerGroup(3)], PAGE)
    first = computed(pages, range(6))
    second = pages.fork(first)
    assert pages.extend(second, 7) is None
    assert second.tables == first.tables
    pages.close(first)
    assert pages.extend(second, 7) == []


# ----- windows


@pytest.mark.parametrize(
    ("window", "sinks", "num_tokens", "kept"),
    [
        (8, 0, 8, [0, 1]),  # token 8 sees 1 to 8
        (8, 0, 10, [0, 1, 2]),  # token 10 sees 3 to 10
        (8, 0, 11, [1, 2]),  # token 11 sees 4 to 11
        (2, 0, 12, [2]),
        (2, 0, 13, [3]),  # token 13 sees 12 and 13
        (1, 0, 12, []),
        (1, 0, 14, [3]),
        (2, 1, 13, [0, 3]),
        (2, 5, 13, [0, 1, 3]),
        (99, 0, 13, [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("step_tokens", [1, 5, 99])
def test_pages_that_lie_wholly_behind_the_window_are_given_back_but_for_sinks(
    window: int, sinks: int, num_tokens: int, kept: list[int], step_tokens: int
) -> None:
    pages = Pages([LayerGroup(20, window, sinks)], PAGE)
    seat = pages.open("member", [])
    run(pages, seat, range(num_tokens), step_tokens)
    assert [index for index, page in enumerate(seat.tables[0]) if page != -1] == kept
    assert pages.num_used(0) == len(kept)


def test_a_step_longer_than_the_window_has_pages_for_all_its_tokens_until_it_is_over() -> None:
    pages = Pages([LayerGroup(20, window_tokens=2)], PAGE)
    seat = pages.open("member", [])
    assert pages.extend(seat, 16) == []
    assert len({*seat.tables[0]} - {-1, 0}) == 4
    pages.advance(seat, range(16))
    assert [page != -1 for page in seat.tables[0]] == [False, False, False, True]
    assert pages.num_cached(0) == 4  # those given back are remembered, as the pages they were


def test_a_prefix_counts_where_every_window_has_what_the_next_token_sees() -> None:
    full, narrow = LayerGroup(99), LayerGroup(6, window_tokens=5)
    pages = Pages([full, narrow], PAGE)
    text = range(16)
    remember(pages, text)
    seat = pages.open("member", text, max_shared=16)
    assert seat.shared == 16
    assert [page != -1 for page in seat.tables[1]] == [False, False, False, True]  # token 16 sees 12 to 16
    assert -1 not in seat.tables[0]
    pages.close(seat)
    # Five pages: one was free, page 0 was given back first. Then page 1, page 2, and page 3 last.
    remember(pages, [7] * 12, key="other")
    assert pages.num_cached(1) == 5
    assert found(pages, text) == 16
    assert found(pages, range(12)) == 12
    assert found(pages, range(8)) == 0  # token 8 sees 4 to 8, whose page in the window group is gone
    assert pages.num_cached(0) == 7


def test_where_all_groups_have_windows_a_prefix_is_found_though_its_beginning_is_forgotten() -> None:
    pages = Pages([LayerGroup(6, window_tokens=5)], PAGE)
    remember(pages, range(32))
    seat = pages.open("member", range(40))
    assert (seat.shared, seat.tables[0][:-1]) == (32, [-1] * 7)
    run(pages, seat, range(40))
    assert found(pages, range(40)) == 40


def test_a_prefix_whose_sinks_alone_are_forgotten_is_not_found() -> None:
    pages = Pages([LayerGroup(6, window_tokens=2, num_sink_tokens=1)], PAGE)
    first, second = pages.open("member", range(12)), pages.open("member", range(12))
    run(pages, first, range(4))
    run(pages, second, range(12))  # found of it are the later pages: of the sinks' page, the first seat's
    pages.close(first)
    eater = computed(pages, [99] * 12, key="other")
    assert pages.num_cached(0) == 4  # the eater's three and the last page of the text, all that its window needs
    assert found(pages, range(12)) == 0
    pages.close(eater)
    remember(pages, range(4))
    assert found(pages, range(12)) == 12


def test_a_prefix_without_its_sinks_is_not_found() -> None:
    pages = Pages([LayerGroup(5, window_tokens=2, num_sink_tokens=1)], PAGE)
    remember(pages, range(12))
    assert found(pages, range(12)) == 12
    holder = pages.open("member", range(12), max_shared=12)
    assert [page != -1 for page in holder.tables[0]] == [True, False, True]
    pages.close(holder)  # the sinks' page is the last to be given back
    taker = pages.open("other", [])
    assert pages.extend(taker, 12) == []
    assert pages.num_cached(0) == 1
    assert found(pages, range(12)) == 4
    assert pages.extend(taker, 16) == []
    assert found(pages, range(12)) == 0


# ----- scores


def test_with_need_scores_pages_are_shared_that_have_them_and_the_last_found_is_run_again() -> None:
    pages = Pages([LayerGroup(20)], PAGE)
    remember(pages, range(16), scores={0: "zero", 1: "one", 2: "two"})
    seat = pages.open("member", range(16), need_scores=True)
    assert (seat.shared, seat.scores) == (8, ["zero", "one", "two"])
    assert pages.open("member", range(12), need_scores=True).scores == ["zero", "one", "two"]
    assert pages.open("member", range(16), max_shared=4, need_scores=True).scores == ["zero", "one"]
    assert pages.open("member", range(3), need_scores=True).scores == []
    assert pages.open("member", range(16)).scores == []
    unlike = pages.open("member", [9] * 16, need_scores=True)
    assert (unlike.shared, unlike.scores) == (0, [])


def test_pages_without_scores_get_them_from_who_computes_them_again() -> None:
    pages = Pages([LayerGroup(20)], PAGE)
    remember(pages, range(8))
    again = pages.open("member", range(8), need_scores=True)
    assert again.shared == 0
    run(pages, again, range(8), scores={0: "first", 1: "second"})
    pages.advance(again, range(8), scores={1: "third"})
    assert pages.open("member", range(8), need_scores=True).scores == ["first", "second"]
    assert pages.num_cached(0) == 2


def test_scores_go_with_their_page() -> None:
    pages = Pages([LayerGroup(3)], PAGE)
    remember(pages, range(8), scores={0: "zero", 1: "one"})
    remember(pages, [9] * 8)
    remember(pages, range(8))
    assert found(pages, range(8)) == 8
    assert pages.open("member", range(8), need_scores=True).scores == []


def test_with_a_window_the_pages_shared_before_the_one_that_is_run_again_are_there() -> None:
    pages = Pages([LayerGroup(99), LayerGroup(3, window_tokens=5)], PAGE)
    remember(pages, range(12), scores=dict.fromkeys(range(3), "known"))
    # The window group has pages 1 and 2 of the text left, so one can begin behind page 1 or 2, not behind page 0.
    assert found(pages, range(4)) == 0
    assert found(pages, range(12), need_scores=True) == 8
    assert found(pages, range(8), need_scores=True) == 0


# ----- members leave


def test_what_is_dropped_is_not_found_and_frees_its_pages() -> None:
    pages = Pages([LayerGroup(20)], PAGE)
    remember(pages, range(8), key="a")
    remember(pages, range(8), key="b")
    seat = pages.open("a", range(8))
    assert (seat.shared, pages.num_cached(0)) == (4, 4)
    pages.drop("a")
    assert (pages.num_cached(0), pages.num_used(0)) == (2, 1)
    assert (found(pages, range(8), key="a"), found(pages, range(8), key="b")) == (0, 8)
    pages.close(seat)
    assert (pages.num_cached(0), pages.num_used(0), pages.num_free(0)) == (2, 0, 19)
    pages.drop("unknown")


def test_a_seat_goes_on_after_its_member_is_dropped_but_nobody_finds_what_it_computes() -> None:
    pages = Pages([LayerGroup(20)], PAGE)
    old = computed(pages, range(8))
    half = pages.fork(old)
    pages.drop("member")
    run(pages, old, range(16), scores={3: "of the old weights"})
    run(pages, half, range(12))
    assert (found(pages, range(16)), pages.num_cached(0)) == (0, 0)
    new = computed(pages, range(16))  # the member with its new weights
    assert found(pages, range(16)) == 16
    assert not {*new.tables[0]} & {*old.tables[0]}
    for seat in (old, half, new):
        pages.close(seat)
    assert (pages.num_used(0), pages.num_cached(0)) == (0, 4)


# ----- what can ever fit


@settings(deadline=None)
@given(
    num_pages=st.integers(1, 12),
    window=st.none() | st.integers(1, 14),
    sinks=st.integers(0, 9),
    num_tokens=st.integers(0, 30),
    num_seats=st.integers(1, 3),
)
def test_fits_says_whether_running_them_token_by_token_succeeds(
    num_pages: int, window: int | None, sinks: int, num_tokens: int, num_seats: int
) -> None:
    pages = Pages([LayerGroup(99), LayerGroup(num_pages, window, sinks)], PAGE)
    if num_seats * -(-num_tokens // PAGE) > 98:
        return
    seats = [pages.open(number, []) for number in range(num_seats)]
    done = True
    for end in range(1, num_tokens + 1):
        done = done and all(pages.extend(seat, end) == [] for seat in seats)
        if done:
            for seat in seats:
                pages.advance(seat, range(end))
    assert pages.fits(num_tokens, num_seats) == done


def test_fits_does_not_mind_what_is_held_now() -> None:
    pages = Pages([LayerGroup(4)], PAGE)
    computed(pages, range(12))
    assert pages.num_free(0) == 0
    assert pages.fits(12) and not pages.fits(13)
    assert pages.fits(4, 3) and not pages.fits(5, 2)


def test_a_closed_seat_cannot_be_extended() -> None:
    pages = Pages([LayerGroup(9)], PAGE)
    seat = computed(pages, range(5))
    pages.close(seat)
    pages.close(seat)
    assert pages.num_free(0) == 8
    with pytest.raises(AssertionError, match="closed"):
        pages.extend(seat, 6)
