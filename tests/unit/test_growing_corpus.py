"""A run whose corpus is extended between two of its starts goes on, in one exact order; any other corpus is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipelines.train import events, folder
from pipelines.train.figures import read
from pipelines.train.loop import train
from pipelines.train.rows import Rows
from pipelines.train.task import TrainTask, resolve
from tests.changed_task import changed
from tests.extended_corpus import extension, first_corpus
from tests.plain_build import plain_build
from ulm import gc, runtime
from ulm.checkpoints import store
from ulm.checkpoints.manifest import read_manifest
from ulm.corpus.lineage import models_that_saw, versions
from ulm.corpus.manifest import Corpus
from ulm.corpus.order import batch_digest
from ulm.errors import ArtefactError, ConfigError
from ulm.recipes.base import validate
from ulm.recipes.train import EarlyStopping, SwarmRecipe, TrainRecipe

ROWS, CONTEXT_TOKENS = 4, 64


@pytest.fixture(autouse=True)
def quick_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine's peak would take a second of each start."""
    monkeypatch.setattr(runtime, "peak_flops", lambda *_: 1e12)


@pytest.fixture
def newest(root: Path) -> Callable[..., TrainTask]:
    """Makes the task of one recipe, 12 steps of 4 rows, with whatever corpus has the name `grows` now."""

    resolved: dict[str, TrainTask] = {}

    def make(name: str = "a", corpus: str = "grows", **values) -> TrainTask:
        about = {"steps": 12, "batch_tokens": ROWS * CONTEXT_TOKENS, "context_tokens": CONTEXT_TOKENS}
        about |= {"precision": "float32", "micro_batch_rows": ROWS, "checkpoint_every_steps": 1, "keep_last": 99}
        fields = {"name": name, "corpus": corpus, "samples": {"prompts": []}, "train": about}
        digest = Corpus.open(corpus, root=root, verify=False).digest
        if digest not in resolved:
            resolved[digest] = resolve(validate(TrainRecipe, fields), root=root)
        return changed(resolved[digest], name, **values)

    return make


def go(task: TrainTask, steps: int) -> None:
    """Train so many steps further, and stop."""
    calls = iter(range(1_000))
    train(task, should_stop=lambda: next(calls) >= steps)


def batches(task: TrainTask) -> list[str]:
    return [line["batch_digest"] for line in read(task.folder)]


def recorded(task: TrainTask) -> list[dict]:
    return json.loads((task.folder / "task.json").read_text())["legs"]


def target_counts(rows: Rows, first: int, end: int) -> Counter:
    """How often each (document, token) is a target at these positions of the order."""
    found = Counter()
    for row, times in Counter(rows.order.rows(first, end - first).tolist()).items():
        for slot in range(CONTEXT_TOKENS):
            if (place := rows.plan.locate(row, slot)) is not None:
                found[place] += times
    return found


def test_in_the_epoch_in_which_a_corpus_grew_twice_every_token_is_a_target_as_often_as_its_weight_says(
    newest, root, tmp_path
):
    """Each source of weight 1 once, of weight 2 twice; of weight 0.5 half of its rows. The run took these batches."""
    weights = (1.0, 2.0, 0.5)
    first_corpus(root, tmp_path, weights)
    go(newest(), 5)
    for _ in range(2):
        extension(root, tmp_path, "grows", weights)
        go(newest(), 2)
    rows = Rows.of(newest())
    assert [leg.cursor for leg in rows.legs] == [0, 20, 28]
    assert batches(newest()) == [batch_digest(rows.order.rows(ROWS * step, ROWS)) for step in range(9)]
    first_epoch = Rows.of(newest(), rows.legs[:1]).order.epoch_rows
    assert 28 < first_epoch  # both joined the first epoch
    counts = target_counts(rows, 0, rows.order.epoch_rows)
    documents = rows.corpus.documents.to_pylist()
    assert {documents[document]["split"] for document, _ in counts} == {"train"}
    half = Counter()
    for number, document in enumerate(documents):
        if document["split"] != "train":
            continue
        of_document = [counts[number, token] for token in range(document["num_tokens"] + 1)]
        weight = rows.corpus.weights[document["source"]]
        if weight == 0.5:
            half.update(of_document)
        else:
            assert of_document == [int(weight)] * (document["num_tokens"] + 1)
    assert set(half) == {0, 1}
    targets = rows.plan.num_targets(np.arange(rows.plan.num_rows))
    of_half = [c for c in rows.plan.classes if c.weight == 0.5]
    taken = np.unique(rows.order.rows(0, rows.order.epoch_rows))
    for rows_of in of_half:
        mine = taken[(taken >= rows_of.first) & (taken < rows_of.first + rows_of.num_rows)]
        assert len(mine) == round(rows_of.num_rows / 2)
    assert half[1] == sum(targets[row] for row in taken for c in of_half if 0 <= row - c.first < c.num_rows)


def test_rows_of_old_documents_stay_as_they_were_and_hold_no_new_document(newest, root, tmp_path):
    first_corpus(root, tmp_path)
    go(newest(), 2)
    before = Rows.of(newest())
    extension(root, tmp_path, "grows")
    go(newest(), 1)
    rows, num_old = Rows.of(newest()), before.plan.num_rows
    old = np.arange(num_old)
    assert (rows.plan.batch(old).targets_BT == before.plan.batch(old).targets_BT).all()
    placed = [rows.plan.locate(row, 0)[0] for row in range(rows.plan.num_rows)]
    num_documents = before.corpus.documents.num_rows
    assert [document >= num_documents for document in placed] == [row >= num_old for row in range(rows.plan.num_rows)]


def test_a_run_says_its_legs_in_its_task_in_every_checkpoint_and_in_its_events(newest, root, tmp_path):
    a = first_corpus(root, tmp_path)
    go(newest(), 2)
    b = extension(root, tmp_path, "grows")
    folder.write_recipe(newest(), newest().recipe)
    go(newest(), 1)
    legs = [
        {"cursor": 0, "corpus": a.digest, "documents": 20},
        {"cursor": 8, "corpus": b.digest, "documents": 40},
    ]
    assert recorded(newest()) == legs
    places = [store.step_folder(newest().folder, step) for step in (1, 2, 3)]
    assert [store.read_state(place)["legs"] for place in places] == [legs[:1], legs[:1], legs]
    assert [read_manifest(place).corpus_digest for place in places] == [a.digest, a.digest, b.digest]
    said = [(event.step, event.text) for event in events.read(newest().folder) if event.kind == "corpus"]
    assert said == [(2, f"the corpus is now {b.digest[:12]}: 20 more documents from position 8 on")]
    assert yaml.safe_load((newest().folder / "recipe.yaml").read_text())["corpus"] == b.digest


def test_a_start_that_is_killed_before_its_first_step_changes_nothing_for_the_next(newest, root, tmp_path):
    """The leg is recorded by then, in one write: the same recipe finds it, and the corpus before is refused."""
    a = first_corpus(root, tmp_path)
    go(newest(), 3)
    extension(root, tmp_path, "grows")
    folder.claim(newest())
    legs = recorded(newest())
    with pytest.raises(ConfigError, match=f"corpus: run 'a' is trained on .* and .* \\({a.digest[:12]}\\) is no ext"):
        folder.check(newest(corpus=a.digest))
    go(newest(), 4)
    assert recorded(newest()) == legs
    assert [event.kind for event in events.read(newest().folder)].count("corpus") == 1
    assert batches(newest()) == [batch_digest(Rows.of(newest()).order.rows(ROWS * n, ROWS)) for n in range(7)]


def test_damaged_checkpoints_lead_back_before_the_extension_into_the_same_order(newest, root, tmp_path):
    first_corpus(root, tmp_path)
    go(newest(), 5)
    extension(root, tmp_path, "grows")
    go(newest(), 3)
    before = batches(newest())
    for step in (4, 5, 6, 7, 8):
        with (store.step_folder(newest().folder, step) / "model.safetensors").open("ab") as file:
            file.write(b"x")
    extension(root, tmp_path, "grows")
    for _ in range(2):
        go(newest(), 4)  # from step 3: over position 20 with the first extension, over 32 with the second
    legs = recorded(newest())
    assert [leg["cursor"] for leg in legs] == [0, 20, 32]
    assert batches(newest())[:8] == before
    assert batches(newest()) == [batch_digest(Rows.of(newest()).order.rows(ROWS * n, ROWS)) for n in range(11)]


def test_a_corpus_may_grow_again_before_the_place_is_reached_where_it_grew(newest, root, tmp_path):
    first_corpus(root, tmp_path)
    go(newest(), 5)
    extension(root, tmp_path, "grows")
    folder.claim(newest())
    for step in (4, 5):
        shutil.rmtree(store.step_folder(newest().folder, step))
    extension(root, tmp_path, "grows")
    go(newest(), 9)
    assert [leg["cursor"] for leg in recorded(newest())] == [0, 20, 20]
    rows = Rows.of(newest())
    assert batches(newest()) == [batch_digest(rows.order.rows(ROWS * n, ROWS)) for n in range(12)]
    old_epoch = Rows.of(newest(), rows.legs[:1]).order.epoch_rows
    begin = 20 // old_epoch * old_epoch
    counts = target_counts(rows, begin, begin + rows.order.epoch_rows)
    assert set(counts.values()) == {1} and {document for document, _ in counts} >= {20, 40}


def test_a_run_goes_on_over_several_extensions_at_once_and_without_the_corpora_before(newest, root, tmp_path):
    first = first_corpus(root, tmp_path)
    go(newest(), 2)
    second = extension(root, tmp_path, "grows")
    third = extension(root, tmp_path, "grows")
    assert versions(third) == {third.digest: 60, second.digest: 40, first.digest: 20}
    assert not [unused.path for unused in gc.survey(root).unused]  # the run's task.json and manifests name them
    shutil.rmtree(first.folder)
    go(newest(), 1)
    assert [(leg["cursor"], leg["documents"]) for leg in recorded(newest())] == [(0, 20), (8, 60)]
    shutil.rmtree(second.folder)
    go(newest(), 1)
    rows = Rows.of(newest())
    assert batches(newest()) == [batch_digest(rows.order.rows(ROWS * n, ROWS)) for n in range(4)]
    fourth = extension(root, tmp_path, "grows")
    fifth = extension(root, tmp_path, "grows")
    shutil.rmtree(fourth.folder)  # what the fifth extends is not known any more
    with pytest.raises(
        ConfigError, match=rf"corpus: .*{third.digest[:12]}, and grows \({fifth.digest[:12]}\) is no ex"
    ):
        train(newest())


def test_a_corpus_that_lacks_documents_of_the_run_is_refused_with_their_number(newest, root, tmp_path):
    first = first_corpus(root, tmp_path)
    go(newest(), 1)
    excluded = first.documents["id"].to_pylist()[:3]
    without = first_corpus(root, tmp_path, exclude=excluded)
    problem = rf"corpus: run 'a' is trained on {first.digest[:12]}, and grows \({without.digest[:12]}\) is no extension"
    remedy = rf"\(name {first.digest[:12]}, or what `ulm corpus extend` makes of it, or give this recipe another name\)"
    with pytest.raises(ConfigError, match=rf"{problem} of that: it lacks 3 of its 20 documents {remedy}"):
        folder.check(newest())
    other = plain_build(root, {"path": "first0.jsonl"}, near=tmp_path, name="grows", split={"val": 0.5})
    with pytest.raises(ConfigError, match=rf"corpus: .*grows \({other.digest[:12]}\) is no extension of that \("):
        train(newest())
    assert recorded(newest()) == [{"cursor": 0, "corpus": first.digest, "documents": 20}]
    go(newest(corpus=first.digest), 1)
    with pytest.raises(ConfigError, match=r"name: run 'a' exists with another train\.steps \(12, now 13\)"):
        folder.check(newest(num_steps=13))  # said before the corpus


def test_runs_of_a_swarm_do_not_go_on_with_a_corpus_that_grew(newest, root, tmp_path):
    first = first_corpus(root, tmp_path)
    np.save(tmp_path / "chosen.npy", np.arange(15))
    seed = replace(
        newest("seed"), recipe=validate(SwarmRecipe, {"name": "s", "corpus": "grows", "train": {"steps": 9}})
    )
    tasks = [newest("expert", documents=tmp_path / "chosen.npy"), newest("dense", start_cursor=8), seed]
    for task in tasks:
        folder.claim(task)
    extended = extension(root, tmp_path, "grows")
    for task in tasks:
        folder.check(task)
        text = rf"corpus: run '{task.run}' is trained on {first.digest[:12]}, now grows \({extended.digest[:12]}\): the"
        with pytest.raises(ConfigError, match=text):
            folder.check(replace(task, corpus=extended.folder))


def test_where_the_corpus_grew_the_best_is_sought_anew_on_its_val_rows(newest, root, tmp_path):
    first_corpus(root, tmp_path)
    values = {"eval_every_steps": 1, "keep_last": 1, "keep_best": 1, "early_stopping": EarlyStopping(patience=50)}
    go(newest(**values), 3)
    state = store.read_state(store.newest(newest().folder))
    state["best"] = {"val_loss": "0.5", "step": 2, "evaluations_since": 49}
    rewrite_state(store.newest(newest().folder), {**state, "val_loss": 0.5})
    extension(root, tmp_path, "grows")
    go(newest(**values), 2)  # with the best and the patience of before it would end after one
    grown = store.read_state(store.newest(newest().folder))
    assert grown["step"] == 5 and grown["ended"] is None
    assert grown["best"]["step"] in (4, 5) and float(grown["best"]["val_loss"]) > 0.5
    val_losses = {line["step"]: line["val_loss"] for line in read(newest().folder)}
    assert float(grown["best"]["val_loss"]) == min(val_losses[4], val_losses[5])
    kept = store.best(newest().folder)
    assert kept and all(store.step_of(place) > 3 for place in kept)


def rewrite_state(checkpoint: Path, state: dict) -> None:
    """Give a checkpoint another state, sealed as the store seals it."""
    from ulm.checkpoints.manifest import write_manifest

    (checkpoint / "state.json").write_text(json.dumps(state))
    lineage = read_manifest(checkpoint).model_dump(
        include={"run", "step", "spec_digest", "tokenizer_digest", "corpus_digest", "init_from"}
    )
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, **lineage)


def test_a_finished_run_stays_as_it_is_when_its_corpus_grows(newest, root, tmp_path):
    first = first_corpus(root, tmp_path)
    train(newest(num_steps=2))
    folder.write_recipe(newest(num_steps=2), newest().recipe)
    extension(root, tmp_path, "grows")
    folder.write_recipe(newest(num_steps=2), newest().recipe)
    assert train(newest(num_steps=2), on_step=lambda figures: pytest.fail("trained again")).step == 2
    assert [leg["corpus"] for leg in recorded(newest())] == [first.digest]
    assert yaml.safe_load((newest().folder / "recipe.yaml").read_text())["corpus"] == first.digest


def test_files_that_do_not_belong_together_are_refused(newest, root, tmp_path):
    first_corpus(root, tmp_path)
    go(newest(), 1)
    (newest().folder / "task.json").rename(tmp_path / "task.json")
    extension(root, tmp_path, "grows")
    with pytest.raises(ArtefactError, match=r"step-00000001: was trained on other corpora than task\.json beside it"):
        train(newest())
    (newest().folder / "task.json").write_text('{"corpus": "torn')
    with pytest.raises(ArtefactError, match=r"task\.json: does not say what the run is: "):
        folder.check(newest())


def test_lineage_knows_from_when_on_and_how_often_a_run_went_over_the_documents(newest, root, tmp_path):
    """Counted in tokens: rows are taken to be full, as ever."""
    first_corpus(root, tmp_path)
    go(newest(), 2)
    extended = extension(root, tmp_path, "grows")
    train_rows = np.flatnonzero(np.array(extended.documents["split"].to_pylist()) == "train")
    ids = extended.documents["id"].to_pylist()
    old, new = ids[train_rows[0]], ids[train_rows[-1]]
    assert seen(root, new) == {}
    go(newest(), 1)
    sizes = extended.documents["num_tokens"].to_numpy() + 1
    of_old, of_new = (int(sizes[train_rows[mask]].sum()) for mask in (train_rows < 20, train_rows >= 20))
    taken, batch = 2 * ROWS * CONTEXT_TOKENS, ROWS * CONTEXT_TOKENS
    rest = of_old - taken + of_new
    assert batch < rest
    assert seen(root, new) == {"a": pytest.approx(batch / rest, abs=1e-3)}
    share = taken / of_old
    assert seen(root, old) == {"a": pytest.approx(share + (1 - share) * batch / rest, abs=1e-3)}
    train(newest())
    beyond = 10 * batch - rest
    assert 0 < beyond < of_old + of_new
    assert seen(root, new) == seen(root, old) == {"a": pytest.approx(1 + beyond / (of_old + of_new), abs=1e-3)}


def seen(root: Path, identity: str) -> dict[str, float]:
    found = models_that_saw(identity, root)
    assert not found["unreadable"]
    return {model["model"]: model["passes"] for model in found["models"]}


def test_a_corpus_whose_base_is_not_what_its_content_says_is_refused(root, tmp_path):
    first_corpus(root, tmp_path)
    extended = extension(root, tmp_path, "grows")
    manifest = json.loads((extended.folder / "manifest.json").read_text())
    for base in ({**manifest["base"], "digest": "0" * 64}, {**manifest["base"], "documents": 41}, {"digest": []}, 7):
        (extended.folder / "manifest.json").write_text(json.dumps({**manifest, "base": base}))
        with pytest.raises(ArtefactError, match=r"manifest\.json: base: not what its content says"):
            versions(Corpus.read(extended.folder))
