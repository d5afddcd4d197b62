"""Whose fault it is that a call brought nothing, and what follows from it for the answer and for the member."""

from __future__ import annotations

from collections.abc import Mapping

from serve.health import Health
from serve.strategies._account import Account, now_s
from ulm.errors import ModelNotFoundError, OverloadedError, RequestError, UlmError, UnsupportedError

Failures = Mapping[str, Exception]  # by member


class SilentError(UlmError):
    """A member said nothing for so long that others are asked."""

    def __init__(self, patience_s: float) -> None:
        self.since_s = now_s() - patience_s
        super().__init__(f"said nothing for {patience_s:g} s")


def of_member(error: BaseException) -> Exception:
    """An error that is the member's, for others may do better. What is wrong with the request is raised."""
    if isinstance(error, OverloadedError | ModelNotFoundError):  # the engine's: the catalog knows the member
        return error
    if isinstance(error, RequestError | UnsupportedError) or not isinstance(error, Exception):
        raise error
    return error


def note(failed: Failures, account: Account, health: Health) -> None:
    """Mark the answer as one that had to do without these; who is down is left alone for a while by all answers.

    Not so who has too much to do: one that says so, or that is silent here and has answered others meanwhile.
    """
    for member, error in failed.items():
        said = str(error) if isinstance(error, UlmError) else f"{type(error).__name__}: {error}"
        is_busy = isinstance(error, OverloadedError)
        account.note(f"{member} {'is overloaded' if is_busy else 'failed'}: {said[:200]}")
        is_busy |= isinstance(error, SilentError) and health.has_answered(member, error.since_s)
        if not is_busy:
            health.failed([member])
