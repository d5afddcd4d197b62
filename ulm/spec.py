"""What a model is: sizes and one kind per slot. The spec in a checkpoint is enough to build its model again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from ulm import dial, registry
from ulm.errors import ConfigError, UnknownKindError, did_you_mean
from ulm.registry import KindConfig

PRESETS = Path(__file__).parent / "models" / "presets"
DEFAULT_PRESET = "llama-like"
DEFAULT_VOCAB_SIZE = 8_192
SLOTS = ("embedding", "position", "attention", "feedforward", "norm", "head")
LAYER_SLOTS = ("position", "attention", "feedforward", "norm")  # what a pattern of blocks may vary
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # vLLM's CPU attention kernel knows few others


Placement = Literal["before", "after", "around", "output"]  # of the norms, as seen from a sub-layer


class LayerSpec(BaseModel):
    """What one layer is made of; as an entry of `blocks`, how many layers in a row are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repeat: int = Field(1, ge=1, le=10_000)
    position: SerializeAsAny[KindConfig]
    attention: SerializeAsAny[KindConfig]
    feedforward: SerializeAsAny[KindConfig]
    norm: SerializeAsAny[KindConfig]
    norm_placement: Placement

    @field_validator(*LAYER_SLOTS, mode="before")
    @classmethod
    def _configure(cls, given: Any, info: Any) -> KindConfig:
        return registry.configure(info.field_name, given)


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
    # Who may look at whom: all of them must allow it. Causal unless prefix is named.
    mask: tuple[SerializeAsAny[KindConfig], ...] = Field((), validate_default=True)
    norm_placement: Placement = "before"
    embedding_norm: bool = False  # one more norm, before the first layer (arXiv 2211.05100, section 3.2.2)
    # Layers that differ: a pattern, from the first layer on, again and again. What an entry leaves out is as above.
    blocks: tuple[LayerSpec, ...] = Field((), max_length=1_000)
    layers_per_block: int = Field(1, ge=1)  # layers in a row that share one block's weights (arXiv 2402.14905, 3.3)

    @field_validator(*SLOTS, mode="before")
    @classmethod
    def _configure(cls, given: Any, info: Any) -> KindConfig:
        return registry.configure(info.field_name, given)

    @field_validator("mask", mode="before")
    @classmethod
    def _configure_masks(cls, given: Any) -> tuple[KindConfig, ...]:
        several = given if isinstance(given, list | tuple) else [given]
        kinds = tuple(registry.configure("mask", one) for one in several)
        ordering = {config.kind for config in kinds} & {"causal", "prefix"}
        if len(ordering) == 2:
            remedy = "one of them: after the prefix, prefix is causal too"
            raise ConfigError("mask", "causal beside prefix, of which it leaves nothing", remedy)
        return kinds if ordering else (registry.configure("mask", "causal"), *kinds)

    @field_validator("blocks", mode="before")
    @classmethod
    def _lay_over(cls, given: Any, info: Any) -> Any:
        """Entries with what they leave out taken from the spec's own slots."""
        if not isinstance(given, list | tuple) or not set(LAYER_SLOTS) <= info.data.keys():
            return given  # pydantic names the one thing or the other
        usual = {slot: info.data[slot].model_dump() for slot in LAYER_SLOTS}
        usual["norm_placement"] = info.data.get("norm_placement", "before")
        return [
            _entry(usual, entry, number) if isinstance(entry, dict) else entry for number, entry in enumerate(given)
        ]

    @field_validator("position")
    @classmethod
    def _settle_table(cls, position: KindConfig, info: Any) -> KindConfig:
        """A table of positions is as long as the context that it was made for, also under a shorter one later."""
        if getattr(position, "max_tokens", 0) is None and "context_tokens" in info.data:
            return position.model_copy(update={"max_tokens": info.data["context_tokens"]})
        return position

    @model_validator(mode="after")
    def _fits(self) -> Self:
        try:
            registry.find("model", self.model)
        except UnknownKindError as error:
            raise UnknownKindError("model.model", error.problem, error.remedy) from None
        if self.max_positions is not None and self.context_tokens > self.max_positions:
            problem = f"{self.max_positions} positions, and a context of {self.context_tokens} tokens"
            raise ConfigError("position.max_tokens", problem, "as many as context_tokens, or leave it out")
        if self.num_layers % self.layers_per_block:
            problem = f"{self.layers_per_block} does not divide num_layers, which is {self.num_layers}"
            raise ConfigError("layers_per_block", problem, "a divisor of num_layers")
        for place, layer in self._kinds_of_layers():
            self._check_attention(place, layer.attention, layer.position)
            with _placed(place):
                for slot in LAYER_SLOTS:
                    getattr(layer, slot).check(self)
                self._check_position(layer.position)
        for config in (self.embedding, self.head, *self.mask):
            config.check(self)
        return self

    def _check_position(self, position: KindConfig) -> None:
        """ConfigError where a layer's position of its own is a kind that a whole model has once."""
        if position != self.position and registry.find("position", position.kind).is_of_model:
            remedy = "rope, longrope, alibi or none; or the same as the spec's"
            raise ConfigError("position.kind", f"{position.kind} is one for all layers", remedy)

    def _kinds_of_layers(self) -> Iterator[tuple[str, LayerSpec]]:
        """What this spec's layers may be, each with the place that an error of it would name."""
        yield "", self._usual_layer()
        for number, entry in enumerate(self.blocks):
            yield f"blocks.{number}.", entry

    def _check_attention(self, place: str, attention: KindConfig, position: KindConfig) -> None:
        """ConfigError where an attention does not go with the rest of the spec."""
        kind, cls = attention.kind, registry.find("attention", attention.kind)
        num_heads = getattr(attention, "num_heads", 1)
        given: int | None = getattr(attention, "head_dim", None)
        if given is None and self.d_model % num_heads:
            remedy = f"a divisor of {self.d_model}, or attention.head_dim"
            problem = f"{num_heads} does not divide d_model, which is {self.d_model}"
            raise ConfigError(f"{place}attention.num_heads", problem, remedy)
        head_dim = given or self.d_model // num_heads
        if head_dim not in HEAD_DIMS:
            field = "num_heads" if given is None else "head_dim"
            raise ConfigError(f"{place}attention.{field}", f"head_dim is {head_dim}", f"one of {HEAD_DIMS}")
        if (num_heads, head_dim) != (self.num_heads, self.head_dim):  # positions are made for all layers
            problem = (
                f"{num_heads} heads of {head_dim}, where the spec's attention has {self.num_heads} of {self.head_dim}"
            )
            raise ConfigError(
                f"{place}attention.num_heads", problem, "the same heads in all layers; num_kv_heads may differ"
            )
        if getattr(cls, "needs_source", False):
            remedy = "gqa, or another kind that reads its own text"
            raise ConfigError(f"{place}attention.kind", f"{kind} reads a source, and a decoder has none", remedy)
        kept = getattr(cls, "masks", {"causal"})  # what a kind that says nothing of itself is taken to keep
        foreign = [config.kind for config in self.mask if config.kind not in kept]
        if foreign:
            remedy = f"{kind} keeps {', '.join(sorted(kept))}"
            raise ConfigError("mask", f"{place}attention {kind} cannot keep the mask {foreign[0]}", remedy)
        has_bias = getattr(registry.find("position", position.kind), "has_bias", False)
        if has_bias and not getattr(cls, "takes_bias", False):
            remedy = "rope, learned, sinusoidal or none"
            problem = f"{position.kind} is added to scores, and {place}attention {kind} has none"
            raise ConfigError("position.kind", problem, remedy)

    def _usual_layer(self) -> LayerSpec:
        return LayerSpec(
            position=self.position,
            attention=self.attention,
            feedforward=self.feedforward,
            norm=self.norm,
            norm_placement=self.norm_placement,
        )

    @property
    def blocks_of_weights(self) -> list[LayerSpec]:
        """What each block of weights is made of, first to last: the pattern tiled, or the spec's slots."""
        pattern = [entry for entry in self.blocks for _ in range(entry.repeat)] or [self._usual_layer()]
        return list(islice(cycle(pattern), self.num_layers // self.layers_per_block))

    @property
    def max_positions(self) -> int | None:
        """The longest context that its kind of position can have; None where there is no end."""
        longest: int | None = getattr(self.position, "max_tokens", None)
        return longest

    @property
    def num_heads(self) -> int:
        """Query heads of every layer's attention."""
        return getattr(self.attention, "num_heads", 1)

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values of the usual layer; other layers of a pattern may have others."""
        return getattr(self.attention, "num_kv_heads", 1)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        given: int | None = getattr(self.attention, "head_dim", None)
        return given or self.d_model // self.num_heads

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
        """What the preset of a `model:` section proposes for training, and its named size (learning rate, batch)."""
        preset, size, _ = _chosen(given)
        of_size = preset["sizes"][size]["training"] if preset and isinstance(size, str) else {}
        return {**(preset or {}).get("training", {}), **of_size}

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


@contextmanager
def _placed(place: str) -> Iterator[None]:
    """ConfigErrors of the block name it, as in blocks.1.attention.window_tokens."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(place + error.place, error.problem, error.remedy) from None


def _entry(usual: dict[str, Any], entry: dict[str, Any], number: int) -> dict[str, Any]:
    """An entry of `blocks` with what it leaves out as usual, its kinds configured."""
    with _placed(f"blocks.{number}."):
        whole = _overlay(usual, entry)
        return {**whole, **{slot: registry.configure(slot, whole[slot]) for slot in LAYER_SLOTS}}


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
