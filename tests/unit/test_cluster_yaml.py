"""cluster.yaml is what Ray's own launcher accepts, and its start commands are ones that `ray start` can parse."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

FILE = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def launched(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` would launch: the same two calls in the same order."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def ray_start(config: dict[str, Any], commands: str) -> dict[str, Any]:
    """The options of the one `ray start` among the commands, as ray's own command line parses them."""
    (line,) = [command for command in config[commands] if "ray start" in command]
    return start.make_context("ray start", shlex.split(line.split("ray start", 1)[1])).params


def test_ray_prepares_one_node_per_listed_worker(config: dict[str, Any]) -> None:
    prepared = launched(config)
    (node_type,) = prepared["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(config["provider"]["worker_ips"])
    assert config["provider"]["head_ip"] not in config["provider"]["worker_ips"]


@pytest.mark.parametrize(
    ("place", "broken", "complaint"),
    [
        ("setup_comands", ["make setup"], "setup_comands"),  # a misspelled field
        ("rsync_exclude", ".git", "is not of type 'array'"),
        ("auth", {"user": "ulm"}, "user"),
    ],
)
def test_ray_refuses_a_broken_file(config: dict[str, Any], place: str, broken: object, complaint: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=complaint):
        launched({**config, place: broken})


def test_workers_join_the_port_that_the_head_opens_and_all_export_metrics(config: dict[str, Any]) -> None:
    head, worker = ray_start(config, "head_start_ray_commands"), ray_start(config, "worker_start_ray_commands")
    assert head["head"] and head["include_dashboard"]
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert head["metrics_export_port"] == worker["metrics_export_port"] == 8080


def test_an_option_that_ray_start_lacks_is_noticed(config: dict[str, Any]) -> None:
    config["head_start_ray_commands"] = ["ray start --head --metric-port=1"]
    with pytest.raises(click.NoSuchOption):
        ray_start(config, "head_start_ray_commands")


def test_every_machine_runs_the_checkout_that_it_was_sent(config: dict[str, Any]) -> None:
    ((there, here),) = config["file_mounts"].items()
    assert (FILE.parent / here).resolve() == FILE.parent
    assert ".venv" in config["rsync_exclude"]
    for commands in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert all(there in command for command in config[commands])
