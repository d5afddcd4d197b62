"""A corpus of a few documents, written without Ray in the format that ulm.corpus.manifest reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ulm import artefacts
from ulm.corpus.manifest import SPLITS, Corpus, token_dtype
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.tokenizer import Tokenizer


def write_corpus(
    root: Path, documents: Iterable[tuple[str, str, str]], tokenizer: Tokenizer | None = None, name: str = "tiny"
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
    content = {"documents": artefacts.digest_json(rows), "tokens": artefacts.digest_json(tokens)}
    place = root / "corpora" / artefacts.digest_json(content)
    with artefacts.new_folder(place) as folder:
        pq.write_table(pa.Table.from_pylist(rows), folder / "documents.parquet")
        tokenizer.write(folder)
        for split, names in shards.items():
            np.array(tokens[split], dtype=dtype).tofile(folder / names[0])
        manifest = {
            "format_version": artefacts.FORMAT_VERSION,
            "digest": place.name,
            "name": name,
            "content": content,
            "tokens": {split: len(tokens[split]) for split in shards},
            "shards": shards,
            "dtype": dtype.str,
            "sources": [{"name": domain, "weight": 1.0} for domain in sorted({row["source"] for row in rows})],
            "files": artefacts.digest_files(folder),
        }
        artefacts.write_json(folder / "manifest.json", manifest)
    artefacts.point(root / "corpora" / "names" / name, place)
    return Corpus.read(place)
