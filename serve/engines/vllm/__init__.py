"""vLLM as an engine: one member a deployment of `ray.serve.llm`, beside members of other engines.

A request's way: server.py (the replica, an LLMServer of ray.serve.llm) → engine.py (our Engine: token ids in and out) →
arguments.py (what vLLM is asked for) → client.py (vLLM itself) → back as chunks. settings.py is what a recipe says and
what memory that takes; folder.py what vLLM reads; worker.py how its workers change weights; models/ our own
architecture on vLLM's layers. Only server.py imports Ray, and only functions of client.py and worker.py import vLLM.
"""

from serve.engines.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]
