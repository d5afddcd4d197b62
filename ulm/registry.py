"""Kinds by name: the folder is the registry.

`find("attention", "gqa")` imports `ulm.components.attention.gqa` on first use and returns its registered class. A
new kind is one new file; nothing else is edited. `module:Class` names a class outside the tree, in recipes only.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import reprlib
from collections.abc import Callable
from importlib import util
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ulm.errors import ConfigError, UnknownKindError, did_you_mean

# Where the kinds of a slot live. `serve` is named here, never imported: only find() reaches it, by name.
PACKAGES = {
    **{
        slot: f"ulm.components.{slot}"
        for slot in (
            *("embedding", "position", "attention", "feedforward", "norm", "head"),
            *("mask", "optimizer", "schedule"),
        )
    },
    "model": "ulm.models",
    "architecture": "ulm.exchange.architectures",
    "engine": "serve.engines",
    "strategy": "serve.strategies",
}
C = TypeVar("C", bound=type)


class KindConfig(BaseModel):
    """What one kind alone can vary. Subclasses add fields with defaults; `kind` names the file they live in."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: str

    def check(self, spec: Any) -> None:
        """ConfigError where the kind cannot be part of this ModelSpec; by itself any goes with any."""


def register(slot: str, config: type[KindConfig]) -> Callable[[C], C]:
    """Class decorator: this class implements a kind of `slot`, named after its file, configured by `config`."""

    def tie(cls: C) -> C:
        cls.slot, cls.Config = slot, config  # type: ignore[attr-defined]
        return cls

    return tie


def kinds(slot: str) -> list[str]:
    """Names of every implementation in a slot, from its folder; empty while the slot has none."""
    if slot not in PACKAGES:
        raise UnknownKindError("slot", f"no slot {slot!r}", did_you_mean(slot, PACKAGES))
    if util.find_spec(PACKAGES[slot].partition(".")[0]) is None or util.find_spec(PACKAGES[slot]) is None:
        return []
    package = importlib.import_module(PACKAGES[slot])
    return sorted(
        info.name
        for info in pkgutil.iter_modules(package.__path__)
        if not info.name.startswith("_") and _registered(f"{PACKAGES[slot]}.{info.name}", slot)
    )


def _registered(module: str, slot: str) -> type | None:
    imported = importlib.import_module(module)
    classes = [v for v in vars(imported).values() if isinstance(v, type) and v.__module__.startswith(module)]
    return next((cls for cls in classes if getattr(cls, "slot", None) == slot), None)


def find(slot: str, kind: str) -> Any:
    """The class that implements `kind` in `slot`; UnknownKindError with a guess when there is none."""
    if ":" in kind:
        return _outside(slot, *kind.split(":", 1))
    if kind.isidentifier() and not kind.startswith("_"):
        module = f"{PACKAGES[slot]}.{kind}"
        if util.find_spec(module) is not None and (cls := _registered(module, slot)) is not None:
            return cls
    raise UnknownKindError(f"{slot}.kind", f"no kind {kind!r}", did_you_mean(kind, kinds(slot)))


def _outside(slot: str, module: str, name: str) -> type:
    place, remedy = f"{slot}.kind", "module:Class, of a class that is registered for this slot"
    if not all(part.isidentifier() for part in module.split(".")):
        raise UnknownKindError(place, f"{module!r} is no module's name", remedy)
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnknownKindError(place, f"no module {error.name!r}", remedy) from None
    cls = getattr(imported, name, None)
    if not isinstance(cls, type):
        raise UnknownKindError(place, f"no class {name!r} in {module!r}", remedy)
    if getattr(cls, "slot", None) != slot:
        raise UnknownKindError(place, f"{name!r} is not registered as a kind of {slot}", remedy)
    return cls


def configure(slot: str, given: Any) -> KindConfig:
    """A validated config from what a recipe says: a name, a mapping with `kind`, or a config already."""
    if isinstance(given, KindConfig):
        return given
    if isinstance(given, str):
        given = {"kind": given}
    if not isinstance(given, dict) or not isinstance(given.get("kind"), str):
        raise ConfigError(
            slot, f"{reprlib.repr(given)} names no kind", f"for example {{kind: {(kinds(slot) or ['?'])[0]}}}"
        )
    config: type[KindConfig] = find(slot, given["kind"]).Config
    try:
        return config(**given)
    except ValidationError as error:
        raise config_error(error, config, slot) from None


def config_error(error: ValidationError, model: type[BaseModel], place: str = "") -> ConfigError:
    """The first problem of a pydantic error as ours: the place, the value, and a guess for an unknown key."""
    # a misspelled key is both unknown and missing; the first says more
    first = min(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    # of a union pydantic names the member too, as in tokenizer.function-after[…].kind: no key of the user's
    path = [str(part) for part in first["loc"] if not re.search(r"[\[(]", str(part))]
    where = ".".join(([place] if place else []) + path) or "recipe"
    if first["type"] == "extra_forbidden":
        fields = _fields_at(model, path[:-1])
        return ConfigError(where, "unknown key", did_you_mean(path[-1], fields) if fields else "")
    if first["type"] == "missing":
        return ConfigError(where, "is missing")
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(where, f"{reprlib.repr(first['input'])}: {message}")  # anchors make small files huge


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the model that a path of keys leads to; all names of the root when it leaves the typed part."""
    current: Any = model
    for part in path:
        if part.isdigit():
            continue
        field = current.model_fields.get(part)
        if field is None:
            continue  # a mapping's own key
        inner = _models_in(field.annotation)
        if not inner:
            return []
        current = inner[0]
    return list(current.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _models_in(inner)]
