from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost, MultiHead, why_not
from xformers_lab.attention._engine.slots import attended
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.normalisation import LayerNorm
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size


class Set(MultiHead):
    """Induced set attention, ISAB of the Set Transformer (Lee et al., 2019, arXiv 1810.00825).

    h = norm(y + relu(W y)) with y = norm(I + attention(I, k, v)), out = attention(q, K h, V h): learned points I look
    at all positions, then every position looks at what they found. The points begin anew in every layer.

    Deviations from the paper: the residual, normaliser and feed-forward of the outer attention are the block's own. The
    points stand for their projected queries, as nothing else is projected from them.

    Options:
        points: induced points, m in the paper
    """

    kind = "memory compression"
    exact = False
    accuracy = ": positions exchange nothing that does not pass through the points"
    complexity = Complexity(time="O(T points H)", memory="O(T H)")
    refuses: ClassVar = {
        "causal": "a point is a mean over all positions, later ones too",
        "bias": "a point has no position",
        "map": "its points pass a feed-forward layer before positions look at them",
    }

    def __init__(self, size: Size, *, points: int = 32, rngs: nnx.Rngs):
        if points < 1:
            raise Refused(f"points must be at least 1, got {points}")
        super().__init__(size, rngs=rngs)
        self.points = nnx.Param(jax.random.normal(rngs.params(), (points, size.dim)), decays=False)
        self.inner = Linear(size.dim, size.dim, dtype=size.dtype, rngs=rngs)
        self.norm, self.inner_norm = (LayerNorm(size.dim, dtype=size.dtype, rngs=rngs) for _ in range(2))
        width = size.key_heads * size.head
        self.point_key, self.point_value = (
            Linear(size.dim, width, use_bias=False, dtype=size.dtype, rngs=rngs) for _ in range(2)
        )

    def scale_init(self, share: float) -> None:
        """What queries look at are values of their own, of states behind a norm."""
        scale_init(share, self.point_value, self.out)

    def attend_heads(self, call: Call):
        if call.causal:
            raise Refused(why_not(type(self), "causal"))
        if call.bias is not None:
            raise Refused(why_not(type(self), "bias"))
        q, k, v, valid, method = call.q, call.k, call.v, call.valid, call.method
        B, (m, D) = q.shape[0], self.points.shape
        points = jnp.broadcast_to(self.points[...].astype(k.dtype), (B, m, D))
        heads = lambda y: y.reshape(B, m, -1, self.size.head).astype(k.dtype)
        how = {"method": method, "plan": plan_of(self.size)}
        y = self.norm(points + attended(heads(points), k, v, valid, **how).reshape(B, m, D))
        h = self.inner_norm(y + jax.nn.relu(self.inner(y)))
        there = None if valid is None else jnp.broadcast_to(valid.any(1, keepdims=True), (B, m))
        out = attended(q, heads(self.point_key(h)), heads(self.point_value(h)), there, **how)
        return out.astype(v.dtype), call.carry, Aux()

    def cost(self, T: int, S: int) -> Cost:
        (m, D), H, N, K = self.points.shape, self.size.head, self.size.heads, self.size.key_heads
        inside = 2 * m * D * (D + 2 * K * H) / N
        return Cost(flops=4 * m * H * (S + T) + inside, memory=max(T, S) * max(H, m), state=0)
