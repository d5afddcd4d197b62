"""A loaded member: where its weights are, and what else is known of it."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from serve.contracts import MemberInfo
from serve.engines.local.runner import Runner
from ulm.spec import ModelSpec
from ulm.tokenizers.tokenizer import Tokenizer


@dataclass(eq=False)
class Loaded:
    """A checkpoint in a slot of a runner. A reloaded member is another; this one goes when its answers have ended."""

    id: str
    path: Path
    spec: ModelSpec
    tokenizer: Tokenizer
    runner: Runner
    slot: int
    number: int  # of this load, among all of the engine's
    num_bytes: int
    info: MemberInfo
    num_users: int = 0  # answers under way
    is_retired: bool = False  # unloaded, evicted or reloaded: gone with its last user
    used_s: float = field(default_factory=time.monotonic)

    def join(self) -> None:
        """An answer begins to use it."""
        self.num_users += 1
        self.used_s = time.monotonic()

    def leave(self) -> None:
        """An answer has ended; the last one takes a retired member's weights along."""
        self.num_users -= 1
        self._go_if_idle()

    def retire(self) -> None:
        """No new answers from now on."""
        self.is_retired = True
        self._go_if_idle()

    def _go_if_idle(self) -> None:
        if self.is_retired and not self.num_users:
            self.runner.drop(self.slot, self.key)

    @property
    def key(self) -> Hashable:
        """What its cached texts are found by: never those of other weights."""
        return self.number
