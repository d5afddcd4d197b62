"""One part of a build: some units read, cleaned and fingerprinted, stored as a folder of its own.

A part is a pure function of its units and the recipe, and it appears whole or not at all, so that a build that was
killed goes on from the parts that are there.

    rows.arrow       a row per record read, and a last row per unit (ROWS)
    texts.arrow      the text of each row that is a document (TEXTS)
    signatures.bin   MinHash signatures of the documents, [documents, hashes] of uint32
    account.json     what each stage took in and gave out, and some texts it dropped
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.corpus.dedup import KEY_BYTES, content_id, content_key
from pipelines.corpus.near import NUM_HASHES, signatures
from pipelines.corpus.reading.chats import MARK
from pipelines.corpus.reading.read import Reading, Record, cut, read_unit
from pipelines.corpus.reading.unit import Unit, is_html
from pipelines.corpus.stages import Stage, stages_of
from pipelines.corpus.stages.html import html_to_text
from ulm import artefacts
from ulm.recipes.corpus import Clean, Source

ROWS = pa.schema(
    [
        ("unit", pa.int32()),
        ("offset", pa.int64()),
        ("line", pa.int32()),
        ("piece", pa.int32()),  # of a document that was cut, from 0
        ("key", pa.binary(KEY_BYTES)),  # null for what is no document
        ("id", pa.binary(KEY_BYTES)),
        ("num_bytes", pa.int64()),
        ("reason", pa.string()),  # null for documents
        ("digest", pa.string()),  # of the unit, on its last row alone, whose `line` is the unit's number of lines
    ]
)
TEXTS = pa.schema(
    [("row", pa.int64()), ("text", pa.large_string()), ("source_chars", pa.int64()), ("is_chat", pa.bool_())]
)
BATCH_BYTES, BATCH_ROWS = 1 << 20, 1_000  # that go through the stages at once, of text and of rows
MAX_SAMPLES, SAMPLE_CHARS = 3, 500  # dropped texts kept for reading, of each reason in each part
_LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass
class Tally:
    """What one stage did to documents."""

    num_in: int = 0
    num_out: int = 0
    num_changed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cpu_seconds: float = 0.0

    def add(self, other: dict[str, Any]) -> None:
        """Add the tally of another part, as `as_json` gives it."""
        self.num_in += other["in"]
        self.num_out += other["out"]
        self.num_changed += other["changed"]
        self.dropped.update(other["dropped"])
        self.cpu_seconds += other["cpu_seconds"]

    def as_json(self) -> dict[str, Any]:
        """As reports and manifests have it."""
        return {
            "in": self.num_in,
            "out": self.num_out,
            "changed": self.num_changed,
            "dropped": dict(sorted(self.dropped.items())),
            "cpu_seconds": round(self.cpu_seconds, 4),
        }


@dataclass
class _Document:
    """A record on its way through the stages: one text, or the two of a pair."""

    row: int
    texts: list[str]
    is_chat: bool

    @property
    def content(self) -> str:
        """What it says, by which it is known again."""
        text = "\n".join(self.texts)
        return text.replace(MARK, "") if self.is_chat else text


class _Cleaner:
    """Takes records, runs the stages over batches of them, writes rows, texts and signatures, keeps the account.

    It holds one batch, however much a part has: a large file of a format that cannot be parted is one unit.
    """

    def __init__(self, folder: Path, stages: Sequence[Stage], clean: Clean) -> None:
        self.stages, self.clean = list(stages), clean
        self.tallies = {name: Tally() for name in ("read", "html", *(stage.name for stage in stages))}
        self.samples: dict[str, list[dict[str, Any]]] = {}
        self.num_rows = self.num_documents = self.num_unreadable = 0
        self._files = ExitStack()
        self._rows = self._files.enter_context(_writer(folder / "rows.arrow", ROWS))
        self._texts = self._files.enter_context(_writer(folder / "texts.arrow", TEXTS))
        self._signatures = self._files.enter_context((folder / "signatures.bin").open("wb"))
        self._pending: list[list[Any]] = []  # rows whose fate is not known before their batch is through
        self._waiting: list[_Document] = []
        self._filled = 0

    def close(self) -> None:
        """Run what is waiting, and finish the files."""
        self.flush()
        self._files.close()

    def add(self, number: int, unit: Unit, record: Record, html: bool) -> None:
        """The next record of a unit. HTML becomes text first, for only then is it known whether it must be cut."""
        if html and record.text is not None:
            self._add_html(number, unit, record)
        else:
            self._add(number, unit, record)

    def _add_html(self, number: int, unit: Unit, record: Record) -> None:
        assert record.text is not None
        sides = [record.text] if record.target is None else [record.text, record.target]
        tally = self.tallies["html"]
        start = time.process_time()
        verdicts = html_to_text(sides)
        tally.cpu_seconds += time.process_time() - start
        tally.num_in += 1
        if (reason := next((reason for _, reason in verdicts if reason is not None), None)) is not None:
            self._add(number, unit, replace(record, text=None, target=None, reason=reason), self.tallies["html"])
            return
        tally.num_out += 1
        tally.num_changed += 1
        if record.target is not None:
            self._add(number, unit, replace(record, text=verdicts[0][0], target=verdicts[1][0]))
            return
        for piece, text in enumerate(cut(verdicts[0][0], self.clean.max_document_bytes)):
            self._add(number, unit, replace(record, text=text, piece=piece))

    def _add(self, number: int, unit: Unit, record: Record, dropped_by: Tally | None = None) -> None:
        tally = self.tallies["read"]
        tally.num_in += 1
        reason = record.reason
        self._pending.append([number, record.offset, record.line, record.piece, None, None, 0, reason, None])
        if record.text is None:
            assert reason is not None
            self.num_unreadable += reason.startswith("unreadable")
            (dropped_by or tally).dropped[reason.partition(":")[0]] += 1
            tally.num_out += dropped_by is not None
            return
        tally.num_out += 1
        texts = [record.text] if record.target is None else [record.text, record.target]
        self._waiting.append(_Document(len(self._pending) - 1, texts, record.is_chat))
        self._filled += sum(map(len, texts))
        if self._filled >= BATCH_BYTES or len(self._pending) >= BATCH_ROWS:
            self.flush()

    def end_unit(self, number: int, reading: Reading) -> None:
        """A unit is read."""
        self._pending.append([number, 0, reading.num_lines, 0, None, None, 0, None, reading.hash.hexdigest()])

    def flush(self) -> None:
        """Run the stages over what is waiting, and write all rows up to here."""
        alive, self._waiting, self._filled = self._waiting, [], 0
        for stage in self.stages:
            alive = self._apply(stage, alive)
        self._keep(alive)
        self._rows.write_batch(_batch(ROWS, self._pending))
        self.num_rows += len(self._pending)
        self._pending = []

    def _apply(self, stage: Stage, documents: list[_Document]) -> list[_Document]:
        """One stage over documents; a pair goes when one of its texts does."""
        tally = self.tallies[stage.name]
        start = time.process_time()
        verdicts = iter(stage.apply([text for document in documents for text in document.texts]))
        tally.cpu_seconds += time.process_time() - start
        alive = []
        for document in documents:
            found = [next(verdicts) for _ in document.texts]
            reason = next((reason for _, reason in found if reason is not None), None)
            if reason is not None:
                self._drop(document, reason, tally)
                continue
            texts = [text for text, _ in found]
            tally.num_changed += texts != document.texts
            document.texts = texts
            alive.append(document)
        tally.num_in += len(documents)
        tally.num_out += len(alive)
        return alive

    def _drop(self, document: _Document, reason: str, tally: Tally) -> None:
        self._pending[document.row][7] = reason
        tally.dropped[reason] += 1
        text = "\n".join(document.texts)
        if text.strip() and len(kept := self.samples.setdefault(reason, [])) < MAX_SAMPLES:
            kept.append({"unit": self._pending[document.row][0], "text": text[:SAMPLE_CHARS]})

    def _keep(self, documents: list[_Document]) -> None:
        start = time.process_time()
        contents = [document.content for document in documents]
        texts = []
        for document, content in zip(documents, contents, strict=True):
            encoded = content.encode()
            row = self._pending[document.row]
            row[4], row[5], row[6] = content_key(content), content_id(encoded), len(encoded)
            is_pair = len(document.texts) == 2
            row[6] -= is_pair  # the line end between the two is no byte of theirs
            source_chars = len(document.texts[0]) if is_pair else None
            texts.append((self.num_rows + document.row, "".join(document.texts), source_chars, document.is_chat))
        self._texts.write_batch(_batch(TEXTS, texts))
        self.num_documents += len(documents)
        self.tallies.setdefault("fingerprint", Tally()).cpu_seconds += time.process_time() - start
        if self.clean.duplicate_near is not None:
            start = time.process_time()
            self._signatures.write(signatures(contents, self.clean.duplicate_near).tobytes())
            self.tallies.setdefault("signature", Tally()).cpu_seconds += time.process_time() - start


def clean_part(
    place: Path,
    units: Iterable[tuple[int, Unit]],
    sources: Sequence[Source],
    clean: Clean,
    *,
    chat_template: str,
    index: Path | None = None,
) -> dict[str, Any]:
    """Make the part at `place` of these numbered units; returns its account. `index`: see `stages_of`."""
    start = time.process_time()
    with artefacts.new_folder(place) as folder:
        cleaner = _Cleaner(folder, stages_of(clean, index), clean)
        for number, unit in units:
            reading, source = Reading(), sources[unit.source]
            html = is_html(unit, source)
            for record in read_unit(unit, source, reading, clean.max_document_bytes, chat_template):
                cleaner.add(number, unit, record, html)
            cleaner.end_unit(number, reading)
        cleaner.close()
        others = sum(t.cpu_seconds for t in cleaner.tallies.values())
        cleaner.tallies["read"].cpu_seconds = time.process_time() - start - others
        account = {
            "rows": cleaner.num_rows,
            "documents": cleaner.num_documents,
            "unreadable": cleaner.num_unreadable,
            "stages": {name: tally.as_json() for name, tally in cleaner.tallies.items()},
            "samples": cleaner.samples,
        }
        (folder / "account.json").write_text(json.dumps(account, ensure_ascii=False), encoding="utf-8")
    return account


def _writer(path: Path, schema: pa.Schema) -> pa.ipc.RecordBatchFileWriter:
    return pa.ipc.new_file(str(path), schema, options=_LZ4)


def _batch(schema: pa.Schema, rows: Sequence[Sequence[Any]]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
    return pa.record_batch([pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)], schema=schema)


def is_done(part: Path) -> bool:
    """Whether a part is there and need not be read again: what could not be opened last time may be readable now."""
    try:
        account = json.loads((part / "account.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not account["unreadable"]


def read_signatures(part: Path) -> NDArray[np.uint32]:
    """The MinHash signatures of a part's documents, [documents, hashes]; none where nothing asked for them."""
    found: NDArray[np.uint32] = np.fromfile(part / "signatures.bin", np.uint32)
    return found.reshape(-1, NUM_HASHES)


def read_rows(part: Path) -> pa.Table:
    """The rows of a part."""
    return _read(part / "rows.arrow").read_all()


class Text(NamedTuple):
    """The text of a document as a part holds it: of a pair both sides joined, of a chat with marks (chats.py)."""

    row: int  # in the part
    text: str
    source_chars: int | None  # of a pair
    is_chat: bool

    @property
    def sides(self) -> tuple[str, ...]:
        """The text, or the two of a pair."""
        at = self.source_chars
        return (self.text,) if at is None else (self.text[:at], self.text[at:])


def read_texts(part: Path) -> Iterator[Text]:
    """The documents of a part, in order."""
    reader = _read(part / "texts.arrow")
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        yield from map(Text, *(batch.column(c).to_pylist() for c in range(len(TEXTS))))


def _read(path: Path) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(path)))
