"""Compiled programs, which the runs of one process share.

Seeds and what scales updates are data of a program (see `state.TrainState`), so runs that differ in nothing else, the
seeds and learning rates of a study, compile once. What decides a program is compared without tracing the model again.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Hashable
from typing import Any

import jax
from flax import nnx

from xformers_lab import config as configs
from xformers_lab.config import Config
from xformers_lab.tasks import Batch, Task
from xformers_lab.train.decoding import Decoder, compile_decoder
from xformers_lab.train.layout import Compiled, Layout, compile_eval_step
from xformers_lab.train.state import TrainState

MOST = 32  # that are kept: those used last; a study of eight variants at four lengths has so many
PRECISION = ("jax_default_matmul_precision", "jax_enable_x64")  # of JAX's settings those that a program is traced under


@dataclasses.dataclass
class Program:
    """The step of training and the decoder, None before they are compiled, and the step of an evaluation, which is
    compiled at its first call; scored: whether that was made."""

    score: Callable[[TrainState, Batch], tuple]
    step: Compiled | None = None
    scored: bool = False
    decoder: Decoder | None = None

    def trained(self, compile_step: Callable[[], Compiled]) -> Compiled:
        """The step, compiled where it is not yet."""
        if self.step is None:
            self.step = compile_step()
        return self.step

    def decoding(self, config: Config, graph: nnx.GraphDef, state: TrainState) -> Decoder:
        """The decoder, compiled where it is not yet; arguments and errors as of `compile_decoder`."""
        if self.decoder is None:
            self.decoder = compile_decoder(config, graph, state)
        return self.decoder


_KEPT: collections.OrderedDict[Hashable, Program] = collections.OrderedDict()


def of(config: Config, task: Task, graph: nnx.GraphDef, layout: Layout, batch: Batch) -> Program:
    """The program of a config: one that is there where all that decides it is the same. batch: one of training, of
    which only shapes and types count."""
    key = _key(config, task, graph, layout, batch)
    if key is None:
        return Program(compile_eval_step(task, graph, layout))
    if key not in _KEPT:
        _KEPT[key] = Program(compile_eval_step(task, graph, layout))
    _KEPT.move_to_end(key)
    while len(_KEPT) > MOST:
        _KEPT.popitem(last=False)
    return _KEPT[key]


def forget() -> None:
    """Keep none of the programs, as a process begins."""
    _KEPT.clear()


def _key(config: Config, task: Task, graph: nnx.GraphDef, layout: Layout, batch: Batch) -> Hashable | None:
    """What decides a program; None where it cannot be compared.

    A model enters a program by its structure, which holds whatever is no array of it; a task by its loss and its
    metric, and those, with the numbers in them, by the text that they lower to.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    precision = tuple(getattr(jax.config, name) for name in PRECISION)
    leaves, whole = jax.tree.flatten(shapes)
    chosen = json.dumps(configs.compiled(config), sort_keys=True)
    lowered = _lowered(task, shapes)
    averages = config.train.ema is not None  # its rate is data
    key = chosen, averages, graph, layout, lowered, whole, tuple((leaf.shape, leaf.dtype) for leaf in leaves), precision
    try:
        hash(key)
    except TypeError:
        return None
    return None if lowered is None else key


def _lowered(task: Task, batch: Any) -> str | None:
    """The text of a task's loss and metric on a batch in shapes, its constants in it; None where they take other logits
    than tasks declare."""
    axes = (task.setting.batch, task.setting.seq_len)[: 2 if task.target == "token" else 1]
    logits = jax.ShapeDtypeStruct((*axes, task.outputs), "float32")
    try:
        return (
            jax.jit(lambda logits, batch: (task.loss(logits, batch), task.metric(logits, batch)))
            .lower(logits, batch)
            .as_text()
        )
    except Exception:  # what is wrong shows again where the step is traced
        return None
