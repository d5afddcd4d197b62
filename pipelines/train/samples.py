"""samples.jsonl: text that the model wrote while it learned."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.train.task import TrainTask
from ulm.models.generate import generate
from ulm.tokenizers.tokenizer import Tokenizer

FILE = "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """What the model made of a prompt after `step` updates."""

    step: int
    prompt: str
    text: str


def write(task: TrainTask, step: int, model: Any, tokenizer: Tokenizer) -> list[Sample]:
    """Have the model go on from each prompt of the recipe, and append what it wrote to the run's file."""
    config, found = task.recipe.samples, []
    for prompt in config.prompts:
        generated = generate(
            model, tokenizer, prompt, max_tokens=config.max_tokens, temperature=config.temperature, seed=step
        )
        found.append(Sample(step, prompt, generated.text))
    with (task.folder / FILE).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(sample)) + "\n" for sample in found))
    return found


def read(folder: Path) -> list[Sample]:
    """The samples of a run by step, the newest of each step and prompt; a line that is cut short is left out."""
    found: dict[tuple[int, str], Sample] = {}
    path = folder / FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            sample = Sample(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[sample.step, sample.prompt] = sample
    return [found[key] for key in sorted(found)]
