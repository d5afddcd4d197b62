"""The README is true: its files are written and its commands run, in order, as a newcomer would."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
TIMEOUT_S = 300


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.timeout(900)
def test_every_command_of_the_tutorial_runs_in_order(tmp_path: Path) -> None:
    with socket.socket() as probe:  # the README's port may be taken here
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        "ULM_HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "no_proxy": "127.0.0.1",
    }
    for recipe in blocks("yaml"):
        name = re.match(r"# (\S+\.yaml)\n", recipe)
        assert name, recipe
        (tmp_path / name[1]).write_text(recipe.replace("8123", port))
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert sum(command.startswith("ulm ") for command in commands) >= 10
    outputs = {}
    try:
        for command in commands:
            found = subprocess.run(
                command.replace("8123", port),
                shell=True,
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
            assert found.returncode == 0, f"{command}\n{found.stdout}\n{found.stderr}"
            outputs[command] = found.stdout
    finally:
        subprocess.run(["ulm", "serve", "down"], env=environment, capture_output=True, timeout=TIMEOUT_S)
    last = {command: json.loads(out.splitlines()[-1]) for command, out in outputs.items() if out.strip()}
    assert last["ulm train train.yaml"]["step"] == 40
    assert last["ulm runs show first"]["step"] == 40
    assert last["ulm swarm train swarm.yaml"]["experts"] == 3
    completion = next(value for command, value in last.items() if "v1/completions" in command)
    assert completion["model"] == "swarm/mixture" and completion["ulm"]["calls"]
    assert (tmp_path / "first-hf" / "config.json").is_file()
