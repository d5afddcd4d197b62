"""`ulm status`: figures from a page of metrics, and a view that fits a narrow terminal."""

from __future__ import annotations

import io
import json

from rich.console import Console
from typer.testing import CliRunner

from ulm.cli import status
from ulm.cli.main import app

PAGE = """# TYPE ray_ulm_requests_total counter
ray_ulm_requests_total{model="swarm/mixture",strategy="mixture",outcome="ok",NodeAddress="a"} 7.0
ray_ulm_requests_total{model="swarm/mixture",strategy="mixture",outcome="refused",NodeAddress="a"} 2.0
ray_ulm_requests_total{model="swarm/mixture",strategy="mixture",outcome="ok",NodeAddress="b"} 3.0
# TYPE ray_ulm_tokens_total counter
ray_ulm_tokens_total{model="swarm/mixture",kind="generated"} 640.0
# TYPE ray_ulm_ttft_seconds histogram
ray_ulm_ttft_seconds_bucket{model="swarm/mixture",strategy="mixture",le="+Inf"} 10.0
ray_ulm_ttft_seconds_count{model="swarm/mixture",strategy="mixture"} 10.0
ray_ulm_ttft_seconds_sum{model="swarm/mixture",strategy="mixture"} 0.45
# TYPE ray_ulm_engine_kv_cache_bytes gauge
ray_ulm_engine_kv_cache_bytes{role="gateway",kind="used"} 2.5e7
ray_ulm_engine_kv_cache_bytes{role="gateway",kind="total"} 1e8
# TYPE ray_ulm_engine_answers gauge
ray_ulm_engine_answers{role="gateway",state="running"} 4.0
# TYPE ray_ulm_member_weight gauge
ray_ulm_member_weight{member="e00"} 0.25
ray_ulm_member_weight{member="e01"} 0.75
"""


def shown(found: dict[str, object], width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(status.view(found))
    return file.getvalue()


def test_counts_of_all_nodes_are_added_and_fit_80_columns():
    found = status.figures(status.series(PAGE))
    of = found["models"]["swarm/mixture"]
    assert (of["ok"], of["refused"], of["generated_tokens"]) == (10.0, 2.0, 640.0)
    text = shown({"endpoint": {"url": "http://x/v1", "pid": 1, "problem": None, **found}, "runs": []})
    assert "swarm/mixture  10       2" in text and "45 ms" in text and "25% of 100 MB" in text
    assert "e01 0.75, e00 0.25" in text and max(map(len, text.splitlines())) <= 80


def test_an_endpoint_that_does_not_answer_and_one_that_nobody_asked_say_so():
    dead = {"url": "http://x/v1", "pid": 1, "problem": "does not answer: refused", **status.figures({})}
    text = shown({"endpoint": dead, "runs": []})
    assert "does not answer: refused" in text and "nobody has asked yet" not in text
    text = shown({"endpoint": {**dead, "problem": None}, "runs": []})
    assert "nobody has asked yet" in text


def test_where_nothing_is_up_it_says_how_to_begin(root):
    done = CliRunner().invoke(app, ["status"])
    assert done.exit_code == 0 and "ulm serve up" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"endpoint": None, "runs": []}
