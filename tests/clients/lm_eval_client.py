"""lm-eval's local-completions against an endpoint: `python lm_eval_client.py URL MODEL TOKENIZER MAX_LENGTH`.

Reads [[context, continuation], …] as JSON; says {"pairs": [[log-likelihood, is_greedy], …], "rolling": […],
"until": […]}.
"""

from __future__ import annotations

import json
import sys

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

url, model, tokenizer, max_length = sys.argv[1:]
pairs = json.load(sys.stdin)
api = LocalCompletionsAPI(
    base_url=f"{url}/completions",
    model=model,
    tokenizer=tokenizer,
    tokenizer_backend="huggingface",
    max_length=int(max_length),
    num_concurrent=1,
    max_retries=1,
    batch_size=4,
)


def asked(kind: str, arguments: list[tuple]) -> list[Instance]:
    """Requests as lm-eval's tasks make them."""
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


said = {
    "pairs": api.loglikelihood(asked("loglikelihood", [tuple(pair) for pair in pairs]), disable_tqdm=True),
    "rolling": api.loglikelihood_rolling(
        asked("loglikelihood_rolling", [(context + rest,) for context, rest in pairs]), disable_tqdm=True
    ),
    "until": api.generate_until(
        asked("generate_until", [(context, {"until": ["\n"], "max_gen_toks": 8}) for context, _ in pairs]),
        disable_tqdm=True,
    ),
}
sys.stdout.write(json.dumps(said) + "\n")
