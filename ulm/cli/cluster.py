"""Which Ray cluster a verb works on: the one named, the one ulm started for this root, else one of its own."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulm import artefacts, runtime
from ulm.cli import console
from ulm.errors import ClusterError


def state_file(root: Path) -> Path:
    """Where a running endpoint says how to reach it and its cluster."""
    return root / "serve.json"


def running(root: Path) -> dict[str, Any] | None:
    """What the endpoint of this root says of itself, None when there is none (a leftover file is removed)."""
    path = state_file(root)
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        os.kill(int(state["pid"]), 0)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, ProcessLookupError):
        path.unlink(missing_ok=True)
        return None
    except PermissionError:
        pass  # alive, another user's
    return state


@dataclass(frozen=True)
class Session:
    """A connection to a cluster; `is_own` says that the cluster was started for it and ends with it."""

    address: str
    is_own: bool


@contextmanager
def session(root: Path, address: str | None, *, dashboard: bool = False) -> Iterator[Session]:
    """A connection to a cluster for the time of the block. What Ray prints there goes to stderr."""
    runtime.set_variable("RAY_DEDUP_LOGS", "0")
    runtime.set_variable("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; without it, it warns
    runtime.set_variable("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    runtime.set_variable("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    runtime.set_variable("RAY_event_stats", "0")  # every process of Ray counts its events, an eighth of its idle time
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = address or runtime.variable("RAY_ADDRESS")
    state = running(root) or {}
    address = address or state.get("ray_address")
    if address is not None and address == state.get("ray_address") and state.get("is_own_cluster"):
        _show_token()
    try:
        if address is not None:
            context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            console.err.print("[dim]starting Ray on this machine…[/]")
            context = ray.init(
                address="local",
                include_dashboard=dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=_object_store_bytes(),
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(f"no Ray cluster at {address or 'this machine'}: {error}") from None
    signal.signal(signal.SIGTERM, on_sigterm)  # ray.init replaces it by one that prints a C++ stack and exits
    try:
        with redirect_stdout(sys.stderr):  # Ray reports errors of its actors on stdout, which is for results
            yield Session(str(context.address_info["gcs_address"]), is_own=address is None)
    finally:
        ray.shutdown()


def _show_token() -> None:
    """Have this process show the user's token, which a cluster that Ray starts on one machine asks of whoever joins."""
    from ray._raylet import Config  # type: ignore[attr-defined]  # Ray's stub leaves it out

    runtime.set_variable("RAY_AUTH_MODE", "token")
    Config.initialize("")  # Ray read the variable when it was imported


def _object_store_bytes() -> int:
    """A quarter of the memory, at most 1 GB: batches of text are small, and /dev/shm is memory too."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(max(100_000_000, min(1_000_000_000, physical // 4)))


def remember(root: Path, state: dict[str, Any]) -> None:
    """Write the state file."""
    artefacts.write_json(state_file(root), state)


@contextmanager
def updating(root: Path) -> Iterator[None]:
    """One process at a time changes what the endpoint of this root serves; ClusterError for the others."""
    folder = root / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    with artefacts.try_lock(folder) as is_ours:
        if not is_ours:
            raise ClusterError("another `ulm serve update` of this root is under way; wait for its end")
        yield


def forget(root: Path) -> None:
    """Remove the state file if it is this process's."""
    state = running(root)
    if state is not None and state.get("pid") == os.getpid():
        state_file(root).unlink(missing_ok=True)
