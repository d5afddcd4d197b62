"""The replica that runs a member by vLLM: an LLMServer of ray.serve.llm that is asked in token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer

from serve.engines.vllm.client import AsyncClient
from serve.engines.vllm.engine import Source, VllmEngine
from serve.engines.vllm.folder import together
from serve.engines.vllm.settings import BLOCK_TOKENS, Config
from serve.member import EngineCalls, report
from ulm import runtime
from ulm.errors import UlmError

HEALTH_PERIOD_S = 2.0  # three failures in a row start a replica anew; asking is a look at a flag
DRAIN_S = 60.0  # for answers under way when a replica ends
CARD_SHARE = 0.9  # of the part of a card that a replica has, which it may fill

# Of several members in one engine: what tells the model each request's weights, and the runner that it is made for.
MIXING = {"logits_processors": ["serve.engines.vllm.models.composite:MixtureWeights"]}
MIXING_ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}


class NothingToFetch(CallbackBase):  # type: ignore[misc]  # Ray is not typed
    """Says that there is nothing to fetch; else a process more imports vLLM to look for it."""

    async def on_before_node_init(self) -> None:
        """Called by ray.serve.llm's engine."""
        self.ctx.run_init_node = False


class FewerProcesses(VLLMEngine):  # type: ignore[misc]
    """ray.serve.llm's engine; on a CPU its one worker runs in the process of vLLM's scheduler.

    One of its own, as ray.serve.llm has it, takes 8 s more to start and 0.6 GB, and a hop for each step.
    """

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        if self.llm_config.accelerator_config.kind == "cpu":
            config.parallel_config.distributed_executor_backend = "uni"
        return arguments, frontend, config


class MemberServer(EngineCalls, LLMServer):  # type: ignore[misc]
    """One engine's members. `score` is our engine's, in token ids; ray.serve.llm's is for models that only score."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, llm_config: LLMConfig, checkpoints: dict[str, str], config: dict[str, Any], root: str
    ) -> None:
        settings = Config(**config)
        sources = {member: await asyncio.to_thread(Source.read, path) for member, path in checkpoints.items()}
        paths = {member: source.path for member, source in sources.items()}
        await asyncio.to_thread(together, paths, settings.dtype, Path(root))  # `ulm gc` may have been here
        try:
            await LLMServer.__init__(self, llm_config, engine_cls=FewerProcesses)
        except Exception as error:
            memory = f"its cache takes {settings.kv_cache_bytes:,} bytes"
            raise UlmError(f"{', '.join(checkpoints)}: vLLM did not start ({memory}): {error}") from error
        # ray.serve.llm has no public name for it: the AsyncLLM that its OpenAI methods ask, too.
        self._engine = VllmEngine(settings, sources, AsyncClient(self.engine._engine_client), Path(root))
        first, source = next(iter(sources.items()))
        await self._engine.next_logprobs(first, (source.tokenizer.eot_id,))  # the first one takes seconds
        self._reporting = asyncio.create_task(report(self._engine, "engine"))


def build(number: int, checkpoints: Mapping[str, Path], config: Config) -> Any:
    """The Serve application of an engine's members; `config` has nothing left open. Ray must be initialised."""
    root = runtime.root()
    paths = {member: str(path) for member, path in checkpoints.items()}
    given = {"checkpoints": paths, "config": config.model_dump(), "root": str(root)}
    llm_config = llm_config_of(number, tuple(checkpoints), together(checkpoints, config.dtype, root), config)
    return build_llm_deployment(llm_config, name_prefix="engine-", bind_kwargs=given, deployment_cls=MemberServer)


def llm_config_of(number: int, members: Sequence[str], folder: Path, config: Config) -> LLMConfig:
    """What ray.serve.llm is told, its defaults replaced that let everything wait and never scale."""
    return LLMConfig(
        model_loading_config={"model_id": "+".join(members), "model_source": str(folder)},
        accelerator_config={"kind": "gpu" if config.gpus else "cpu"},
        placement_group_config={"bundle_per_worker": _bundle(config)},
        engine_kwargs=engine_arguments(config) | (MIXING if len(members) > 1 else {}),
        runtime_env={"env_vars": _environment(config) | (MIXING_ENVIRONMENT if len(members) > 1 else {})},
        callback_config={"callback_class": NothingToFetch},
        experimental_configs={"stream_batching_interval_ms": 0},
        deployment_config={
            "name": str(number),
            "ray_actor_options": {"num_cpus": 0},  # the bundle's are added to it
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": config.max_replicas,
                "target_ongoing_requests": config.max_answers,
            },
            # The engine refuses what is too much before Serve does; Serve's own queue is for the time without replicas.
            "max_ongoing_requests": config.max_answers + config.max_waiting + 64,
            "max_queued_requests": config.max_waiting,
            "health_check_period_s": HEALTH_PERIOD_S,
            "graceful_shutdown_timeout_s": DRAIN_S,
        },
    )


def engine_arguments(config: Config) -> dict[str, Any]:
    """vLLM's engine arguments for settings with nothing left open."""
    return {
        "dtype": config.dtype,
        "max_model_len": config.context_tokens,
        "max_num_seqs": config.max_answers,
        "kv_cache_memory_bytes": config.kv_cache_bytes,
        "block_size": BLOCK_TOKENS,
        "enable_prefix_caching": True,
        "enforce_eager": config.is_eager,
        "tensor_parallel_size": config.tensor_parallel,
        "max_logprobs": -1,  # a mixture asks for the whole vocabulary
        "logprobs_mode": "raw_logprobs",
        "scheduling_policy": "priority",
        "generation_config": "vllm",  # requests say all themselves
        "structured_outputs_config": {"backend": "guidance"},  # the library of the local engine
        "worker_extension_cls": "serve.engines.vllm.worker.Reloading",
        # looked at when a card has less than that free, even though the cache has its own figure
        **({"gpu_memory_utilization": CARD_SHARE * min(1.0, config.gpus)} if config.gpus else {}),
    }


def _bundle(config: Config) -> dict[str, float]:
    """What Ray reserves for each of a replica's workers."""
    if not config.gpus:
        return {"CPU": config.cpus}
    return {"CPU": config.cpus / config.tensor_parallel, "GPU": min(1.0, config.gpus)}


def _environment(config: Config) -> dict[str, str]:
    """Of the replica and of vLLM's processes below it."""
    threads = str(max(1, int(config.cpus)))
    return {
        "VLLM_NO_USAGE_STATS": "1",  # nothing leaves the machine unasked
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": threads,
        # By default every engine binds its threads to the same first core, and leaves one idle.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
