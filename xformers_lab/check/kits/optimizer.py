"""Optimizers, on a few parameters of every role: a table, stacked kernels and biases, a bank, a head."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xformers_lab import optimizer, spec
from xformers_lab.check import inside
from xformers_lab.check.subject import Broken, compare
from xformers_lab.optimizer import Curvature, Given, Roles
from xformers_lab.train import checkpoint

LAYERS = 3
# Relative to the largest number of an array: sums in another order.
SAME = 1e-4
# Of a number that is taken apart and put together again, relative to itself.
ROUNDING = 5e-6
RATE, DECAY = 1e-2, 0.5


class Tuned:
    """An optimizer of a shelf, with what the lab gives it for a few parameters."""

    shelf = "optimizer"

    def __init__(self, choice: str):
        self.name = choice
        stack = {"kernel": (LAYERS, 4, 6), "bias": (LAYERS, 6), "up": (LAYERS, 2, 6, 4)}
        shapes = {"embedding": {"embedding": (5, 4)}, "stack": stack, "head": {"kernel": (4, 5), "bias": (5,)}}
        is_shape = lambda node: isinstance(node, tuple)
        rng = np.random.default_rng(0)
        draw = lambda shape: jnp.asarray(rng.normal(size=shape) + 0.1, jnp.float32)
        self.params = jax.tree.map(draw, shapes, is_leaf=is_shape)
        self.gradients = [jax.tree.map(draw, shapes, is_leaf=is_shape) for _ in range(3)]
        stacked = jax.tree.map(lambda _: 0, self.params)
        stacked["stack"] = {"kernel": 1, "bias": 1, "up": 2}
        decays = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "bias", self.params)
        hidden = jax.tree.map(lambda _: False, self.params)
        hidden["stack"] |= {"kernel": True, "up": True}
        self.roles = Roles(decays, stacked, hidden)
        self.rule()

    def error(self) -> None:
        """There is no reference to be off from."""

    def rule(self, rate: Any = RATE, decay: Any = DECAY, roles: Roles | None = None) -> optax.GradientTransformation:
        """What it gives; rate and decay may be traced."""
        given = Given(lambda count: jnp.asarray(rate), jnp.asarray(decay), roles or self.roles)
        return optimizer.build(self.name, given)

    def steps(self, rule: optax.GradientTransformation, params: Any, gradients: list) -> tuple[Any, Any]:
        """Parameters and state after steps with such gradients."""
        state = rule.init(params)
        for gradient in gradients:
            # Any diagonal of a Hessian, number by number, so that layers apart have the same.
            diagonal = lambda estimate, gradient=gradient: jax.tree.map(lambda leaf: 1 + jnp.sin(leaf), gradient)
            updates, state = updated(rule, gradient, state, params, diagonal)
            params = optax.apply_updates(params, updates)
        return params, state

    @functools.cached_property
    def after(self) -> tuple[Any, Any]:
        """Parameters and state after three steps."""
        return jax.jit(lambda params, gradients: self.steps(self.rule(), params, gradients))(
            self.params, self.gradients
        )


def updated(
    rule: optax.GradientTransformation, gradient: Any, state: Any, params: Any, curvature: Curvature
) -> tuple[Any, Any]:
    """What a rule adds to the parameters, and its new state."""
    return optax.with_extra_args_support(rule).update(gradient, state, params, curvature=curvature)


def subject(choice: str) -> Tuned:
    return Tuned(choice)


def descends(subject: Tuned) -> None:
    """Twenty steps at a small rate lower a quadratic, in what is scored as in the parameters themselves."""
    aim = jax.tree.map(lambda leaf: leaf + 1, subject.params)
    value = lambda params: optax.tree.norm(optax.tree.sub(params, aim), squared=True)
    twos = lambda estimate: jax.tree.map(lambda leaf: jnp.full_like(leaf, 2), aim)
    rule = subject.rule(decay=0.0)

    def step(carry: tuple, _: Any) -> tuple:
        params, state = carry
        updates, state = updated(rule, jax.grad(value)(params), state, params, twos)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(step, (params, rule.init(params)), length=20)[0])
    params, state = run(subject.params)
    scored = optimizer.scored(state, params)
    ends = {"parameters": params} | ({} if scored is None else {"scored parameters": scored})
    for what, end in ends.items():
        if not value(end) < value(subject.params):
            raise Broken(f"the {what} are no nearer to the least value of a quadratic: look at the sign of the update")


def decays_alone(subject: Tuned) -> None:
    """Where gradients are 0, a step makes all of a parameter that decays smaller by one share and leaves others."""
    zeros = jax.tree.map(jnp.zeros_like, subject.params)
    params, state = jax.jit(lambda params: subject.steps(subject.rule(), params, [zeros]))(subject.params)
    _finite(params, state, "gradients of 0")
    pulled, was = checkpoint.named_leaves(subject.roles.decays), checkpoint.named_leaves(subject.params)
    for name, leaf in checkpoint.named_leaves(params).items():
        share = np.asarray(leaf / was[name])
        if not pulled[name] and np.abs(share - 1).max() > ROUNDING:
            raise Broken(f"{name} does not decay, and changes where gradients are 0: decay what `roles.decays` names")
        layers = share.reshape(*share.shape[: _stacked(subject, name)], -1)
        if pulled[name] and not ((layers < 1) & (layers > 0) & (np.ptp(layers, -1, keepdims=True) < ROUNDING)).all():
            raise Broken(f"{name} decays, and is not p (1 - rate decay) where gradients are 0")


def rates_are_data(subject: Tuned) -> None:
    """The rate and the decay may be arrays of a compiled program, and a rate of 0 changes nothing."""
    run = jax.jit(
        lambda rate, decay: subject.steps(subject.rule(rate, decay), subject.params, subject.gradients[:1])[0]
    )
    still, moved = run(0.0, DECAY), run(RATE, DECAY)
    for name, leaf in checkpoint.named_leaves(still).items():
        was = checkpoint.named_leaves(subject.params)[name]
        compare(np.asarray(leaf), np.asarray(was), ROUNDING, f"{name} at rate 0", "Scale all of it by the rate.")
        if np.array_equal(checkpoint.named_leaves(moved)[name], was):
            raise Broken(f"{name} never moves, whatever the rate")


def layers_apart(subject: Tuned) -> None:
    """Each layer of a stack, and each network of a bank, moves as it would alone."""
    alone, roles = _unstacked(subject, subject.params), subject.roles
    flat = lambda tree: {name: checkpoint.named_leaves(tree)[name.partition("/")[0]] for name in alone}
    single = Roles(flat(roles.decays), dict.fromkeys(alone, 0), flat(roles.hidden))
    gradients = [_unstacked(subject, gradient) for gradient in subject.gradients]
    expected = jax.jit(lambda: subject.steps(subject.rule(roles=single), alone, gradients)[0])()
    advice = "Norms and matrices are of one layer: see `by_layer`, and `roles.stacked`."
    for name, leaf in _unstacked(subject, subject.after[0]).items():
        compare(np.asarray(leaf), np.asarray(expected[name]), SAME, f"{name} in a stack against alone", advice)


def jit_equals_eager(subject: Tuned) -> None:
    """Run as it is and compiled, the parameters are the same."""
    params, _ = subject.steps(subject.rule(), subject.params, subject.gradients)
    for name, leaf in checkpoint.named_leaves(params).items():
        compiled = checkpoint.named_leaves(subject.after[0])[name]
        advice = "Look at what is computed by Python or numpy."
        compare(np.asarray(leaf), np.asarray(compiled), SAME, f"{name} as it is against compiled", advice)


def saved(subject: Tuned) -> None:
    """The state is arrays alone, whose shapes and types a step leaves, and comes back from a checkpoint to the bit."""
    params, state = subject.after
    first = subject.rule().init(subject.params)
    if strange := [name for name, leaf in checkpoint.named_leaves(first).items() if not isinstance(leaf, jax.Array)]:
        raise Broken(f"{strange[0]} of the state is no array: a checkpoint holds arrays alone")
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    if jax.tree.structure(state) != jax.tree.structure(first) or shapes(state) != shapes(first):
        raise Broken("a step changes the structure, a shape or a type of the state")
    _finite(params, state, "a few steps")
    if not jax.tree.leaves(state):
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), 1, state, {})
        back, _ = checkpoint.restore(Path(folder), state, {})
    for name, leaf in checkpoint.named_leaves(state).items():
        if np.asarray(leaf).tobytes() != np.asarray(checkpoint.named_leaves(back)[name]).tobytes():
            raise Broken(f"{name} comes back changed from a checkpoint")


def rates_of_their_own(subject: Tuned) -> None:
    """An optimizer that says `unit_updates` moves a parameter by its own multiple of the rate, and decays it by the
    rate alone; and gradients of another size change nothing of its updates."""
    if not getattr(spec.entry("optimizer", spec.parse(subject.name).name), "unit_updates", False):
        return
    own = dataclasses.replace(subject.roles, rates=jax.tree.map(lambda _: 0.25, subject.params))
    moved = lambda scale=1.0, **how: subject.steps(
        subject.rule(**how), subject.params, [jax.tree.map(lambda leaf: scale * leaf, subject.gradients[0])]
    )[0]
    all_of_it, less, decayed = jax.jit(lambda: (moved(decay=0.0), moved(decay=0.0, roles=own), moved(roles=own)))()
    larger = jax.jit(lambda: moved(1024.0, decay=0.0))()
    named = checkpoint.named_leaves
    for name, leaf in named(subject.params).items():
        was, step = np.asarray(leaf), np.asarray(named(all_of_it)[name] - leaf)
        advice = "Make updates by `given.rule`, which knows `roles.rates`."
        compare(np.asarray(named(less)[name]), was + 0.25 * step, SAME, f"{name} at a quarter of the rate", advice)
        pulled = RATE * DECAY * was if named(subject.roles.decays)[name] else 0
        what = f"{name} at a quarter of the rate, with decay"
        compare(np.asarray(named(decayed)[name]), was + 0.25 * step - pulled, SAME, what, advice)
        what = f"{name} with gradients 1024 times as large"
        compare(np.asarray(named(larger)[name]), was + step, SAME, what, "Leave out `unit_updates`.")


def _finite(params: Any, state: Any, when: str) -> None:
    for name, leaf in checkpoint.named_leaves({"params": params, "state": state}).items():
        if not np.isfinite(np.asarray(leaf, np.float64)).all():
            raise Broken(f"{name} is not finite after {when}")


def _stacked(subject: Tuned, name: str) -> int:
    return int(checkpoint.named_leaves(subject.roles.stacked)[name])


def _unstacked(subject: Tuned, tree: Any) -> dict[str, jax.Array]:
    """Each layer and network of each array by itself, as name/number."""
    parts = {}
    for name, leaf in checkpoint.named_leaves(tree).items():
        count = _stacked(subject, name)
        for number, part in enumerate(leaf.reshape(-1, *leaf.shape[count:])):
            parts[f"{name}/{number}"] = part
    return parts


PROPERTIES = [
    inside.documented,
    descends,
    decays_alone,
    rates_are_data,
    layers_apart,
    jit_equals_eager,
    saved,
    rates_of_their_own,
]
