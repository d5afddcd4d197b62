"""Every metric of the project, declared once: name, kind, tags, help. The edges make them for Ray to export.

On a node's metrics port Ray prefixes each name with `ray_`; the gateway's /metrics gathers them from all nodes. Ray
ends a counter's exported name in `_total` by itself, so an edge hands it the name without that ending.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric as it is queried. `buckets` are upper bounds, of a histogram. Ray takes help in ASCII alone."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    tags: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_TABLE = (
    # training; `model` is d_model x layers
    Metric("ulm_train_tokens_total", "counter", ("run", "model"), "Targets trained on."),
    Metric("ulm_train_tokens_per_second", "gauge", ("run", "model"), "Targets per second, newest step, all workers."),
    Metric("ulm_train_loss", "gauge", ("run", "model"), "Nats per target of the newest step."),
    Metric("ulm_train_bits_per_byte", "gauge", ("run", "model"), "Of held-out text, at the newest evaluation."),
    Metric("ulm_train_val_loss", "gauge", ("run", "model"), "Nats per held-out target, at the newest evaluation."),
    Metric("ulm_train_step", "gauge", ("run", "model"), "Updates made."),
    Metric("ulm_train_mfu", "gauge", ("run", "model"), "Share of the devices' peak, newest step, 0 to 1."),
    Metric("ulm_train_learning_rate", "gauge", ("run", "model"), "Of the newest step."),
    Metric("ulm_train_grad_norm", "gauge", ("run", "model"), "Before clipping, of the newest step."),
    Metric("ulm_train_data_wait_seconds_total", "counter", ("run", "model"), "Time the first worker waited for data."),
    Metric("ulm_train_events_total", "counter", ("run", "model", "kind"), "Rollbacks, restarts and the like in all."),
    # the queue of a swarm's runs, of its driver
    Metric("ulm_queue_tasks", "gauge", ("swarm", "state"), "Runs that are waiting, running, done, failed or stopped."),
    Metric("ulm_queue_workers", "gauge", ("swarm", "state"), "Workers that are busy or idle."),
    # serving; `strategy` is the path's name where none is asked, `outcome` is ok, refused, failed or cancelled
    Metric("ulm_requests_total", "counter", ("model", "strategy", "outcome"), "Requests that ended."),
    Metric("ulm_request_seconds", "histogram", ("model", "strategy"), "Arrival to last byte.", _SECONDS),
    Metric(
        "ulm_requests_refused_total", "counter", ("why",), "Sent away; why is gateway_full, quota, invalid or such."
    ),
    Metric("ulm_retries_total", "counter", ("member",), "Calls that another replica of a member's engine took over."),
    Metric("ulm_ttft_seconds", "histogram", ("model", "strategy"), "Arrival to first token.", _SECONDS),
    Metric("ulm_tokens_total", "counter", ("model", "kind"), "Tokens served; kind is prompt or generated."),
    Metric("ulm_generated_tokens_per_second", "gauge", ("model",), "Tokens generated per second, lately."),
    Metric("ulm_swarm_calls_total", "counter", ("strategy", "member", "why"), "Calls of members; why is one of few."),
    Metric("ulm_swarm_call_tokens_total", "counter", ("strategy", "member"), "Tokens that members generated."),
    Metric("ulm_swarm_degraded_total", "counter", ("strategy", "why"), "What was not done as asked; why is one word."),
    Metric("ulm_member_weight", "gauge", ("member",), "Share of a member in the newest answer, 0 to 1."),
    # an engine, by the role of its process: engine, or gateway where it is inside
    Metric("ulm_engine_answers", "gauge", ("role", "state"), "Answers under way; state is running or waiting."),
    Metric("ulm_engine_weight_bytes", "gauge", ("role",), "Memory of the members' weights."),
    Metric("ulm_engine_kv_cache_bytes", "gauge", ("role", "kind"), "Of keys, values, states; kind is used or total."),
    Metric("ulm_engine_preemptions_total", "counter", ("role",), "Answers that gave their memory to earlier ones."),
    Metric("ulm_engine_prompt_tokens_total", "counter", ("role", "kind"), "Of prompts; kind is all, or shared: known."),
    # every process; `role` is trainer, engine, gateway …
    Metric("ulm_memory_resident_bytes", "gauge", ("role",), "Resident memory of a process."),
    Metric("ulm_memory_gpu_bytes", "gauge", ("role",), "GPU memory allocated by a process."),
)
EXPORTED = "ray_"  # before each name, where it is exported
METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}
