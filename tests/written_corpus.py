"""Real corpus folders from given texts, in a second and without Ray: `from tests.written_corpus import …`."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ulm import artefacts
from ulm.corpus.manifest import DOCUMENTS, SPLITS, Corpus, token_dtype
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.tokenizer import Tokenizer

KINDS = {
    "law": "court judge appeal statute plaintiff verdict counsel section liable contract",
    "code": "def return import class self lambda yield parser buffer index",
    "medicine": "patient dose tablet symptom fever clinic nurse therapy vaccine blood",
}


def write_kinds(root: Path) -> None:
    """A corpus `tiny` of three kinds of text with no word in common, 40 documents each, bytes as tokens."""
    generator = random.Random(0)
    documents = [
        (domain, ("train", "train", "val", "test")[number % 4], " ".join(generator.choices(words.split(), k=25)))
        for number in range(40)
        for domain, words in KINDS.items()
    ]
    write_corpus(root, documents)


def write_corpus(
    root: Path,
    documents: Iterable[tuple[str, str, str]],
    tokenizer: Tokenizer | None = None,
    name: str = "tiny",
    weights: Mapping[str, float] | None = None,  # of sources; 1 where it says nothing
) -> Corpus:
    """The corpus of (domain, split, text) documents; each domain is a source of its own. Bytes are the tokens."""
    tokenizer = tokenizer or byte_tokenizer()
    rows, tokens = [], {split: [] for split in SPLITS}
    for number, (domain, split, text) in enumerate(documents):
        encoded = tokenizer.encode(text)
        rows.append(
            {
                "id": f"{domain}/{number}",
                "source": domain,
                "domain": domain,
                "licence": "CC0-1.0",
                "path": f"{domain}.txt",
                "offset": number,
                "split": split,
                "first_token": len(tokens[split]),
                "num_tokens": len(encoded),
                "num_source_tokens": 0,
                "num_bytes": len(text.encode()),
            }
        )
        tokens[split] += encoded
    dtype = token_dtype(tokenizer.vocab_size)
    shards = {split: [f"{split}-00000.bin"] for split in SPLITS if tokens[split]}
    arrays = {split: np.array(ids, dtype) for split, ids in tokens.items() if ids}
    sources = [{"name": n, "weight": (weights or {}).get(n, 1.0)} for n in sorted({row["source"] for row in rows})]
    content = {
        "documents": artefacts.digest_json(rows),
        "shards": {shards[split][0]: artefacts.digest_bytes(array.tobytes()) for split, array in arrays.items()},
        "sources": sources,
    }
    place = root / "corpora" / artefacts.digest_json(content)
    with artefacts.new_folder(place) as folder:
        pq.write_table(pa.Table.from_pylist(rows), folder / DOCUMENTS)
        tokenizer.write(folder)
        for split, names in shards.items():
            arrays[split].tofile(folder / names[0])
        manifest = {
            "format_version": artefacts.FORMAT_VERSION,
            "digest": place.name,
            "name": name,
            "content": content,
            "tokens": {split: len(tokens[split]) for split in shards},
            "shards": shards,
            "dtype": dtype.str,
            "sources": [{"origin": "-", "domain": s["name"], "licence": "CC0-1.0", **s} for s in sources],
            "files": artefacts.digest_files(folder),
        }
        artefacts.write_json(folder / "manifest.json", manifest)
    artefacts.point(root / "corpora" / "names" / name, place)
    return Corpus.read(place)


def written_corpus(
    root: Path,
    documents: Mapping[str, Sequence[str]],  # split to texts
    *,
    name: str = "written",
    tokenizer: Tokenizer | None = None,
    sources: Mapping[str, float] | None = None,  # source to weight; documents take turns among them
) -> Corpus:
    """The corpus of these documents, whose domains do not matter."""
    turns = list(sources or {"text": 1.0})
    rows = [(turns[n % len(turns)], split, text) for split, texts in documents.items() for n, text in enumerate(texts)]
    return write_corpus(root, rows, tokenizer, name, sources)


def stdlib_docstrings(num_modules: int) -> list[str]:
    """Docstrings of the running Python's own library, one document a function or class: real text, always there."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:num_modules]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]
