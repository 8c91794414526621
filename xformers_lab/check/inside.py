"""A choice of any shelf inside tiny models, on tokens that are drawn: their passes, each compiled once, and what all
kits but attention's ask of them."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xformers_lab import spec
from xformers_lab.check.subject import Broken, NotApplicable, compare, moved, quick_jit, raised_on_purpose
from xformers_lab.config import Config, edit
from xformers_lab.depth import Context, _stack
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, check_built
from xformers_lab.tasks import Batch, Setting, Split, Task
from xformers_lab.train import checkpoint
from xformers_lab.train.state import TrainState, merge, split, structure
from xformers_lab.train.step import make_train_step

# The length is a prime, so that no segment or pool divides it; token 0 is what padding holds where it holds garbage.
LENGTH, BATCH, VOCAB, OUTPUTS, GARBAGE = 11, 4, 13, 7, 0
SIZES = {"seq_len": LENGTH, "dim": 8, "heads": 2, "layers": 2, "batch": BATCH}
# Relative to the largest logit: sums in another order, and another way to compute the same.
SAME, ANOTHER_WAY = 1e-5, 2e-4
# Of gradients in bfloat16, relative to the largest of an array.
HALF = 0.02


class Tokens(Task):
    """Random answers about random tokens, one for each."""

    vocab, outputs, chance, kinds, segments = VOCAB, OUTPUTS, 1 / OUTPUTS, ("decoder", "encoder"), True

    def batch(self, split: Split, step: int) -> Batch:
        real, random = padding(self.setting.seq_len), np.random.default_rng(step)
        inputs, targets = random.integers(1, VOCAB, real.shape), random.integers(0, OUTPUTS, real.shape)
        weights = real
        if self.target == "sequence":
            targets, weights = targets[:, 0], real.any(1)
        return Batch(inputs.astype(np.int32), targets.astype(np.int32), weights.astype(np.float32), real)


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
        self.words = f"model={config.model.model}, an answer of every {task.target}"
        model = build_model(config, task)
        self.graph, params, self.extra, memory = split(model)
        self.params = moved(params)
        rows = self.params["embedding"]["embedding"]
        self.params["embedding"]["embedding"] = rows.at[GARBAGE].set(1e3 * rows[GARBAGE])
        self.memory = jax.tree.map(lambda leaf: jnp.repeat(leaf, BATCH, 1), memory)
        self.tokens = task.batch("validation", 0).inputs
        self.real = padding(config.seq_len)

    @property
    def causal(self) -> bool:
        return self.config.model.model == "decoder"

    def built(self, variables):
        """Of copies, for layers may write to their variables."""
        return merge(self.graph, *jax.tree.map(lambda leaf: leaf, variables))

    @property
    def variables(self) -> tuple:
        return self.params, self.extra, self.memory

    def plain(self, variables, tokens, real):
        model = self.built(variables)
        return model(tokens, real=real)[0], *split(model)[2:]

    @functools.cached_property
    def _compiled(self) -> Callable:
        return quick_jit(self.plain)

    def forward(self, tokens, real=None, memory=None) -> np.ndarray:
        """Logits in evaluation; real (B, T), nothing is padded without it; memory: what was read before."""
        return np.asarray(self._run(tokens, real, memory)[0])

    def after(self, tokens, real=None) -> tuple[Any, Any]:
        """Variables that are no parameters, and the memory, after a pass in evaluation."""
        return self._run(tokens, real, None)[1:]

    def _run(self, tokens, real, memory):
        real = np.ones(tokens.shape, bool) if real is None else real
        memory = self.memory if memory is None else memory
        with exact():
            return self._compiled((self.params, self.extra, memory), tokens, real)

    def decoded(self) -> np.ndarray:
        """Logits of the tokens, given one by one; raises ValueError where the model cannot decode."""
        cache = jax.eval_shape(lambda: self.built(self.variables).init_cache(*self.tokens.shape))

        def run(variables, tokens):
            one = lambda cache, token: self.built(variables).step(cache, token)[::-1]
            cache = self.built(variables).init_cache(*tokens.shape)
            return jax.lax.scan(one, cache, tokens.T)[1].swapaxes(0, 1)

        assert cache is not None
        with exact():
            return np.asarray(quick_jit(run)(self.variables, self.tokens))

    @functools.cached_property
    def _step(self) -> Callable:
        config = edit(self.config, dtype="bfloat16")
        # Its optimizer only keeps the gradients.
        return quick_jit(make_train_step(config, self.task, structure(config, self.task), optax.trace(0.0)))

    def trained(self, steps: int, filler: int | None = None) -> tuple[list, list, TrainState]:
        """Gradients and metrics of so many steps in bfloat16, and the state after them; parameters stay as they are.

        filler: the token that padding holds."""
        count = lambda: jnp.zeros((), jnp.int32)
        opt = optax.trace(0.0).init(self.params)
        state = TrainState(*self.variables, opt, count(), count(), jnp.uint32(0))
        grads, told = [], []
        for number in range(steps):
            batch = self.task.batch("train", number)
            if filler is not None:
                batch = dataclasses.replace(batch, inputs=np.where(batch.real, batch.inputs, filler).astype(np.int32))
            with exact():
                state, metrics = self._step(state, batch)
            grads.append(state.opt.trace)
            told.append(metrics)
            state = dataclasses.replace(state, params=self.params)
        return grads, told, state


@contextlib.contextmanager
def exact():
    """Products in full precision, and layers in a loop, not one after the other in the program."""
    kept, _stack.UNROLLED_ON_CPU = _stack.UNROLLED_ON_CPU, 0
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        _stack.UNROLLED_ON_CPU = kept


class Inside:
    """A choice in a decoder and in an encoder, one of which it may refuse. words: what a config says to have it;
    layers: the numbers of layers to try."""

    def __init__(self, shelf: str, name: str, words: dict[str, Any], layers: tuple[int, ...] = (2,)):
        self.shelf, self.name, self.asked = shelf, name, words
        self.refusals: dict[str, UsageError] = {}
        kinds = (("decoder", Tokens), ("encoder", Tokens), ("encoder", Sequences))
        self.models: list[Tiny] = []
        for kind, task in kinds:
            if not (self.models and task is Sequences):
                self.models += self._tried(edit(Config(), **(SIZES | words | {"model": kind})), task, layers)
        if not self.models:
            raise next(iter(self.refusals.values()))

    @property
    def model(self) -> Tiny:
        """The decoder, where there is one."""
        return self.models[0]

    def error(self) -> None:
        return None

    def _tried(self, config: Config, task: type[Tokens], layers: tuple[int, ...]) -> list[Tiny]:
        given = task(Setting(config.seq_len, BATCH))
        for number in layers:
            here = edit(config, layers=number)
            try:
                check_built(here, given)
            except UsageError as reason:
                cause = reason.__cause__ or reason.__context__
                if isinstance(cause, ValueError) and not raised_on_purpose(cause):
                    raise cause from None
                self.refusals[here.model.model] = reason
                continue
            return [Tiny(here, given)]
        return []


# ---- what all kits ask -----------------------------------------------------------------------------------------------


def documented(subject: Inside) -> None:
    """The docstring begins with what it is, and has a line for every option."""
    found = spec.entry(subject.shelf, spec.parse(subject.name).name)
    if not (found.__doc__ or "").strip():
        raise Broken(f'{found.__name__} has no docstring: write "Title (Authors, year, arXiv id)"')
    if silent := [option.name for option in spec.options(found).values() if not option.help]:
        raise Broken(f'the docstring\'s "Options:" list has no line for {", ".join(silent)}')


def no_future(subject: Inside) -> None:
    """In a decoder, what comes later changes nothing."""
    model = subject.model
    if not model.causal:
        raise NotApplicable(str(subject.refusals["decoder"]))
    before, T = model.forward(model.tokens), model.tokens.shape[1]
    for cut in (np.arange(BATCH), T - 2 - np.arange(BATCH)):
        late = np.arange(T) > cut[:, None]
        after = model.forward(np.where(late, GARBAGE, model.tokens))
        _unchanged(after, before, ~late, "later tokens change in a decoder: `causal` says where not to look ahead")


def no_padding(subject: Inside) -> None:
    """What padding holds, however large, changes no answer about what is real; and everything stays finite."""
    for model in subject.models:
        before = model.forward(model.tokens, model.real)
        after = model.forward(np.where(model.real, model.tokens, GARBAGE), model.real)
        rows = model.real if model.task.target == "token" else model.real.any(1)
        if not np.isfinite(after).all():
            raise Broken(f"with padding, here a sample of nothing else, answers are not finite ({model.words})")
        _unchanged(after, before, rows, f"padding holds other tokens ({model.words}): leave out what is not `real`")


def samples_apart(subject: Inside) -> None:
    """In evaluation, what one sample is told changes nothing in another."""
    model = subject.model
    before = model.forward(model.tokens)
    after = model.forward(np.concatenate([model.tokens[:1], np.roll(model.tokens[1:], 1, 1)]))
    _unchanged(after[:1], before[:1], np.ones(before.shape[:-1], bool)[:1], "other samples of the batch change")


def decoding(subject: Inside) -> None:
    """Token by token a decoder says what it says of the whole."""
    model = subject.model
    if not model.causal:
        raise NotApplicable(str(subject.refusals["decoder"]))
    try:
        out = model.decoded()
    except ValueError as reason:
        if not raised_on_purpose(reason):
            raise
        raise NotApplicable(str(reason)) from None
    expected = model.forward(model.tokens)
    first = int(np.argmax(np.abs(out - expected).max((0, 2)) > ANOTHER_WAY * np.abs(expected).max()))
    advice = f"The first wrong token is {first}: look at what the cache holds before it, and at positions."
    compare(out, expected, ANOTHER_WAY, "token by token against the whole pass", advice)


def jit_equals_eager(subject: Inside) -> None:
    """Run as it is and compiled, with nothing padded and with a mask that says so, the values are the same."""
    model = subject.model
    with exact():
        out = np.asarray(model.plain(model.variables, jnp.asarray(model.tokens), None)[0])
    advice = "Look at what is computed by Python or numpy, and at what real=None leaves out."
    compare(out, model.forward(model.tokens), ANOTHER_WAY, "as it is against compiled", advice)


def trains(subject: Inside) -> None:
    """Three steps in bfloat16 are finite, leave shapes and types of all state as they are, and give every parameter a
    gradient; what padding holds changes none of them."""
    model = subject.model
    grads, told, state = model.trained(3)
    for number, metrics in enumerate(told):
        if not bool(metrics["ok"]) or not np.isfinite(metrics["loss"]):
            raise Broken(f"the loss or its gradient is not finite in step {number} ({model.words}, bfloat16)")
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    if shapes((state.extra, state.memory)) != shapes(model.variables[1:]):
        raise Broken("a training step changes the shape or type of variables that are no parameters")
    largest = jax.tree.map(lambda *steps: max(float(jnp.abs(step).max()) for step in steps), *grads)
    if still := [name for name, size in checkpoint.named_leaves(largest).items() if size == 0]:
        raise Broken(f"no gradient ever reaches {', '.join(still)} ({model.words})")
    others = checkpoint.named_leaves(model.trained(1, GARBAGE)[0][0])
    for name, leaf in checkpoint.named_leaves(grads[0]).items():
        where, advice = f"the gradient of {name} when padding holds other tokens", "Losses are of what is `real`."
        compare(np.asarray(others[name]), np.asarray(leaf), HALF, where, advice)


def half_precision(subject: Inside) -> None:
    """In bfloat16 what a layer is given and gives is bfloat16, and the logits are float32."""
    model = subject.model
    config = edit(model.config, dtype="bfloat16")

    def run(tokens):
        built, real = build_model(config, model.task), tokens > 0
        x = built.position.embed(built.embedding(tokens), jnp.arange(tokens.shape[1]), real=real)
        y = built.stack(x, Context(built.position, real, built.predict, tokens=tokens))[0]
        return x, y, built(tokens, real=real)[0]

    found = jax.eval_shape(run, jax.ShapeDtypeStruct(model.tokens.shape, jnp.int32))
    wanted = {"embeddings": jnp.bfloat16, "layers": jnp.bfloat16, "logits": jnp.float32}
    for (what, dtype), one in zip(wanted.items(), found, strict=True):
        if one.dtype != dtype:
            raise Broken(f"{what} are {one.dtype} in bfloat16, not {jnp.dtype(dtype)}: cast to x.dtype what is given")


def evaluation_keeps_state(subject: Inside) -> None:
    """Evaluation leaves variables that are no parameters as they are."""
    model = subject.model
    before, after = checkpoint.named_leaves(model.extra), checkpoint.named_leaves(model.after(model.tokens)[0])
    for name, leaf in before.items():
        if not np.array_equal(leaf, after[name]):
            raise Broken(f"evaluation changes {name}: running statistics move in training alone (a key is given)")


def saved(subject: Inside) -> None:
    """What is no parameter comes back from a checkpoint, to the bit."""
    model = subject.model
    state = {"extra": model.extra, "memory": model.trained(1)[2].memory}
    if not jax.tree.leaves(state):
        raise NotApplicable("it has no variables but parameters")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), 1, state, {})
        back, _ = checkpoint.restore(Path(folder), jax.tree.map(jnp.asarray, state), {})
    for name, leaf in checkpoint.named_leaves(state).items():
        if np.asarray(leaf).tobytes() != np.asarray(checkpoint.named_leaves(back)[name]).tobytes():
            raise Broken(f"{name} comes back changed from a checkpoint")


def _unchanged(after, before, rows, when: str) -> None:
    """Raises Broken where the logits of `rows` ((B, T), or (B,) of whole sequences) differ."""
    gap = np.where(rows, np.abs(after - before).max(-1), 0)
    if not gap.max() <= SAME * max(1.0, float(np.abs(before[rows]).max(initial=0))):
        sample, *at = np.unravel_index(gap.argmax(), gap.shape)
        where = f"sample {sample}" + "".join(f", position {one}" for one in at)
        raise Broken(f"the answer of {where} changes by {gap.max():.2g} when {when}")


PROPERTIES = [
    documented,
    no_future,
    no_padding,
    samples_apart,
    decoding,
    jit_equals_eager,
    trains,
    half_precision,
    evaluation_keeps_state,
    saved,
]
