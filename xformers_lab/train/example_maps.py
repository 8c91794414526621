"""Attention maps of one test example, for the record of a run whose maps are small enough to keep."""

import logging
from collections.abc import Callable

import jax
import numpy as np

from xformers_lab.errors import LabError, in_words
from xformers_lab.measure import maps
from xformers_lab.model import Model
from xformers_lab.model._transformer import Transformer
from xformers_lab.tasks import Batch, Task
from xformers_lab.train import evaluation
from xformers_lab.train.jobs import Job
from xformers_lab.train.state import TrainState, merge

LONGEST = 64  # tokens
MOST = 65_536  # weights of all layers and heads
log = logging.getLogger(__name__)


def of_run(job: Job, state: TrainState, doing: Callable[[str], None]) -> dict | None:
    """The maps of the first example that a run is scored on; None where a record has no room for them."""
    size = job.config.model
    if jax.tree.leaves(state.memory) or not small(job.config.seq_len, size.layers, size.heads):
        return None
    params, extra = jax.tree.map(np.asarray, jax.device_get((state.params, state.extra)))  # as one device holds them
    model = merge(job.graph, params, extra, state.memory)
    if not isinstance(model, Transformer) or model.source:
        return None
    doing("drawing attention maps")
    sample = evaluation.sample(job.task, job.rebuilt, job.config.train.score, 1, None, job.segments)
    return of_example(model, job.task, sample.batch(0))


def small(length: int, layers: int, heads: int) -> bool:
    """Whether a record has room for the maps of a model."""
    return length <= LONGEST and layers * heads * length * length <= MOST


def of_example(model: Model, task: Task, batch: Batch) -> dict | None:
    """The maps of the first example of a batch of the host, with the text of its tokens; None where the layers give no
    weights of the positions of the sequence, or too many."""
    inputs, valid = np.asarray(batch.inputs)[:1], None if batch.valid is None else np.asarray(batch.valid)[:1]
    T = inputs.shape[1]
    try:
        found = maps.of_model(model, inputs, valid)
    except LabError as reason:
        log.info("no attention maps: %s", reason)
        return None
    except Exception as error:  # of a mechanism of the user's own: the run is done, and not for nothing
        log.warning("no attention maps: %s", in_words(error))
        return None
    if any(each.weights.shape[1:] != (T, T) for each in found) or sum(each.weights.size for each in found) > MOST:
        return None
    if not all(np.isfinite(each.weights).all() for each in found):
        return None
    return maps.drawn(found, labels(task, inputs[0]))


def labels(task: Task, inputs: np.ndarray) -> list[str]:
    """The text of each token of (T,); numbers (T, channels) have none, so each is called by its place."""
    return [str(at) if task.channels else _text(task, int(token)) for at, token in enumerate(inputs)]


def _text(task: Task, token: int) -> str:
    try:
        return task.decode([token])
    except Exception:  # a token that stands for nothing alone
        return str(token)
