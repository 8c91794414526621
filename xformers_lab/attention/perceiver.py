from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Call, Complexity, Cost, MultiHead, why_not
from xformers_lab.attention._engine.slots import attended
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.normalisation import LayerNorm
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size


class Perceiver(MultiHead):
    """Perceiver (Jaegle et al., 2021, arXiv 2103.03206), read out by positions as in Perceiver IO (arXiv 2107.14795).

    L <- L + attention(L, k, v); `steps` times L <- L + attention(L, L, L); out = attention(q, K L, V L), an MLP after
    each of the first two. Learned latents look at the sequence once, talk among themselves, and are looked at by every
    position: in `set` they do not talk, in `luna` they stay from layer to layer instead.

    Deviations from the paper: what the paper builds once around a model is one layer here, its latents begin anew in
    every layer, are as wide as the model, and their steps share one set of weights, as those of the paper's repeated
    blocks may.

    Options:
        latents: learned rows
        steps: rounds of self-attention among the latents
    """

    kind = "memory compression"
    exact = False
    accuracy = ": positions exchange nothing that does not pass through the latents"
    complexity = Complexity(time="O(T latents H + steps latents^2 D)", memory="O(T H)")
    refuses: ClassVar = {
        "map": "its latents pass layers of their own before positions look at them",
        "causal": (
            "a latent looks at all positions, and Perceiver AR (arXiv 2202.07765), whose latents are the last "
            "positions of a sequence, gives outputs for those alone, where a layer needs them for all"
        ),
        "bias": "a latent has no position",
    }

    def __init__(self, size: Size, *, latents: int = 32, steps: int = 2, rngs: nnx.Rngs):
        if latents < 1:
            raise Refused(f"latents must be at least 1, got {latents}")
        if steps < 0:
            raise Refused(f"steps must be at least 0, got {steps}")
        super().__init__(size, rngs=rngs)
        self.steps = steps
        self.latents = nnx.Param(jax.random.normal(rngs.params(), (latents, size.dim)), decays=False)
        self.look = _Part(size, self_attention=False, rngs=rngs)
        self.talk = _Part(size, self_attention=True, rngs=rngs) if steps else None
        width = size.key_heads * size.head
        self.norm = LayerNorm(size.dim, dtype=size.dtype, rngs=rngs)
        self.latent_key, self.latent_value = (
            Linear(size.dim, width, use_bias=False, dtype=size.dtype, rngs=rngs) for _ in range(2)
        )

    def scale_init(self, share: float) -> None:
        """What queries look at are values of their own, of states behind a norm."""
        scale_init(share, self.latent_value, self.out)

    def attend_heads(self, call: Call):
        if call.causal:
            raise Refused(why_not(type(self), "causal"))
        if call.bias is not None:
            raise Refused(why_not(type(self), "bias"))
        q, k, v, valid, method = call.q, call.k, call.v, call.valid, call.method
        B, shape = q.shape[0], self.latents.shape
        L = jnp.broadcast_to(self.latents[...].astype(k.dtype), (B, *shape))
        L = self.look(L, k, v, valid, method=method)
        if self.talk is not None:
            graph, variables = nnx.split(self.talk)
            step = lambda L, _: (nnx.merge(graph, variables)(L, method=method), None)
            L = lax.scan(jax.checkpoint(step), L, length=self.steps)[0]
        L = self.norm(L)
        heads = lambda y: y.reshape(B, shape[0], -1, self.size.head).astype(k.dtype)
        there = None if valid is None else jnp.broadcast_to(valid.any(1, keepdims=True), (B, shape[0]))
        how = {"method": method, "plan": plan_of(self.size)}
        out = attended(q, heads(self.latent_key(L)), heads(self.latent_value(L)), there, **how)
        return out.astype(v.dtype), call.carry, Aux()

    def cost(self, T: int, S: int) -> Cost:
        (m, D), H, N = self.latents.shape, self.size.head, self.size.heads
        look, talk = 8 * m * D * D, self.steps * (12 * m * D * D + 4 * m * m * D)
        inside = (look + talk + 4 * m * D * self.size.key_heads * H) / N
        return Cost(flops=4 * m * H * (S + T) + inside, memory=max(T, S) * max(H, m), state=0)


class _Part(nnx.Module):
    """L + attention(L, ...) and an MLP, both behind a norm: L (B, m, D) looks at given keys and values or at itself."""

    def __init__(self, size: Size, *, self_attention: bool, rngs: nnx.Rngs):
        linear = lambda: Linear(size.dim, size.dim, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.size, self.query, self.out = size, linear(), linear()
        self.key, self.value = (linear(), linear()) if self_attention else (None, None)
        self.grow, self.shrink = (Linear(size.dim, size.dim, dtype=size.dtype, rngs=rngs) for _ in range(2))
        self.norm, self.mlp_norm = (LayerNorm(size.dim, dtype=size.dtype, rngs=rngs) for _ in range(2))

    def __call__(self, L, k=None, v=None, valid=None, *, method: str):
        y = self.norm(L)
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.size.head).astype(L.dtype)
        if k is None and self.key is not None and self.value is not None:
            k, v = heads(self.key(y)), heads(self.value(y))
        attention = attended(heads(self.query(y)), k, v, valid, method=method, plan=plan_of(self.size))
        L = L + self.out(attention.reshape(L.shape)).astype(L.dtype)
        return L + self.shrink(jax.nn.gelu(self.grow(self.mlp_norm(L)))).astype(L.dtype)
