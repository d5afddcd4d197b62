"""What a model is: sizes and one kind per slot. The spec in a checkpoint is enough to build its model again."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from ulm import registry
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
    vocab_size: int = Field(DEFAULT_VOCAB_SIZE, ge=2)  # the tokenizer's true size
    context_tokens: int = Field(256, ge=2)  # the longest text it is trained and served on
    d_model: int = Field(ge=8)
    num_layers: int = Field(ge=1)
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

    @model_validator(mode="after")
    def _fits(self) -> Self:
        registry.find("model", self.model)
        if self.head_dim not in HEAD_DIMS:
            raise ConfigError("attention.num_heads", f"head_dim is {self.head_dim}", f"one of {HEAD_DIMS}")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        given: int | None = getattr(self.attention, "head_dim", None)
        return given or self.d_model // getattr(self.attention, "num_heads", 1)

    @classmethod
    def parse(cls, given: Any, *, vocab_size: int | None = None, context_tokens: int | None = None) -> ModelSpec:
        """The spec that the `model:` section of a recipe means: a size name, `{preset, size, …}`, or all fields.

        `vocab_size` comes from the tokenizer, `context_tokens` from the training section; a value in the section wins.
        """
        fields, _ = _laid_out(given)
        if vocab_size is not None:
            fields.setdefault("vocab_size", vocab_size)
        if context_tokens is not None and not (isinstance(given, dict) and "context_tokens" in given):
            fields["context_tokens"] = context_tokens
        return cls._validated(fields)

    @classmethod
    def training_defaults(cls, given: Any) -> dict[str, Any]:
        """What the preset of a `model:` section proposes for training (learning rate, batch)."""
        return _laid_out(given)[1]

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


def _laid_out(given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of a spec and the preset's training defaults."""
    if isinstance(given, str):
        given = {"preset": given}
    if not isinstance(given, dict):
        raise ConfigError("model", f"{given!r} is no model", "for example {preset: nano}")
    given = dict(given)
    name, size = given.pop("preset", None), given.pop("size", None)
    if name is None and size is None:
        return given, {}
    presets = preset_sizes()
    if name not in presets:  # a bare size name means the default preset
        if size is not None and name is not None:
            raise ConfigError("model.preset", f"no preset {name!r}", did_you_mean(name, presets))
        name, size = DEFAULT_PRESET, size or name
    preset = presets[name]
    if size is None:
        raise ConfigError("model.size", "is missing", f"one of {', '.join(preset['sizes'])}")
    if size not in preset["sizes"]:
        known = [*preset["sizes"], *presets]
        raise ConfigError("model.preset", f"no preset or size {size!r}", did_you_mean(str(size), known))
    chosen = preset["sizes"][size]
    return _overlay(_overlay(preset["spec"], chosen["spec"]), given), dict(chosen["training"])


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
