"""Tiny models around a choice of any shelf, on tokens that are drawn: their passes, each compiled once."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xformers_lab.check.subject import moved
from xformers_lab.config import Config, edit
from xformers_lab.errors import Refused, UsageError
from xformers_lab.model import build_model, check_built
from xformers_lab.nn.plan import Plan
from xformers_lab.tasks import Batch, Setting, Split, Task
from xformers_lab.train.state import TrainState, merge, split
from xformers_lab.train.step import make_train_step

# The length is a prime, so that no segment or pool divides it; token 0 is what padding holds where it holds garbage.
LENGTH, BATCH, VOCAB, OUTPUTS, GARBAGE = 11, 4, 13, 7, 0
PLAN = Plan()  # layers in a loop, which compiles faster
SIZES = {"seq_len": LENGTH, "dim": 8, "heads": 2, "layers": 2, "batch": BATCH}


class Tokens(Task):
    """Random answers about random tokens, one for each."""

    vocab, outputs, chance, kinds, segments = VOCAB, OUTPUTS, 1 / OUTPUTS, ("decoder", "encoder"), True

    def batch(self, split: Split, step: int) -> Batch:
        valid, random = padding(self.setting.seq_len), np.random.default_rng(step)
        inputs, targets = random.integers(1, VOCAB, valid.shape), random.integers(0, OUTPUTS, valid.shape)
        weights = valid
        if self.target == "sequence":
            targets, weights = targets[:, 0], valid.any(1)
        return Batch(inputs.astype(np.int32), targets.astype(np.int32), np.asarray(weights, np.float32), valid)


class Sequences(Tokens):
    """Random answers about random sequences."""

    target = "sequence"


def padding(length: int) -> np.ndarray:
    """(BATCH, length) bool by sample: nothing padded, a padded end, random holes (the first is one), all padding."""
    holes = np.random.default_rng(3).random(length) < 0.6
    holes[0], holes[-1] = False, True
    rows = [np.ones(length, bool), np.arange(length) < -(-2 * length // 3), holes, np.zeros(length, bool)]
    return np.stack(rows)


class Tiny:
    """A tiny model, its parameters moved a little, as training does, and its passes."""

    def __init__(self, config: Config, task: Task):
        self.config, self.task = config, task
        self._steps: dict[Config, Callable] = {}
        self.words = f"model={config.model.model}, an answer of every {task.target}"
        model = build_model(config, task, PLAN)
        self.graph, params, self.extra, memory = split(model)
        self.params = moved(params)
        rows = self.params["embedding"]["embedding"]
        self.params["embedding"]["embedding"] = rows.at[GARBAGE].set(1e3 * rows[GARBAGE])
        self.memory = jax.tree.map(lambda leaf: jnp.repeat(leaf, BATCH, 1), memory)
        self.tokens = task.batch("validation", 0).inputs
        self.valid = padding(config.seq_len)

    @property
    def causal(self) -> bool:
        return self.config.model.model == "decoder"

    def built(self, variables):
        """Of copies, for layers may write to their variables."""
        return merge(self.graph, *jax.tree.map(lambda leaf: leaf, variables))

    @property
    def variables(self) -> tuple:
        return self.params, self.extra, self.memory

    def plain(self, variables, tokens, valid):
        model = self.built(variables)
        return model(tokens, valid=valid)[0], *split(model)[2:]

    @functools.cached_property
    def _compiled(self) -> Callable:
        return jax.jit(self.plain)

    def forward(self, tokens, valid=None, memory=None) -> np.ndarray:
        """Logits in evaluation; valid (B, T), nothing is padded without it; memory: what was read before."""
        return np.asarray(self._run(tokens, valid, memory)[0])

    def after(self, tokens, valid=None) -> tuple[Any, Any]:
        """Variables that are no parameters, and the memory, after a pass in evaluation."""
        return self._run(tokens, valid, None)[1:]

    def _run(self, tokens, valid, memory):
        valid = np.ones(tokens.shape, bool) if valid is None else valid
        memory = self.memory if memory is None else memory
        with exact():
            return self._compiled((self.params, self.extra, memory), tokens, valid)

    def packed(self, tokens, documents) -> np.ndarray:
        """Logits in evaluation of packed rows; raises Refused where the model does not keep documents apart."""
        jax.eval_shape(self._of_documents, self.variables, tokens, documents)
        with exact():
            return np.asarray(self._packed(self.variables, tokens, documents))

    @functools.cached_property
    def _packed(self) -> Callable:
        return jax.jit(self._of_documents)

    def _of_documents(self, variables, tokens, documents):
        model: Any = self.built(variables)
        return model(tokens, documents=documents)[0]

    def decoded(self, at_once: int) -> np.ndarray:
        """Logits of the tokens from the last of `at_once` on, which are read together, the others one by one; raises
        Refused where the model cannot decode."""
        cache = jax.eval_shape(lambda: self.built(self.variables).init_cache(*self.tokens.shape))

        def run(variables, tokens):
            def one(cache, token):
                logits, cache = self.built(variables).step(cache, token)
                return cache, logits

            model = self.built(variables)
            first, cache = model.step_several(model.init_cache(*tokens.shape), tokens[:, :at_once])
            return jnp.concatenate([first[None], jax.lax.scan(one, cache, tokens[:, at_once:].T)[1]]).swapaxes(0, 1)

        assert cache is not None
        with exact():
            return np.asarray(jax.jit(run)(self.variables, self.tokens))

    def step(self, **changes: Any) -> Callable:
        """The step of training of its config with these changes, (state, batch) -> (state, metrics)."""
        config = edit(self.config, **changes)
        if config not in self._steps:
            graph = split(build_model(config, self.task, PLAN))[0]
            # Its optimizer only keeps the gradients.
            self._steps[config] = jax.jit(make_train_step(config, self.task, graph, optax.trace(0.0)))
        return self._steps[config]

    def first_state(self) -> TrainState:
        opt = optax.TraceState(jax.tree.map(np.zeros_like, self.params))
        none: Any = np.zeros((), np.int32)
        return TrainState(self.params, self.extra, self.memory, opt, none, none, none.astype(np.uint32))

    def trained(
        self, steps: int, filler: int | None = None, *, dtype: str = "bfloat16", **changes: Any
    ) -> tuple[list, list, TrainState]:
        """Gradients and metrics of so many steps, and the state after them; parameters stay as they are.

        filler: the token that padding holds; changes: of the config."""
        state, step = self.first_state(), self.step(dtype=dtype, **changes)
        grads, history = [], []
        for number in range(steps):
            batch = self.task.batch("train", number)
            if filler is not None:
                batch = dataclasses.replace(batch, inputs=np.where(self.valid, batch.inputs, filler).astype(np.int32))
            with exact():
                state, metrics = step(state, batch)
            grads.append(state.opt.trace)
            history.append(metrics)
            state = dataclasses.replace(state, params=self.params)
        return grads, history, state


@contextlib.contextmanager
def exact():
    """Products in full precision."""
    with jax.default_matmul_precision("highest"):
        yield


class Inside:
    """A choice in a decoder, and in an encoder where it refuses that, or `both`. words: what a config says to have it;
    layers: the numbers of layers to try."""

    def __init__(
        self, shelf: str, name: str, words: dict[str, Any], *, layers: tuple[int, ...] = (2,), both: bool = False
    ):
        self.shelf, self.name, self.asked = shelf, name, words
        self.refusals: dict[str, UsageError] = {}
        kinds = (("decoder", Tokens), ("encoder", Tokens), ("encoder", Sequences))
        self.models: list[Tiny] = []
        for number, (kind, task) in enumerate(kinds):
            if not self.models or (both and number == 1):
                self.models += self._tried(edit(Config(), **(SIZES | words | {"model": kind})), task, layers)
        if not self.models:
            raise next(iter(self.refusals.values()))

    @property
    def model(self) -> Tiny:
        """The decoder, where there is one."""
        return self.models[0]

    def error(self) -> None:
        """There is no reference to be off from."""

    def _tried(self, config: Config, task: type[Tokens], layers: tuple[int, ...]) -> list[Tiny]:
        built_task = task(Setting(config.seq_len, BATCH))
        for number in layers:
            here = edit(config, layers=number)
            try:
                check_built(here, built_task)
            except UsageError as reason:
                cause = reason.__cause__ or reason.__context__
                if isinstance(cause, ValueError) and not isinstance(cause, Refused):
                    raise cause from None
                self.refusals[here.model.model] = reason
                continue
            return [Tiny(here, built_task)]
        return []
