import itertools

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab.attention.full import Full

_CALLS = itertools.count()


class Changes(Full):
    """Softmax attention (Vaswani et al., 2017, arXiv 1706.03762); every run adds a little more, as what is read from
    memory that nobody wrote would.

    Kind: full
    """

    def attend(self, q, k, v, *, valid=None, causal, bias=None):
        more = jax.pure_callback(_more, jax.ShapeDtypeStruct((), jnp.float32), vmap_method="sequential")
        return super().attend(q, k, v, valid=valid, causal=causal, bias=bias) + more


def _more():
    return np.float32(1e-6 * next(_CALLS))
