"""A model card: README.md of an exported folder, written from manifests. What is not known is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ulm.checkpoints.manifest import read_manifest
from ulm.checkpoints.store import read_spec
from ulm.corpus.manifest import Corpus
from ulm.errors import ArtefactError
from ulm.exchange.quantize import SCHEMES, Change
from ulm.models.account import num_parameters, on_meta
from ulm.spec import SLOTS, ModelSpec

Format = Literal["hf", "own", "gguf"]  # a stock architecture's folder, one with code of its own, a file for llama.cpp
METRICS, TASK = "metrics.jsonl", "task.json"  # of a run's folder
MAX_ROWS = 50  # of a table; a corpus may have thousands of sources
MAX_CHARS = 200  # of a text that a user gave
MARKUP = re.compile(r"([\\`*_\[\]<>#|~$&@^]|:(?=\S)|(?<=www)\.)")  # inside a line; the last few of GitHub's Markdown


@dataclass(frozen=True)
class Source:
    """Where documents of the corpus come from."""

    name: str
    domain: str
    licence: str
    documents: int | None  # that were kept


@dataclass(frozen=True)
class CorpusFacts:
    """What a model learned from. Domains: name to documents and tokens of the training split."""

    name: str
    digest: str
    tokens: int
    domains: Mapping[str, tuple[int, int]]
    sources: Sequence[Source]
    is_part: bool  # whether the model was trained on some of its documents alone


@dataclass(frozen=True)
class CardFacts:
    """All that a card says. What a caller knows of the export itself it puts in with `dataclasses.replace`."""

    name: str
    spec: ModelSpec
    num_parameters: int
    checkpoint: str  # digest
    run: str | None = None
    step: int | None = None
    init_from: str | None = None  # digest of the checkpoint that the weights began with
    corpus: CorpusFacts | None = None
    corpus_digest: str | None = None  # also where the corpus itself is not here
    trained_tokens: int | None = None
    loss: float | None = None  # nats per token of held-out text
    bits_per_byte: float | None = None  # of the same text
    licence: str | None = None  # of the weights, as Hugging Face spells it: nobody but the owner knows it
    format: Format = "hf"
    architecture: str | None = None  # LlamaForCausalLM
    dtype: str | None = None
    change: Change | None = None  # of a quantised folder


def facts_of(checkpoint: Path, root: Path, *, name: str | None = None) -> CardFacts:
    """What manifests say of a checkpoint, its run and its corpus under `root`.

    A run or a corpus that is not there, or not readable, is left out. ArtefactError for the checkpoint itself.
    """
    manifest, spec = read_manifest(checkpoint), read_spec(checkpoint)
    run = checkpoint.parent
    line = _figures(run / METRICS, manifest.step) if manifest.run else {}
    task = _json(run / TASK) if manifest.run else {}
    return CardFacts(
        name=name or manifest.run or checkpoint.name,
        spec=spec,
        num_parameters=num_parameters(on_meta(spec)),
        checkpoint=manifest.digest,
        run=manifest.run,
        step=manifest.step if manifest.run else None,
        init_from=manifest.init_from,
        corpus=_corpus(root, manifest.corpus_digest, is_part=task.get("documents") is not None),
        corpus_digest=manifest.corpus_digest,
        trained_tokens=_number(line, "tokens", int),
        loss=_number(line, "val_loss", float),
        bits_per_byte=_number(line, "bits_per_byte", float),
    )


def _number(line: Mapping[str, Any], key: str, kind: Any) -> Any:
    value = line.get(key)
    return kind(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _figures(path: Path, step: int) -> dict[str, Any]:
    """The line of a step in a run's figures."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        if isinstance(found, dict) and found.get("step") == step:
            return found
    return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _corpus(root: Path, digest: str | None, *, is_part: bool) -> CorpusFacts | None:
    if digest is None or not (folder := root / "corpora" / digest).is_dir():
        return None
    try:
        corpus = Corpus.read(folder, verify=False)
    except ArtefactError:
        return None
    given = corpus.manifest["sources"]
    sources = [Source(each["name"], each["domain"], each["licence"], _kept(each)) for each in given]
    return CorpusFacts(corpus.name, digest, corpus.num_tokens("train"), _domains(corpus.manifest), sources, is_part)


def _kept(source: Mapping[str, Any]) -> int | None:
    found = source.get("documents")
    return _number(found, "kept", int) if isinstance(found, dict) else None


def _domains(manifest: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Documents and tokens of each domain of the training split; none where the manifest does not say them so."""
    found: dict[str, tuple[int, int]] = {}
    try:
        for row in manifest.get("domains", ()):
            if row["split"] == "train":
                documents, tokens = found.get(row["domain"], (0, 0))
                found[str(row["domain"])] = documents + int(row["documents"]), tokens + int(row["tokens"])
    except (KeyError, TypeError, ValueError):  # what is checked of a manifest is what is needed to read its tokens
        return {}
    return found


def card(facts: CardFacts) -> str:
    """README.md: a header in Hugging Face's YAML, then Markdown, in which texts of users are text and nothing else."""
    sections = [
        f"# {_said(facts.name)}",
        f"A language model of {facts.num_parameters:,} parameters, trained with µLM.",
        _of_model(facts),
        _of_corpus(facts),
        _of_evaluation(facts),
        _of_quantisation(facts),
        _of_use(facts),
        _of_lineage(facts),
    ]
    return f"---\n{_header(facts)}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _header(facts: CardFacts) -> str:
    tags = ["ulm"]
    tags += ["custom_code"] if facts.format == "own" else []
    tags += ["gguf"] if facts.format == "gguf" else []
    tags += ["compressed-tensors", facts.change.scheme] if facts.change else []
    header = {
        **({"license": _on_one_line(facts.licence)} if facts.licence else {}),
        "library_name": "gguf" if facts.format == "gguf" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=10 * MAX_CHARS)


def _of_model(facts: CardFacts) -> str:
    spec = facts.spec
    heads = f"{spec.num_heads} of {spec.head_dim}"
    rows = [
        ("architecture", facts.architecture or "of its own: the code is in this folder" * (facts.format == "own")),
        ("numbers", facts.dtype or ""),
        ("layers", f"{spec.num_layers}"),
        ("width", f"{spec.d_model:,}"),
        ("heads", heads),
        ("context", f"{spec.context_tokens:,} tokens"),
        ("vocabulary", f"{spec.vocab_size:,} tokens"),
        *((slot, _kind(getattr(spec, slot))) for slot in SLOTS),
        ("mask", ", ".join(config.kind for config in spec.mask)),
        ("norms", spec.norm_placement + (", and after the embeddings" if spec.embedding_norm else "")),
        ("layers that differ", _pattern(spec)),
        ("layers that share weights", f"{spec.layers_per_block} in a row" if spec.layers_per_block > 1 else ""),
    ]
    return "## Model\n\n" + _table(("", ""), [(_said(name), _said(value)) for name, value in rows if value])


def _kind(config: Any) -> str:
    """A kind and those of its settings that are not as by default."""
    fields = type(config).model_fields
    others = [f"{key} {value}" for key, value in config if key != "kind" and value != fields[key].default]
    return f"{config.kind}: {', '.join(others)}" if others else str(config.kind)


def _pattern(spec: ModelSpec) -> str:
    """What the entries of a pattern have that the spec's own slots have not."""
    entries = []
    for entry in spec.blocks:
        own = [f"{slot} {_kind(value)}" for slot, value in entry if slot in SLOTS and value != getattr(spec, slot)]
        times = f"{entry.repeat} with " if entry.repeat > 1 else ""
        entries.append(times + ("; ".join(own) or "nothing else"))
    return f"again and again: {' / '.join(entries)}" if entries else ""


def _of_corpus(facts: CardFacts) -> str:
    corpus = facts.corpus
    if corpus is None:
        return ""
    part = " The model was trained on a part of its documents." if corpus.is_part else ""
    found = f"## Training data\n\n{corpus.tokens:,} tokens in the corpus {_said(corpus.name)}.{part}\n\n"
    domains = [(_said(name), f"{documents:,}", f"{tokens:,}") for name, (documents, tokens) in corpus.domains.items()]
    if domains:
        found += _table(("domain", "documents", "tokens"), domains) + "\n\n"
    sources = [
        (_said(source.name), _said(source.domain), _said(source.licence), _count(source.documents))
        for source in corpus.sources
    ]
    return found + _table(("source", "domain", "licence", "documents"), sources)


def _of_evaluation(facts: CardFacts) -> str:
    rows = [("bits per byte", facts.bits_per_byte), ("nats per token", facts.loss)]
    known = [(name, f"{value:.4f}") for name, value in rows if value is not None]
    return "## Evaluation\n\nOn text of the corpus that was held out:\n\n" + _table(("", ""), known) if known else ""


def _of_quantisation(facts: CardFacts) -> str:
    if (change := facts.change) is None:
        return ""
    scheme = SCHEMES[change.scheme]
    each = f"{change.group_size} numbers" if scheme.is_grouped else "each row"
    what = f"Matrices have {scheme.num_bits} bits a weight and a scale for {each}, chosen for the least squared error"
    if scheme.activation_bits:
        what += f"; what they are multiplied by is rounded to {scheme.activation_bits} bits, token by token"
    before, after = change.bits_per_byte, change.rounded_bits_per_byte
    return (
        f"## Quantisation\n\n{what}. Embeddings and the head are not rounded.\n\n"
        f"Bits per byte of {change.text_bytes:,} bytes of held-out text: {before:.4f} before, {after:.4f} after "
        f"({after - before:+.4f})."
    )


def _of_use(facts: CardFacts) -> str:
    """How the export is opened. Places are for the reader to fill in, so that no name of a user stands in code."""
    if facts.format == "gguf":
        return "## Use\n\n```console\n$ llama-cli -m model.gguf -p 'The following'\n$ llama-server -m model.gguf\n```"
    trust = ", trust_remote_code=True" if facts.format == "own" else ""
    opens = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "path/to/this/folder"',
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        'tokens = tokenizer("The following", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))",
    ]
    commands = [f"$ vllm serve path/to/this/folder{' --trust-remote-code' if trust else ''}"]
    commands += [] if facts.change else ["$ ulm import path/to/this/folder --name again"]
    before = "This needs the package compressed-tensors.\n\n" if facts.change else ""
    needs = "\n\nvLLM needs the package ulm beside it, whose plugin knows the model." if trust else ""
    python, console = "\n".join(opens), "\n".join(commands)
    return f"## Use\n\n{before}```python\n{python}\n```\n\n```console\n{console}\n```{needs}"


def _of_lineage(facts: CardFacts) -> str:
    rows = [
        ("checkpoint", facts.checkpoint),
        ("run", facts.run),
        ("step", None if facts.step is None else f"{facts.step:,}"),
        ("tokens trained on", None if facts.trained_tokens is None else f"{facts.trained_tokens:,}"),
        ("began with the weights of", facts.init_from),
        ("corpus", facts.corpus_digest),
    ]
    return "## Lineage\n\n" + _table(("", ""), [(name, _said(value)) for name, value in rows if value is not None])


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; cells are Markdown already."""
    rows = list(rows)
    lines = [head, ["---"] * len(head), *rows[:MAX_ROWS]]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text + (f"\n\nand {len(rows) - MAX_ROWS:,} more." if len(rows) > MAX_ROWS else "")


def _said(text: str) -> str:
    """Any text as Markdown that shows it on one line: no markup, link or HTML in it comes to life."""
    return MARKUP.sub(r"\\\1", _on_one_line(text))


def _on_one_line(text: str) -> str:
    """A text of a user without what cannot be seen, cut where it is long."""
    shown = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return shown if len(shown) <= MAX_CHARS else shown[: MAX_CHARS - 1] + "…"
