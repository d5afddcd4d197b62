"""Every kind of the component library answers in the local engine as it does in the plain generator."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import ulm
from serve.contracts import GenerateRequest
from serve.engines.local.rows import Rows
from tests.engine import answer, with_engine
from tests.trained import num_equal_tokens
from tests.variants import every_variant, model_of
from ulm.checkpoints import store
from ulm.tokenizers.byte import byte_tokenizer

LOGPROBS = 2e-4  # float32 in another order, through weights that are large on purpose (tests/variants.py)
NUM_TOKENS = 12
LENGTHS = (1, 5, 17)  # of the prompts: shorter and longer than a step's tokens


@every_variant
def test_answers_at_once_in_small_steps_equal_the_plain_generator(overrides: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = model_of({**overrides, "vocab_size": tokenizer.vocab_size}).eval()
    ulm.save(model, tokenizer, tmp_path / "m")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1)
    ulm.save(other, tokenizer, tmp_path / "other")
    prompts = [tuple((7 * i + 13 * j) % 256 for j in range(n)) for i, n in enumerate(LENGTHS)]
    models = {"m": model, "other": other}  # in one stack, where the spec can be stacked
    asked = [(member, prompt) for prompt in prompts for member in models][:-1]
    oracles = [ulm.generate(models[m], tokenizer, list(prompt), max_tokens=NUM_TOKENS) for m, prompt in asked]

    async def body(engine: Any) -> Any:
        requests = [GenerateRequest(p, {m: 1.0}, NUM_TOKENS, num_top_logprobs=0) for m, p in asked]
        scored = await engine.score("m", prompts[2])
        return await asyncio.gather(*(answer(engine, r) for r in requests)), scored

    found, scored = with_engine(
        {name: tmp_path / name for name in models}, body, max_batch_tokens=6, kv_cache_bytes=1 << 22
    )
    compared = 0
    for (member, prompt), oracle, chunk in zip(asked, oracles, found, strict=True):
        same = num_equal_tokens(models[member], prompt, chunk.tokens, oracle.tokens)
        assert [e.logprob for e in chunk.logprobs[:same]] == pytest.approx(oracle.logprobs[:same], abs=LOGPROBS)
        compared += same
    assert compared >= sum(len(oracle.tokens) for oracle in oracles) // 2, "too many ties to have compared anything"
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([prompts[2]]))[0].log_softmax(-1)
    expected = [float(logprobs_TV[i, t]) for i, t in enumerate(prompts[2][1:])]
    assert scored == pytest.approx(expected, abs=LOGPROBS)


def test_a_text_that_grows_is_not_read_again_by_layers_that_keep_sums(monkeypatch: Any) -> None:
    model = model_of({"attention": "linear"}).eval()
    how = {"dtype": torch.float32, "device": torch.device("cpu"), "kv_cache_bytes": 1 << 20}
    rows = Rows(model.spec, **how, max_rows=2, num_prefixes=2)
    rows.put(0, store.tensors(model))
    run: list[int] = []
    step = rows.model.step
    monkeypatch.setattr(
        rows.model, "step", lambda tokens_BT, cache: run.append(tokens_BT.shape[1]) or step(tokens_BT, cache)
    )
    text = tuple(7 * n % 97 for n in range(14))
    texts = [text[:10], text[:11], (5, 6, 7), text[:14], (8, 9), text]
    for each in texts:
        with torch.no_grad():
            expected = model(torch.tensor([each]))[0, -1].log_softmax(-1)
        assert torch.allclose(rows.next_logits(each).log_softmax(-1), expected, atol=LOGPROBS)
    assert run == [10, 1, 3, 3, 2, 14], "sums cannot go back by a token, so the same text once more is run anew"
