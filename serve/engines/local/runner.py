"""What runs members of one spec: the interface that the scheduler sees, whatever the members' layers remember."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

Want = Literal["last", "all", "none", "hidden"]


@dataclass(frozen=True)
class Work:
    """New tokens of one sequence, and whose logits are wanted: of its last token, of all, of none; or hidden states."""

    seat: Any
    start: int  # position of the first
    tokens: Sequence[int]
    want: Want


class Seat(Protocol):
    """What one sequence holds with a runner."""

    num_known: int  # tokens whose past is there


class Runner(Protocol):
    """Members of one spec, and the memory of the sequences that they work on."""

    max_slots: int
    used_slots: set[int]

    def put(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """A member's weights, by their names in a checkpoint, into a slot that nobody uses."""
        ...

    def drop(self, slot: int, key: Hashable) -> None:
        """Forget a member's weights and what was kept of its texts."""
        ...

    def fits(self, num_tokens: int, num_seats: int) -> bool:
        """Whether so many sequences of so many tokens could be held when nobody else is there."""
        ...

    def open(self, slot: int, key: Hashable, tokens: Sequence[int], max_shared: int, need_scores: bool) -> Any | None:
        """A seat for a sequence, with what is still known of its first `max_shared` tokens; None: no room now."""
        ...

    def has_room(self, seats: Sequence[Any], num_tokens: int) -> bool:
        """Whether these seats could grow to so many tokens each now, with a little left for the others' next ones.

        Always so where there are no others.
        """
        ...

    def extend(self, seat: Any, num_tokens: int) -> bool:
        """Make room for the tokens up to so many; False: none is left, and nothing has changed."""
        ...

    def advance(self, seat: Any, tokens: Sequence[int], scores: dict[int, Any] | None = None) -> None:
        """All of these tokens have been run. `scores` are kept with their pages."""
        ...

    def fork(self, seat: Any) -> Any | None:
        """A seat for another sequence with the same past; None: no room now."""
        ...

    def close(self, seat: Any) -> None:
        """Give a seat's memory back."""
        ...

    def run(self, work: Sequence[Work]) -> tuple[Tensor, list[tuple[int, int]]]:
        """One pass. logits_CV in float32 (hidden states where those are wanted), and the rows of each piece of work."""
        ...

    def end(self) -> None:
        """Wait for what works in the background."""
        ...

    def stats(self) -> dict[str, float]:
        """Memory and hits, summed over runners by the engine."""
        ...
