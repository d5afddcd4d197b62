"""Keys in PostgreSQL at a real endpoint, whose database restarts in mid-service."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve import accounts
from serve.store import Store
from tests.databases import new_database, out_of_service, postgresql
from tests.served import endpoint
from tests.small_members import small_member

ASKED: dict[str, Any] = {"model": "a", "prompt": "abc", "max_tokens": 8}
EACH = 1 + 3 + 8  # tokens of such an answer
REVOKED_S = 1.0
BACK_S = 10.0


class Keyed:
    """The endpoint, and what makes keys for it."""

    def __init__(self, server: str, database: str) -> None:
        self.server, self.url, self.store = server, "", Store.open(database)
        self.new_key()

    def ask(self, headers: dict[str, str]) -> httpx.Response:
        return httpx.post(f"{self.url}/completions", json=ASKED, headers=headers, trust_env=False, timeout=60)

    def new_key(self, **fields: Any) -> tuple[str, dict[str, str]]:
        made = accounts.create(self.store, **{"name": "a", "scopes": ["infer"], **fields})
        return made.id, {"Authorization": f"Bearer {made.text}"}

    def used(self, key_id: str) -> int:
        return int(accounts.listed(self.store, key_id)[0]["used_tokens"])


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    members = {"a": {"checkpoint": str(small_member(tmp_path_factory.mktemp("members")))}}
    with postgresql() as server, pytest.MonkeyPatch.context() as environment:
        environment.setenv("ULM_DATABASE_URL", database := new_database(server))  # it has a password
        made = Keyed(server, database)
        with endpoint(members=members, engine={"kind": "echo"}, cpus=0.1, keys=True) as served:
            made.url = served["url"]
            yield made
        made.store.close()


def test_a_key_is_answered_limited_and_revoked_within_a_second(keyed: Keyed) -> None:
    key_id, headers = keyed.new_key(requests_per_minute=6, quota_tokens=4 * EACH)
    told = [keyed.ask(headers) for _ in range(8)]
    assert [(answer.status_code, answer.json().get("error", {}).get("code")) for answer in told] == [
        *[(200, None)] * 4,
        *[(429, "insufficient_quota")] * 2,
        *[(429, "rate_limit_exceeded")] * 2,
    ]
    assert keyed.used(key_id) == 4 * EACH
    other_id, other = keyed.new_key()
    assert keyed.ask(other).status_code == 200
    revoked_s = time.monotonic()
    accounts.revoke(keyed.store, other_id)
    while (answer := keyed.ask(other)).status_code == 200:
        assert time.monotonic() - revoked_s < REVOKED_S
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_while_the_database_restarts_requests_are_refused_with_503_and_then_answered(keyed: Keyed) -> None:
    key_id, headers = keyed.new_key(quota_tokens=1_000_000)
    unknown = {"Authorization": headers["Authorization"][:-4] + "AAAA"}
    with out_of_service(keyed.server):
        refused = [keyed.ask(headers) for _ in range(5)] + [keyed.ask(unknown)]
        assert Counter(answer.status_code for answer in refused) == {503: 6}, "nobody gets in unchecked"
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        assert all("Keys can not be checked just now" in answer.json()["error"]["message"] for answer in refused)
    back_s = time.monotonic() + BACK_S
    while (answer := keyed.ask(headers)).status_code == 503:
        assert time.monotonic() < back_s
    assert answer.json()["choices"][0]["text"] == "abcabcab" and keyed.ask(unknown).status_code == 401
    assert keyed.used(key_id) == EACH
