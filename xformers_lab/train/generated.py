"""What a model generates for examples of a split, scored by their task: BLEU of translations, say."""

from typing import Any

import numpy as np

from xformers_lab import generate
from xformers_lab.config import Config
from xformers_lab.errors import UsageError
from xformers_lab.model import Model
from xformers_lab.tasks import Split, Task

TEXTS = 100  # scored where nobody says how many: each is generated token by token
_TOGETHER = 32  # that are generated side by side, where there is one beam


def check(task: Task, beams: int, texts: int) -> None:
    """Raises UsageError where nothing can be generated and scored so."""
    if type(task).generated is Task.generated:
        raise UsageError(f"beams={beams}: task {type(task).__name__.lower()} scores no generated texts; leave it out")
    for name, value in (("beams", beams), ("texts", texts)):
        if value < 1:
            raise UsageError(f"{name}={value}: at least 1")


def scores(config: Config, task: Task, model: Model, split: Split, beams: int, examples: int) -> dict[str, Any]:
    """-> beams, how many examples of how many were scored, and what the task counts of them.

    They are the first of the one shuffled order that every evaluation takes its examples from. With one beam the
    likeliest token follows each time. Raises UsageError where the model cannot decode.
    """
    of = task.examples(split)
    assert of is not None, "only tasks with examples score generated texts"
    numbers = np.random.Generator(np.random.PCG64(0)).permutation(of)[:examples]

    def produce(whole: list[list[int]], new: int) -> list[list[int]]:
        common: dict[str, Any] = {"new": new, "length": config.seq_len, "stop": task.stop}
        prompts, sources = generate.apart(model, whole, begin=task.begin)
        if beams > 1:
            pairs = zip(prompts, sources or [None] * len(prompts), strict=True)
            found = (
                generate.beam_search(model, prompt, source=source, beams=beams, **common) for prompt, source in pairs
            )
            return [tokens for tokens, _ in found]
        texts: list[list[int]] = []
        for start in range(0, len(prompts), _TOGETHER):
            # The last ones are filled up, so that all have one shape, and one program.
            rows = np.minimum(np.arange(start, start + _TOGETHER), len(prompts) - 1)
            chosen, read = [prompts[row] for row in rows], [sources[row] for row in rows] if sources else None
            texts += generate.generate(model, chosen, sources=read, **common)
        return texts[: len(prompts)]

    counted = task.generated(split, numbers, produce)
    return {"beams": beams, "examples": len(numbers), "examples_of": of, **counted}
