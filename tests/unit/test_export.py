"""One call exports a checkpoint: the card tells what is known, rounding is measured on text that was held back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ulm
from tests.written_corpus import write_kinds
from ulm.checkpoints import store
from ulm.cli.main import app
from ulm.corpus.manifest import Corpus
from ulm.errors import ConfigError, UnsupportedError
from ulm.exchange.export import export


def checkpoint(root: Path, **fields: object) -> Path:
    """An untrained model of a corpus that is there."""
    write_kinds(root)
    corpus = Corpus.open("tiny", root=root)
    sizes = {"vocab_size": corpus.tokenizer.vocab_size, "context_tokens": 64, "num_layers": 1}
    model = ulm.build(ulm.ModelSpec.preset("nano", **sizes, **fields), seed=0)
    place = root / "runs" / "t" / "step-00000007"
    return store.write(store.snapshot(model, corpus.tokenizer, step=7, run="t", corpus_digest=corpus.digest), place)


def test_what_rounding_costs_is_measured_on_the_corpus_own_held_out_text(tmp_path):
    found = export(checkpoint(tmp_path), tmp_path / "out", root=tmp_path, scheme="w8a8", licence="mit")
    assert found.change is not None and found.notes == ()
    corpus = Corpus.open("tiny", root=tmp_path)
    splits = corpus.documents["split"].to_pylist()
    held_out = [corpus.document_text(row) for row, split in enumerate(splits) if split in ("val", "test")]
    assert found.change.text_bytes == sum(len(text.encode()) for text in held_out) > 0
    assert found.change.bits_per_byte == pytest.approx(found.change.rounded_bits_per_byte, abs=0.05)
    assert found.change.bits_per_byte != found.change.rounded_bits_per_byte
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{found.change.rounded_bits_per_byte:.4f} after" in card and "license: mit" in card
    assert corpus.digest[:12] in card
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_the_command_rounds_and_says_what_it_cost(tmp_path, monkeypatch, scheme):
    monkeypatch.setenv("ULM_HOME", str(tmp_path))
    of = checkpoint(tmp_path)
    done = CliRunner().invoke(app, ["export", str(of), str(tmp_path / "out"), "--quantize", scheme])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["format"] == "hf" and said["bits_per_byte"]["before"] != said["bits_per_byte"]["after"]
    assert scheme in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for file in (tmp_path / "out").iterdir():
        assert file.stat().st_mode & 0o777 == 0o644, f"{file.name}: others may read it, too"


def test_a_target_that_ends_in_gguf_is_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("ULM_HOME", str(tmp_path))
    of = checkpoint(tmp_path)
    done = CliRunner().invoke(app, ["export", str(of), str(tmp_path / "a.gguf"), "--dtype", "q8_0"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["format"] == "gguf" and (tmp_path / "a.gguf").is_file()


def test_a_spec_of_no_stock_architecture_is_told_what_runs_it(tmp_path):
    found = export(checkpoint(tmp_path, position="t5"), tmp_path / "out", root=tmp_path)
    assert (found.format, found.architecture) == ("own", "UlmForCausalLM")
    assert "the folder brings its own modelling code" in found.notes[0]
    assert found.notes[1].startswith("vLLM cannot run it, our own engine can: position t5")
    with pytest.raises(UnsupportedError, match="no stock architecture"):
        export(tmp_path / "runs" / "t" / "step-00000007", tmp_path / "other", root=tmp_path, scheme="w8a8")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".export-*"))


def test_options_that_do_not_go_together_and_a_taken_place_are_refused(tmp_path):
    of = checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="quantize: w8a8 is of Hugging Face folders"):
        export(of, tmp_path / "a.gguf", root=tmp_path, to="gguf", scheme="w8a8")
    with pytest.raises(ConfigError, match="dtype: q8_0 is of files for llama.cpp .--to gguf"):
        export(of, tmp_path / "a", root=tmp_path, dtype="q8_0")
    with pytest.raises(ConfigError, match="already exists"):
        export(of, tmp_path / "runs", root=tmp_path)
