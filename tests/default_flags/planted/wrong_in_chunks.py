import jax

from xformers_lab.attention.full import Full


class WrongInChunks(Full):
    """Softmax attention (Vaswani et al., 2017, arXiv 1706.03762); whole chunks of 64 have a wrong gradient.

    Kind: full
    """

    def attend(self, q, k, v, *, valid=None, causal, bias=None):
        if len(q) % 64 == 0:
            q = _doubled(q)
        return super().attend(q, k, v, valid=valid, causal=causal, bias=bias)


@jax.custom_vjp
def _doubled(q):
    """The same, with twice the gradient."""
    return q


_doubled.defvjp(lambda q: (q, None), lambda _, grad: (2 * grad,))
