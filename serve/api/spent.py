"""What answers spent, as metrics: the ledger's lines with words of a fixed set, so that series stay few."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from serve.contracts import Ledger

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
