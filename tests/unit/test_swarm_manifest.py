"""swarm.json: what is written comes back, and what is damaged or foreign is refused by place."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import ulm
from ulm import artefacts
from ulm.checkpoints import store
from ulm.errors import ArtefactError, ConfigError
from ulm.recipes.serve import Budget
from ulm.swarm.embed import Embedder
from ulm.swarm.manifest import Part, Swarm, _without_paths, write_swarm
from ulm.swarm.router import Router
from ulm.tokenizers.byte import byte_tokenizer
from ulm.tokenizers.char import char_tokenizer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with three checkpoints and a router over two of them."""
    spec = ulm.ModelSpec.preset("nano", num_layers=1, vocab_size=257, context_tokens=32)
    for seed, name in enumerate(("seed", "e00", "e01")):
        store.save(ulm.build(spec, seed=seed), byte_tokenizer(), step(tmp_path, name), step=4)
    embedder = Embedder({"code": 0, "law": 1}, np.ones(2), np.eye(2, dtype=np.float32))
    router = Router(["e00", "e01"], embedder, np.eye(2, dtype=np.float32), np.array([0.5, 0.5]), 0.1)
    with artefacts.new_folder(tmp_path / "clustering") as folder:
        router.write(folder)
        artefacts.write_json(folder / "manifest.json", {"format_version": 1, "files": artefacts.digest_files(folder)})
    return tmp_path


def step(root: Path, name: str) -> Path:
    return root / "runs" / f"t-{name}" / "step-00000004"


def written(root: Path) -> Swarm:
    return write_swarm(
        root,
        "tiny",
        members={
            "e00": Part(step(root, "e00"), 0, "code"),
            "e01": Part(step(root, "e01"), 1, "law"),
            "seed": Part(step(root, "seed")),
        },
        router=root / "clustering",
        strategy={"kind": "mixture", "top_k": 2, "every_tokens": 64},
        budget=Budget(max_tokens=100),
        tokenizer_digest=byte_tokenizer().digest,
        corpus_digest="c" * 64,
        dense=step(root, "seed"),
    )


def test_a_swarm_comes_back_by_name_digest_and_path(root):
    swarm = written(root)
    for text in ("tiny", swarm.digest, swarm.digest[:10], str(swarm.folder), f"swarms/{swarm.digest}"):
        opened = Swarm.open(text, root=root)
        assert opened.manifest == swarm.manifest
    assert opened.members["e01"].domain == "law" and opened.members["seed"].cluster is None
    assert opened.checkpoint("e01") == step(root, "e01").resolve()
    assert opened.router().ids == ("e00", "e01")
    assert opened.manifest.budget.max_tokens == 100
    assert opened.path_of(opened.manifest.controls.dense) == step(root, "seed").resolve()


@pytest.fixture
def of_two_tokenizers(root: Path) -> dict[str, Part]:
    """Members of which one has a tokenizer of its own."""
    spec = ulm.ModelSpec.preset("nano", num_layers=1, vocab_size=char_tokenizer("abc").vocab_size, context_tokens=32)
    folder = store.save(ulm.build(spec), char_tokenizer("abc"), root / "runs" / "char" / "step-00000001", step=1)
    return {"e00": Part(step(root, "e00"), 0), "e01": Part(folder, 1), "seed": Part(step(root, "seed"))}


@pytest.mark.parametrize(
    "strategy", [{"kind": "mixture"}, {"kind": "route", "margin": 0.2}, {"kind": "route", "by": "likelihood"}]
)
def test_members_of_two_tokenizers_are_refused_where_a_strategy_needs_one_vocabulary(root, of_two_tokenizers, strategy):
    message = f"members.e01: has another tokenizer than e00, and strategy {strategy['kind']} .*kind: route"
    fields = {"router": root / "clustering", "budget": Budget(), "tokenizer_digest": "t", "corpus_digest": "c"}
    with pytest.raises(ConfigError, match=message):
        write_swarm(root, "two", members=of_two_tokenizers, strategy=strategy, **fields)
    assert not (root / "swarms").exists()
    write_swarm(root, "two", members=of_two_tokenizers, strategy={"kind": "route"}, **fields)
    assert set(Swarm.open("two", root=root).members) == {"e00", "e01", "seed"}


def test_a_swarm_json_of_before_the_larger_dense_control_is_read(root):
    swarm = written(root)
    path = swarm.folder / "swarm.json"
    fields = json.loads(path.read_text())
    del fields["controls"]["dense_flops"]
    assert artefacts.digest_json(_without_paths({k: v for k, v in fields.items() if k != "digest"})) == swarm.digest
    artefacts.write_json(path, fields)
    assert Swarm.open("tiny", root=root).manifest == swarm.manifest


def test_the_larger_dense_control_is_recorded_and_checked(root):
    swarm = written(root)
    fields = {"members": {"e00": Part(step(root, "e00"))}, "router": None, "strategy": {"kind": "single"}}
    rest = {"budget": Budget(), "tokenizer_digest": "t", "corpus_digest": "c", "dense_flops": step(root, "e01")}
    large = write_swarm(root, "large", **fields, **rest)
    assert large.digest != swarm.digest
    assert large.path_of(Swarm.open("large", root=root).manifest.controls.dense_flops) == step(root, "e01").resolve()
    (step(root, "e01") / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtefactError, match="content does not match"):
        Swarm.open("large", root=root)


def test_swarm_json_has_the_agreed_keys_and_relative_paths(root):
    fields = json.loads((written(root).folder / "swarm.json").read_text())
    assert set(fields) == {
        *("format_version", "digest", "members", "router", "strategy", "budget", "tokenizer_digest", "corpus_digest"),
        "controls",
    }
    assert fields["members"]["e00"]["checkpoint"] == "../../runs/t-e00/step-00000004"
    assert fields["router"]["path"] == "../../clustering"
    assert fields["controls"]["random"] is None


def test_a_root_that_moves_keeps_its_swarms(root, tmp_path_factory):
    digest = written(root).digest
    moved = tmp_path_factory.mktemp("elsewhere") / "home"
    os.rename(root, moved)
    assert Swarm.open("tiny", root=moved).digest == digest


def test_a_flipped_byte_in_a_members_weights_is_refused_by_file(root):
    written(root)
    weights = step(root, "e01") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match=r"t-e01/step-00000004/model.safetensors: content does not match"):
        Swarm.open("tiny", root=root)


def test_another_checkpoint_in_a_members_place_is_refused(root):
    written(root)
    os.rename(step(root, "e00"), root / "aside")
    os.rename(step(root, "e01"), step(root, "e00"))
    os.rename(root / "aside", step(root, "e01"))
    with pytest.raises(ArtefactError, match=r"members.e00: .* is another checkpoint than the one recorded"):
        Swarm.open("tiny", root=root)


def test_another_router_in_the_routers_place_is_refused(root):
    written(root)
    path = root / "clustering" / "router.json"
    path.write_text(path.read_text().replace('"temperature": 0.1', '"temperature": 0.2'))
    files = artefacts.digest_files(root / "clustering")
    artefacts.write_json(root / "clustering" / "manifest.json", {"format_version": 1, "files": files})
    with pytest.raises(ArtefactError, match="not the router that"):
        Swarm.open("tiny", root=root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2, this version reads 1"),
        ({"strategy": {"kind": "route"}}, "content does not match its digest"),
        ({"strategy": {}}, "strategy names no kind"),
        ({"members": {}}, "members"),
        ({"extra": 1}, "extra: unknown key"),
    ],
)
def test_a_changed_swarm_json_is_refused(root, change, message):
    path = written(root).folder / "swarm.json"
    artefacts.write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(ArtefactError, match=message):
        Swarm.open("tiny", root=root)


@pytest.mark.parametrize("bad", ["swarm", "Upper", "-dash", "a b"])
def test_a_member_id_outside_the_pattern_is_refused(root, bad):
    path = written(root).folder / "swarm.json"
    fields = json.loads(path.read_text())
    fields["members"][bad] = fields["members"].pop("seed")
    artefacts.write_json(path, fields)
    with pytest.raises(ArtefactError, match="members"):
        Swarm.open("tiny", root=root)


def test_an_unknown_swarm_is_a_config_error_that_lists_the_names(root):
    written(root)
    with pytest.raises(ConfigError, match=r"recipe.swarm: no swarm 'tinny' .*tiny"):
        Swarm.open("tinny", root=root, place="recipe.swarm")
