"""vLLM's offline engine on an exported model: how long greedy answers take, asked over stdin (_asked.py).

`python _vllm_peer.py SETTINGS`; SETTINGS is a JSON object: `model` (a folder), `dtype`, `compile`. One process, bound
to every core that it may use, none reserved (vLLM keeps one free by default). The environment names its cache.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks._asked import Questions, prompts

CORES = ",".join(map(str, sorted(os.sched_getaffinity(0))))
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else two processes more, and messages between them in every step
    "VLLM_CPU_OMP_THREADS_BIND": CORES,
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
KV_CACHE_BYTES = 1 << 29
CONTEXT_TOKENS, MAX_ANSWERS = 1024, 64


def main() -> None:
    """Load the model, compile it where asked to, and answer."""
    questions = Questions()
    given = json.loads(sys.argv[1])
    os.environ.update(SETTINGS)
    import torch
    from vllm import LLM, SamplingParams

    started_s = time.perf_counter()
    llm = LLM(
        model=given["model"],
        dtype=given["dtype"],
        enforce_eager=not given["compile"],
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=CONTEXT_TOKENS,
        max_num_seqs=MAX_ANSWERS,
        enable_prefix_caching=False,  # no two prompts have a beginning in common
    )
    start_s = time.perf_counter() - started_s
    vocab_size = llm.llm_engine.model_config.get_vocab_size()

    def seconds(batch: int, prompt: int, new: int, seed: int) -> float:
        """Until all answers have ended."""
        asked = [{"prompt_token_ids": tokens} for tokens in prompts(batch, prompt, vocab_size, seed)]
        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        began_s = time.perf_counter()
        answers = llm.generate(asked, sampling, use_tqdm=False)
        took_s = time.perf_counter() - began_s
        assert all(len(answer.outputs[0].token_ids) == new for answer in answers)
        return took_s

    def ready() -> dict[str, object]:
        """What runs here."""
        return {"version": f"vLLM {version('vllm-cpu')}", "threads": torch.get_num_threads(), "start_s": start_s}

    questions.answer_all(seconds=seconds, ready=ready)


if __name__ == "__main__":
    main()
