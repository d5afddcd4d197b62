from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ulm
from ulm import artefacts, registry
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.errors import ArtefactError, ConfigError
from ulm.tokenizers.byte import byte_tokenizer

FILES = ("spec.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
TRAINING_FILES = (*FILES, "optimizer.safetensors", "state.json")


@pytest.fixture
def trained(nano, tmp_path):
    """A training checkpoint after one update, with its model and optimizer."""
    model = nano(vocab_size=257)
    optimizer = registry.find("optimizer", "adamw").build(registry.configure("optimizer", "adamw"), model, 1e-3)
    model(torch.arange(20)[None]).logsumexp(-1).sum().backward()
    optimizer.step()
    place = store.step_folder(tmp_path / "runs" / "a", 1)
    store.save(model, byte_tokenizer(), place, step=1, run="a", optimizer=optimizer, state={"step": 1, "cursor": 8})
    return place, model, optimizer


def test_a_saved_model_comes_back_bit_for_bit(nano, tmp_path):
    model, tokenizer = nano(vocab_size=257), byte_tokenizer()
    loaded, loaded_tokenizer = ulm.load(ulm.save(model, tokenizer, tmp_path / "a"))
    tokens_BT = torch.arange(30)[None]
    assert torch.equal(loaded(tokens_BT), model(tokens_BT))
    assert loaded.spec == model.spec and not loaded.training
    assert loaded_tokenizer.digest == tokenizer.digest
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(("manifest.json", *FILES))


def test_tied_weights_are_stored_once_and_untied_ones_twice(nano, tmp_path):
    from safetensors.torch import load_file

    for tied, count in ((True, 1), (False, 2)):
        model = nano(vocab_size=257, embedding={"kind": "token", "tied": tied})
        stored = load_file(ulm.save(model, byte_tokenizer(), tmp_path / str(tied)) / "model.safetensors")
        assert sum(name.split(".")[0] in ("embedding", "head") for name in stored) == count
        assert torch.equal(ulm.load(tmp_path / str(tied))[0](torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_an_optimizer_comes_back_bit_for_bit(trained, nano):
    place, model, optimizer = trained
    other = nano(seed=1, vocab_size=257)
    restored = registry.find("optimizer", "adamw").build(registry.configure("optimizer", "adamw"), other, 9.0)
    assert store.load_training(other, restored, place) == {"step": 1, "cursor": 8}
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == restored.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(optimizer.state[a][key], restored.state[b][key]) for key in optimizer.state[a])
    assert [g["lr"] for g in restored.param_groups] == [1e-3, 1e-3]
    assert sorted(p.name for p in place.iterdir()) == sorted(("manifest.json", *TRAINING_FILES))


def test_the_manifest_names_what_it_was_made_from(trained):
    place, model, _ = trained
    manifest = read_manifest(place)
    assert (manifest.run, manifest.step, manifest.corpus_digest, manifest.init_from) == ("a", 1, None, None)
    assert manifest.digest == artefacts.digest_json(artefacts.digest_files(place))
    assert manifest.spec_digest == store.spec_digest(model.spec)
    assert manifest.tokenizer_digest == byte_tokenizer().digest


@pytest.mark.parametrize("name", ["manifest.json", *TRAINING_FILES])
def test_a_flipped_bit_is_found_and_named(trained, nano, name):
    place, model, optimizer = trained
    content = bytearray((place / name).read_bytes())
    content[len(content) // 2] ^= 1
    (place / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=name.replace(".", r"\.")):
        ulm.load(place)
        store.load_training(model, optimizer, place)


@pytest.mark.parametrize("name", TRAINING_FILES)
def test_a_missing_file_is_named_with_the_remedy(trained, name):
    (trained[0] / name).unlink()
    with pytest.raises(ArtefactError, match=rf"{name}: missing; copy the checkpoint again, or remove its folder"):
        ulm.load(trained[0])


def test_another_format_version_is_refused_by_name(trained):
    manifest = json.loads((trained[0] / "manifest.json").read_text())
    (trained[0] / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(ArtefactError, match="format_version is 99, this version reads 1"):
        ulm.load(trained[0])


def test_an_existing_checkpoint_is_never_overwritten(nano, tmp_path):
    ulm.save(nano(vocab_size=257), byte_tokenizer(), tmp_path / "a")
    before = read_manifest(tmp_path / "a").digest
    with pytest.raises(ArtefactError, match="exists already"):
        ulm.save(nano(seed=1, vocab_size=257), byte_tokenizer(), tmp_path / "a")
    assert read_manifest(tmp_path / "a").digest == before


def test_a_checkpoint_is_found_by_step_run_and_name(trained, root, tmp_path):
    place = trained[0]
    (root / "runs").mkdir(parents=True)
    (root / "runs" / "a").symlink_to(place.parent)
    artefacts.point(root / "models" / "good", place)
    for text in (str(place), str(place.parent), "a", "runs/a", "runs/a/step-00000001", "good"):
        assert store.resolve(text, root=root) == place.resolve(), text
    assert store.resolve("step-00000001", root=root, near=place.parent) == place.resolve()
    with pytest.raises(ConfigError, match=r"init_from: no checkpoint 'goof' .*; did you mean 'good'"):
        store.resolve("goof", root=root, place="init_from")
    (root / "swarms" / "names").mkdir(parents=True)
    (root / "swarms" / "names" / "mine").write_text("anything", encoding="utf-8")
    with pytest.raises(ConfigError, match="mine is a swarm, not one checkpoint .*`ulm swarm show mine` lists them"):
        store.resolve("mine", root=root)
    (root / "runs" / "b" / "step-00000002").mkdir(parents=True)
    with pytest.raises(ConfigError, match="checkpoint: b: no complete checkpoint in this folder"):
        store.resolve("b", root=root)


def test_a_run_means_its_newest_whole_step(trained, tmp_path):
    run = trained[0].parent
    ulm.save(trained[1], byte_tokenizer(), store.step_folder(run, 12), step=12)
    (run / "step-00000013").mkdir()  # no manifest: not whole
    (run / "step-00000014.x.partial").mkdir()
    assert store.newest(run) == run / "step-00000012"


def test_prune_keeps_the_newest_and_removes_what_killed_writers_left(trained):
    run = trained[0].parent
    for step in (2, 3):
        ulm.save(trained[1], byte_tokenizer(), store.step_folder(run, step), step=step)
    (run / "step-00000004.x.partial").mkdir()
    assert store.prune(run, keep=2) == [run / "step-00000001"]
    assert sorted(p.name for p in run.iterdir()) == ["step-00000002", "step-00000003"]


def test_weights_of_another_shape_are_refused_by_name(trained, nano):
    with pytest.raises(ArtefactError, match=r"blocks\.2\..* is \(.*\), the spec's model has None"):
        store.load_weights(nano(vocab_size=257, num_layers=2), trained[0])


def test_a_save_that_is_killed_leaves_nothing_that_is_listed(tmp_path: Path):
    """The child is killed at the worst moment: all files written and synced, the folder not yet renamed."""
    script = (
        "import os, signal, sys, ulm\n"
        "from ulm.tokenizers.byte import byte_tokenizer\n"
        "os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        "model = ulm.build(ulm.ModelSpec.preset('nano', vocab_size=257), seed=0)\n"
        "ulm.save(model, byte_tokenizer(), sys.argv[1])\n"
    )
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", script, str(run / "step-00000005")], cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in run.iterdir() if p.name.endswith(".partial")], "the child died before it wrote anything"
    assert store.whole_steps(run) == [] and store.newest(run) is None
    assert store.prune(run, keep=1) == [] and list(run.iterdir()) == []
