"""A small real swarm: three experts trained for seconds on three kinds of text, a fitted router, swarm.json."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch.nn.functional import cross_entropy

import ulm
from ulm import artefacts
from ulm.recipes.serve import Budget
from ulm.swarm.embed import Embedder, words
from ulm.swarm.manifest import Part, Swarm, write_swarm
from ulm.swarm.router import Router
from ulm.tokenizers.bpe import train_bpe

CONTEXT_TOKENS = 96
TRAIN_STEPS = 40


def texts() -> dict[str, str]:
    """Three kinds of text that every Python has."""
    from pydoc_data.topics import topics

    docstrings = [inspect.getdoc(value) or "" for value in vars(np).values() if callable(value)]
    return {
        "code": inspect.getsource(json.decoder) + inspect.getsource(ast),
        "reference": "\n".join(topics[name] for name in sorted(topics)[:20]),
        "docstrings": "\n".join(docstrings[:150]),
    }


@pytest.fixture(scope="session")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Swarm:
    """Members e00, e01, e02 and seed over one tokenizer, with a router fitted on their texts."""
    root = tmp_path_factory.mktemp("swarm-root")
    domains = texts()
    tokenizer = train_bpe(domains.values(), 512)
    members: dict[str, Part] = {}
    spec = ulm.ModelSpec.preset("nano", vocab_size=tokenizer.vocab_size, context_tokens=CONTEXT_TOKENS)
    for cluster, (domain, text) in enumerate(domains.items()):
        path = root / "runs" / f"e{cluster:02d}" / f"step-{TRAIN_STEPS:08d}"
        ulm.save(_trained(spec, tokenizer.encode(text), seed=cluster), tokenizer, path)
        members[f"e{cluster:02d}"] = Part(path, cluster, domain)
    members["seed"] = Part(members["e00"].checkpoint)
    router = _router(root / "clustering", [f"e{c:02d}" for c in range(3)], list(domains.values()))
    return write_swarm(
        root,
        "small",
        members=members,
        router=router,
        strategy={"kind": "mixture", "top_k": 2},
        budget=Budget(),
        tokenizer_digest=tokenizer.digest,
        corpus_digest="0" * 64,
    )


def _trained(spec: ulm.ModelSpec, tokens: list[int], seed: int) -> torch.nn.Module:
    model, generator = ulm.build(spec, seed=seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    data = torch.tensor(tokens)
    for _ in range(TRAIN_STEPS):
        starts = torch.randint(len(data) - CONTEXT_TOKENS - 1, (8,), generator=generator).tolist()
        rows = torch.stack([data[start : start + CONTEXT_TOKENS + 1] for start in starts])
        loss = cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _router(folder: Path, ids: list[str], domains: list[str]) -> Path:
    pieces = [(c, text[i : i + 600]) for c, text in enumerate(domains) for i in range(0, len(text), 600)]
    vectorizer = TfidfVectorizer(analyzer=words, max_features=2_000).fit([text for _, text in pieces])
    svd = TruncatedSVD(16, random_state=0).fit(vectorizer.transform([text for _, text in pieces]))
    vocabulary = {word: int(row) for word, row in vectorizer.vocabulary_.items()}
    embedder = Embedder(vocabulary, vectorizer.idf_, svd.components_.T.astype(np.float32))
    vectors = [[embedder(text) for c, text in pieces if c == cluster] for cluster in range(len(ids))]
    centroids = np.array([np.mean([v for v in of_one if v is not None], axis=0) for of_one in vectors])
    router = Router(ids, embedder, centroids.astype(np.float32), np.array([0.5, 0.3, 0.2]), 0.1)
    with artefacts.new_folder(folder) as partial:
        router.write(partial)
        files = artefacts.digest_files(partial)
        artefacts.write_json(
            partial / "manifest.json", {"format_version": artefacts.FORMAT_VERSION, "files": files, "digest": ""}
        )
    return folder


@pytest.fixture
def with_engine(swarm: Swarm) -> Callable[[Callable[[Any], Awaitable[Any]]], Any]:
    """Runs an async test body with a local engine that has the swarm's members loaded."""
    import asyncio

    from serve.engines.local.engine import Config, LocalEngine

    def run(body: Callable[[Any], Awaitable[Any]], **settings: Any) -> Any:
        async def with_it() -> Any:
            engine = LocalEngine(Config(kind="local", device="cpu", threads=1, compile_after_steps=None, **settings))
            try:
                for member in swarm.members:
                    await engine.load(member, str(swarm.checkpoint(member)))
                return await body(engine)
            finally:
                await engine.close()

        return asyncio.run(with_it())

    return run


async def whole(chunks: AsyncIterator[Any]) -> Any:
    """All chunks of an answer as one."""
    from serve.contracts import TokenChunk

    return TokenChunk.joined([chunk async for chunk in chunks])
