"""A corpus as stored: its tokens and documents agree, it verifies, and its digest depends on content alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.plain_build import plain_build, texts_of
from tests.written_corpus import write_corpus
from ulm import artefacts
from ulm.corpus.manifest import DOCUMENT_COLUMNS, Corpus, ShardReader, token_dtype
from ulm.errors import ArtefactError, ConfigError
from ulm.recipes.corpus import Clean, GopherRepetition, Split
from ulm.tokenizers.bpe import train_bpe
from ulm.tokenizers.byte import byte_tokenizer

TEXTS = [f"Document {number}: " + "words and wörds " * (number % 9) for number in range(120)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "texts"
    place.mkdir()
    for number, text in enumerate(TEXTS):
        (place / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return place


def test_documents_say_where_their_tokens_are_and_tokens_give_back_the_text(root: Path, folder: Path) -> None:
    corpus = plain_build(
        root, {"path": str(folder), "domain": "d", "licence": "l"}, tokenizer={"kind": "bpe", "vocab_size": 400}
    )
    assert tuple(corpus.documents.column_names) == DOCUMENT_COLUMNS
    assert texts_of(corpus) == TEXTS
    rows = corpus.documents.to_pylist()
    assert [row["path"] for row in rows] == [f"{number:03d}.txt" for number in range(120)]
    assert [row["num_bytes"] for row in rows] == [len(text.encode()) for text in TEXTS]
    assert {(row["source"], row["domain"], row["licence"], row["offset"]) for row in rows} == {("texts", "d", "l", 0)}
    for split in corpus.splits:
        of_split = [row for row in rows if row["split"] == split]
        ends = np.cumsum([row["num_tokens"] for row in of_split])
        assert [row["first_token"] for row in of_split] == [0, *ends[:-1]]
        assert ends[-1] == corpus.num_tokens(split) == len(corpus.tokens(split))
    assert set(corpus.splits) == {"train", "val", "test"}
    assert corpus.tokenizer.eot_id not in corpus.tokens("train").read(0, corpus.num_tokens("train"))


def test_reads_cross_shard_borders(root: Path, folder: Path) -> None:
    whole = plain_build(root / "one", {"path": str(folder)}).tokens("train")
    small = plain_build(root / "two", {"path": str(folder)}, shard_bytes=64)
    assert len(small.manifest["shards"]["train"]) > 50
    assert all(file.stat().st_size <= 64 for file in small.folder.glob("*.bin"))
    everything = whole.read(0, len(whole))
    for first, count in ((0, len(whole)), (31, 2), (32, 32), (33, 200), (len(whole), 0), (7, 0)):
        assert (small.tokens("train").read(first, count) == everything[first : first + count]).all()
    with pytest.raises(IndexError, match="of"):
        whole.read(len(whole), 1)


def test_the_digest_depends_on_content_not_on_path_name_or_workers(root: Path, folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "moved")
    first = plain_build(root / "one", {"path": str(folder)}, name="a")
    second = plain_build(root / "two", {"path": str(moved)}, name="b", workers=2)
    assert first.digest == second.digest == first.folder.name
    assert (first.name, second.name) == ("a", "b")


@pytest.mark.parametrize(
    "change",
    [
        {"clean": {"min_document_bytes": 2}},
        {"split": {"val": 0.06}},
        {"tokenizer": {"kind": "bpe", "vocab_size": 300}},
        {"source": {"weight": 2.0}},
        {"source": {"domain": "other"}},
    ],
)
def test_the_digest_depends_on_stages_tokenizer_and_labels(root: Path, folder: Path, change: dict[str, object]) -> None:
    source = {"path": str(folder)}
    before = plain_build(root, source)
    after = plain_build(root, {**source, **change.pop("source", {})}, **change)  # type: ignore[dict-item, arg-type]
    assert after.digest != before.digest


def test_one_changed_character_changes_the_digest_and_one_document_id(root: Path, folder: Path) -> None:
    before = plain_build(root, {"path": str(folder)})
    (folder / "007.txt").write_text("something else")
    after = plain_build(root, {"path": str(folder)})
    ids = [corpus.documents["id"].to_pylist() for corpus in (before, after)]
    assert before.digest != after.digest
    assert [n for n, (a, b) in enumerate(zip(*ids, strict=True)) if a != b] == [7]


def test_a_corpus_opens_by_name_digest_beginning_and_path(root: Path, folder: Path) -> None:
    built = plain_build(root, {"path": str(folder), "weight": 1.5}, name="mine")
    for text in ("mine", built.digest, built.digest[:12], str(built.folder), f"corpora/{built.digest}"):
        assert Corpus.open(text, root=root).digest == built.digest
    assert built.weights == {"texts": 1.5}
    with pytest.raises(ConfigError, match=r"corpus: no corpus 'their' \(a path, a digest, or .*: mine\)"):
        Corpus.open("their", root=root)


def test_a_damaged_or_missing_file_is_named(root: Path, folder: Path) -> None:
    corpus = plain_build(root, {"path": str(folder)})
    shard = corpus.folder / "train-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ArtefactError, match=r"train-00000\.bin: content does not match its digest"):
        Corpus.open("c", root=root)
    shard.unlink()
    with pytest.raises(ArtefactError, match=r"train-00000\.bin: missing"):
        Corpus.open("c", root=root)
    with pytest.raises(ArtefactError, match=r"train-00000\.bin: missing"):
        Corpus.open("c", root=root, verify=False).tokens("train")


def test_a_changed_manifest_is_refused(root: Path, folder: Path) -> None:
    path = plain_build(root, {"path": str(folder)}).folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["content"]["clean"]["nfc"] = False
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match=r"manifest\.json: its content does not match its digest"):
        Corpus.open("c", root=root)


def forge(corpus: Corpus, place: Path, key: tuple[str | int, ...], value: object) -> Path:
    """A copy of the corpus whose manifest has another value (None: none) at a key, and a digest that fits."""
    shutil.copytree(corpus.folder, place)
    manifest = json.loads((place / "manifest.json").read_text())
    inner = manifest
    *way, last = key
    for part in way:
        inner = inner[part]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    manifest["digest"] = artefacts.digest_json(manifest["content"])
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        (("content",), [], "content"),
        (("content", "shards"), None, "content.shards"),
        (("content", "shards", "../../../victim"), "0" * 64, "content.shards"),
        (("content", "shards", "train-00000.bin"), "0" * 64, "files.train-00000.bin"),
        (("content", "clean"), [], "content.clean"),
        (("shards",), {"train": 5}, "shards.train"),
        (("shards", "train"), ["/etc/hostname"], "shards.train"),
        (("shards", "train"), ["../train-00000.bin"], "shards.train"),
        (("shards", "train"), ["train-00000.bin\n"], "shards.train"),
        (("shards", "train"), [], "content.shards"),
        (("shards", "../x"), [], "shards.../x"),
        (("files",), [1], "files"),
        (("files", "train-00000.bin"), None, "files.train-00000.bin"),
        (("files", "documents.parquet"), None, "files.documents.parquet"),
        (("tokens",), "x", "tokens"),
        (("tokens", "train"), 1, "tokens.train"),
        (("tokens", "train"), True, "tokens.train"),
        (("dtype",), "O", "dtype"),
        (("name",), 5, "name"),
        (("sources",), [1], "sources.0"),
        (("sources",), [], "content.sources"),
        (("sources", 0, "weight"), "1", "sources.0.weight"),
        (("clean",), [], "clean"),
        (("split",), 1, "split"),
        (("stages",), [{"stage": "read"}], "stages.0.in"),
        (("created",), 1, "created"),
        (("documents",), {"in": 1}, "documents.kept"),
    ],
)
def test_a_foreign_manifest_is_refused_by_the_key_that_is_wrong(
    root: Path, tmp_path: Path, key: tuple[str | int, ...], value: object, named: str
) -> None:
    place = forge(write_corpus(root, [("d", "train", "some text")]), tmp_path / "foreign", key, value)
    with pytest.raises(ArtefactError, match=rf"manifest\.json: (not the .*corpus: )?{re.escape(named)}\b"):
        Corpus.read(place, verify=False)


def test_half_a_surrogate_pair_in_a_manifest_is_refused(root: Path, tmp_path: Path) -> None:
    place = forge(write_corpus(root, [("d", "train", "some text")]), tmp_path / "foreign", ("more",), "\ud800")
    with pytest.raises(ArtefactError, match=r"manifest\.json: not a readable manifest"):
        Corpus.read(place)


def test_a_shard_that_is_a_link_or_has_another_size_is_refused(root: Path, folder: Path) -> None:
    shard = plain_build(root, {"path": str(folder)}).folder / "train-00000.bin"
    raw = shard.read_bytes()
    shard.rename(root / "away.bin")
    shard.symlink_to(root / "away.bin")
    with pytest.raises(ArtefactError, match=r"train-00000\.bin: not a file but a link"):
        Corpus.open("c", root=root)
    shard.unlink()
    for content, named in ((b"", "0 bytes are no shard"), (raw[:-1], "are no shard"), (raw[:-2], "tokens.train: says")):
        shard.write_bytes(content)
        with pytest.raises(ArtefactError, match=named):
            Corpus.open("c", root=root, verify=False)


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("split", "other", "has documents that its shards do not"),
        ("first_token", -1, "has documents that its shards do not"),
        ("num_tokens", 2**62, "has documents that its shards do not"),
        ("num_source_tokens", 2**62, "has documents that its shards do not"),
        ("id", None, "has documents that its shards do not"),
        ("offset", "x", "not readable"),
        ("path", ..., "not readable"),
    ],
)
def test_documents_that_are_in_no_shard_are_refused(root: Path, column: str, value: object, problem: str) -> None:
    corpus = write_corpus(root, [("d", "train", "some text")], name="c")
    table = pq.read_table(corpus.folder / "documents.parquet")
    number = table.column_names.index(column)
    table = table.remove_column(number)
    if value is not ...:
        table = table.add_column(number, column, pa.array([value] * table.num_rows))
    pq.write_table(table, corpus.folder / "documents.parquet")
    with pytest.raises(ArtefactError, match=rf"documents\.parquet: {problem}"):
        assert Corpus.open("c", root=root, verify=False).documents


def test_a_corpus_knows_its_settings_or_says_that_it_does_not(root: Path, folder: Path, tmp_path: Path) -> None:
    corpus = plain_build(root, {"path": str(folder)}, clean={"gopher_repetition": True, "nfc": False}, split={"val": 0})
    clean, split = Corpus.read(corpus.folder).settings()
    assert (clean, split) == (Clean(gopher_repetition=GopherRepetition(), nfc=False), Split(val=0))
    for key, value in (("clean", None), ("clean.stage_of_later", 1), ("split", None), ("split.val", 2.0)):
        place = forge(corpus, tmp_path / key, tuple(key.split(".")), value)
        with pytest.raises(ArtefactError, match=rf"manifest\.json: {key}: "):
            Corpus.read(place).settings()


def test_a_corpus_has_the_name_it_is_asked_for_by(root: Path, folder: Path) -> None:
    for name in ("first", "second"):
        plain_build(root, {"path": str(folder)}, name=name)
    digest = Corpus.open("second", root=root).digest
    assert [Corpus.open(text, root=root).name for text in ("first", "second", digest)] == ["first", "second", "first"]


def test_building_again_keeps_a_whole_corpus_and_replaces_a_damaged_one(root: Path, folder: Path) -> None:
    first = plain_build(root, {"path": str(folder)})
    created = (first.folder / "manifest.json").stat().st_ino
    assert (plain_build(root, {"path": str(folder)}).folder / "manifest.json").stat().st_ino == created
    (first.folder / "train-00000.bin").write_bytes(b"broken")
    again = plain_build(root, {"path": str(folder)})
    assert Corpus.open("c", root=root).digest == again.digest == first.digest
    assert sorted(p.name for p in (root / "corpora").iterdir()) == [first.digest, "names"]  # nothing left over


def test_bytes_are_stored_as_the_byte_tokenizer_encodes_them() -> None:
    tokenizer = byte_tokenizer()
    text = "aé\n<|endoftext|>𝄞"
    [stored] = tokenizer.encode_arrays([text], token_dtype(tokenizer.vocab_size))
    assert (stored.dtype, stored.tolist()) == (np.dtype("<u2"), tokenizer.encode(text))
    assert stored.tolist() == list(text.encode())


def test_an_existing_tokenizer_is_used_by_digest_and_a_damaged_one_refused(root: Path, folder: Path) -> None:
    tokenizer = train_bpe(TEXTS, 320)
    place = tokenizer.save(root)
    corpus = plain_build(root, {"path": str(folder)}, tokenizer=tokenizer.digest)
    assert corpus.tokenizer.digest == tokenizer.digest == corpus.manifest["tokenizer"]["digest"]
    (place / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"tokenizer\.json: content does not match its digest"):
        plain_build(root, {"path": str(folder)}, tokenizer=tokenizer.digest)


def test_ids_beyond_sixteen_bits_are_stored_in_32(tmp_path: Path) -> None:
    assert (token_dtype(65_535).itemsize, token_dtype(65_536).itemsize) == (2, 4)
    np.array([1, 70_000], token_dtype(100_000)).tofile(tmp_path / "a.bin")
    assert ShardReader([tmp_path / "a.bin"], token_dtype(100_000)).read(1, 1).tolist() == [70_000]
