from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from ulm.corpus.order import Order, RowClass, batch_digest, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 97, 1_000, 65_537])
def test_a_keyed_permutation_takes_every_index_once(size):
    assert sorted(permute(np.arange(size), size, (7, 0))) == list(range(size))


def test_permutations_of_two_keys_have_nothing_in_common_but_chance():
    a, b = (permute(np.arange(10_000), 10_000, (0, epoch)) for epoch in (0, 1))
    assert 0 <= (a == b).sum() < 10  # one is expected
    assert abs(np.corrcoef(np.arange(10_000), a)[0, 1]) < 0.04  # four standard deviations


def test_any_part_of_the_order_is_the_same_as_all_of_it_from_the_start():
    order = Order([RowClass(0, 37)], seed=3)
    whole = order.rows(0, 200)
    for cursor, count in ((0, 10), (30, 20), (36, 1), (37, 37), (73, 100)):
        assert order.rows(cursor, count).tolist() == whole[cursor : cursor + count].tolist()


def test_each_epoch_takes_each_row_once_in_another_order():
    order = Order([RowClass(0, 50)], seed=0)
    first, second = order.rows(0, 50), order.rows(50, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist()


def test_workers_together_take_the_global_batch_whatever_their_number():
    order = Order([RowClass(0, 100)], seed=1)
    batch = order.rows(24, 12)
    for num_workers in (1, 2, 3):
        shares = [batch[rank::num_workers] for rank in range(num_workers)]
        assert sorted(np.concatenate(shares)) == sorted(batch)
        assert [share[0] for share in shares] == batch[:num_workers].tolist()


def test_weight_2_5_takes_each_row_twice_and_another_half_of_them_a_third_time_each_epoch():
    order = Order([RowClass(0, 10), RowClass(10, 8, weight=2.5)], seed=0)
    assert order.epoch_rows == 10 + 16 + 4
    extra = []
    for epoch in range(6):
        counts = Counter(order.rows(epoch * 30, 30).tolist())
        assert [counts[row] for row in range(10)] == [1] * 10
        assert sorted(counts[row] for row in range(10, 18)) == [2] * 4 + [3] * 4
        extra.append(frozenset(row for row in range(10, 18) if counts[row] == 3))
    assert len(set(extra)) > 1


def test_weight_below_one_leaves_rows_out():
    counts = Counter(Order([RowClass(0, 10, weight=0.3)], seed=0).rows(0, 3).tolist())
    assert len(counts) == 3


def test_batch_digest_is_sha256_of_little_endian_int64_in_order():
    eight_bytes_each = b"\1" + 7 * b"\0" + b"\2" + 7 * b"\0"
    assert batch_digest(np.array([1, 2])) == hashlib.sha256(eight_bytes_each).hexdigest()
    assert batch_digest(np.array([1, 2])) != batch_digest(np.array([2, 1]))
