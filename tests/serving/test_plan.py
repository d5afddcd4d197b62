"""A serve recipe is looked up and checked before any process is started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from serve.plan import make_plan
from ulm.errors import ArtefactError, ConfigError
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
