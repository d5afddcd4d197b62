"""The local engine: many members in one process, batched continuously, mixed exactly.

batch.py is the arithmetic (rows, steps, mixtures; synchronous), engine.py the thread and the async surface around it.
"""

from serve.engines.local.engine import LocalEngine

__all__ = ["LocalEngine"]
