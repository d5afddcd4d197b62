"""The endpoint asked by code that nobody here wrote: Node's official client, LiteLLM, lm-eval, vLLM's load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import ulm
from tests.conformance import CHECKS, Endpoint, checked
from tests.processes import said_last
from tests.served import endpoint
from ulm import runtime
from ulm.exchange.hf import export_hf
from ulm.models.generate import generate
from ulm.swarm.manifest import Swarm
from ulm.tokenizers.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".venv-clients"
SCRIPTS = ROOT / "tests" / "clients"
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def url(swarm: Swarm) -> Iterator[str]:
    """The small swarm's address."""
    with endpoint(swarm=str(swarm.folder)) as up:
        yield str(up["url"])


def said_by(command: Sequence[str | Path], given: Any = None) -> Any:
    """What a client says in its last line."""
    unset = {"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"}
    env = {k: v for k, v in os.environ.items() if k not in unset} | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return said_last([str(word) for word in command], given, env, TIMEOUT_S)


def answered(url: str, path: str, **body: Any) -> Any:
    """The endpoint's own answer to a greedy request of eight tokens to e00."""
    answer = httpx.post(f"{url}/{path}", json={"model": "e00", "temperature": 0, **body}, trust_env=False, timeout=60)
    return answer.raise_for_status().json()


def test_all_that_the_conformance_table_asks_holds(url: str, swarm: Swarm) -> None:
    with Endpoint(url, "e00", Tokenizer.read(swarm.checkpoint("e00")).encode) as at:
        assert {f"{said.group}: {said.what}": why for said, why in checked(at) if why} == {}


def test_the_published_table_is_of_these_checks_and_ours_passes_them() -> None:
    """`ulm bench conformance` writes it."""
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    results = {row[0]: row[1:] for row in rows if row[-1] in ("yes", "no")}
    assert list(results) == [said.what for said in CHECKS]
    assert {what for what, (local, *_) in results.items() if local != "yes"} == set()


def test_the_official_node_client(url: str) -> None:
    if not (node := shutil.which("node")):
        pytest.skip("there is no node")
    if not (CLIENTS / "node_modules" / "openai").is_dir():
        pytest.skip("the Node client is not installed: make clients, where there is an npm")
    said = said_by([node, SCRIPTS / "node_client.mjs", url, "e00", CLIENTS])
    assert {"swarm", "e00", "seed"} <= set(said["models"]) and said["model"] == "e00"
    whole = answered(url, "completions", prompt="The", max_tokens=8, logprobs=2)
    assert said["completion"]["text"] == said["streamed"] == whole["choices"][0]["text"]
    assert said["completion"]["tokens"] == whole["choices"][0]["logprobs"]["tokens"]
    assert said["completion"]["usage"] == whole["usage"]
    messages = [{"role": "user", "content": "Return a list"}]
    chat = answered(url, "chat/completions", messages=messages, max_tokens=8)
    text = chat["choices"][0]["message"]["content"]
    assert said["chat"] == said["chat_streamed"] == said["gathered"] == text
    assert said["stream_usage"] == chat["usage"]
    assert said["response"].startswith(text) and len(set(said["embedding"])) == 1
    assert said["error"] == {
        "type": "NotFoundError",
        "status": 404,
        "code": "model_not_found",
        "param": "model",
    }


def test_litellm(url: str) -> None:
    python = CLIENTS / "bin" / "python"
    if not python.is_file():
        pytest.skip("LiteLLM is not installed: make clients")
    said = said_by([python, SCRIPTS / "litellm_client.py", url, "e00"])
    chat = answered(url, "chat/completions", messages=[{"role": "user", "content": "Return a list"}], max_tokens=8)
    assert said["chat"] == said["chat_streamed"] == chat["choices"][0]["message"]["content"]
    assert said["usage"]["total_tokens"] == chat["usage"]["total_tokens"]
    assert said["completion"] == answered(url, "completions", prompt="The", max_tokens=8)["choices"][0]["text"]
    assert said["embedding"] > 0 and said["error"] == {"status": 404}


def test_lm_evals_loglikelihoods_equal_the_models(url: str, swarm: Swarm, tmp_path: Path) -> None:
    """Of the model alone, read whole: its logits, without an engine."""
    model, tokenizer = ulm.load(swarm.checkpoint("e01"))
    folder = export_hf(model, tokenizer, tmp_path / "exported")
    pairs = [["The with", " statement"], ["A class", " definition is"], ["import json", "\ndef f("], ["é", "ü∑"]]
    length = model.spec.context_tokens
    said = said_by([sys.executable, SCRIPTS / "lm_eval_client.py", url, "e01", folder, str(length)], pairs)
    for (context, rest), (loglikelihood, is_greedy), rolling, until in zip(
        pairs, said["pairs"], said["rolling"], said["until"], strict=True
    ):
        tokens = tokenizer.encode(context + rest)
        num_context = len(tokenizer.encode(context))
        logprobs = logprobs_of(model, tokens)
        wanted = sum(float(logprobs[at - 1, tokens[at]]) for at in range(num_context, len(tokens)))
        assert loglikelihood == pytest.approx(wanted, abs=1e-3)
        best = all(tokens[at] == int(logprobs[at - 1].argmax()) for at in range(num_context, len(tokens)))
        assert is_greedy == best
        with_start = [tokenizer.eot_id, *tokens]
        whole = logprobs_of(model, with_start)
        assert rolling == pytest.approx(
            sum(float(whole[at - 1, with_start[at]]) for at in range(1, len(with_start))), abs=1e-3
        )
        free = generate(model, tokenizer, tokenizer.encode(context), max_tokens=8, stop=("\n",))
        assert until == free.text


@torch.no_grad()
def logprobs_of(model: Any, tokens: list[int]) -> torch.Tensor:
    """logprobs_TV after each token."""
    return model(torch.tensor([tokens]))[0].double().log_softmax(-1)


def test_schemathesis_meets_nothing_that_our_document_does_not_say(url: str, tmp_path: Path) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    done = subprocess.run(
        [Path(sys.executable).with_name("schemathesis"), "run", f"{url.removesuffix('/v1')}/openapi.json", "--no-color"]
        + ["--checks", checks, "--max-examples", "20", "--seed", "1", "--generation-database", "none"],
        cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(SCRIPTS)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0 and "Tested: 13" in done.stdout, done.stdout[-6000:]


def test_vllms_load_generator(url: str, swarm: Swarm, tmp_path: Path) -> None:
    if not runtime.has_vllm():
        pytest.skip("vLLM is not installed")
    folder = export_hf(*ulm.load(swarm.checkpoint("e00")), tmp_path / "exported")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"The value of {n} is"}) + "\n" for n in range(12)))
    load = ROOT / "tests" / "benchmarks" / "_load.py"
    for backend, path in (("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")):
        result = tmp_path / f"{backend}.json"
        arguments = {
            "backend": backend,
            "endpoint": path,
            "base-url": url.removesuffix("/v1"),
            "model": folder,
            "served-model-name": "e00",
            "dataset-name": "custom",
            "dataset-path": prompts,
            "custom-output-len": 16,
            "num-prompts": 12,
            "max-concurrency": 4,
            "result-dir": tmp_path,
            "result-filename": result.name,
        }
        words = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
        done = subprocess.run(
            [sys.executable, str(load), "--save-result", "--disable-tqdm", "--skip-chat-template", *words],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=runtime.environment(),
            check=False,
        )
        assert result.is_file(), done.stderr[-4000:]
        found = json.loads(result.read_text(encoding="utf-8"))
        assert (found["completed"], found["failed"]) == (12, 0) and found["total_output_tokens"] > 12
