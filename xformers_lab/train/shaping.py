"""What a training loss has beyond the task's own: smoothed labels, and logits that are kept from growing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from xformers_lab.config import Train
from xformers_lab.tasks import Batch

Shaping = Callable[[jax.Array, Batch], jax.Array]


def of(train: Train) -> Shaping | None:
    """shaping(logits, batch) -> what is added to a sum of weighted cross-entropies, (); None where nothing is.

    With label_smoothing e the target is 1 - e of the answer and e of all classes alike, so the cross-entropy is
    (1 - e) CE(answer) + e mean_k CE(k) (Szegedy et al., 2016, arXiv 1512.00567, section 7). z_loss c adds
    c log(sum_k exp(logit_k))^2 for each answer (Chowdhery et al., 2022, PaLM, arXiv 2204.02311, section 5).
    """
    smoothing, z = train.label_smoothing, train.z_loss
    if not smoothing and not z:
        return None

    def shaping(logits: jax.Array, batch: Batch) -> jax.Array:
        logits = logits.astype(jnp.float32)
        size = jax.nn.logsumexp(logits, -1)
        answer = jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
        added = smoothing * (answer - logits.mean(-1)) + z * jnp.square(size)
        return (added * batch.weights).sum()

    return shaping
