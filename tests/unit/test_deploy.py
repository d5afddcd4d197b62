"""deploy/ is true to the code: what its files name is there, and a misspelt field in one of them is noticed."""

from __future__ import annotations

import copy
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser as promql
import pydantic
import pytest
import ray
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from serve import app as serve_app
from serve import proxy
from serve.api.openai import build_app
from serve.graph import NAME
from tests.dashboard import Panel, board, panels
from tests.page import Page
from tests.small_members import small_member
from ulm.cli.jobs import MODULES
from ulm.cli.main import app as cli
from ulm.errors import ConfigError
from ulm.metrics import EXPORTED, METRICS
from ulm.recipes import RECIPES
from ulm.recipes.base import validate
from ulm.recipes.serve import ServeRecipe

CHECKOUT = Path(__file__).parents[2]
DEPLOY = CHECKOUT / "deploy"
PAGE = Page.read("operations.md")
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text(encoding="utf-8"))


def text_of(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def served_paths() -> set[str]:
    async def metrics() -> str:
        return ""

    nothing: Any = None  # the paths are there whatever is served
    return set(build_app(nothing, lambda *_: None, metrics).openapi()["paths"])


# ---- the image


def instructions() -> list[tuple[str, str]]:
    """(FROM, …) of the Dockerfile, lines that go on put together."""
    lines = [line for line in text_of("Dockerfile").splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in whole.splitlines() if line.strip()]


def copied() -> list[str]:
    """What the image takes from the checkout."""
    found = [shlex.split(rest)[:-1] for kind, rest in instructions() if kind == "COPY" and "--from=" not in rest]
    return [name for names in found for name in names]


def test_every_stage_of_the_image_stands_on_one_that_is_there_for_both_engines() -> None:
    known: set[str] = set()
    for rest in (rest for kind, rest in instructions() if kind == "FROM"):
        base, _, name = rest.split()
        for engine in ("cpu", "cuda"):
            filled = base.replace("${ENGINE}", engine)
            assert filled in known or filled == "python:${PYTHON}-slim-bookworm"
        known.add(name)
    arguments = dict(rest.partition("=")[::2] for kind, rest in instructions() if kind == "ARG")
    assert set(re.findall(r"\$\{([A-Z]+)\}", text_of("Dockerfile"))) == set(arguments) == {"ENGINE", "PYTHON"}
    minimum = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["requires-python"]
    first = next(rest for kind, rest in instructions() if rest.startswith("PYTHON="))
    assert first.removeprefix("PYTHON=") == minimum.removeprefix(">=")  # for which the constraints were resolved


def test_the_image_runs_as_a_user_by_number_and_asks_a_path_that_is_served() -> None:
    kinds = [kind for kind, _ in instructions()]
    user = next(rest for kind, rest in instructions() if kind == "USER")
    assert user.isdecimal() and int(user) > 0 and f"useradd --uid {user} " in text_of("Dockerfile")
    assert kinds.count("USER") == 1 and "RUN" not in kinds[kinds.index("USER") :]
    health = next(rest for kind, rest in instructions() if kind == "HEALTHCHECK")
    (port, path), *_ = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", health)
    assert path in served_paths() and int(port) == ServeRecipe.model_fields["port"].default
    (volume,) = (rest for kind, rest in instructions() if kind == "VOLUME")
    assert f"ULM_HOME={volume} " in text_of("Dockerfile")


def test_the_image_has_the_versions_that_make_setup_installs() -> None:
    pinned = re.findall(r"[\w-]+==[\d.]+", text_of("Dockerfile"))
    assert len(pinned) == 2 and all(pin in (CHECKOUT / "Makefile").read_text() for pin in pinned)
    extras = {name for value in re.findall(r"EXTRAS=(\S+)", text_of("Dockerfile")) for name in value.split(",")}
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    assert extras < set(project["project"]["optional-dependencies"])
    setuptools = next(line for line in project["build-system"]["requires"] if line.startswith("setuptools"))
    assert f'"{setuptools}"' in text_of("Dockerfile")


def test_what_the_image_copies_makes_a_package_with_every_file(tmp_path: Path) -> None:
    allowed = {line[1:] for line in text_of("Dockerfile.dockerignore").splitlines() if line.startswith("!")}
    assert set(copied()) == allowed
    for name in copied():
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (tmp_path / "src").mkdir(exist_ok=True)
            shutil.copy(source, tmp_path / "src" / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check", "-w", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(tmp_path / "src")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    packages = [CHECKOUT / name for name in ("ulm", "pipelines", "serve")]
    files = {file.relative_to(CHECKOUT).as_posix() for package in packages for file in package.rglob("*.*")}
    assert {name for name in files if "__pycache__" not in name} <= packed


# ---- compose and systemd


def test_compose_mounts_files_that_are_there_and_opens_ports_to_this_machine_alone() -> None:
    services = yaml.safe_load(text_of("compose.yaml"))["services"]
    assert set(services) == {"ulm", "prometheus", "grafana"}
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert ":latest" not in service["image"] and ":" in service["image"]
        for source in (volume.split(":")[0] for volume in service["volumes"]):
            assert not source.startswith("./") or (DEPLOY / source).exists(), source
    build = services["ulm"]["build"]
    assert (DEPLOY / build["context"]).resolve() == CHECKOUT and (CHECKOUT / build["dockerfile"]).is_file()
    assert set(build["args"]) <= {rest.partition("=")[0] for kind, rest in instructions() if kind == "ARG"}
    (config,) = (word for word in services["prometheus"]["command"] if word.startswith("--config.file="))
    assert (DEPLOY / "prometheus" / config.rpartition("/")[2]).is_file()


def test_the_recipe_of_compose_and_systemd_is_one() -> None:
    assert validate(ServeRecipe, {"name": "serve", **yaml.safe_load(text_of("serve.yaml"))}).swarm == "demo"
    commands = [words.split() for words in re.findall(r"^Exec\w+=(.*)$", text_of("ulm.service"), re.MULTILINE)]
    assert [words[1:3] for words in commands] == [["serve", "up"], ["serve", "update"]]
    for _, *verb, recipe in commands:
        assert recipe == "/etc/ulm/serve.yaml" and CliRunner().invoke(cli, [*verb, "--help"]).exit_code == 0


def test_who_ends_the_endpoint_waits_for_longer_than_it_drains() -> None:
    drain_s = ServeRecipe.model_fields["drain_s"].default
    (unit_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", text_of("ulm.service"), re.MULTILINE)
    compose_s = yaml.safe_load(text_of("compose.yaml"))["services"]["ulm"]["stop_grace_period"].removesuffix("s")
    assert min(int(unit_s), int(compose_s)) > drain_s


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    unit = tmp_path / "ulm.service"
    unit.write_text(re.sub(r"^(Exec\w+)=\S+", r"\1=/bin/true", text_of("ulm.service"), flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "ulm.service" in line]) == (0, [])


# ---- KubeRay


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted((DEPLOY / "kuberay").glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
            yield f"{file.stem}-{document['kind']}", document


MANIFESTS = dict(manifests())
SERVICE, JOB = MANIFESTS["rayservice-RayService"], MANIFESTS["rayjob-RayJob"]
CLUSTERS = {"service": SERVICE["spec"]["rayClusterConfig"], "job": JOB["spec"]["rayClusterSpec"]}


@cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    """Of the manifests of a kind."""
    return jsonschema.Draft202012Validator({"$defs": SCHEMA["$defs"], "$ref": f"#/$defs/{kind}"})


def templates(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_keeps_to_the_schema_of_its_kind(name: str) -> None:
    validator(MANIFESTS[name]["kind"]).validate(MANIFESTS[name])


@pytest.mark.parametrize("name", ["rayservice-RayService", "rayjob-RayJob"])
def test_a_misspelt_field_anywhere_in_a_manifest_is_refused(name: str) -> None:
    free = {"data", "rayStartParams"}  # whose keys are anything

    def broken(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, below in inner:
            if isinstance(key, str) and not free & set(place):
                yield (*place, key)
            yield from broken(below, (*place, key))

    places = list(broken(MANIFESTS[name]))
    assert len(places) > 100
    for *above, key in places:
        document = copy.deepcopy(MANIFESTS[name])
        inside: Any = document
        for step in above:
            inside = inside[step]
        inside[f"{key}s"] = inside.pop(key)
        with pytest.raises(jsonschema.ValidationError):
            validator(MANIFESTS[name]["kind"]).validate(document)


@pytest.mark.parametrize("name", CLUSTERS)
def test_pods_run_as_the_images_user_with_bounds_and_the_home_that_they_share(name: str) -> None:
    cluster = CLUSTERS[name]
    assert cluster["rayVersion"] == ray.__version__ and cluster["authOptions"] == {"mode": "token"}
    user = int(next(rest for kind, rest in instructions() if kind == "USER"))
    claim = MANIFESTS["storage-PersistentVolumeClaim"]["metadata"]["name"]
    (home,) = (rest for kind, rest in instructions() if kind == "VOLUME")
    for pod in templates(cluster):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == user
        assert [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if v["name"] == "home"] == [claim]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} == set(container["resources"]["limits"])
            assert {"name": "home", "mountPath": home} in container["volumeMounts"]
            assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
            assert all("value" not in variable for variable in container.get("env", []))  # secrets are in Secrets


def test_requests_come_to_pods_that_are_ready_and_no_pod_ends_for_a_member_that_loads() -> None:
    head, worker = (pod["containers"][0] for pod in templates(CLUSTERS["service"]))
    assert worker["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": 8000} and "/readyz" in served_paths()
    ray_says = {"path": "/api/healthz", "port": 52365}
    assert [probe["httpGet"] for probe in (head["readinessProbe"], head["livenessProbe"], worker["livenessProbe"])] == [
        ray_says
    ] * 3


def serve_config() -> dict[str, Any]:
    return dict(yaml.safe_load(SERVICE["spec"]["serveConfigV2"]))


def test_serves_config_is_what_serve_deploys() -> None:
    config = serve_config()
    (application,) = ServeDeploySchema.model_validate(config).applications
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is serve_app.from_recipe
    assert application.name == NAME and config["http_options"]["port"] == 8000
    recipe = validate(ServeRecipe, {"name": "x", **application.args["recipe"]})
    (workers,) = CLUSTERS["service"]["workerGroupSpecs"]
    cpus = float(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert recipe.cpus <= cpus * workers["replicas"]
    middlewares = f"{proxy.__name__}.{proxy.middlewares.__name__}"
    assert config["controller_options"] == {"runtime_env": {"env_vars": {proxy.VARIABLE: middlewares}}}
    config["applications"][0]["import_paths"] = config["applications"][0].pop("import_path")
    with pytest.raises(pydantic.ValidationError, match="import_path"):
        ServeDeploySchema.model_validate(config)


def test_the_job_runs_recipes_that_are_ones_by_modules_that_are_there() -> None:
    recipes = MANIFESTS["rayjob-ConfigMap"]["data"]
    modules = {module: verb for verb, module in MODULES.items()}
    words = [shlex.split(command) for command in JOB["spec"]["entrypoint"].split("&&")]
    assert [word[:2] for word in words] == [["python", "-m"]] * 2
    names = set()
    for _, _, module, path in words:
        folder, _, file = path.rpartition("/")
        recipe = RECIPES[modules[module]](**yaml.safe_load(recipes[file]))
        names.add(recipe.name)
        for pod in templates(CLUSTERS["job"]):
            assert folder in {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert names == {serve_config()["applications"][0]["args"]["recipe"]["swarm"]}  # which the service serves


# ---- serve.app:from_recipe


def test_an_application_is_built_of_a_recipe_or_of_its_path(tmp_path: Path) -> None:
    (tmp_path / "members").mkdir()
    checkpoint = small_member(tmp_path / "members")
    recipe = {"members": {"a": {"checkpoint": str(checkpoint)}}, "engine": {"kind": "echo"}, "keys": False}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    for given in (recipe, str(tmp_path / "mine.yaml")):
        built = serve_app.from_recipe({"recipe": given})
        assert built.__class__.__name__ == "Application" and built._bound_deployment.name == "Gateway"


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({}, "args: has nothing ({recipe: a path, or a mapping})"),
        ({"recipe": 3}, "args: has recipe ({recipe: a path, or a mapping})"),
        ({"recipe": {}, "recipes": {}}, "args: has recipe, recipes ({recipe: a path, or a mapping})"),
        ({"recipe": "/no/such.yaml"}, "/no/such.yaml: no such recipe (the path of a YAML file)"),
        ({"recipe": {"swam": "x"}}, "swam: "),
        ({"recipe": {"swarm": "x"}}, "keys: 0.0.0.0 can be reached from other machines"),
        ({"recipe": {"swarm": "x", "host": "127.0.0.1"}}, "keys: 0.0.0.0 can be reached from other machines"),
    ],
)
def test_arguments_that_are_no_recipe_are_refused(args: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(problem)}"):
        serve_app.from_recipe(args)


# ---- Prometheus and Grafana


def test_prometheus_looks_where_ray_lists_its_nodes_and_where_the_endpoint_has_its_metrics() -> None:
    (nodes,) = yaml.safe_load(text_of("prometheus/prometheus.yml"))["scrape_configs"]
    assert nodes["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]
    (gateway,) = yaml.safe_load(text_of("prometheus/endpoint.yml"))["scrape_configs"]
    assert gateway.get("metrics_path", "/metrics") in served_paths()
    (target,) = gateway["static_configs"][0]["targets"]
    assert target.split(":")[0] in yaml.safe_load(text_of("compose.yaml"))["services"]


def test_grafana_is_given_the_datasource_and_the_dashboard_that_compose_mounts() -> None:
    grafana = yaml.safe_load(text_of("compose.yaml"))["services"]["grafana"]
    (source,) = yaml.safe_load(text_of("grafana/provisioning/datasources/prometheus.yml"))["datasources"]
    assert source["url"].removeprefix("$") in grafana["environment"] and source["isDefault"]
    (provider,) = yaml.safe_load(text_of("grafana/provisioning/dashboards/ulm.yml"))["providers"]
    mounted = [volume.split(":")[1] for volume in grafana["volumes"]]
    assert f"{provider['options']['path']}/dashboard.json" in mounted
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in mounted


def selectors(expression: Any, within: tuple[str, ...] = ()) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Every metric that a query selects, with the functions and aggregations around it, the outermost first."""
    match expression:
        case promql.VectorSelector():
            yield expression, within
        case promql.MatrixSelector():
            yield from selectors(expression.vector_selector, within)
        case promql.Call():
            for argument in expression.args:
                yield from selectors(argument, (*within, expression.func.name))
        case promql.AggregateExpr():
            yield from selectors(expression.expr, (*within, str(expression.op)))
        case promql.BinaryExpr():
            yield from selectors(expression.lhs, within)
            yield from selectors(expression.rhs, within)
        case promql.ParenExpr():
            yield from selectors(expression.expr, within)


def declared(name: str) -> tuple[Any, set[str]]:
    """The metric of an exported name, and its labels; KeyError for one that nobody declares."""
    own = name.removeprefix(EXPORTED)
    assert own != name, name
    if own.endswith("_bucket"):
        metric = METRICS[own.removesuffix("_bucket")]
        assert metric.kind == "histogram", name
        return metric, {*metric.tags, "le"}
    return METRICS[own], set(METRICS[own].tags)


def queried() -> list[Any]:
    return [pytest.param(panel, id=f"{panel.row}: {panel.title}") for panel in panels()]


@pytest.mark.parametrize("panel", queried())
def test_a_panel_asks_for_declared_metrics_by_labels_that_they_have(panel: Panel) -> None:
    for query, target in zip(panel.queries(), panel.targets, strict=True):
        assert "$" not in query
        tree = promql.parse(query)
        found = list(selectors(tree))
        assert found
        labels = set.intersection(*(declared(selector.name)[1] for selector, _ in found))
        for selector, within in found:
            metric, own = declared(selector.name)
            assert {matcher.name for matcher in selector.matchers.matchers} <= own
            if metric.kind == "gauge":
                assert "rate" not in within
            else:  # sums of counters would fall when a process ends
                assert "rate" in within or within == ("max",)
            assert ("le" in own) == ("histogram_quantile" in within)
        grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")}
        assert grouped <= labels
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == grouped - {"le"}


@pytest.mark.parametrize("panel", queried())
def test_a_panel_says_what_it_shows_and_in_which_unit(panel: Panel) -> None:
    assert panel.fields["description"].endswith(".") and panel.fields["fieldConfig"]["defaults"]["unit"]
    assert panel.fields["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({target["refId"] for target in panel.targets}) == len(panel.targets)


def test_panels_fill_the_width_and_none_lies_on_another() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in board()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & set(taken), f"{panel['title']} lies on {taken[next(iter(cells & set(taken)))]}"
        taken |= dict.fromkeys(cells, panel["title"])
    height = max(y for _, y in taken) + 1
    assert set(taken) == {(x, y) for x in range(24) for y in range(height)}
    ids = [panel["id"] for panel in board()["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_lists_of_the_dashboard_are_of_labels_that_metrics_have() -> None:
    lists = [variable for variable in board()["templating"]["list"] if variable["type"] == "query"]
    assert {variable["name"] for variable in lists} == {"model", "run"}
    for variable in lists:
        ((name, label),) = re.findall(r"^label_values\((\w+), (\w+)\)$", variable["query"]["query"])
        assert label == variable["name"] and label in declared(name)[1]


# ---- docs/operations.md and deploy/README.md


def test_the_page_and_the_table_name_files_that_are_there_and_none_is_left_out() -> None:
    told = set(re.findall(r"\bdeploy/[\w/.-]*\w", PAGE.text)) - {"deploy/README.md"}
    assert [name for name in told if not (CHECKOUT / name).exists()] == []
    listed = {name for name in re.findall(r"`([\w/.]+)`", text_of("README.md")) if (DEPLOY / name).exists()}
    files = {file.relative_to(DEPLOY).as_posix() for file in DEPLOY.rglob("*") if file.is_file()}
    covered = {name for name in files if any(name.startswith(one) for one in listed)}
    assert files - covered == {"README.md"}


def test_the_page_s_metrics_labels_and_application_are_those_of_the_code() -> None:
    (*_, rows) = PAGE.tables("Watching")
    for figure, _ in rows:
        name, *label = re.findall(r"`(\w+)(?:=\"\w+\")?`", figure)
        assert set(label) <= declared(name)[1]
    (config,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.text, re.DOTALL | re.MULTILINE)
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(config)).applications
    assert application.import_path == serve_config()["applications"][0]["import_path"]
    assert validate(ServeRecipe, {"name": "x", **application.args["recipe"]}).keys


def test_the_commands_of_the_page_are_ones() -> None:
    for verb in ("keys create", "serve up", "demo"):
        assert CliRunner().invoke(cli, [*verb.split(), "--help"]).exit_code == 0
    applied = re.findall(r"kubectl apply -f (\S+)", PAGE.text)
    assert {Path(name).name for name in applied} == {file.name for file in (DEPLOY / "kuberay").glob("*.yaml")}
