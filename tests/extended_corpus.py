"""A corpus and extensions of it, built as the commands build them: `from tests.extended_corpus import …`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pipelines.corpus import assemble
from tests.plain_build import plain_build
from ulm.corpus.manifest import Corpus
from ulm.recipes.base import validate
from ulm.recipes.corpus import ExtendRecipe

WORDS = "rows weights order epoch corpus digest model token batch seed leg cursor shard split merge plan".split()


def first_corpus(root: Path, near: Path, weights: tuple[float, ...] = (1.0,), **fields: Any) -> Corpus:
    """Corpus `grows`: 20 texts of each weight, a tenth of them for validation; a byte is a token."""
    sources = [_source(near, f"first{number}", weight) for number, weight in enumerate(weights)]
    return plain_build(root, *sources, near=near, **{**_as_is(), "name": "grows", **fields})


def extension(root: Path, near: Path, base: str, weights: tuple[float, ...] = (1.0,), **fields: Any) -> Corpus:
    """Corpus `grows` anew: `base` (a name or digest) and 20 texts more of each weight, other ones at each call."""
    at = len(list(near.glob("*.jsonl")))
    sources = [_source(near, f"more{at}-{number}", weight) for number, weight in enumerate(weights)]
    recipe = validate(ExtendRecipe, {"name": "grows", "extends": base, "sources": sources, **fields})
    return assemble.build(recipe, root=root, near=near)


def _as_is() -> dict[str, Any]:
    return {"clean": {"duplicate_near": False}, "split": {"val": 0.1, "test": 0.0}}


def _source(near: Path, name: str, weight: float) -> dict[str, Any]:
    chance = random.Random(name)
    texts = [f"{name} {number} " + " ".join(chance.choices(WORDS, k=chance.randrange(3, 15))) for number in range(20)]
    (near / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"path": f"{name}.jsonl", "weight": weight, "name": name}
