"""Keys at a real endpoint: HTTPS, two gateways, the accounts' actor between them, and what happens when it dies."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from serve import accounts
from serve.limits import KEEP_EVERY_S
from serve.store import Reservation, Store
from tests.certificates import certificate
from tests.served import endpoint
from tests.small_members import small_member
from ulm.cli import status

ASKED: dict[str, Any] = {"model": "a", "prompt": "abc", "max_tokens": 8}
EACH = 1 + 3 + 8  # tokens of such an answer
# Where the actor takes longer to come back than requests wait for it, what it reserves then for nobody lapses first.
SETTLED_S = accounts.LEASE_S + 2 * KEEP_EVERY_S


class Keyed:
    """The endpoint, with what makes keys for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url, self.secrets = folder, "", list[str]()
        self.database = f"sqlite:///{folder / 'state.db'}"
        self.store = Store.open(self.database)
        self.new_key()

    def new_key(self, **fields: Any) -> tuple[str, dict[str, str]]:
        key = accounts.create(self.store, **{"name": "a", "scopes": ["infer"], **fields})
        self.secrets.append(key.text.rpartition("-")[2])
        return key.id, {"Authorization": f"Bearer {key.text}"}

    def used(self, key_id: str) -> int:
        return int(accounts.listed(self.store, key_id)[0]["used_tokens"])

    def client(self) -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=str(self.folder / "cert.pem"))
        bounds = httpx.Limits(max_connections=40, max_keepalive_connections=40)
        return httpx.AsyncClient(base_url=self.url, verify=context, trust_env=False, timeout=60, limits=bounds)

    async def at_once(self, number: int, headers: dict[str, str], **more: Any) -> list[httpx.Response]:
        async with self.client() as client:
            asked = (client.post("completions", json={**ASKED, **more}, headers=headers) for _ in range(number))
            return await asyncio.gather(*asked)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    made = Keyed(folder)
    recipe = {
        "members": {"a": {"checkpoint": str(small_member(folder))}},
        "engine": {"kind": "echo"},
        "members_per_engine": 1,
        "cpus": 0.1,
        "gateways": 2,
        "keys": True,
        "database": made.database,
        "tls": certificate(folder),
        "request_log": str(folder / "requests.jsonl"),
    }
    with endpoint(**recipe) as served:
        assert "a" in served["models"]
        made.url = served["url"]
        yield made
    made.store.close()


def test_it_is_https_and_wants_a_key(keyed: Keyed) -> None:
    async def ask() -> None:
        async with keyed.client() as client:
            refused = await client.post("completions", json=ASKED)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (await client.get(keyed.url.removesuffix("/v1") + "/readyz")).status_code == 200
            answer = await client.post("completions", json=ASKED, headers=keyed.new_key()[1])
            assert answer.json()["choices"][0]["text"] == "abcabcab"
            assert len(answer.headers.get_list("x-request-id")) == 1

    assert keyed.url.startswith("https://127.0.0.1:")
    asyncio.run(ask())
    plain = keyed.url.replace("https", "http") + "/models"
    with pytest.raises(httpx.HTTPError):
        httpx.get(plain, trust_env=False)


def test_status_reads_figures_with_an_admins_key_and_says_so_without(
    keyed: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"url": keyed.url, "pid": 1, "certificate": str(keyed.folder / "cert.pem")}
    _, infer = keyed.new_key()
    _, admin = keyed.new_key(scopes=["admin"])
    problems = []
    for headers in ({"Authorization": "Bearer none"}, infer, admin):
        monkeypatch.setenv("ULM_API_KEY", headers["Authorization"].split()[1])
        problems.append((status._endpoint(state) or {})["problem"])
    monkeypatch.delenv("ULM_API_KEY")
    problems.append((status._endpoint(state) or {})["problem"])
    needs = "its figures need a key with the scope admin: set ULM_API_KEY"
    assert problems == [needs, needs, None, needs]
    (other := keyed.folder / "other").mkdir()
    assert "does not answer" in (status._endpoint({**state, **certificate(other)}) or {})["problem"]


def test_limits_are_exact_over_two_gateways(keyed: Keyed) -> None:
    key_id, headers = keyed.new_key(requests_per_minute=25, quota_tokens=16 * EACH + EACH - 1)
    answers = asyncio.run(keyed.at_once(60, headers))
    told = [(a.status_code, a.json().get("error", {}).get("code")) for a in answers]
    assert Counter(told) == {(200, None): 16, (429, "insufficient_quota"): 9, (429, "rate_limit_exceeded"): 35}
    assert keyed.used(key_id) == 16 * EACH


def test_a_revoked_key_ends_on_every_gateway_within_a_second(keyed: Keyed) -> None:
    key_id, headers = keyed.new_key()
    assert {answer.status_code for answer in asyncio.run(keyed.at_once(10, headers))} == {200}
    accounts.revoke(keyed.store, key_id)
    assert {answer.status_code for answer in asyncio.run(keyed.at_once(40, headers))} == {401}, "at once, even"


def test_a_changed_key_is_so_on_every_gateway_and_its_refusals_are_logged_as_its(keyed: Keyed) -> None:
    key_id, headers = keyed.new_key()
    assert {answer.status_code for answer in asyncio.run(keyed.at_once(10, headers))} == {200}
    accounts.change(keyed.store, key_id, requests_per_minute=5)
    answers = asyncio.run(keyed.at_once(20, headers))
    assert Counter(answer.status_code for answer in answers) == {200: 5, 429: 15}
    accounts.change(keyed.store, key_id, requests_per_minute=None, scopes=["admin"])
    assert {answer.status_code for answer in asyncio.run(keyed.at_once(5, headers))} == {403}
    mine, until_s = Counter[tuple[int, str]](), time.monotonic() + SETTLED_S
    while mine.total() < 35 and time.monotonic() < until_s:  # a line is written once its answer has gone out
        lines = [json.loads(line) for line in (keyed.folder / "requests.jsonl").read_text().splitlines()]
        mine = Counter((line["status"], line["path"]) for line in lines if line["key"] == key_id)
    assert mine == {(status, "/v1/completions"): num for status, num in ((200, 15), (429, 15), (403, 5))}


def test_when_the_actor_is_killed_nobody_gets_in_unchecked_and_no_use_is_lost(keyed: Keyed) -> None:
    import ray

    key_id, headers = keyed.new_key(quota_tokens=100_000)
    _, revoked = keyed.new_key(revoked_s=0.0)
    restarts = num_restarts()

    async def load() -> list[httpx.Response]:
        answers: list[httpx.Response] = []
        until_s, num_after = time.monotonic() + SETTLED_S + 6, 0  # after the actor was there again
        async with keyed.client() as client:

            async def one() -> None:
                nonlocal num_after
                while time.monotonic() < until_s and num_after < 40:
                    body = {**ASKED, "stream": len(answers) % 2 == 0, "stream_options": None}
                    if body["stream"]:
                        body["stream_options"] = {"include_usage": True}
                    answers.append(await client.post("completions", json=body, headers=headers))
                    if num_restarts() > restarts and answers[-1].status_code == 200:
                        num_after += 1
                    answers.append(await client.post("completions", json=ASKED, headers=revoked))

            working = [asyncio.create_task(one()) for _ in range(4)]
            await asyncio.sleep(1.5)
            for found in ray.util.list_named_actors(all_namespaces=True):
                if found["name"].startswith("accounts-"):
                    ray.kill(ray.get_actor(found["name"], found["namespace"]), no_restart=False)
            await asyncio.gather(*working)
        return answers

    answers = asyncio.run(load())
    assert num_restarts() == restarts + 1
    invalid = [answer for answer in answers if answer.request.headers["Authorization"] == revoked["Authorization"]]
    valid = [answer for answer in answers if answer not in invalid]
    assert {answer.status_code for answer in invalid} <= {401, 503}
    assert {answer.status_code for answer in valid} <= {200, 503}
    assert all(answer.headers["Retry-After"] for answer in answers if answer.status_code == 503)
    assert valid[0].status_code == valid[-1].status_code == 200, "it is back"
    usage = sum(usage_of(answer) for answer in valid if answer.status_code == 200)
    deadline_s = time.monotonic() + SETTLED_S
    while num_reservations(keyed.store) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert num_reservations(keyed.store) == 0
    assert keyed.used(key_id) == usage > 0


def num_restarts() -> int:
    """How often the accounts' actor was started again."""
    import ray

    (found,) = [actor for actor in ray._private.state.actors().values() if actor["Name"].startswith("accounts-")]
    return int(found["NumRestarts"])


def usage_of(answer: httpx.Response) -> int:
    if answer.headers["content-type"].startswith("text/event-stream"):
        last = answer.text.split("\n\n")[-3].removeprefix("data: ")
        return int(json.loads(last)["usage"]["total_tokens"])
    return int(answer.json()["usage"]["total_tokens"])


def num_reservations(store: Store) -> int:
    with store.reading() as connection:
        return int(connection.execute(select(func.count()).where(Reservation.tokens > 0)).scalar_one())


def test_no_secret_is_in_any_log_of_the_cluster(keyed: Keyed) -> None:
    import ray

    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [file for file in (folder / "logs").rglob("*") if file.is_file()] + [keyed.folder / "requests.jsonl"]
    assert len(files) > 10 and (keyed.folder / "requests.jsonl").read_text().count("\n") > 100
    for file in files:
        content = file.read_bytes()
        assert not any(secret.encode() in content for secret in keyed.secrets), file
