"""Recipe of `ulm serve up`."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from ulm.errors import ConfigError
from ulm.recipes.base import Name, Recipe, Section
from ulm.registry import configure

PATIENCE_S = 30.0


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
