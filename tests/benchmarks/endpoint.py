"""Group `endpoint`: what the endpoint adds to its members, and what it does not lose: echo members through real HTTP.

The load generator has the same cores. Run by `ulm bench endpoint` in a checkout; 18 minutes on two cores, --full 32.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from serve import accounts
from serve.contracts import GenerateRequest
from serve.engines.echo import Config, EchoEngine
from serve.store import Store
from tests.benchmarks._bare_application import bare_application
from tests.benchmarks._figures import report
from tests.benchmarks._hostile_figures import attack, report_attack
from tests.load import Clients, ask, clients, session, wait_until_begun
from tests.served import endpoint, num_running_replicas, replica_processes
from tests.small_members import small_member
from ulm import runtime
from ulm.recipes import ServeRecipe
from ulm.recipes.base import validate

PEER = "a bare two-hop Ray Serve application"
PROMPT, MAX_TOKENS = "abc", 8
ASKED: dict[str, Any] = {"model": "a", "prompt": PROMPT, "max_tokens": MAX_TOKENS}
CONCURRENCY, ROUNDS = 32, 3
NUM_STREAMS, STREAM_DELAY_MS, STREAM_TOKENS = 200, 400, 40
DELAY_MS, LOAD = 20, 12
LOOK_EVERY_S = 2.0
SHORT, FULL = (180.0, 120.0, 2_000), (600.0, 300.0, 10_000)  # seconds of streams and of kills, hostile requests


def main() -> None:
    """All figures of the group."""
    options = argparse.ArgumentParser()
    options.add_argument("--device", default=None, help="this group has no figures of a GPU")
    options.add_argument("--full", action="store_true", help="streams and kills for longer, more hostile requests")
    options.add_argument("--seconds", type=float, default=None, help="of each figure, to try it")
    given = options.parse_args()
    seconds, (streams_s, kills_s, num_hostile) = given.seconds, FULL if given.full else SHORT
    with tempfile.TemporaryDirectory() as folder:
        members = {name: {"checkpoint": str(small_member(Path(folder), seed))} for seed, name in enumerate("ab")}
        inside, apart = {"members": members}, {"members": members, "members_per_engine": 2, "cpus": 0.1}
        throughput_and_overhead("endpoint", inside, seconds or 20.0)
        throughput_and_overhead("endpoint_apart", apart, seconds or 20.0)
        streams(apart, seconds or streams_s)
        replicas_killed(apart, seconds or kills_s)
        recipes_changed(apart, seconds or 60.0)
        attacked(inside, f"sqlite:///{folder}/state.db", int(25 * seconds) if seconds else num_hostile)


@contextmanager
def quiet_endpoint(**fields: Any) -> Iterator[dict[str, Any]]:
    """An endpoint of a recipe with these fields; what Ray prints meanwhile is no figure."""
    with redirect_stdout(sys.stderr), endpoint(**fields) as served:
        yield served


# ---- what it adds


def throughput_and_overhead(prefix: str, fields: dict[str, Any], seconds: float) -> None:
    """Requests a second against a bare application, by turns; then our latency at half of our most, and both at its."""
    with quiet_endpoint(**fields, engine={"kind": "echo"}) as served, bare_application() as bare:
        url_of_ours = served["url"]
        rates: dict[str, list[float]] = {url_of_ours: [], bare: []}
        for counted in range(-1, ROUNDS):  # the first warms up
            for url, found in rates.items():
                rate = saturation(url, seconds / 2)
                if counted >= 0:
                    found.append(rate)
        half, bare_half = (statistics.median(found) / 2 for found in rates.values())
        alone_ms = echo_alone_ms()
        settings = ((url_of_ours, half), (url_of_ours, bare_half), (bare, bare_half))
        runs: list[list[list[float]]] = [[], [], []]
        for _ in range(ROUNDS):
            for (url, rate), latencies_ms in zip(settings, runs, strict=True):
                latencies_ms.append(asyncio.run(at_a_rate(url, rate, seconds)))
    ours, theirs = rates.values()
    report(f"{prefix}_saturation", ours, "requests/s", goal=">= 0.5", peer=PEER, peer_values=theirs)
    for name, share, goal in (("median", 0.5, "<= 8"), ("p99", 0.99, "<= 40")):
        at_half, at_theirs, of_theirs = ([quantile(run, share) for run in found] for found in runs)
        note = f"at {half:.0f} requests/s, half of our most"
        report(f"{prefix}_overhead_{name}", [ms - alone_ms for ms in at_half], "ms", goal=goal, note=note)
        note = f"both at {bare_half:.0f} requests/s, half of the peer's most"
        report(f"{prefix}_latency_{name}", at_theirs, "ms", peer=PEER, peer_values=of_theirs, note=note)


def saturation(url: str, seconds: float) -> float:
    """Requests a second that so many clients get answered, each as fast as it can."""
    nothing_to_collect()
    with clients(url, [ASKED] * CONCURRENCY) as seen:
        wait_until_begun(seen, CONCURRENCY)
        before, started_s = len(seen.outcomes), time.monotonic()
        time.sleep(seconds)
        number, passed_s = len(seen.outcomes) - before, time.monotonic() - started_s
    none_failed(seen)
    return number / passed_s


async def at_a_rate(url: str, rate: float, seconds: float) -> list[float]:
    """Milliseconds that requests at even distances take, whatever those before them do."""
    nothing_to_collect()
    async with session() as asking:
        loop = asyncio.get_running_loop()
        started_s, tasks = loop.time(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(started_s + number / rate - loop.time())
            tasks.append(asyncio.create_task(ask(asking, url, ASKED)))
        seen = Clients(list(await asyncio.gather(*tasks)))
    none_failed(seen)
    return [1e3 * outcome.seconds for outcome in seen.outcomes]


def nothing_to_collect() -> None:
    """The load generator's own garbage collections would be counted as somebody's latency."""
    gc.collect()
    gc.freeze()


def echo_alone_ms() -> float:
    """What the echo itself takes for an answer, without any of the endpoint."""

    async def measured() -> float:
        with tempfile.TemporaryDirectory() as folder:
            engine = EchoEngine(Config(kind="echo"))
            await engine.load("a", str(small_member(Path(folder))))
            asked = GenerateRequest(tuple(PROMPT.encode()), {"a": 1.0}, MAX_TOKENS, stream=False)
            found = []
            for _ in range(100):
                started_s = time.perf_counter()
                async for _ in engine.generate(asked):
                    pass
                found.append(1e3 * (time.perf_counter() - started_s))
            return statistics.median(found)

    return asyncio.run(measured())


# ---- what it does not lose


def streams(fields: dict[str, Any], seconds: float) -> None:
    """Many at once for minutes: failures, and memory of all processes late against early."""
    body = {**ASKED, "max_tokens": STREAM_TOKENS, "stream": True}
    with quiet_endpoint(**fields, engine={"kind": "echo", "delay_ms": STREAM_DELAY_MS}) as served:
        memory: list[int] = []
        with clients(served["url"], [body] * NUM_STREAMS) as seen:
            until(seconds, lambda: memory.append(runtime.tree_rss_bytes()))
    failures("endpoint_streams_failed", seen)
    quarter = max(1, len(memory) // 4)
    growth = statistics.median(memory[-quarter:]) / statistics.median(memory[quarter : 2 * quarter] or memory) - 1
    report("endpoint_streams_memory_growth", [growth], "of all", goal="<= 0.03", note=f"{NUM_STREAMS} at once")


def replicas_killed(fields: dict[str, Any], seconds: float) -> None:
    """One of three replicas killed, again as soon as the last is back."""
    killed = 0

    def kill() -> None:
        nonlocal killed
        import ray

        if num_running_replicas() == 3:
            ray.kill(ray.get_actor(**replica_processes()[0]))
            killed += 1

    with (
        quiet_endpoint(**fields, engine={"kind": "echo", "delay_ms": DELAY_MS}, replicas=3) as served,
        clients(served["url"], mixed()) as seen,
    ):
        until(seconds, kill, every_s=0.2)
    failures("endpoint_killed_failed", seen, f"; {killed} replicas killed")


def recipes_changed(fields: dict[str, Any], seconds: float) -> None:
    """Another recipe, with another engine, as soon as the last has gone live."""
    from serve import app
    from serve.plan import make_plan

    changed = 0
    with quiet_endpoint(**fields, engine={"kind": "echo", "delay_ms": DELAY_MS}) as served:
        port = int(served["url"].removesuffix("/v1").rpartition(":")[2])

        def change() -> None:
            nonlocal changed
            changed += 1
            engine = {"kind": "echo", "delay_ms": DELAY_MS + changed % 2}
            recipe = validate(ServeRecipe, {"name": "t", "port": port, **fields, "engine": engine})
            app.update(make_plan(recipe, root=Path("unused"), near=None), recipe)

        with clients(served["url"], mixed()) as seen:
            until(seconds, change)
    failures("endpoint_changed_failed", seen, f"; {changed} recipes")


def attacked(fields: dict[str, Any], database: str, number: int) -> None:
    """So many hostile requests, beside guessed keys and honest clients."""
    store = Store.open(database)
    accounts.create(store, name="first", scopes=["infer"])  # without any it does not start
    with quiet_endpoint(**fields, engine={"kind": "echo"}, keys=True, database=database) as served:
        seen = attack(served["url"], store, number)
    store.close()
    report_attack(seen)


def mixed() -> list[dict[str, Any]]:
    """Bodies of whole answers and streams."""
    return [{**ASKED, "max_tokens": 40, "stream": bool(n % 2)} for n in range(LOAD)]


def until(seconds: float, action: Callable[[], object], every_s: float = LOOK_EVERY_S) -> None:
    """Do something now and then, for so long."""
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        action()
        time.sleep(every_s)


def failures(figure: str, seen: Clients, note: str = "") -> None:
    """Requests that failed, of all."""
    note = f"of {len(seen.outcomes)} requests{note}; {' '.join(seen.problems()[:1])[:300]}"
    report(figure, [float(len(seen.problems()))], "requests", goal="<= 0", note=note)


def none_failed(seen: Clients) -> None:
    """A rate of failures would be no figure."""
    if seen.problems():
        raise SystemExit(f"{len(seen.problems())} requests failed: {seen.problems()[0][:300]}")


def quantile(values: list[float], share: float) -> float:
    """The value that this share of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


if __name__ == "__main__":
    main()
