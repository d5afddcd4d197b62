"""The state in SQL, the same over SQLite and PostgreSQL: migrations, transactions, and who may read the file."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, inspect, select, text, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError

from serve import accounts
from serve.store import Base, Key, Reservation, Store, checked_url
from tests.databases import new_database, postgresql
from ulm.errors import ArtefactError, ClusterError, ConfigError

SHOWS = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('SELECT id FROM keys').fetchall())"
OPENS = "import sys; from serve.store import Store; print('ready'); input(); Store.open(sys.argv[1]).close()"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state.db'}"
    return new_database(request.getfixturevalue("server"))


@pytest.fixture
def opened(url: str) -> Iterator[Callable[[], Store]]:
    """Opens the database, closed at the end."""
    stores: list[Store] = []

    def open_() -> Store:
        stores.append(Store.open(url))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


def make(store: Store) -> str:
    return accounts.create(store, name="a", scopes=["infer"]).id


def test_the_migrations_make_what_the_models_say(opened: Callable[[], Store]) -> None:
    with opened().reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        assert {"keys", "reservations", "alembic_version"} == set(inspect(connection).get_table_names())


def test_what_was_written_is_there_for_whoever_opens_it_next(opened: Callable[[], Store]) -> None:
    key_id = make(opened())
    (found,) = accounts.listed(opened())
    assert (found["id"], found["scopes"], found["models"], found["used_tokens"]) == (key_id, ["infer"], None, 0)


def test_several_processes_that_open_it_at_once_all_succeed(url: str, opened: Callable[[], Store]) -> None:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-uc", OPENS, url]
    children = [subprocess.Popen(command, text=True, **pipes) for _ in range(4)]
    assert [child.stdout.readline() for child in children if child.stdout] == ["ready\n"] * 4
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    said = [child.communicate(timeout=60)[1] for child in children]
    assert [child.returncode for child in children] == [0] * 4, said
    make(opened())


def test_a_database_of_a_newer_version_is_refused_and_left_as_it_is(opened: Callable[[], Store]) -> None:
    store = opened()
    with store.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ArtefactError, match=r"made by another version of µLM \(revision 9999\); use that version"):
        opened()
    with store.reading() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == "9999"


def test_a_transaction_that_fails_leaves_nothing(opened: Callable[[], Store]) -> None:
    store = opened()
    key_id = make(store)
    with pytest.raises(ZeroDivisionError), store.writing() as connection:
        connection.execute(update(Key).values(used_tokens=5))
        raise ZeroDivisionError
    assert accounts.listed(store, key_id)[0]["used_tokens"] == 0


def test_a_reservation_is_of_a_key_that_there_is(opened: Callable[[], Store]) -> None:
    row = {"id": "r", "key_id": "nobody", "tokens": 1, "minute_ends_s": 0.0, "expires_s": 0.0}
    with pytest.raises(IntegrityError), opened().writing() as connection:
        connection.execute(insert(Reservation).values(row))


def test_writers_wait_for_each_other_and_none_is_lost(opened: Callable[[], Store]) -> None:
    stores = [opened(), opened()]
    key_id = make(stores[0])

    def add(store: Store) -> None:
        for _ in range(25):
            with store.writing() as connection:
                used = connection.execute(select(Key.used_tokens).with_for_update()).scalar_one()
                connection.execute(update(Key).values(used_tokens=used + 1))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(add, stores))
    assert accounts.listed(stores[1], key_id)[0]["used_tokens"] == 50


def test_errors_do_not_show_what_was_written(opened: Callable[[], Store]) -> None:
    store, row = opened(), {"id": "r", "key_id": "geheimnis", "tokens": 1, "minute_ends_s": 0.0, "expires_s": 0.0}
    with pytest.raises(IntegrityError) as error, store.writing() as connection:
        connection.execute(insert(Reservation).values(row).returning(Reservation.id))
    assert "[SQL parameters hidden" in str(error.value)


# ---- SQLite alone


def test_only_its_owner_reads_sqlites_files(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "state.db"
    place.parent.mkdir()
    place.touch(0o644)
    store = Store.open(f"sqlite:///{place}")
    make(store)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in place.parent.iterdir()} == {
        name: "0o600" for name in ("state.db", "state.db-wal", "state.db-shm")
    }
    with store.reading() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 2
    store.close()


def test_a_store_that_is_opened_twice_in_a_process_goes_on_after_another_process_has_closed_its(tmp_path: Path) -> None:
    """POSIX locks are a process's: were the file itself opened and closed, all of them would be gone."""
    url = f"sqlite:///{tmp_path / 'state.db'}"
    first = Store.open(url)
    make(first)
    Store.open(url).close()
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-uc", OPENS, url], text=True, **pipes)
    child.communicate("go\n", timeout=60)
    key_id = make(first)
    seen = subprocess.check_output([sys.executable, "-c", SHOWS, str(tmp_path / "state.db")], text=True)
    first.close()
    assert key_id in seen


def test_a_link_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "state.db").symlink_to("target")
    with pytest.raises(ConfigError, match=r"state\.db is something else"):
        Store.open(f"sqlite:///{tmp_path / 'state.db'}")
    (tmp_path / "target").unlink()
    with pytest.raises(ConfigError, match=r"state\.db is something else"):
        Store.open(f"sqlite:///{tmp_path / 'state.db'}")
    assert not (tmp_path / "target").exists(), "nor is anything made where it leads"


@pytest.mark.parametrize("kind", ["notes", "a word", "fifo", "device", "folder", "damaged"])
def test_what_is_no_database_is_named_and_left_as_it_is(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/full") if kind == "device" else tmp_path / "state.db"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "damaged":
        Store.open(f"sqlite:///{path}").close()
        path.write_bytes(path.read_bytes()[:100] + b"text " * 10_000)
    elif kind != "device":
        path.write_bytes(b"text " * (1_000 if kind == "notes" else 1))
        path.chmod(0o644)
    mode, problem = path.stat().st_mode, "cannot be opened: " if kind == "damaged" else "is something else"
    with pytest.raises((ClusterError, ConfigError), match=f"{path} {problem}"):
        Store.open(f"sqlite:///{path}")
    if kind != "damaged":
        assert path.stat().st_mode == mode, "who may read somebody's notes is not changed"


@pytest.mark.parametrize("tables", [("notes",), ("alembic_version", "runs"), ("keys",)])
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_another_programs_database_is_refused_and_left_as_it_is(
    tmp_path: Path, tables: tuple[str, ...], mode: str
) -> None:
    path = tmp_path / "a b?c#%41.db"  # no URL's: as one is a path within
    with closing(sqlite3.connect(path)) as theirs:
        theirs.execute(f"PRAGMA journal_mode={mode}")
        for table in tables:
            theirs.execute(f"CREATE TABLE {table} (version_num TEXT)")
    path.chmod(0o644)
    before = path.read_bytes(), path.stat().st_mode
    with pytest.raises(ConfigError, match=r"%41\.db holds the tables of another program \(another path"):
        Store.open(URL.create("sqlite", database=str(path)).render_as_string())
    assert (path.read_bytes(), path.stat().st_mode) == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_an_empty_database_is_anybodys(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as theirs:
        theirs.execute("VACUUM")
    Store.open(f"sqlite:///{path}").close()
    store = Store.open(f"sqlite:///{path}")
    make(store)
    store.close()


def test_a_path_with_a_nul_is_refused() -> None:
    with pytest.raises(ConfigError, match="is SQLite without an absolute path"):
        Store.open("sqlite:////a\0b")


# ---- URLs


def test_a_password_is_in_no_error() -> None:
    with pytest.raises(
        ClusterError, match=r"postgresql\+psycopg://a:\*\*\*@127\.0\.0\.1:1/b cannot be opened"
    ) as error:
        Store.open("postgresql://a:geheim@127.0.0.1:1/b?password=geheim")
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize("given", ["postgres://h/d", "postgresql://h/d", "postgresql+psycopg://h/d"])
def test_every_spelling_of_postgresql_is_psycopgs(given: str) -> None:
    assert checked_url(given).drivername == "postgresql+psycopg"
