"""Group `export`: our endpoint over a vLLM member against the OpenAI app of ray.serve.llm, with one engine's settings.

Both serve the same exported model, a process tree each; vLLM's own load generator asks one and then the other, by
turns. Run by `ulm bench export` in a checkout; 12 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
import ulm
from tests.benchmarks._endpoints import MEMBER
from tests.benchmarks._figures import Failed, report
from tests.benchmarks._texts import training_texts
from ulm import runtime
from ulm.exchange.hf import export_hf
from ulm.tokenizers.bpe import train_bpe

HERE = Path(__file__).parent
PEER = "ray.serve.llm build_openai_app"
CONCURRENCY, REQUESTS, ROUNDS = 32, 192, 5
# Half of what both endpoints take on two cores. At a fixed concurrency the answers, which are of one length, end and
# begin in waves, and the wait for a first token is mostly for the others of the wave; at a rate it is the endpoint's.
RATE, RATE_ROUNDS = 6, 3
PROMPT_TOKENS, ANSWER_TOKENS = 64, 64
NUM_PROMPTS, PROMPTS = 2_000, "prompts.jsonl"  # of real text; a round takes other ones of them than the last
READY_S, LOAD_S = 300.0, 300.0
TOKENIZER_MB = 2.0


def main() -> None:
    """All figures of the group."""
    options = argparse.ArgumentParser()
    options.add_argument("--device", default=None, help="this group has no figures of a GPU yet")
    options.add_argument("--full", action="store_true", help="the same")
    options.parse_args()
    try:
        if not runtime.has_vllm():
            raise Failed("vllm is not installed")
        found = measured()
    except Failed as error:
        for name, unit, goal in (("throughput", "tokens/s", ">= 0.95"), ("first_token", "ms more", "<= 5")):
            report(f"export_{name}", [], unit, goal=goal, note=str(error))
        return
    at_once, at_a_rate = found["max-concurrency"], found["request-rate"]
    key, goal = "output_throughput", ">= 0.95"
    ours, theirs = (values(at_once[kind], key) for kind in ("ours", "peer"))
    report("export_throughput", ours, "tokens/s", goal=goal, peer=PEER, peer_values=theirs)
    for name, runs, how in (
        ("export_first_token", at_once, f"at {CONCURRENCY} at once"),
        ("export_first_token_at_a_rate", at_a_rate, f"at {RATE} a second"),
    ):
        ours, theirs = (values(runs[kind], "median_ttft_ms") for kind in ("ours", "peer"))
        later = [a - b for a, b in zip(ours, theirs, strict=True)]
        report(name, later, "ms more", goal="<= 5", note=f"than {PEER}, medians {how}")


def values(runs: list[dict[str, Any]], key: str) -> list[float]:
    """One figure of all rounds."""
    return [float(run[key]) for run in runs]


def measured() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What vLLM's load generator says of each endpoint, round by round, for each kind of load. Raises Failed."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as up:
        root = Path(folder)
        checkpoint, exported = model(root)
        given = {"root": str(root), "checkpoint": str(checkpoint), "folder": str(exported)}
        urls = {kind: up.enter_context(endpoint({**given, "kind": kind})) for kind in ("peer", "ours")}
        kinds = [*urls]
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        turn = 0
        for limit, number, rounds in (("max-concurrency", CONCURRENCY, ROUNDS), ("request-rate", RATE, RATE_ROUNDS)):
            runs = found[limit] = {kind: [] for kind in kinds}
            for counted in range(-(not turn), rounds):  # the very first warms up
                for kind in kinds:
                    run = load(urls[kind], exported, root / "load.json", turn, {limit: number})
                    if counted >= 0:
                        runs[kind].append(run)
                kinds.reverse()
                turn += 1
        return found


def model(root: Path) -> tuple[Path, Path]:
    """A `mini` with random weights and a tokenizer of real words, as a checkpoint and as its export; prompts beside."""
    corpora = runtime.variable("ULM_CORPORA")
    if not corpora:
        raise Failed("ULM_CORPORA is not set: no text to make a tokenizer of")
    texts = training_texts(Path(corpora), TOKENIZER_MB)
    tokenizer = train_bpe((text for some in texts.values() for text in some), 4_096)
    spec = ulm.ModelSpec.preset("mini", vocab_size=tokenizer.vocab_size, context_tokens=512)
    words = [tokenizer.encode(text) for some in texts.values() for text in some]
    tokens = [token for text in words for token in text]
    prompts = (tokenizer.decode(tokens[n * PROMPT_TOKENS : (n + 1) * PROMPT_TOKENS]) for n in range(NUM_PROMPTS))
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (root / PROMPTS).write_text(lines, encoding="utf-8")
    checkpoint = root / "runs" / "mini" / "step-00000000"
    made = ulm.build(spec, seed=0)
    ulm.save(made, tokenizer, checkpoint)
    return checkpoint, export_hf(made, tokenizer, root / "folder")


@contextmanager
def endpoint(given: dict[str, Any]) -> Iterator[str]:
    """The URL of an endpoint in processes of its own, until the block ends. Raises Failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(HERE / "_endpoints.py"), json.dumps({**given, "port": port})]
    log = Path(given["root"]) / f"{given['kind']}.log"
    with log.open("wb") as said:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        assert child.stdin is not None and child.stdout is not None
        try:
            line = child.stdout.readline()
            if not line:
                last = log.read_text(encoding="utf-8", errors="replace").strip()[-400:]
                raise Failed(f"the endpoint {given['kind']} did not start: {last}")
            yield str(json.loads(line)["url"])
        finally:
            child.stdin.close()
            try:
                child.wait(timeout=READY_S)
            except subprocess.TimeoutExpired:
                child.kill()


def load(url: str, folder: Path, result: Path, seed: int, limit: dict[str, int]) -> dict[str, Any]:
    """What `vllm bench serve` measures of an endpoint. Raises Failed where a request failed."""
    result.unlink(missing_ok=True)
    arguments = {
        "backend": "openai",
        "base-url": url.removesuffix("/v1"),
        "endpoint": "/v1/completions",
        "model": str(folder),
        "served-model-name": MEMBER,
        "tokenizer": str(folder),
        # Its random prompts come with ignore_eos, which is vLLM's own and no field of OpenAI's.
        "dataset-name": "custom",
        "dataset-path": str(result.parent / PROMPTS),
        "custom-output-len": ANSWER_TOKENS,
        "num-prompts": REQUESTS,
        **limit,
        "seed": seed,
        "result-dir": str(result.parent),
        "result-filename": result.name,
    }
    command = [sys.executable, str(HERE / "_load.py"), "--save-result", "--disable-tqdm", "--skip-chat-template"]
    command += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_S, env=runtime.environment())
    if not result.is_file():
        raise Failed(f"vllm bench serve: {done.stderr.strip()[-400:]}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if found["completed"] != REQUESTS or not math.isfinite(found["output_throughput"]):
        raise Failed(f"vllm bench serve: {found['completed']} of {REQUESTS} requests were answered")
    return found


if __name__ == "__main__":
    main()
