"""What an endpoint with keys makes of hostile requests and guessed keys, with honest clients of two beside them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import aiohttp

from serve import accounts
from serve.keys import new_key
from serve.store import Store
from tests.benchmarks._figures import report
from tests.hostile import Answer, hostile
from tests.load import session
from ulm import runtime

BODY: dict[str, Any] = {"max_tokens": 8}
EACH = 1 + 6 + 8  # tokens of an answer: a prompt of six letters, and what begins it
# A limited key asks STORY times, soon enough for a minute: every tenth time for a model that it may not use. Its quota
# is for so many answers, fewer than its requests, and those beyond PER_MINUTE are refused as such.
PER_MINUTE, ANSWERS, STORY, FORBIDDEN_EVERY = 40, 25, 50, 10
SETTLED_S, PAUSE_S = 10.0, 0.02
GROWTH_FROM = 0.1  # of the hostile requests come before memory is first looked at


@dataclass
class Told:
    """What the requests of one key were answered."""

    answers: int = 0
    tokens: int = 0
    requests: int = 0
    wrong: list[str] = field(default_factory=list)  # not what this key, asked alone, would have been told


Headers = Mapping[str, str]
Client = Callable[[aiohttp.ClientSession, Told, int], Coroutine[Any, Any, None]]


class Keyed:
    """Keys of an endpoint at a URL, and its clients."""

    def __init__(self, url: str, store: Store) -> None:
        self.url, self.store = url, store
        self.limited_ids: list[str] = []
        self.free_id, self.free = self._key()
        self.hostile = self._key()[1]
        self.guesses = cycle(self._guesses())

    def _key(self, **fields: Any) -> tuple[str, dict[str, str]]:
        made = accounts.create(self.store, name="a", scopes=["infer"], **fields)
        return made.id, {"Authorization": f"Bearer {made.text}"}

    def _limited_key(self) -> dict[str, str]:
        limits = {"models": ["a"], "requests_per_minute": PER_MINUTE, "quota_tokens": ANSWERS * EACH + EACH - 1}
        key_id, headers = self._key(**limits)
        self.limited_ids.append(key_id)
        return headers

    def used(self, key_ids: Iterable[str]) -> int:
        """Tokens that are written down for these."""
        return sum(int(accounts.listed(self.store, key_id)[0]["used_tokens"]) for key_id in key_ids)

    def _guesses(self) -> Iterator[dict[str, str]]:
        """Keys that never were, those of others with a letter changed, and those that have ended."""
        for headers in (self._key(models=["a"], requests_per_minute=PER_MINUTE)[1], self.free):
            said = headers["Authorization"]
            yield {"Authorization": said[:-1] + ("A" if said[-1] != "A" else "B")}
            yield {"Authorization": said.rpartition("-")[0] + "-" + new_key().text.rpartition("-")[2]}
        yield from ({"Authorization": f"Bearer {new_key().text}"} for _ in range(20))
        yield self._key(revoked_s=0.0)[1]
        yield self._key(expires_s=1.0)[1]

    # ---- clients, each of which asks one request after the other

    async def ask_free(self, asking: aiohttp.ClientSession, told: Told, number: int) -> None:
        """All is answered, whatever the others do, and without a word of limits."""
        prompt = f"f{number:05d}"
        said = await self._completion(asking, self.free, "ab"[number % 2], prompt, stream=number % 3 == 0)
        if said.what != (200, None, None) or said.text != (prompt * 2)[:8] or said.tokens != EACH:
            told.wrong.append(f"free: {said}")
        told.answers, told.tokens = told.answers + (said.status == 200), told.tokens + said.tokens

    def ask_limited(self, letter: str) -> Client:
        """A client with the same limits as others have, for whom they hold exactly, as if nobody else were there."""
        headers: dict[str, str] = {}

        async def ask(asking: aiohttp.ClientSession, told: Told, place: int) -> None:
            nonlocal headers
            number, prompt = place % STORY, f"{letter}{place:05d}"
            if number == 0:
                headers = self._limited_key()
            model = "b" if number % FORBIDDEN_EVERY == FORBIDDEN_EVERY - 1 else "a"
            said = await self._completion(asking, headers, model, prompt, stream=number % 3 == 0)
            left = str(max(0, PER_MINUTE - 1 - number))
            expected: tuple[int, str | None, str | None] = (200, None, left)
            if number >= PER_MINUTE:
                expected = (429, "rate_limit_exceeded", left)
            elif model == "b":
                expected = (404, "model_not_found", left)
            elif number - number // FORBIDDEN_EVERY >= ANSWERS:
                expected = (429, "insufficient_quota", left)
            is_ours = said.status != 200 or (said.text == (prompt * 2)[:8] and said.tokens == EACH)
            if said.what != expected or not is_ours:
                told.wrong.append(f"limited, request {number}: {said}, and not {expected}")
            told.answers, told.tokens = told.answers + (said.status == 200), told.tokens + said.tokens

        return ask

    async def guess(self, asking: aiohttp.ClientSession, told: Told, number: int) -> None:
        """Nobody gets in, or is told whose key it nearly was."""
        said = await self._completion(asking, next(self.guesses), "a", "abcdef", stream=False)
        if said.what != (401, "invalid_api_key", None) or said.message != accounts.UNKNOWN_KEY:
            told.wrong.append(f"guess: {said}")

    async def _completion(
        self, asking: aiohttp.ClientSession, headers: Headers, model: str, prompt: str, *, stream: bool
    ) -> _Said:
        body = {**BODY, "model": model, "prompt": prompt, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        async with asking.post(f"{self.url}/completions", json=body, headers=headers) as response:
            text = await response.text()
            remaining = response.headers.get("x-ratelimit-remaining-requests")
            events = [text]
            if response.status == 200 and stream:
                events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
        found = [json.loads(event) for event in events]
        error = next((one["error"] for one in found if "error" in one), {})
        return _Said(
            response.status,
            error.get("code"),
            remaining,
            "".join(choice["text"] for one in found for choice in one.get("choices", ())),
            sum((one.get("usage") or {}).get("total_tokens", 0) for one in found),
            error.get("message"),
        )


@dataclass(frozen=True)
class _Said:
    """One answer."""

    status: int
    code: str | None
    remaining: str | None  # of the key's requests of this minute
    text: str
    tokens: int
    message: str | None

    @property
    def what(self) -> tuple[int, str | None, str | None]:
        return self.status, self.code, self.remaining


@dataclass
class Attack:
    """What came of an attack, and of the others meanwhile."""

    answers: list[Answer]
    free: Told
    guessed: Told
    limited: list[Told]
    limit: int = 0  # answers that the limited keys had between them
    use_off: int = 0  # tokens that are written down too many or too few
    memory: tuple[int, int] = (1, 1)  # bytes before and after
    seconds: float = 0.0


async def _side_by_side(keyed: Keyed, number: int) -> Attack:
    """So many hostile requests, and what the others were told meanwhile."""
    done, free, guessed, limited = asyncio.Event(), Told(), Told(), {"l": Told(), "m": Told()}

    async def client(ask: Client, told: Told, whole: int = 1) -> None:
        async with session() as asking:
            while not told.requests or told.requests % whole or not done.is_set():
                told.requests += 1
                try:
                    await ask(asking, told, told.requests - 1)
                except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                    told.wrong.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(PAUSE_S)

    beside = [client(keyed.ask_free, free), client(keyed.guess, guessed)]
    beside += [client(keyed.ask_limited(letter), limited[letter], STORY) for letter in limited]
    others = [asyncio.create_task(other) for other in beside]
    answers = await asyncio.to_thread(hostile, keyed.url, number, 2, keyed.hostile)
    done.set()
    await asyncio.gather(*others)
    return Attack(answers, free, guessed, list(limited.values()))


def _memory_bytes() -> int:
    """Of all processes but this one, which sends bodies of 4 MB itself."""
    return runtime.tree_rss_bytes() - runtime.rss_bytes()


def attack(url: str, store: Store, number: int) -> Attack:
    """So many hostile requests to an endpoint whose keys are in this store."""
    keyed = Keyed(url, store)
    hostile(url, int(GROWTH_FROM * number), 1, keyed.hostile)
    before, started_s = _memory_bytes(), time.monotonic()
    seen = asyncio.run(_side_by_side(keyed, number))
    seen.seconds, seen.memory = time.monotonic() - started_s, (before, _memory_bytes())
    seen.limit, deadline_s = ANSWERS * len(keyed.limited_ids), time.monotonic() + SETTLED_S
    seen.use_off = 1
    while seen.use_off and time.monotonic() < deadline_s:  # the use of a key without limits is told afterwards
        time.sleep(0.1)
        seen.use_off = abs(keyed.used([keyed.free_id]) - seen.free.tokens)
        seen.use_off += abs(keyed.used(keyed.limited_ids) - sum(told.tokens for told in seen.limited))
    return seen


def report_attack(seen: Attack) -> None:
    """Its figures."""
    free, limited, guessed, (before, after) = seen.free, seen.limited, seen.guessed, seen.memory
    num_asked, answers, tokens = (sum(getattr(t, name) for t in limited) for name in ("requests", "answers", "tokens"))
    failed = [answer for answer in seen.answers if answer.status in (500, 502, 504)]
    note = f"of {len(seen.answers)} hostile requests in {seen.seconds:.0f} s"
    _report("failed", len(failed), f"{note}; {failed[:1] or ''}")
    _report("hanging", sum(answer.status == "hangs" for answer in seen.answers), note)
    note = f"of {guessed.requests}; {' '.join(guessed.wrong[:1])[:300]}"
    _report("guesses_not_refused", len(guessed.wrong), note)
    wrong = [problem for told in (free, *limited) for problem in told.wrong]
    note = f"of {free.requests} answers to a free key and {num_asked} to limited ones; {' '.join(wrong[:1])[:300]}"
    _report("leaks", len(wrong), note)
    _report("answers_off_limit", abs(answers - seen.limit), f"{answers} of {seen.limit} answers")
    _report("use_off_answers", seen.use_off, f"of {free.tokens} and {tokens}", unit="tokens")
    note = f"{before / 1e6:.0f} MB before"
    report("endpoint_hostile_memory_growth", [after / before - 1], "of all", goal="<= 0.05", note=note)


def _report(figure: str, value: float, note: str, unit: str = "requests") -> None:
    report(f"endpoint_hostile_{figure}", [float(value)], unit, goal="<= 0", note=note)
