import jax

from xformers_lab.attention.full import Full


class NeverEnds(Full):
    """Softmax attention (Vaswani et al., 2017, arXiv 1706.03762), with a loop that has no end where it is compiled.

    Kind: full
    """

    def attend(self, q, k, v, *, valid=None, causal, bias=None):
        q = q * jax.lax.stop_gradient(jax.lax.while_loop(lambda x: abs(x) >= 0, lambda x: x + 1, q[0, 0]))
        return super().attend(q, k, v, valid=valid, causal=causal, bias=bias)
