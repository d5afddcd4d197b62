"""What comes out of files, whole or in parts, packed or not: texts, rows and books, or the reason why there is none."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus.reading import lines, ranges, streams, tables
from pipelines.corpus.reading.books import epub_html
from pipelines.corpus.reading.read import Reading, cut, read_unit
from pipelines.corpus.stages.html import html_to_text
from tests.source_reading import TEMPLATE, listing_of, read, records_of, sources_of
from ulm import runtime

CORPORA = runtime.variable("ULM_CORPORA")


def blocks(content: bytes, size: int) -> Iterator[bytes]:
    return (content[at : at + size] for at in range(0, len(content), size))


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def reasons(near: Path, **source: Any) -> list[str | None]:
    return [record.reason for _, record in records_of(near, **source)]


# Texts with what matters to the parts: line ends, empty lines, characters of one to four bytes.
TEXTS = st.text(st.sampled_from("ab \t\r\n\n\né€😀"), max_size=60)


class TestPieces:
    @given(TEXTS, st.integers(4, 30), st.integers(1, 9))
    def test_lines_are_those_of_the_whole_for_any_block_size(self, text: str, max_bytes: int, size: int) -> None:
        content = text.encode()
        found = list(lines.lines(blocks(content, size), 0, max_bytes, cut=True))
        assert all(content[offset:].startswith(piece) and len(piece) <= max_bytes for offset, _, _, piece in found)
        joined: dict[int, bytes] = {}
        for _, number, _, piece in found:
            joined[number] = joined.get(number, b"") + piece
        assert list(joined.values()) == content.removesuffix(b"\n").split(b"\n")[: len(joined) or None] * bool(content)
        uncut = [content for *_, content in lines.lines(blocks(content, size), 0, max_bytes, cut=False)]
        assert uncut == [None if len(line) > max_bytes else line for line in joined.values()]

    @given(TEXTS, st.integers(1, 9))
    def test_paragraphs_are_those_of_the_whole_for_any_block_size(self, text: str, size: int) -> None:
        content = text.encode()
        found = list(lines.paragraphs(blocks(content, size), 0, 1_000))
        assert [p.decode() for *_, p in found if p] == [p for p in re.split(r"(?:\r?\n[ \t]*){2,}", text) if p]
        assert lines.split_paragraphs(text) == re.split(r"(?:\r?\n[ \t]*){2,}", text)
        assert all(content[offset:].startswith(paragraph) for offset, _, paragraph in found)

    @pytest.mark.parametrize("blank", [b"\n", b"\n ", b"\n\r", b"\r\n\t"])
    def test_empty_lines_without_end_cost_no_memory_and_part_two_paragraphs(self, blank: bytes) -> None:
        content = b"one\n" + blank * (8 << 20) + b"\ntwo"
        tracemalloc.start()
        try:
            found = [p for p in lines.paragraphs(blocks(content, 1 << 20), 0, 1 << 20) if p[2].strip()]
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()
        assert found == [(0, 0, b"one"), (len(content) - 3, 0, b"two")]
        assert lines.split_paragraphs(content.decode()) == ["one", "two"]

    @given(TEXTS, st.integers(4, 30), st.integers(1, 9))
    def test_pieces_of_a_stream_are_those_of_its_text(self, text: str, max_bytes: int, size: int) -> None:
        found = [piece.decode() for *_, piece in lines.pieces(blocks(text.encode(), size), 0, 0, max_bytes)]
        assert found == (list(cut(text, max_bytes)) or [""])

    @given(st.text(min_size=1), st.integers(1, 9))
    def test_pieces_of_a_long_document_lose_nothing(self, text: str, max_bytes: int) -> None:
        pieces = list(cut(text, max_bytes))
        assert "".join(pieces) == text
        assert all(len(piece.encode()) <= max_bytes or len(piece) == 1 for piece in pieces)

    @pytest.mark.parametrize("rule", ["file", "line", "paragraph"])
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_any_rule_gives_the_same_from_parts_and_from_one_stream(
        self, tmp_path: Path, rule: str, suffix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        generator = random.Random(0)
        text = "\ufeff" + "".join(generator.choices("ab é€\n", k=9_000)) + "x" * 5_000 + "\n\nlast"
        (tmp_path / "whole.txt").write_text(text, encoding="utf-8")
        (tmp_path / "same.txt.gz").write_bytes(gzip.compress(text.encode()))
        expected = read(tmp_path, 1_000, path="whole.txt", document=rule)
        monkeypatch.setattr(ranges, "PART_BYTES", 97)  # ends inside lines, at their ends and inside characters
        monkeypatch.setattr(streams, "BLOCK_BYTES", 61)
        found = records_of(tmp_path, 1_000, path="*.txt" + suffix, document=rule)
        assert [record.text for _, record in found] == expected
        if rule == "file":
            assert "".join(expected) == text[1:]
            assert [record.piece for _, record in found] == list(range(len(expected)))
            assert len({unit.start for unit, _ in found}) == (1 if suffix else len(expected))
        else:
            assert max(record.piece for _, record in found) == 5  # of the long line
        raw = text.encode()
        assert all(raw[3:][r.offset - 3 :].startswith((r.text or "").encode()) for _, r in found) or suffix

    def test_rows_of_parts_are_those_of_the_whole_and_its_lines_are_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        texts = [f"{'é' * (n % 7)} {n}" for n in range(300)]
        (tmp_path / "a.jsonl").write_text(jsonl(*({"text": text} for text in texts)) + "no json\n")
        (tmp_path / "a.tsv").write_text("id\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(texts)))
        monkeypatch.setattr(ranges, "PART_BYTES", 97)
        monkeypatch.setattr(streams, "BLOCK_BYTES", 61)
        assert read(tmp_path, path="a.jsonl") == [*texts, "[bad_json]"]
        assert read(tmp_path, path="a.tsv") == texts
        for name in ("a.jsonl", "a.tsv"):
            units = listing_of({"path": name}, near=tmp_path).units
            assert len(units) > 20
            readings = [Reading() for _ in units]
            for unit, reading in zip(units, readings, strict=True):
                for _ in read_unit(unit, sources_of({"path": name})[0], reading, 1_000, ""):
                    pass
            assert sum(reading.num_lines for reading in readings) == 301

    def test_a_byte_that_is_no_utf8_costs_its_piece_alone(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"a" * 1_500 + b"\xff" + b"a" * 1_499)
        assert reasons(tmp_path, max_bytes=1_000, path="a.txt")[::2] == [None, None]
        assert reasons(tmp_path, max_bytes=1_000, path="a.txt")[1] == (
            "undecodable: byte 1500 is no UTF-8 (another encoding? say encoding: auto)"
        )

    @pytest.mark.parametrize("source", [{}, {"document": "line"}, {"document": "paragraph"}, {"format": "jsonl"}])
    def test_memory_is_bounded_by_pieces_and_not_by_files(self, tmp_path: Path, source: dict[str, str]) -> None:
        with (tmp_path / "a.txt").open("wb") as file:
            for _ in range(48):
                file.write(b"a" * (1 << 20))
        tracemalloc.start()
        try:
            lengths = Counter[int]()
            [section] = sources_of({"path": "a.txt", **source})
            for unit in listing_of({"path": "a.txt", **source}, near=tmp_path, max_bytes=1 << 20).units:
                for record in read_unit(unit, section, Reading(), 1 << 20, ""):
                    lengths[len(record.text or "")] += 1
            assert tracemalloc.get_traced_memory()[1] < 12 << 20 or source.get("format") == "jsonl"
        finally:
            tracemalloc.stop()
        assert lengths == ({0: 1} if source.get("format") == "jsonl" else {1 << 20: 48})

    def test_a_row_beyond_the_bound_is_passed_over_and_its_neighbours_are_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tables, "MAX_WHOLE_BYTES", 1_000)
        monkeypatch.setattr(streams, "BLOCK_BYTES", 64)
        long = {"text": "x" * 5_000}
        (tmp_path / "a.jsonl").write_text(jsonl({"text": "one"}, long, {"text": "two"}))
        assert read(tmp_path, path="a.jsonl") == ["one", "[too_long]", "two"]


class TestEncodings:
    @pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
    def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(self, tmp_path: Path, codec: str) -> None:
        (tmp_path / "a.txt").write_bytes("über 😀\nzwei".encode(codec))
        assert read(tmp_path, path="a.txt") == ["über 😀\nzwei"]
        assert read(tmp_path, path="a.txt", document="line") == ["über 😀", "zwei"]

    @pytest.mark.parametrize("codec", ["latin-1", "cp1252", "utf-16-be", "gb18030", "shift_jis", "utf-7"])
    def test_a_named_encoding_is_read_in_blocks_of_any_size(
        self, tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = "\n".join(["plain", "日本" if codec in ("gb18030", "shift_jis") else "é"] * 40)
        (tmp_path / "a.txt").write_bytes(text.encode(codec))
        monkeypatch.setattr(streams, "BLOCK_BYTES", 7)
        assert read(tmp_path, path="a.txt", encoding=codec) == [text]

    def test_bytes_that_are_not_of_the_named_encoding_are_placed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(streams, "BLOCK_BYTES", 3)
        (tmp_path / "a.txt").write_bytes(b"abcdefg\x80h")
        assert reasons(tmp_path, path="a.txt", encoding="ascii") == ["undecodable: byte 7 is no ascii"]
        (tmp_path / "b.txt").write_bytes("abc".encode("utf-16-le") + b"\x00\xd8")
        assert reasons(tmp_path, path="b.txt", encoding="utf-16-le") == ["undecodable: byte 6 is no utf-16-le"]

    def test_auto_takes_utf8_where_it_is_and_guesses_elsewhere(self, tmp_path: Path) -> None:
        text = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 20
        for codec in ("utf-8", "cp1251", "koi8-r", "utf-16"):
            (tmp_path / f"{codec}.txt").write_bytes(text.encode(codec))
        (tmp_path / "noise.txt").write_bytes(bytes(random.Random(0).choices(range(128, 256), k=400)) + b"\x81\x8d\xff")
        found = dict(
            zip(
                ["cp1251", "koi8-r", "noise", "utf-16", "utf-8"], read(tmp_path, path=".", encoding="auto"), strict=True
            )
        )
        assert found.pop("noise") != text
        assert set(found.values()) == {text}

    def test_rows_in_another_encoding_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes("id,text\n1,é\n".encode("latin-1"))
        assert read(tmp_path, path="a.csv", encoding="latin-1") == ["é"]
        assert reasons(tmp_path, path="a.csv") == [
            "undecodable: byte 0xe9 is no UTF-8 (another encoding? say encoding: auto)"
        ]

    def test_nuls_are_text_and_other_files_are_binary(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"before\0after " * 3)
        (tmp_path / "b.txt").write_bytes(random.Random(0).randbytes(1 << 16))
        (tmp_path / "c.txt").write_bytes(b"%PDF-1.4 and so on")
        (tmp_path / "d.txt").write_bytes("no mark".encode("utf-16-be"))
        (tmp_path / "e.txt").write_bytes(b"")
        (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"\x89PNG\r\n"))
        assert read(tmp_path, path=".") == ["before\0after " * 3, *["[binary]"] * 3, "[empty]", "[binary]"]


class TestCompression:
    @pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zst)])
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.html"])
    def test_a_packed_file_gives_what_it_holds_and_its_digest(
        self, tmp_path: Path, suffix: str, pack: Any, name: str
    ) -> None:
        content = jsonl({"text": "one"}, {"text": "two"}) if name == "a.jsonl" else "text\none\ntwo\n"
        (tmp_path / name).write_text(content)
        (tmp_path / (name + suffix)).write_bytes(pack(content.encode()))
        found, digests = [], set()
        for path in (name, name + suffix):
            [unit] = listing_of({"path": path}, near=tmp_path).units
            reading = Reading()
            found.append(list(read_unit(unit, sources_of({"path": path})[0], reading, 1_000, "")))
            digests.add(reading.hash.hexdigest())
        assert found[0] == found[1] != []
        assert len(digests) == 1

    @given(cut_at=st.integers(0, 400), kind=st.sampled_from(["gz", "zst"]), form=st.sampled_from(["txt", "jsonl"]))
    def test_nothing_is_taken_from_a_torn_file(
        self, tmp_path_factory: pytest.TempPathFactory, cut_at: int, kind: str, form: str
    ) -> None:
        folder = tmp_path_factory.mktemp("torn")
        rows = jsonl(*({"text": random.Random(n).randbytes(8).hex()} for n in range(60))).encode()
        packed = (gzip.compress if kind == "gz" else zst)(rows)
        (folder / f"a.{form}.{kind}").write_bytes(packed[: min(cut_at, len(packed) - 1)])
        [reason] = reasons(folder, path=".")
        assert (
            reason == "empty"
            if cut_at == 0
            else (reason or "").startswith("bad_gzip: " if kind == "gz" else "bad_zst: ")
        )

    def test_a_flipped_bit_is_found(self, tmp_path: Path) -> None:
        packed = bytearray(gzip.compress(b"some text " * 100))
        packed[-6] ^= 1  # in the checksum
        (tmp_path / "a.txt.gz").write_bytes(packed)
        (tmp_path / "b.txt.gz").write_text("no gzip")
        (tmp_path / "c.txt.zst").write_text("no zst")
        found = [(reason or "").split(":")[0] for reason in reasons(tmp_path, path=".")]
        assert found == ["bad_gzip", "bad_gzip", "bad_zst"]

    @pytest.mark.parametrize("kind", ["gz", "zst"])
    def test_a_bomb_is_told_before_it_is_unpacked(self, tmp_path: Path, kind: str) -> None:
        content = b"a" * (40 << 20)
        (tmp_path / f"a.txt.{kind}").write_bytes(gzip.compress(content) if kind == "gz" else zst(content))
        tracemalloc.start()
        try:
            assert reasons(tmp_path, path=".") == ["bomb: expands more than 200 fold"]
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()

    def test_a_small_text_may_be_packed_as_tightly_as_it_can(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 1_000_000))
        assert read(tmp_path, path=".") == ["a" * 1_000_000]


class TestTables:
    def test_csv_is_read_strictly_row_by_row(self, tmp_path: Path) -> None:
        rows = ['id,text\r\n1,"two\nlines"\r\n2,"a ""quote"""\r\n3,"torn"x\r\n\r\n4,a,b\r\n5,last', "\r\n"]
        (tmp_path / "a.csv").write_text("\ufeff" + "".join(rows), newline="", encoding="utf-8")
        found = [(r.offset, r.line, r.text or r.reason) for _, r in records_of(tmp_path, path="a.csv")]
        assert found == [
            (0, 3, "two\nlines"), (1, 4, 'a "quote"'), (2, 5, "bad_csv: ',' expected after '\"'"),
            (3, 7, "bad_csv: a row of 3 for 2 columns"), (4, 8, "last"),
        ]  # fmt: skip

    def test_a_quote_that_never_ends_is_one_fault(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text('text\nfine\n"open\nrest\n')
        assert reasons(tmp_path, path="a.csv") == [None, "bad_csv: unexpected end of data"]

    def test_a_field_may_be_longer_than_the_csv_module_allows_by_default(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
        assert [len(text) for text in read(tmp_path, 90_000, path="a.csv")] == [90_000, 90_000, 20_000]

    def test_tsv_knows_no_quotes(self, tmp_path: Path) -> None:
        (tmp_path / "a.tsv").write_text('text\tn\r\n"half\t1\r\nshort\r\n')
        assert read(tmp_path, path="a.tsv") == ['"half', "[bad_tsv]"]

    @pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
    def test_columns_are_named_for_files_without_a_header(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("1,one\n2,two\n".replace(",", "," if name == "a.csv" else "\t"))
        assert read(tmp_path, path=name, columns=["id", "text"]) == ["one", "two"]
        assert reasons(tmp_path, path=name) == ["no_text: no column 'text' among 1, one"]

    def test_a_reason_is_valid_and_short_whatever_keys_a_file_has(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"\\ud800": 1}\n' + jsonl({"k" * 3_000_000: 1}))
        (tmp_path / "b.csv").write_bytes(b"te\xffxt,b\n1,2\n")
        (tmp_path / "c.tsv").write_bytes(b"te\xffxt\tb\n1\t2\n")
        found = [reason or "" for reason in reasons(tmp_path, path=".")]
        assert found[0] == "no_text: no 'text' among \\ud800"
        assert (len(found[1]), found[1][-2:]) == (300, "k…")
        assert found[2:] == ["no_text: no column 'text' among te\\xffxt, b"] * 2

    def test_a_json_array_is_one_fault_with_its_remedy(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(json.dumps([{"text": "x"}] * 3, indent=1))
        (tmp_path / "b.json").write_text(json.dumps([{"text": "x"}] * 3))
        remedy = "a JSON array must become one object a line, as by jq -c '.[]'"
        assert reasons(tmp_path, path=".", format="jsonl") == [
            f"bad_json: {remedy}", f"bad_json: a list where an object should be ({remedy})",
        ]  # fmt: skip

    def test_rows_that_are_no_text_say_what_they_are(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(
            jsonl({"text": "good"}, {"id": 1}, {"text": None}, 3, {"text": "\ud800"})
            + "\n"
            + '{"text": '
            + "[" * 99_999
        )
        assert reasons(tmp_path, path="a.jsonl") == [
            None, "no_text: no 'text' among id", "text_not_string: NoneType",
            "bad_json: a int where an object should be", "undecodable: a lone surrogate", "empty",
            "bad_json: nested too deep",
        ]  # fmt: skip

    def test_a_long_text_of_a_row_is_cut_and_counted(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(jsonl({"text": "äöü" * 100}, {"text": "short"}))
        found = [(r.piece, len((r.text or "").encode())) for _, r in records_of(tmp_path, 255, path="a.jsonl")]
        assert found == [(0, 254), (1, 254), (2, 92), (0, 5)]

    def test_each_document_rule_gives_its_own_documents(self, tmp_path: Path) -> None:
        text = "one\n\ntwo\nstill two\r\n \r\nthree\n"
        (tmp_path / "a.txt").write_bytes(text.encode())
        (tmp_path / "r.jsonl").write_text(jsonl({"text": text}))

        def found(name: str, document: str) -> list[tuple[int, str | None]]:
            return [(r.offset, r.text) for _, r in records_of(tmp_path, path=name, document=document)]

        assert found("a.txt", "file") == [(0, text)]
        assert found("a.txt", "paragraph") == [(0, "one"), (5, "two\nstill two"), (23, "three\n")]
        assert found("a.txt", "line") == [(0, "one"), (5, "two"), (9, "still two\r"), (23, "three")]
        assert found("r.jsonl", "paragraph") == [(0, "one"), (0, "two\nstill two"), (0, "three\n")]

    def test_parquet_rows_are_read_a_few_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = ["x" * 1_000 + str(n) for n in range(500)]
        pq.write_table(pa.table({"id": range(500), "text": texts}), tmp_path / "a.parquet")
        sizes: list[int] = []
        plain = pq.ParquetFile.iter_batches

        def counted(*args: Any, **fields: Any) -> Iterator[Any]:
            for batch in plain(*args, **fields):
                sizes.append(batch.num_rows)
                yield batch

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
        monkeypatch.setattr(tables, "BATCH_BYTES", 50_000)
        assert read(tmp_path, path="a.parquet") == texts
        assert len(sizes) >= 10

    @pytest.mark.parametrize("column", ["text", "messages"])
    def test_parquet_rows_that_share_one_long_value_are_not_held_together(self, tmp_path: Path, column: str) -> None:
        long = "x" * 1_000_000
        values = [long if column == "text" else [{"role": "user", "content": long}]] * 100
        pq.write_table(pa.table({column: values}), tmp_path / "a.parquet")
        assert (tmp_path / "a.parquet").stat().st_size < 100_000
        [unit] = listing_of({"path": "."}, near=tmp_path).units
        [source] = sources_of({"path": ".", column: column})
        tracemalloc.start()
        held = pa.total_allocated_bytes()
        try:
            for number, (row, _, _) in enumerate(tables.parquet_rows(unit, source)):
                assert row == number
                assert pa.total_allocated_bytes() - held < 16 << 20
            assert number == 99
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize(
        ("column", "reason"),
        [
            (pa.array([2**62], pa.timestamp("us")), "text_not_string: timestamp"),
            (pa.array([2**62], pa.duration("s")), "text_not_string: duration"),
            (pa.array([1], pa.timestamp("us", tz="Nowhere/Bad")), "text_not_string: timestamp"),
            (pa.array([{"a": 1}]), "text_not_string: struct"),
            (pa.array([b"x"]), "text_not_string: binary"),
            (pa.nulls(2), "text_not_string: null"),
        ],
        ids=str,
    )
    def test_a_parquet_column_of_another_type_is_refused_by_its_type(
        self, tmp_path: Path, column: Any, reason: str
    ) -> None:
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        assert reasons(tmp_path, path=".") == [reason]

    @pytest.mark.parametrize(
        "kind",
        [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()), pa.json_()],
        ids=str,
    )
    def test_every_string_type_of_parquet_is_text(self, tmp_path: Path, kind: Any) -> None:
        texts = pa.array(["one", None, "two"], kind)
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
        assert read(tmp_path, path=".") == ["one", "[text_not_string]", "two"]

    def test_a_parquet_file_whose_columns_or_values_cannot_be_told_is_one_fault(self, tmp_path: Path) -> None:
        pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet")
        assert reasons(tmp_path, path=".") == ["bad_parquet: several columns 'text'"]
        pq.write_table(pa.table({"m": [pa.scalar(2**62, pa.duration("s"))]}), tmp_path / "a.parquet")
        [reason] = reasons(tmp_path, path=".", messages="m")
        assert (reason or "").startswith("bad_parquet: ")

    def test_torn_parquet_and_missing_columns_are_one_fault_each(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"body": ["x", "y"]}), tmp_path / "wrong.parquet")
        (tmp_path / "torn.parquet").write_bytes((tmp_path / "wrong.parquet").read_bytes()[:-30])
        (tmp_path / "void.parquet").write_bytes(b"")
        pq.write_table(pa.table({"text": pa.array(["good", None])}), tmp_path / "a.parquet")
        assert read(tmp_path, path=".") == ["good", "[text_not_string]", "[bad_parquet]", "[bad_parquet]", "[no_text]"]


class TestPairsAndChats:
    def test_a_pair_keeps_its_two_texts_together(self, tmp_path: Path) -> None:
        (tmp_path / "a.tsv").write_text("house\tHaus\nlong\t" + "x" * 100 + "\n", encoding="utf-8")
        source = {"path": "a.tsv", "columns": ["en", "de"], "source": "en", "target": "de"}
        found = [(r.text, r.target, r.reason) for _, r in records_of(tmp_path, 50, **source)]
        assert found == [("house", "Haus", None), (None, None, "too_long: a pair is not cut")]
        (tmp_path / "a.jsonl").write_text(jsonl({"en": "x", "de": None}, {"en": "x"}, {"en": "", "de": "y"}))
        rows = records_of(tmp_path, path="a.jsonl", source="en", target="de")
        assert [(r.text, r.reason) for _, r in rows] == [
            (None, "text_not_string: NoneType"), (None, "no_text: no 'de' among en"), ("", None),
        ]  # fmt: skip

    @pytest.mark.parametrize("form", ["jsonl", "parquet"])
    def test_a_chat_becomes_its_transcript(self, tmp_path: Path, form: str) -> None:
        chats = [
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Why?"}],
        ]
        if form == "jsonl":
            (tmp_path / "a.jsonl").write_text(jsonl(*({"messages": chat} for chat in chats)))
        else:
            pq.write_table(pa.table({"messages": chats}), tmp_path / "a.parquet")
        assert read(tmp_path, path=f"a.{form}", messages="messages") == [
            "user: Hi\nassistant: Hello\n", "system: Be brief\nuser: Why?\n",
        ]  # fmt: skip

    def test_other_names_of_the_roles_are_understood(self, tmp_path: Path) -> None:
        turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
        (tmp_path / "a.jsonl").write_text(jsonl({"conversations": turns}))
        assert read(tmp_path, path=".", messages="conversations") == ["system: s\nuser: h\nassistant: g\n"]

    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            ("text", "bad_messages: str where a list should be"),
            ([], "bad_messages: an empty list"),
            (["text"], "bad_messages: a message is str, not role and content"),
            ([{"role": "user"}], "bad_messages: role is str, content is NoneType"),
            ([{"role": "user", "content": "\ud800"}], "undecodable: a lone surrogate"),
            ([{"role": "user", "content": "x" * 100}], "too_long: a chat is not cut"),
        ],
    )
    def test_what_is_no_chat_says_why(self, tmp_path: Path, messages: Any, reason: str) -> None:
        (tmp_path / "a.jsonl").write_text(jsonl({"m": messages}, {"n": 1}))
        expected = [reason, "no_text: no 'm' among n"]
        assert reasons(tmp_path, max_bytes=50, path=".", messages="m") == expected


def book(chapters: dict[str, bytes], *, spine: list[str] | None = None, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An EPUB of chapters, in the order of `spine`."""
    container = '<container><rootfiles><rootfile full-path="OPS/book.opf"/></rootfiles></container>'
    items = "".join(f'<opf:item id="{name}" href="{name}%20x.xhtml"/>' for name in chapters)
    order = "".join(f'<opf:itemref idref="{name}"/>' for name in (spine or list(chapters)))
    package = f"<opf:package><opf:manifest>{items}</opf:manifest><opf:spine>{order}</opf:spine></opf:package>"
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as file:
        file.writestr("META-INF/container.xml", container)
        file.writestr("OPS/book.opf", package)
        file.writestr("../../outside.txt", "x")
        for name, content in chapters.items():
            file.writestr(f"OPS/{name} x.xhtml", content)
    return sink.getvalue()


def page(text: str) -> bytes:
    head = '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/><script src="x"/></head>'
    return f'{head}<body class="c"><script src="y"/><p>{text}</p></body></html>'.encode()


def pdf(*texts: str, trailer: str = "") -> bytes:
    """A PDF with a page per text."""
    objects = ["<</Type/Catalog/Pages 2 0 R>>", ""]
    for text in texts:
        stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET"
        font = "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 200]/Contents {len(objects) + 2} 0 R"
            f"/Resources<</Font<</F1 {font}>>>>>>"
        )
        objects.append(f"<</Length {len(stream)}>>stream\n{stream}\nendstream")
    kids = " ".join(f"{number} 0 R" for number in range(3, len(objects) + 1, 2))
    objects[1] = f"<</Type/Pages/Kids[{kids}]/Count {len(texts)}>>"
    out, starts = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        starts.append(len(out))
        out += f"{number} 0 obj{content}endobj\n".encode()
    table = "".join(f"{start:010d} 00000 n \n" for start in starts)
    size = len(objects) + 1
    ends = f"trailer<</Size {size}/Root 1 0 R{trailer}>>\nstartxref\n{len(out)}\n%%EOF"
    return out + f"xref\n0 {size}\n0000000000 65535 f \n{table}{ends}".encode()


class TestBooks:
    def test_an_epub_gives_its_chapters_in_reading_order(self, tmp_path: Path) -> None:
        chapters = {"b": page("Second &amp; last."), "a": "\ufeff".encode() + page("First, é.")}
        (tmp_path / "a.epub").write_bytes(book(chapters, spine=["a", "b"]))
        [text] = read(tmp_path, path="a.epub")
        [(plain, reason)] = html_to_text([text])
        assert reason is None
        assert plain.split() == ["First,", "é.", "Second", "&", "last."]
        assert sorted(path.name for path in tmp_path.parent.rglob("outside*")) == []

    def test_a_broken_epub_says_why(self, tmp_path: Path) -> None:
        good = book({"a": page("x")})
        (tmp_path / "a.epub").write_bytes(good[:200])
        (tmp_path / "b.epub").write_bytes(book({"a": page("x")}, spine=["a", "z"]))
        (tmp_path / "c.epub").write_bytes(good.replace(b"a x.xhtml", b"a y.xhtml"))
        (tmp_path / "d.epub").write_bytes(book({"a": b"\xff\xfe\xfd"}))
        (tmp_path / "e.epub").write_bytes(b"")
        found = reasons(tmp_path, path=".")
        assert found[:3] == [
            "bad_epub: File is not a zip file", "bad_epub: no file for the chapter 'z'",
            "bad_epub: there is no 'OPS/a x.xhtml' in it",
        ]  # fmt: skip
        assert (found[3] or "").startswith("undecodable: 'OPS/a x.xhtml': ")
        assert found[4] == "empty"

    @pytest.mark.parametrize("name", ["unicode_escape", "utf-7", "idna", "hex", "punycode"])
    def test_a_book_in_an_encoding_that_no_book_has_is_refused(self, tmp_path: Path, name: str) -> None:
        chapter = f'<?xml version="1.0" encoding="{name}"?><body>hi \\ud800 +2AA- there</body>'.encode()
        (tmp_path / "a.epub").write_bytes(book({"a": chapter}))
        assert reasons(tmp_path, path=".") == [f"undecodable: 'OPS/a x.xhtml': no encoding {name!r} in a book"]

    @pytest.mark.parametrize("name", ["utf-8", "UTF-16", "latin-1", "windows-1252"])
    def test_a_book_in_an_encoding_that_books_have_is_read(self, tmp_path: Path, name: str) -> None:
        chapter = f'<?xml version="1.0" encoding="{name}"?><body>é</body>'.encode(name)
        (tmp_path / "a.epub").write_bytes(book({"a": chapter}))
        assert read(tmp_path, path=".") == ["<html><body><div>é</div></body></html>"]

    @pytest.mark.parametrize("package", [b"<![foo[ x ]]><package>", b"<![ %x;[<package>"])
    def test_a_book_whose_package_is_no_xml_says_so(self, tmp_path: Path, package: bytes) -> None:
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w") as file:
            file.writestr("META-INF/container.xml", '<rootfile full-path="book.opf"/>')
            file.writestr("book.opf", package)
        (tmp_path / "a.epub").write_bytes(sink.getvalue())
        [reason] = reasons(tmp_path, path=".")
        assert (reason or "").startswith("bad_epub: ")

    @pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])
    def test_a_damaged_book_gives_a_text_or_a_reason(self, method: int) -> None:
        generator = random.Random(method)
        whole = book({"a": page("text")}, method=method)
        for _ in range(300):
            damaged = bytearray(whole)
            for _ in range(generator.randint(1, 20)):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            try:
                epub_html(bytes(damaged)).encode()
            except streams.UnusableError as fault:
                assert str(fault).partition(":")[0] in ("bad_epub", "undecodable", "bomb")

    def test_an_epub_bomb_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "a.epub").write_bytes(book({"a": page("x" * (17 << 20))}))
        assert reasons(tmp_path, path=".") == ["bomb: expands more than 200 fold"]

    def test_a_pdf_gives_its_pages_with_empty_lines_between(self, tmp_path: Path) -> None:
        (tmp_path / "a.pdf").write_bytes(pdf("First page", "Second page"))
        assert read(tmp_path, path="a.pdf") == ["First page\n\nSecond page"]

    def test_a_pdf_without_text_or_that_cannot_be_opened_says_why(self, tmp_path: Path) -> None:
        locked = "/Encrypt<</Filter/Standard/V 1/R 2/O(" + "x" * 32 + ")/U(" + "y" * 32 + ")/P -4>>/ID[(a)(a)]"
        (tmp_path / "a.pdf").write_bytes(pdf("Secret", trailer=locked))
        (tmp_path / "b.pdf").write_bytes(b"%PDF-1.4 torn")
        (tmp_path / "c.pdf").write_bytes(pdf(""))
        found = reasons(tmp_path, path=".")
        assert [(reason or "").split(":")[0] for reason in found] == ["bad_pdf", "bad_pdf", "no_text"]
        assert "password" in (found[0] or "").lower()

    def test_html_is_given_whole_to_be_cut_as_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.html").write_text("<p>" + "x" * 5_000)
        (tmp_path / "b.jsonl").write_text(jsonl({"text": "<p>" + "x" * 5_000}))
        for source in ({"path": "a.html"}, {"path": "b.jsonl", "html": True}):
            assert [len(text) for text in read(tmp_path, 1_000, **source)] == [5_003]

    def test_a_page_beyond_the_bound_is_passed_over(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streams, "MAX_WHOLE_BYTES", 1_000)
        (tmp_path / "a.html").write_text("<p>" + "x" * 5_000)
        (tmp_path / "b.epub").write_bytes(random.Random(0).randbytes(2_000))
        assert read(tmp_path, path=".") == ["[too_long]", "[too_long]"]


def test_a_file_that_disappears_or_shrinks_after_the_listing_is_a_reason(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.parquet", "d.csv", "e.epub", "f.txt.gz", "g.pdf", "h.txt"):
        (tmp_path / name).write_bytes(b"x" * 3_000)
    [source] = sources_of({"path": "."})
    units = listing_of({"path": "."}, near=tmp_path, max_bytes=2_000).units
    for name in ("a.txt", "b.jsonl", "c.parquet", "d.csv", "e.epub", "f.txt.gz", "g.pdf"):
        (tmp_path / name).unlink()
    (tmp_path / "h.txt").write_bytes(b"x" * 2_500)
    found = [(u.path, r.reason) for u in units for r in read_unit(u, source, Reading(), 2_000, TEMPLATE)]
    assert found[-2:] == [("h.txt", None), ("h.txt", "unreadable: the file became shorter while it was read")]
    assert {reason for _, reason in found[:-2]} == {"unreadable: No such file or directory"}
    assert len(found) == 10  # a.txt and h.txt are two units


@pytest.mark.parametrize(
    ("name", "source"), [("a.txt", {"document": "line"}), ("a.jsonl", {}), ("a.tsv", {"columns": ["text"]})]
)
def test_parts_of_lines_that_their_file_no_longer_has_are_reasons(
    tmp_path: Path, name: str, source: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "PART_BYTES", 1_000)
    (tmp_path / name).write_text('{"text": "row"}\n' * 200)
    units = listing_of({"path": name, **source}, near=tmp_path).units
    (tmp_path / name).write_text('{"text": "row"}\n' * 100)
    section = sources_of({"path": name, **source})[0]
    found = [{r.reason for r in read_unit(u, section, Reading(), 1_000, "")} for u in units]
    shorter = "unreadable: the file became shorter while it was read"
    assert found == [{None}, {None, shorter}, {shorter}, {shorter}]


def test_the_digest_is_that_of_the_content_and_not_of_its_parts_reader(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.txt").write_text("a")
    digests = []
    for unit in listing_of({"path": "."}, near=tmp_path).units:
        reading = Reading()
        list(read_unit(unit, sources_of({"path": "."})[0], reading, 1_000, ""))
        digests.append(reading.hash.hexdigest())
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.skipif(CORPORA is None, reason="ULM_CORPORA is not set")
class TestSharedDirtyFiles:
    def found(self, path: str, **source: Any) -> dict[str, list[str]]:
        """Reasons up to the first colon, `ok` for texts, of each file below a folder."""
        by_path: dict[str, list[str]] = {}
        for unit, record in records_of(Path(f"{CORPORA}/dirty"), path=path, **source):
            by_path.setdefault(unit.path, []).append("ok" if record.reason is None else record.reason.split(":")[0])
        return by_path

    def expected(self) -> dict[str, str]:
        lines = Path(f"{CORPORA}/dirty/EXPECTED.tsv").read_text(encoding="utf-8").splitlines()[1:]
        return {path: expectation for path, line, expectation in (row.split("\t") for row in lines) if not line}

    def test_no_file_raises_and_each_gives_a_text_or_a_reason(self) -> None:
        folders = [path.name for path in Path(f"{CORPORA}/dirty").iterdir() if path.is_dir()]
        assert len(folders) == 15
        for folder in folders:
            for source in ({}, {"document": "line"}) if folder in ("size", "unicode", "encodings") else ({},):
                unread = {"format": "jsonl"} if folder == "json_test_suite" else {}
                found = self.found(folder, **source, **unread)
                assert found
                if not source:
                    assert all(found.values())

    def test_each_text_that_is_no_utf8_says_the_byte_that_is_expected(self) -> None:
        wrong = {path: text for path, text in self.expected().items() if text.startswith("INVALID UTF-8")}
        assert len(wrong) > 30
        found = {
            f"{folder}/{unit.path}": record.reason
            for folder in ("encodings", "invalid_utf8")
            for unit, record in records_of(Path(f"{CORPORA}/dirty"), path=folder)
        }
        for path, expectation in wrong.items():
            assert (found[path] or "").startswith("undecodable: byte "), path
            if place := re.search(r"offset (\d+)", expectation):
                assert f"byte {place[1]} is" in (found[path] or "") or path.endswith("Unicode.txt")
        valid = [path for path, text in self.expected().items() if text.startswith("valid UTF-8") and "/udhr" in path]
        assert [path for path in valid if found[path] is not None] == ["encodings/udhr_Hungarian_Magyar-Unicode.txt"][
            :0
        ]

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("size/empty.txt", ["empty"]),
            ("size/one_byte.txt", ["ok"]),
            ("size/one_line_2mb.txt", ["ok"]),
            ("encodings/utf8_bom.txt", ["ok"]),
            ("encodings/utf16le_bom.txt", ["ok"]),
            ("encodings/utf32le.txt", ["ok"]),
            ("encodings/utf16be_nobom.txt", ["binary"]),
            ("encodings/cp1252_smart_quotes.txt", ["undecodable"]),
            ("invalid_utf8/cut_in_middle.txt", ["ok"]),
            ("unicode/nul_bytes.txt", ["ok"]),
            ("unicode/line_separators.txt", ["ok"]),
            ("binary/random.txt", ["binary"]),
            ("binary/png_header.txt", ["binary"]),
            ("binary/gzip_named.txt", ["binary"]),
            ("binary/truncated.txt.gz", ["bad_gzip"]),
            ("binary/not_gzip.jsonl.gz", ["bad_gzip"]),
            ("binary/bomb_50mb.txt.gz", ["bomb"]),
            ("jsonl/bom.jsonl", ["ok"]),
            ("jsonl/crlf.jsonl", ["ok"] * 10),
            ("jsonl/invalid_utf8.jsonl", ["ok", "undecodable", "ok"]),
            ("jsonl/deep_nesting.jsonl", ["bad_json"]),
            ("jsonl/no_text_field.jsonl", ["no_text"] * 2),
            ("jsonl/one_record_1mb.jsonl", ["ok"]),
            ("tabular/embedded_newlines.csv", ["ok", "ok", "bad_csv", "bad_csv"]),
            ("tabular/no_text_column.parquet", ["no_text"]),
            ("tabular/nulls.parquet", ["text_not_string", "ok", "ok", "ok"]),
            ("tabular/truncated.parquet", ["bad_parquet"]),
        ],
    )
    def test_a_file_ends_as_expected(self, path: str, expected: list[str]) -> None:
        assert list(self.found(path).values()) == [expected]

    def test_what_is_not_read_is_named(self) -> None:
        near = Path(f"{CORPORA}/dirty")
        ignored = {
            f"{folder}/{i.path}": i.reason
            for folder in ("binary", "jsonl", "names")
            for i in listing_of({"path": folder}, near=near).ignored
        }
        assert ignored == dict.fromkeys(
            ("binary/zip_slip.zip", "jsonl/json_array.json", "names/noextension"), "unknown_format"
        )

    def test_lines_of_a_file_of_many_encodings_are_told_apart(self) -> None:
        found = self.found("encodings/mixed_per_line.txt", document="line")
        assert Counter(*found.values()) == {"ok": 100, "undecodable": 100}

    def test_the_lines_of_a_file_are_newlines_and_nothing_else(self) -> None:
        assert self.found("unicode/line_separators.txt", document="line") == {"line_separators.txt": ["ok"] * 10}
        assert self.found("size/only_newlines.txt", document="line") == {}

    def test_mixed_bad_lines_are_refused_by_number(self) -> None:
        [found] = self.found("jsonl/mixed_bad_lines.jsonl").values()
        valid = {14, 16, 26, 30, *range(1, 45, 2)}  # empty ones are for cleaning; a doubled key and a NUL are valid
        assert {number for number, reason in enumerate(found, 1) if reason == "ok"} == valid
        assert found[27] == "undecodable"

    def test_every_column_of_corrupt_parquet_files_is_survived(self) -> None:
        for file in sorted(Path(f"{CORPORA}/dirty/parquet_bad").iterdir()):
            try:
                columns = pq.read_schema(file).names
            except (pa.ArrowException, OSError):
                columns = ["text"]
            for column in columns:
                assert set(self.found(f"parquet_bad/{file.name}", text=column)[file.name]) <= {
                    "ok", "bad_parquet", "no_text", "text_not_string",
                }  # fmt: skip

    def test_guessed_encodings_read_most_of_the_declarations(self) -> None:
        found = self.found("encodings", encoding="auto")
        unread = {path for path, reason in found.items() if reason != ["ok"]}
        assert len(found) - len(unread) >= 40
        assert {"mixed_per_line.txt", "utf16be_nobom.txt"} <= unread
