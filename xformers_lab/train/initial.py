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
    and those there are; fresh: the paths of parameters that keep their own values."""

    init: str
    step: int
    taken: list[str]
    cut: dict[str, list[int]]
    fresh: list[str]

    def said(self) -> str:
        """The same in words."""
        count = len(self.taken) + len(self.cut) + len(self.fresh)
        words = [f"init={self.init} of step {self.step}: {len(self.taken)} of {count} arrays taken"]
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
    within = _within(stored)
    taken, cut, fresh = [], {}, []
    for name, leaf in wanted.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        there = stored.get(within + name, {})
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
    return Match(config.init, manifest["step"], taken, cut, fresh)


def take(matched: Match, state: TrainState) -> TrainState:
    """The first state of a run with the arrays of the other one in it; raises IntegrityError where they cannot be
    read."""
    stored = checkpoint.arrays(named_run.found(matched.init))
    within = _within(stored)
    if within == "best." and int(stored["best.step"]) == 0:  # nothing was validated yet
        within = "state."

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in matched.cut:
            rows = matched.cut[name][0]
            return leaf.at[:rows].set(stored[within + name][:rows])
        return jnp.asarray(stored[within + name]) if name in taken else leaf

    taken = set(matched.taken)
    begun = jax.tree_util.tree_map_with_path(one, {part: getattr(state, part) for part in _PARTS})
    return dataclasses.replace(state, **begun)


def _within(stored: Iterable[str]) -> str:
    """Where in a checkpoint the parameters that count stand: those of the best validation with select=best."""
    return "best." if any(name.startswith("best.params.") for name in stored) else ""


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
