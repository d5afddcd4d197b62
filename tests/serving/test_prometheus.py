"""A swarm deployed as KubeRay does it, scraped by a real Prometheus with our files, asked what the dashboard asks."""

from __future__ import annotations

import json
import logging
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from tests.dashboard import panels
from tests.debian import program
from tests.served import free_port
from ulm.cli.main import app as cli
from ulm.swarm.manifest import Swarm

DEPLOY = Path(__file__).parents[2] / "deploy"
READY_S = 180.0
SCRAPED_S = 60.0
KEY_HINT = "# authorization: {credentials_file: /etc/prometheus/ulm-key}"
# What is empty while all goes well.
QUIET = {"Not as asked"}


@dataclass(frozen=True)
class Deployed:
    """Where the endpoint is, a key for all that it offers, and where Ray keeps its list of nodes."""

    url: str
    key: str
    session: str


@pytest.fixture(scope="module")
def deployed(swarm: Swarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """A swarm of echo members from the RayService's own config, its recipe and its address changed, under traffic."""
    import ray
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    program("prometheus", "usr/bin/prometheus")  # where there is none, nothing need be started
    service = yaml.safe_load((DEPLOY / "kuberay/rayservice.yaml").read_text(encoding="utf-8"))
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    small = {"members_per_engine": 4, "cpus": 0.5, "gateways": 1}
    config["applications"][0]["args"]["recipe"] |= {"swarm": str(swarm.folder), "engine": {"kind": "echo"}, **small}
    patched = pytest.MonkeyPatch()
    patched.setenv("ULM_HOME", str(tmp_path_factory.mktemp("home")))  # where the keys are; Ray's processes inherit it
    made = CliRunner().invoke(cli, ["keys", "create", "--name", "test", "--scope", "infer", "--scope", "admin"])
    key = json.loads(made.stdout.splitlines()[-1])["key"]
    quick = {"metrics_report_interval_ms": 500}
    started: dict[str, Any] = {"address": "local", "num_cpus": 2, "log_to_driver": False, "_system_config": quick}
    context = ray.init(**started, include_dashboard=True, logging_level=logging.ERROR)
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    ended = threading.Event()
    asking = threading.Thread(target=_ask, args=(url, key, ended))
    try:
        client = ServeSubmissionClient(f"http://{context.dashboard_url}")
        client.deploy_applications(config)
        _ready(url, client)
        asking.start()
        yield Deployed(url, key, context.address_info["session_dir"])
    finally:
        ended.set()
        if asking.ident is not None:
            asking.join()
        ray.shutdown()
        patched.undo()


def _ready(url: str, client: Any) -> None:
    """Returns once the endpoint says that every member is loaded."""
    deadline_s, application = time.monotonic() + READY_S, dict[str, Any]()
    while time.monotonic() < deadline_s and application.get("status") != "DEPLOY_FAILED":
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).json() == {"status": "ready"}:
                return
        except (httpx.HTTPError, ValueError):
            application = client.get_serve_details()["applications"].get("ulm", {})
        time.sleep(0.2)
    pytest.fail(f"the endpoint is not ready: {application.get('message')}")


def _ask(url: str, key: str, ended: threading.Event) -> None:
    """Requests of several kinds, one of them wrong, again and again."""
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=f"{url}/v1", headers=headers, trust_env=False) as client:
        while not ended.wait(0.1):
            for model in ("swarm/mixture", "swarm/route", "e00"):
                client.post("/completions", json={"model": model, "prompt": "def f(self)", "max_tokens": 8})
            client.post("/completions", json={"model": "e00", "prompt": "too long for it " * 100})


@contextmanager
def prometheus(folder: Path, file: str, replaced: dict[str, str]) -> Iterator[httpx.Client]:
    """A client of a Prometheus that runs with one of our files, some texts in it replaced."""
    text = (DEPLOY / "prometheus" / file).read_text(encoding="utf-8")
    for ours, here in {**replaced, "scrape_interval: 10s": "scrape_interval: 2s"}.items():
        assert ours in text, f"{file} has no {ours}"
        text = text.replace(ours, here)
    folder.mkdir()
    config, port = folder / file, free_port()
    config.write_text(text, encoding="utf-8")
    options = [
        f"--config.file={config}",
        f"--storage.tsdb.path={folder}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    command = [str(program("prometheus", "usr/bin/prometheus")), *options, "--log.level=warn"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            wait_for(lambda: client.get("/-/ready").is_success, "Prometheus is not ready")
            yield client
    finally:
        process.terminate()
        process.wait(timeout=30)


def asked(client: httpx.Client, query: str) -> list[Any]:
    """What Prometheus answers; an error of the query fails the test."""
    answer = client.get("/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", f"{query}: {answer}"
    return list(answer["data"]["result"])


def wait_for(happened: Callable[[], object], otherwise: str) -> None:
    """Returns once it has happened; a server that does not listen yet is waited for."""
    deadline_s = time.monotonic() + SCRAPED_S
    while time.monotonic() < deadline_s:
        with suppress(httpx.TransportError):
            if happened():
                return
        time.sleep(0.2)
    pytest.fail(f"{otherwise} within {SCRAPED_S} s")


def test_every_query_of_the_dashboard_is_answered_over_either_file(deployed: Deployed, tmp_path: Path) -> None:
    nodes = prometheus(tmp_path / "nodes", "prometheus.yml", {"/tmp/ray": deployed.session})
    (tmp_path / "key").write_text(deployed.key)
    with_key = {KEY_HINT: f"authorization: {{credentials_file: {tmp_path / 'key'}}}"}
    replaced = {"ulm:8000": deployed.url.removeprefix("http://"), **with_key}
    gateway = prometheus(tmp_path / "gateway", "endpoint.yml", replaced)
    with nodes as of_nodes, gateway as of_gateway:
        for client in (of_nodes, of_gateway):
            wait_for(partial(asked, client, "sum(rate(ray_ulm_swarm_calls_total[10s])) > 0"), "no rates of calls")
            # a target that is slow once, on a busy machine, counts as down at that scrape
            wait_for(partial(asked, client, "min(max_over_time(up[1m])) == 1"), "not every target answers")
            assert empty(client) <= QUIET
            outcomes = {result["metric"]["outcome"] for result in asked(client, "ray_ulm_requests_total")}
            assert outcomes >= {"ok", "refused"}


def empty(client: httpx.Client) -> set[str]:
    """The panels on traffic and swarm for which Prometheus has nothing; every panel's queries are asked."""
    found = set()
    for panel in panels():
        answers = [asked(client, query) for query in panel.queries("10s")]
        if panel.row in ("Now", "Traffic", "Swarm") and not all(answers):
            found.add(panel.title)
    return found


@pytest.mark.parametrize("file", ["prometheus.yml", "endpoint.yml"])
def test_promtool_finds_nothing_wrong_with_a_file(file: str) -> None:
    promtool = str(program("prometheus", "usr/bin/promtool"))
    command = [promtool, "check", "config", "--lint-fatal", str(DEPLOY / "prometheus" / file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
