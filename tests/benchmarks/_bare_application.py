"""The endpoint's peer: two deployments that do nothing but what Ray Serve itself takes, in a cluster of their own.

A process: it prints its URL once it answers, and ends when its stdin does.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request

STARTS_S = 120.0


@contextmanager
def bare_application() -> Iterator[str]:
    """Its URL, until the block ends."""
    command = [sys.executable, str(Path(__file__))]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    try:
        if not (url := child.stdout.readline().strip()):
            raise SystemExit("the bare application did not start")
        yield url
    finally:
        child.stdin.close()
        child.wait(STARTS_S)
        child.stdout.close()


def run() -> str:
    """Deploy it; its URL."""
    import ray
    from ray import serve as ray_serve

    app = FastAPI()
    many = {"max_ongoing_requests": 1_000, "ray_actor_options": {"num_cpus": 0}}

    @ray_serve.deployment(**many)
    class Echo:
        async def complete(self, prompt: str, number: int) -> str:
            return (prompt * number)[:number]

    @ray_serve.deployment(**many)
    @ray_serve.ingress(app)
    class Ingress:
        def __init__(self, echo: Any) -> None:
            self._echo = echo

        @app.post("/completions")
        async def completions(self, request: Request) -> dict[str, Any]:
            body = await request.json()
            text = await self._echo.complete.remote(body["prompt"], body["max_tokens"])
            return {"choices": [{"text": text}]}

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    ray_serve.run(Ingress.bind(Echo.bind()), name="bare")  # type: ignore[attr-defined]
    return f"http://127.0.0.1:{port}"


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # what Ray prints is no URL
        found = run()
    print(found, flush=True)
    sys.stdin.read()
