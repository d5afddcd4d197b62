"""Training as a Ray job, as an operator submits it, on a real local cluster with its dashboard."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.written_corpus import write_corpus

CHECKOUT = Path(__file__).parents[2]
TRAIN = ["corpus=tiny", "train={steps: 3, batch_tokens: 256, context_tokens: 64}"]
TIMEOUT_S = 240
AGENT_TRIES = 30


@pytest.fixture
def dashboard(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster whose processes find our Python first."""
    import ray

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    write_corpus(root, [("a", "train", f"text number {i} of many. " * 20) for i in range(20)])
    for _ in range(3):
        context = ray.init(address="local", num_cpus=2, logging_level=logging.ERROR, log_to_driver=False)
        address = f"http://{context.dashboard_url}"
        try:
            if takes_jobs(address):
                yield address
                return
        finally:  # a cluster that stayed would fail every test after this one
            ray.shutdown()
    pytest.fail("no cluster took a job")


def takes_jobs(address: str) -> bool:
    """Whether the job agent comes up. All agents of a machine want one port, and one that is ending has it."""
    from ray.job_submission import JobSubmissionClient

    for _ in range(AGENT_TRIES):
        try:
            JobSubmissionClient(address).submit_job(entrypoint="true")
        except RuntimeError:
            time.sleep(1)
        else:
            return True
    return False


def run(*command: str) -> subprocess.CompletedProcess[str]:
    binaries = Path(sys.executable).parent
    return subprocess.run(
        [str(binaries / command[0]), *command[1:]], cwd=CHECKOUT, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def test_ray_job_submit_and_ulm_submit_train_and_show_in_the_dashboard(root: Path, dashboard: str) -> None:
    recipe = "pipelines/recipes/train-nano.yaml"
    sets = [part for value in (*TRAIN, "name=by-ray") for part in ("--set", value)]
    job = ("python", "-m", "pipelines.train.job", recipe, *sets)
    found = run("ray", "job", "submit", "--address", dashboard, "--working-dir", ".", "--", *job)
    assert found.returncode == 0, found.stdout + found.stderr
    sets = [part for value in (*TRAIN, "name=by-ulm") for part in ("--set", value)]
    found = run("ulm", "submit", "train", recipe, *sets, "--address", dashboard, "--wait")
    assert found.returncode == 0, found.stdout + found.stderr
    submitted = json.loads(found.stdout.splitlines()[-1])
    assert submitted["status"] == "SUCCEEDED"
    for name in ("by-ray", "by-ulm"):
        assert (root / "runs" / name / "step-00000003" / "manifest.json").is_file()
    page = httpx.get(f"{dashboard}/api/jobs/", headers=token(), trust_env=False)
    shown = {entry["submission_id"]: entry for entry in page.raise_for_status().json() if entry["submission_id"]}
    assert shown[submitted["job"]]["status"] == "SUCCEEDED"
    assert sum("pipelines.train.job" in entry["entrypoint"] for entry in shown.values()) == 2


@pytest.mark.slow  # make test cancels a run without Ray in test_runs_cli
def test_a_submitted_job_whose_run_is_cancelled_saves_and_ends_with_143(root: Path, dashboard: str) -> None:
    from ray.job_submission import JobSubmissionClient

    sets = ["corpus=tiny", "name=long", "train={steps: 1000000, batch_tokens: 256, context_tokens: 64, compile: false}"]
    words = [part for value in sets for part in ("--set", value)]
    found = run("ulm", "submit", "train", "pipelines/recipes/train-nano.yaml", *words, "--address", dashboard)
    assert found.returncode == 0, found.stdout + found.stderr
    job, client = json.loads(found.stdout.splitlines()[-1])["job"], JobSubmissionClient(dashboard)
    metrics = root / "runs" / "long" / "metrics.jsonl"
    while not metrics.is_file() or not metrics.read_text():
        assert not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
        time.sleep(0.5)
    found = run("ulm", "runs", "cancel", "long")
    assert found.returncode == 0, found.stderr
    cancelled = json.loads(found.stdout.splitlines()[-1])
    assert cancelled["status"] == "interrupted" and Path(cancelled["checkpoint"], "manifest.json").is_file()
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.5)
    assert client.get_job_info(job).driver_exit_code == 143
    assert json.loads(client.get_job_logs(job).splitlines()[-1])["status"] == "interrupted"


def token() -> dict[str, str]:
    """Ray's own token where it asks for one."""
    path = Path("~/.ray/auth_token").expanduser()
    return {"Authorization": f"Bearer {path.read_text().strip()}"} if path.is_file() else {}
