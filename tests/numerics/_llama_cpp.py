"""llama.cpp by llama-cpp-python: `PYTHON _llama_cpp.py ASKED FOLDER` answers what a JSON file asks, into a folder.

ASKED is {"logits": {name: [file, tokens]}, "tokens": {name: [file, texts]}}. The answers are <name>.npy with the logits
of every token, and tokens.json with each text's ids, as with special tokens before them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PYTHONS = (sys.executable, ".venv-peers/bin/python")


def python_with_llama_cpp() -> str:
    """An interpreter that has llama_cpp; skips, by name, where none has."""
    import pytest

    for python in PYTHONS:
        there = Path(python).is_file()
        if (
            there
            and subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, timeout=60).returncode == 0
        ):
            return python
    pytest.skip("llama-cpp-python is not installed, neither here nor in .venv-peers (`make peers-llama-cpp`)")


def main() -> None:
    import numpy as np
    from llama_cpp import Llama

    asked, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])

    def opened(path: str, **more: Any) -> Llama:
        floats = {"type_k": 0, "type_v": 0}  # keys and values as float32, which are float16 by default
        return Llama(path, n_ctx=64, **floats, n_threads=1, n_threads_batch=1, verbose=False, **more)

    for name, (path, tokens) in asked["logits"].items():
        model = opened(path, logits_all=True)
        model.eval(tokens)
        np.save(folder / f"{name}.npy", model.scores[: len(tokens)])
    found = {}
    for name, (path, texts) in asked["tokens"].items():
        model = opened(path, vocab_only=True)
        found[name] = [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
    (folder / "tokens.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
