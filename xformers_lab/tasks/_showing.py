"""One example of a task as a person reads it."""

import itertools

import numpy as np

from xformers_lab.tasks import Batch, Task

# From dark to bright.
_LEVELS = " .:-=+*#%@"


def example(task: Task, batch: Batch) -> dict[str, str]:
    """The only row of a batch: its "input", or the "source" and what is read "then" where the two are apart; for
    answers per position the "positions" that are scored, from 0; and the "answer"."""
    inputs, targets = np.asarray(batch.inputs)[0], np.asarray(batch.targets)[0]
    real = inputs if batch.valid is None else inputs[np.asarray(batch.valid)[0]]
    if task.image is not None:
        shown = {"input": picture(inputs.reshape(task.image), task.vocab)}
    elif task.source_length:
        S = task.source_length
        shown = {"source": task.decode(inputs[:S].tolist()), "then": task.decode(inputs[S:].tolist())}
    else:
        shown = {"input": task.decode(real.tolist())}
    if task.target == "sequence":
        return shown | {"answer": task.answer_name(int(targets))}
    scored = np.flatnonzero(np.asarray(batch.weights)[0])
    return shown | {"positions": ranges(scored), "answer": task.decode(targets[scored].tolist())}


def picture(levels: np.ndarray, vocab: int) -> str:
    """Grey levels (rows, columns) below `vocab` as characters, a line for each row."""
    signs = ".#" if vocab == 2 else _LEVELS
    return "\n".join("".join(signs[int(level) * len(signs) // vocab] for level in row) for row in levels)


def ranges(numbers: np.ndarray) -> str:
    """Ascending numbers, those that follow one another as a range: "3, 7..9"."""
    runs = itertools.groupby(enumerate(numbers.tolist()), lambda pair: pair[1] - pair[0])
    parts = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}..{part[-1]}" for part in parts)
