"""`ulm status`: what this root's endpoint and training runs are doing, as a live view."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated, Any

import httpx
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from ulm import runtime
from ulm.certificates import trusting
from ulm.cli import cluster, console, train_tables
from ulm.metrics import EXPORTED

LOOK_EVERY_S = 2.0
API_KEY = "ULM_API_KEY"
TIMEOUT_S = 2.0
FAILED = ("failed", "refused", "cancelled")

Series = list[tuple[dict[str, str], float]]


def add_to(app: typer.Typer) -> None:
    """Hang this file's verb on the command line."""
    app.command("status")(status)


def status(
    once: Annotated[bool, typer.Option("--once", help="One look; so it is where stderr is no terminal.")] = False,
) -> None:
    """The endpoint's models, engines and members, and the runs under way, every two seconds until Ctrl-C.

    Example: ulm status --once
    """
    found = look()
    if once or not console.err.is_terminal:
        console.err.print(view(found))
        console.finish(found)
        return
    try:
        with Live(view(found), console=console.err, auto_refresh=False) as live:
            while True:
                time.sleep(LOOK_EVERY_S)
                found = look()
                live.update(view(found), refresh=True)
    except KeyboardInterrupt:
        console.finish(found)


def look() -> dict[str, Any]:
    """Both as they are now."""
    from pipelines.train import status as of_run

    root = runtime.root()
    folders = sorted((root / "runs").glob("*/")) if (root / "runs").is_dir() else []
    under_way = [told for folder in folders if (told := of_run.of(folder))["status"] == "running"]
    return {"endpoint": _endpoint(cluster.running(root)), "runs": under_way}


def _endpoint(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the endpoint says of itself; `problem` where it does not answer."""
    if state is None:
        return None
    told: dict[str, Any] = {"url": state["url"], "pid": state["pid"], "problem": None}
    base = state["url"].removesuffix("/v1")
    try:
        verify, key = trusting(state.get("certificate")), runtime.variable(API_KEY)
        with httpx.Client(timeout=TIMEOUT_S, trust_env=False, verify=verify) as client:
            ready = client.get(f"{base}/readyz").json()
            metrics = client.get(f"{base}/metrics", headers={"Authorization": f"Bearer {key}"} if key else None)
            if metrics.status_code in (401, 403):
                problem = f"its figures need a key with the scope admin: set {API_KEY}"
                return {**told, "problem": problem, **figures({})}
            page = metrics.raise_for_status().text
    except (httpx.HTTPError, ValueError) as error:
        return {**told, "problem": f"does not answer: {error or type(error).__name__}", **figures({})}
    if ready["status"] != "ready":
        told["problem"] = f"not ready: {', '.join(ready.get('missing', ()))}"
    return {**told, **figures(series(page))}


def series(page: str) -> dict[str, Series]:
    """The samples of a page of metrics, by our own names."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, Series] = defaultdict(list)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name.removeprefix(EXPORTED)].append((sample.labels, sample.value))
    return found


def figures(of: dict[str, Series]) -> dict[str, Any]:
    """By model what was asked and answered, by process what its engine holds, by member its share."""
    models: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for labels, value in of.get("ulm_requests_total", ()):
        outcome = labels["outcome"]
        models[labels["model"]][outcome if outcome == "ok" or outcome in FAILED else "failed"] += value
    for labels, value in of.get("ulm_tokens_total", ()):
        models[labels["model"]][f"{labels['kind']}_tokens"] += value
    for labels, value in of.get("ulm_generated_tokens_per_second", ()):
        models[labels["model"]]["tokens_per_second"] = value
    for part in ("sum", "count"):
        for labels, value in of.get(f"ulm_ttft_seconds_{part}", ()):
            models[labels["model"]][f"ttft_{part}"] += value
    engines: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, key in (("ulm_engine_answers", "state"), ("ulm_engine_kv_cache_bytes", "kind")):
        for labels, value in of.get(name, ()):
            engines[labels["role"]][labels[key]] += value
    for labels, value in of.get("ulm_memory_resident_bytes", ()):
        engines[labels["role"]]["resident_bytes"] += value
    return {
        "models": {name: dict(told) for name, told in sorted(models.items())},
        "engines": {role: dict(told) for role, told in sorted(engines.items())},
        "members": {labels["member"]: value for labels, value in of.get("ulm_member_weight", ())},
    }


# ---- the view


def view(found: dict[str, Any]) -> RenderableType:
    """Both as tables, narrow enough for 80 columns."""
    endpoint, under_way = found["endpoint"], found["runs"]
    parts: list[RenderableType] = []
    if endpoint is None:
        parts.append(Text("no endpoint is up (ulm serve up)", "dim"))
    else:
        said = Text.assemble(("endpoint ", "bold"), console.printable(endpoint["url"]), f"  pid {endpoint['pid']}")
        if endpoint["problem"]:
            said.append(f"  {console.printable(endpoint['problem'])}", "red")
        parts += [said, *_of_endpoint(endpoint)]
    parts.append(Text(""))
    if under_way:
        parts += [Text("training", "bold"), train_tables.runs(under_way)]
    else:
        parts.append(Text("no run is under way (ulm runs list has those that were)", "dim"))
    return Group(*parts)


def _of_endpoint(endpoint: dict[str, Any]) -> Iterable[RenderableType]:
    if endpoint["models"]:
        table = _table("model", "ok", "not ok", "tokens in", "out", "tok/s", "first token")
        for name, of in endpoint["models"].items():
            waited = f"{1e3 * of['ttft_sum'] / of['ttft_count']:,.0f} ms" if of.get("ttft_count") else "-"
            wrong = sum(of.get(outcome, 0.0) for outcome in FAILED)
            counts = [of.get(key, 0.0) for key in ("prompt_tokens", "generated_tokens", "tokens_per_second")]
            numbers = [of.get("ok", 0.0), wrong, *counts]
            table.add_row(Text(console.printable(name)), *(f"{number:,.0f}" for number in numbers), waited)
        yield table
    elif not endpoint["problem"]:
        yield Text("nobody has asked yet, or metrics are still on their way", "dim")
    if endpoint["engines"]:
        table = _table("process", "running", "waiting", "cache used", "memory")
        for role, of in endpoint["engines"].items():
            total = of.get("total", 0.0)
            used = f"{of.get('used', 0.0) / total:.0%} of {total / 1e6:,.0f} MB" if total else "-"
            counts = [f"{of.get(state, 0.0):,.0f}" for state in ("running", "waiting")]
            table.add_row(Text(role), *counts, used, f"{of.get('resident_bytes', 0.0) / 1e6:,.0f} MB")
        yield table
    if endpoint["members"]:
        shares = sorted(endpoint["members"].items(), key=lambda item: -item[1])
        told = ", ".join(f"{console.printable(member)} {share:.2f}" for member, share in shares)
        yield Text(f"shares in their newest answers: {told}")


def _table(first: str, *others: str) -> Table:
    numbers = [Column(title, justify="right", no_wrap=True) for title in others]
    return Table(Column(first, overflow="fold"), *numbers, box=None, padding=(0, 2, 0, 0))
