"""Two corpora side by side, a token back to its file, a document on to the models that saw it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from tests.written_corpus import write_corpus
from ulm import artefacts
from ulm.checkpoints.manifest import write_manifest
from ulm.cli.main import app
from ulm.corpus.compare import diff
from ulm.corpus.lineage import document_of_token, find_document, models_that_saw
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError
from ulm.tokenizers.bpe import train_bpe

TEXTS = [("law", "train", "the law of the land"), ("law", "val", "an act"), ("verse", "train", "a rose is a rose")]
FIRST = "law/0"  # ids of written corpora are domain/number


def test_a_corpus_does_not_differ_from_itself(root: Path) -> None:
    corpus = write_corpus(root, TEXTS)
    found = diff(corpus, corpus)
    assert found["same"] and found["settings"] == found["stages"] == []
    assert found["tokenizer"]["same"] and found["tokenizer"]["added"] == 0
    assert found["documents"]["common"] == 3 and not any(found["sources"].values())
    assert all(row["a"] == row["b"] for part in ("splits", "domains", "licences") for row in found[part].values())


def test_what_was_added_removed_and_moved_is_counted(root: Path) -> None:
    a = write_corpus(root, TEXTS, name="a")
    b = write_corpus(root, [TEXTS[0], ("law", "train", "an act"), ("code", "train", "x = 1" * 10)], name="b")
    found = diff(a, b)
    assert found["sources"]["added"] == ["code"] and found["sources"]["removed"] == ["verse"]
    documents = {key: found["documents"][key] for key in ("a", "b", "common", "added", "removed", "moved")}
    assert documents == {"a": 3, "b": 3, "common": 2, "added": 1, "removed": 1, "moved": {"val to train": 1}}
    assert (found["documents"]["added_examples"], found["documents"]["removed_examples"]) == (["code/2"], ["verse/2"])
    assert found["splits"]["val"]["a"]["tokens"] == len("an act") and found["splits"]["val"]["b"]["tokens"] == 0
    shares = [found["domains"]["law"][side]["share"] for side in "ab"]
    assert shares == pytest.approx([25 / 41, 25 / 75])
    assert diff(b, a)["documents"]["added_examples"] == ["verse/2"]


def test_an_id_that_stands_twice_is_two_documents(root: Path) -> None:
    def with_ids(name: str, *ids: str) -> Corpus:
        corpus = write_corpus(root, [("d", "train", text) for text in ids], name=name)
        corpus.documents = corpus.documents.set_column(0, "id", pa.array(ids))
        return corpus

    a, b = with_ids("a", "x", "x-2"), with_ids("b", "x", "x-2", "x-2", "y")
    found = diff(a, b)["documents"]
    assert (found["common"], found["added"], found["added_examples"]) == (2, 2, ["x-2", "y"])
    found = diff(b, a)["documents"]
    assert (found["common"], found["removed"], found["removed_examples"]) == (2, 2, ["x-2", "y"])


def test_vocabularies_are_compared_by_their_tokens(root: Path) -> None:
    both = [("d", "train", "aaaa bbbb cccc")]
    a = write_corpus(root, both, train_bpe(["aaaa bbbb"] * 9, 260), name="a")
    b = write_corpus(root, both, train_bpe(["aaaa cccc"] * 9, 260), name="b")
    found = diff(a, b)["tokenizer"]
    vocabularies = [set(corpus.tokenizer.inner.get_vocab()) for corpus in (a, b)]
    assert not found["same"] and found["common"] == len(vocabularies[0] & vocabularies[1])
    assert found["added"] == len(vocabularies[1] - vocabularies[0]) > 0
    assert any("c" in token for token in found["added_examples"])
    assert not any("c" in token for token in found["removed_examples"])


def rewritten(corpus: Corpus, **content: Any) -> Corpus:
    """The corpus as if its manifest said otherwise."""
    return Corpus(corpus.folder, {**corpus.manifest, "content": {**corpus.manifest["content"], **content}})


def test_stages_and_settings_that_differ_are_named(root: Path) -> None:
    corpus = write_corpus(root, TEXTS)
    before = rewritten(corpus, clean={"nfc": True, "near": None}, split={"val": 0.05})
    after = rewritten(corpus, clean={"nfc": True, "near": {"threshold": 0.7}}, split={"val": 0.1})
    stage = {"stage": "read", "in": 4, "out": 3, "dropped": {"empty": 1}}
    before.manifest["stages"], after.manifest["stages"] = [stage], [{**stage, "in": 3, "dropped": {}}]
    found = diff(before, after)
    assert [(row["setting"], row["a"], row["b"]) for row in found["settings"]] == [
        ("clean.near", None, {"threshold": 0.7}),
        ("split.val", 0.05, 0.1),
    ]
    assert [(row["a"]["in"], row["b"]["in"]) for row in found["stages"]] == [(4, 3)]


def test_sources_of_a_corpus_that_is_extended_are_compared_by_their_documents(root: Path) -> None:
    a = write_corpus(root, TEXTS, name="a")
    extension = write_corpus(root, [*TEXTS, ("code", "train", "x")], name="b")
    extension = rewritten(extension, sources=extension.manifest["content"]["sources"][-1:])
    assert diff(a, extension)["sources"]["changed"] == []
    other = write_corpus(root, [TEXTS[0], *TEXTS[2:], ("code", "train", "x")], name="c")
    other = rewritten(other, sources=[])
    assert "law" in diff(a, other)["sources"]["changed"]


def test_every_token_is_traced_to_the_document_that_holds_it(root: Path) -> None:
    corpus = write_corpus(root, [("d", "train", "abc"), ("d", "val", "v"), ("d", "train", ""), ("d", "train", "de")])
    expected = [(0, 0, "a"), (0, 1, "b"), (0, 2, "c"), (3, 0, "d"), (3, 1, "e")]
    for token, (row, within, text) in enumerate(expected):
        found = document_of_token(corpus, "train", token)
        assert (found["row"], found["token_in_document"], found["text"]) == (row, within, text)
        assert found["document"]["path"] == "d.txt" and found["document"]["offset"] == row
    assert document_of_token(corpus, "train", 1) | {"document": None} == {
        "row": 0, "document": None, "token_in_document": 1, "id": ord("b"), "text": "b", "before": "a", "after": "c",
    }  # fmt: skip
    for split, token in (("train", 5), ("train", -1), ("test", 0)):
        with pytest.raises(ConfigError, match=f"token: tiny has no token {split}:{token} .train:0 to train:4"):
            document_of_token(corpus, split, token)


def test_a_document_is_found_by_its_id_or_a_beginning_that_only_it_has(root: Path) -> None:
    corpus = write_corpus(root, [("abcdefgh", "train", "x"), ("abcdefgi", "train", "y"), ("ab", "train", "z")])
    assert find_document(corpus, "abcdefgh") == 0
    assert find_document(corpus, "abcdefgi/1") == 1
    assert find_document(corpus, "ab/2") == 2  # whole ids may be short
    with pytest.raises(ConfigError, match="document: 'abcdefg' is too short"):
        find_document(corpus, "abcdefg")
    with pytest.raises(ConfigError, match="none whose id begins with 'abcdefgx'"):
        find_document(corpus, "abcdefgx")
    twice = write_corpus(root, [("abcdefgh", "train", "x"), ("abcdefgh", "train", "y")], name="twice")
    with pytest.raises(ConfigError, match="2 documents begin with 'abcdefgh' .more characters: abcdefgh/0, abcdefgh/1"):
        find_document(twice, "abcdefgh")


def save_run(root: Path, name: str, corpus: Corpus, step: int = 10, **fields: Any) -> str:
    """A run's folder with one checkpoint, as far as lineage reads it; the checkpoint's digest."""
    run = root / "runs" / name
    task = {"corpus": corpus.digest, "documents": fields.get("documents"), "train": {"batch_tokens": 8}}
    artefacts.write_json(run / "task.json", task)
    with artefacts.new_folder(run / f"step-{step:08d}") as folder:
        (folder / "weights").write_text(name)
        write_manifest(
            folder, run=name, step=step, spec_digest="", tokenizer_digest=corpus.tokenizer.digest,
            corpus_digest=corpus.digest, init_from=fields.get("init_from"),
        )  # fmt: skip
    return str(json.loads((run / f"step-{step:08d}" / "manifest.json").read_text())["digest"])


def save_clustering(corpus: Corpus, *clusters: list[int]) -> list[str]:
    """A clustering's folder, as far as lineage reads it; the digests of its clusters' documents."""
    place = corpus.folder / "domains" / ("ef" * 32)
    with artefacts.new_folder(place) as folder:
        for number, rows in enumerate(clusters):
            np.save(folder / f"documents-{number:02d}.npy", np.array(rows))
        files = artefacts.digest_files(folder)
        artefacts.write_json(folder / "manifest.json", {"format_version": 1, "files": files})
    return [files[name] for name in sorted(files)]


def how_seen(found: dict[str, Any]) -> dict[str, str]:
    return {row["model"]: row["how"] for row in found["models"]}


def test_the_models_that_saw_a_document_are_those_of_its_cluster_and_their_heirs(root: Path) -> None:
    corpus = write_corpus(root, TEXTS)
    law, verse = save_clustering(corpus, [0, 1], [2])
    save_run(root, "whole", corpus)
    save_run(root, "law", corpus, documents=law)
    of_verse = save_run(root, "verse", corpus, documents=verse)
    save_run(root, "a-tuned-verse", corpus, documents=law, init_from=of_verse)
    verse_id = corpus.documents["id"][2].as_py()
    assert how_seen(models_that_saw(verse_id, root)) == {
        "whole": "all documents",
        "verse": "cluster 01 of efefefefefef",
        "a-tuned-verse": "inherited",
    }
    found = models_that_saw(FIRST, root)
    assert set(how_seen(found)) == {"whole", "law", "a-tuned-verse"}
    assert how_seen(models_that_saw("law/1", root)) == {}  # in the val split
    passes = {row["model"]: row["passes"] for row in found["models"]}
    assert passes["law"] == round(80 / (len(TEXTS[0][2]) + 1), 3)  # steps x batch over the cluster's training tokens
    assert passes["whole"] < passes["law"]


def test_a_model_of_another_corpus_with_the_same_document_saw_it_too(root: Path) -> None:
    a = write_corpus(root, TEXTS, name="a")
    b = write_corpus(root, [TEXTS[0]], name="b")
    held_out = write_corpus(root, [(TEXTS[0][0], "val", TEXTS[0][2])], name="held out")
    save_run(root, "of-b", b)
    save_run(root, "of-held-out", held_out)
    found = models_that_saw(FIRST, root)
    assert {row["digest"]: row["split"] for row in found["corpora"]} == {
        a.digest: "train", b.digest: "train", held_out.digest: "val",
    }  # fmt: skip
    assert set(how_seen(found)) == {"of-b"}


def test_swarms_with_a_member_that_saw_the_document_are_named(root: Path) -> None:
    corpus = write_corpus(root, TEXTS)
    law, verse = save_clustering(corpus, [0, 1], [2])
    members = {
        "e00": {"digest": save_run(root, "s-e00", corpus, documents=law)},
        "e01": {"digest": save_run(root, "s-e01", corpus, documents=verse)},
    }
    place = root / "swarms" / ("aa" * 32)
    artefacts.write_json(place / "swarm.json", {"members": members})
    artefacts.point(root / "swarms" / "names" / "mine", place)
    assert models_that_saw(FIRST, root)["swarms"] == [{"swarm": "aa" * 32, "names": ["mine"], "members": ["e00"]}]


def test_what_cannot_be_read_is_named_and_hides_nothing(root: Path) -> None:
    corpus = write_corpus(root, TEXTS)
    save_run(root, "whole", corpus)
    save_run(root, "of-a-lost-cluster", corpus, documents="0" * 64)
    save_run(root, "torn", corpus)
    (root / "runs" / "torn" / "step-00000010" / "weights").unlink()
    found = models_that_saw(FIRST, root)
    assert set(how_seen(found)) == {"whole"}
    assert ["of-a-lost-cluster" in line or "torn" in line for line in found["unreadable"]] == [True, True]
    save_run(root, "odd", corpus)
    artefacts.write_json(root / "runs" / "odd" / "task.json", {"documents": None, "train": []})
    found = models_that_saw(FIRST, root)
    assert set(how_seen(found)) == {"whole"} and any("runs/odd" in line for line in found["unreadable"])


def ulm(*words: str) -> Any:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    return json.loads(done.stdout.strip().rpartition("\n")[2]), done.stderr


def test_the_command_line_shows_and_compares(root: Path) -> None:
    write_corpus(root, TEXTS, name="a")
    b = write_corpus(root, [*TEXTS, ("d\x1b[31m", "train", "[bold]\x1b[2Jx")], name="b")
    found, said = ulm("corpus", "diff", "a", "b")
    assert found["documents"]["added"] == 1 and "1 added" in said and "\x1b[31m" not in said
    found, said = ulm("corpus", "show", "b", "--token", "train:0")
    assert found["text"] == "t" and "law.txt" in said
    found, said = ulm("corpus", "show", "b", "--document", b.documents["id"][3].as_py())
    assert found["text"] == "[bold]\x1b[2Jx" and "[bold]" in said and "\x1b[2J" not in said
    found, said = ulm("corpus", "show", "a")
    assert found["tokens"] == {"train": 35, "val": 6} and "train 35, val 6" in said
    artefacts.point(root / "corpora" / "names" / "other", Corpus.open("a", root=root).folder)
    found, said = ulm("corpus", "show", "other")
    assert found["name"] == "other" and "other" in said
    (root / "corpora" / "names" / "other").unlink()
    found, said = ulm("corpus", "list")
    assert [row["name"] for row in found["corpora"]] == ["a", "b"]
    assert found["corpora"][1]["bytes"] == sum(file.stat().st_size for file in b.folder.iterdir())


def test_a_damaged_corpus_is_listed_as_such_beside_the_others(root: Path) -> None:
    write_corpus(root, TEXTS, name="a")
    b = write_corpus(root, TEXTS[:2], name="b")
    (b.folder / "manifest.json").unlink()
    found, said = ulm("corpus", "list")
    assert found["corpora"][0]["name"] == "a"
    assert found["corpora"][1] == {"name": "b", "error": f"{b.folder}: no corpus here (manifest.json is missing)"}
    assert "damaged" in said


@pytest.mark.parametrize(
    "words", [["--token", "train"], ["--token", "train:x"], ["--token", "train:1", "--document", "x"]]
)
def test_options_that_say_nothing_are_refused(root: Path, words: list[str]) -> None:
    write_corpus(root, TEXTS, name="a")
    with pytest.raises(ConfigError, match="--token: "):
        ulm("corpus", "show", "a", *words)


def test_an_id_with_a_number_is_the_same_text(root: Path) -> None:
    corpus = write_corpus(root, TEXTS)
    save_run(root, "whole", corpus)
    assert set(how_seen(models_that_saw(f"{FIRST}-2", root))) == {"whole"}
