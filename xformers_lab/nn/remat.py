"""What layers keep for the backward pass, and what they compute again there: rematerialisation, or gradient
checkpointing (Chen et al., 2016, arXiv 1604.06174)."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from xformers_lab.nn.plan import Remat

_LINEAR = "linear"


def product(y: jax.Array) -> jax.Array:
    """y, marked as what a linear layer gives: dear to compute again, and no larger than states are. By a name, not as
    a product without batch dimensions, for scores are such products too where heads run one after the other."""
    return checkpoint_name(y, _LINEAR)


def rematerialised(fn: Callable, remat: Remat, *, looped: bool) -> Callable:
    """`fn` of arrays, for whose gradient its arguments are kept and, with "dots", what its linear layers gave; anything
    else it gave is computed again.

    looped: whether it is the body of a loop of the program. Elsewhere the compiler has to be kept from finding that
    what is computed again was there before.
    """
    if remat == "none":
        return fn
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(_LINEAR) if remat == "dots" else policies.nothing_saveable
    return jax.checkpoint(fn, policy=policy, prevent_cse=not looped)
