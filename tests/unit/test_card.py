"""A model card says what manifests know and nothing else, and no text of a user comes to life in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

import ulm
from tests.written_corpus import write_corpus
from ulm.errors import ArtefactError
from ulm.exchange.card import CardFacts, CorpusFacts, Source, card, facts_of
from ulm.exchange.quantize import Change
from ulm.tokenizers.byte import byte_tokenizer

BYTES = byte_tokenizer()
MARKDOWN = MarkdownIt("commonmark").enable("table")
CORPUS = CorpusFacts(
    "stories",
    "c" * 64,
    1_234_567,
    {"fiction": (20, 1_000_000), "code": (3, 234_567)},
    [Source("tales", "fiction", "CC0-1.0", 21), Source("scripts", "code", "Apache-2.0", 4)],
    is_part=False,
)


@pytest.fixture
def facts(nano) -> CardFacts:
    model = nano(vocab_size=BYTES.vocab_size)
    return CardFacts("tiny", model.spec, model.num_parameters, "d" * 64)


def parted(text: str) -> tuple[dict[str, Any], str]:
    """The header, and the rest."""
    _, header, rest = text.split("---\n", 2)
    return yaml.safe_load(header), rest


def tables(text: str) -> dict[str, list[list[str]]]:
    """The rows of the tables under each heading, as a reader sees them."""
    found: dict[str, list[list[str]]] = {}
    heading, opened = "", ""
    for token in MARKDOWN.parse(parted(text)[1]):
        if token.type in ("heading_open", "td_open", "th_open", "tr_open"):
            opened = token.type
            if opened == "tr_open":
                found.setdefault(heading, []).append([])
        elif token.type == "inline" and opened == "heading_open":
            heading, opened = shown(token), ""
        elif token.type == "inline" and opened in ("td_open", "th_open"):
            found[heading][-1].append(shown(token))
    return found


def shown(token: Any) -> str:
    return "".join(child.content for child in token.children)


def kinds_of_markup(text: str) -> set[str]:
    inline = [token for token in MARKDOWN.parse(parted(text)[1]) if token.type == "inline"]
    blocks = {token.type for token in MARKDOWN.parse(parted(text)[1])}
    return blocks | {child.type for token in inline for child in token.children}


def test_a_card_tells_the_model_its_corpus_evaluation_and_lineage(facts):
    text = card(
        replace(
            facts, corpus=CORPUS, corpus_digest="c" * 64, run="tiny", step=1_000, trained_tokens=8_192_000,
            init_from="e" * 64, loss=2.5, bits_per_byte=1.23456, architecture="LlamaForCausalLM", dtype="bfloat16",
            licence="apache-2.0",
        )
    )  # fmt: skip
    header, rest = parted(text)
    assert header == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ulm"],
    }
    found = tables(text)
    model = dict(found["Model"])
    assert (model["architecture"], model["numbers"]) == ("LlamaForCausalLM", "bfloat16")
    assert (model["layers"], model["width"], model["heads"]) == ("3", "96", "3 of 32")
    assert (model["context"], model["vocabulary"]) == ("64 tokens", "257 tokens")
    assert (model["attention"], model["feedforward"]) == ("gqa: num_heads 3, num_kv_heads 1", "swiglu: d_hidden 256")
    assert found["Training data"] == [
        ["domain", "documents", "tokens"],
        ["fiction", "20", "1,000,000"],
        ["code", "3", "234,567"],
        ["source", "domain", "licence", "documents"],
        ["tales", "fiction", "CC0-1.0", "21"],
        ["scripts", "code", "Apache-2.0", "4"],
    ]
    assert "1,234,567 tokens in the corpus stories." in rest
    assert found["Evaluation"][1:] == [["bits per byte", "1.2346"], ["nats per token", "2.5000"]]
    assert found["Lineage"][1:] == [
        ["checkpoint", "d" * 64],
        ["run", "tiny"],
        ["step", "1,000"],
        ["tokens trained on", "8,192,000"],
        ["began with the weights of", "e" * 64],
        ["corpus", "c" * 64],
    ]
    assert f"{facts.num_parameters:,} parameters" in rest


def test_what_is_not_known_is_left_out(facts):
    text = card(facts)
    header, rest = parted(text)
    assert "license" not in header and "language" not in header
    assert [line for line in rest.splitlines() if line.startswith("#")] == [
        "# tiny",
        "## Model",
        "## Use",
        "## Lineage",
    ]
    assert tables(text)["Lineage"][1:] == [["checkpoint", "d" * 64]]
    assert "None" not in text and "unknown" not in text


@pytest.mark.parametrize(
    ("changes", "tags", "library", "said", "unsaid"),
    [
        ({}, ["ulm"], "transformers", "$ ulm import path/to/this/folder", "trust"),
        ({"format": "own"}, ["ulm", "custom_code"], "transformers", "--trust-remote-code", "llama"),
        ({"format": "gguf"}, ["ulm", "gguf"], "gguf", "$ llama-cli -m model.gguf", "AutoModel"),
        (
            {"change": Change("w4a16", 32, 1.25, 1.265, 4_096)},
            ["ulm", "compressed-tensors", "w4a16"],
            "transformers",
            "bytes of held-out text: 1.2500 before, 1.2650 after (+0.0150)",
            "ulm import",
        ),
    ],
)
def test_the_card_tells_how_this_export_is_opened(changes, tags, library, said, unsaid, facts):
    text = card(replace(facts, **changes))
    header, rest = parted(text)
    assert (header["tags"], header["library_name"]) == (tags, library)
    assert said in rest and unsaid not in rest


def test_layers_that_differ_are_told_apart(nano, facts):
    pattern = [{"repeat": 2, "attention": {"kind": "sliding", "window_tokens": 8}}, {}]
    found = dict(tables(card(replace(facts, spec=nano(blocks=pattern).spec)))["Model"])
    assert found["layers that differ"].startswith("again and again: 2 with attention sliding: ")
    assert "window_tokens 8" in found["layers that differ"] and found["layers that differ"].endswith(" / nothing else")


HOSTILE = [
    "a | b",
    "---\nlicense: mit\n---",
    "`code` **bold** _x_ <script>alert(1)</script> <!-- ",
    "[link](http://evil.example) ![image](x) <http://evil.example> www.evil.example",
    "one\n\n# Heading\n\n- list\r\n\x00\u2028end",
    "\\| trailing \\",
    "&lt;b&gt; $x^2$ ~~gone~~ @you :smile: {{ jinja }} {% x %}",
    "yaml: {a: [1, 2]} & *anchor !!python/object",
    "\u202eright to left",
    "x" * 10_000,
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_of_a_user_breaks_the_header_or_the_tables_or_comes_to_life(hostile, facts):
    source = Source(hostile, hostile, hostile, 1)
    corpus = CorpusFacts(hostile, "c" * 64, 1, {hostile: (1, 1)}, [source], is_part=True)
    text = card(replace(facts, name=hostile, run=hostile, corpus=corpus, licence=hostile))
    plain = card(replace(facts, name="plain", run="plain", corpus=CORPUS, licence="mit"))
    assert kinds_of_markup(text) - {"text_special"} <= kinds_of_markup(plain)
    expected = " ".join("".join(char if char.isprintable() else " " for char in hostile).split())
    expected = expected if len(expected) <= 200 else expected[:199] + "…"
    header, _ = parted(text)
    assert header == {**parted(plain)[0], "license": expected}
    found = tables(text)
    assert found["Training data"][-1] == [expected, expected, expected, "1"]
    assert ["run", expected] in found["Lineage"]
    assert list(found) == list(tables(plain))


def test_many_sources_are_cut(facts):
    sources = [Source(f"s{n}", "d", "CC0-1.0", 1) for n in range(70)]
    text = card(replace(facts, corpus=replace(CORPUS, sources=sources)))
    assert "| s49 |" in text and "| s50 |" not in text and "and 20 more." in text


def test_facts_come_from_the_manifests_of_checkpoint_run_and_corpus(nano, root):
    documents = [
        ("law", "train", "the court"),
        ("code", "train", "def f"),
        ("law", "train", "a judge"),
        ("law", "val", "x"),
    ]
    corpus = write_corpus(root, documents)
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    domains = [("law", "train", 1, 9), ("law", "val", 1, 1), ("code", "train", 1, 5), ("law", "train", 1, 7)]
    manifest["domains"] = [dict(zip(("domain", "split", "documents", "tokens"), row, strict=True)) for row in domains]
    manifest["sources"][0]["documents"] = {"in": 3, "kept": 1}
    (corpus.folder / "manifest.json").write_text(json.dumps(manifest))
    run = root / "runs" / "tiny"
    model = nano(vocab_size=corpus.tokenizer.vocab_size)
    step = ulm.save(model, corpus.tokenizer, run / "step-00000020", step=20, run="tiny", corpus_digest=corpus.digest)
    lines = [
        {"step": 10, "tokens": 5, "bits_per_byte": 9.0},
        {"step": 20, "tokens": 640, "val_loss": 3.5, "bits_per_byte": 2.25},
    ]
    written = (
        "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 30, "bits_per_byte": 1.0}]) + '{"step": 20, "bi'
    )
    (run / "metrics.jsonl").write_text(written)
    (run / "task.json").write_text(json.dumps({"documents": "f" * 64}))
    found = facts_of(step, root)
    assert (found.name, found.run, found.step, found.bits_per_byte, found.loss) == ("tiny", "tiny", 20, 2.25, 3.5)
    assert (found.trained_tokens, found.num_parameters) == (640, model.num_parameters)
    assert found.checkpoint == json.loads((step / "manifest.json").read_text())["digest"]
    assert found.corpus is not None and found.corpus.is_part
    assert (found.corpus.name, found.corpus.tokens) == (corpus.name, corpus.num_tokens("train"))
    assert found.corpus.domains == {"code": (1, 5), "law": (2, 16)}
    assert found.corpus.sources == [Source("code", "code", "CC0-1.0", 1), Source("law", "law", "CC0-1.0", None)]
    manifest["domains"] = [{"domain": "law", "split": "train"}]
    (corpus.folder / "manifest.json").write_text(json.dumps(manifest))
    again = facts_of(step, root).corpus
    assert again is not None and (again.domains, again.tokens) == ({}, found.corpus.tokens)
    assert "trained on a part of its documents" in card(found)


def test_a_run_or_a_corpus_that_is_gone_is_left_out_and_a_checkpoint_is_not(nano, root):
    model = nano(vocab_size=BYTES.vocab_size)
    step = ulm.save(model, BYTES, root / "runs" / "tiny" / "step-00000020", step=20, run="tiny", corpus_digest="a" * 64)
    found = facts_of(step, root, name="mine")
    assert (found.name, found.corpus, found.corpus_digest, found.loss) == ("mine", None, "a" * 64, None)
    (root / "corpora" / ("a" * 64)).mkdir(parents=True)
    (root / "corpora" / ("a" * 64) / "manifest.json").write_text("{")
    (step.parent / "metrics.jsonl").write_bytes(b'\xff\n[1]\n{"step": 20, "val_loss": "low", "tokens": true}\n')
    (step.parent / "task.json").write_text("[]")
    again = facts_of(step, root, name="mine")
    assert again == found
    assert card(found).count("## ") == 3
    by_hand = ulm.save(model, BYTES, root / "by-hand")
    assert (facts_of(by_hand, root).name, facts_of(by_hand, root).step) == ("by-hand", None)
    with pytest.raises(ArtefactError, match="no checkpoint here"):
        facts_of(Path(root), root)
