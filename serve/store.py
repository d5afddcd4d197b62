"""State in SQL: keys and what they used. SQLite in WAL mode beside the artefacts, or PostgreSQL by its URL."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import JSON, BigInteger, Connection, Engine, ForeignKey, String, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ulm import runtime
from ulm.errors import ArtefactError, ClusterError, ConfigError

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_S = 10.0  # that a writer of SQLite waits for another one
DATABASE = "ULM_DATABASE_URL"  # the environment's, which may hold a password; a recipe's may not
_MIGRATION_LOCK = 0x756C6D  # of PostgreSQL's advisory locks: "ulm"


class Base(DeclarativeBase):
    """All tables. A change of them needs a new file in migrations/versions; a test compares the two."""


class Key(Base):
    """What is kept of an API key, what it may do, and what it used."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    name: Mapped[str] = mapped_column(String(120))
    salt: Mapped[bytes]
    hash: Mapped[bytes]
    scopes: Mapped[list[str]] = mapped_column(JSON)
    models: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))  # None: all
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    quota_tokens: Mapped[int | None] = mapped_column(BigInteger)  # in all
    used_tokens: Mapped[int] = mapped_column(BigInteger, default=0)  # with those of open reservations
    created_s: Mapped[float]
    expires_s: Mapped[float | None]
    revoked_s: Mapped[float | None]


class Reservation(Base):
    """Tokens that a request under way may use at most; they count as used until it says what it did use."""

    __tablename__ = "reservations"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("keys.id"))
    tokens: Mapped[int] = mapped_column(BigInteger)  # 0 once they were given back, unheard of
    minute_ends_s: Mapped[float]  # of the minute that they count in
    expires_s: Mapped[float] = mapped_column(index=True)  # unless its gateway is heard of before


def database_url(given: str | None, root: Path) -> str:
    """The URL of the state: the one given, else the environment's, else SQLite's at the root."""
    return given or runtime.variable(DATABASE) or f"sqlite:///{root / 'state.db'}"


def checked_url(given: str, place: str = "database") -> URL:
    """A URL that the store can open; ConfigError, which never shows it, for any other."""
    remedy = "sqlite:////path/to/state.db, or postgresql://user@host/name"
    try:
        url = make_url(given)
    except ArgumentError:
        raise ConfigError(place, "is not a database's URL", remedy) from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ConfigError(place, "is of a kind of database that is not supported", remedy)
    if url.drivername == "sqlite" and (not (url.database or "").startswith("/") or "\0" in str(url.database)):
        raise ConfigError(place, "is SQLite without an absolute path", remedy)
    return url


class Store:
    """An open database, migrated to this version."""

    def __init__(self, engine: Engine) -> None:
        self._reads = engine
        # SQLite would let two transactions read, and then refuse one of them to write: a writer says so at its begin.
        self._writes = engine.execution_options(begins="BEGIN IMMEDIATE")

    @classmethod
    def open(cls, given: str, *, is_counter: bool = False) -> Store:
        """Connect and migrate. ConfigError, ArtefactError or ClusterError with a remedy where that cannot be.

        `is_counter`: SQLite's commits outlast this process, not a loss of power: for what is written at every request.
        """
        url = checked_url(given)
        try:
            store = cls(_sqlite(url, is_counter) if url.drivername == "sqlite" else _postgresql(url))
        except (ModuleNotFoundError, NoSuchModuleError):
            raise ConfigError("database", "psycopg is not installed", "pip install 'ulm[postgres]'") from None
        try:
            store._migrate(_shown(url))
        except DBAPIError as error:
            store.close()
            raise ClusterError(f"the database {_shown(url)} cannot be opened: {_cause(error)}") from None
        except BaseException:
            store.close()
            raise
        return store

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection with one consistent view."""
        with self._reads.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction, committed at the end of the block; with SQLite there is one at a time."""
        with self._writes.begin() as connection:
            yield connection

    def close(self) -> None:
        """Give all connections back."""
        self._reads.dispose()

    def _migrate(self, shown: str) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        script = ScriptDirectory.from_config(config)
        with self.reading() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
        if found == script.get_current_head():
            return
        with self.writing() as connection:  # whoever comes second waits, and finds nothing to do
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError:  # a revision that this version has not
                problem = f"the database {shown} was made by another version of µLM (revision {found})"
                raise ArtefactError(f"{problem}; use that version, or another database") from None


def _shown(url: URL) -> str:
    if url.drivername == "sqlite":
        return url.database or ""
    return url.set(query={}).render_as_string(hide_password=True)  # a query, too, may hold a password


def _cause(error: SQLAlchemyError) -> str:
    """The database's own words, without the statement and its values."""
    said = str(getattr(error, "orig", None) or type(error).__name__)
    return said.strip().splitlines()[0][:200] if said.strip() else type(error).__name__


def _postgresql(url: URL) -> Engine:
    return create_engine(url, hide_parameters=True, pool_pre_ping=True, connect_args={"connect_timeout": 5})


def _check_ours(path: Path) -> None:
    """ConfigError for a file of SQLite that holds tables, and not ours: nothing is written into another program's."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=BUSY_S)) as connection:
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            raise ConfigError("database", f"{path} is something else", "another path") from None
        raise ClusterError(f"the database {path} cannot be opened: {error}") from None
    if names and not {Key.__tablename__, "alembic_version"} <= names:  # Alembic is others' way, too
        raise ConfigError("database", f"{path} holds the tables of another program", "another path, for a new file")


def _sqlite(url: URL, is_counter: bool) -> Engine:
    """An engine over a file that only its owner reads."""
    path = Path(url.database or "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        # One that is there is SQLite's alone to open: a process that closes a file loses all its locks of it, and then
        # another one would take SQLite's log away, with what this one goes on to write.
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ConfigError("database", f"{path} is something else", "another path")
        _check_ours(path)
        path.chmod(0o600)  # the files beside it, -wal and -shm, get the same
    except OSError as error:
        raise ConfigError("database", f"{path} cannot be used: {error.strerror}", "another path") from None
    engine = create_engine(url, hide_parameters=True, connect_args={"timeout": BUSY_S, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver would begin transactions of its own, and not for every statement
        synchronous = "NORMAL" if is_counter else "FULL"
        for pragma in (f"synchronous={synchronous}", "foreign_keys=ON", "journal_mode=WAL"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begins", "BEGIN"))

    return engine
