"""transformers' `generate` on an exported model: how long greedy answers take, asked over stdin (_asked.py).

`python _transformers_peer.py SETTINGS`; SETTINGS is a JSON object: `model` (a folder), `dtype`, `device`, `threads`,
`compile`: with it the static cache and the library's own compiled decoding, without it the dynamic cache, eager.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks._asked import Questions, prompts


def main() -> None:
    """Load the model and answer."""
    questions = Questions()
    given = json.loads(sys.argv[1])
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, CompileConfig

    if given["device"] == "cpu":
        torch.set_num_threads(given["threads"])
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=getattr(torch, given["dtype"]))
    model = model.to(given["device"]).eval()
    model.generation_config.eos_token_id = None  # no token ends an answer, and nothing looks for one in every step
    how: dict[str, Any] = {}
    if given["compile"]:
        compiling = CompileConfig()
        compiling._compile_all_devices = True  # on a CPU too; by itself it compiles on GPUs only
        how = {"cache_implementation": "static", "compile_config": compiling}

    def seconds(batch: int, prompt: int, new: int, seed: int) -> float:
        """Until all answers have ended."""
        asked_BT = torch.tensor(prompts(batch, prompt, model.config.vocab_size, seed), device=given["device"])
        began_s = time.perf_counter()
        answers_BT = model.generate(
            asked_BT,
            attention_mask=torch.ones_like(asked_BT),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **how,
        ).cpu()
        took_s = time.perf_counter() - began_s
        assert answers_BT.shape == (batch, prompt + new)
        return took_s

    def ready() -> dict[str, object]:
        """What runs here."""
        return {"version": f"transformers {transformers.__version__}", "threads": torch.get_num_threads()}

    questions.answer_all(seconds=seconds, ready=ready)


if __name__ == "__main__":
    main()
