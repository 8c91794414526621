"""Attention maps of one test example, for the record of a run whose maps are small enough to keep; else the reason."""

import logging
from collections.abc import Callable

import jax
import numpy as np

from xformers_lab.errors import LabError, Refused, in_words
from xformers_lab.measure import maps
from xformers_lab.model import Model
from xformers_lab.model._transformer import Transformer
from xformers_lab.tasks import Batch, Task
from xformers_lab.train import evaluation, hosts
from xformers_lab.train.jobs import Job
from xformers_lab.train.state import TrainState, merge

LONGEST = 64  # tokens
MOST = 65_536  # weights of all layers and heads
TOO_LARGE = f"a record has room for maps of at most {LONGEST} tokens and {MOST:,} weights of all layers and heads"
log = logging.getLogger(__name__)


def of_run(job: Job, state: TrainState, doing: Callable[[str], None]) -> dict | None:
    """The maps of the first example that a run is scored on, or {"reason": why there are none}; None of a model without
    attention."""
    size = job.config.model
    model = merge(job.graph, state.params, state.extra, state.memory)
    if not isinstance(model, Transformer):
        return None
    if jax.tree.leaves(state.memory):
        return {"reason": "the model remembers texts, and a map has the positions of one sequence alone"}
    if model.source:
        return {"reason": "an encoder-decoder has maps of two sequences"}
    if not small(job.config.seq_len, size.layers, size.heads):
        return {"reason": TOO_LARGE}
    params, extra = jax.tree.map(np.asarray, hosts.whole((state.params, state.extra)))  # as one device holds them
    model = merge(job.graph, params, extra, state.memory)
    doing("drawing attention maps")
    sample = evaluation.sample(job.task, job.rebuilt, job.config.train.score, 1, None, job.segments)
    return of_example(model, job.task, sample.batch(0))


def small(length: int, layers: int, heads: int) -> bool:
    """Whether a record has room for the maps of a model."""
    return length <= LONGEST and layers * heads * length * length <= MOST


def of_example(model: Model, task: Task, batch: Batch) -> dict:
    """The maps of the first example of a batch of the host, with the text of its tokens; {"reason": why} where the
    layers give no weights of the positions of the sequence, or too many."""
    first = lambda array: None if array is None else np.asarray(array)[:1]
    inputs = np.asarray(batch.inputs)[:1]
    T = inputs.shape[1]
    try:
        found = maps.of_model(model, inputs, *map(first, (batch.valid, batch.documents, batch.marked)))
    except (LabError, Refused) as reason:
        log.info("no attention maps: %s", reason)
        return {"reason": str(reason)}
    except Exception as error:  # of a mechanism of the user's own: the run is done, and not for nothing
        log.warning("no attention maps: %s", in_words(error))
        return {"reason": in_words(error)}
    if any(each.weights.shape[1:] != (T, T) for each in found):
        return {"reason": "its layers have weights of other positions than those of the sequence"}
    if sum(each.weights.size for each in found) > MOST:
        return {"reason": TOO_LARGE}
    if not all(np.isfinite(each.weights).all() for each in found):
        return {"reason": "its weights are not finite"}
    return maps.drawn(found, labels(task, inputs[0]))


def labels(task: Task, inputs: np.ndarray) -> list[str]:
    """The text of each token of (T,); numbers (T, channels) have none, so each is called by its place."""
    return [str(at) if task.channels else _text(task, int(token)) for at, token in enumerate(inputs)]


def _text(task: Task, token: int) -> str:
    try:
        return task.decode([token])
    except Exception:  # a token that stands for nothing alone
        return str(token)
