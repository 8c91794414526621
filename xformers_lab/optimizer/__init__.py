"""The shelf of optimizers. One file = one function or class, called with a `Given` and its options.

    adamw(given, *, b1=0.9, b2=0.999, eps=1e-8) -> an `optax.GradientTransformation`

It gives what is added to the parameters, the learning rate, the sign and the weight decay in it, from gradients that
are clipped already. The rate and the decay are arrays of the compiled program, so that runs which differ in them share
one; options are numbers in it. Decay is decoupled (Loshchilov and Hutter, 2019, arXiv 1711.05101), of the parameters of
`given.decays` alone, and scaled by the rate of the step.

Parameters of layers are stacked, (L, ...): what looks at a whole matrix or vector, a norm say, has to do so layer by
layer, see `by_layer`. The state is arrays alone. What has a parameter's path in it and its shape lies on devices as the
parameter does, and all else is whole on each.

An `update` that names `curvature` in its signature, as one of `optax.GradientTransformationExtraArgs` may, is given a
function that estimates the diagonal of the Hessian of the mean training loss on the step's whole batch, shaped like the
parameters: `curvature("hutchinson")` or `curvature("gauss_newton")`. It costs nothing until it is called, and where it
is called in a `jax.lax.cond`, nothing in other steps.

Where other parameters than those that gradients are taken at are to be
scored, a part of the state has a method `scored(params)` that gives them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import optax
from flax import nnx

from xformers_lab import spec
from xformers_lab.ffn import Bank
from xformers_lab.nn.parameters import decays, layer_axes, rate

# Modules whose matrices are no hidden layer's: what makes vectors of the inputs, and answers of the last states.
OUTER = ("embedding", "head")
Rule = TypeVar("Rule", bound=Callable)
Estimate = Literal["gauss_newton", "hutchinson"]
Curvature = Callable[[Estimate], Any]
"""curvature(estimate) -> the diagonal of the Hessian of the mean loss, estimated, a pytree like the parameters."""


@dataclasses.dataclass(frozen=True)
class Roles:
    """What an update rule may know of parameters, each a pytree like theirs. decays: bool, whether weight decay pulls
    it; stacked: int, how many of its first axes count layers, or networks of a bank; hidden: bool, whether what these
    count is the one matrix of a hidden layer, (in, out); rates: float, what its learning rate is multiplied by, None
    where all have the same."""

    decays: Any
    stacked: Any
    hidden: Any
    rates: Any = None


@dataclasses.dataclass(frozen=True)
class Given:
    """What the lab gives an optimizer. rate: the learning rate of step n = 0, 1, ..., as optax takes it; weight_decay:
    (); roles: those of the parameters; schedule: what the rate does after the warm-up, by its name; cross_entropy:
    whether the loss is one, of answers that may be drawn from probabilities."""

    rate: optax.Schedule
    weight_decay: jax.Array
    roles: Roles
    schedule: str = "constant"
    cross_entropy: bool = True

    @property
    def decay(self) -> Any:
        """The weight decay as optax takes it, which types it as a number."""
        return self.weight_decay

    def rule(self, *transformations: optax.GradientTransformation) -> optax.GradientTransformation:
        """Transformations of the gradients, then decoupled weight decay, then the rate and the sign.

        A parameter's own rate is not that of its decay, which pulls as far at every width (Yang et al., 2022)."""
        rates = self.roles.rates
        own = lambda updates, _: jax.tree.map(lambda update, times: times * update, updates, rates)
        apart = () if rates is None else (optax.stateless(own),)
        decay = optax.add_decayed_weights(self.decay, mask=self.roles.decays)
        return optax.chain(*transformations, *apart, decay, optax.scale_by_learning_rate(self.rate))


def unit_updates(rule: Rule) -> Rule:
    """Say of an optimizer that its updates have a size of their own, which that of gradients does not change, and that
    it is made by `Given.rule`: what parametrisation=mup asks for."""
    marked: Any = rule
    marked.unit_updates = True
    return rule


def roles(variables: nnx.State) -> Roles:
    """The roles of a model's parameters, `nnx.state(model, nnx.Param)`, in shapes or real ones.

    A matrix of a hidden layer decays, has two axes in its own layer or network, and stands outside of OUTER: kernels of
    linear layers, recurrent matrices, each network of a bank. Maps of single heads and taps, which have more axes, are
    none.
    """

    def each(path: Any, variable: nnx.Variable) -> tuple[bool, int, bool, float]:
        stacked = layer_axes(variable) + isinstance(variable, Bank)
        outer = any(getattr(part, "key", None) in OUTER for part in path)
        pulled = decays(variable)
        return pulled, stacked, pulled and not outer and variable.ndim - stacked == 2, rate(variable)

    is_variable = lambda node: isinstance(node, nnx.Variable)
    found = jax.tree_util.tree_map_with_path(each, variables, is_leaf=is_variable)
    part = lambda number: jax.tree.map(lambda role: role[number], found, is_leaf=lambda node: isinstance(node, tuple))
    decay, layers, hidden, rates = (nnx.to_pure_dict(part(number)) for number in range(4))
    return Roles(decay, layers, hidden, None if set(jax.tree.leaves(rates)) <= {1.0} else rates)


def build(choice: str, given: Given) -> optax.GradientTransformation:
    """The update rule of a choice; raises UsageError where it refuses its options or what it is given."""
    return spec.build("optimizer", choice, given)


def by_layer(inner: optax.GradientTransformation, stacked: Any) -> optax.GradientTransformation:
    """`inner` on each layer of each parameter by itself, as if it were the only one.

    Args:
        stacked: how many of the first axes of each parameter count layers, see `Roles`.
    """

    def over(count: int, function: Callable) -> Callable:
        for _ in range(count):
            function = jax.vmap(function)
        return function

    def init(params: Any) -> Any:
        return jax.tree.map(lambda count, param: over(count, inner.init)(param), stacked, params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        whole = jax.tree.structure(stacked)
        counts = whole.flatten_up_to(stacked)
        trees = [whole.flatten_up_to(tree) for tree in (updates, state, params)]
        pairs = [over(count, inner.update)(*each) for count, *each in zip(counts, *trees, strict=True)]
        return whole.unflatten([new for new, _ in pairs]), whole.unflatten([kept for _, kept in pairs])

    return optax.GradientTransformation(init, update)


def scored(state: Any, params: Any) -> Any:
    """The parameters that an optimizer's state has scored in place of those that gradients are taken at; None where it
    says nothing of it."""
    says = lambda node: hasattr(node, "scored")
    part = next(filter(says, jax.tree.leaves(state, is_leaf=says)), None)
    return None if part is None else part.scored(params)
