"""Examples that a model answers wrong, as text: the first ones in the fixed order of an evaluation."""

import dataclasses
import logging

import numpy as np

from xformers_lab.errors import in_words
from xformers_lab.tasks import Batch, Task

MOST = 8
LONGEST, PICTURE = 200, 1200  # characters of a text, and of an image
GAP = " … "


class Wrong:
    """Called with batches of the host and what the model says of each, it keeps `rows`, at most MOST of them.

    A row has the input, the answer and what was said, as the task shows them, long ones without their middle. Answers
    and what was said are those of the scored positions.
    """

    def __init__(self, task: Task):
        self.task = task
        self.rows: list[dict[str, str]] = []
        self.unshown = False

    def wants(self) -> bool:
        return len(self.rows) < MOST and not self.unshown

    def __call__(self, batch: Batch, said: np.ndarray) -> None:
        """batch: of rows (B, ...), weights 0 where no answer counts; said: shaped like its targets."""
        targets, weights = np.asarray(batch.targets), np.asarray(batch.weights)
        wrong = ((said != targets) & (weights != 0)).reshape(len(targets), -1).any(1)
        for number in np.flatnonzero(wrong)[: MOST - len(self.rows)]:
            row = lambda array, at=number: np.asarray(array)[at : at + 1]
            valid = None if batch.valid is None else row(batch.valid)
            example = Batch(row(batch.inputs), row(targets), row(weights), valid)
            try:
                self.rows.append(self._shown(example, row(said)))
            except Exception as error:  # of a task of the user's own: the run is done, and not for nothing
                logging.getLogger(__name__).warning("wrong answers are not shown: the task %s", in_words(error))
                self.unshown = True
                return

    def _shown(self, example: Batch, said: np.ndarray) -> dict[str, str]:
        shown = self.task.show(example)
        answer = self.task.show(dataclasses.replace(example, targets=said))["answer"]
        given = " | ".join(text for key, text in shown.items() if key in ("input", "source", "then"))
        most = LONGEST if self.task.image is None else PICTURE
        return {"input": cut(given, most), "answer": cut(shown["answer"]), "said": cut(answer)}


def cut(text: str, most: int = LONGEST) -> str:
    """The text, or its beginning and its end with an ellipsis for what is between, `most` characters in all."""
    if len(text) <= most:
        return text
    kept = most - len(GAP)
    return text[: kept - kept // 2] + GAP + text[len(text) - kept // 2 :]
