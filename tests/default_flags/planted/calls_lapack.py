import jax.numpy as jnp

from xformers_lab.attention.full import Full


class CallsLapack(Full):
    """Softmax attention (Vaswani et al., 2017, arXiv 1706.03762), by way of an inverse that LAPACK finds.

    Kind: full
    """

    def attend(self, q, k, v, *, valid=None, causal, bias=None):
        q = q @ jnp.linalg.inv(2 * jnp.eye(q.shape[1]) + 0 * q[0]) * 2
        return super().attend(q, k, v, valid=valid, causal=causal, bias=bias)
