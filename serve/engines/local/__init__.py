"""The local engine: many members in one process, batched continuously, mixed exactly.

A request's way: engine.py (the async surface, and the thread that owns the models) → scheduler.py (whose tokens are run
in a step) → a runner: stack.py (members of one spec in one model, keys and values in pages) or rows.py (layers that
remember in other ways) → sampler.py (a token for everybody) → back as chunks. answer.py is a request under way;
flat.py a step's tokens; pages.py which page holds what; matrix.py and paged.py weights and pages as the kernels read
them, or plain torch without; kernels/ the C++.
"""

from serve.engines.local.engine import LocalEngine

__all__ = ["LocalEngine"]
