"""A trained model at another length: which parameters it takes there, and what becomes otherwise.

The model is built anew for the other length, as the same config has it, and takes the parameters as they were trained.
That is refused where one has another shape there, a table of positions, say: what lies beyond the trained length was
never trained. Of a table with a row for each position a shorter sequence takes the first rows, the very ones that it
would have used. Whatever a choice makes of the length anew, such as a stride that is the root of it, is told.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab import spec
from xformers_lab.attention import Attention
from xformers_lab.config import LEAVES, Config, edit, get, lengths
from xformers_lab.errors import UsageError
from xformers_lab.memory import Remembered
from xformers_lab.model import build_model, check_config
from xformers_lab.position import Position
from xformers_lab.tasks import Task
from xformers_lab.train.checkpoint import named_leaves
from xformers_lab.train.state import TrainState, split

# What a row of by_length has of a score.
FIGURES = ("metric", "metric_interval", "loss", "examples", "examples_of")
# Attributes of a layer that say how long its sequences are, which is what changes.
_PLAIN = ("size", "length", "source", "pattern")


@dataclasses.dataclass(frozen=True)
class Other:
    """config: that of the same model at another length; rows: the parameters, by path, of which the first rows alone
    are used, and how many; changed: what else becomes otherwise, {"attention.stride": [at the trained length, here]}.
    """

    config: Config
    rows: dict[str, int]
    changed: dict[str, list]

    def said(self) -> str | None:
        """What becomes otherwise, in words; None where nothing does."""
        if not self.changed:
            return None
        words = [f"{name} is {_shown(now)}, trained with {_shown(was)}" for name, (was, now) in self.changed.items()]
        return f"seq_len={self.config.seq_len}: {', '.join(words)}: it goes by the length unless an option says it"

    def state(self, state: TrainState, target: TrainState) -> TrainState:
        """The state of training as an evaluation at this length takes it; target: shapes and types of one there."""
        cut = lambda path, leaf: leaf[: self.rows.get(_path(path), None)]
        params = jax.tree_util.tree_map_with_path(cut, state.params) if self.rows else state.params
        memory = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), target.memory)
        return dataclasses.replace(state, params=params, memory=memory, opt=())


def check(config: Config, task: Task) -> None:
    """Raises UsageError where a config cannot be scored at a length that its test_len names; nothing compiles."""
    for length in lengths(config.test_len):
        at(config, task, length)


def at(config: Config, task: Task, length: int) -> Other:
    """The model of a config, trained for a task, at another length; nothing compiles.

    Raises UsageError where the task or a choice cannot be so long, where the task has other tokens or answers there,
    and where a parameter has another shape.
    """
    where = f"seq_len={length}"
    trained = nnx.eval_shape(lambda: build_model(config, task))
    remembers = bool(jax.tree.leaves(nnx.state(trained, Remembered)))
    there = _resized(config, length, remembers)
    other = check_config(there)
    for name in ("vocab", "outputs", "target", "tokenizer"):
        if getattr(task, name) != getattr(other, name):
            was, now = getattr(task, name), getattr(other, name)
            raise UsageError(f"{where}: task {spec.parse(config.task).name} has {name}={now} there, trained with {was}")
    here = nnx.eval_shape(lambda: build_model(there, other))
    rows, tables = {}, dict(_tables(here))
    stored, wanted = (named_leaves(split(model)[1:3]) for model in (trained, here))
    for path in sorted(stored.keys() | wanted.keys()):
        was, now = stored.get(path), wanted.get(path)
        if was is not None and now is not None and (was.shape, was.dtype) == (now.shape, now.dtype):
            continue
        name = path.partition(".")[2]
        if name in tables and was is not None and now is not None and was.shape[1:] == now.shape[1:]:
            # What a memory puts in front of a sequence moves its rows.
            if now.shape[0] <= was.shape[0] and not remembers:
                rows[name] = now.shape[0]
                continue
            raise UsageError(
                f"{where}: position={config.model.position} has places for {was.shape[0]} tokens alone: train with a "
                "position that is not a table, such as position=rope, sinusoidal, alibi or none"
            )
        shapes = " and ".join("nothing" if leaf is None else "x".join(map(str, leaf.shape)) for leaf in (was, now))
        raise UsageError(
            f"{where}: {_choice(config, trained, name)} has {name.rpartition('.')[2]} of {shapes} at "
            f"{config.seq_len} and {length} tokens, so it is made for one length: give what goes by the length as an "
            f"option of it, where it has one, or train with seq_len={length}"
        )
    return Other(there, rows, _changed(trained, here))


def _resized(config: Config, length: int, remembers: bool) -> Config:
    """Another length, of about as many tokens in a batch where it is longer. Of a model that `remembers` texts the
    batch stays, for there it decides what is remembered."""
    batch, devices = config.train.batch, len(jax.devices())
    if length > config.seq_len and not remembers:
        fitting = batch * config.seq_len // length
        batch = min(batch, max(fitting // devices, 1) * devices)
    return edit(config, seq_len=length, batch=batch, accumulate=1, test_len=None, init=None, select="last")


def _tables(model: nnx.Module) -> Iterator[tuple[str, None]]:
    """The paths of parameters with a row for each position."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Position):
            yield from ((_joined((*path, name)), None) for name in node.tables)


def _choice(config: Config, model: nnx.Module, name: str) -> str:
    """The choice that a parameter is of, as key=choice."""
    nodes = {_joined(path): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)}
    kinds = {}
    for key, (_, field, _) in LEAVES.items():
        if field.metadata["shelf"]:
            for part in spec.split(str(get(config, key)), "+") if get(config, key) != "auto" else ():
                kinds[spec.entry(field.metadata["shelf"], spec.parse(part).name)] = f"{key}={part}"
    parts = name.split(".")
    for count in range(len(parts), -1, -1):
        node = nodes.get(".".join(parts[:count]))
        if type(node) in kinds:
            return kinds[type(node)]
    return "the model"


def _changed(trained: nnx.Module, here: nnx.Module) -> dict[str, list]:
    """What the layers keep beside their parameters, or say that they make of the length, that is another here, by the
    last two names of its path."""
    was, now = dict(_kept(trained)), dict(_kept(here))
    return {name: [was[name], now[name]] for name in was if name in now and was[name] != now[name]}


def _kept(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Module):
            continue
        layer = next((part for part in reversed(path) if isinstance(part, str)), "model")
        if isinstance(node, Attention):
            yield from ((f"{layer}.{name}", value) for name, value in node.of_length().items())
        for name, value in vars(node).items():
            if name.startswith("_") or name in _PLAIN or name.endswith("_features"):
                continue
            if isinstance(value, (bool, int, float, str)) or _sizes(value):
                yield f"{layer}.{name}", value if not isinstance(value, tuple) else [*value]
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                for field in dataclasses.fields(value):
                    if isinstance(part := getattr(value, field.name), (bool, int, float, str)):
                        yield f"{layer}.{name}.{field.name}", part


def _sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(part, (int, float, str)) for part in value)


def _shown(value: Any) -> str:
    return spec.show(value)


def _joined(path: Any) -> str:
    return ".".join(map(str, path))


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
