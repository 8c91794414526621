"""The first parameters of a run, taken from another one: `init=RUN`, as fine-tuning after pretraining needs it.

Where path and shape agree an array is taken. Of a table of tokens or positions that has another number of rows the
common first ones are: row i has to mean the same in both. So runs on texts need the same tokenizer, and between texts
and other inputs no table of tokens is taken. Everything else keeps its fresh values. Counters, running statistics and
fixed random features are taken like parameters, which were trained beside them; the optimizer, the step and what was
remembered of texts begin anew.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xformers_lab import named_run, spec
from xformers_lab.config import Config, folder
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model
from xformers_lab.nn.embedding import Embedding
from xformers_lab.position import Position
from xformers_lab.tasks import Task
from xformers_lab.train import checkpoint
from xformers_lab.train.state import TrainState, split

INITIALISED = "initialised.json"  # of the folder of a run that began with another's parameters: which these were
SHOWN = 6  # fresh parameters that a line names; the record has all
_PARTS = ("params", "extra")


@dataclasses.dataclass(frozen=True)
class Match:
    """What a run takes of another's checkpoint. taken: the paths of whole arrays; cut: of tables, with the rows taken
    and those there are; fresh: the paths of parameters that keep their own values; averaged: whether the other run
    keeps an average of its parameters, which is what is taken."""

    init: str
    step: int
    taken: list[str]
    cut: dict[str, list[int]]
    fresh: list[str]
    averaged: bool = False

    def said(self) -> str:
        """The same in words."""
        count = len(self.taken) + len(self.cut) + len(self.fresh)
        what = ", the average up to step" if self.averaged else " of step"
        words = [f"init={self.init}{what} {self.step}: {len(self.taken)} of {count} arrays taken"]
        if self.cut:
            words.append(
                "the first rows of " + ", ".join(f"{name} ({n} of {of})" for name, (n, of) in self.cut.items())
            )
        more = f" and {len(self.fresh) - SHOWN} more" if len(self.fresh) > SHOWN else ""
        words.append(f"fresh: {', '.join(self.fresh[:SHOWN]) or 'none'}{more}")
        return "; ".join(words)

    def record(self) -> dict:
        """The same as a record has it."""
        run, digest = named_run.parts(self.init)
        about = {"run": run, "checkpoint": digest, "step": self.step}
        about |= {"averaged": True} if self.averaged else {}
        return about | {"taken": len(self.taken), "cut": self.cut, "fresh": self.fresh}


def check(config: Config, task: Task) -> None:
    """Raises UsageError where a run that has not begun cannot take the parameters that its config names; nothing
    compiles."""
    if config.init is not None and not checkpoint.steps(folder(config)):
        match(config, task)


def match(config: Config, task: Task) -> Match:
    """What the model of a config takes; raises UsageError where no matrix is among it, or where the other run's
    checkpoint is gone, has changed or is damaged."""
    assert config.init is not None
    try:
        manifest = checkpoint.verify(named_run.found(config.init))
    except checkpoint.Damaged as error:
        raise UsageError(f"init={config.init}: its checkpoint is damaged ({error}); train that run again") from None
    same_tokens = _same_tokens(config, manifest["about"].get("details", {}), task)
    model = nnx.eval_shape(lambda: build_model(config, task))
    wanted = checkpoint.named_leaves(dict(zip(_PARTS, split(model)[1:3], strict=True)))
    tables, stored = set(_tables(model)), manifest["arrays"]
    others = set() if same_tokens else set(_tables(model, of_tokens=True))
    where = _counting(stored)
    taken, cut, fresh = [], {}, []
    for name, leaf in wanted.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        there = stored.get(_place(where, name), {})
        shape, same = tuple(there.get("shape", ())), there.get("dtype") == str(leaf.dtype)
        if name in others:
            fresh.append(name)
        elif same and shape == leaf.shape:
            taken.append(name)
        elif same and name in tables and shape[1:] == leaf.shape[1:]:
            cut[name] = [min(shape[0], leaf.shape[0]), leaf.shape[0]]
        else:
            fresh.append(name)
    if not cut and all(wanted[name].ndim < 2 for name in taken):
        raise UsageError(
            f"init={config.init}: no matrix of that run has the path and shape of one of this model: give both the "
            "same dim, layers, heads and choices"
        )
    return Match(config.init, manifest["step"], taken, cut, fresh, _averages(stored))


def take(matched: Match, state: TrainState, tx: optax.GradientTransformation) -> TrainState:
    """The first state of a run with the arrays of the other one in it, from which its update rule `tx` begins; raises
    IntegrityError where they cannot be read."""
    stored = checkpoint.arrays(named_run.found(matched.init))
    where = _counting(stored, validated=int(stored.get("best.step", 1)) > 0)

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in matched.cut:
            rows = matched.cut[name][0]
            return leaf.at[:rows].set(stored[_place(where, name)][:rows])
        return jnp.asarray(stored[_place(where, name)]) if name in taken else leaf

    taken = set(matched.taken)
    begun = jax.tree_util.tree_map_with_path(one, {part: getattr(state, part) for part in _PARTS})
    average = None if state.average is None else jax.tree.map(jnp.copy, begun["params"])
    return dataclasses.replace(state, **begun, opt=tx.init(begun["params"]), average=average)


def _counting(stored: Iterable[str], *, validated: bool = True) -> dict[str, str]:
    """Where in a checkpoint the parameters that count stand, and the other variables: those of the best validation with
    select=best, once there was one, else the average where there is one."""
    names = set(stored)
    has = lambda part: any(name.startswith(f"{part}.") for name in names)
    if has("best.params") and validated:
        return {"params": "best.params", "extra": "best.extra"}
    state = "state." if has("state.params") else ""
    return {"params": state + ("average" if _averages(names) else "params"), "extra": f"{state}extra"}


def _averages(stored: Iterable[str]) -> bool:
    """Whether a checkpoint holds an average of the parameters."""
    return any(name.startswith(("average.", "state.average.")) for name in stored)


def _place(where: dict[str, str], name: str) -> str:
    """The path in a checkpoint of what stands at `name` in a model."""
    part, _, rest = name.partition(".")
    return f"{where[part]}.{rest}"


def _same_tokens(config: Config, details: Mapping[str, Any], task: Task) -> bool:
    """Whether row i of a table of tokens is of the same token in both runs; raises UsageError where both are of texts,
    and it is not."""
    theirs, ours = details.get("tokenizer", task.tokenizer), task.tokenizer  # older checkpoints do not say it
    if theirs and ours and theirs != ours:
        raise UsageError(
            f"init={config.init}: its texts are tokens of {theirs}, those of task {spec.parse(config.task).name} are "
            f"of {ours}: a token is another in each; give both the same tokens=, such as (file:PATH) with one "
            "tokenizer.json (mlm:of=lm has the tokens of text, from 1 on)"
        )
    return theirs == ours


def _tables(model: nnx.Module, of_tokens: bool = False) -> Iterator[str]:
    """The paths of tables whose rows stand for tokens or positions, or for tokens alone."""
    for path, node in nnx.iter_graph(model):
        positions = node.tables if isinstance(node, Position) and not of_tokens else ()
        names = ("embedding",) if isinstance(node, Embedding) else positions
        yield from (".".join(map(str, ("params", *path, name))) for name in names)
