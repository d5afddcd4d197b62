"""Recipe of `ulm serve up`."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from ulm.recipes.base import Name, Recipe, Section
from ulm.registry import configure


def _not_reserved(name: str) -> str:
    if name == "swarm":
        raise ValueError("the name swarm is the swarm's own")
    return name


MemberId = Annotated[Name, AfterValidator(_not_reserved)]


class Budget(Section):
    """What one request may spend; None is no limit."""

    max_calls: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_ms: int | None = Field(None, ge=1, le=86_400_000)


class MemberSection(Section):
    """One served model."""

    checkpoint: str  # a step directory, a run or a name under models/


class ServeRecipe(Recipe):
    """What `ulm serve up` needs: a swarm, or members."""

    swarm: str | None = None  # name or path
    members: dict[MemberId, MemberSection] = {}
    strategy: dict[str, Any] | None = None  # None: the swarm's own, else single
    engine: dict[str, Any] = {"kind": "local"}
    members_per_engine: int | None = Field(None, ge=1)  # engines in processes of their own; None: one in the gateway's
    budget: Budget = Budget()
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65_535)
    cpus: float = Field(1.0, gt=0)  # of each engine replica
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
        return self
