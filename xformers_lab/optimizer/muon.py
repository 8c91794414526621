"""Orthogonal updates of matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from xformers_lab.errors import Refused
from xformers_lab.optimizer import Given
from xformers_lab.optimizer._bounds import refuse_rates


def muon(
    given: Given,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    iterations: int = 5,
    rms: float | None = 0.2,
    ratio: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Muon: momentum orthogonalised by Newton-Schulz (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon).

    update = -rate (s X + decay p), X near U V^T, where U S V^T is the momentum of one matrix (in, out)

    Orthogonalised is the kernel of each linear layer between the first and the last one, in each layer of the stack by
    itself, with all heads of a projection as one matrix; the recurrent matrices of lstm, gru and seq2seq, their gates
    side by side; and in a bank (ffn=moe, ffn=hash) the matrix of each expert. All else goes by AdamW at ratio times the
    rate: tables of tokens and positions, what makes vectors of numbers, the head, biases, gains and vectors, and what
    has further axes, such as maps of single heads.

    With rms, s = rms sqrt(max(in, out)), so that an update is as large as AdamW's usually are and one rate serves both
    (Liu et al., 2025, arXiv 2502.16982). With rms=none, s = sqrt(max(1, out / in)), as Jordan et al. have it, whose
    rate of Muon is some 70 times that of Adam: ratio=0.015.

    Options:
        momentum: rate of the average of gradients that is orthogonalised
        nesterov: look ahead by Nesterov's momentum
        iterations: steps of Newton-Schulz
        rms: root mean square of the update of a square matrix (none: s goes by the shape alone)
        ratio: learning rate of AdamW for all other parameters, as a multiple of that of the matrices
        b1: AdamW's rate of the average of gradients
        b2: AdamW's rate of the average of their squares
        eps: what AdamW adds to the root of the latter
    """
    refuse_rates(momentum=momentum, b1=b1, b2=b2)
    for name, value in (("iterations", iterations), ("ratio", ratio), ("rms", 1.0 if rms is None else rms)):
        if value <= 0:
            raise Refused(f"{name} must be above 0, got {value:g}")
    # Whatever axes stand before the last two count layers and experts.
    matrices = lambda updates: jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), updates)

    def scaled(updates: Any, _: Any = None) -> Any:
        def one(x: jax.Array) -> jax.Array:
            rows, columns = x.shape[-2:]
            return x * (max(1, columns / rows) ** 0.5 if rms is None else rms * max(rows, columns) ** 0.5)

        return jax.tree.map(one, updates)

    turned = scale_by_muon(ns_steps=iterations, beta=momentum, nesterov=nesterov, weight_dimension_numbers=matrices)
    others = optax.adamw(
        lambda count: ratio * jnp.asarray(given.rate(count)),
        b1,
        b2,
        eps,
        weight_decay=given.decay,
        mask=given.roles.decays,
    )
    which = jax.tree.map(lambda hidden: "muon" if hidden else "adamw", given.roles.hidden)
    return optax.partition({"muon": given.rule(turned, optax.stateless(scaled)), "adamw": others}, which)
