"""A process that holds members in a local engine and answers how long requests take.

`python _engine_process.py SETTINGS`; SETTINGS is a JSON object: `members` (name to checkpoint folder) and `config`, the
engine's. Questions come over stdin (_asked.py).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks._asked import Questions, prompts
from ulm import runtime


def main() -> None:
    """Load the members and answer."""
    questions = Questions()
    runtime.spare_cores()
    given = json.loads(sys.argv[1])
    with asyncio.Runner() as runner:
        engine, infos = runner.run(_loaded(given["members"], given["config"]))
        vocab_size = infos[0].vocab_size

        def seconds(
            batch: int,
            prompt: int,
            new: int,
            seed: int,
            weights: Sequence[Mapping[str, float]],
            groups: int = 1,
        ) -> float:
            """Until all answers have ended: answer i is by weights[i * len(weights) // batch].

            With `groups` they are not all asked at once, but so many neighbours after the others.
            """
            asked = prompts(batch, prompt, vocab_size, seed)
            by = [weights[number * len(weights) // batch] for number in range(batch)]
            size = batch // groups
            runner.run(_compiled(engine))
            started_s = time.perf_counter()
            for start in range(0, batch, size):
                runner.run(_all_answers(engine, asked[start : start + size], by[start : start + size], new))
            return time.perf_counter() - started_s

        def ready() -> dict[str, Any]:
            """What every member weighs, and the settings of the engine that the benchmark gave."""
            return {
                "parameters": infos[0].num_parameters,
                "config": {key: getattr(engine.config, key) for key in given["config"]},
                "stats": runner.run(engine.stats()),
            }

        questions.answer_all(seconds=seconds, ready=ready)
        runner.run(engine.close())


async def _loaded(members: Mapping[str, str], config: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    from serve.engines.local import LocalEngine
    from serve.engines.local.engine import Config

    engine = LocalEngine(Config(kind="local", **config))
    return engine, [await engine.load(member, checkpoint) for member, checkpoint in members.items()]


async def _compiled(engine: Any) -> None:
    """Wait for what is compiled in the background since an earlier, uncounted round used its batch size."""
    while (await engine.stats()).get("compiling"):
        await asyncio.sleep(0.1)


async def _all_answers(
    engine: Any, asked: Sequence[Sequence[int]], by: Sequence[Mapping[str, float]], new: int
) -> None:
    await asyncio.gather(*(_answer(engine, tokens, weights, new) for tokens, weights in zip(asked, by, strict=True)))


async def _answer(engine: Any, tokens: Sequence[int], weights: Mapping[str, float], new: int) -> None:
    """Wait for an answer, greedy, whole, and of full length."""
    from serve.contracts import GenerateRequest

    request = GenerateRequest(tuple(tokens), dict(weights), new, stream=False)
    given = sum([len(chunk.tokens) async for chunk in engine.generate(request)])
    assert given == new, f"an answer ended after {given} of {new} tokens"


if __name__ == "__main__":
    main()
