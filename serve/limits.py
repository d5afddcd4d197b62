"""The accounts as one Ray actor for all gateways: limits are exact over them, a revoked key is so on all at once."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from limits.errors import StorageError
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from sqlalchemy.exc import SQLAlchemyError

from serve.accounts import LEASE_S, Accounts, Admitted, counters, state_of
from serve.keys import parse
from serve.plan import Plan
from serve.store import Store, checked_url
from ulm import runtime
from ulm.errors import RequestError, UlmError, UnavailableError
from ulm.recipes.serve import ServeRecipe

NAMESPACE = "ulm"
PATIENCE_S = 2.0  # for an answer, while the actor is started again, too
KEEP_EVERY_S = LEASE_S / 4
logger = logging.getLogger(__name__)


class Checks:
    """What runs in the actor: Accounts, one call after the other. What is refused is returned: Ray would wrap it."""

    def __init__(self, database: str, counters_url: str | None) -> None:
        self._urls = database, counters_url
        self._accounts: Accounts | None = None  # made at the first call: Ray gives up on an actor that cannot be made
        self._is_well = True

    def ask(self, method: str, *arguments: Any) -> Any:
        """A method of Accounts, in a tuple; the RequestError that it raised; None where the state cannot be reached."""
        try:
            if self._accounts is None:
                database, counters_url = self._urls
                self._accounts = Accounts(Store.open(database, is_counter=True), counters(counters_url))
            answer = (getattr(self._accounts, method)(*arguments),)
            self._is_well = True
        except RequestError as error:
            return error
        except (SQLAlchemyError, StorageError, UlmError) as error:
            if self._is_well:  # said once an outage, and without what stood in the statement
                why = error if isinstance(error, UlmError) else type(error).__name__
                logger.error("keys can not be checked: %s", why)
            self._is_well = False
            return None
        return answer


AccountsActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_pending_calls=10_000)(Checks)


def start(database: str, counters_url: str | None) -> str:
    """Start the actor, unless one for the same state runs; its name."""
    url = checked_url(database)
    here = ray.get_runtime_context().get_node_id()
    placed = NodeAffinitySchedulingStrategy(here, soft=url.drivername != "sqlite")  # where SQLite's file is
    known_by = url.render_as_string(hide_password=True).encode()
    name = f"accounts-{hashlib.sha256(known_by).hexdigest()[:12]}"
    AccountsActor.options(
        name=name, namespace=NAMESPACE, get_if_exists=True, lifetime="detached", scheduling_strategy=placed
    ).remote(database, counters_url)
    return name


def with_accounts(plan: Plan, recipe: ServeRecipe) -> Plan:
    """A plan with the name of its accounts, which are started here; without keys it has none."""
    if not recipe.keys:
        return replace(plan, accounts=None)
    return replace(plan, accounts=start(*state_of(recipe, runtime.root())))


def stop() -> None:
    """End the actors of this cluster; what they had acknowledged is in the database."""
    for found in ray.util.list_named_actors(all_namespaces=True):
        if found["namespace"] == NAMESPACE and found["name"].startswith("accounts-"):
            ray.kill(ray.get_actor(found["name"], NAMESPACE))


class RemoteAccounts:
    """What a gateway asks of the actor. UnavailableError where there is no answer: nobody gets through unchecked."""

    def __init__(self, name: str, patience_s: float = PATIENCE_S) -> None:
        self._name, self._patience_s = name, patience_s
        self._actor: Any = None
        self._open: set[str] = set()
        self._keeping: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[Any]] = set()

    async def admit(self, authorization: str | None, scope: str) -> Admitted:
        """See Accounts, which are not asked about what is no key."""
        parse(authorization)
        admitted: Admitted = await self._ask("admit", authorization, scope)
        return admitted

    async def reserve(self, key_id: str, tokens: int) -> tuple[str, dict[str, str]]:
        """A reservation, and headers; `settle` must follow."""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep())
        reservation = uuid.uuid4().hex
        self._open.add(reservation)
        try:
            headers: dict[str, str] = await self._ask("reserve", key_id, reservation, tokens)
        except BaseException as error:
            if isinstance(error, RequestError) and not isinstance(error, UnavailableError):
                self._open.discard(reservation)
            else:  # the actor may have made it all the same, and its answer was lost
                self.later(reservation, key_id, 0)
            raise
        return reservation, headers

    async def settle(self, reservation: str, used: int) -> None:
        """See Accounts."""
        await self._ask("settle", reservation, used)
        self._open.discard(reservation)

    def later(self, reservation: str | None, key_id: str, used: int) -> None:
        """What a request did use, not waited for: of its reservation until it is told, else as a note."""
        call = self._note(key_id, used) if reservation is None else self._settle(reservation, used)
        task = asyncio.create_task(call)
        self._telling.add(task)  # the loop itself keeps weak references
        task.add_done_callback(self._telling.discard)

    async def _note(self, key_id: str, used: int) -> None:
        try:
            await self._ask("note", key_id, used)
        except RequestError as error:
            logger.warning("the use of a key without limits was not told: %s", error)

    async def _settle(self, reservation: str, used: int) -> None:
        while True:  # meanwhile it stays reserved, and `keep` speaks for it
            try:
                return await self.settle(reservation, used)
            except UnavailableError:
                await asyncio.sleep(1.0)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(self._patience_s):
                if self._actor is None:
                    self._actor = await asyncio.to_thread(ray.get_actor, self._name, NAMESPACE)
                answer = await self._actor.ask.remote(method, *arguments)
        except (TimeoutError, RayError, ValueError):  # ValueError: no actor of that name, yet
            self._actor, answer = None, None
        if isinstance(answer, RequestError):
            raise answer
        if answer is None:
            raise UnavailableError("Keys can not be checked just now; ask again in a moment")
        return answer[0]

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(KEEP_EVERY_S)
            with suppress(UnavailableError):
                await self._ask("keep", list(self._open))
