"""Who may ask, how often and for how much: keys, limits per minute and quotas. Plain, one call at a time; no Ray."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limits import RateLimitItemPerMinute
from limits.errors import ConfigurationError
from limits.storage import MemoryStorage, RedisStorage, storage_from_string
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter
from sqlalchemy import Row, delete, func, insert, select, update

from serve.keys import NewKey, is_secret, new_key, parse
from serve.store import Key, Reservation, Store, database_url
from ulm import runtime
from ulm.errors import ConfigError, InvalidKeyError, QuotaError, RateLimitError, RequestError, ScopeError
from ulm.recipes.serve import ServeRecipe

LEASE_S = 60.0  # a reservation whose gateway is not heard of for so long is given back
COUNTERS = "ULM_COUNTERS_URL"  # the environment's, which may hold a password; a recipe's may not
UNKNOWN_KEY = "This key is not known here, or has ended; ask the operator of this endpoint for one"


@dataclass(frozen=True)
class Admitted:
    """A request that may go on."""

    key_id: str
    models: frozenset[str] | None  # that the key may use; None: all
    is_metered: bool  # its tokens are reserved before they are used
    headers: Mapping[str, str] = field(default_factory=dict)


def counters(url: str | None) -> Any:
    """Where requests and tokens per minute are counted: here, else in Redis. ConfigError for any other URL."""
    if url is None:
        return MemoryStorage()
    remedy = "redis://host:6379/0"
    if not re.match(r"(redis|rediss|redis\+unix)://", url):
        raise ConfigError("counters", "is not Redis's URL", remedy)
    try:
        made = storage_from_string(url, wrap_exceptions=True, socket_timeout=2, socket_connect_timeout=2)
    except ConfigurationError:
        raise ConfigError("counters", "redis is not installed", "pip install 'ulm[redis]'") from None
    assert isinstance(made, RedisStorage)
    return made


def check_counters(url: str | None) -> None:
    """ConfigError for a URL of counters that is none, or where no Redis answers; what it holds is not shown."""
    if not counters(url).check():
        raise ConfigError("counters", "no Redis answers there", f"start it, or another URL; {COUNTERS} is one, too")


def state_of(recipe: ServeRecipe, root: Path) -> tuple[str, str | None]:
    """The URLs of a recipe's database and counters; None for counters in memory."""
    return database_url(recipe.database, root), recipe.counters or runtime.variable(COUNTERS)


def check_state(recipe: ServeRecipe, root: Path) -> None:
    """ConfigError and the like for state that cannot be used, and where there is no key that could be sent."""
    database, counters_url = state_of(recipe, root)
    check_counters(counters_url)
    store = Store.open(database)
    try:
        if not has_keys(store):
            remedy = "make one: ulm keys create --name me; or keys: false, for no keys at all"
            raise ConfigError("keys", "there is none yet, so that nobody could ask", remedy)
    finally:
        store.close()


class Accounts:
    """Decides on requests. What is refused raises a RequestError; calls may be repeated with the same reservation."""

    def __init__(self, store: Store, storage: Any = None, now_s: Callable[[], float] = time.time) -> None:
        self._store, self._storage, self._now_s = store, storage or MemoryStorage(), now_s
        # Requests: never more than the limit in any 60 seconds. That takes an entry for each, too many for tokens,
        # which are counted from the first of a minute on; and only there can be given back what was not used.
        self._requests = MovingWindowRateLimiter(self._storage)
        self._tokens = FixedWindowRateLimiter(self._storage)
        self._near_s = 1e-3 if isinstance(self._storage, MemoryStorage) else 2.0  # Redis tells whole seconds

    # ---- requests

    def admit(self, authorization: str | None, scope: str) -> Admitted:
        """Check a request's key, and count the request."""
        key_id, secret = parse(authorization)
        key = self._key(key_id)
        if not is_secret(secret, (key.salt, key.hash) if key else None) or key is None or not self._is_valid(key):
            raise InvalidKeyError(UNKNOWN_KEY)
        try:
            return self._admitted(key, scope)
        except RequestError as error:
            error.key_id = key.id
            raise

    def _admitted(self, key: Row[Any], scope: str) -> Admitted:
        if scope not in key.scopes:
            problem = f"This key may not ask this path: it has the scopes {', '.join(key.scopes)}, and not {scope}"
            raise ScopeError(f"{problem}; paths to ask models begin with /v1")
        headers = {**self._count_request(key), **self._token_headers(key)}
        metered = key.tokens_per_minute is not None or key.quota_tokens is not None
        models = None if key.models is None else frozenset(key.models)
        return Admitted(key.id, models, metered, headers)

    def _key(self, key_id: str) -> Row[Any] | None:
        """Looked up at each request: what was revoked is so at once, on every gateway."""
        with self._store.reading() as connection:
            return connection.execute(select(Key.__table__).where(Key.id == key_id)).one_or_none()

    def _is_valid(self, key: Row[Any]) -> bool:
        return key.revoked_s is None and (key.expires_s is None or self._now_s() < key.expires_s)

    def _count_request(self, key: Row[Any]) -> dict[str, str]:
        if key.requests_per_minute is None:
            return {}
        limit, name = _PerMinute(key.requests_per_minute), f"requests-{key.id}"
        has_room = self._requests.hit(limit, name)
        window = self._requests.get_window_stats(limit, name)
        headers = self._headers("requests", limit.amount, window.remaining, window.reset_time)
        if not has_room:
            problem = f"This key has had its {limit.amount} requests of a minute"
            wait_s = max(0.0, window.reset_time - self._now_s())
            raise RateLimitError(problem, kind="requests", retry_after_s=wait_s, headers=headers)
        return headers

    def _headers(self, kind: str, limit: int, remaining: int, reset_s: float) -> dict[str, str]:
        left_s = max(0.0, reset_s - self._now_s())
        values = {"limit": str(limit), "remaining": str(max(0, remaining)), "reset": f"{left_s:.3f}s"}
        return {f"x-ratelimit-{name}-{kind}": value for name, value in values.items()}

    # ---- tokens

    def reserve(self, key_id: str, reservation: str, tokens: int) -> dict[str, str]:
        """Take so many tokens out of the key's minute and quota, until `settle`; the headers that tell what is left."""
        key = self._key(key_id)
        if key is None or not self._is_valid(key):  # revoked since it was admitted
            raise InvalidKeyError(UNKNOWN_KEY)
        if self._is_open(reservation):  # the call is made again: its answer was lost
            return self._token_headers(key)
        ends_s = self._take_of_minute(key, tokens)
        try:
            self._take_of_quota(key, reservation, tokens, ends_s)
        except BaseException:
            self._give_back_to_minute(key, tokens, ends_s)
            raise
        return self._token_headers(key)

    def settle(self, reservation: str, used: int) -> None:
        """Say what a request did use of what it had reserved. It is written once this returns."""
        with self._store.writing() as connection:
            returned = (Reservation.key_id, Reservation.tokens, Reservation.minute_ends_s)
            gone = delete(Reservation).where(Reservation.id == reservation).returning(*returned)
            found = connection.execute(gone).one_or_none()
            if found is not None:
                connection.execute(_use(found.key_id, used - found.tokens))
        if found is not None and found.minute_ends_s and found.tokens > used:
            key = self._key(found.key_id)
            assert key is not None
            self._give_back_to_minute(key, found.tokens - used, found.minute_ends_s)

    def note(self, key_id: str, used: int) -> None:
        """Add to what a key without limits did use."""
        with self._store.writing() as connection:
            connection.execute(_use(key_id, used))

    def keep(self, reservations: Sequence[str]) -> None:
        """A gateway's word, every now and then, on what is still under way there; gives back what nobody speaks of."""
        now_s = self._now_s()
        with self._store.writing() as connection:
            for begin in range(0, len(reservations), 500):
                mine = Reservation.id.in_(reservations[begin : begin + 500])
                connection.execute(update(Reservation).where(mine).values(expires_s=now_s + LEASE_S))
            lapsed = (Reservation.expires_s < now_s) & (Reservation.tokens > 0)
            for found in connection.execute(select(Reservation.__table__).where(lapsed).with_for_update()).all():
                connection.execute(_use(found.key_id, -found.tokens))
                # the row stays for a day: should its gateway speak up after all, what it says is added
                connection.execute(update(Reservation).where(Reservation.id == found.id).values(tokens=0))
            connection.execute(delete(Reservation).where(Reservation.expires_s < now_s - 86_400))

    def _is_open(self, reservation: str) -> bool:
        with self._store.reading() as connection:
            return connection.execute(select(Reservation.id).where(Reservation.id == reservation)).first() is not None

    def _take_of_minute(self, key: Row[Any], tokens: int) -> float:
        """When the minute ends that they were taken of; 0 for a key without this limit."""
        if key.tokens_per_minute is None:
            return 0.0
        limit, name = _minute(key)
        wish = f"This request may use {tokens} tokens, prompt and answer, and the key has"
        if tokens > limit.amount:
            problem = f"{wish} {limit.amount} a minute; send less, or ask for fewer with max_tokens"
            raise RateLimitError(problem, kind="tokens", headers=self._token_headers(key))
        has_room = self._tokens.hit(limit, name, cost=tokens)
        if not has_room:
            self._storage.incr(limit.key_for(name), limit.get_expiry(), -tokens)  # `hit` counts what it refuses, too
        window = self._tokens.get_window_stats(limit, name)
        if not has_room:
            problem = f"{wish} {window.remaining} of {limit.amount} left in this minute"
            wait_s = max(0.0, window.reset_time - self._now_s())
            raise RateLimitError(problem, kind="tokens", retry_after_s=wait_s, headers=self._token_headers(key))
        return float(window.reset_time)

    def _give_back_to_minute(self, key: Row[Any], tokens: int, ends_s: float) -> None:
        if key.tokens_per_minute is None:
            return
        limit, name = _minute(key)
        place = limit.key_for(name)
        if self._now_s() >= ends_s or abs(self._storage.get_expiry(place) - ends_s) > self._near_s:
            return  # they were of another minute
        if (count := self._storage.incr(place, limit.get_expiry(), -tokens)) < 0:  # the minute has ended since
            self._storage.incr(place, limit.get_expiry(), -count)

    def _take_of_quota(self, key: Row[Any], reservation: str, tokens: int, ends_s: float) -> None:
        row = {"id": reservation, "key_id": key.id, "tokens": tokens, "minute_ends_s": ends_s}
        with self._store.writing() as connection:
            fits = Key.quota_tokens.is_(None) | (Key.used_tokens + tokens <= Key.quota_tokens)
            taken = connection.execute(_use(key.id, tokens).where(fits))
            if taken.rowcount:
                connection.execute(insert(Reservation).values(**row, expires_s=self._now_s() + LEASE_S))
                return
            used = connection.execute(select(Key.used_tokens).where(Key.id == key.id)).scalar_one()
        left = f"{max(0, key.quota_tokens - used)} of {key.quota_tokens} are left of the key's quota"
        problem = f"This request may use {tokens} tokens, prompt and answer, and {left}"
        raise QuotaError(f"{problem}; ask for fewer with max_tokens, or for another quota")

    def _token_headers(self, key: Row[Any]) -> dict[str, str]:
        if key.tokens_per_minute is None:
            return {}
        limit, name = _minute(key)
        window = self._tokens.get_window_stats(limit, name)
        return self._headers("tokens", limit.amount, window.remaining, window.reset_time)


class _PerMinute(RateLimitItemPerMinute):
    """A limit whose counter is the key's, whatever the limit is: a new one goes on counting where the old one was."""

    def key_for(self, *identifiers: bytes | str | int | float) -> str:
        return "/".join((self.namespace, *map(str, identifiers)))


def _minute(key: Row[Any]) -> tuple[_PerMinute, str]:
    return _PerMinute(key.tokens_per_minute), f"tokens-{key.id}"


def _use(key_id: str, tokens: int) -> Any:
    return update(Key).where(Key.id == key_id).values(used_tokens=Key.used_tokens + tokens)


# ---- what `ulm keys` does


def create(store: Store, **fields: Any) -> NewKey:
    """A new key, written; whole in memory only."""
    made = new_key()
    row = {"id": made.id, "salt": made.salt, "hash": made.hash, "created_s": time.time(), "used_tokens": 0}
    with store.writing() as connection:
        connection.execute(insert(Key).values(**row, **fields))
    return made


PUBLIC = [c for c in Key.__table__.columns if c.name not in ("salt", "hash")]


def listed(store: Store, key_id: str | None = None) -> list[dict[str, Any]]:
    """All keys without what is kept of their secrets, oldest first; or the one."""
    wanted = select(*PUBLIC).order_by(Key.created_s, Key.id)
    with store.reading() as connection:
        found = connection.execute(wanted if key_id is None else wanted.where(Key.id == key_id))
        return [dict(row._mapping) for row in found]


def change(store: Store, key_id: str, **fields: Any) -> bool:
    """Change what a key may do, from its next request on; False where there is none, or it is revoked."""
    mine = (Key.id == key_id) & Key.revoked_s.is_(None)
    with store.writing() as connection:
        return bool(connection.execute(update(Key).where(mine).values(**fields)).rowcount)


def revoke(store: Store, key_id: str) -> bool:
    """End a key, at once and for good; False where there is none."""
    ended = func.coalesce(Key.revoked_s, time.time())
    with store.writing() as connection:
        return bool(connection.execute(update(Key).where(Key.id == key_id).values(revoked_s=ended)).rowcount)


def has_keys(store: Store) -> bool:
    """Whether any key may be used now."""
    valid = Key.revoked_s.is_(None) & (Key.expires_s.is_(None) | (Key.expires_s > time.time()))
    with store.reading() as connection:
        return connection.execute(select(Key.id).where(valid).limit(1)).first() is not None
