"""`ulm keys …`: who may ask the endpoint. Works on the database, whether an endpoint runs or not."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ulm import runtime
from ulm.cli import cluster, console
from ulm.errors import ConfigError

NONE = "none"  # in place of a limit: no longer any
UNITS_S = {"m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
MAX_NAME, MAX_MODELS = 120, 100
MAX_REQUESTS = 100_000  # a minute, of which each is an entry of a list
MAX_TOKENS, MAX_QUOTA = 1 << 40, 1 << 60
keys = typer.Typer(help="Make API keys for the endpoint, list, change and revoke them.", no_args_is_help=True)
Database = Annotated[
    str | None,
    typer.Option(help="The URL of the endpoint's database. Default: ULM_DATABASE_URL, else SQLite's at this root."),
]
Limit = Annotated[str | None, typer.Option(help="A number; none: no limit.")]
KeyId = Annotated[str, typer.Argument(help="A key's id: the twelve characters after ulm-.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Hang this file's verbs on the command line."""
    app.add_typer(keys, name="keys")


@contextmanager
def _store(database: str | None) -> Iterator[Any]:
    from serve.store import Store, database_url

    store = Store.open(database_url(database, runtime.root()))
    try:
        yield store
    finally:
        store.close()


@keys.command("create")
def create(
    name: Annotated[str, typer.Option(help="Whose it is, or what for.")],
    scope: Annotated[list[str], typer.Option(help="infer, data, train or admin; may be repeated.")] = ["infer"],  # noqa: B006
    model: Annotated[list[str], typer.Option(help="A model that it may use; may be repeated. None: all.")] = [],  # noqa: B006
    requests_per_minute: Annotated[int | None, typer.Option(min=1, max=MAX_REQUESTS, help="Default: no limit.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, max=MAX_TOKENS, help="Of prompts and answers.")
    ] = None,
    quota: Annotated[int | None, typer.Option(min=1, max=MAX_QUOTA, help="Tokens in all.")] = None,
    expires: Annotated[str | None, typer.Option(help="After how long: 12h, 30d, 8w. Default: never.")] = None,
    database: Database = None,
) -> None:
    """Make a key and print it: it is shown this once, and only a salted hash of it is kept.

    Example: ulm keys create --name anna --model swarm --requests-per-minute 60 --quota 1000000 --expires 30d
    """
    from serve import accounts

    fields = {
        "name": _checked_name(name),
        "scopes": _checked_scopes(scope),
        "models": _checked_models(model),
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "quota_tokens": quota,
        "expires_s": time.time() + _duration_s(expires) if expires is not None else None,
    }
    with _store(database) as store:
        made = accounts.create(store, **fields)
        (found,) = accounts.listed(store, made.id)
    console.err.print("shown this once; send it as Authorization: Bearer …")
    _tell_unknown(model)
    console.finish({**_shown(found), "key": made.text})


@keys.command("list")
def list_(database: Database = None) -> None:
    """All keys: what they may do, and what they used.

    Example: ulm keys list
    """
    from serve import accounts

    with _store(database) as store:
        found = [_shown(key) for key in accounts.listed(store)]
    console.err.print(_table(found) if found else "no keys yet: ulm keys create --name me")
    console.finish({"keys": found})


@keys.command("show")
def show(key_id: KeyId, database: Database = None) -> None:
    """One key: what it may do, and what it used.

    Example: ulm keys show Zx3kT0aYb91q
    """
    from serve import accounts

    with _store(database) as store:
        found = accounts.listed(store, key_id)
    if not found:
        raise _unknown(key_id)
    console.finish(_shown(found[0]))


@keys.command("update")
def update(
    key_id: KeyId,
    name: Annotated[str | None, typer.Option(help="Whose it is, or what for.")] = None,
    scope: Annotated[list[str], typer.Option(help="In place of those it has: infer, data, train or admin.")] = [],  # noqa: B006
    model: Annotated[list[str], typer.Option(help="In place of those it has; none: all.")] = [],  # noqa: B006
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    quota: Annotated[str | None, typer.Option(help="Tokens in all, with those it has used; none: no limit.")] = None,
    expires: Annotated[str | None, typer.Option(help="After how long from now: 12h, 30d, 8w; none: never.")] = None,
    database: Database = None,
) -> None:
    """Change what a key may do, from its next request on; what is not named stays as it is.

    The word none takes a limit away.

    Example: ulm keys update Zx3kT0aYb91q --requests-per-minute 120 --quota none

    Example: ulm keys update Zx3kT0aYb91q --model swarm --model e00 --expires 30d
    """
    from serve import accounts

    fields: dict[str, Any] = {}
    if name is not None:
        fields["name"] = _checked_name(name)
    if scope:
        fields["scopes"] = _checked_scopes(scope)
    if model:
        fields["models"] = None if model == [NONE] else _checked_models(model)
    for field, option, text, most in (
        ("requests_per_minute", "--requests-per-minute", requests_per_minute, MAX_REQUESTS),
        ("tokens_per_minute", "--tokens-per-minute", tokens_per_minute, MAX_TOKENS),
        ("quota_tokens", "--quota", quota, MAX_QUOTA),
    ):
        if text is not None:
            fields[field] = None if text == NONE else _number(option, text, most)
    if expires is not None:
        fields["expires_s"] = None if expires == NONE else time.time() + _duration_s(expires)
    if not fields:
        raise ConfigError("keys update", "nothing is to be changed", "an option, such as --quota 1000000")
    with _store(database) as store:
        if not accounts.change(store, key_id, **fields):
            if accounts.listed(store, key_id):
                raise ConfigError("KEY_ID", f"{key_id} is revoked, for good", "make another: ulm keys create --name me")
            raise _unknown(key_id)
        (found,) = accounts.listed(store, key_id)
    _tell_unknown(fields.get("models") or [])
    console.finish(_shown(found))


@keys.command("revoke")
def revoke(key_id: KeyId, database: Database = None) -> None:
    """End a key, at once and for good; answers under way are finished.

    Example: ulm keys revoke Zx3kT0aYb91q
    """
    from serve import accounts

    with _store(database) as store:
        if not accounts.revoke(store, key_id):
            raise _unknown(key_id)
        (found,) = accounts.listed(store, key_id)
    console.finish(_shown(found))


def _tell_unknown(models: list[str]) -> None:
    served = (cluster.running(runtime.root()) or {}).get("models", models)
    if unknown := sorted(set(models) - set(served)):  # it may be served later
        console.err.print(f"[yellow]not served now[/]: {console.printable(', '.join(unknown))}", soft_wrap=True)


def _unknown(key_id: str) -> ConfigError:
    shown = key_id if re.fullmatch("[A-Za-z0-9]{1,12}", key_id) else "given"  # it may be a whole key, with its secret
    return ConfigError("KEY_ID", f"there is no key {shown}", "the id alone, without ulm- and the secret: ulm keys list")


def _checked_name(name: str) -> str:
    if not name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        raise ConfigError("--name", "is no name", f"up to {MAX_NAME} printable characters")
    return name


def _checked_scopes(scopes: list[str]) -> list[str]:
    from serve.keys import SCOPES

    for scope in scopes:
        if scope not in SCOPES:
            raise ConfigError("--scope", f"there is no scope {scope!r}", f"one of {', '.join(SCOPES)}")
    return sorted(set(scopes), key=SCOPES.index)


def _checked_models(models: list[str]) -> list[str] | None:
    if len(models) > MAX_MODELS or any(not name.isprintable() or not 0 < len(name) <= 200 for name in models):
        raise ConfigError("--model", "is no name of a model", f"as /v1/models lists them, up to {MAX_MODELS}")
    return sorted(set(models)) or None


def _number(option: str, text: str, most: int) -> int:
    if not re.fullmatch("[1-9][0-9]{0,18}", text) or int(text) > most:
        raise ConfigError(option, f"{text!r} is no number from 1 to {most:,}", f"{NONE} takes the limit away")
    return int(text)


def _duration_s(text: str) -> int:
    found = re.fullmatch(r"([1-9][0-9]{0,4})([mhdw])", text)
    if found is None:
        raise ConfigError("--expires", f"{text!r} is no duration", "a number and m, h, d or w, for example 30d")
    return int(found[1]) * UNITS_S[found[2]]


def _shown(key: dict[str, Any]) -> dict[str, Any]:
    """A key for people and programs: times as text, and its status."""
    is_over = key["expires_s"] is not None and key["expires_s"] <= time.time()
    status = "revoked" if key["revoked_s"] is not None else "expired" if is_over else "valid"
    times = {name: _time(key[f"{name}_s"]) for name in ("created", "expires", "revoked")}
    rest = {name: value for name, value in key.items() if not name.endswith("_s")}
    return {**rest, **times, "status": status}


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("id", no_wrap=True)
    table.add_column("name", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("may", overflow="fold")
    table.add_column("per minute", overflow="fold")
    table.add_column("tokens used", justify="right")
    table.add_column("expires", no_wrap=True)
    for key in found:
        limits = [f"{key[f'{of}_per_minute']:,} {of}" for of in ("requests", "tokens") if key[f"{of}_per_minute"]]
        quota = f" of {key['quota_tokens']:,}" if key["quota_tokens"] is not None else ""
        may = ", ".join(key["scopes"]) + (f": {', '.join(key['models'])}" if key["models"] else "")
        used, expires = f"{key['used_tokens']:,}{quota}", (key["expires"] or "never")[:10]
        table.add_row(key["id"], Text(key["name"]), key["status"], Text(may), ", ".join(limits) or "any", used, expires)
    return table
