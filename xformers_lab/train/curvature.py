"""Estimates of the diagonal of a training loss's Hessian, for update rules that ask for them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xformers_lab.errors import Refused
from xformers_lab.optimizer import Estimate
from xformers_lab.tasks import Batch, Task

OfPart = Callable[[Any, Any, Batch, jax.Array], Any]
"""of_part(extra, memory, batch, key) -> sums over this part of the batch, as its loss is one."""


@dataclasses.dataclass(frozen=True)
class Estimator:
    """Called with what is wanted, it gives an estimate of the diagonal of the Hessian of the mean loss, shaped like the
    parameters; nothing is computed before.

    objective: objective(params, extra, memory, batch, key) -> the training loss of a part of the batch, summed, ().
    answer: answer(params, extra, memory, batch, key) -> the model's logits of it. over_batch: over_batch(of_part) ->
    what of_part gives, added up over the whole batch, however it is divided. weight: (), of all its answers. key: the
    same on all devices.
    """

    task: Task
    objective: Callable[..., jax.Array]
    answer: Callable[..., jax.Array]
    over_batch: Callable[[OfPart], Any]
    params: Any
    weight: jax.Array
    key: jax.Array

    def __call__(self, estimate: Estimate) -> Any:
        return {"hutchinson": self.hutchinson, "gauss_newton": self.gauss_newton}[estimate]()

    def hutchinson(self) -> Any:
        """u (H u), u of random signs: its mean over u is the diagonal of H (Hutchinson, 1989; Bekas et al., 2007).

        H u is the gradient of grad . u: unlike a forward derivative of the gradient it exists wherever what layers say
        their gradient is can be differentiated once more. Of a layer that says another gradient than that of what it
        gives (powernorm), it is the derivative of what it says.
        """
        leaves, structure = jax.tree.flatten(self.params)
        keys = jax.random.split(self.key, len(leaves))
        draw = lambda key, leaf: jax.random.rademacher(key, leaf.shape, leaf.dtype)
        signs = structure.unflatten([draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])

        def of_part(extra: Any, memory: Any, batch: Batch, key: jax.Array) -> Any:
            gradient = jax.grad(lambda params: self.objective(params, extra, memory, batch, key))
            return jax.grad(lambda params: optax.tree.vdot(gradient(params), signs))(self.params)

        return jax.tree.map(lambda u, product: u * product / self.weight, signs, self.over_batch(of_part))

    def gauss_newton(self) -> Any:
        """W a^2, a the gradient of the mean loss of answers that are drawn from the model's probabilities, W how many
        they are: its mean over them is the diagonal of the Gauss-Newton matrix (Liu et al., 2023, arXiv 2305.14342)."""
        if type(self.task).loss is not Task.loss:
            raise Refused("estimate=gauss_newton: this task's loss is no cross-entropy")

        def of_part(extra: Any, memory: Any, batch: Batch, key: jax.Array) -> Any:
            def loss(params):
                logits = self.answer(params, extra, memory, batch, key).astype(jnp.float32)
                drawn = jax.random.categorical(jax.random.fold_in(key, 1), jax.lax.stop_gradient(logits))
                return self.task.loss(logits, dataclasses.replace(batch, targets=drawn))[0]

            return jax.grad(loss)(self.params)

        return jax.tree.map(lambda total: total**2 / self.weight, self.over_batch(of_part))
