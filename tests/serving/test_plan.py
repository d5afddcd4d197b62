"""A serve recipe is looked up and checked before any process is started."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from serve.graph import lacking
from serve.plan import catalog_of, make_plan
from tests.small_members import small_member
from ulm import registry, runtime
from ulm.checkpoints.manifest import read_manifest
from ulm.errors import ArtefactError, ConfigError, ModelNotFoundError
from ulm.recipes import ServeRecipe
from ulm.recipes.base import validate
from ulm.swarm.manifest import Swarm


def recipe(**fields: object) -> ServeRecipe:
    return validate(ServeRecipe, {"name": "t", **fields})


def test_a_swarm_gives_members_with_clusters_router_and_strategy(swarm: Swarm, root: Path) -> None:
    plan = make_plan(recipe(swarm=str(swarm.folder)), root=root, near=None)
    assert list(plan.members) == ["e00", "e01", "e02", "seed"]
    assert [m.cluster for m in plan.members.values()] == [0, 1, 2, None]
    assert plan.router == swarm.router_folder() and plan.strategy == {"kind": "mixture", "top_k": 2}
    assert plan.groups == (("e00", "e01", "e02", "seed"),)
    apart = make_plan(recipe(swarm=str(swarm.folder), members_per_engine=3), root=root, near=None)
    assert apart.groups == (("e00", "e01", "e02"), ("seed",))


@pytest.mark.parametrize("name", ["certificate", "key"])
@pytest.mark.timeout(30)
def test_a_certificate_that_is_no_file_is_refused_and_not_waited_for(
    swarm: Swarm, root: Path, tmp_path: Path, name: str
) -> None:
    tls = {other: str(tmp_path / f"{other}.pem") for other in ("certificate", "key")}
    os.mkfifo(tls[name])
    served = recipe(swarm=str(swarm.folder), tls=tls)
    with pytest.raises(ConfigError, match=rf"tls\.{name}: .*{name}\.pem is no file \(the path of a PEM file"):
        make_plan(served, root=root, near=None)
    os.unlink(tls[name])
    with pytest.raises(ConfigError, match="tls: .* cannot be used: No such file"):
        make_plan(served, root=root, near=None)


BY_VLLM = {"kind": "vllm", "cpus": 0.5, "max_answers": 8}


def with_vllm(monkeypatch: pytest.MonkeyPatch, is_there: bool = True) -> None:
    monkeypatch.setattr(runtime, "has_vllm", lambda: is_there)


def test_a_member_by_vllm_has_an_engine_to_itself_with_nothing_left_open(
    swarm: Swarm, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_vllm(monkeypatch)
    by_vllm = {**BY_VLLM, "context_tokens": 64}
    plan = make_plan(recipe(swarm=str(swarm.folder), engines={"e01": by_vllm}), root=root, near=None)
    assert plan.groups == (("e00", "e02", "seed"), ("e01",)) and list(plan.members) == ["e00", "e01", "e02", "seed"]
    member = plan.members["e01"]
    assert member.engine is not None and member.context_tokens == 64 and plan.members["e00"].engine is None
    config = registry.configure("engine", member.engine)
    assert (config.dtype, config.cpus, config.context_tokens) == ("float32", 0.5, 64)  # type: ignore[attr-defined]
    (folder,) = (root / "exports").iterdir()
    assert folder.name == f"{read_manifest(member.checkpoint).digest}-float32" and (folder / "config.json").is_file()


def test_members_say_their_engine_themselves_and_one_for_all_is_each_members_own(
    swarm: Swarm, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_vllm(monkeypatch)
    a, b = ({"checkpoint": str(swarm.checkpoint(name))} for name in ("e00", "e01"))
    members = {"a": a, "b": {**b, "engine": BY_VLLM}, "c": {**b, "engine": {"kind": "local", "dtype": "bfloat16"}}}
    plan = make_plan(recipe(members=members), root=root, near=None)
    assert plan.groups == (("a",), ("b",), ("c",))
    assert [m.engine and m.engine["kind"] for m in plan.members.values()] == [None, "vllm", "local"]
    every = make_plan(recipe(members={"a": a, "b": b}, engine=BY_VLLM), root=root, near=None)
    assert every.groups == (("a",), ("b",))
    assert [m.engine and m.engine["kind"] for m in every.members.values()] == ["vllm", "vllm"]
    both = make_plan(recipe(members={"a": a, "b": b}, engine=BY_VLLM, members_per_engine=2), root=root, near=None)
    assert both.groups == (("a", "b"),)
    assert both.members["a"].engine == both.members["b"].engine
    assert both.members["a"].engine["enforce_eager"] is True


def test_what_a_vllm_member_cannot_have_is_said_by_place_before_anything_starts(
    swarm: Swarm, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(**fields: object) -> None:
        make_plan(recipe(**fields), root=root, near=None)

    of_swarm: dict[str, Any] = {"swarm": str(swarm.folder)}
    with_vllm(monkeypatch, is_there=False)
    with pytest.raises(ConfigError, match=r"engines\.e01\.kind: vllm is not installed here \(`make setup` installs it"):
        plan(**of_swarm, engines={"e01": BY_VLLM})
    with_vllm(monkeypatch)
    with pytest.raises(ConfigError, match=r"engines\.e07: no member 'e07' is served \(did you mean"):
        plan(**of_swarm, engines={"e07": BY_VLLM})
    with pytest.raises(ConfigError, match=r"engines\.e01\.kv_cache_bytes: 4,096 bytes; one text of 96 tokens .* needs"):
        plan(**of_swarm, engines={"e01": {**BY_VLLM, "kv_cache_bytes": 4_096}})
    with pytest.raises(ConfigError, match=r"members\.a\.engine\.cpu: unknown key \(did you mean 'cpus'"):
        recipe(members={"a": {"checkpoint": "x", "engine": {"kind": "vllm", "cpu": 1}}})
    with pytest.raises(ConfigError, match=r"engines: is for the members of a swarm \(write it to the member"):
        recipe(members={"a": {"checkpoint": "x"}}, engines={"a": BY_VLLM})
    for field in ({"cpus": 2}, {"gpus": 1}):
        with pytest.raises(ConfigError, match=rf"{next(iter(field))}: has no effect: every member has an engine"):
            plan(**of_swarm, engine=BY_VLLM, **field)
    own = {name: BY_VLLM for name in ("e00", "e01", "e02", "seed")}
    with pytest.raises(ConfigError, match="members_per_engine: has no effect: every member has an engine"):
        plan(**of_swarm, engines=own, members_per_engine=2)
    small_member(tmp_path, attention="linear")
    with pytest.raises(
        ConfigError, match=r"members\.a\.engine\.kind: vllm cannot run .*linear.*\(take \{kind: local\}\)"
    ):
        plan(members={"a": {"checkpoint": str(tmp_path / "member-0"), "engine": BY_VLLM}})


def test_the_seed_stands_in_for_others_unless_the_recipe_names_who_does(swarm: Swarm, root: Path) -> None:
    def fallback(**fields: object) -> tuple[str, ...]:
        return make_plan(recipe(**fields), root=root, near=None).fallback

    of_swarm = {"swarm": str(swarm.folder)}
    of_members = {"members": {"seed": {"checkpoint": str(swarm.checkpoint("seed"))}}}
    assert fallback(**of_swarm) == ("seed",)
    assert fallback(**of_swarm, fallback=["e02", "e00"]) == ("e02", "e00")
    assert fallback(**of_swarm, fallback=[]) == fallback(**of_members) == ()
    with pytest.raises(ConfigError, match=r"fallback\.1: no member 'e20' is served \(did you mean 'e02'"):
        fallback(**of_swarm, fallback=["e00", "e20"])


def test_a_strategy_of_the_recipe_beyond_its_own_limits_is_refused_by_place(swarm: Swarm, root: Path) -> None:
    fields = {"swarm": str(swarm.folder), "limits": {"max_top_k": 2, "min_every_tokens": 8}}
    plan = make_plan(recipe(**fields, patience_s=2.5), root=root, near=None)
    assert plan.limits.max_top_k == 2 and plan.patience_s == 2.5
    with pytest.raises(ConfigError, match=r"strategy\.top_k: 3 is beyond the limit 2"):
        make_plan(recipe(**fields, strategy={"kind": "mixture", "top_k": 3}), root=root, near=None)
    with pytest.raises(ConfigError, match=r"strategy\.every_tokens: 4 is beyond the limit 8"):
        make_plan(recipe(**fields, strategy={"kind": "route", "every_tokens": 4}), root=root, near=None)


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_member_is_named_with_its_file(swarm: Swarm, root: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(swarm.checkpoint("e00"), copy)
    weights = copy / "model.safetensors"
    if damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-100] ^= 1
        weights.write_bytes(content)
    else:
        weights.unlink()
    with pytest.raises(ArtefactError, match=r"model\.safetensors"):
        make_plan(recipe(members={"a": {"checkpoint": str(copy)}}), root=root, near=None)


def test_a_missing_member_and_a_reserved_name_are_refused_by_place(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"members\.a\.checkpoint: no checkpoint 'nope'"):
        make_plan(recipe(members={"a": {"checkpoint": "nope"}}), root=root, near=None)
    with pytest.raises(ConfigError, match="the name swarm is the swarm's own"):
        recipe(members={"swarm": {"checkpoint": "x"}})
    with pytest.raises(ConfigError, match="give either swarm or members"):
        recipe()


def test_a_strategy_without_what_it_needs_and_names_that_lead_nowhere_are_refused_before_anything_starts(
    swarm: Swarm, root: Path
) -> None:
    alone = {"members": {"a": {"checkpoint": str(swarm.checkpoint("e00"))}}}
    of_swarm = {"swarm": str(swarm.folder)}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({**alone, "strategy": {"kind": "mixture"}}, "strategy: mixture needs a router and its experts"),
        ({**of_swarm, "aliases": {"e00": "seed"}}, "aliases.e00: is a model's own name"),
        ({**of_swarm, "aliases": {"gpt-4o": "swarm/rout"}}, "aliases.gpt-4o: no model 'swarm/rout' is served"),
        ({**alone, "aliases": {"gpt-4o": "swarm/route"}}, "aliases.gpt-4o: no model 'swarm/route' is served"),
        ({**of_swarm, "defaults": {"e07": {"top_k": 3}}}, "defaults.e07: no such model is served"),
    ]
    for fields, problem in wrong:
        with pytest.raises(ConfigError) as error:
            make_plan(recipe(**fields), root=root, near=None)
        assert str(error.value).startswith(problem)


def test_a_model_that_lacks_something_here_says_what(swarm: Swarm, root: Path) -> None:
    plan = make_plan(recipe(members={"a": {"checkpoint": str(swarm.checkpoint("e00"))}}), root=root, near=None)
    nobody: Any = None
    with pytest.raises(
        ModelNotFoundError, match="swarm/mixture' does not exist here .it needs a router and its experts"
    ):
        catalog_of(plan, {"a": nobody}).model("swarm/mixture")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, None),
        ({"gpus": 1.0}, "the engines ask for 1 GPUs, and the cluster has 0; give engines smaller shares"),
        ({"members_per_engine": 1}, "the engines ask for 4 CPUs, and the cluster has 2; "),
        ({"members_per_engine": 1, "cpus": 0.5}, None),
        ({"engines": {"e01": {**BY_VLLM, "gpus": 0.5}}}, "the engines ask for 0.5 GPUs, and the cluster has 0; "),
    ],
)
def test_what_a_cluster_has_too_little_of_is_said_instead_of_waited_for(
    swarm: Swarm, root: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], problem: str | None
) -> None:
    with_vllm(monkeypatch)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    asked = recipe(swarm=str(swarm.folder), **fields)
    found = lacking(make_plan(asked, root=root, near=None), asked)
    assert found is None if problem is None else found is not None and found.startswith(problem)
