"""What a build makes of documents: duplicates, splits, versions; each loss counted with its reason; kills survived."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus import assemble, steps, work
from pipelines.corpus.dedup import content_key, groups_of, keepers
from pipelines.corpus.estimate import plan
from pipelines.corpus.over import Item, Over, Task, one_by_one
from pipelines.corpus.split import assign
from tests.plain_build import corpus_recipe, plain_build, texts_of
from tests.written_corpus import stdlib_docstrings
from ulm import runtime
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError, CorpusError
from ulm.recipes.base import validate
from ulm.recipes.corpus import ExtendRecipe, Split

CORPORA = runtime.variable("ULM_CORPORA")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """An empty folder for a source."""
    place = tmp_path / "texts"
    place.mkdir()
    return place


def test_a_document_over_the_bound_is_cut_at_characters_and_counted(texts: Path, root: Path) -> None:
    (texts / "a.txt").write_text("äöü" * 400, encoding="utf-8")
    (texts / "b.txt").write_text("short", encoding="utf-8")
    corpus = plain_build(root, {"path": str(texts)}, clean={"max_document_bytes": 1_000})
    assert "".join(texts_of(corpus)) == "äöü" * 400 + "short"
    assert corpus.documents["num_bytes"].to_pylist() == [1000, 1000, 400, 5]
    assert corpus.manifest["cut"] == {"documents": 1, "pieces_added": 2}
    assert corpus.manifest["documents"] == {"in": 4, "kept": 4, "dropped": {}}
    assert len(set(corpus.documents.slice(0, 3)["split"].to_pylist())) == 1  # pieces never part


def test_duplicates_are_blind_to_case_and_space_and_the_first_stays(texts: Path, root: Path) -> None:
    (texts / "a.txt").write_text("The same  TEXT.\n")
    (texts / "b.txt").write_text("the\nsame text.")
    (texts / "c.txt").write_text("the same text again")
    corpus = plain_build(root, {"path": str(texts)})
    assert texts_of(corpus) == ["The same  TEXT.\n", "the same text again"]
    assert corpus.manifest["documents"] == {"in": 3, "kept": 2, "dropped": {"duplicate_exact": 1}}
    assert corpus.manifest["dropped"] == [{"source": "texts", "path": "b.txt", "reason": "duplicate_exact"}]
    kept_all = plain_build(root, {"path": str(texts)}, clean={"duplicate_exact": False, "duplicate_near": False})
    assert kept_all.documents.num_rows == 3


def test_the_same_text_twice_has_two_ids_where_duplicates_are_kept(texts: Path, root: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (texts / name).write_text("same")
    ids = plain_build(root, {"path": str(texts)}, clean={"duplicate_exact": False, "duplicate_near": False}).documents[
        "id"
    ]
    assert ids[1].as_py() == f"{ids[0]}-2"


def test_of_equal_keys_the_first_stays_but_held_out_text_before_it() -> None:
    keys = np.frombuffer(b"b" + bytes(15) + b"a" * 16 + b"b" + bytes(15) + bytes(16), dtype="S16")
    assert keepers(groups_of(keys), np.zeros(4, np.int8)).tolist() == [0, 1, 0, 3]
    assert keepers(groups_of(keys), np.array([1, 0, 0, 0], np.int8)).tolist() == [2, 1, 2, 3]


def test_a_text_in_train_and_test_stays_in_test(texts: Path, root: Path) -> None:
    """Whatever is held out must not be trained on; which file comes first does not matter."""
    same = prose(1)
    for name, rows in {"train": [same, near(same), "only in train"], "test": [same], "val": ["only in val"]}.items():
        (texts / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    corpus = plain_build(root, {"path": str(texts)})
    found = dict(zip(texts_of(corpus), corpus.documents["split"].to_pylist(), strict=True))
    assert found == {same: "test", "only in train": "train", "only in val": "val"}
    assert corpus.manifest["documents"]["dropped"] == {"duplicate_exact": 1, "duplicate_near": 1}


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


def test_every_unusable_input_is_dropped_with_its_name_and_reason_and_the_good_is_kept(texts: Path, root: Path) -> None:
    dirty_folder(texts)
    corpus = plain_build(root, {"path": str(texts)})
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
        ("read", 21, 7), ("encoding", 7, 7), ("characters", 7, 5), ("duplicate_exact", 5, 5), ("duplicate_near", 5, 5),
    ]  # fmt: skip


def test_what_is_said_when_nothing_is_left_names_reasons_and_files(texts: Path, root: Path) -> None:
    (texts / "a.txt").write_bytes(b"")
    (texts / "b.png").write_bytes(b"x")
    with pytest.raises(CorpusError) as error:
        plain_build(root, {"path": str(texts)})
    said = "no document is left of the sources: empty 1, not read 1, a.txt (empty), b.png (unknown_format)"
    assert str(error.value) == said
    assert list((root / "corpora").iterdir()) == []


def many_files(texts: Path) -> None:
    """Several parts: a part takes a thousand files."""
    for number in range(2_500):
        (texts / f"{number:04d}.txt").write_text(f"Document {number} says {number * 7919} and nothing else of note.")


class Killed(BaseException):
    """What a kill is to the process that it ends: nothing of ours catches it."""


def killed_after(count: int) -> Over:
    """An `Over` in which so many tasks are done before the process dies."""
    left = [count]

    def over(task: Task, items: list[Item]) -> Any:
        for item in items:
            if not left[0]:
                raise Killed
            left[0] -= 1
            yield task(item)

    return over


def test_a_build_killed_after_any_task_goes_on_and_ends_with_the_same_digest(
    texts: Path, root: Path, tmp_path: Path
) -> None:
    many_files(texts)
    recipe = corpus_recipe({"path": str(texts)}, tokenizer={"kind": "bpe", "vocab_size": 300})
    whole = assemble.build(recipe, root=tmp_path / "whole")
    for count in (0, 1, 2, 4, 10, 5):
        with pytest.raises(Killed):
            assemble.build(recipe, root=root, over=killed_after(count))
        with pytest.raises(ConfigError, match="no corpus 'c'"):
            Corpus.open("c", root=root)
    done: list[str] = []

    def counted(task: Task, items: list[Item]) -> Any:
        done.extend(task.__name__ for _ in items)
        return one_by_one(task, items)

    corpus = assemble.build(recipe, root=root, over=counted)
    assert corpus.digest == whole.digest
    assert len(done) < 5  # the last tries got nearly to the end, and nothing of theirs is done twice
    assert [p.name for p in (root / "corpora").iterdir() if p.name != "names"] == [corpus.digest]


def test_two_builds_of_one_corpus_at_once_are_refused(texts: Path, root: Path) -> None:
    (texts / "a.txt").write_text("some text")
    recipe = corpus_recipe({"path": str(texts)})
    made = steps.Build(recipe, root=root, near=None, over=one_by_one, progress=None)
    with work.unfinished(root, "c", made.identity()), pytest.raises(CorpusError, match="another process builds this"):
        assemble.build(recipe, root=root)
    assert assemble.build(recipe, root=root).documents.num_rows == 1


def test_an_unfinished_build_of_changed_sources_is_removed_by_the_next_of_that_name(texts: Path, root: Path) -> None:
    many_files(texts)
    recipe = corpus_recipe({"path": str(texts)})
    with pytest.raises(Killed):
        assemble.build(recipe, root=root, over=killed_after(2))
    (texts / "0000.txt").write_text("changed since")
    with pytest.raises(Killed):
        assemble.build(recipe, root=root, over=killed_after(1))
    assert len(list((root / "corpora").glob("build.*"))) == 1


def test_a_full_disk_is_named_and_what_is_done_stays(texts: Path, root: Path) -> None:
    """/dev/full is a disk that is always full."""
    many_files(texts)
    recipe = corpus_recipe({"path": str(texts)})

    def full(task: Task, items: list[Item]) -> Any:
        yield task(items[0])

        def write(item: Item) -> Item:
            with open("/dev/full", "w") as file:
                file.write("x")
            return item

        yield steps._said(write)(items[1])

    with pytest.raises(CorpusError, match=r"No space left on device; what is done stays"):
        assemble.build(recipe, root=root, over=full)
    assert len(list((root / "corpora").glob("build.*/parts/*"))) == 1


def test_a_source_that_is_gone_when_it_is_read_is_named(texts: Path, root: Path) -> None:
    (texts / "a.txt").write_text("some text")
    (texts / "b.txt").write_text("other text")
    recipe = corpus_recipe({"path": str(texts)})

    def vanish(names: list[str]) -> Over:
        def over(task: Task, items: list[Item]) -> Any:
            for name in names:
                (texts / name).unlink()
            return one_by_one(task, items)

        return over

    with pytest.raises(CorpusError, match="source texts: none of its files can be read any more"):
        assemble.build(recipe, root=root, over=vanish(["a.txt", "b.txt"]))


def test_one_file_that_is_gone_when_it_is_read_leaves_the_rest(texts: Path, root: Path) -> None:
    (texts / "a.txt").write_text("some text")
    (texts / "b.txt").symlink_to(texts / "nowhere")
    corpus = plain_build(root, {"path": str(texts)})
    assert texts_of(corpus) == ["some text"]
    assert [row["path"] for row in corpus.manifest["dropped"]] == ["b.txt"]
    assert corpus.manifest["dropped"][0]["reason"].startswith("unreadable: No such file")


def prose(seed: int, num_words: int = 60) -> str:
    """A text like no other: words drawn by seed."""
    draw = random.Random(seed)
    words = ["river", "stone", "light", "engine", "garden", "paper", "winter", "signal", "harbour", "copper"]
    return " ".join(f"{draw.choice(words)}{draw.randrange(100)}" for _ in range(num_words))


def near(text: str) -> str:
    """The text with its last word changed."""
    return text.rsplit(" ", 1)[0] + " otherwise"


def test_near_duplicates_are_dropped_counted_shown_and_the_first_stays(texts: Path, root: Path) -> None:
    originals = [prose(n) for n in range(30)]
    lines = [*originals, *map(near, originals[:10]), near(near(originals[0])) + " again"]
    (texts / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    corpus = plain_build(root, {"path": str(texts)})
    assert texts_of(corpus) == originals
    assert corpus.manifest["documents"]["dropped"] == {"duplicate_near": 11}
    found = corpus.manifest["near_duplicates"]
    assert (found["clusters"], found["documents"], found["dropped"]) == (10, 21, 11)
    assert found["sizes"] == {"2": 9, "3": 1}
    assert found["largest"][0] == {
        "documents": 3, "text": originals[0][:500], "paths": ["rows.jsonl:1", "rows.jsonl:31", "rows.jsonl:41"],
    }  # fmt: skip
    assert corpus.manifest["samples"]["duplicate_near"][0] == {
        "source": "texts", "path": "rows.jsonl", "text": near(originals[0])[:500],
    }  # fmt: skip
    off = plain_build(root, {"path": str(texts)}, clean={"duplicate_near": False})
    assert off.documents.num_rows == 41
    assert off.manifest["near_duplicates"] is None


def test_near_duplicates_that_stay_never_part(texts: Path, root: Path) -> None:
    originals = [prose(n) for n in range(200)]
    lines = [*originals, *map(near, originals)]
    (texts / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    shares = {"split": {"val": 0.2, "test": 0.2}}
    kept = plain_build(root, {"path": str(texts)}, clean={"duplicate_near": {"drop": False}}, **shares)
    assert kept.documents.num_rows == 400
    split = kept.documents["split"].to_pylist()
    assert split[:200] == split[200:]
    assert len(set(split)) == 3
    free = plain_build(root, {"path": str(texts)}, clean={"duplicate_near": False}, **shares)
    split = free.documents["split"].to_pylist()
    assert split[:200] != split[200:]  # without it they do part


def test_a_near_duplicate_of_a_held_out_file_never_stays_in_train(texts: Path, root: Path) -> None:
    originals = [prose(n) for n in range(20)]
    for name, found in {"test": originals, "train": [*map(near, originals), prose(99)]}.items():
        (texts / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in found))
    corpus = plain_build(root, {"path": str(texts)}, clean={"duplicate_near": {"drop": False}})
    assert sorted(corpus.documents["split"].to_pylist()) == ["test"] * 20 + ["train"]


def test_a_document_that_a_recipe_excludes_is_not_in_the_corpus(texts: Path, root: Path) -> None:
    (texts / "rows.jsonl").write_text("".join(json.dumps({"text": prose(n)}) + "\n" for n in range(10)))
    whole = plain_build(root, {"path": str(texts)})
    gone = whole.documents["id"][3].as_py()
    for given in (gone, gone[:8], f"{gone}-2"):
        less = plain_build(root, {"path": str(texts)}, exclude=[given])
        assert texts_of(less) == [text for n, text in enumerate(texts_of(whole)) if n != 3]
        assert less.manifest["documents"]["dropped"] == {"excluded": 1}
        assert less.digest != whole.digest
    with pytest.raises(ConfigError, match="exclude.1: no document of these sources has the id 'ffff0000'"):
        plain_build(root, {"path": str(texts)}, exclude=[gone, "ffff0000"])


def test_what_a_corpus_excludes_does_not_come_back_when_it_is_extended(texts: Path, root: Path) -> None:
    (texts / "rows.jsonl").write_text("".join(json.dumps({"text": prose(n)}) + "\n" for n in range(10)))
    gone = plain_build(root, {"path": str(texts)}).documents["id"][3].as_py()
    base = plain_build(root, {"path": str(texts)}, exclude=[gone])
    (texts / "more.jsonl").write_text(json.dumps({"text": prose(77)}) + "\n")
    corpus = extended(root, base.digest, {"path": str(texts)})
    assert texts_of(corpus)[-1] == prose(77)
    assert corpus.documents.num_rows == 10
    assert gone not in corpus.documents["id"].to_pylist()
    (texts / "last.jsonl").write_text(json.dumps({"text": prose(78)}) + "\n")
    again = extended(root, corpus.digest, {"path": str(texts)})  # nor when that one is extended
    assert (texts_of(again)[-1], again.documents.num_rows) == (prose(78), 11)
    held = base.documents["id"][0].as_py()
    with pytest.raises(ConfigError, match=f"exclude.0: {held} is in the corpus that is extended"):
        extended(root, base.digest, {"path": str(texts)}, exclude=[held])


def test_copies_that_stay_keep_distinct_ids_when_a_corpus_is_extended(texts: Path, root: Path, tmp_path: Path) -> None:
    off = {"clean": {"duplicate_exact": False, "duplicate_near": False}}
    for name in ("a.txt", "b.txt"):
        (texts / name).write_text("same")
    base = plain_build(root, {"path": str(texts)}, **off)
    corpus = extended(root, base.digest, {"path": str(texts)})
    first = base.documents["id"][0].as_py()
    assert corpus.documents["id"].to_pylist() == [first, f"{first}-2", f"{first}-3", f"{first}-4"]


def test_a_file_that_could_not_be_read_is_tried_again(texts: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.corpus.reading import places, streams

    (texts / "a.txt").write_text("some text")
    (texts / "b.txt").write_text("other text")

    def refused(file: str) -> Any:
        if file.endswith("b.txt"):
            raise PermissionError(13, "Permission denied")
        return places.open_file(file)

    recipe = corpus_recipe({"path": str(texts)})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(streams, "open_file", refused)
        assemble.build(recipe, root=root, over=killed_after(1))
    assert texts_of(assemble.build(recipe, root=root)) == ["some text", "other text"]


def test_near_duplicates_that_stay_do_not_tie_splits_by_the_pieces_of_a_document(texts: Path, root: Path) -> None:
    one, two = prose(1, 300), prose(2, 300)
    (texts / "test.txt").write_text(near(one))
    (texts / "val.txt").write_text(near(two))
    (texts / "cut.txt").write_text(one.ljust(3_000)[:3_000] + two)
    (texts / "free.txt").write_text(prose(3))
    clean = {"duplicate_near": {"drop": False, "threshold": 0.5}, "max_document_bytes": 3_000}
    corpus = plain_build(root, {"path": str(texts)}, clean=clean)
    found = dict(zip(corpus.documents["path"].to_pylist(), corpus.documents["split"].to_pylist(), strict=True))
    assert found == {"test.txt": "test", "val.txt": "val", "free.txt": "train"}
    assert corpus.manifest["documents"]["dropped"] == {"duplicate_near": 2}


def test_a_document_that_ties_two_splits_of_an_extended_corpus_is_dropped(
    texts: Path, root: Path, tmp_path: Path
) -> None:
    words = [f"word{n}" for n in range(140)]
    for name, part in (("train", words[:100]), ("test", words[40:])):
        (texts / f"{name}.txt").write_text(" ".join(part))
    clean = {"duplicate_near": {"drop": False, "threshold": 0.6}}
    base = plain_build(root, {"path": str(texts)}, clean=clean)
    assert base.documents["split"].to_pylist() == ["test", "train"]
    more = tmp_path / "more"
    more.mkdir()
    (more / "bridge.txt").write_text(" ".join(words[20:120]))
    (more / "other.txt").write_text(prose(5))
    corpus = extended(root, base.digest, {"path": str(more)})
    assert corpus.documents["path"].to_pylist() == ["test.txt", "train.txt", "other.txt"]


def test_a_piece_is_never_taken_for_one_of_the_file_before(texts: Path, root: Path) -> None:
    (texts / "a").mkdir()
    (texts / "a" / "test.txt").write_text("held out")
    (texts / "b.txt").write_bytes(b"\xff" + "".join(f"line {n} of b\n" for n in range(400)).encode())
    corpus = plain_build(root, {"path": str(texts)}, clean={"max_document_bytes": 1_000})
    rows = corpus.documents.to_pylist()
    assert {row["split"] for row in rows if row["path"] == "b.txt"} == {"train"}
    assert len(rows) > 4


def test_a_file_whose_name_is_no_unicode_is_read(texts: Path, root: Path) -> None:
    (texts / os.fsdecode(b"x\xfe.txt")).write_text("some text")
    corpus = plain_build(root, {"path": str(texts)})
    assert texts_of(corpus) == ["some text"]
    assert corpus.documents["path"].to_pylist() == ["x\\xfe.txt"]


def test_a_build_that_ends_while_it_clusters_goes_on_with_the_clustering(texts: Path, root: Path) -> None:
    rows = [{"text": prose(n)} for n in range(40)]
    (texts / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = corpus_recipe({"path": str(texts)}, clustering={"clusters": 2})
    plain = assemble.build(recipe, root=root)

    def dies(stage: str, done: int, total: int | None, note: str) -> None:
        if "cluster" in stage:
            raise Killed

    other = root / "other"
    with pytest.raises(Killed):
        assemble.build(recipe, root=other, progress=dies)
    assert len(list((other / "corpora").glob("build.*/parts/*"))) == 1
    again = assemble.build(recipe, root=other)
    assert again.digest == plain.digest
    assert [p.name for p in (again.folder / "domains").iterdir()] == [
        p.name for p in (plain.folder / "domains").iterdir()
    ]
    assert "clusterings" in json.loads((again.folder / "report.json").read_text())


def test_an_extension_takes_over_evaluation_sets_or_says_that_they_changed(
    texts: Path, root: Path, tmp_path: Path
) -> None:
    (texts / "rows.jsonl").write_text("".join(json.dumps({"text": prose(n)}) + "\n" for n in range(10)))
    (tmp_path / "eval.txt").write_text(prose(99)[:150])
    clean = {"decontamination": {"sets": [{"path": "eval.txt", "name": "planted"}]}}
    recipe = corpus_recipe({"path": "texts"}, clean=clean)
    base = assemble.build(recipe, root=root, near=tmp_path)
    more = tmp_path / "elsewhere"
    more.mkdir()
    (more / "rows.jsonl").write_text("".join(json.dumps({"text": prose(n)}) + "\n" for n in (98, 99)))
    section = {"name": "c", "extends": base.digest, "sources": [{"path": "rows.jsonl"}]}
    corpus = assemble.build(validate(ExtendRecipe, section), root=root, near=more)
    assert texts_of(corpus)[10:] == [prose(98)]
    (tmp_path / "eval.txt").write_text(prose(97)[:150])
    with pytest.raises(ConfigError, match="extends: its evaluation sets are not what they were"):
        assemble.build(validate(ExtendRecipe, section), root=root, near=more)


def test_pairs_are_one_document_of_two_texts(texts: Path, root: Path) -> None:
    pairs = [(f"good day number {n}", f"guten Tag Nummer {n}, schön") for n in range(50)]
    rows = [{"en": a, "de": b} for a, b in pairs] + [{"en": "lonely", "de": ""}, {"en": pairs[0][0], "de": pairs[0][1]}]
    (texts / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(texts), "source": "en", "target": "de"}
    corpus = plain_build(root, source, tokenizer={"kind": "bpe", "vocab_size": 400}, clean={"duplicate_near": False})
    assert [corpus.document_texts(row) for row in range(corpus.documents.num_rows)] == pairs
    assert corpus.manifest["documents"]["dropped"] == {"duplicate_exact": 1, "empty": 1}
    row = corpus.documents.slice(0, 1).to_pylist()[0]
    assert row["num_bytes"] == sum(len(text.encode()) for text in pairs[0])
    assert 0 < row["num_source_tokens"] < row["num_tokens"]


def test_special_tokens_of_a_chat_template_are_ids_and_those_in_messages_stay_text(texts: Path, root: Path) -> None:
    chats = [
        [{"role": "user", "content": f"question {n}?"}, {"role": "assistant", "content": f"answer {n} <|user|> <|"}]
        for n in range(20)
    ]
    (texts / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    section = {"kind": "byte", "special_tokens": ["<|user|>", "<|assistant|>"], "chat_template": template}
    source = {"path": str(texts), "messages": "messages"}
    corpus = plain_build(root, source, tokenizer=section, clean={"duplicate_near": False})
    assert corpus.documents.num_rows == 20
    row = corpus.documents.slice(3, 1).to_pylist()[0]
    tokens = corpus.tokens(row["split"]).read(row["first_token"], row["num_tokens"]).tolist()
    assert tokens == [257, *b"question 3?", 258, *b"answer 3 <|user|> <|"]
    assert tokens == corpus.tokenizer.encode_chat(chats[3], add_generation_prompt=False)
    assert corpus.document_text(3) == "<|user|>question 3?<|assistant|>answer 3 <|user|> <|"
    plain = plain_build(root, source, clean={"duplicate_near": False})
    assert plain.document_text(3) == "User: question 3?\nAssistant: answer 3 <|user|> <|\n"


def test_a_char_corpus_knows_every_character_of_its_documents(texts: Path, root: Path) -> None:
    found = [prose(n) + chr(0x100 + n) for n in range(60)]
    (texts / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in found))
    corpus = plain_build(root, {"path": str(texts)}, tokenizer={"kind": "char"})
    assert texts_of(corpus) == found
    (texts / "more.txt").write_text("a character that is new: \u4e2d")
    again = plain_build(root, {"path": str(texts)}, tokenizer=corpus.tokenizer.digest)
    assert texts_of(again) == found
    assert again.manifest["documents"]["dropped"] == {"unknown_character": 1}


def extended(root: Path, base: str, *sources: dict[str, Any], **fields: Any) -> Corpus:
    recipe = validate(ExtendRecipe, {"name": "c", "extends": base, "sources": list(sources), **fields})
    return assemble.build(recipe, root=root)


def test_an_extended_corpus_keeps_its_shards_and_takes_what_is_new(texts: Path, root: Path, tmp_path: Path) -> None:
    docs = [t for t in stdlib_docstrings(30) if len(t.split()) > 8][:300]
    (texts / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in docs[:200]))
    base = plain_build(root, {"path": str(texts), "domain": "docs"}, tokenizer={"kind": "bpe", "vocab_size": 400})
    more = tmp_path / "more"
    more.mkdir()
    new = [*(prose(n) for n in range(40)), docs[0], docs[1].upper(), near(texts_of(base)[-1] + " " + prose(1))]
    (more / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in new))
    corpus = extended(root, base.digest[:12], {"path": str(more), "domain": "prose"})
    assert corpus.tokenizer.digest == base.tokenizer.digest
    num_base = base.documents.num_rows
    assert corpus.documents.slice(0, num_base).equals(base.documents)
    assert texts_of(corpus)[: num_base + 40] == [*texts_of(base), *new[:40]]
    assert corpus.manifest["documents"]["dropped"]["duplicate_exact"] == 2
    assert corpus.manifest["base"] == {"digest": base.digest, "name": "c", "documents": num_base}
    for split, names in base.manifest["shards"].items():
        assert corpus.manifest["shards"][split][: len(names)] == names
        assert all((corpus.folder / name).samefile(base.folder / name) for name in names)
    assert Corpus.open("c", root=root).digest == corpus.digest
    Corpus.open(base.digest, root=root)  # the version before stands, every byte of it
    with pytest.raises(CorpusError, match="no document is left of the sources: duplicate_exact 43"):
        extended(root, corpus.digest, {"path": str(more)})  # nothing is new


def test_a_new_near_duplicate_of_an_extended_corpus_is_dropped(texts: Path, root: Path, tmp_path: Path) -> None:
    (texts / "rows.jsonl").write_text("".join(json.dumps({"text": prose(n)}) + "\n" for n in range(40)))
    base = plain_build(root, {"path": str(texts)})
    more = tmp_path / "more"
    more.mkdir()
    (more / "rows.jsonl").write_text("".join(json.dumps({"text": near(prose(n))}) + "\n" for n in range(30, 50)))
    corpus = extended(root, base.digest, {"path": str(more)})
    assert corpus.documents.num_rows == 50
    assert corpus.manifest["documents"] == {"in": 60, "kept": 50, "dropped": {"duplicate_near": 10}}


def test_a_corpus_of_all_stages_is_what_its_manifest_says(texts: Path, root: Path) -> None:
    """Every setting comes back from the manifest as it went into the digest."""
    docs = [text for text in stdlib_docstrings(40) if len(text.split()) > 60]
    (texts / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in docs))
    (texts / "eval.txt").write_text(" ".join(docs[0].split()[20:40]))
    stages = ("gopher_quality", "gopher_repetition", "c4_quality", "fineweb_quality", "personal_data")
    clean = {
        "language": {"keep": ["en"], "min_confidence": 0.1},
        **dict.fromkeys(stages, True),
        "c4_quality": {"min_sentences": 0, "terminal_punctuation": False, "curly_bracket": False},
        "fineweb_quality": {"min_punctuated_lines": 0, "max_short_lines": 1, "max_newline_word_ratio": 1},
        "decontamination": {"sets": [{"path": str(texts / "eval.txt"), "name": "planted"}]},
    }
    corpus = plain_build(root, {"path": str(texts / "rows.jsonl")}, clean=clean)
    again = Corpus.open("c", root=root)
    assert again.manifest["clean"]["gopher_repetition"]["max_top_ngram_chars"]["2"] == 0.2
    assert again.manifest["documents"]["dropped"]["decontamination: planted"] == 1
    assert again.manifest["samples"]["decontamination: planted"][0]["text"][:30] == docs[0][:30]
    assert 5 < corpus.documents.num_rows < len(docs)
    names = [stage["stage"] for stage in again.manifest["stages"]]
    assert names == ["read", "encoding", "characters", "language", *stages[:-1], "decontamination", "personal_data",
                     "duplicate_exact", "duplicate_near"]  # fmt: skip
    outs = [stage["out"] for stage in again.manifest["stages"]]
    assert [stage["in"] for stage in again.manifest["stages"]][1:] == outs[:-1]
    assert outs[-1] == again.documents.num_rows


def test_a_plan_says_what_a_build_takes_and_leaves_nothing(texts: Path, root: Path) -> None:
    docs = [f"{prose(n)} {text}" for n, text in enumerate(stdlib_docstrings(60))]
    (texts / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in docs))
    recipe = corpus_recipe({"path": str(texts)}, tokenizer={"kind": "bpe", "vocab_size": 500})
    told = plan(recipe, root=root)
    assert not (root / "corpora").exists()
    corpus = assemble.build(recipe, root=root)
    tokens = sum(corpus.num_tokens(split) for split in corpus.splits)
    assert told["files"] == 1
    assert told["documents"] == pytest.approx(corpus.documents.num_rows, rel=0.1)
    assert told["tokens"] == pytest.approx(tokens, rel=0.15)  # its tokenizer sees less text
    assert told["seconds"] > 0
    assert told["disk_bytes"] > 2 * tokens


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
        assert len(texts) == 60  # 120 documents, 80 case- and space-blind, 60 without near copies
