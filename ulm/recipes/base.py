"""The root of all recipe types, and the loader: YAML file + overrides -> a validated, frozen recipe."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError

from ulm import artefacts
from ulm.errors import ConfigError
from ulm.registry import config_error

ID_PATTERN = r"[a-z0-9][a-z0-9._-]*"


def _whole(name: str) -> str:
    if name.endswith(artefacts.PARTIAL):  # which listings and `ulm gc` pass over
        raise ValueError(f"names of unfinished artefacts end in {artefacts.PARTIAL}")
    return name


Name = Annotated[str, StringConstraints(pattern=rf"^{ID_PATTERN}$", max_length=120), AfterValidator(_whole)]


def checked_name(text: str, place: str = "name") -> str:
    """A text that may name an artefact, as it is; ConfigError for any other."""
    try:
        return TypeAdapter(Name).validate_python(text)
    except ValidationError:
        remedy = f"letters, digits, . _ and - as in {ID_PATTERN}, 120 at most"
        raise ConfigError(place, f"{reprlib.repr(text)} is no name", remedy) from None


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Recipe(Section):
    """A whole recipe. `name` (else the file's stem) names what the job makes."""

    name: Name


R = TypeVar("R", bound=Recipe)
# PyYAML lets Python's own errors through: a date that does not exist, a tag with a wrong value, deep nesting.
NOT_YAML = (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, RecursionError)


def _first_problem(error: Exception) -> str:
    """What is wrong, and in which line, without PyYAML's picture of it."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if problem is None:
        return str(error) or type(error).__name__
    return f"{problem} in line {mark.line + 1}" if mark is not None else str(problem)


def load(recipe: type[R], path: Path | None, overrides: Sequence[str] = ()) -> R:
    """A recipe from a YAML file, with `a.b=value` overrides (values are YAML). Every mistake is a ConfigError."""
    fields: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(str(path), "no such recipe", "the path of a YAML file") from None
        except (OSError, UnicodeDecodeError) as error:  # before NOT_YAML, of which UnicodeDecodeError is one
            raise ConfigError(str(path), f"not readable: {error}") from None
        except NOT_YAML as error:
            raise ConfigError(str(path), f"not YAML: {_first_problem(error)}") from None
        if not isinstance(loaded, dict):
            raise ConfigError(str(path), "a recipe is a mapping of keys to values")
        fields = loaded
        fields.setdefault("name", re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-._") or "recipe")
    for override in overrides:
        _set(fields, override)
    return validate(recipe, fields)


def validate(recipe: type[R], fields: dict[str, Any]) -> R:
    """A recipe from plain values, as a program or a job's payload has them."""
    _check_texts(fields)
    try:
        return recipe(**fields)
    except ValidationError as error:
        raise config_error(error, recipe) from None
    except TypeError as error:  # a key that is no string
        raise ConfigError("recipe", str(error)) from None


def _check_texts(fields: dict[str, Any]) -> None:
    """ConfigError for a text, at any depth, that no artefact could hold: one with half a character (a surrogate)."""
    waiting: list[tuple[list[str], Any]] = [([], fields)]
    seen: set[int] = set()  # anchors give values many places, even one within itself
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                problem = f"{reprlib.repr(value)} holds a lone surrogate, which no file can"
                raise ConfigError(".".join(place) or "recipe", problem) from None
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in entries:
                waiting += [([*place, str(key)], inner), (place, key)]  # the key first, for it is in the place


def _set(fields: dict[str, Any], override: str) -> None:
    place, equals, text = override.partition("=")
    keys = place.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}", "is not a.b=value", "for example --set train.steps=30")
    try:
        value = yaml.safe_load(text) if text else None
    except NOT_YAML as error:
        raise ConfigError(
            f"--set {place}", f"{reprlib.repr(text)} is not a YAML value: {_first_problem(error)}"
        ) from None
    inner = fields
    for key in keys[:-1]:
        following = inner.setdefault(key, {})
        if not isinstance(following, dict):
            following = inner[key] = {}
        inner = following
    inner[keys[-1]] = value


def resolve_path(text: str, *, near: Path | None, root: Path, place: str = "path") -> Path:
    """A path in a recipe: relative to the recipe, then looked up in the root. ConfigError where there can be none."""
    try:
        artefacts.check_path(text, place)
        path = Path(text).expanduser()
        if path.is_absolute():
            return path
        candidates = ([near / path] if near else [Path.cwd() / path]) + [root / path]
        return next((c for c in candidates if c.exists()), candidates[0])
    except (RuntimeError, OSError, ValueError) as error:  # no such user; too long beside the recipe; half a character
        reason = error.strerror if isinstance(error, OSError) else error
        problem = f"{reprlib.repr(text)} cannot be a path or a name: {reason}"
        raise ConfigError(place, problem) from None
