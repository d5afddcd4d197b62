"""Keys, limits per minute and quotas: exact on a virtual clock, over sequences of requests and over two gateways."""

from __future__ import annotations

import asyncio
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import limits.storage.memory
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve import accounts
from serve.accounts import LEASE_S, Accounts, counters
from serve.limits import Checks, RemoteAccounts
from serve.store import Store
from tests.databases import redis_server
from ulm.errors import (
    ConfigError,
    InvalidKeyError,
    OverloadedError,
    QuotaError,
    RateLimitError,
    RequestError,
    ScopeError,
    UnavailableError,
)

START_S = 1_800_000_000.0


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = START_S

    def time(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits.storage.memory, "time", clock)
    return clock


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path / 'state.db'}")
    yield opened
    opened.close()


@dataclass
class Owner:
    """Somebody with a key."""

    id: str
    header: str


def make(store: Store, **fields: Any) -> Owner:
    key = accounts.create(store, **{"name": "a", "scopes": ["infer"], **fields})
    return Owner(key.id, f"Bearer {key.text}")


def used(store: Store, owner: Owner) -> int:
    (found,) = accounts.listed(store, owner.id)
    return int(found["used_tokens"])


def error_of(act: Callable[[], Any]) -> RequestError | None:
    try:
        act()
    except RequestError as error:
        return error
    return None


# ---- who may


def test_a_key_is_let_in_for_its_scopes_alone(store: Store, clock: Clock) -> None:
    owner, checks = make(store, scopes=["infer", "data"], models=["e00"]), Accounts(store, now_s=clock.time)
    admitted = checks.admit(owner.header, "infer")
    assert (admitted.key_id, admitted.models, admitted.is_metered) == (owner.id, frozenset({"e00"}), False)
    assert not admitted.headers, "no limits, no headers"
    checks.admit(owner.header, "data")
    with pytest.raises(ScopeError, match="it has the scopes infer, data, and not admin"):
        checks.admit(owner.header, "admin")


def test_every_invalid_key_is_refused_in_the_same_words(store: Store, clock: Clock) -> None:
    checks = Accounts(store, now_s=clock.time)
    expired, revoked, valid = make(store, expires_s=START_S), make(store), make(store)
    accounts.revoke(store, revoked.id)
    last = "A" if valid.header[-1] != "A" else "B"
    wrong = [expired.header, revoked.header, valid.header[:-1] + last, "Bearer ulm-" + "a" * 12 + "-" + "b" * 32]
    assert len({str(error_of(lambda h=h: checks.admit(h, "infer"))) for h in wrong}) == 1  # type: ignore[misc]
    for header in wrong:
        with pytest.raises(InvalidKeyError):
            checks.admit(header, "infer")
    with pytest.raises(InvalidKeyError, match="wants an API key, in the header Authorization"):
        checks.admit(None, "infer")


def test_a_key_ends_in_the_second_in_which_it_expires(store: Store, clock: Clock) -> None:
    owner, checks = make(store, expires_s=START_S + 10), Accounts(store, now_s=clock.time)
    clock.now_s += 9.999
    checks.admit(owner.header, "infer")
    clock.now_s += 0.001
    with pytest.raises(InvalidKeyError):
        checks.admit(owner.header, "infer")


def test_what_was_revoked_is_refused_at_the_next_request(store: Store, clock: Clock, tmp_path: Path) -> None:
    owner, checks = make(store, tokens_per_minute=10), Accounts(store, now_s=clock.time)
    checks.admit(owner.header, "infer")
    elsewhere = Store.open(f"sqlite:///{tmp_path / 'state.db'}")  # as `ulm keys` in another process
    assert accounts.has_keys(elsewhere) and accounts.revoke(elsewhere, owner.id)
    assert not accounts.has_keys(elsewhere)
    elsewhere.close()
    for call in (lambda: checks.admit(owner.header, "infer"), lambda: checks.reserve(owner.id, "r", 1)):
        with pytest.raises(InvalidKeyError):
            call()


# ---- what the refusals say


def test_requests_beyond_the_limit_are_told_when_to_come_again(store: Store, clock: Clock) -> None:
    owner, checks = make(store, requests_per_minute=2), Accounts(store, now_s=clock.time)
    assert checks.admit(owner.header, "infer").headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "60.000s",
    }
    clock.now_s += 20
    checks.admit(owner.header, "infer")
    clock.now_s += 15
    with pytest.raises(RateLimitError, match="has had its 2 requests of a minute") as refused:
        checks.admit(owner.header, "infer")
    error = refused.value
    assert (error.status, error.type, error.code) == (429, "requests", "rate_limit_exceeded")
    assert error.headers["Retry-After"] == "25" and error.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now_s += 25.001  # the first is a minute old: one more
    checks.admit(owner.header, "infer")
    with pytest.raises(RateLimitError):
        checks.admit(owner.header, "infer")


def test_tokens_beyond_the_minute_or_the_quota_are_told_what_is_left(store: Store, clock: Clock) -> None:
    owner, checks = make(store, tokens_per_minute=100, quota_tokens=150), Accounts(store, now_s=clock.time)
    assert checks.reserve(owner.id, "a", 60)["x-ratelimit-remaining-tokens"] == "40"
    clock.now_s += 10
    with pytest.raises(
        RateLimitError, match="may use 50 tokens, prompt and answer, and the key has 40 of 100 left"
    ) as no:
        checks.reserve(owner.id, "b", 50)
    assert (no.value.type, no.value.headers["Retry-After"]) == ("tokens", "50")
    with pytest.raises(
        RateLimitError, match="may use 101 tokens, prompt and answer, and the key has 100 a minute"
    ) as no:
        checks.reserve(owner.id, "b", 101)
    assert no.value.headers["x-should-retry"] == "false" and "Retry-After" not in no.value.headers
    clock.now_s += 50
    with pytest.raises(
        QuotaError, match="may use 95 tokens, prompt and answer, and 90 of 150 are left of the key's"
    ) as out:
        checks.reserve(owner.id, "b", 95)
    assert (out.value.status, out.value.type, out.value.code) == (429, "insufficient_quota", "insufficient_quota")
    assert out.value.headers == {"x-should-retry": "false"}
    assert checks.reserve(owner.id, "b", 90)["x-ratelimit-remaining-tokens"] == "10", "what was refused is not counted"


# ---- exactness


class Limited(RuleBasedStateMachine):
    """A key with all limits against a plain account of the same: every decision, and what is written, agree."""

    folder = tempfile.TemporaryDirectory(prefix="ulm-")
    shared: Store | None = None

    def __init__(self) -> None:
        super().__init__()
        cls = type(self)
        cls.shared = cls.shared or Store.open(f"sqlite:///{cls.folder.name}/state.db", is_counter=True)
        self.store, self.clock = cls.shared, Clock()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(limits.storage.memory, "time", self.clock)
        self.owner = make(self.store, requests_per_minute=3, tokens_per_minute=100, quota_tokens=400)
        self.checks = Accounts(self.store, now_s=self.clock.time)
        self.requests: list[float] = []
        self.minute, self.minute_ends_s = 0, 0.0
        self.open: dict[str, list[float]] = {}  # tokens, the end of their minute, the end of their lease
        self.settled = self.late = self.number = 0

    def teardown(self) -> None:
        self.patch.undo()

    # no sum is 60 seconds to the bit, where the library's clean-up, in a thread of its own, decides either way
    @rule(seconds=st.sampled_from([0.001, 1.03, 7.11, 29.57, 59.9, 61.3, 130.7]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule()
    def admit(self) -> None:
        has_room = sum(then >= self.clock.now_s - 60 for then in self.requests) < 3
        error = error_of(lambda: self.checks.admit(self.owner.header, "infer"))
        assert (error is None) == has_room
        if has_room:
            self.requests.append(self.clock.now_s)

    @rule(tokens=st.sampled_from([0, 1, 30, 50, 60, 100, 101]))
    def reserve(self, tokens: int) -> None:
        self.number += 1
        name = f"{self.owner.id}-{self.number}"
        if self.minute_ends_s <= self.clock.now_s and tokens <= 100:
            self.minute, self.minute_ends_s = 0, self.clock.now_s + 60
        fits_minute, fits_quota = self.minute + tokens <= 100, self.used + tokens <= 400
        error = error_of(lambda: self.checks.reserve(self.owner.id, name, tokens))
        wanted = RateLimitError if not fits_minute else None if fits_quota else QuotaError
        assert (type(error) if error else None) is wanted
        if error is None:
            self.minute += tokens
            self.open[name] = [tokens, self.minute_ends_s, self.clock.now_s + LEASE_S]
            self.checks.reserve(self.owner.id, name, tokens)  # made again by Ray: it counts once

    @precondition(lambda self: self.open)
    @rule(data=st.data(), part=st.sampled_from([0.0, 0.5, 1.0]))
    def settle(self, data: Any, part: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        tokens, ends_s, _ = self.open.pop(name)
        spent = int(part * (tokens or 5))
        if ends_s == self.minute_ends_s and self.clock.now_s < ends_s:
            self.minute -= max(0, int(tokens) - spent)
        self.settled += spent
        if tokens == 0:
            self.late += spent
        self.checks.settle(name, spent)
        self.checks.settle(name, spent)

    @rule(data=st.data())
    def keep(self, data: Any) -> None:
        """A gateway speaks for some; others were of one that has ended."""
        spoken_for = data.draw(st.sets(st.sampled_from(sorted(self.open)))) if self.open else set()
        self.checks.keep(sorted(spoken_for))
        for name, reservation in self.open.items():
            if name in spoken_for:
                reservation[2] = self.clock.now_s + LEASE_S
            elif reservation[2] < self.clock.now_s:
                reservation[0] = 0

    @rule()
    def killed(self) -> None:
        """The actor begins anew: its minutes, too, and nothing that is written is lost."""
        self.checks = Accounts(self.store, now_s=self.clock.time)
        self.requests, self.minute, self.minute_ends_s = [], 0, 0.0

    @property
    def used(self) -> int:
        return self.settled + sum(int(tokens) for tokens, _, _ in self.open.values())

    @invariant()
    def what_is_written_is_what_was_used(self) -> None:
        assert used(self.store, self.owner) == self.used <= 400 + self.late


Limited.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLimited = Limited.TestCase


@pytest.mark.parametrize("storage", ["memory", "redis"])
def test_no_more_than_the_limits_get_through_two_gateways_at_once(storage: str, store: Store, tmp_path: Path) -> None:
    """With Redis the two have an actor each, as on two clusters; else they share one, which takes one at a time."""

    def both(first: Accounts, second: Accounts, lock: Any) -> None:
        owner = make(store, requests_per_minute=40, tokens_per_minute=1_000, quota_tokens=700)
        let_in: list[int] = []

        def ask(number: int) -> None:
            of = (first, second)[number % 2]
            for act in (
                lambda: of.admit(owner.header, "infer"),
                lambda: of.reserve(owner.id, f"{owner.id}{number}", 20),
            ):
                with lock:
                    if error_of(act) is not None:
                        return
            let_in.append(number)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(100)))
        assert len(let_in) == 35 and used(store, owner) == 700, "40 requests, of which the quota lets 35 reserve"
        with lock:
            for number in let_in:
                (second, first)[number % 2].settle(f"{owner.id}{number}", 5)
        assert used(store, owner) == 175
        assert isinstance(error_of(lambda: first.admit(owner.header, "infer")), RateLimitError)
        left = second.reserve(owner.id, f"{owner.id}-last", 1)["x-ratelimit-remaining-tokens"]
        assert left == str(1_000 - 175 - 1), "what was not used came back to the minute, too"

    if storage == "memory":
        one = Accounts(store)
        both(one, one, threading.Lock())
        return
    with redis_server(tmp_path) as url:
        both(Accounts(store, counters(url)), Accounts(store, counters(url)), nullcontext())


@pytest.mark.parametrize("storage", ["memory", "redis"])
def test_a_changed_limit_holds_at_the_next_request_and_counts_on(storage: str, store: Store, tmp_path: Path) -> None:
    owner = make(store, requests_per_minute=3, tokens_per_minute=100)
    elsewhere = Store.open(f"sqlite:///{tmp_path / 'state.db'}")  # as `ulm keys` in another process

    def change(**fields: Any) -> None:
        assert accounts.change(elsewhere, owner.id, **fields)

    with redis_server(tmp_path) if storage == "redis" else nullcontext() as url:
        checks = Accounts(store, counters(url))
        checks.admit(owner.header, "infer")
        checks.admit(owner.header, "infer")
        checks.reserve(owner.id, "a", 80)
        change(requests_per_minute=2, tokens_per_minute=110)
        with pytest.raises(RateLimitError, match="has had its 2 requests"):
            checks.admit(owner.header, "infer")
        with pytest.raises(RateLimitError, match="the key has 30 of 110 left in this minute"):
            checks.reserve(owner.id, "b", 31)
        checks.reserve(owner.id, "b", 30)
        checks.settle("a", 10)
        assert checks.reserve(owner.id, "c", 69)["x-ratelimit-remaining-tokens"] == "1", "it came back to its minute"
        change(requests_per_minute=4, quota_tokens=100)
        assert checks.admit(owner.header, "infer").headers["x-ratelimit-remaining-requests"] == "1"
        with pytest.raises(QuotaError):
            checks.reserve(owner.id, "d", 1)
        change(requests_per_minute=None, tokens_per_minute=None, quota_tokens=None, models=["e00"], scopes=["admin"])
        admitted = checks.admit(owner.header, "admin")
        assert (admitted.headers, admitted.models, admitted.is_metered) == ({}, frozenset({"e00"}), False)
        checks.settle("b", 1)
        checks.settle("c", 2)
        assert used(store, owner) == 13
        change(expires_s=1.0)
        with pytest.raises(InvalidKeyError):
            checks.admit(owner.header, "admin")
    accounts.revoke(elsewhere, owner.id)
    assert not accounts.change(elsewhere, owner.id, expires_s=None)
    elsewhere.close()


def test_a_refusal_crosses_processes_with_all_that_it_says(store: Store, clock: Clock) -> None:
    owner, checks = make(store, requests_per_minute=1), Accounts(store, now_s=clock.time)
    checks.admit(owner.header, "infer")
    errors = [error_of(lambda scope=scope: checks.admit(owner.header, scope)) for scope in ("infer", "admin")]  # type: ignore[misc]
    errors += [QuotaError("q", param="p"), OverloadedError("o", code="c", retry_after_s=7.0), InvalidKeyError("k")]
    for error in errors:
        assert error is not None
        there = pickle.loads(pickle.dumps(error))
        assert (type(there), str(there), vars(there)) == (type(error), str(error), vars(error))
        assert (there.headers, there.type, there.args) == (error.headers, error.type, error.args)
    assert [error and error.key_id for error in errors] == [owner.id, owner.id, None, None, None]


def test_limits_counted_in_redis_outlast_the_actor(store: Store, tmp_path: Path) -> None:
    owner = make(store, requests_per_minute=2, tokens_per_minute=100)
    with redis_server(tmp_path) as url:
        first = Accounts(store, counters(url))
        first.admit(owner.header, "infer")
        first.reserve(owner.id, "r", 80)
        again = Accounts(store, counters(url))
        again.admit(owner.header, "infer")
        with pytest.raises(RateLimitError, match="has had its 2 requests"):
            again.admit(owner.header, "infer")
        with pytest.raises(RateLimitError, match="the key has 20 of 100 left in this minute"):
            again.reserve(owner.id, "s", 21)
        again.settle("r", 30)
        again.reserve(owner.id, "s", 70)


def test_counters_are_redis_or_nothing() -> None:
    with pytest.raises(ConfigError, match="counters: is not Redis's URL") as error:
        counters("mongodb://a:geheim@b")
    assert "geheim" not in str(error.value)


def test_what_an_ended_actor_had_counted_is_not_given_back_to_the_next_ones_minute(store: Store, clock: Clock) -> None:
    owner = make(store, tokens_per_minute=100)
    Accounts(store, now_s=clock.time).reserve(owner.id, "of the first", 80)
    clock.now_s += 1
    second = Accounts(store, now_s=clock.time)
    second.reserve(owner.id, "of the second", 60)
    second.settle("of the first", 0)
    with pytest.raises(RateLimitError, match="the key has 40 of 100 left"):
        second.reserve(owner.id, "too much", 41)


def test_state_that_is_away_is_no_answer_and_is_opened_once_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "disk"
    place.write_text("not mounted")
    checks = Checks(f"sqlite:///{place / 'state.db'}", None)
    assert [checks.ask("admit", None, "infer") for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1 and "disk" in caplog.text, "said once"
    place.unlink()
    assert isinstance(checks.ask("admit", None, "infer"), InvalidKeyError)
    opened = Store.open(f"sqlite:///{place / 'state.db'}")
    owner = make(opened)
    opened.close()
    (admitted,) = checks.ask("admit", owner.header, "infer")
    assert admitted.key_id == owner.id


def test_while_redis_is_away_there_is_no_answer_either(store: Store, tmp_path: Path) -> None:
    owner = make(store, requests_per_minute=2)
    url = f"sqlite:///{tmp_path / 'state.db'}"
    with redis_server(tmp_path) as counted:
        checks = Checks(url, counted)
        assert checks.ask("admit", owner.header, "infer")[0].key_id == owner.id
    assert checks.ask("admit", owner.header, "infer") is None


class Lost(RemoteAccounts):
    """The accounts in this process, where the answer to `reserve` gets lost on its way."""

    def __init__(self, checks: Accounts, lost: BaseException) -> None:
        super().__init__("nobody")
        self._checks, self._lost = checks, lost

    async def _ask(self, method: str, *arguments: Any) -> Any:
        answer = getattr(self._checks, method)(*arguments)
        if method == "reserve":
            raise self._lost
        return answer


@pytest.mark.parametrize("lost", [UnavailableError("gone"), asyncio.CancelledError()])
def test_a_reservation_whose_answer_was_lost_is_given_back_at_once(
    lost: BaseException, store: Store, clock: Clock
) -> None:
    owner, checks = make(store, tokens_per_minute=100, quota_tokens=100), Accounts(store, now_s=clock.time)

    async def reserve() -> None:
        with pytest.raises(type(lost)):
            await Lost(checks, lost).reserve(owner.id, 80)
        assert used(store, owner) == 80
        await asyncio.sleep(0.05)

    asyncio.run(reserve())
    assert used(store, owner) == 0
    assert checks.reserve(owner.id, "next", 100)["x-ratelimit-remaining-tokens"] == "0"


def test_what_is_no_key_is_refused_without_asking_the_actor() -> None:
    """There is none in this test, and a flood of them would be everybody's wait."""
    for given in (None, "", "Bearer none", "Basic a"):
        with pytest.raises(InvalidKeyError, match="Authorization: Bearer ulm-…"):
            asyncio.run(RemoteAccounts("nobody").admit(given, "infer"))
