"""Gateways that share the endpoint's port: how they come, die and change, and where they listen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.load import TIMEOUT_S, clients, wait_until_begun
from tests.processes import wait_for
from tests.served import endpoint
from tests.small_members import small_member
from ulm.recipes import ServeRecipe
from ulm.recipes.base import validate

DELAY_MS, TOKENS = 10, 20  # an answer takes 0.2 s
ASKED: dict[str, Any] = {"model": "a", "prompt": "abc", "max_tokens": TOKENS}
NUM_CLIENTS = 12


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("members")
    members = {name: {"checkpoint": str(small_member(folder, seed))} for seed, name in enumerate("ab")}
    engine = {"kind": "echo", "delay_ms": DELAY_MS}
    return {"members": members, "engine": engine, "members_per_engine": 2, "cpus": 0.1, "gateways": 2, "drain_s": 10.0}


@pytest.fixture(scope="module")
def served(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with endpoint(**fields) as it:
        yield it


def gateways() -> list[dict[str, str]]:
    """The actors of the gateways whose processes are there."""
    import ray

    return [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "#Gateway#" in actor["name"]]


def port_of(served: dict[str, Any]) -> int:
    return int(served["url"].removesuffix("/v1").rpartition(":")[2])


def listening(port: int) -> set[str]:
    """The addresses of this machine at which anybody listens at a port."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            address, number = line.split()[1].split(":")
            if line.split()[3] == "0A" and int(number, 16) == port:
                found.add(".".join(str(byte) for byte in bytes.fromhex(address)[::-1]))
    return found


def test_it_listens_at_its_own_address_alone(served: dict[str, Any]) -> None:
    import ray

    assert listening(port_of(served)) == {"127.0.0.1"}
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert names and not [name for name in names if "PROXY" in name.upper()], "Serve's own would listen, too"


def test_a_gateway_that_dies_takes_only_what_it_had_accepted(served: dict[str, Any]) -> None:
    """Others ask meanwhile with a connection for each request, so that any of them could meet the dead one."""
    import ray

    problems, answers = list[str](), list[int]()
    stopped = asyncio.Event()

    async def client(asking: aiohttp.ClientSession) -> None:
        while not stopped.is_set():
            try:
                async with asking.post(f"{served['url']}/completions", json=ASKED) as answer:
                    answers.append(answer.status)
            except aiohttp.ClientError as error:
                problems.append(repr(error))

    async def body() -> None:
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as asking:
            tasks = [asyncio.create_task(client(asking)) for _ in range(NUM_CLIENTS)]
            await asyncio.sleep(1.0)
            (gone, stays) = gateways()
            await asyncio.to_thread(ray.kill, ray.get_actor(**gone))
            await asyncio.to_thread(wait_for, lambda: len(gateways()) == 2, "another gateway")
            await asyncio.sleep(1.0)
            stopped.set()
            await asyncio.gather(*tasks)
            assert stays in gateways() and gone not in gateways()

    asyncio.run(body())
    assert {*answers} == {200} and len(answers) > 5 * NUM_CLIENTS
    assert len(problems) <= NUM_CLIENTS, "what it was answering, and nothing after"
    assert not [problem for problem in problems if "refused" in problem.lower()]


def test_both_change_under_load_and_so_after_the_door_has_died(served: dict[str, Any], fields: dict[str, Any]) -> None:
    import ray

    from serve import app, door
    from serve.plan import make_plan

    recipe = validate(ServeRecipe, {"name": "t", "port": port_of(served), **fields, "aliases": {"gpt-4o": "b"}})
    bodies = [{**ASKED, "stream": bool(n % 2)} for n in range(NUM_CLIENTS)]
    for dies in (False, True):
        before = gateways()
        with clients(served["url"], bodies) as seen:
            wait_until_begun(seen, NUM_CLIENTS)
            if dies:
                ray.kill(ray.get_actor(door.NAME, door.NAMESPACE), no_restart=False)
                time.sleep(1.0)
            updated = app.update(make_plan(recipe, root=Path("unused"), near=None), recipe)
            wait_until_begun(seen, len(seen.outcomes) + NUM_CLIENTS)
        assert seen.problems() == []
        assert "gpt-4o" in updated["models"]
        after = gateways()
        assert len(after) == 2 and not [actor for actor in after if actor in before]
        assert listening(port_of(served)) == {"127.0.0.1"}
        recipe = validate(ServeRecipe, {**recipe.model_dump(exclude_unset=True), "max_open": 77})
