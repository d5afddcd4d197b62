"""The report says what the manifest and the documents say, and whatever stands in a corpus, the page only shows it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.report.figures import corpus_figures, write_report
from pipelines.corpus.report.plots import cluster_size_plot
from pipelines.report.html import counted, text
from tests.written_corpus import write_corpus
from ulm import artefacts
from ulm.corpus.manifest import REPORTS

HOSTILE = (
    "</pre><script>alert(1)</script><img src=x onerror=alert(2)> \u202egnp.exe\u2066 \x00\x07\x1b[2J $\\frac{ &lt;"
)
DOCUMENTS = [
    *(("prose", "train", "word " * size) for size in (1, 2, 40, 400)),
    ("code", "train", "x = 1\n" * 30),
    ("code", "val", "y"),
]


def stage(name: str, num_in: int, changed: int = 0, **dropped: int) -> dict[str, Any]:
    return {
        "stage": name,
        "in": num_in,
        "out": num_in - sum(dropped.values()),
        "changed": changed,
        "dropped": dropped,
        "cpu_seconds": 1.5,
    }


def manifest_of(**changes: Any) -> dict[str, Any]:
    """A manifest as a build writes it, for six documents of nine."""
    return {
        "name": "c",
        "digest": "ab" * 32,
        "created": "2026-01-01T00:00:00+00:00",
        "code_version": "0",
        "documents": {"in": 9, "kept": 6, "dropped": {"duplicate_near": 2, "too_short": 1}},
        "cut": {"documents": 1, "pieces_added": 4},
        "content": {"clean": {"nfc": True}, "split": {"val": 0.05}, "sources": []},
        "sources": [{"name": "s", "origin": "s.txt", "domain": "prose", "licence": "MIT", "weight": 1.0}],
        "stages": [
            stage("read", 9),
            stage("characters", 9, 3, too_short=1),
            stage("duplicate_near", 8, duplicate_near=2),
        ],
        "samples": {"duplicate_near": [{"source": "s", "path": "a.txt", "text": "twice told"}]},
        "dropped": [{"source": "s", "path": "a.txt", "reason": "duplicate_near"}],
        "ignored": [{"source": "s", "path": "b.exe", "reason": "not text"}],
        "near_duplicates": {
            "clusters": 1,
            "documents": 3,
            "dropped": 2,
            "sizes": {"3": 1},
            "largest": [{"documents": 3, "text": "twice told", "paths": ["a.txt"]}],
        },
        "tokenizer": {"digest": "cd" * 32, "kind": "byte", "vocab_size": 257},
        "padding": {"context_tokens": 256, "share": 0.0132},
        "seconds": {"read": 1.0},
        **changes,
    }


@pytest.fixture
def folder(root: Path) -> Path:
    return write_corpus(root, DOCUMENTS).folder


def page_of(folder: Path, manifest: dict[str, Any]) -> str:
    write_report(folder, manifest)
    return (folder / REPORTS[0]).read_text(encoding="utf-8")


def section_of(page: str, heading: str) -> str:
    """What a reader sees of one section, a space between its cells and lines."""
    section = page.partition(f"<h2>{heading}</h2>")[2].partition("<h2>")[0]
    return " ".join(unescape(re.sub("<[^>]*>", " ", section)).split())


def clustering(folder: Path, name: str = "ef" * 32, found: Mapping[str, Any] | None = None, **changes: Any) -> None:
    """Write a clustering of one cluster; `found` is how it was found."""
    cluster = {
        "domain": "prose",
        "domains": {"prose": 30, "code": 10},
        "documents": 4,
        "tokens": {"train": 40},
        "words": ["word", HOSTILE],
        "titles": ["A title"],
        **changes,
    }
    place = folder / "domains" / name
    place.mkdir(parents=True)
    fields = {
        "digest": place.name,
        "kind": "tf-idf",
        "config": {},
        "agreement": {"nmi": 0.5, "purity": 0.75},
        **(found or {}),
    }
    artefacts.write_json(place / "manifest.json", {"format_version": 1, **fields, "clusters": [cluster]})


def test_the_figures_are_those_of_the_documents(folder: Path) -> None:
    figures = corpus_figures(folder, manifest_of())
    sizes = {"prose": [5, 10, 200, 2000], "code": [180, 1]}
    total = sum(map(sum, sizes.values()))
    assert figures["total"] == {"documents": 6, "tokens": total, "bytes": total, "share": 1.0, "bytes_per_token": 1.0}
    assert [(d["domain"], d["documents"], d["tokens"]) for d in figures["domains"]] == [
        ("prose", 4, 2215),
        ("code", 2, 181),
    ]
    assert figures["domains"][1]["share"] == pytest.approx(181 / total)
    assert [s["split"] for s in figures["splits"]] == ["train", "val"]
    assert figures["licences"][0]["licence"] == "CC0-1.0"
    assert figures["dropped"] == {"duplicate_near": 2, "too_short": 1}
    lengths = figures["lengths"]["bytes"]
    assert lengths["summary"] == {
        "train": {"median": 180, "p99": 200, "max": 2000},
        "val": {"median": 1, "p99": 1, "max": 1},
    }
    edges = lengths["edges"]
    for split, mine in {"train": [5, 10, 200, 2000, 180], "val": [1]}.items():
        slow = [sum(low <= size < high for size in mine) for low, high in zip(edges, edges[1:], strict=False)]
        assert lengths["counts"][split] == slow
    assert json.loads((folder / "manifest.json").read_text())["tokens"] == {"train": total - 1, "val": 1}


def test_the_page_shows_the_figures_and_the_json_holds_them(folder: Path) -> None:
    clustering(folder)
    page = page_of(folder, manifest_of())
    for shown in (
        "66.7 % of 9",
        "duplicate_near",
        "too_short",
        "twice told",
        "b.exe",
        "1.3 %",
        "mutual information of 0.50",
    ):
        assert shown in page
    assert page.count("<svg") == 3  # lengths in bytes and in tokens, sizes of duplicates' clusters
    assert page.count("<details>") >= 5
    figures = json.loads((folder / REPORTS[1]).read_text())
    assert figures["clusterings"][0]["clusters"][0]["domains"] == {"prose": 30, "code": 10}
    assert figures["near_duplicates"]["sizes"] == {"3": 1}


def test_equal_figures_give_equal_bytes_and_a_new_clustering_other_ones(folder: Path) -> None:
    first = page_of(folder, manifest_of())
    assert page_of(folder, manifest_of()) == first
    clustering(folder)
    clustering(folder, "half.partial")  # not one yet
    second = page_of(folder, manifest_of())
    assert second != first and second.count("mutual information") == 1


class Tags(HTMLParser):
    """Names of tags and attributes, and what attributes link to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.links |= {value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")}


def test_nothing_from_outside_acts_on_the_page_or_turns_it(root: Path) -> None:
    folder = write_corpus(root, [(HOSTILE, "train", "text")]).folder
    clustering(folder, domains={HOSTILE: 4}, titles=[HOSTILE], words=[HOSTILE])
    sample = {"source": HOSTILE, "path": HOSTILE, "text": HOSTILE}
    manifest = manifest_of(
        name=HOSTILE,
        samples={HOSTILE: [sample]},
        dropped=[{**sample, "reason": HOSTILE}],
        ignored=[{**sample, "reason": HOSTILE}],
        sources=[{"name": HOSTILE, "origin": HOSTILE, "licence": HOSTILE, "weight": 1.0}],
        stages=[stage("read", 9, **{HOSTILE: 3})],
        near_duplicates={
            **manifest_of()["near_duplicates"],
            "largest": [{"documents": 2, "text": HOSTILE, "paths": [HOSTILE]}],
        },
        content={"clean": {"path": HOSTILE}},
    )
    page = page_of(folder, manifest)
    found = Tags()
    found.feed(page)
    assert not found.tags & {"script", "img", "link", "iframe", "a", "object", "image", "foreignobject"}
    assert not {name for name in found.attributes if name.startswith("on")}
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    assert "U+202E" in page and "&lt;script&gt;" in page
    assert all(link.startswith("#") for link in found.links) and "@import" not in page  # nothing is fetched


def test_a_text_of_ten_megabytes_is_cut_and_its_rest_counted() -> None:
    assert text("x" * 10_000_000, 10) == "x" * 10 + "<span class=soft>… 9,999,990 more characters</span>"
    assert text("a\r\nb\rc\ud800") == "a\nb<span class=u>U+000D</span>c<span class=u>U+D800</span>"


def test_a_corpus_of_a_hundred_thousand_documents_takes_seconds_and_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    num = 100_000
    size = rng.lognormal(7, 1, num).astype(np.int64)
    columns = {name: pa.array([f"{name}{n % 300}" for n in range(num)]) for name in ("source", "domain", "licence")}
    split = pa.array(np.where(np.arange(num) % 20, "train", "val"))
    table = pa.table({**columns, "split": split, "num_tokens": size // 4, "num_bytes": size})
    pq.write_table(table, tmp_path / "documents.parquet")
    long = {"source": "s", "path": "p" * 4_000, "text": "t" * 10_000_000}
    manifest = manifest_of(
        samples={f"reason {n}": [long] * 20 for n in range(40)}, dropped=[{**long, "reason": "r"}] * 1_000
    )
    start = time.monotonic()
    write_report(tmp_path, manifest)
    assert time.monotonic() - start < 10  # 3 s where nothing else runs
    assert sum((tmp_path / name).stat().st_size for name in REPORTS) < 2_000_000


def test_a_corpus_without_anything_dropped_or_clustered_has_a_page_too(folder: Path) -> None:
    bare = manifest_of(
        samples={}, dropped=[], ignored=[], near_duplicates=None, padding=None, stages=[stage("read", 6)]
    )
    page = page_of(folder, bare)
    assert "Near duplicates" not in page and "<h2>Dropped" in page and "<h2>Clusters" not in page


def test_files_not_read_are_counted_by_reason_and_some_are_named(folder: Path) -> None:
    files = [{"source": "s", "path": f"{n}.exe", "reason": "unknown_format"} for n in range(150)]
    page = page_of(folder, manifest_of(ignored=files, ignored_by_reason={"link": 1, "unknown_format": 1_400}))
    assert "1,401 files not read: unknown_format 1,400, link 1 (the first 100 below)" in section_of(page, "Dropped")
    assert "99.exe" in page and "100.exe" not in page
    page = page_of(folder, manifest_of(ignored=files[:1], ignored_by_reason={"unknown_format": 1}))
    assert "1 file not read: unknown_format 1 source path" in section_of(page, "Dropped")
    assert "Files not read (the first 1)" in section_of(page_of(folder, manifest_of()), "Dropped")  # none counted


def test_a_source_that_gave_nothing_is_shown_with_what_was_read_of_it(folder: Path) -> None:
    given = {"origin": "-", "domain": "prose", "licence": "MIT", "weight": 1.0}
    sources = [
        {**given, "name": "empty", "documents": {"in": 3_000, "kept": 0}},
        {**given, "name": "prose", "documents": {"in": 7, "kept": 4}},
        {**given, "name": "code"},  # of a corpus that was extended, from before they were counted
    ]
    page = page_of(folder, manifest_of(sources=sources))
    shown = section_of(page, "Domains").partition("Sources")[2].partition("Licences")[0]
    assert shown.split(" per token ") == [
        " Nothing is left of 1 of 3 sources. source in kept tokens of tokens text bytes",
        "prose 7 4 2,215 92.4 % 2.2 kB 1.00 code – 2 181 7.6 % 181 B 1.00 empty 3,000 0 0 0.0 % 0 B – ",
    ]
    rows = {row["source"]: row["in"] for row in json.loads((folder / REPORTS[1]).read_text())["sources"]}
    assert rows == {"prose": 7, "code": None, "empty": 3_000}
    whole = [{**given, "name": name, "documents": {"in": n, "kept": n}} for name, n in (("prose", 4), ("code", 2))]
    page = page_of(folder, manifest_of(sources=whole))
    assert "Sources" not in section_of(page, "Domains")  # the domains say it all


def test_bars_of_what_was_dropped_are_shares_of_all_documents(folder: Path) -> None:
    page = page_of(folder, manifest_of())
    dropped = page.partition("<h2>Dropped</h2>")[2].partition("</table>")[0]
    assert re.findall(r"width:([\d.]+)%", dropped) == ["22.22", "11.11"]  # 2 and 1 of 9


def test_a_stage_for_some_documents_alone_is_no_collapse(folder: Path) -> None:
    stages = [
        stage("read", 3_763, bad_json=3),
        stage("html", 4, 3, no_text=1),
        stage("characters", 3_759, too_short=9),
    ]
    page = page_of(folder, manifest_of(stages=stages))
    assert "html 3,759 saw 4 of 3,760 1 3 1.5 s no_text 1 characters 3,750 9 1.5 s" in section_of(page, "Stages")
    drawn = page.partition("<h2>Stages</h2>")[2].partition("</table>")[0]
    assert re.findall(r"width:([\d.]+)%", drawn) == ["99.92", "0.08", "99.65", "0.24"]  # of 3,763; none for html


def test_the_stages_of_an_extension_say_of_which_documents_they_are(folder: Path) -> None:
    assert "In the order they ran: documents left" in section_of(page_of(folder, manifest_of()), "Stages")
    base = {"digest": "12" * 32, "name": "b", "documents": 20}
    page = page_of(folder, manifest_of(base=base, documents={"in": 29, "kept": 26}))
    assert "ran, of the 9 documents that this version adds: documents left" in section_of(page, "Stages")
    assert "of those added duplicate_near 2 22.22 % too_short 1 11.11 %" in section_of(page, "Dropped")


def test_a_clustering_says_how_its_number_was_chosen_and_what_is_in_no_cluster(folder: Path) -> None:
    tried = [{"num_clusters": 2, "score": 0.6062}, {"num_clusters": 12, "score": 0.5111}]
    choice = {"criterion": "simplified silhouette", "documents": 44, "tried": tried, "best": 2}
    clustering(folder, found={"choice": choice, "merged": 1})
    shown = section_of(page_of(folder, manifest_of()), "Clusters")
    assert shown.startswith("1 cluster, tf-idf efefefefefef ")
    assert "Their number was chosen by simplified silhouette: 0.606 for 2, 0.511 for 12." in shown
    assert "1 cluster too small, merged into the nearest." in shown
    assert "2 documents without a word of the vocabulary belong to none." in shown  # six less the cluster's four
    clustering(folder, "fe" * 32, found={"choice": {**choice, "tried": []}, "merged": 0}, documents=5)
    shown = section_of(page_of(folder, manifest_of()), "Clusters").partition("fefefefefefe")[2]
    assert "There were too few documents to choose their number." in shown and "merged" not in shown
    assert "1 document without a word of the vocabulary belongs to none." in shown


def test_one_of_a_thing_is_said_in_the_singular(folder: Path) -> None:
    assert [counted(n, "cluster") for n in (0, 1, 2_000)] == ["0 clusters", "1 cluster", "2,000 clusters"]
    near = {"clusters": 1, "documents": 2, "dropped": 1, "sizes": {"2": 1}, "largest": []}
    page = page_of(folder, manifest_of(near_duplicates=near, cut={"documents": 1, "pieces_added": 1}))
    shown = section_of(page, "Near duplicates")
    assert shown.startswith("1 cluster of 2 documents that are nearly the same; 1 document dropped.")
    assert "1 long document cut, which made 1 document more." in section_of(page, "Dropped")
    assert text("abc", 2).endswith("… 1 more character</span>")


@pytest.mark.parametrize(
    ("largest", "labels"),
    [
        (4, ["2", "3", "5", "10", "20"]),
        (300, ["2", "3", "5", "10", "20", "30", "50", "100", "200", "300"]),
        (50_000, ["2", "3", "10", "30", "100", "300", "1k", "3k", "10k", "30k"]),
    ],
)
def test_the_axis_of_near_duplicates_names_size_two(largest: int, labels: list[str]) -> None:
    drawn = cluster_size_plot({"2": 39, str(largest): 2})
    words = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert words[: words.index("documents of a cluster")] == labels
