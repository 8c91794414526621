"""A trained model at another length or with other options: which parameters it takes there, and what becomes otherwise.

The model is built anew, as the same config has it but for the length and the options, and takes the parameters as they
were trained. That is refused where one has another shape there, a table of positions, say: what lies beyond the trained
length was never trained. Of a table with a row for each position a shorter sequence takes the first rows, the very ones
that it would have used. Whatever a choice makes of the length anew, such as a stride that is the root of it, is told,
and so is every option that is changed.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab import spec
from xformers_lab.attention import Attention
from xformers_lab.config import LEAVES, Config, edit, get, lengths
from xformers_lab.errors import UsageError
from xformers_lab.memory import Remembered
from xformers_lab.model import Model, build_model, build_task, check_config, kind_of
from xformers_lab.position import Position
from xformers_lab.tasks import Task
from xformers_lab.train import options
from xformers_lab.train.checkpoint import named_leaves
from xformers_lab.train.state import TrainState, split

# What a row of by_length has of a score.
FIGURES = ("metric", "metric_interval", "loss", "examples", "examples_of")
# Attributes of a layer that say how long its sequences are, which is what changes.
_PLAIN = ("size", "length", "source", "pattern")


@dataclasses.dataclass(frozen=True)
class Other:
    """config: that of the same model otherwise; rows: the parameters, by path, of which the first rows alone are used,
    and how many; changed: what becomes otherwise, {"attention.stride": [as trained, here]}; options: those that were
    asked for, and which choices of a cycle they are changed in, in words; resized: whether the length is another one.
    """

    config: Config
    rows: dict[str, int]
    changed: dict[str, list]
    options: dict[str, str]
    resized: bool

    def said(self) -> str | None:
        """What becomes otherwise, in words; None where nothing does."""
        if not self.changed:
            return None
        words = ", ".join(
            f"{name} is {spec.show(now)}{self.options.get(name, '')}, trained with {spec.show(was)}"
            for name, (was, now) in self.changed.items()
        )
        if not self.resized:
            return words
        unasked = self.changed.keys() - self.options.keys()
        why = ": it goes by the length unless an option says it" if unasked else ""
        return f"seq_len={self.config.seq_len}: {words}{why}"

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


def at(config: Config, task: Task, length: int | None = None, asked: Mapping[str, Any] | None = None) -> Other:
    """The model of a config, trained for a task, at another length (None: that of training), and with the options that
    are asked for, {"depth.threshold": 0.5}; nothing compiles.

    Raises UsageError where the task or a choice cannot be so, where the task has other tokens or answers there, and
    where a parameter has another shape or type, or an option decides what is drawn and never trained.
    """
    asked, length = asked or {}, config.seq_len if length is None else length
    resized = length != config.seq_len
    words = [f"{name}={spec.show(value)}" for name, value in asked.items()]
    where = " ".join([*words, f"seq_len={length}"] if resized or not words else words)
    trained = nnx.eval_shape(lambda: build_model(config, task))
    remembers = bool(jax.tree.leaves(nnx.state(trained, Remembered)))
    edited, changes = options.changed(config, kind_of(config, task), asked)
    there = _resized(edited, length, remembers)
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
        if resized and name in tables and was is not None and now is not None and was.shape[1:] == now.shape[1:]:
            # What a memory puts in front of a sequence moves its rows.
            if now.shape[0] <= was.shape[0] and not remembers:
                rows[name] = now.shape[0]
                continue
            raise UsageError(
                f"{where}: position={config.model.position} has places for {was.shape[0]} tokens alone: train with a "
                "position that is not a table, such as position=rope, sinusoidal, alibi or none"
            )
        choice, what = _choice(config, trained, name), name.rpartition(".")[2]
        before, after = ("nothing" if leaf is None else "x".join(map(str, leaf.shape)) for leaf in (was, now))
        if any(change.was != change.now for change in changes):
            raise UsageError(
                f"{where}: {choice} has {what} of {before} as trained and of {after} so, and an evaluation takes "
                "parameters as they were trained: train a run with it"
            )
        raise UsageError(
            f"{where}: {choice} has {what} of {before} and {after} at {config.seq_len} and {length} tokens, so it is "
            "made for one length: give what goes by the length as an option of it, where it has one, or train with "
            f"seq_len={length}"
        )
    if changes:
        _refuse_redrawn((config, task), (there, other), trained, where)
    said = {change.name: change.where for change in changes}
    pairs = {change.name: _pair(change, (trained, task), (here, other)) for change in changes}
    changed = {name: [was, now] for name, (was, now) in pairs.items() if was != now}
    if resized:
        changed |= _changed(_at_length(edited, trained) if changes else trained, here)
    return Other(there, rows, changed, said, resized)


def _at_length(config: Config, trained: nnx.Module) -> nnx.Module:
    """The model of a config whose options are changed, at the length of training: what is otherwise than in it goes by
    the length. Where there is none, the one that was trained."""
    try:
        return nnx.eval_shape(lambda: build_model(config, build_task(config)))
    except UsageError:
        return trained


def _pair(change: options.Change, trained: tuple[nnx.Module, Task], here: tuple[nnx.Module, Task]) -> list:
    """The values of an option as trained and here; one that is none is what its choice makes of that."""
    option = change.name.rpartition(".")[2]
    pair = []
    for value, (model, task) in ((change.was, trained), (change.now, here)):
        nodes = [task] if isinstance(task, change.kinds) else []
        nodes += [node for _, node in nnx.iter_graph(model) if type(node) in change.kinds]
        kept = [getattr(node, option, None) for node in nodes]
        kept = [each for each in kept if isinstance(each, (bool, int, float, str))]
        pair.append(_alike(kept) if value is None and kept else value)
    return pair


def _refuse_redrawn(trained: tuple[Config, Task], here: tuple[Config, Task], model: Model, where: str) -> None:
    """Raises UsageError where what is drawn at the start and never trained, such as random features, is another here: a
    checkpoint holds what was drawn, so that an option which decides it would change nothing."""
    if not jax.tree.leaves(split(model)[2]):
        return
    # Of all that is drawn the compiled programs keep what they return.
    was, now = (
        named_leaves(jax.jit(lambda config=config, task=task: split(build_model(config, task))[2])())
        for config, task in (trained, here)
    )
    for name in was:
        # Two programs may round the same draw differently.
        if not np.allclose(was[name], now[name], rtol=1e-4, atol=1e-5):
            raise UsageError(
                f"{where}: {_choice(trained[0], model, name)} draws another {name.rpartition('.')[2]} so, and an "
                "evaluation takes what was drawn for the run: train a run with it"
            )


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
    for key in options.CHOICES:
        for part in spec.split(str(get(config, key)), "+") if get(config, key) != "auto" else ():
            kinds[spec.entry(LEAVES[key][1].metadata["shelf"], spec.parse(part).name)] = f"{key}={part}"
    parts = name.split(".")
    for count in range(len(parts), -1, -1):
        node = nodes.get(".".join(parts[:count]))
        if type(node) in kinds:
            return kinds[type(node)]
    return "the model"


def _changed(trained: nnx.Module, here: nnx.Module) -> dict[str, list]:
    """What the layers keep beside their parameters, or say that they make of the length, that is another here, by the
    last two names of its path. Different values of layers have + between them."""
    was, now, found = dict(_kept(trained)), dict(_kept(here)), {}
    for place in was:
        if place in now and was[place] != now[place]:
            found.setdefault(place[1], []).append((was[place], now[place]))
    return {name: [_alike(values) for values in zip(*pairs, strict=True)] for name, pairs in found.items()}


def _alike(values: Sequence[Any]) -> Any:
    """The one value of all, or the text of the different ones."""
    different = [value for number, value in enumerate(values) if value not in values[:number]]
    return different[0] if len(different) == 1 else "+".join(map(spec.show, different))


def _kept(model: nnx.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """((the path of a layer, the last two names of that of a value), the value)."""
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Module):
            continue
        layer, at = next((part for part in reversed(path) if isinstance(part, str)), "model"), _joined(path)
        if isinstance(node, Attention):
            yield from (((at, f"{layer}.{name}"), value) for name, value in node.of_length().items())
        for name, value in vars(node).items():
            if name.startswith("_") or name in _PLAIN or name.endswith("_features"):
                continue
            if isinstance(value, (bool, int, float, str)) or _sizes(value):
                yield (at, f"{layer}.{name}"), value if not isinstance(value, tuple) else [*value]
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                for field in dataclasses.fields(value):
                    if isinstance(part := getattr(value, field.name), (bool, int, float, str)):
                        yield (at, f"{layer}.{name}.{field.name}"), part


def _sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(part, (int, float, str)) for part in value)


def _joined(path: Any) -> str:
    return ".".join(map(str, path))


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
