"""Group `loop`: the demo's time and memory, training against a bare loop, the gateway against the bare engine.

Run by `ulm bench loop` in a checkout. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks._figures import report
from tests.benchmarks._peak import Peak

ULM = [sys.executable, "-m", "ulm.cli.main"]
PAIRS = 5
WARMUP_STEPS, STEPS = 20, 30
REQUESTS = 150  # of each kind, by turns


def main() -> None:
    """All figures of the group."""
    options = argparse.ArgumentParser()
    options.add_argument("--device", default=None)
    options.add_argument("--full", action="store_true", help="the demo three times")
    options.add_argument("--only", default=None, choices=["demo", "train", "gateway"])
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="ulm-bench-") as folder:
        home = Path(folder)
        if chosen.only in (None, "demo"):
            demo(home, runs=3 if chosen.full else 1)
        if chosen.only in (None, "train"):
            train(home)
        if chosen.only in (None, "gateway"):
            gateway(home)


# ---- the demo


def demo(home: Path, runs: int) -> None:
    """Seconds after set-up, and peak memory: proportional set sizes of its processes, and what it put in /dev/shm."""
    seconds, gigabytes = [], []
    for run in range(runs):
        environment = {**os.environ, "ULM_HOME": str(home / f"demo-{run}")}
        started_s = time.monotonic()
        peak = Peak(environment["ULM_HOME"])
        with (home / f"demo-{run}.log").open("wb") as log:
            child = subprocess.Popen([*ULM, "demo"], env=environment, stdout=subprocess.PIPE, stderr=log)
            output = child.communicate()[0]
        peak_bytes = peak.stop()
        if child.returncode != 0:
            tail = (home / f"demo-{run}.log").read_text(errors="replace")[-300:]
            report("demo_seconds", [], "s", goal="<= 300", note=f"the demo failed: {tail}")
            return
        json.loads(output.splitlines()[-1])
        seconds.append(time.monotonic() - started_s)
        gigabytes.append(peak_bytes / 1e9)
    report("demo_seconds", seconds, "s", goal="<= 300")
    report("demo_peak_memory", gigabytes, "GB", goal="<= 6")


# ---- training


def train(home: Path) -> None:
    """`ulm train` against a bare single-process loop over the same model, rows and batch, by turns."""
    environment = {**os.environ, "ULM_HOME": str(home / "train")}
    text = home / "text.py"
    text.write_text("\n".join(p.read_text() for p in sorted(Path(os.__file__).parent.glob("*.py"))[:60]))
    corpus = home / "bench.yaml"
    corpus.write_text(f"name: bench\nsources: [{{path: {text}, document: paragraph}}]\nsplit: {{val: 0, test: 0}}\n")
    subprocess.run([*ULM, "corpus", "build", str(corpus)], env=environment, check=True, capture_output=True)
    recipe = home / "train.yaml"
    recipe.write_text(f"corpus: bench\nmodel: nano\ntrain: {{steps: {WARMUP_STEPS + STEPS}, batch_tokens: 8192}}\n")
    ours, bare = [], []
    for pair in range(PAIRS):
        command = [*ULM, "train", str(recipe), "--set", f"name=bench-{pair}"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        lines = (home / "train" / "runs" / f"bench-{pair}" / "metrics.jsonl").read_text().splitlines()
        steps = [step for step in map(json.loads, lines) if "loss" in step and step["step"] > WARMUP_STEPS]
        ours.append(len(steps) / sum(1 / step["tokens_per_second"] for step in steps))
        worker = [sys.executable, __file__.replace("loop.py", "_bare_loop.py"), str(recipe), str(WARMUP_STEPS)]
        found = subprocess.run(worker, env=environment, check=True, capture_output=True)
        bare.append(float(found.stdout.splitlines()[-1]))
    report("train_throughput", ours, "tokens/s", goal=">= 0.95", peer="bare single-process loop", peer_values=bare)


# ---- the gateway


def gateway(home: Path) -> None:
    """Milliseconds that HTTP, gateway and Ray Serve add to one short completion, not streamed."""
    import httpx

    import ulm
    from tests.trained import trained_nano

    checkpoint = trained_nano(home / "gateway")
    model, tokenizer = ulm.load(checkpoint)
    del model
    recipe = home / "serve.yaml"
    with _free_port() as port:
        engine = "{kind: local, compile_after_steps: null}"  # what HTTP adds is measured, not what compiling takes
        recipe.write_text(f"port: {port}\nmembers: {{m: {{checkpoint: {checkpoint}}}}}\nengine: {engine}\n")
    environment = {**os.environ, "ULM_HOME": str(home / "serve")}
    started = subprocess.run(
        [*ULM, "serve", "up", str(recipe), "--detach"], env=environment, check=True, capture_output=True
    )
    url = json.loads(started.stdout.splitlines()[-1])["url"]
    body = {"model": "m", "prompt": "The", "max_tokens": 8, "temperature": 0}
    direct, over_http = [], []
    try:
        with _engine(checkpoint) as ask, httpx.Client(trust_env=False, timeout=60) as client:
            for turn in range(REQUESTS + 20):
                first = _timed(lambda: ask(tokenizer))
                second = _timed(lambda: client.post(f"{url}/completions", json=body).raise_for_status())
                if turn >= 20:
                    direct.append(first)
                    over_http.append(second)
    finally:
        subprocess.run([*ULM, "serve", "down"], env=environment, check=True, capture_output=True)
    added = [h - d for h, d in zip(over_http, direct, strict=True)]
    note = f"engine alone {sorted(direct)[len(direct) // 2]:.2f} ms"
    report("gateway_overhead", added, "ms", goal="<= 10", note=note)


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


@contextlib.contextmanager
def _engine(checkpoint: Path):  # type: ignore[no-untyped-def]
    """A function that has a local engine in this process answer the request, as the gateway would ask it."""
    from serve.contracts import GenerateRequest
    from serve.engines.local.engine import Config, LocalEngine
    from ulm.models.generate import prompt_tokens

    loop = asyncio.new_event_loop()
    engine = LocalEngine(Config(kind="local", threads=1, compile_after_steps=None))
    loop.run_until_complete(engine.load("m", str(checkpoint)))

    async def answer(tokenizer: object) -> None:
        request = GenerateRequest(tuple(prompt_tokens(tokenizer, "The")), {"m": 1.0}, 8, stream=False)
        async for _ in engine.generate(request):
            pass

    yield lambda tokenizer: loop.run_until_complete(answer(tokenizer))
    loop.run_until_complete(engine.close())


def _timed(function) -> float:  # type: ignore[no-untyped-def]
    started_s = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started_s)


if __name__ == "__main__":
    main()
