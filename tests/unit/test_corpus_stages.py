"""What cleaning, duplicates and splits do to documents, and that each loss is counted with its reason."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus.clean import clean_text, cut
from pipelines.corpus.dedup import content_key, is_first
from pipelines.corpus.documents import judge, read_documents
from pipelines.corpus.job import nothing_left
from pipelines.corpus.sources import list_sources
from pipelines.corpus.split import assign
from tests.plain_build import corpus_recipe, plain_build, texts_of
from ulm import runtime
from ulm.recipes.corpus import Clean, Split

CORPORA = runtime.variable("ULM_CORPORA")


@pytest.mark.parametrize(
    ("given_text", "cleaned"),
    [
        ("a\r\nb\rc\n", "a\nb\nc\n"),
        ("tab\tbell\x07nul\x00", "tab\tbellnul"),
        ("é\x85\x9f\x1b[0m", "é[0m"),
        ("e\u0301", "é"),
        ("a<|endoftext|>b", "a<|endoftext|>b"),
    ],
)
def test_cleaning_unifies_line_ends_and_characters(given_text: str, cleaned: str) -> None:
    assert clean_text(given_text, Clean()) == (cleaned, None)


def test_cleaning_stages_can_be_left_out() -> None:
    assert clean_text("e\u0301\x07", Clean(nfc=False, control=False)) == ("e\u0301\x07", None)


@given(st.text())
def test_clean_text_stays_as_it_is(text: str) -> None:
    once, reason = clean_text(text, Clean())
    assert clean_text(once, Clean()) == (once, reason)
    assert unicodedata.is_normalized("NFC", once)


@given(st.text(min_size=1), st.integers(1, 9))
def test_pieces_of_a_long_document_lose_nothing(text: str, max_bytes: int) -> None:
    pieces = list(cut(text, max_bytes))
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= max_bytes or len(piece) == 1 for piece in pieces)


def test_a_document_over_the_bound_is_cut_at_characters_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("äöü" * 100, encoding="utf-8")
    (tmp_path / "b.txt").write_text("short", encoding="utf-8")
    corpus = plain_build(tmp_path / "root", {"path": str(tmp_path)}, clean={"max_document_bytes": 255})
    assert "".join(texts_of(corpus)) == "äöü" * 100 + "short"
    assert corpus.documents["num_bytes"].to_pylist() == [254, 254, 92, 5]
    assert corpus.manifest["cut"] == {"documents": 1, "pieces_added": 2}
    assert corpus.manifest["documents"] == {"in": 2, "kept": 4, "dropped": {}}
    assert len(set(corpus.documents.slice(0, 3)["split"].to_pylist())) == 1  # pieces never part


def test_duplicates_are_blind_to_case_and_space_and_the_first_stays(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The same  TEXT.\n")
    (tmp_path / "b.txt").write_text("the\nsame text.")
    (tmp_path / "c.txt").write_text("the same text!")
    corpus = plain_build(tmp_path / "root", {"path": str(tmp_path)})
    assert texts_of(corpus) == ["The same  TEXT.\n", "the same text!"]
    assert corpus.manifest["documents"] == {"in": 3, "kept": 2, "dropped": {"duplicate_exact": 1}}
    assert corpus.manifest["dropped"] == [{"source": tmp_path.name, "path": "b.txt", "reason": "duplicate_exact"}]
    kept_all = plain_build(tmp_path / "root", {"path": str(tmp_path)}, clean={"duplicate_exact": False})
    assert kept_all.documents.num_rows == 3


def test_the_same_text_twice_has_two_ids_where_duplicates_are_kept(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("same")
    ids = plain_build(tmp_path / "root", {"path": str(tmp_path)}, clean={"duplicate_exact": False}).documents["id"]
    assert ids[1].as_py() == f"{ids[0]}-2"


def test_the_first_of_equal_keys_is_marked_even_when_they_end_in_zeros() -> None:
    keys = np.frombuffer(b"b" + bytes(15) + b"a" * 16 + b"b" + bytes(15) + bytes(16), dtype="S16")
    assert is_first(keys).tolist() == [True, True, False, True]


def test_splits_have_their_shares_and_equal_texts_never_part() -> None:
    texts = [f"Document {number}" for number in range(4_000)]
    keys = np.frombuffer(b"".join(map(content_key, texts)), dtype="S16")
    upper = np.frombuffer(b"".join(content_key(t.upper() + " ") for t in texts), dtype="S16")
    own = np.full(len(texts), -1, dtype=np.int8)
    split = assign(keys, own, Split(val=0.1, test=0.2))
    shares = np.bincount(split) / len(texts)
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)  # three standard deviations of 4,000 draws are 0.02
    assert (assign(upper, own, Split(val=0.1, test=0.2)) == split).all()


def test_a_corpus_too_small_for_a_train_document_keeps_all_in_train() -> None:
    keys = np.frombuffer(bytes(16), dtype="S16")  # of share 0: val
    assert assign(keys, np.array([-1], dtype=np.int8), Split()).tolist() == [0]
    assert assign(keys, np.array([2], dtype=np.int8), Split()).tolist() == [2]  # but its own split it keeps


def dirty_folder(folder: Path) -> None:
    good = [f"good row {number}" for number in range(3)]
    (folder / "good.txt").write_text("a good document")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "spaces.txt").write_bytes(b" \n\t\n")
    (folder / "binary.txt").write_bytes(b"\x89PNG\x00\x01")
    (folder / "latin1.txt").write_bytes("café".encode("latin-1"))
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    lines = [{"text": good[0]}, "no json", {"id": 1}, {"text": None}, [], {"text": "\ud800"}, {"text": good[1]}]
    encoded = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "rows.jsonl").write_bytes("\n".join(encoded).encode() + b'\n\xff\n{"text": ' + b"[" * 50_000 + b"\n")
    pq.write_table(pa.table({"text": [good[2], None, "", 100 * "x"]}), folder / "rows.parquet")
    pq.write_table(pa.table({"body": ["x"]}), folder / "wrong.parquet")
    (folder / "torn.parquet").write_bytes((folder / "rows.parquet").read_bytes()[:-30])


def test_every_unusable_input_is_dropped_with_its_name_and_reason_and_the_good_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "dirty"
    source.mkdir()
    dirty_folder(source)
    corpus = plain_build(tmp_path / "root", {"path": str(source)})
    assert texts_of(corpus) == ["a good document", "good row 0", "good row 1", "good row 2", 100 * "x"]
    documents = corpus.manifest["documents"]
    assert documents["dropped"] == {
        "bad_json": 3, "bad_parquet": 1, "binary": 1, "empty": 3, "no_text": 2, "text_not_string": 2,
        "undecodable": 3, "unreadable": 1,
    }  # fmt: skip
    assert documents["in"] == documents["kept"] + sum(documents["dropped"].values())
    reasons = {row["path"]: row["reason"] for row in corpus.manifest["dropped"] if row["path"] != "rows.parquet"}
    assert {path: reason.split(":")[0] for path, reason in reasons.items()} == {
        "empty.txt": "empty", "spaces.txt": "empty", "binary.txt": "binary", "latin1.txt": "undecodable",
        "dangling.txt": "unreadable", "rows.jsonl:2": "bad_json", "rows.jsonl:3": "no_text",
        "rows.jsonl:4": "text_not_string", "rows.jsonl:5": "bad_json", "rows.jsonl:6": "undecodable",
        "rows.jsonl:8": "undecodable", "rows.jsonl:9": "bad_json", "torn.parquet": "bad_parquet",
        "wrong.parquet": "no_text",
    }  # fmt: skip
    assert reasons["wrong.parquet"] == "no_text: no column 'text' among body"
    stages = corpus.manifest["stages"]
    assert [(s["stage"], s["in"], s["out"]) for s in stages] == [
        ("read", 21, 8), ("clean", 8, 5), ("duplicate_exact", 5, 5),
    ]  # fmt: skip


def test_what_is_said_when_nothing_is_left_names_reasons_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"x")
    recipe = corpus_recipe({"path": str(tmp_path)})
    listing = list_sources(recipe.sources, near=None, root=tmp_path)
    rows = pa.concat_tables(read_documents(list(enumerate(listing.units)), recipe.clean))
    judged = judge(rows, listing.units, listing.names, recipe.clean, recipe.split)
    assert nothing_left(listing, judged) == (
        "no document is left of the sources: empty 1, not read 1, a.txt (empty), b.png (unknown_format)"
    )


@pytest.mark.skipif(CORPORA is None, reason="ULM_CORPORA is not set")
class TestSharedDirtyFiles:
    def build(self, root: Path, path: str) -> list[str]:
        return texts_of(plain_build(root, {"path": f"{CORPORA}/dirty/{path}"}))

    def dropped(self, root: Path, path: str) -> dict[str, str]:
        (root / "good").mkdir(parents=True)
        (root / "good" / "good.txt").write_text("so that something is left")
        corpus = plain_build(root, {"path": "good"}, {"path": f"{CORPORA}/dirty/{path}"})
        return {row["path"]: row["reason"].split(":")[0] for row in corpus.manifest["dropped"]}

    def test_mixed_bad_lines_are_dropped_by_number(self, root: Path) -> None:
        found = self.dropped(root, "jsonl/mixed_bad_lines.jsonl")
        number = {int(path.split(":")[1]): reason for path, reason in found.items()}
        good = {26, 30}  # a doubled key and a NUL are valid
        assert {n for n, reason in number.items() if reason != "duplicate_exact"} == set(range(2, 45, 2)) - good
        assert number[28] == "undecodable"

    def test_corrupt_parquet_files_are_dropped_each(self, root: Path) -> None:
        found = self.dropped(root, "parquet_bad")
        assert set(found.values()) <= {"bad_parquet", "no_text"}
        assert len(found) == 8

    def test_a_character_across_a_block_border_is_read(self, root: Path) -> None:
        raw = Path(f"{CORPORA}/dirty/invalid_utf8/cut_in_middle.txt").read_text(encoding="utf-8")
        assert self.build(root, "invalid_utf8/cut_in_middle.txt") == [raw]

    def test_files_that_are_no_utf8_are_dropped(self, root: Path) -> None:
        found = self.dropped(root, "invalid_utf8")
        assert len(found) == 8
        assert set(found.values()) == {"undecodable"}

    def test_special_tokens_in_text_stay_text(self, root: Path) -> None:
        raw = Path(f"{CORPORA}/dirty/unicode/special_token_injection.txt").read_text(encoding="utf-8")
        assert "<|endoftext|>" in raw
        assert self.build(root, "unicode/special_token_injection.txt") == [raw]

    def test_exact_duplicates_of_the_planted_set_are_dropped(self, root: Path) -> None:
        texts = self.build(root, "duplicates/dups.jsonl")
        assert len(texts) == 80  # 120 documents; 80 are left case- and space-blind
