"""Which files and rows a source means, in which order, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus import sources
from pipelines.corpus.sources import list_sources, share_out
from tests.plain_build import corpus_recipe, plain_build, texts_of
from ulm.errors import ConfigError


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> None:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")


def paths(folder: Path, **source: object) -> list[str]:
    recipe = corpus_recipe({"path": str(folder), **source})
    return [unit.path for unit in list_sources(recipe.sources, near=None, root=folder).units]


def test_a_folder_is_walked_in_path_order_without_hidden_files_and_link_loops(tmp_path: Path) -> None:
    for name in ("b/x.txt", "a.md", "b.txt", ".hidden.txt", ".git/y.txt", "UPPER.TXT", "photo.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert paths(tmp_path) == ["UPPER.TXT", "a.md", "b.txt", "b/x.txt"]


def test_a_file_name_that_is_no_unicode_is_read_and_shown(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    corpus = plain_build(tmp_path / "root", {"path": str(tmp_path), "format": "txt"})
    assert corpus.documents["path"].to_pylist() == ["caf\\xe9.txt"]
    assert texts_of(corpus) == ["text"]


def test_a_glob_and_a_path_beside_the_recipe_are_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("one.txt", "two.txt", "sub/one.txt", "sub/three.md"):
        (tmp_path / name).write_text(name)
    listed = list_sources(
        corpus_recipe({"path": "**/one.txt"}, {"path": "sub"}).sources, near=tmp_path, root=tmp_path / "root"
    )
    assert [(u.source, u.path) for u in listed.units] == [
        (0, "one.txt"), (0, "sub/one.txt"), (1, "one.txt"), (1, "three.md"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "nowhere"}, r"sources\.0\.path: .*nowhere does not exist \(a file, a folder or a glob"),
        ({"path": "*.nothing"}, r"sources\.0\.path: nothing matches '\*\.nothing'"),
        ({"path": "a.rst"}, r"sources\.0\.format: none known for 'a\.rst' \(name one; by suffix: \.txt"),
        ({"path": "a.txt", "split": "tests"}, r"sources\.0\.split: no split 'tests' \(did you mean 'test'\?\)"),
        ({"path": "a.txt", "document": "record"}, r"sources\.0\.document: 'record' does not fit a\.txt \(txt\)"),
        ({"path": "a.jsonl", "document": "file"}, r"sources\.0\.document: 'file' does not fit a\.jsonl \(jsonl\)"),
        ({"dataset": "./nowhere"}, r"sources\.0\.dataset: cannot load './nowhere'"),
    ],
)
def test_a_wrong_source_is_named_by_its_place(tmp_path: Path, source: dict[str, str], message: str) -> None:
    for name in ("a.rst", "a.txt", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "t"}')
    with pytest.raises(ConfigError, match=message):
        list_sources(corpus_recipe(source).sources, near=tmp_path, root=tmp_path)


def test_two_sources_of_one_name_are_refused_and_derived_names_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "law.txt").write_text(folder)
    files = [{"path": f"{folder}/law.txt"} for folder in ("a", "b")]
    assert list_sources(corpus_recipe(*files).sources, near=tmp_path, root=tmp_path).names == ["law", "law-2"]
    named = [{**file, "name": "x"} for file in files]
    with pytest.raises(ConfigError, match=r"sources\.1\.name: 'x' is another source's name"):
        list_sources(corpus_recipe(*named).sources, near=tmp_path, root=tmp_path)


def test_the_same_rows_in_two_formats_of_one_folder_are_taken_once(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(150)]
    write_jsonl(tmp_path / "train.jsonl", texts)
    pq.write_table(pa.table({"text": texts}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"text": ["another", *texts[1:]]}), tmp_path / "other.parquet")
    write_jsonl(tmp_path / "other.jsonl", texts)
    corpus = plain_build(tmp_path / "root", {"path": str(tmp_path)}, clean={"duplicate_exact": False})
    assert corpus.manifest["documents"] == {"in": 450, "kept": 450, "dropped": {}}
    [ignored] = corpus.manifest["ignored"]
    assert (ignored["path"], ignored["reason"]) == ("train.parquet", "same_rows as train.jsonl")


def test_a_file_read_in_parts_gives_the_lines_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{'é' * (number % 7)}line {number}" for number in range(200)]
    (tmp_path / "a.txt").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    write_jsonl(tmp_path / "b.jsonl", [f"row {line}" for line in lines])
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("no json\n")
    recipe = [{"path": str(tmp_path / "a.txt"), "document": "line"}, {"path": str(tmp_path / "b.jsonl")}]
    whole = plain_build(tmp_path / "whole", *recipe)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 97)  # parts end inside lines, at their ends and inside characters
    parted = plain_build(tmp_path / "parted", *recipe)
    assert texts_of(parted) == texts_of(whole) == [*lines, *(f"row {line}" for line in lines)]
    assert parted.documents.equals(whole.documents)
    assert parted.manifest["dropped"][0]["path"] == whole.manifest["dropped"][0]["path"] == "b.jsonl:201"


def test_work_is_shared_out_in_order_and_whole(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02d}.txt").write_text("x" * 200_000)
    units = list_sources(corpus_recipe({"path": str(tmp_path)}).sources, near=None, root=tmp_path).units
    groups = share_out(units, num_workers=2)
    assert len(groups) == 6  # of at most 1 MiB
    assert [number for group in groups for number, _ in group] == list(range(30))


def test_each_unit_of_a_document_gives_its_own_documents(tmp_path: Path) -> None:
    text = "one\n\ntwo\nstill two\r\n \r\nthree\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    write_jsonl(tmp_path / "r.jsonl", [text])

    def built(name: str, document: str) -> tuple[list[str], list[int]]:
        corpus = plain_build(tmp_path / "root", {"path": str(tmp_path / name), "document": document})
        return texts_of(corpus), corpus.documents["offset"].to_pylist()

    assert built("a.txt", "file") == (["one\n\ntwo\nstill two\n \nthree\n"], [0])
    assert built("a.txt", "paragraph") == (["one", "two\nstill two", "three\n"], [0, 5, 23])
    assert built("a.txt", "line") == (["one", "two", "still two\n", "three"], [0, 5, 9, 23])
    assert built("r.jsonl", "paragraph")[0] == ["one", "two\nstill two", "three\n"]


def test_files_keep_the_split_they_are_named_after(tmp_path: Path) -> None:
    for name in ("train", "validation", "test", "testimony", "dev-00000-of-00001"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {number}" for number in range(40)])
    documents = plain_build(tmp_path / "root", {"path": str(tmp_path)}).documents
    found: dict[str, set[str]] = {}
    for row in documents.select(["path", "split"]).to_pylist():
        found.setdefault(row["path"], set()).add(row["split"])
    assert found.pop("testimony.jsonl") > {"train"}  # by hash
    assert found == {
        "train.jsonl": {"train"}, "validation.jsonl": {"val"}, "test.jsonl": {"test"},
        "dev-00000-of-00001.jsonl": {"val"},
    }  # fmt: skip


def test_a_dataset_folder_gives_what_its_rows_as_jsonl_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        write_jsonl(folder / f"{split}.jsonl", [f"{split} {number}" for number in range(20)], key="body")
    source = {"text": "body", "name": "s"}
    of_dataset = plain_build(tmp_path / "one", {"dataset": "set", **source}, near=tmp_path)
    of_files = plain_build(tmp_path / "two", {"path": "set", **source}, near=tmp_path)
    columns = ["id", "split", "num_tokens"]
    assert of_dataset.manifest["tokens"] == of_files.manifest["tokens"]
    assert sorted(map(str, of_dataset.documents.select(columns).to_pylist())) == sorted(
        map(str, of_files.documents.select(columns).to_pylist())
    )
    with pytest.raises(ConfigError, match=r"sources\.0\.text: set has no column 'bod' \(did you mean 'body'\?\)"):
        plain_build(tmp_path / "three", {"dataset": "set", "text": "bod"}, near=tmp_path)


def test_a_dataset_with_train_alone_is_split_by_hash_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [f"row {number}" for number in range(100)])
    by_hash = plain_build(tmp_path / "one", {"dataset": "set"}, near=tmp_path)
    named = plain_build(tmp_path / "two", {"dataset": "set", "split": "train"}, near=tmp_path)
    assert (by_hash.splits, named.splits) == (("train", "val", "test"), ("train",))
