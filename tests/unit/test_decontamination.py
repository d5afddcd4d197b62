"""Text of evaluation sets is found in documents by 13 words in a row, or by a whole shorter text."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus.stages import Verdict, stages_of
from pipelines.corpus.stages.decontamination import NgramIndex, decontaminate
from ulm import runtime
from ulm.errors import ConfigError
from ulm.recipes.corpus import Clean, Decontamination, EvaluationSet

CORPORA = runtime.variable("ULM_CORPORA")
ITEM = "Fifteen grey geese, flying south, met one old crow who asked: where is your winter house?"
SHORT = "Which crow asked the geese?"


def index_of(root: Path, *sets: dict[str, Any], **fields: Any) -> NgramIndex:
    config = Decontamination.model_validate({"sets": list(sets), **fields})
    return NgramIndex.build(config, near=root, root=root, place="clean.decontamination")


def jsonl_index(root: Path, *records: Any, **fields: Any) -> NgramIndex:
    (root / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return index_of(root, {"path": "items.jsonl"}, **fields)


def found(index: NgramIndex, *texts: str) -> list[str | None]:
    verdicts = decontaminate(texts, index)
    assert [text for text, _ in verdicts] == list(texts)
    return [why and why.removeprefix("decontamination: ") for _, why in verdicts]


def filler(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"w{draw.randrange(10**6)}" for _ in range(number)]


def test_thirteen_words_of_an_item_in_the_middle_of_a_document_are_found_and_twelve_are_not(tmp_path: Path) -> None:
    item = filler(40, seed=1)
    index = jsonl_index(tmp_path, " ".join(item))
    around = filler(500), filler(500, seed=2)
    for start in range(40 - 13 + 1):
        for length, name in ((13, "items"), (12, None)):
            run = item[start : start + length]
            assert found(index, " ".join([*around[0], *run, *around[1]])) == [name]


def test_a_short_text_is_found_whole_and_not_in_part(tmp_path: Path) -> None:
    index = jsonl_index(tmp_path, {"question": SHORT, "answer": "the old one", "long": ITEM})
    assert found(index, f"One. {SHORT} Two.", "Which crow asked the fox?", "the old one") == ["items", None, None]
    assert found(jsonl_index(tmp_path, {"question": SHORT, "long": ITEM}, min_words=6), SHORT) == [None]


def test_case_punctuation_and_white_space_do_not_hide_an_item(tmp_path: Path) -> None:
    index = jsonl_index(tmp_path, ITEM, SHORT)
    changed = ITEM.upper().replace(",", "").replace(" ", "\n\t"), f"“{SHORT[:-1].replace(' ', ' - ')}”"
    assert found(index, *changed) == ["items", "items"]


def test_an_item_is_found_whatever_form_its_characters_have_in_the_set(tmp_path: Path) -> None:
    text = "Müller fährt über die Straße zum Café"
    decomposed, misread = unicodedata.normalize("NFD", text), text.encode().decode("latin-1")
    for item in (text, decomposed, misread, text.replace("fährt", "f\x07ährt"), f"\ud800 {text}"):
        assert found(jsonl_index(tmp_path, item), text) == ["items"]
    config = Decontamination(sets=[EvaluationSet(path="items.jsonl")])
    jsonl_index(tmp_path, decomposed)
    as_it_is = Clean(nfc=False)
    index = NgramIndex.build(config, near=tmp_path, root=tmp_path, place="clean.decontamination", clean=as_it_is)
    assert found(index, text, decomposed) == [None, "items"]


def test_an_item_with_an_address_is_found_before_the_address_is_replaced(tmp_path: Path) -> None:
    item = "Write to alice@example.com or call 202-555-0100 today"
    jsonl_index(tmp_path, item).save(tmp_path / "index")
    clean = Clean.model_validate({"personal_data": True, "decontamination": {"sets": [{"path": "items.jsonl"}]}})
    verdicts: list[Verdict] = [(item, None)]
    for stage in stages_of(clean, tmp_path / "index"):
        verdicts = stage.apply([text for text, _ in verdicts])
        if verdicts[0][1] is not None:
            break
    assert verdicts == [(item, "decontamination: items")]


def test_brackets_in_the_recipes_folder_are_no_glob(tmp_path: Path) -> None:
    folder = tmp_path / "data[1]"
    folder.mkdir()
    (folder / "a.txt").write_text(SHORT)
    (tmp_path / "data1").mkdir()
    (tmp_path / "data1" / "a.txt").write_text(ITEM)
    assert found(index_of(folder, {"path": "*.txt", "name": "a"}), SHORT, ITEM) == ["a", None]


@pytest.mark.parametrize("path", ["~nosuchuser/x", "~nosuchuser/*", "a" * 5_000, "a" * 5_000 + "*", "\0", "\ud800"])
def test_a_path_that_can_be_no_files_is_an_error_of_its_set(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"^clean\.decontamination\.sets\.0\.path: ") as error:
        index_of(tmp_path, {"path": path})
    assert len(str(error.value)) < 600


def test_an_item_that_is_parted_by_the_end_of_a_document_is_not_found(tmp_path: Path) -> None:
    index = jsonl_index(tmp_path, ITEM, SHORT)
    assert found(index, ITEM[:40], ITEM[40:], "Which crow", "asked the geese") == [None] * 4
    assert found(index, "", SHORT, "") == [None, "items", None]


def test_the_first_set_of_the_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "test.txt").write_text(f"{SHORT}\n{ITEM}\n")
    (tmp_path / "other.txt").write_text(f"{SHORT}\n")
    birds, other = {"path": "birds/test.txt"}, {"path": "other.txt", "name": "mine"}
    assert found(index_of(tmp_path, birds, other), SHORT, f"{ITEM} {SHORT}") == ["birds", "birds"]
    assert found(index_of(tmp_path, other, birds), SHORT, ITEM, f"{ITEM} {SHORT}") == ["mine", "birds", "mine"]


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    path.write_text("\n\n".join(json.dumps({"id": 1, "deep": [{"options": [text]}]}) for text in texts))


def write_parquet(path: Path, texts: Sequence[str]) -> None:
    pq.write_table(pa.table({"id": [1] * len(texts), "deep": [{"options": [text]} for text in texts]}), path)


def write_rows(path: Path, texts: Sequence[str]) -> None:
    comma = "," if path.suffix == ".csv" else "\t"
    path.write_text("\n".join(f'1{comma}"{text}"' for text in texts), encoding="utf-8-sig")


def write_lines(path: Path, texts: Sequence[str]) -> None:
    path.write_text("\n".join(texts))


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".jsonl", write_jsonl),
        (".parquet", write_parquet),
        (".csv", write_rows),
        (".tsv", write_rows),
        (".txt", write_lines),
    ],
)
def test_every_string_of_every_kind_of_file_counts(
    tmp_path: Path, suffix: str, write: Callable[[Path, Sequence[str]], None]
) -> None:
    (tmp_path / "sets").mkdir()
    write(tmp_path / "sets" / f"a{suffix}", [ITEM, SHORT])
    write(tmp_path / "sets" / f"b{suffix}", ["one two three four five"])
    texts = ITEM, SHORT, "One, two, three, four, five."
    assert found(index_of(tmp_path, {"path": "sets"}), *texts) == ["sets"] * 3
    assert found(index_of(tmp_path, {"path": f"sets/*{suffix}"}), *texts) == ["sets"] * 3
    assert found(index_of(tmp_path, {"path": f"sets/a{suffix}"}), *texts) == ["a", "a", None]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_only_the_named_fields_count(tmp_path: Path, suffix: str) -> None:
    if suffix == ".csv":
        (tmp_path / "set.csv").write_text(f'question,answer\n{SHORT},"{ITEM}"\n')
    else:
        (tmp_path / "set.jsonl").write_text(json.dumps({"question": SHORT, "answer": ITEM}))
    index = index_of(tmp_path, {"path": f"set{suffix}", "fields": ["answer"]})
    assert found(index, SHORT, ITEM) == [None, "set"]


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        (None, "", None, "sets.0.path: no file at 'set.*'"),
        ("set.jsonl", "", None, "sets.0.path: no text of 5 words in set.*"),
        ("set.jsonl", '["too short", {"a": 1}]', None, "sets.0.path: no text of 5 words in set.*"),
        ("set.doc", "x", None, "set.doc is of no kind that is read (name others, or a glob; kinds: .jsonl, "),
        ("set.jsonl", "{}\n{", None, "set.jsonl cannot be read: line 2: "),
        ("set.jsonl", "[" * 50_000, None, "set.jsonl cannot be read: "),
        ("set.txt", b"\xff", None, "set.txt cannot be read: "),
        ("set.parquet", "no", None, "set.parquet cannot be read: "),
        ("set.jsonl", '{"question": 1}', ["questions"], "no record has a field 'questions' (did you mean 'question'?)"),
        ("set.txt", "one two three four five", ["text"], "sets.0.fields: no record has a field 'text'"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_looked_for_is_an_error_that_names_it(
    tmp_path: Path, name: str | None, content: str | bytes, fields: list[str] | None, message: str
) -> None:
    if name is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        index_of(tmp_path, {"path": "set.*", "fields": fields})
    assert str(error.value).startswith("clean.decontamination.sets.0.")
    assert message in str(error.value)


def test_the_bounds_of_short_texts_must_not_cross(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="min_words is above ngram_words"):
        jsonl_index(tmp_path, ITEM, ngram_words=8, min_words=9)


def test_a_stored_index_is_mapped_and_gives_the_same_verdicts(tmp_path: Path) -> None:
    index = jsonl_index(tmp_path, ITEM, SHORT)
    index.save(tmp_path / "index")
    stored = NgramIndex.open(tmp_path / "index")
    assert isinstance(stored.hash_H, np.memmap)
    assert stored.digest == index.digest
    assert found(stored, ITEM, SHORT, "something else") == ["items", "items", None]


def test_the_digest_is_of_what_the_sets_hold_and_not_of_their_order(tmp_path: Path) -> None:
    digest = jsonl_index(tmp_path, ITEM, SHORT).digest
    assert jsonl_index(tmp_path, {"b": SHORT.upper()}, ITEM, ITEM).digest == digest
    assert jsonl_index(tmp_path, ITEM).digest != digest
    assert jsonl_index(tmp_path, ITEM, SHORT, ngram_words=12).digest != digest


few_words = st.lists(st.sampled_from("abcd"), max_size=12)


@given(
    st.lists(few_words, min_size=1, max_size=5), st.lists(few_words, max_size=5), st.integers(2, 5), st.integers(1, 2)
)
def test_verdicts_are_those_of_the_slow_way(
    tmp_path_factory: pytest.TempPathFactory, items: list[list[str]], texts: list[list[str]], n: int, min_words: int
) -> None:
    root = tmp_path_factory.getbasetemp()
    items.append(["z"] * 9)  # that there is something to look for
    index = jsonl_index(root, [" ".join(item) for item in items], ngram_words=n, min_words=min_words)
    entries = {
        tuple(item[i : i + n]) for item in items for i in range(max(1, len(item) - n + 1)) if len(item) >= min_words
    }
    slow = [any(tuple(t[i:j]) in entries for i in range(len(t)) for j in range(i + 1, len(t) + 1)) for t in texts]
    assert [name is not None for name in found(index, *map(" ".join, texts))] == slow


@pytest.mark.skipif(CORPORA is None, reason="ULM_CORPORA is not set")
def test_every_planted_item_of_blimp_and_lambada_is_found_and_no_clean_document_is_dropped(tmp_path: Path) -> None:
    corpora = Path(CORPORA or "")
    sets = [
        {"path": str(corpora / "eval" / "blimp" / "*.jsonl")},
        {"path": str(corpora / "eval/lambada_openai/test.jsonl")},
    ]
    index = index_of(tmp_path, *sets)
    lines = (corpora / "dirty" / "leakage" / "train_with_eval_inside.jsonl").read_text().splitlines()
    planted = [json.loads(line) for line in lines]
    names = {"blimp": "blimp", "lambada": "lambada_openai", "clean": None}
    expected = [names[document["id"].rstrip("0123456789")] for document in planted]
    assert found(index, *(document["text"] for document in planted)) == expected
    assert (expected.count("blimp"), expected.count("lambada_openai")) == (30, 30)
