"""A real corpus folder from given texts, in a second and without Ray: `from tests.written_corpus import …`."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ulm import artefacts
from ulm.corpus.manifest import DOCUMENTS, Corpus, token_dtype
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.tokenizer import Tokenizer


def written_corpus(
    root: Path,
    documents: Mapping[str, Sequence[str]],  # split to texts
    *,
    name: str = "written",
    tokenizer: Tokenizer | None = None,
    sources: Mapping[str, float] | None = None,  # source to weight; documents take turns among them
) -> Corpus:
    """The corpus of these documents, stored under `root` and named."""
    tokenizer, weights = tokenizer or byte_tokenizer(), dict(sources or {"text": 1.0})
    dtype = token_dtype(tokenizer.vocab_size)
    rows, tokens = [], {}
    for split, texts in documents.items():
        encoded = tokenizer.encode_batch(list(texts))
        tokens[split] = np.array([t for ids in encoded for t in ids], dtype)
        first = 0
        for number, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            source = list(weights)[number % len(weights)]
            row = {
                "id": f"{split}-{number}",
                "source": source,
                "domain": source,
                "licence": "none",
                "path": "",
                "offset": number,
            }
            counts = {"num_tokens": len(ids), "num_source_tokens": 0, "num_bytes": len(text.encode())}
            rows.append({**row, "split": split, "first_token": first, **counts})
            first += len(ids)
    content = {"texts": artefacts.digest_json({s: list(t) for s, t in documents.items()}), "weights": weights}
    digest = artefacts.digest_json({**content, "tokenizer": tokenizer.digest})
    content["tokenizer"] = tokenizer.digest
    place = root / "corpora" / digest
    with artefacts.new_folder(place) as folder:
        for split, array in tokens.items():
            array.tofile(folder / f"{split}-00000.bin")
        pq.write_table(pa.Table.from_pylist(rows), folder / DOCUMENTS)
        tokenizer.write(folder)
        manifest = {
            "format_version": artefacts.FORMAT_VERSION,
            "digest": digest,
            "name": name,
            "content": content,
            "tokens": {split: len(array) for split, array in tokens.items()},
            "shards": {split: [f"{split}-00000.bin"] if len(array) else [] for split, array in tokens.items()},
            "sources": [{"name": source, "weight": weight} for source, weight in weights.items()],
            "dtype": dtype.str,
            "files": artefacts.digest_files(folder),
        }
        artefacts.write_json(folder / "manifest.json", manifest)
    artefacts.point(root / "corpora" / "names" / name, place)
    return Corpus.open(name, root=root)


def stdlib_docstrings(num_modules: int) -> list[str]:
    """Docstrings of the running Python's own library, one document a function or class: real text, always there."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:num_modules]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]
