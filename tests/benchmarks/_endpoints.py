"""One of the two endpoints that the group `export` compares: `python _endpoints.py SETTINGS`, over a vLLM member each.

SETTINGS is a JSON object: `kind` (ours or peer), `root`, `checkpoint`, `folder` (its export), `port`. Says {"url"} when
it is up, and ends when its input ends.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from ulm import runtime

MEMBER = "m"
MAX_ANSWERS = 64


def main() -> None:
    """Serve until the input ends."""
    given = json.loads(sys.argv[1])
    runtime.set_variable("ULM_HOME", given["root"])
    said, sys.stdout = sys.stdout, sys.stderr  # Ray writes to it
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    url = {"ours": ours, "peer": peer}[given["kind"]](given)
    said.write(json.dumps({"url": url}) + "\n")
    said.flush()
    sys.stdin.read()
    from ray import serve as ray_serve

    ray_serve.shutdown()
    ray.shutdown()


def recipe(given: dict[str, Any]) -> Any:
    """Of our endpoint: the member alone."""
    from ulm.recipes.base import validate
    from ulm.recipes.serve import ServeRecipe

    engine = {"kind": "vllm", "max_answers": MAX_ANSWERS, "dtype": "float32"}
    members = {MEMBER: {"checkpoint": given["checkpoint"], "engine": engine}}
    return validate(ServeRecipe, {"name": "bench", "members": members, "port": given["port"], "patience_s": 120.0})


def ours(given: dict[str, Any]) -> str:
    """`ulm serve up`."""
    from serve.app import up
    from serve.plan import make_plan

    asked = recipe(given)
    return str(up(make_plan(asked, root=Path(given["root"]), near=None), asked)["url"])


def peer(given: dict[str, Any]) -> str:
    """`build_openai_app` of ray.serve.llm, with the same arguments for vLLM and the same place for its worker."""
    from ray import serve as ray_serve
    from ray.serve.llm import build_openai_app

    from serve.engines.vllm.server import llm_config_of
    from serve.engines.vllm.settings import Config
    from serve.plan import make_plan

    planned = make_plan(recipe(given), root=Path(given["root"]), near=None).members[MEMBER]
    config = Config(**(planned.engine or {}))
    ray_serve.start(http_options={"host": "127.0.0.1", "port": given["port"]})
    app = build_openai_app({"llm_configs": [llm_config_of(0, MEMBER, Path(given["folder"]), config)]})
    ray_serve.run(app, name="peer", route_prefix="/")
    return f"http://127.0.0.1:{given['port']}/v1"


if __name__ == "__main__":
    main()
