"""Recipes: from YAML and --set to a typed value, and the texts of the mistakes on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from ulm.errors import ConfigError
from ulm.recipes import CorpusRecipe, load_recipe
from ulm.recipes.base import resolve_path, validate
from ulm.recipes.serve import ServeRecipe

TRAIN = "corpus: stories\ntrain: {steps: 30}\n"


def written(folder: Path, text: str | bytes, name: str = "first run.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_minimal_train_recipe_has_the_defaults_and_the_name_of_its_file(tmp_path):
    recipe = load_recipe("train", written(tmp_path, TRAIN))
    assert (recipe.name, recipe.corpus, recipe.model) == ("first-run", "stories", "nano")
    assert (recipe.train.steps, recipe.train.workers, recipe.train.clip_norm) == (30, 1, 1.0)
    assert (recipe.optimizer, recipe.schedule) == ({}, {"kind": "cosine"})
    assert load_recipe("train", written(tmp_path, TRAIN + "name: other\n")).name == "other"


def test_overrides_win_over_the_file_and_make_sections_that_it_lacks(tmp_path):
    path = written(tmp_path, TRAIN)
    overrides = ["train.steps=7", "optimizer.kind=adamw", "optimizer.lr=1e-3", "model={preset: micro, num_layers: 1}"]
    recipe = load_recipe("train", path, overrides)
    assert recipe.train.steps == 7
    assert recipe.optimizer == {"kind": "adamw", "lr": 1e-3}
    assert recipe.model == {"preset": "micro", "num_layers": 1}
    assert load_recipe("train", path, ["train.steps=7", "train.steps=8"]).train.steps == 8


def test_an_override_unsets_with_an_empty_value(tmp_path):
    recipe = load_recipe("train", written(tmp_path, TRAIN), ["train.steps=", "train.tokens=5000"])
    assert (recipe.train.steps, recipe.train.tokens) == (None, 5000)


def test_a_recipe_can_be_given_by_overrides_alone():
    recipe = load_recipe("train", None, ["name=quick", "corpus=stories", "train.steps=3"])
    assert (recipe.name, recipe.train.steps) == ("quick", 3)


@pytest.mark.parametrize(
    ("verb", "text", "overrides", "message"),
    [
        ("train", "corpus: a\ntrian: {steps: 3}", [], "trian: unknown key (did you mean 'train'?)"),
        ("train", TRAIN + "modle: nano", [], "modle: unknown key (did you mean 'model'?)"),
        ("train", "corpus: a\ntrain: {step: 3}", [], "train.step: unknown key (did you mean 'steps'?)"),
        ("train", "corpus: a\ntrain: {steps: many}", [], "train.steps: 'many': Input should be a valid integer"),
        ("train", "corpus: a\ntrain: {steps: 0}", [], "train.steps: 0: Input should be greater than or equal to 1"),
        ("train", "corpus: a\ntrain: {}", [], "train: needs one of steps, tokens, tokens_per_parameter"),
        ("train", "corpus: a\ntrain: {steps: 3}", ["train.tokens=9"], "train: has steps and tokens, which both say"),
        ("train", "corpus: a\ntrain: {steps: 3}", ["train.tokens=9"], "--set train.steps=null leaves the other"),
        ("train", TRAIN + "optimizer: {kind: adamv}", [], "optimizer.kind: no kind 'adamv' (did you mean 'adamw'?)"),
        ("train", TRAIN + "optimizer: {kind: adamw, beta: 1}", [], "optimizer.beta: unknown key (did you mean 'beta"),
        ("train", TRAIN + "model: {preset: nanno}", [], "model.preset: no preset or size 'nanno' (did you mean 'nano'"),
        ("train", TRAIN + "name: Über", [], "name: 'Über': String should match pattern"),
        ("train", TRAIN + "name: x.partial", [], "name: 'x.partial': names of unfinished artefacts end in .partial"),
        ("train", TRAIN, ["train.steps"], "--set train.steps: is not a.b=value (for example --set train.steps=30)"),
        ("train", TRAIN, ["=3"], "--set =3: is not a.b=value"),
        ("train", TRAIN, ["train..steps=3"], "--set train..steps=3: is not a.b=value"),
        ("train", TRAIN, ["model=[nano"], "--set model: '[nano' is not a YAML value"),
        ("train", TRAIN, ["train.stepz=3"], "train.stepz: unknown key (did you mean 'steps'?)"),
        ("swarm train", TRAIN + "schedule: {kind: wsd}", [], "schedule: unknown key"),
        ("swarm train", TRAIN + "controls: [dens]", [], "controls.0: 'dens': Input should be 'dense', 'random' or"),
        ("corpus build", "sources: []", [], "sources: []: List should have at least 1 item"),
        ("corpus build", "sources: [{pth: a}]", [], "sources.0.pth: unknown key (did you mean 'path'?)"),
        ("corpus build", "sources: [{}]", [], "sources.0: {}: give either path or dataset"),
        ("corpus build", "sources: [{path: a}]\ntokenizer: {kind: byte, vocab_size: 300}", [], "leave vocab_size out"),
        ("serve up", "port: 80", [], "give either swarm or members"),
        ("serve up", "swarm: a\nport: 99999", [], "port: 99999: Input should be less than or equal to 65535"),
        ("serve up", "members: {swarm: {checkpoint: x}}", [], "the name swarm is the swarm's own"),
        ("train", "corpus: [a", [], "not YAML: "),
        ("train", "- corpus", [], "a recipe is a mapping of keys to values"),
        ("train", "3: 4", [], "recipe: keywords must be strings"),
        ("train", b"\xff\xfe\x00", [], "not readable: "),
    ],
    ids=str,
)
def test_a_mistake_in_a_recipe_names_place_value_and_remedy(tmp_path, verb, text, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe(verb, written(tmp_path, text), overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such recipe \(the path of a YAML file\)"):
        load_recipe("train", tmp_path / "none.yaml")


def test_a_path_is_looked_up_beside_the_recipe_then_in_the_root(tmp_path):
    near, root = tmp_path / "recipes", tmp_path / "root"
    for folder, names in ((near, ["both"]), (root, ["both", "stored"])):
        for name in names:
            (folder / name).mkdir(parents=True)
    assert resolve_path("both", near=near, root=root) == near / "both"
    assert resolve_path("stored", near=near, root=root) == root / "stored"
    assert resolve_path("neither", near=near, root=root) == near / "neither"
    assert resolve_path(str(root), near=near, root=near) == root


@pytest.mark.parametrize("text", ["", "~nosuchuser/x", "a\0b", "é" * 128, "a/" * 1_999, "a/" * 2_999, "\ud800"])
def test_a_text_that_no_path_can_be_is_refused_by_its_place(tmp_path, text):
    with pytest.raises(ConfigError, match=r"^sources\.3\.path: '.*' cannot be a path") as caught:
        resolve_path(text, near=tmp_path / ("n" * 200), root=tmp_path, place="sources.3.path")
    assert len(str(caught.value).encode()) < 200


@pytest.mark.parametrize(
    ("section", "place"),
    [
        ({"sources": [{"path": "a"}, {"path": "a\ud800"}]}, "sources.1.path"),
        ({"exclude": ["\udcff"]}, "exclude.0"),
        ({"clean": {"personal_data": {"phone_region": "\ud800"}}}, "clean.personal_data.phone_region"),
        ({"clean": {"\ud800": 1}}, "clean"),
        ({"tokenizer": "\ud800"}, "tokenizer"),
        ({"\ud800": 1}, "recipe"),
    ],
)
def test_a_lone_surrogate_anywhere_in_a_recipe_is_refused_by_its_place(section, place):
    with pytest.raises(ConfigError) as caught:
        validate(CorpusRecipe, {"name": "x", "sources": [{"path": "a"}], **section})
    assert str(caught.value).startswith(f"{place}: '")
    assert str(caught.value).endswith("' holds a lone surrogate, which no file can")


def test_a_value_that_contains_itself_is_answered():
    with pytest.raises(ConfigError, match="corpus: "):
        load_recipe("train", None, ["name=x", "corpus=&a [*a]", "train.steps=1"])


@pytest.mark.parametrize(
    "text", ["corpus: 2024-13-45", "corpus: !!int ''", "corpus: !!bool foo", "corpus: " + "[" * 3_000]
)
def test_values_that_trip_the_yaml_reader_are_errors_with_the_file(tmp_path, text):
    with pytest.raises(ConfigError, match=r"run\.yaml: not YAML"):
        load_recipe("train", written(tmp_path, text))


def test_a_small_file_that_unfolds_to_a_huge_value_is_answered_briefly(tmp_path):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError) as caught:
        load_recipe("train", written(tmp_path, "\n".join([*levels, "corpus: *a11", "train: {steps: 1}"])))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"vocabsize": 5}, "tokenizer.vocabsize: unknown key (did you mean 'vocab_size'?)"),
        ({"kind": "bpee"}, "tokenizer.kind: 'bpee': Input should be 'byte', 'char' or 'bpe'"),
    ],
)
def test_a_mistake_in_one_form_of_a_section_is_placed_by_its_keys_alone(section: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(CorpusRecipe, {"name": "x", "sources": [{"path": "a"}], "tokenizer": section})
    assert str(error.value) == said


def test_an_engine_without_a_kind_is_the_local_one() -> None:
    recipe = ServeRecipe(name="s", members={"m": {"checkpoint": "x"}}, engine={"threads": 1})
    assert recipe.engine == {"kind": "local", "threads": 1}
