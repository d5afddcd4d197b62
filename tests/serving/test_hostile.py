"""What hostile clients send to a real endpoint is refused, soon, and others do not notice."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from serve import connections
from tests.hostile import KINDS, Answer, hostile
from tests.served import endpoint
from tests.small_members import small_member
from ulm import runtime

ASKED: dict[str, Any] = {"model": "a", "prompt": "abc", "max_tokens": 8}
NUM_QUICK, NUM_SLOW = 8 * len(KINDS), 2_000
GROWTH = 0.05  # of memory, while ten times as many requests are answered as warmed up


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("hostile")
    members = {"a": {"checkpoint": str(small_member(folder))}}
    with endpoint(members=members, engine={"kind": "echo"}, members_per_engine=1, cpus=0.1, max_open=20) as served:
        yield served["url"]


def answers_as_ever(url: str) -> bool:
    answer = httpx.post(f"{url}/completions", json=ASKED, trust_env=False, timeout=30)
    return answer.status_code == 200 and answer.json()["choices"][0]["text"] == "abcabcab"


def none_failed(answers: list[Answer]) -> None:
    assert [answer for answer in answers if answer.is_failure] == []
    assert {answer.status for answer in answers if answer.kind == "no JSON"} == {200, 400}, "UTF-16 is JSON to some"
    told = Counter(answer.status for answer in answers)
    assert told[200] and told[400] and told[404], f"all of them may be one mistake of the test: {told}"


def test_what_hostile_clients_send_is_refused_and_others_are_answered(url: str) -> None:
    none_failed(hostile(url, NUM_QUICK))
    assert answers_as_ever(url)


@pytest.mark.slow
def test_two_thousand_hostile_requests_leave_memory_as_it_was(url: str) -> None:
    hostile(url, NUM_SLOW // 10, seed=1)
    before = runtime.tree_rss_bytes()
    none_failed(hostile(url, NUM_SLOW, seed=2))
    assert answers_as_ever(url)
    assert runtime.tree_rss_bytes() < (1 + GROWTH) * before


def test_headers_that_never_end_are_not_kept(url: str) -> None:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\na: ")
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 64 * connections.MAX_HEADER_BYTES:
                sent += client.send(b"a" * connections.MAX_HEADER_BYTES)
                time.sleep(0.01)  # else all is sent before anything is read
