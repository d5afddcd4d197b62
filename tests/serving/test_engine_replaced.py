"""An engine that has failed in a running endpoint is replaced, and meanwhile nobody is told anything but to wait."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from tests.load import clients, wait_until_begun
from tests.served import endpoint, replica_processes
from tests.small_members import small_member

ASKED: dict[str, Any] = {"model": "a", "prompt": "abc", "max_tokens": 24, "temperature": 0}
REPLACED_S = 30.0  # three checks of two seconds each, and a process that imports PyTorch, on a busy machine


def test_an_engine_whose_thread_ends_is_replaced_and_meanwhile_the_answer_is_503(tmp_path: Path) -> None:
    import ray

    def end_its_thread(_replica: Any) -> None:
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "local-engine")
        thread._target.__self__._submit(sys.exit)  # type: ignore[attr-defined]  # no Exception, so the thread ends

    members = {"a": {"checkpoint": str(small_member(tmp_path))}}
    engine = {"kind": "local", "device": "cpu", "threads": 1, "compile_after_steps": None}
    with endpoint(members=members, engine=engine, members_per_engine=1, cpus=0.5) as served:
        ask = {"url": f"{served['url']}/completions", "json": ASKED, "trust_env": False, "timeout": 60}
        embed = {**ask, "url": f"{served['url']}/embeddings", "json": {"model": "a", "input": "abc"}}
        text = httpx.post(**ask).raise_for_status().json()["choices"][0]["text"]
        (failing,) = replica_processes()
        with clients(served["url"], [{**ASKED, "stream": bool(n % 2)} for n in range(4)]) as seen:
            wait_until_begun(seen, 8)
            ray.get(ray.get_actor(**failing).__ray_call__.remote(end_its_thread))
            ended_s, refused = time.monotonic(), list[httpx.Response]()
            # its thread may answer once more before it ends
            while (answer := httpx.post(**ask)).status_code != 200 or not refused:
                refused += [answer, httpx.post(**embed)] if answer.status_code != 200 else []
                assert time.monotonic() - ended_s < REPLACED_S, answer.text
                time.sleep(0.05)
            wait_until_begun(seen, len(seen.outcomes) + 8)
        assert failing not in replica_processes()
    refused = [answer for answer in refused if answer.status_code != 200]  # of embeddings that came just after
    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in refused} == {(503, "unavailable")}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert answer.json()["choices"][0]["text"] == text
    failed = [outcome for outcome in seen.outcomes if outcome.problem]
    assert all(str(outcome.problem).startswith("503 ") for outcome in failed if not outcome.text), seen.problems()
    assert {outcome.text for outcome in seen.outcomes if not outcome.problem} == {text}
    assert all(outcome.problem is None for outcome in seen.outcomes[-4:]), "they are answered again"
