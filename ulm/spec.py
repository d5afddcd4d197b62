"""What a model is: sizes and one kind per slot. The spec in a checkpoint is enough to build its model again."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from ulm import dial, registry
from ulm.errors import ConfigError, did_you_mean
from ulm.registry import KindConfig

PRESETS = Path(__file__).parent / "models" / "presets"
DEFAULT_PRESET = "llama-like"
DEFAULT_VOCAB_SIZE = 8_192
SLOTS = ("embedding", "position", "attention", "feedforward", "norm", "head")
HEAD_DIMS = (32, 64, 80, 96, 112, 128)  # vLLM's CPU attention kernel knows few others


class ModelSpec(BaseModel):
    """Sizes and kinds of one model. Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "decoder"  # a file in ulm/models
    vocab_size: int = Field(DEFAULT_VOCAB_SIZE, ge=2, le=2**24)  # the tokenizer's true size
    context_tokens: int = Field(256, ge=2, le=2**24)  # the longest text it is trained and served on
    d_model: int = Field(ge=8, le=2**17)
    num_layers: int = Field(ge=1, le=10_000)
    embedding: SerializeAsAny[KindConfig]
    position: SerializeAsAny[KindConfig]
    attention: SerializeAsAny[KindConfig]
    feedforward: SerializeAsAny[KindConfig]
    norm: SerializeAsAny[KindConfig]
    head: SerializeAsAny[KindConfig]

    @field_validator(*SLOTS, mode="before")
    @classmethod
    def _configure(cls, given: Any, info: Any) -> KindConfig:
        return registry.configure(info.field_name, given)

    @field_validator("position")
    @classmethod
    def _settle_table(cls, position: KindConfig, info: Any) -> KindConfig:
        """A table of positions is as long as the context that it was made for, also under a shorter one later."""
        if getattr(position, "max_tokens", 0) is None and "context_tokens" in info.data:
            return position.model_copy(update={"max_tokens": info.data["context_tokens"]})
        return position

    @model_validator(mode="after")
    def _fits(self) -> Self:
        registry.find("model", self.model)
        if self.head_dim not in HEAD_DIMS:
            raise ConfigError("attention.num_heads", f"head_dim is {self.head_dim}", f"one of {HEAD_DIMS}")
        if self.max_positions is not None and self.context_tokens > self.max_positions:
            problem = f"{self.max_positions} positions, and a context of {self.context_tokens} tokens"
            raise ConfigError("position.max_tokens", problem, "as many as context_tokens, or leave it out")
        return self

    @property
    def max_positions(self) -> int | None:
        """The longest context that its kind of position can have; None where there is no end."""
        longest: int | None = getattr(self.position, "max_tokens", None)
        return longest

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        given: int | None = getattr(self.attention, "head_dim", None)
        return given or self.d_model // getattr(self.attention, "num_heads", 1)

    @classmethod
    def parse(cls, given: Any, *, vocab_size: int | None = None, context_tokens: int | None = None) -> ModelSpec:
        """The spec that the `model:` section of a recipe means: a size, `{preset, size, …}`, or all fields.

        A size is a name (nano) or a number of parameters (25M), which ulm/dial.py makes a shape of, at the
        vocabulary that the model will have. `vocab_size` comes from the tokenizer, `context_tokens` from the training
        section; a value in the section wins.
        """
        preset, size, fields = _chosen(given)
        for name, value in (("vocab_size", vocab_size), ("context_tokens", context_tokens)):
            if value is not None:
                fields.setdefault(name, value)
        if preset is None:
            return cls._validated(fields)

        def laid_over(base: dict[str, Any]) -> ModelSpec:
            return cls._validated(_overlay(_overlay(preset["spec"], base), fields))

        if isinstance(size, str):
            return laid_over(preset["sizes"][size]["spec"])
        return dial.fitted(size, laid_over, width=fields.get("d_model"))

    @classmethod
    def training_defaults(cls, given: Any) -> dict[str, Any]:
        """What the named size of a `model:` section proposes for training (learning rate, batch); {} without one."""
        preset, size, _ = _chosen(given)
        return dict(preset["sizes"][size]["training"]) if preset and isinstance(size, str) else {}

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelSpec:
        """A named size, with slots and fields laid over it: `preset("nano", num_layers=2)`."""
        return cls.parse({"preset": name, **overrides})

    @classmethod
    def from_yaml(cls, path: str | Path) -> ModelSpec:
        """A spec from a YAML file that holds what a recipe's `model:` section would."""
        try:
            return cls.parse(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(str(path), "no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(str(path), f"not readable: {error}") from None
        except yaml.YAMLError as error:
            raise ConfigError(str(path), f"not YAML: {error}") from None

    @classmethod
    def _validated(cls, fields: dict[str, Any]) -> ModelSpec:
        try:
            return cls(**fields)
        except ValidationError as error:
            raise registry.config_error(error, cls, "model") from None


@cache
def preset_sizes() -> dict[str, dict[str, Any]]:
    """Preset name -> {"spec": slots, "sizes": {size: {"spec": …, "training": …}}}, from ulm/models/presets."""
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(PRESETS.glob("*.yaml"))}


def _chosen(given: Any) -> tuple[dict[str, Any] | None, Any, dict[str, Any]]:
    """Preset, size (a name or a number of parameters) and the fields laid over it; the first two None without one."""
    if isinstance(given, str):
        given = {"preset": given}
    if not isinstance(given, dict):
        raise ConfigError("model", f"{given!r} is no model", "for example {preset: nano}")
    given = dict(given)
    name, size = (None if part is None else str(part) for part in (given.pop("preset", None), given.pop("size", None)))
    if name is None and size is None:
        return None, None, given
    presets = preset_sizes()
    if name not in presets:  # a bare size means the default preset
        if size is not None and name is not None:
            raise ConfigError("model.preset", f"no preset {name!r}", did_you_mean(name, presets))
        name, size = DEFAULT_PRESET, size or name
    preset = presets[name]
    if size is None:
        remedy = f"one of {', '.join(preset['sizes'])}, or a number of parameters such as 25M"
        raise ConfigError("model.size", "is missing", remedy)
    if size in preset["sizes"]:
        return preset, size, given
    if (parameters := dial.parsed(size)) is not None:
        return preset, parameters, given
    known = [*preset["sizes"], *presets]
    raise ConfigError("model.preset", f"no preset or size {size!r}", did_you_mean(size, known))


def _overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`. In a slot, fields that the new kind also has keep the base's values."""
    result = {**base, **over}
    for slot in SLOTS:
        below, above = base.get(slot), over.get(slot)
        if isinstance(above, str):
            above = {"kind": above}
        if isinstance(below, dict) and isinstance(above, dict):
            kind = above.get("kind", below.get("kind"))
            fields = registry.find(slot, kind).Config.model_fields if isinstance(kind, str) else {}
            result[slot] = {**{k: v for k, v in below.items() if k in fields}, **above, "kind": kind}
    return result
