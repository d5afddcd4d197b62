"""What a file of architectures/ says of a stock architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from ulm.exchange.plain import Plain
from ulm.exchange.rewrites import Rewrite
from ulm.exchange.weights import Rule

Config = dict[str, Any]  # config.json


class Architecture(Protocol):
    """An architecture of transformers, in both directions.

    `fields(config(settings))` gives a spec that says `settings` again, unless it has a setting that the architecture
    does not: so an export is checked, and its refusal explained, without a list of what is missing.
    """

    name: ClassVar[str]  # config.json's architectures
    model_type: ClassVar[str]
    preference: ClassVar[int]  # of several that have all settings of a spec, the lowest is taken: most tools read it
    defaults: ClassVar[Config]  # of transformers' class, for what a config.json leaves out
    rewrites: ClassVar[tuple[Rewrite, ...]]  # by which more specs become its own

    def config(self, settings: Plain) -> Config:
        """config.json of a spec in plain words, without token ids and dtype; as near as the architecture comes."""
        ...

    def fields(self, config: Config) -> dict[str, Any]:
        """The fields of the ModelSpec that a config.json means. ConfigError by name for what ours has no word for."""
        ...

    def rules(self, settings: Plain) -> Iterator[Rule]:
        """How its weights are stored."""
        ...
