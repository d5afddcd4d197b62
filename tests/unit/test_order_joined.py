"""Rows that join an order under way: what is left of the epoch and they are taken together, each as often as due."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ulm.corpus.order import Joined, Order, RowClass

WEIGHTS = [1.0, 2.0, 0.5, 2.5, 0.1]


@st.composite
def orders(draw):
    """First classes, joined ones (from none to three times, some in one epoch, some at one cursor), and a seed."""
    first, groups, cursor = 0, [], 0
    for number in range(draw(st.integers(1, 4))):
        classes = []
        for weight in draw(st.lists(st.sampled_from(WEIGHTS), min_size=number == 0, max_size=3, unique=True)):
            num_rows = draw(st.integers(1, 30))
            classes.append(RowClass(first, num_rows, weight))
            first += num_rows
        cursor += draw(st.integers(0, 60)) if number else 0
        groups.append(Joined(cursor, tuple(classes)))
    return groups, draw(st.integers(0, 5))


def takings(rows_of: RowClass) -> tuple[int, int]:
    """How often each row stands in an epoch at least, and how many rows stand once more; at least one row stands."""
    whole, part = divmod(Fraction(rows_of.weight), 1)
    return int(whole), max(round(part * rows_of.num_rows), 0 if whole else 1)


def epochs_of(groups: list[Joined], num_epochs: int) -> list[tuple[int, int, list[RowClass]]]:
    """First position, end and classes of each epoch, counted up by hand."""
    sizes = [sum(takings(c)[0] * c.num_rows + takings(c)[1] for c in group.classes) for group in groups]
    found, begin, known = [], 0, 1
    for _ in range(num_epochs):
        end = begin + sum(sizes[:known])
        while known < len(groups) and groups[known].cursor < end:
            end += sizes[known]
            known += 1
        found.append((begin, end, [c for group in groups[:known] for c in group.classes]))
        begin = end
    return found


@settings(max_examples=100, deadline=None)
@given(orders())
def test_every_epoch_takes_each_row_as_often_as_its_weight_says_also_where_rows_join(given_order):
    groups, seed = given_order
    order = Order(groups[0].classes, seed, groups[1:])
    for begin, end, classes in epochs_of(groups, num_epochs=8):
        counts = Counter(order.rows(begin, end - begin).tolist())
        for rows_of in classes:
            whole, more = takings(rows_of)
            found = [counts.pop(rows_of.first + row, 0) for row in range(rows_of.num_rows)]
            assert sorted(found) == [whole] * (rows_of.num_rows - more) + [whole + 1] * more
        assert not counts


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 300), st.integers(0, 60))
def test_any_part_of_an_order_that_rows_join_is_the_same_as_all_of_it_from_the_start(given_order, cursor, count):
    groups, seed = given_order
    order = Order(groups[0].classes, seed, groups[1:])
    assert order.rows(cursor, count).tolist() == order.rows(0, cursor + count)[cursor:].tolist()


@settings(max_examples=60, deadline=None)
@given(orders())
def test_what_was_taken_before_rows_joined_is_what_it_would_have_been_without_them(given_order):
    groups, seed = given_order
    whole = Order(groups[0].classes, seed, groups[1:])
    for known in range(1, len(groups)):
        cursor = groups[known].cursor
        before = Order(groups[0].classes, seed, groups[1:known])
        assert whole.rows(0, cursor).tolist() == before.rows(0, cursor).tolist()


def test_joined_rows_are_mixed_with_what_was_left_and_not_taken_first_or_last():
    order = Order([RowClass(0, 1_000)], 0, [Joined(500, (RowClass(1_000, 500),))])
    for begin in range(500, 1_500, 100):
        joined = int((order.rows(begin, 100) >= 1_000).sum())
        assert 30 <= joined <= 70  # of 100 rows half: four standard deviations


def test_the_rest_of_an_epoch_is_another_order_for_another_seed_epoch_or_leg():
    def rest(seed=0, cursor=50, legs=1):
        joined = [Joined(cursor, (RowClass(100, 100),)), *[Joined(cursor, ())] * (legs - 1)]
        return Order([RowClass(0, 100)], seed, joined).rows(cursor, 150).tolist()

    assert rest() == rest()
    assert rest() != rest(seed=1)
    assert sorted(rest()) == sorted(rest(legs=2)) and rest() != rest(legs=2)
    shared = [row for row in rest(cursor=150) if row >= 100], [row for row in rest() if row >= 100]
    assert shared[0] != shared[1]


def test_rows_of_ten_million_take_no_memory_of_their_number():
    import tracemalloc

    order = Order([RowClass(0, 10_000_000)], 0, [Joined(3_000_000, (RowClass(10_000_000, 5_000_000),))])
    order.rows(0, 24)  # numpy's own buffers
    tracemalloc.start()
    rows = order.rows(9_000_000, 24)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(rows)) == 24 and peak_bytes < 100_000


def test_a_source_of_little_weight_and_few_rows_still_has_one_in_each_epoch():
    order = Order([RowClass(0, 10), RowClass(10, 4, weight=0.1)], seed=0)
    assert order.epoch_rows == 11
    extra = [int(order.rows(11 * epoch, 11).max()) for epoch in range(30)]
    assert set(extra) == {10, 11, 12, 13}
