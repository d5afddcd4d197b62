"""docs/export.md is true: its table is what an export finds, its commands run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import ulm
from tests.page import Page
from ulm.cli.main import app
from ulm.exchange.hf import architectures, stock
from ulm.tokenizers.byte import byte_tokenizer

DOCS = Page.read("export.md")
BYTES = byte_tokenizer()
ROWS = [[cell.strip("`") for cell in row] for row in DOCS.tables("A Hugging Face folder")[0]]


@pytest.mark.parametrize(("architecture", "fields"), ROWS, ids=[row[0] for row in ROWS])
def test_the_plainest_spec_of_a_row_becomes_its_architecture(architecture, fields, nano):
    assert stock(nano(**yaml.safe_load(fields)))[0].name == architecture


def test_the_table_has_all_architectures_in_the_order_in_which_they_are_tried():
    kinds = {architecture.name for architecture in architectures()}
    assert {row[0] for row in ROWS} == kinds
    assert [row[0] for row in ROWS][0] == architectures()[0].name


def test_the_commands_run(nano, tmp_path, monkeypatch):
    monkeypatch.setenv("ULM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name, preset in (("first", "nano"), ("first-modern", {"preset": "modern", "size": "nano"})):
        spec = ulm.ModelSpec.parse(preset, vocab_size=BYTES.vocab_size, context_tokens=64)
        ulm.save(ulm.build(spec, seed=0), BYTES, tmp_path / "home" / "runs" / name / "step-00000001")
    commands = re.findall(r"^\$ ulm (.*)$", DOCS.text, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command))
        assert done.exit_code == 0, (command, done.output)
        json.loads(done.stdout.splitlines()[-1])
    assert Path("modern-hf/modeling_ulm.py").is_file() and not Path("first-hf/modeling_ulm.py").exists()
