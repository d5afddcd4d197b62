"""Recipe of `ulm serve up`."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Self
from urllib.parse import unquote

from pydantic import AfterValidator, Field, field_validator, model_validator

from ulm.errors import ConfigError
from ulm.recipes.base import Name, Recipe, Section
from ulm.registry import configure

PATIENCE_S = 30.0
MAX_OPEN = 1_000


def _not_reserved(name: str) -> str:
    if name == "swarm":
        raise ValueError("the name swarm is the swarm's own")
    return name


MemberId = Annotated[Name, AfterValidator(_not_reserved)]
Alias = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")]
# An API's bounds, which are OpenAI's where that has the setting; an engine's are wider.
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]
OpenAIPenalty = Annotated[float, Field(ge=-2, le=2)]


class Budget(Section):
    """What one request may spend; None is no limit."""

    max_calls: int | None = Field(None, ge=1, strict=True)
    max_tokens: int | None = Field(None, ge=1, strict=True)
    max_ms: int | None = Field(None, ge=1, le=86_400_000, strict=True)


class Limits(Section):
    """What a request may ask of the swarm's strategies; those of the recipe's own keep to it, too."""

    max_top_k: int | None = Field(None, ge=1)  # members that answer together; None: all of them
    min_every_tokens: int = Field(1, ge=1)  # generated tokens between two looks at who should answer


class Defaults(Section):
    """What holds for a model where a request says nothing; None leaves OpenAI's own default."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: int | None = Field(None, ge=1)
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: OpenAIPenalty | None = None
    frequency_penalty: OpenAIPenalty | None = None
    max_tokens: int | None = Field(None, ge=1)
    stop: tuple[str, ...] | None = Field(None, max_length=4)


class Cors(Section):
    """Which pages in browsers may ask."""

    origins: tuple[str, ...] = Field(min_length=1)  # https://example.org; * for all
    max_age_s: int = Field(600, ge=0)  # so long a browser remembers

    @field_validator("origins")
    @classmethod
    def _as_browsers_send_them(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for origin in given:  # any other would never be the same as one that is sent
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\sA-Z]+", origin):
                remedy = "such as https://chat.example.org: with its scheme, without a path, in small letters"
                raise ConfigError("cors.origins", f"{origin!r} is no origin", remedy)
        return given


class Tls(Section):
    """HTTPS."""

    certificate: str  # path of a PEM file, with those between it and its root
    key: str  # path of a PEM file


class MemberSection(Section):
    """One served model."""

    checkpoint: str  # a step directory, a run or a name under models/
    engine: dict[str, Any] | None = None  # of its own, with the kind; None: the recipe's


class ServeRecipe(Recipe):
    """What `ulm serve up` needs: a swarm, or members."""

    swarm: str | None = None  # name or path
    members: dict[MemberId, MemberSection] = {}
    strategy: dict[str, Any] | None = None  # None: the swarm's own, else single
    engine: dict[str, Any] = {"kind": "local"}
    engines: dict[MemberId, dict[str, Any]] = {}  # of the swarm's members that have one of their own
    members_per_engine: int | None = Field(None, ge=1)  # engines in processes of their own; None: one in the gateway's
    budget: Budget = Budget()
    limits: Limits = Limits()
    # Members that answer, in this order, where those that should are down; None: the swarm's seed, if it serves one.
    fallback: tuple[MemberId, ...] | None = None
    patience_s: float = Field(PATIENCE_S, gt=0)  # a member that says nothing for so long is passed over
    aliases: dict[Alias, str] = {}  # further names of models: clients hard-code some
    defaults: dict[str, Defaults] = {}  # by model or alias
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65_535)
    cpus: float = Field(1.0, gt=0)  # of each engine replica; vllm engines say their own
    gpus: float = Field(0.0, ge=0)
    replicas: int = Field(1, ge=1)  # of each engine in processes of its own; vllm engines say their own
    gateways: int = Field(1, ge=1)  # replicas of the gateway
    max_open: int = Field(MAX_OPEN, ge=1)  # requests that a gateway works on at once; beyond it they are refused
    drain_s: float = Field(60.0, ge=0)  # so long what is under way may take to end, when the endpoint ends or changes

    keys: bool | None = None  # whether requests need one; None: at this machine's own addresses no, elsewhere refused
    database: str | None = None  # SQLAlchemy's URL; None: ULM_DATABASE_URL, else SQLite at the root
    counters: str | None = None  # redis://…, of requests and tokens per minute; None: ULM_COUNTERS_URL, else in memory
    cors: Cors | None = None
    tls: Tls | None = None
    request_log: str | None = None  # a path, for a line of JSON a request

    @field_validator("database", "counters")
    @classmethod
    def _no_password(cls, given: str | None, info: Any) -> str | None:
        if given is not None and re.search(r"//[^/@]*:[^@]*@|password=", unquote(given), re.I):
            variable = f"ULM_{info.field_name.upper()}_URL"
            raise ConfigError(info.field_name, "holds a password, which recipes do not", f"set {variable} instead")
        return given

    @model_validator(mode="after")
    def _keys_or_alone(self) -> Self:
        if self.keys is None and not self.is_local:
            problem = f"{self.host} can be reached from other machines, where everybody could ask"
            raise ConfigError("keys", problem, "keys: true, and ulm keys create; or keys: false for no keys at all")
        for name in ("database", "counters"):
            if getattr(self, name) is not None and not self.keys:
                raise ConfigError(name, "has no effect without keys", "keys: true, or leave it out")
        return self

    @property
    def is_local(self) -> bool:
        """Whether the address is this machine's own."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @field_validator("strategy", "engine", mode="before")
    @classmethod
    def _kind(cls, given: Any, info: Any) -> Any:
        if info.field_name == "engine" and isinstance(given, dict):
            given = {"kind": "local", **given}
        return None if given is None else configure(info.field_name, given).model_dump(exclude_unset=True)

    @model_validator(mode="after")
    def _something_to_serve(self) -> Self:
        if (self.swarm is None) == (not self.members):
            raise ValueError("give either swarm or members")
        if self.members and self.engines:
            problem = "is for the members of a swarm"
            raise ConfigError("engines", problem, "write it to the member: members: {a: {checkpoint: …, engine: {…}}}")
        for place, engine in self.own_engines().values():
            _check_engine(place, engine)
        return self

    def own_engines(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Members with an engine of their own: where the recipe says so, and what."""
        of_members = {
            name: (f"members.{name}.engine", member.engine)
            for name, member in self.members.items()
            if member.engine is not None
        }
        return of_members | {name: (f"engines.{name}", engine) for name, engine in self.engines.items()}


def _check_engine(place: str, engine: dict[str, Any]) -> None:
    """ConfigError with the full place for settings that their kind does not have."""
    try:
        configure("engine", engine)
    except ConfigError as error:
        within = error.place.removeprefix("engine")
        raise type(error)(place + within, error.problem, error.remedy) from None
