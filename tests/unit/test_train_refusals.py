"""What is wrong in a training recipe is refused before anything starts, by the name of the field."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.train import alone
from pipelines.train.loop import train
from pipelines.train.prepare import prepare
from tests.written_corpus import written_corpus
from ulm.errors import ConfigError
from ulm.recipes import load_recipe
from ulm.tokenizers.char import char_tokenizer

TEXTS = [f"{i} men went to mow, went to mow a meadow. " * (1 + i % 3) for i in range(40)]
RECIPE = "corpus: written\ntrain: {steps: 4, batch_tokens: 512, context_tokens: 64}\nname: a\n"  # 8 rows a batch


@pytest.fixture
def recipe(root: Path, tmp_path: Path) -> Path:
    """A recipe that trains, on a corpus with held-out text; `blind` is a corpus without."""
    written_corpus(root, {"train": TEXTS[10:], "val": TEXTS[:10]})
    written_corpus(root, {"train": TEXTS}, name="blind")
    path = tmp_path / "train.yaml"
    path.write_text(RECIPE)
    return path


def prepared(recipe: Path, root: Path, *overrides: str):
    return prepare(load_recipe("train", recipe, overrides), root=root, near=recipe.parent)


def test_a_rate_alone_is_one_for_the_usual_optimizer(recipe, root):
    optimizer = prepared(recipe, root, "optimizer.lr=0.002").optimizer
    assert (optimizer.kind, optimizer.lr) == ("adamw", 0.002)


def test_stopping_early_without_keeping_the_best_is_refused(recipe, root):
    with pytest.raises(ConfigError, match=r"train\.keep_best: 0, but early_stopping ends with the best checkpoint"):
        prepared(recipe, root, "early_stopping={patience: 2}", "train.keep_best=0", "train.eval_every_steps=2")


@pytest.mark.parametrize(
    ("override", "place", "problem"),
    [
        ("train.workers=3", "train.workers", "3 workers cannot share the 8 rows of a global batch equally"),
        ("train.workers={min: 1, max: 3}", "train.workers", "3 workers cannot share the 8 rows"),
        ("train.workers={min: 2, max: 1}", "train.workers", "max 1 is below min 2"),
        ("train.workers=0", "train.workers", "0 is no number of workers"),
        ("train.batch_tokens=500", "train.batch_tokens", "500 is not a multiple of context_tokens 64"),
        ("train.checkpoint_every_steps=0", "train.checkpoint_every_steps", "greater than or equal to 1"),
        ("train.eval_every_steps=0", "train.eval_every_steps", "greater than or equal to 1"),
        ("train.keep_last=0", "train.keep_last", "greater than or equal to 1"),
        ("train.ema_decay=1", "train.ema_decay", "less than 1"),
        ("train.precision=float8", "train.precision", "'bfloat16'"),
        ("optimizer={kind: adamw, lr: 0}", "optimizer.lr", "greater than 0"),
        ("model={preset: nano, vocab_size: 300}", "model.vocab_size", "300 tokens, the corpus's tokenizer has 257"),
        ("log_to=[tensorboards]", "log_to.0", "'wandb' or 'mlflow'"),
        ("early_stopping={patience: 2}", "early_stopping", "none but the last is asked for"),
        ("train.stepz=3", "train.stepz", "did you mean 'steps'"),
    ],
)
def test_a_mistake_in_a_recipe_is_refused_by_the_name_of_its_field(recipe, root, override, place, problem):
    with pytest.raises(ConfigError) as refused:
        prepared(recipe, root, override)
    assert refused.value.place == place
    assert problem in str(refused.value)
    assert not (root / "runs").exists()


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("train.keep_best=2", "train.keep_best"),
        ("train.eval_every_steps=2", "train.eval_every_steps"),
        ("early_stopping={patience: 2}", "early_stopping"),
    ],
)
def test_what_needs_held_out_text_is_refused_on_a_corpus_without_a_val_split(recipe, root, override, place):
    assert prepared(recipe, root, "corpus=blind").num_steps == 4  # keep_best has a default, which asks for nothing
    with pytest.raises(ConfigError, match="the corpus has no val split") as refused:
        prepared(recipe, root, "corpus=blind", override)
    assert refused.value.place == place


def test_weights_for_other_tokens_are_refused_though_their_number_is_the_same(recipe, root):
    train(prepared(recipe, root))
    for name, texts in (("abc", TEXTS), ("xyz", [text.replace("t", "z") for text in TEXTS])):
        alphabet = sorted(set("".join(texts)))
        written_corpus(root, {"train": texts, "val": texts}, name=name, tokenizer=char_tokenizer(alphabet))
    with pytest.raises(ConfigError, match=r"257 tokens, the corpus's tokenizer has") as refused:
        prepared(recipe, root, "corpus=abc", "init_from=a", "name=b")
    assert refused.value.place == "init_from"
    train(prepared(recipe, root, "corpus=abc", "name=c"))
    with pytest.raises(ConfigError, match="has another tokenizer than the corpus") as refused:
        prepared(recipe, root, "corpus=xyz", "init_from=c", "name=d")
    assert refused.value.place == "init_from"


def test_a_prompt_in_characters_that_the_corpus_lacks_is_refused(recipe, root):
    texts = ["abcabcabc" * 9] * 4
    written_corpus(root, {"train": texts, "val": texts}, name="letters", tokenizer=char_tokenizer(["a", "b", "c"]))
    with pytest.raises(ConfigError, match=r"^samples\.prompts\.1: .*Z.*a prompt in the characters of the corpus"):
        prepared(recipe, root, "corpus=letters", "samples.prompts=[a, Zac]")


def test_a_run_is_not_resumed_as_another_one_and_the_error_says_what_differs(recipe, root):
    train(prepared(recipe, root))
    for override, what in [
        ("model={preset: nano, num_layers: 2}", r"model.num_layers \(3, now 2\)"),
        ("train.seed=1", r"train.seed \(0, now 1\)"),
        ("optimizer={kind: adamw, lr: 0.001}", r"optimizer.lr \(0.004, now 0.001\)"),
    ]:
        with pytest.raises(ConfigError, match=rf"run 'a' exists with another {what}") as refused:
            prepared(recipe, root, override)
        assert refused.value.place == "name"


def test_a_precision_that_the_cpu_emulates_is_allowed_with_one_warning(recipe, root, monkeypatch, caplog):
    monkeypatch.setattr("ulm.runtime.has_fast_bfloat16", lambda where: False)
    for precision, warnings in [("float32", 0), ("auto", 0), ("float16", 1), ("bfloat16", 1), ("pure_bfloat16", 1)]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prepared(recipe, root, f"train.precision={precision}")
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == warnings
        assert all(f"{precision} is emulated by this CPU" in text for text in said)


def test_without_ray_more_than_one_worker_is_refused_and_a_range_that_allows_one_is_not(recipe, root):
    with pytest.raises(ConfigError, match="at least 2 workers are asked for, without Ray there is one") as refused:
        alone.run(load_recipe("train", recipe, ["train.workers=2"]), root=root, near=recipe.parent)
    assert refused.value.place == "train.workers"
    ranged = load_recipe("train", recipe, ["train.workers={min: 1, max: 2}"])
    assert alone.run(ranged, root=root, near=recipe.parent)["step"] == 4


def test_the_command_line_refuses_before_ray_starts(recipe, root):
    """Ray is made unimportable: an error that comes first cannot come from it."""
    script = "import sys; sys.modules['ray'] = None; from ulm.cli.main import main; main()"
    command = [sys.executable, "-c", script, "train", str(recipe), "--set", "train.workers=3"]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ULM_HOME": str(root)})
    assert found.returncode == 2
    assert "train.workers: 3 workers cannot share" in found.stderr
    assert not (root / "runs").exists()
