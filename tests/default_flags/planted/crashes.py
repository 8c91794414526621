import os
import signal

import jax
import jax.numpy as jnp

from xformers_lab.attention.full import Full


class Crashes(Full):
    """Softmax attention (Vaswani et al., 2017, arXiv 1706.03762), whose run ends the process by a signal.

    Kind: full
    """

    def attend(self, q, k, v, *, valid=None, causal, bias=None):
        nothing = jax.pure_callback(_die, jax.ShapeDtypeStruct((), jnp.float32), vmap_method="sequential")
        return super().attend(q, k, v, valid=valid, causal=causal, bias=bias) + nothing


def _die():
    os.kill(os.getpid(), signal.SIGSEGV)
