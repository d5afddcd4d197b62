"""The reference of a kind, found by name: `ulm/reference/<slot>.py` holds one function for each kind of the slot."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, util
from typing import Any

from ulm.errors import UnknownKindError


def reference(slot: str, kind: str) -> Callable[..., Any]:
    """The oracle that a kind is held to; UnknownKindError names the file and function that are missing."""
    module = f"ulm.reference.{slot}"
    if util.find_spec(module) is None or not hasattr(import_module(module), kind):
        raise UnknownKindError(f"{slot}.{kind}", "has no reference", f"write {kind}() in ulm/reference/{slot}.py")
    function: Callable[..., Any] = getattr(import_module(module), kind)
    return function
