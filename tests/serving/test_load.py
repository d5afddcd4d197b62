"""The endpoint under load: what is bounded, replicas that die, clients that leave, another recipe, the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.load import Clients, ask, clients, session, wait_until_begun
from tests.processes import ended, nothing_is_left, start, wait_for
from tests.served import endpoint, engine_handle, free_port, num_running_replicas, replica_processes
from tests.small_members import small_member
from ulm.recipes import ServeRecipe
from ulm.recipes.base import validate

MAX_OPEN = 8
DELAY_MS = 20  # of a token
TOKENS = 40
ASKED: dict[str, Any] = {"model": "a", "prompt": "abc", "max_tokens": TOKENS}
EXPORTED_S = 30.0


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("members")
    return {name: {"checkpoint": str(small_member(folder, seed))} for seed, name in enumerate("ab")}


def fields(members: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Of a recipe: both members in one engine of two replicas, which takes 0.8 s for an answer of 40 tokens."""
    engine = {"kind": "echo", "delay_ms": DELAY_MS}
    shape = {"members_per_engine": 2, "replicas": 2, "cpus": 0.1, "max_open": MAX_OPEN, "drain_s": 10.0}
    return {"members": members, "engine": engine, **shape, **more}


@pytest.fixture(scope="module")
def served(members: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with endpoint(**fields(members)) as it:
        yield it


def bodies(whole: int, streams: int, tokens: int = TOKENS) -> list[dict[str, Any]]:
    asked = {**ASKED, "max_tokens": tokens}
    return [{**asked, "model": "ab"[n % 2], "stream": n >= whole} for n in range(whole + streams)]


def all_was_answered(seen: Clients, tokens: int = TOKENS) -> None:
    assert seen.problems() == []
    assert {outcome.text for outcome in seen.outcomes} == {("abc" * tokens)[:tokens]}
    assert {outcome.is_stream for outcome in seen.outcomes} == {True, False}


def engine_stats(url: str) -> list[dict[str, float]]:
    """Of every replica of the engine."""
    return list(engine_handle().broadcast("stats").results())


async def at_once(url: str, number: int, **more: Any) -> list[httpx.Response]:
    async with httpx.AsyncClient(trust_env=False, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        asked = (client.post(f"{url}/completions", json={**ASKED, **more}) for _ in range(number))
        return await asyncio.gather(*asked)


def test_what_is_too_much_is_refused_at_once_in_openais_shape_and_operators_are_answered(
    served: dict[str, Any],
) -> None:
    url, page = served["url"], served["url"].removesuffix("/v1")
    with clients(url, bodies(MAX_OPEN // 2, MAX_OPEN // 2), again=False) as seen:
        refused = httpx.Response(400)
        while refused.status_code == 400 and seen.outcomes == []:
            refused = httpx.post(f"{url}/completions", content=b"no JSON", trust_env=False)
        assert [httpx.get(page + path, trust_env=False).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    error = refused.json()["error"]
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert (error["type"], error["code"]) == ("server_error", "overloaded") and "8 requests" in error["message"]
    all_was_answered(seen)


def test_in_a_burst_too_an_answer_is_openais_or_the_real_one(served: dict[str, Any]) -> None:
    answers = asyncio.run(at_once(served["url"], 50 * MAX_OPEN))
    assert {answer.status_code for answer in answers} == {200, 503}
    assert sum(answer.status_code == 200 for answer in answers) >= MAX_OPEN
    for answer in answers:
        assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"]
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "overloaded" and int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_work(served: dict[str, Any], stream: bool) -> None:
    async def leave() -> list[dict[str, float]]:
        async with session() as asking:
            body = {**ASKED, "max_tokens": 90, "stream": stream}
            tasks = [asyncio.create_task(ask(asking, served["url"], body)) for _ in range(4)]
            await asyncio.sleep(0.5)
            busy = await asyncio.to_thread(engine_stats, served["url"])
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return busy

    assert sum(stats["running"] for stats in asyncio.run(leave())) == 4
    time.sleep(0.5)  # an answer would take 1.8 s
    assert sum(stats["running"] for stats in engine_stats(served["url"])) == 0


def test_a_replica_that_dies_is_noticed_by_no_client_and_its_answers_go_on_elsewhere(served: dict[str, Any]) -> None:
    with clients(served["url"], bodies(3, 3)) as seen:
        wait_until_begun(seen, 6)
        time.sleep(0.3)  # in the midst of the next ones
        kill_a_replica()
        wait_until_begun(seen, 24)
    all_was_answered(seen)
    deadline_s, page = time.monotonic() + EXPORTED_S, ""
    while "ray_ulm_retries_total{" not in page:
        assert time.monotonic() < deadline_s
        time.sleep(0.5)
        page = httpx.get(served["url"].removesuffix("/v1") + "/metrics", trust_env=False).text
    assert "ray_ulm_requests_refused_total{" in page and 'why="gateway_full"' in page


def kill_a_replica() -> None:
    """The way a machine that fails does it: at once."""
    import ray

    ray.kill(ray.get_actor(**replica_processes()[0]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_replicas_killed_again_and_again_for_two_minutes_every_request_is_answered(
    served: dict[str, Any], members: dict[str, Any]
) -> None:
    change(served, fields(members, replicas=3, max_open=100))
    deadline_s, num_killed = time.monotonic() + 120, 0
    with clients(served["url"], bodies(6, 6)) as seen:
        while time.monotonic() < deadline_s:
            kill_a_replica()
            num_killed += 1
            wait_for(lambda: num_running_replicas() == 3, "the killed replica to be back")
    all_was_answered(seen)
    assert num_killed > 5 and len(seen.outcomes) > 500


def change(served: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """What an update of the endpoint to a recipe of these fields says."""
    from serve import app
    from serve.plan import make_plan

    port = int(served["url"].removesuffix("/v1").rpartition(":")[2])
    made = validate(ServeRecipe, {"name": "t", "port": port, **recipe})
    return app.update(make_plan(made, root=Path("unused"), near=None), made)


def test_another_recipe_goes_live_under_load_without_one_failed_request(
    served: dict[str, Any], members: dict[str, Any]
) -> None:
    from serve import app
    from serve.graph import NAME

    before = app.running()
    changed = fields(members, engine={"kind": "echo", "delay_ms": DELAY_MS / 2}, aliases={"gpt-4o": "b"}, replicas=1)
    with clients(served["url"], bodies(3, 3)) as seen:
        wait_until_begun(seen, 6)
        updated = change(served, changed)
        wait_until_begun(seen, len(seen.outcomes) + 12)
    all_was_answered(seen)
    assert updated == {"url": served["url"], "models": [*served["models"], "gpt-4o"]}
    (engine,) = app.running() - {NAME}
    assert engine not in before, "its engine is another"
    last = seen.outcomes[-1]
    assert last.seconds < 0.9 * 40 * DELAY_MS / 1e3, "the new engine answers"


def test_at_the_end_what_is_under_way_is_finished_and_what_is_new_is_refused(served: dict[str, Any]) -> None:
    from serve import app

    long = 90
    with ThreadPoolExecutor(1) as pool, clients(served["url"], bodies(2, 2, long), again=False) as seen:
        while sum(stats["running"] for stats in engine_stats(served["url"])) < 4:
            assert not seen.outcomes
        drained = pool.submit(app.drain)
        refused = httpx.Response(200)
        while refused.status_code == 200 and not drained.done():
            refused = httpx.get(f"{served['url']}/models", trust_env=False)
        assert seen.num_open, "the first refusal comes while answers go on"
        drained.result()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert int(refused.headers["retry-after"]) >= 1
    assert len(seen.outcomes) == 4
    all_was_answered(seen, long)


# ---- the command line


@pytest.mark.slow
def test_update_and_down_from_the_command_line_fail_no_request(
    root: Path, members: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe, port = tmp_path / "serve.yaml", free_port()
    shape = {"engine": {"kind": "echo", "delay_ms": DELAY_MS}, "cpus": 0.4, "drain_s": 10.0, "port": port}
    recipe.write_text(yaml.safe_dump({"members": members, **shape}))  # the engine in the gateway, as most have it
    child = start(root, "serve", "up", str(recipe))
    request.addfinalizer(child.kill)
    assert child.stdout is not None
    url = json.loads(child.stdout.readline())["url"]
    with clients(url, bodies(2, 2)) as seen:
        code, out, err = ended(start(root, "serve", "update", str(recipe), "--set", "aliases.gpt-4o=a"))
        assert code == 0, err
        assert "gpt-4o" in json.loads(out.splitlines()[-1])["models"]
        bad = tmp_path / "bad.yaml"
        bad.write_text(yaml.safe_dump({"members": members, **shape, "engine": {"kind": "local", "device": "cuda:99"}}))
        code, _, err = ended(start(root, "serve", "update", str(bad)))
        assert code == 1 and "the endpoint did not start" in err and "cuda" in err.lower(), err
        code, _, err = ended(start(root, "serve", "update", str(recipe), "--set", "cpus=100"))
        assert code == 1 and "the engines ask for 100 CPUs, and beside those that answer now" in err, err
        listed = httpx.get(f"{url}/models", trust_env=False).json()["data"]
        assert "gpt-4o" in {card["id"] for card in listed}, "the last that could start"
        wait_until_begun(seen, len(seen.outcomes) + 8)
    all_was_answered(seen)
    code, out, _ = ended(start(root, "serve", "status"))
    assert json.loads(out)["models"] == [card["id"] for card in listed]
    with clients(url, bodies(0, 4), again=False) as seen:
        time.sleep(0.4)  # they have begun
        code, out, err = ended(start(root, "serve", "down"))
        assert code == 0 and json.loads(out.splitlines()[-1])["status"] == "ended", err
    assert seen.problems() == [] and len(seen.outcomes) == 4
    assert ended(child)[0] == 0
    nothing_is_left(root)
