"""`ulm --help` is light, and the README names only verbs and options that there are."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from ulm.cli.main import app

ROOT = Path(__file__).parents[2]
HELP = """
import json, sys
from ulm.cli.main import main
sys.argv = ["ulm", "--help"]
try:
    main()
except SystemExit as ended:
    code = ended.code
print(json.dumps({"code": code, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def test_help_imports_neither_torch_nor_ray() -> None:
    found = subprocess.run(
        [sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    *shown, last = found.stdout.splitlines()
    report = json.loads(last)
    assert report["code"] == 0
    assert any("Usage" in line for line in shown)
    assert not {"torch", "ray", "transformers", "sklearn", "pyarrow", "vllm"} & set(report["modules"])


def readme_commands() -> list[str]:
    """Every `ulm …` of README's console and bash blocks, with lines that end in a backslash joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:console|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("ulm ")]


def options_of(line: str) -> tuple[Any, list[str]]:
    """The command that a line names, and the options that it passes."""
    _, *words = shlex.split(line, comments=True)
    command: Any = typer.main.get_command(app)
    while getattr(command, "commands", None) is not None:
        verb = words.pop(0)
        assert verb in command.commands, f"{line}: there is no {verb!r}, only {', '.join(command.commands)}"
        command = command.commands[verb]
    return command, [word.partition("=")[0] for word in words if word.startswith("--")]


def test_the_readme_shows_the_command_line() -> None:
    assert len(readme_commands()) >= 5


@pytest.mark.parametrize("line", readme_commands())
def test_a_command_of_the_readme_names_a_verb_and_its_options(line: str) -> None:
    command, passed = options_of(line)
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert set(passed) <= known


@pytest.mark.parametrize("line", ["ulm swarm fly swarm.yaml", "ulm trian train.yaml"])
def test_a_verb_that_is_not_there_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError, match="there is no"):
        options_of(line)
