from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.written_corpus import stdlib_docstrings, written_corpus
from ulm.corpus.rows import NO_TARGET, RowPlan, best_fit
from ulm.errors import ConfigError

LENGTHS = [1, 2, 3, 14, 15, 16, 17, 31, 32, 33, 100]  # about 16 and its multiples, where cutting may go wrong


@pytest.fixture
def corpus(tmp_path):
    texts = ["".join(chr(97 + (i * 7 + n) % 26) for i in range(n)) for n in LENGTHS]
    return written_corpus(tmp_path, {"train": texts, "val": ["held out"]})


def test_every_token_is_a_target_exactly_once_after_its_own_past(corpus):
    plan = RowPlan.make(corpus, "train", context_tokens=16, seed=1)
    batch = plan.batch(np.arange(plan.num_rows))
    eot, seen = corpus.tokenizer.eot_id, Counter()
    for row in range(plan.num_rows):
        for slot in range(16):
            place = plan.locate(row, slot)
            target = batch.targets_BT[row, slot]
            assert (place is None) == (target == NO_TARGET) == (batch.segments_BT[row, slot] == -1)
            if place is not None:
                document, offset = place
                tokens = [eot, *corpus.document_text(document).encode(), eot]
                assert [batch.inputs_BT[row, slot], target] == tokens[offset : offset + 2]
                seen[place] += 1
    assert seen == {(d, i): 1 for d, n in enumerate(LENGTHS) for i in range(n + 1)}


def test_segments_number_the_documents_of_a_row(corpus):
    plan = RowPlan.make(corpus, "train", context_tokens=64)
    batch = plan.batch(np.arange(plan.num_rows))
    for row, segments in enumerate(batch.segments_BT):
        documents = [place and place[0] for place in (plan.locate(row, slot) for slot in range(64))]
        changes = [a != b for a, b in zip(documents, documents[1:], strict=False)]
        assert (np.diff(segments) != 0).tolist() == changes


def test_num_targets_counts_what_a_batch_holds(corpus):
    plan = RowPlan.make(corpus, "train", context_tokens=16)
    rows = np.arange(plan.num_rows)[::-1]
    assert plan.num_targets(rows).tolist() == (plan.batch(rows).targets_BT != NO_TARGET).sum(1).tolist()
    assert plan.num_targets(rows).sum() == sum(LENGTHS) + len(LENGTHS)


def test_padding_stays_below_three_percent_on_real_documents(tmp_path):
    corpus = written_corpus(tmp_path, {"train": stdlib_docstrings(60)})
    for context_tokens in (128, 256, 512):
        assert 0 <= RowPlan.make(corpus, "train", context_tokens=context_tokens).padding_share < 0.03


def test_a_plan_is_a_function_of_digest_split_documents_context_and_seed(tmp_path):
    corpus = written_corpus(tmp_path, {"train": [f"document {i:02d}" for i in range(30)]})

    def rows(seed=0, documents=None):
        plan = RowPlan.make(corpus, "train", context_tokens=32, seed=seed, documents=documents)
        return plan.batch(np.arange(plan.num_rows)).inputs_BT.tolist()

    assert rows() == rows()
    assert rows(seed=1) != rows(seed=0)
    assert rows(documents=np.arange(30)[::-1]) == rows()
    assert rows(documents=np.arange(29)) != rows()


def test_chosen_documents_are_the_only_ones(corpus):
    chosen = np.array([10, 4, 11])  # 11 is of val
    plan = RowPlan.make(corpus, "train", context_tokens=16, documents=chosen)
    found = {plan.locate(row, slot)[0] for row in range(plan.num_rows) for slot in range(16) if plan.locate(row, slot)}
    assert found == {4, 10}
    assert RowPlan.make(corpus, "val", context_tokens=16, documents=chosen).num_rows == 1
    with pytest.raises(ConfigError, match=r"documents: not a list of distinct rows .* \(0 to 11\)"):
        RowPlan.make(corpus, "train", context_tokens=16, documents=np.array([1, 1]))


def test_rows_never_mix_sources_of_different_weight(tmp_path):
    texts = [f"text number {i}" for i in range(20)]
    corpus = written_corpus(tmp_path, {"train": texts}, sources={"plain": 1.0, "dear": 3.0})
    plan = RowPlan.make(corpus, "train", context_tokens=64)
    sources = corpus.documents["source"].to_pylist()
    for rows, source in zip(plan.classes, ("plain", "dear"), strict=True):
        for row in range(rows.first, rows.first + rows.num_rows):
            placed = {plan.locate(row, slot) for slot in range(64)} - {None}
            assert {sources[document] for document, _ in placed} == {source}
    assert [c.weight for c in plan.classes] == [1.0, 3.0]


def test_an_empty_split_has_no_rows(corpus):
    plan = RowPlan.make(corpus, "test", context_tokens=16)
    assert (plan.num_rows, plan.padding_share) == (0, 0.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60))
def test_packing_equals_best_fit_one_item_at_a_time(sizes):
    descending = np.array(sorted(sizes, reverse=True), np.int64)
    bins, num_bins = best_fit(descending, 30)
    room = [30] * num_bins
    for size, chosen in zip(descending.tolist(), bins.tolist(), strict=True):
        room[chosen] -= size
    expected: list[int] = []
    for size in descending.tolist():
        fitting = [b for b in range(len(expected)) if expected[b] >= size]
        best = min(fitting, key=expected.__getitem__) if fitting else len(expected)
        if best == len(expected):
            expected.append(30)
        expected[best] -= size
    assert min(room, default=0) >= 0
    assert sorted(room) == sorted(expected)


def test_reading_across_a_shard_border_changes_nothing(corpus, tmp_path: Path):
    plan = RowPlan.make(corpus, "train", context_tokens=16)
    before = plan.batch(np.arange(plan.num_rows)).targets_BT
    shard = corpus.folder / "train-00000.bin"
    stored = shard.read_bytes()
    shard.write_bytes(stored[:100])
    (corpus.folder / "train-00001.bin").write_bytes(stored[100:])
    corpus.manifest["shards"]["train"].append("train-00001.bin")
    again = RowPlan.make(type(corpus)(corpus.folder, corpus.manifest), "train", context_tokens=16)
    assert (again.batch(np.arange(again.num_rows)).targets_BT == before).all()
