"""The local engine: many members in one process, batched continuously, mixed exactly.

engine.py is the thread and the async surface around it; batch.py the steps, synchronous; answer.py and member.py what
they work on.
"""

from serve.engines.local.engine import LocalEngine

__all__ = ["LocalEngine"]
