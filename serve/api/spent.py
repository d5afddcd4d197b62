"""What answers spent, as metrics: the ledger's lines with words of a fixed set, so that series stay few."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from serve.contracts import Ledger
from ulm.errors import RequestError, UnsupportedError

Record = Callable[[str, float, Mapping[str, str]], None]  # metric, value, tags
CALLED = {
    "asked": "asked",
    "routed": "routed",
    "re-routed": "re_routed",
    "weighed": "weighed",
    "far from every cluster": "far",
    "fallback": "fallback",
}
DEGRADED = (  # the first that matches; a failure's text may hold anything
    (r"\S+ failed: |\S+ is not up$|.*nobody that should answer is up$", "member_down"),
    (r"\S+ is overloaded: ", "member_busy"),
    (r"cut short", "cut_short"),
    (r".*\bbudget\.max_(calls|tokens|ms)\b|ended by its deadline$", "budget"),
)


def outcome_of(error: BaseException) -> str:
    """What became of a request that ended so before its answer began."""
    if isinstance(error, RequestError | UnsupportedError):
        return "refused"
    return "failed" if isinstance(error, Exception) else "cancelled"  # the client has left


def count(record: Record, tags: Mapping[str, str], outcome: str, started_s: float) -> None:
    """Count a request that has ended; tags are its model and its strategy."""
    record("ulm_requests_total", 1, {**tags, "outcome": outcome})
    record("ulm_request_seconds", time.monotonic() - started_s, tags)


@contextmanager
def counted(record: Record, model: str, path: str) -> Iterator[None]:
    """Count the request that is answered meanwhile, of a path that asks no strategy."""
    tags, started_s = {"model": model, "strategy": path}, time.monotonic()
    try:
        yield
    except BaseException as error:
        count(record, tags, outcome_of(error), started_s)
        raise
    count(record, tags, "ok", started_s)


def record_ledger(record: Record, ledger: Ledger) -> None:
    """Count an answer's calls, their tokens and what was not done as asked."""
    strategy = {"strategy": ledger.strategy}
    for call in ledger.calls:
        member = {"member": call.member}
        record("ulm_swarm_calls_total", 1, {**strategy, **member, "why": CALLED.get(call.why, "other")})
        record("ulm_swarm_call_tokens_total", call.tokens_out, {**strategy, **member})
        record("ulm_member_weight", call.weight, member)
    for text in ledger.degraded:
        record("ulm_swarm_degraded_total", 1, {**strategy, "why": _why(text)})


def _why(degraded: str) -> str:
    return next((word for pattern, word in DEGRADED if re.match(pattern, degraded, re.DOTALL)), "other")
