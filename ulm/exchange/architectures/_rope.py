"""Rotary positions in the words of config.json, and back."""

from __future__ import annotations

from typing import Any

from ulm.components.position import longrope, rope
from ulm.errors import ConfigError
from ulm.exchange.plain import Turning


def parameters(turning: Turning | None) -> dict[str, Any]:
    """`rope_parameters` of what turns queries and keys; of what transformers cannot say, as near as it comes."""
    config = turning.config if turning else None
    if isinstance(config, longrope.Config):
        return {"rope_theta": config.theta, "rope_type": "default"}
    if not isinstance(config, rope.Config):
        return {"rope_theta": 10_000.0, "rope_type": "default"}
    scaling = config.scaling
    match scaling.kind if scaling else None:
        case "linear":
            assert scaling is not None
            return {"rope_theta": config.theta, "rope_type": "linear", "factor": scaling.factor}
        case "ntk":
            # transformers' "dynamic" grows with each text; ours holds for all, and is another theta.
            assert scaling is not None and turning is not None
            width = 2 * len(turning.frequencies)
            theta = config.theta * scaling.factor ** (width / max(width - 2, 1))
            return {"rope_theta": theta, "rope_type": "default"}
        case "yarn":
            # By turns, as the paper has it and as Llama 3 does; transformers' own "yarn" goes by the pair's number.
            assert scaling is not None
            return {
                "rope_theta": config.theta,
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.slow_turns,
                "high_freq_factor": scaling.fast_turns,
                "original_max_position_embeddings": scaling.original_context_tokens,
            }
        case _:
            return {"rope_theta": config.theta, "rope_type": "default"}


def given(config: dict[str, Any], theta: float = 10_000.0) -> dict[str, Any]:
    """The `rope_parameters` of a config.json; of older ones rope_theta and rope_scaling."""
    found = config.get("rope_parameters")
    if isinstance(found, dict) and found:
        check_scaling(config, found)
        return {"rope_theta": config.get("rope_theta", theta), **found}
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {"rope_theta": config.get("rope_theta", theta), **scaling, "rope_type": kind}


def check_scaling(config: dict[str, Any], said: dict[str, Any]) -> None:
    """ConfigError where the older rope_scaling, which transformers prefers, says other than these rope_parameters."""
    for key, value in (config.get("rope_scaling") or {}).items():
        if said.get("rope_type" if key == "type" else key) != value:
            problem = f"{key} is {value!r}, and otherwise in rope_parameters"
            raise ConfigError("config.json: rope_scaling", problem, "leave one of the two out")


def position(said: dict[str, Any]) -> dict[str, Any]:
    """Our `position` of rope_parameters. ConfigError for a rope_type that ours has no word for."""
    # All fields, since those of a pattern's entry would else be taken from the spec's own position.
    fields: dict[str, Any] = {"kind": "rope", "theta": said["rope_theta"], "rotary_dim": None, "scaling": None}
    match said.get("rope_type", "default"):
        case "default":
            return fields
        case "linear":
            return {**fields, "scaling": {"kind": "linear", "factor": said["factor"]}}
        case "llama3":
            scaling = {
                "kind": "yarn",
                "factor": said["factor"],
                "original_context_tokens": said["original_max_position_embeddings"],
                "slow_turns": said["low_freq_factor"],
                "fast_turns": said["high_freq_factor"],
                "attention_factor": 1.0,
            }
            return {**fields, "scaling": scaling}
        case kind:
            remedy = "default, linear or llama3; longrope in a Phi3ForCausalLM"
            raise ConfigError("config.json: rope_parameters.rope_type", f"ours has no {kind!r}", remedy)
