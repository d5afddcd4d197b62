"""The endpoint's port, held open while gateways come and go: all of a node accept from one socket of one queue.

A gateway that ends takes no connection with it that it had not accepted, and one that dies leaves those that wait to
its successor.
"""

from __future__ import annotations

import asyncio
import errno
import shutil
import socket
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ulm.errors import ClusterError

NAMESPACE, NAME = "ulm", "door"
PATIENCE_S, RETRY_S = 10.0, 0.1
FIRST_FREE = 8000  # a port that takes no rights
NODE_SHARE = 0.001  # of a node's own resource, which has it run there and nowhere else


def check_port(host: str, port: int) -> None:
    """ClusterError when the address cannot be listened on."""
    with _socket(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(probe, host, port)


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


def _bind(to_bind: socket.socket, host: str, port: int) -> None:
    try:
        to_bind.bind((host, port))
    except OSError as error:
        to_bind.close()
        other = {errno.EADDRINUSE: port + 1, errno.EACCES: FIRST_FREE}.get(error.errno or 0)
        remedy = f"--set port={other}" if other else "--set host=127.0.0.1, or an address of this machine"
        problem = f"port {port} of {host} cannot be used: {error.strerror}"
        raise ClusterError(f"{problem}; choose another with {remedy}") from None


class Door:
    """An actor that has the port, and gives it to gateways, whose processes are on its node."""

    def __init__(self, host: str, port: int) -> None:
        self._port = _socket(host)
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        is_again = ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed
        if is_again:  # gateways still have the port, which it must be able to take beside them
            self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _bind(self._port, host, port)
        if not is_again:  # whoever comes meanwhile waits; else others could take the port until a gateway listens
            self._port.listen()
            self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._folder = Path(tempfile.mkdtemp(prefix="ulm-door-"))  # nobody else may enter
        self._giving = socket.socket(socket.AF_UNIX)
        self._giving.bind(str(self._folder / "socket"))
        self._giving.listen()
        threading.Thread(target=self._give, name="door", daemon=True).start()

    def _give(self) -> None:
        while self._giving.fileno() >= 0:
            try:
                asking, _ = self._giving.accept()
            except OSError:  # too many files are open, say
                time.sleep(RETRY_S)
                continue
            with asking, suppress(OSError):
                socket.send_fds(asking, [b"."], [self._port.fileno()])

    def place(self) -> str:
        """Where gateways ask for the port."""
        return str(self._folder / "socket")

    def node(self) -> str:
        """The resource that this node alone has."""
        here = ray.get_runtime_context().get_node_id()
        (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
        return next(str(name) for name in resources if name.startswith("node:") and "__" not in name)

    def close(self) -> None:
        """Give it to nobody any more; once the gateways have closed it, too, connections are refused."""
        self._port.close()
        self._giving.close()
        shutil.rmtree(self._folder, ignore_errors=True)


DoorActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Door)


def open_(host: str, port: int) -> None:
    """Take the port on this node; ClusterError where it cannot be had."""
    check_port(host, port)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = DoorActor.options(name=NAME, namespace=NAMESPACE, lifetime="detached", scheduling_strategy=here)
    try:
        ray.get(actor.remote(host, port).place.remote(), timeout=PATIENCE_S)
    except ValueError:  # Ray's, for a name that is taken
        raise ClusterError("this cluster has an endpoint already; end it first, with `ulm serve down`") from None
    except RayError as error:
        raise ClusterError(f"port {port} of {host} cannot be used: {str(error).strip().splitlines()[-1]}") from None


def node() -> dict[str, float]:
    """What gateways ask for, to be where the door is; nothing where there is none."""
    if not ray.is_initialized():
        return {}
    try:
        return {ray.get(_actor().node.remote(), timeout=PATIENCE_S): NODE_SHARE}
    except ValueError:
        return {}


def close() -> None:
    """See Door.close; nothing where there is none."""
    with suppress(ValueError, RayError):
        door = _actor()
        ray.get(door.close.remote(), timeout=PATIENCE_S)
        ray.kill(door)


def _actor() -> Any:
    """ValueError where there is none."""
    return ray.get_actor(NAME, NAMESPACE)


async def is_open() -> bool:
    """Whether others will take what comes to the port."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            await (await asyncio.to_thread(_actor)).place.remote()
            return True
    except (ValueError, RayError, TimeoutError):
        return False


async def port() -> socket.socket:
    """The port, for a process on the door's node."""
    async with asyncio.timeout(PATIENCE_S):
        place = await (await asyncio.to_thread(_actor)).place.remote()
        return await asyncio.to_thread(_received, place)


def _received(place: str) -> socket.socket:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(PATIENCE_S)
        asking.connect(place)
        _, (number,), _, _ = socket.recv_fds(asking, 1, 1)
    return socket.socket(fileno=number)
