"""Which members are worth asking: one that has just failed is left alone for a while."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable

COOLDOWN_S = 5.0  # about what a replica of Ray Serve takes to be started again


class Health:
    """What the answers of one gateway have learned of its members. Times are the event loop's."""

    def __init__(self, cooldown_s: float = COOLDOWN_S) -> None:
        self._cooldown_s = cooldown_s
        self._down_until_s: dict[str, float] = {}
        self._answered_s: dict[str, float] = {}

    def failed(self, members: Iterable[str]) -> None:
        """These are down: they are not asked for some seconds."""
        self._down_until_s |= dict.fromkeys(members, _now_s() + self._cooldown_s)

    def answered(self, members: Iterable[str]) -> None:
        """These have just answered."""
        now_s = _now_s()
        for member in members:
            self._answered_s[member] = now_s
            self._down_until_s.pop(member, None)

    def has_answered(self, member: str, since_s: float) -> bool:
        """Whether anybody has had something from it since then."""
        return self._answered_s.get(member, -math.inf) > since_s

    def is_up(self, member: str) -> bool:
        """Whether a member is worth asking."""
        return self._down_until_s.get(member, 0.0) <= _now_s()

    def wait_s(self, members: Iterable[str]) -> float:
        """Seconds until the first of these is asked again, at least one: what Retry-After says."""
        now_s = _now_s()
        return max(1.0, min((self._down_until_s.get(m, 0.0) - now_s for m in members), default=1.0))


def _now_s() -> float:
    return asyncio.get_running_loop().time()
