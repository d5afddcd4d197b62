"""`ulm serve up|update|down|status`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer

from ulm import runtime
from ulm.cli import cluster, console
from ulm.cli.options import Address, Overrides, Recipe
from ulm.errors import ClusterError, ConfigError
from ulm.recipes import ServeRecipe, load_recipe

DOWN_TIMEOUT_S = 60.0
UP_TIMEOUT_S = 600.0

serve = typer.Typer(
    help="Serve a swarm, or single models, behind one OpenAI-compatible endpoint.", no_args_is_help=True
)


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.add_typer(serve, name="serve")


@serve.command("up")
def up(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006  typer copies it
    address: Address = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once the endpoint answers; end it with down.")
    ] = False,
) -> None:
    """Serve until Ctrl-C. Prints {"url", "models", "pid"} once every model answers.

    At the end no new requests are taken, and those under way have the recipe's drain_s to finish; a second Ctrl-C
    ends them, too.

    Example: ulm serve up serve.yaml --set port=8001 --set cpus=2

    cpus: cores that each engine computes on. Settings of its own (docs/engine.md): --set engine.dtype=bfloat16

    Who answers, what it may cost, who steps in (docs/swarm.md): --set strategy.kind=route --set budget.max_calls=4
    --set limits.max_top_k=2 --set fallback=[seed]
    """
    loaded = cast(ServeRecipe, load_recipe("serve up", recipe, overrides))
    root = runtime.root()
    if (running := cluster.running(root)) is not None:
        problem = f"already serving at {running['url']} (pid {running['pid']})"
        raise ClusterError(f"{problem}; change it with `ulm serve update`, or end it with `ulm serve down`")
    if detach:
        console.err.print(f"starting; what it says goes to {root / 'serve.log'}", soft_wrap=True)
        with console.err.status("starting the endpoint"):
            state = _detached(root, recipe, overrides, address)
        console.finish(state)
        return
    from serve import app as serve_app
    from serve import door, graph
    from serve.plan import make_plan

    plan = make_plan(loaded, root=root, near=recipe.parent)  # what is wrong with it is said before Ray starts
    door.check_port(loaded.host, loaded.port)
    out = sys.stdout
    with cluster.session(root, address, dashboard=True) as joined:
        if (too_little := graph.lacking(plan, loaded)) is not None:
            if joined.is_own:
                raise ClusterError(too_little)
            console.err.print(f"[yellow]waiting for the cluster to grow[/]: {too_little}", soft_wrap=True)
        try:
            with console.err.status("starting the engines"):
                started = serve_app.up(plan, loaded)
            state = {**started, "pid": os.getpid()}
            of_cluster = {"ray_address": joined.address, "is_own_cluster": joined.is_own}
            cluster.remember(root, {**state, **of_cluster, **of_recipe(plan.tls, loaded)})
            _wait(state, out)
            serve_app.drain()
        finally:
            cluster.forget(root)
            if not joined.is_own:  # a cluster of our own ends as a whole
                serve_app.down()


def of_recipe(tls: tuple[Path, Path] | None, recipe: ServeRecipe) -> dict[str, Any]:
    """What `update`, `down` and `ulm status` have to know of the recipe that is served."""
    certificate = str(tls[0]) if tls else None
    return {"name": recipe.name, "host": recipe.host, "drain_s": recipe.drain_s, "certificate": certificate}


def _wait(state: dict[str, Any], out: TextIO) -> None:
    """Say where the endpoint is, and wait until SIGINT or SIGTERM, which end it without an error once it was said."""
    try:
        console.err.print(f"serving {', '.join(state['models'])} at [bold]{state['url']}[/]; Ctrl-C ends it")
        console.finish(state, out)
        while True:
            signal.pause()
    except (KeyboardInterrupt, console.Terminated):
        signal.signal(signal.SIGTERM, lambda *_: None)  # a second `down` waits as the first does
        console.err.print("ending once what is under way is answered; Ctrl-C again ends it now")


def _detached(root: Path, recipe: Path, overrides: list[str], address: str | None) -> dict[str, Any]:
    """Start `serve up` in a session of its own; its state once it answers."""
    log = root / "serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ulm.cli.main", "serve", "up", str(recipe.absolute())]
    command += [part for override in overrides for part in ("--set", override)]
    command += ["--address", address] if address else []
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    deadline_s = time.monotonic() + UP_TIMEOUT_S
    while time.monotonic() < deadline_s:
        state = cluster.running(root)
        if state is not None and state["pid"] == child.pid:
            return {key: state[key] for key in ("url", "models", "pid")}
        if child.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise ClusterError(f"the endpoint did not start; {log} ends with:\n{tail}")
        time.sleep(0.2)
    child.terminate()
    raise ClusterError(f"the endpoint was not ready within {UP_TIMEOUT_S:.0f} s; see {log}")


@serve.command("update")
def update(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006  typer copies it
) -> None:
    """Have this root's endpoint answer by another recipe, at the same address, without refusing a request meanwhile.

    Example: ulm serve update serve.yaml --set strategy.kind=route

    Members, strategy, aliases, checkpoints: all may be others, host and port not. What is new is started beside what
    answers now, which then finishes what it has, in its drain_s. Where it cannot start, all stays as it was.
    """
    loaded = cast(ServeRecipe, load_recipe("serve up", recipe, overrides))
    root = runtime.root()
    state = cluster.running(root)
    if state is None:
        raise ClusterError("no endpoint of this root is running; start one with `ulm serve up`")
    from serve import app as serve_app
    from serve import graph
    from serve.plan import make_plan

    if serve_app.url_of(loaded) != state["url"]:
        problem = f"the recipe's {serve_app.url_of(loaded)} is not {state['url']}, where the endpoint is"
        raise ConfigError("host, port", problem, "they stay; for others `ulm serve down`, then up")
    if loaded.host != state.get("host"):  # all addresses have the same URL as this machine's own, and need other keys
        problem = f"the endpoint listens at {state.get('host')}, and not at {loaded.host}"
        raise ConfigError("host", problem, "it stays; for another `ulm serve down`, then up")
    plan = make_plan(loaded, root=root, near=recipe.parent)
    with cluster.updating(root), cluster.session(root, state["ray_address"]):
        if (too_little := graph.lacking(plan, loaded, serve_app.running())) is not None:
            raise ClusterError(too_little)
        with console.err.status("starting what is new beside what answers now"):
            state = {**state, **serve_app.update(plan, loaded)}
        cluster.remember(root, {**state, **of_recipe(plan.tls, loaded)})
    console.finish({key: state[key] for key in ("url", "models", "pid")})


@serve.command("down")
def down() -> None:
    """End this root's endpoint: new requests are refused, those under way have the recipe's drain_s to finish."""
    state = cluster.running(runtime.root())
    if state is None:
        console.finish({"status": "not running"})
        return
    os.kill(int(state["pid"]), signal.SIGTERM)
    timeout_s = DOWN_TIMEOUT_S + state.get("drain_s", 0.0)
    deadline_s = time.monotonic() + timeout_s
    while _alive(int(state["pid"])):
        if time.monotonic() > deadline_s:
            raise ClusterError(f"process {state['pid']} did not end within {timeout_s:.0f} s")
        time.sleep(0.1)
    console.finish({"status": "ended", "url": state["url"]})


def _alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended and waits for its parent does not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0] != "Z"
    except FileNotFoundError:
        return False


@serve.command("status")
def status() -> None:
    """Where this root's endpoint is and what it serves."""
    state = cluster.running(runtime.root())
    console.finish({"status": "running", **state} if state else {"status": "not running"})
