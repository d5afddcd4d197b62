"""Most requests that Schemathesis makes name a model that is there; by chance alone hardly any would."""

from __future__ import annotations

from typing import Any

import schemathesis

MODELS = ("e00", "swarm", "swarm/mixture", "swarm/broadcast")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """The same body for a model by turns of its size; one in five as it is."""
    if isinstance(body, dict) and "model" in body and (turn := len(str(body)) % 5):
        return {**body, "model": MODELS[turn - 1]}
    return body
