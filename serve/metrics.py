"""The declared metrics as Ray's, and one page that gathers them from every node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import ray
from ray.util import metrics as ray_metrics

from ulm.metrics import EXPORTED, METRICS

GATHER_TIMEOUT_S = 5.0
_KINDS = {"counter": ray_metrics.Counter, "gauge": ray_metrics.Gauge, "histogram": ray_metrics.Histogram}


def recorder() -> Callable[[str, float, Mapping[str, str]], None]:
    """A function (metric, value, tags) that counts, sets or observes a metric declared in ulm/metrics.py."""
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        metric = METRICS[name]
        arguments: dict[str, Any] = {"description": metric.help, "tag_keys": metric.tags}
        if metric.kind == "histogram":
            arguments["boundaries"] = list(metric.buckets)
        return _KINDS[metric.kind](name.removesuffix("_total") if metric.kind == "counter" else name, **arguments)

    def record(name: str, value: float, tags: Mapping[str, str]) -> None:
        kind = METRICS[name].kind
        metric = made.get(name) or made.setdefault(name, make(name))
        if kind == "counter":
            if value > 0:
                metric.inc(value, tags=dict(tags))
        elif kind == "gauge":
            metric.set(value, tags=dict(tags))
        else:
            metric.observe(value, tags=dict(tags))

    return record


async def gather() -> str:
    """The µLM series of all nodes, in Prometheus' text format."""
    nodes = [n for n in ray.nodes() if n["Alive"] and n.get("MetricsExportPort")]
    async with httpx.AsyncClient(timeout=GATHER_TIMEOUT_S, trust_env=False) as client:
        urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
        pages = await asyncio.gather(*(client.get(url) for url in urls), return_exceptions=True)
    lines: dict[str, None] = {}  # a series stands once; HELP and TYPE lines repeat on every node
    for page in pages:
        if isinstance(page, httpx.Response):
            for line in page.text.splitlines():
                if f"{EXPORTED}ulm_" in line.split("{", 1)[0]:
                    lines.setdefault(line)
    return "\n".join(lines) + "\n"
