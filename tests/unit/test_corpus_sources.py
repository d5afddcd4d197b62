"""Which files and rows a source means, in which order, and what is said of those that cannot be used."""

from __future__ import annotations

import gc
import gzip
import importlib.util
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.reading import hub, places, ranges
from pipelines.corpus.reading.formats import by_name
from pipelines.corpus.reading.read import Reading, read_unit
from pipelines.corpus.reading.unit import Unit, is_html
from pipelines.corpus.sources import share_out
from tests.source_reading import listing_of, read, records_of, sources_of
from ulm.errors import ConfigError


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> None:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")


def paths(folder: Path, **source: Any) -> list[str]:
    return [unit.path for unit in listing_of({"path": str(folder), **source}, near=folder).units]


def test_a_folder_is_walked_in_path_order_without_hidden_files_and_link_loops(tmp_path: Path) -> None:
    for name in ("b/x.txt", "a.md", "b.txt", ".hidden.txt", ".git/y.txt", "UPPER.TXT", "photo.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    assert paths(tmp_path) == ["UPPER.TXT", "a.md", "b.txt", "b/x.txt", "self.txt"]
    assert records_of(tmp_path, path="self*.txt")[0][1].reason == "unreadable: Too many levels of symbolic links"


def test_a_file_name_that_is_no_unicode_is_read_and_shown(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    [(unit, record)] = records_of(tmp_path, path=".", format="txt")
    assert (unit.path, record.text) == ("caf\\xe9.txt", "text")
    again = Unit(**json.loads(json.dumps(vars(unit))))  # as parts of a build get them
    assert [record.text for record in read_unit(again, *sources_of({"path": "."}), Reading(), 1_000, "")] == ["text"]


def test_what_is_said_of_a_file_that_is_not_read_is_valid_and_short(tmp_path: Path) -> None:
    folder = tmp_path / "/".join(["x" * 200] * 3)
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    short, long = (ignored.path for ignored in listing_of({"path": "."}, near=tmp_path).ignored)
    assert short == "\\xff.png"
    assert long == ("/".join(["x" * 200] * 3)[:299] + "…")


def test_what_is_no_file_is_passed_over_with_its_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "photo.png").write_bytes(b"x")
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "a.txt").write_text("a")
    listed = listing_of({"path": "."}, {"path": ".", "format": "txt", "name": "b"}, near=tmp_path)
    assert [(i.source, i.path, i.reason) for i in listed.ignored] == [
        (0, "photo.png", "unknown_format"), (0, "pipe.txt", "not_a_file"), (0, "rows.json", "unknown_format"),
        (1, "photo.png", "other_format"), (1, "pipe.txt", "not_a_file"), (1, "rows.json", "other_format"),
    ]  # fmt: skip


def test_a_glob_and_a_path_beside_the_recipe_are_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("one.txt", "two.txt", "sub/one.txt", "sub/three.md"):
        (tmp_path / name).write_text(name)
    listed = listing_of({"path": "**/one.txt"}, {"path": "sub"}, {"path": f"file://{tmp_path}/sub"}, near=tmp_path)
    assert [(u.source, u.path) for u in listed.units] == [
        (0, "one.txt"), (0, "sub/one.txt"), (1, "one.txt"), (1, "three.md"),
        (2, "one.txt"), (2, "three.md"),
    ]  # fmt: skip


def test_a_glob_has_no_more_signs_than_the_recipe_wrote(tmp_path: Path) -> None:
    for folder in ("data[1]", "data1", "data[1]/sub"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    assert read(tmp_path / "data[1]", path="*.txt") == ["data[1]"]
    assert [(u.path, r.text) for u, r in records_of(tmp_path / "data[1]" / "sub", path="../*.txt")] == [
        ("a.txt", "data[1]")
    ]
    assert read(tmp_path, path=f"{tmp_path}/data[1]/*.txt") == ["data1"]


def test_many_double_stars_are_one(tmp_path: Path) -> None:
    for folder in ("a/b/c", "d/e/f"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.txt").write_text(folder)
    assert read(tmp_path, path="**/" * 100 + "x.txt") == ["a/b/c", "d/e/f"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ("a", "txt", None)),
        ("train.jsonl.gz", ("train", "jsonl", "gz")),
        ("A.CSV.ZST", ("A", "csv", "zst")),
        ("page.htm", ("page", "html", None)),
        ("test.py", ("test", "code", None)),
        ("notes.rst", ("notes", "txt", None)),
        ("rows.json", ("rows.json", None, None)),
        ("rows.parquet.gz", ("rows.parquet", None, "gz")),
        ("noextension", ("noextension", None, None)),
        ("book.epub", ("book", "epub", None)),
    ],
)
def test_a_name_tells_format_and_compression(name: str, expected: tuple[str, str | None, str | None]) -> None:
    assert by_name(name) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "nowhere"}, r"sources\.0\.path: .*nowhere does not exist \(a file, a folder or a glob"),
        ({"path": "*.nothing"}, r"sources\.0\.path: nothing matches '\*\.nothing'"),
        ({"path": "a.xyz"}, r"sources\.0\.format: none known for 'a\.xyz' \(name one: txt, md, html, code, jsonl"),
        ({"path": "a.txt", "split": "tests"}, r"sources\.0\.split: no split 'tests' \(did you mean 'test'\?\)"),
        ({"path": "a.txt", "document": "record"}, r"sources\.0\.document: 'record' does not fit a\.txt \(txt\)"),
        ({"path": "a.jsonl", "document": "file"}, r"'file' does not fit a\.jsonl \(jsonl\) \(record, line or"),
        ({"path": "a.html", "document": "line"}, r"'line' does not fit a\.html \(html\) \(file\)"),
        ({"path": "a.jsonl", "html": True, "document": "line"}, r"sources\.0\.document: 'line' does not fit HTML"),
        ({"path": "a.txt", "messages": "m"}, r"sources\.0\.messages: a\.txt \(txt\) has no columns \(files of jsonl"),
        ({"path": "a.txt", "encoding": "latin_11"}, r"sources\.0\.encoding: no encoding 'latin_11' \(did you mean 'la"),
        ({"path": "a.txt", "encoding": "rot13"}, r"sources\.0\.encoding: no encoding 'rot13'"),
        ({"path": "a.jsonl", "columns": ["text"]}, r"sources\.0\.columns: belongs to csv and tsv files"),
        ({"path": "a.csv", "columns": ["txt"]}, r"sources\.0\.text: 'text' is not among the columns .*mean 'txt'"),
        ({"path": "a.parquet", "encoding": "utf-16"}, r"sources\.0\.encoding: belongs to text files"),
        ({"dataset": "./nowhere"}, r"sources\.0\.dataset: cannot load './nowhere'"),
        ({"dataset": "x", "columns": ["a"]}, r"sources\.0\.columns: belongs to a path"),
        ({"path": ""}, r"sources\.0\.path: '' cannot be a path"),
        ({"path": "~nosuchuser/x"}, r"sources\.0\.path: '~nosuchuser/x' cannot be a path"),
        ({"path": "é" * 128}, r"sources\.0\.path: 'é+\.\.\.é+' cannot be a path"),
        ({"path": "*" * 300}, r"sources\.0\.path: '\*+\.\.\.\*+' cannot be a path"),
        ({"path": "a\0b"}, r"sources\.0\.path: 'a\\x00b' cannot be a path"),
        ({"dataset": "~nosuchuser/x"}, r"sources\.0\.dataset: '~nosuchuser/x' cannot be a path"),
        ({"dataset": ""}, r"sources\.0\.dataset: '' cannot be a path"),
        ({"path": "nosuchscheme://host/a.txt"}, r"sources\.0\.path: cannot list 'nosuchscheme://host/a\.txt'"),
    ],
)
def test_a_wrong_source_is_named_by_its_place(tmp_path: Path, source: dict[str, Any], message: str) -> None:
    for name in ("a.xyz", "a.txt", "a.jsonl", "a.html", "a.csv", "a.parquet"):
        (tmp_path / name).write_text('{"text": "t"}')
    with pytest.raises(ConfigError, match=message):
        listing_of(source, near=tmp_path)


def test_a_pdf_without_the_extra_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sources\.0\.format: pdf needs an extra .*\(pip install 'ulm\[books\]'\)"):
        listing_of({"path": "."}, near=tmp_path)


def test_two_sources_of_one_name_are_refused_and_derived_names_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "law.txt.gz").write_text(folder)
    files = [{"path": f"{folder}/law.txt.gz"} for folder in ("a", "b")]
    assert listing_of(*files, near=tmp_path).names == ["law", "law-2"]
    named = [{**file, "name": "x"} for file in files]
    with pytest.raises(ConfigError, match=r"sources\.1\.name: 'x' is another source's name"):
        listing_of(*named, near=tmp_path)


def test_the_same_rows_in_two_formats_of_one_folder_are_taken_once(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(150)]
    write_jsonl(tmp_path / "train.jsonl", texts)
    pq.write_table(pa.table({"text": texts}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"text": ["another", *texts[1:]]}), tmp_path / "other.parquet")
    write_jsonl(tmp_path / "other.jsonl", texts)
    listed = listing_of({"path": "."}, near=tmp_path)
    assert [unit.path for unit in listed.units] == ["other.jsonl", "other.parquet", "train.jsonl"]
    assert [(i.path, i.reason) for i in listed.ignored] == [("train.parquet", "same_rows as train.jsonl")]


def test_files_keep_the_split_they_are_named_after_but_code_does_not(tmp_path: Path) -> None:
    for name in ("train", "validation", "testimony", "dev-00000-of-00001"):
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    (tmp_path / "test.jsonl.gz").write_bytes(b"x")
    (tmp_path / "test.py").write_text("assert True")
    assert {unit.path: unit.split for unit in listing_of({"path": "."}, near=tmp_path).units} == {
        "train.jsonl": "train", "validation.jsonl": "val", "testimony.jsonl": None, "dev-00000-of-00001.jsonl": "val",
        "test.jsonl.gz": "test", "test.py": None,
    }  # fmt: skip


def test_work_is_shared_out_in_order_whole_and_bounded() -> None:
    units = [Unit(0, str(n), "", "txt", size=200_000) for n in range(30)]
    groups = share_out(units, part_bytes=1 << 20)
    assert [len(group) for group in groups] == [5] * 6
    assert [number for group in groups for number in group] == list(range(30))
    assert [len(group) for group in share_out([Unit(0, "", "", "txt")] * 2_500)] == [1_000, 1_000, 500]
    assert share_out([Unit(0, "", "", "txt", size=1 << 30)] * 2) == [[0], [1]]
    assert share_out([]) == []


def test_many_tiny_files_are_listed_with_their_sizes(tmp_path: Path) -> None:
    for number in range(2_000):
        (tmp_path / f"{number:05d}.txt").write_bytes(b"x" * (number % 7))
    units = listing_of({"path": "."}, near=tmp_path).units
    assert [unit.size for unit in units] == [number % 7 for number in range(2_000)]


def test_a_file_changed_in_place_is_another_version_even_with_its_size_and_time_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    [before] = listing_of({"path": "."}, near=tmp_path).units
    assert listing_of({"path": "."}, near=tmp_path).units == [before]
    times = os.stat(file)
    while os.stat(file).st_ctime_ns == times.st_ctime_ns:  # the clock of a file system may tick slowly
        file.write_text("behind")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    [after] = listing_of({"path": "a.txt"}, near=tmp_path).units
    assert (after.size, os.stat(file).st_mtime_ns) == (before.size, times.st_mtime_ns)
    assert after.version != before.version


def test_pages_books_and_columns_of_html_are_html(tmp_path: Path) -> None:
    plain, html = sources_of({"path": "x"}, {"path": "x", "html": True})
    found = [(form, is_html(Unit(0, "", "", form), plain)) for form in ("txt", "html", "epub", "pdf", "jsonl")]
    assert found == [("txt", False), ("html", True), ("epub", True), ("pdf", False), ("jsonl", False)]
    assert is_html(Unit(0, "", "", "jsonl"), html)


def test_row_groups_of_parquet_are_parts_and_rows_keep_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "PART_BYTES", 3_000)
    texts = [f"row {number}" * 20 for number in range(100)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10, use_dictionary=False)
    found = records_of(tmp_path, path="a.parquet")
    assert len({unit.start for unit, _ in found}) > 3
    assert [(record.offset, record.text) for _, record in found] == list(enumerate(texts))


class TestStores:
    @pytest.fixture
    def store(self) -> Iterator[str]:
        import fsspec

        files = fsspec.filesystem("memory")
        for name, text in (("b/x.txt", "x"), ("a b.jsonl", '{"text": "a"}\n'), (".hid/y.txt", "y"), ("b/c/z.md", "z")):
            files.pipe(f"/store/{name}", text.encode())
        yield "memory://store"
        files.rm("/store", recursive=True)

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("", [("a b.jsonl", "a"), ("b/c/z.md", "z"), ("b/x.txt", "x")]),
            ("/b/x.txt", [("x.txt", "x")]),
            ("/*.jsonl", [("a b.jsonl", "a")]),
            ("/**/*.[tm]*", [("b/c/z.md", "z"), ("b/x.txt", "x")]),
            ("/b/*", [("c/z.md", "z"), ("x.txt", "x")]),
        ],
    )
    def test_folders_files_and_globs_of_a_store_are_found(
        self, tmp_path: Path, store: str, path: str, expected: list[tuple[str, str]]
    ) -> None:
        assert [(u.path, r.text) for u, r in records_of(tmp_path, path=store + path)] == expected

    def test_a_glob_or_path_of_a_store_that_matches_nothing_is_refused(self, tmp_path: Path, store: str) -> None:
        with pytest.raises(ConfigError, match=r"sources\.0\.path: nothing matches 'memory://store/\*\.csv'"):
            listing_of({"path": f"{store}/*.csv"}, near=tmp_path)
        with pytest.raises(ConfigError, match=r"sources\.0\.path: cannot list 'memory://store/no': there is no"):
            listing_of({"path": f"{store}/no"}, near=tmp_path)

    def test_whatever_a_backend_raises_names_the_source(self, tmp_path: Path) -> None:
        import fsspec

        class Broken(fsspec.AbstractFileSystem):
            def info(self, path: str, **fields: Any) -> Any:
                raise type("ConnectError", (Exception,), {})("no such host\nand more")

        fsspec.register_implementation("broken", Broken)
        with pytest.raises(ConfigError, match=r"sources\.0\.path: cannot list 'broken://x/y': no such host \("):
            listing_of({"path": "broken://x/y"}, near=tmp_path)


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, Any]]:
    """Options that lead a URI to an object store with the bucket `texts`, and a client to fill it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
        aws_access_key_id="x", aws_secret_access_key="y",
    )  # fmt: skip
    client.create_bucket(Bucket="texts")
    yield f"?endpoint_override=127.0.0.1:{port}&scheme=http", client
    server.stop()
    places._store.cache_clear()


class TestS3:
    @pytest.fixture(autouse=True)
    def credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y"), ("DEFAULT_REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)

    def test_an_object_store_gives_what_the_same_files_here_give(
        self, tmp_path: Path, bucket: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ranges, "PART_BYTES", 1_000)
        options, client = bucket
        (tmp_path / "set" / "sub").mkdir(parents=True)
        write_jsonl(tmp_path / "set" / "train.jsonl", [f"row {n}" for n in range(200)])
        (tmp_path / "set" / "sub" / "a b.txt").write_text("text")
        (tmp_path / "set" / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
        pq.write_table(pa.table({"text": ["p", "q"]}), tmp_path / "set" / "d.parquet")
        for file in sorted((tmp_path / "set").rglob("*.*")):
            client.upload_file(str(file), "texts", file.relative_to(tmp_path).as_posix())

        def found(path: str) -> list[tuple[Any, ...]]:
            return [(u.path, u.start, u.end, u.size, u.split, r) for u, r in records_of(tmp_path, path=path)]

        assert found(f"s3://texts/set{options}") == found("set")
        assert len(found("set")) == 204
        assert found(f"s3://texts/set/**/*.txt{options}") == found("set/**/*.txt")
        assert found(f"s3://texts/set/d.parquet{options}") == found("set/d.parquet")

    def test_a_bucket_or_object_that_is_not_there_is_named(self, tmp_path: Path, bucket: tuple[str, Any]) -> None:
        for path in ("nobucket", "texts/nothing", "nobucket/*.txt"):
            with pytest.raises(ConfigError, match=rf"sources\.0\.path: cannot list 's3://{path[:8]}"):
                listing_of({"path": f"s3://{path}{bucket[0]}"}, near=tmp_path)

    def test_an_object_that_disappears_after_the_listing_is_a_reason(
        self, tmp_path: Path, bucket: tuple[str, Any]
    ) -> None:
        options, client = bucket
        client.put_object(Bucket="texts", Key="gone/a.txt", Body=b"x")
        source = {"path": f"s3://texts/gone{options}"}
        [unit] = listing_of(source, near=tmp_path).units
        client.delete_object(Bucket="texts", Key="gone/a.txt")
        [record] = read_unit(unit, sources_of(source)[0], Reading(), 1_000, "")
        assert record.reason == "unreadable: No such file or directory"


def test_a_web_address_is_read_and_has_no_folders(tmp_path: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    (tmp_path / "a.txt").write_text("from the web")
    (tmp_path / "b.txt.zst").write_bytes(b"no zst")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        assert read(tmp_path, path=f"{here}/a.txt") == ["from the web"]
        assert read(tmp_path, path=f"{here}/b.txt.zst") == ["[bad_zst]"]
        for path, message in (("*.txt", "nothing matches"), ("nothing.txt", "cannot list")):
            with pytest.raises(ConfigError, match=rf"sources\.0\.path: {message} 'http"):
                listing_of({"path": f"{here}/{path}"}, near=tmp_path)
        server.shutdown()


class TestDatasets:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        hub._loaded.cache_clear()

    def folder(self, tmp_path: Path, form: str = "jsonl") -> Path:
        folder = tmp_path / "set"
        folder.mkdir()
        for split in ("train", "validation", "test"):
            table = pa.table({"body": [f"{split} {number}" for number in range(20)]})
            if form == "jsonl":
                write_jsonl(folder / f"{split}.jsonl", table["body"].to_pylist(), key="body")
            elif form == "csv":
                lines = ["body", *table["body"].to_pylist()]
                (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
            else:
                pq.write_table(table, folder / f"{split}.parquet")
        return folder

    # datasets leaves the csv files open that it streams
    @pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "saved"])
    def test_a_dataset_folder_gives_its_rows_split_by_split(self, tmp_path: Path, form: str, streaming: bool) -> None:
        folder = self.folder(tmp_path, form)
        if form == "saved":
            import datasets

            rows = datasets.load_dataset(str(folder))
            folder = tmp_path / "saved"
            rows.save_to_disk(str(folder))
        found = records_of(tmp_path, dataset=str(folder), text="body", streaming=streaming)
        assert [(u.split, r.offset, r.text) for u, r in found] == [
            (own, number, f"{split} {number}")
            for own, split in (("train", "train"), ("val", "validation"), ("test", "test"))
            for number in range(20)
        ]
        gc.collect()  # or the open file would be found in another test, which expects none

    def test_a_column_or_split_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        self.folder(tmp_path)
        with pytest.raises(ConfigError, match=r"sources\.0\.text: set has no column 'bod' \(did you mean 'body'\?\)"):
            listing_of({"dataset": "set", "text": "bod"}, near=tmp_path)
        with pytest.raises(ConfigError, match=r"sources\.0\.dataset: cannot load .* \(.*check config and split\)"):
            listing_of({"dataset": "set", "split": "nope"}, near=tmp_path)
        with pytest.raises(ConfigError, match=r"sources\.0\.dataset: cannot load .*'de' not found"):
            listing_of({"dataset": "set", "config": "de"}, near=tmp_path)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_the_first_rows_of_each_split_are_taken(self, tmp_path: Path, streaming: bool) -> None:
        self.folder(tmp_path)
        source = {"dataset": "set", "text": "body", "streaming": streaming}
        assert read(tmp_path, **source, max_rows=2) == [
            "train 0", "train 1", "validation 0", "validation 1", "test 0", "test 1",
        ]  # fmt: skip
        assert len(read(tmp_path, **source, split="train", max_rows=50)) == 20

    def test_a_stream_is_read_shard_by_shard(self, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        for shard in range(3):
            write_jsonl(tmp_path / "set" / f"train-{shard:05d}-of-00003.jsonl", [f"{shard}-{row}" for row in range(4)])
        found = records_of(tmp_path, dataset="set", streaming=True)
        assert [(u.path, r.offset, r.text) for u, r in found] == [
            (f"train-{shard:05d}-of-00003", row, f"{shard}-{row}") for shard in range(3) for row in range(4)
        ]

    def test_a_dataset_with_train_alone_is_split_by_hash_unless_named(self, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        write_jsonl(tmp_path / "set" / "train.jsonl", ["row"])
        assert listing_of({"dataset": "set"}, near=tmp_path).units[0].split is None
        assert listing_of({"dataset": "set", "split": "train"}, near=tmp_path).units[0].split == "train"

    def test_a_dataset_is_known_again_until_it_changes(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        source = {"dataset": "set", "text": "body"}
        first = listing_of(source, near=tmp_path).units
        assert listing_of(source, near=tmp_path).units == first
        write_jsonl(folder / "train.jsonl", ["other"], key="body")
        assert listing_of(source, near=tmp_path).units[0].version != first[0].version
        assert read(tmp_path, **source)[0] == "other"

    def test_a_row_that_a_stream_cannot_read_is_a_reason(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        with (folder / "test.jsonl").open("a") as file:
            file.write("no json\n")
        found = read(tmp_path, dataset="set", text="body", streaming=True)
        assert found[-1] == "[unreadable]"
        assert found[:40] == [f"{split} {number}" for split in ("train", "validation") for number in range(20)]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_value_that_python_has_no_like_of_is_a_reason(self, tmp_path: Path, streaming: bool) -> None:
        (tmp_path / "set").mkdir()
        pq.write_table(pa.table({"text": pa.array([2**62], pa.timestamp("us"))}), tmp_path / "set" / "train.parquet")
        assert read(tmp_path, dataset="set", streaming=streaming) == ["[unreadable]"]

    def test_a_hub_dataset_without_a_network_is_named_with_the_remedy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        message = r"sources\.0\.dataset: cannot load 'someone/stories': .* \(a hub id needs the network; offline,"
        with pytest.raises(ConfigError, match=message):
            listing_of({"dataset": "someone/stories"}, near=tmp_path)
