"""Base of full attention whose queries, keys and values come from the block's input in a way of their own."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention._base.call import Call, shown
from xformers_lab.attention._base.one_head import KeepsKeys
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine.pattern import All
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.required import required
from xformers_lab.nn.size import Size


class Projected(KeepsKeys, Patterned):
    """A subclass makes its own projections and defines `project`; heads attend to what it gives; decoding keeps it."""

    projects: ClassVar[bool] = False
    documents_apart: ClassVar[bool] = True

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.size, self.pattern = size, All()
        self.out = Linear(size.heads * size.head, size.dim, use_bias=False, dtype=size.dtype, rngs=rngs)

    @required
    def project(self, x, source, turn_q, turn_k) -> Any:
        """(B, T, D) and (B, S, D) -> what a `Call` takes as q (B, T, N, ...), k (B, S, ...) and v (B, S, ...).

        turn_q and turn_k give an array (B, T or S, heads, size) its rotary positions, where there are any.
        """

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of one position's q, k and v."""
        x = jax.ShapeDtypeStruct((1, 1, self.size.dim), jnp.float32)
        arrays = jax.eval_shape(lambda x: self.project(x, x, _as_it_is, _as_it_is), x)
        return tuple(y.shape[2:] for y in arrays)

    def __call__(
        self, x, memory=None, *, valid=None, causal=False, position=None, carry=None, key=None, documents=None
    ):
        self.check_documents(documents)
        if position is not None:
            self.check_position(position)
        source = x if memory is None else memory
        S = source.shape[1]
        at = jnp.arange(x.shape[1]) + S - x.shape[1]
        q, k, v = self.project(x, source, _turn(position, at), _turn(position, jnp.arange(S)))
        q = _share(position) * q
        call = Call(q, k, v, source, x, valid, causal, _bias(position), carry, key, documents=documents)
        call = shown(self, call)
        out, carry, aux = self.attend_heads(call)
        return self.out(out.reshape(*out.shape[:2], -1)), carry, aux

    def decode(self, x, cache, *, at, position=None, carry=None):
        turn = _turn(position, at[None])
        q, k, v = (y[:, 0] for y in self.project(x[:, None], x[:, None], turn, turn))
        call = Call(_share(position) * q, k, v, x, bias=_bias(position), carry=carry)
        out, cache, carry = self.decode_heads(cache, call)
        return self.out(out.reshape(len(x), -1)), cache, carry

    def turns(self) -> bool:
        return True

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        _, k, v = self.shapes()
        k, v = (jnp.zeros((B, length, *shape), dtype) for shape in (k, v))
        return {"k": k, "v": v, "seen": jnp.zeros((), jnp.int32)}


def _as_it_is(y):
    return y


def _turn(position, at):
    return _as_it_is if position is None else lambda y: position.rotate(y, at)


def _share(position) -> float:
    return 1.0 if position is None else position.share


def _bias(position):
    return None if position is None else position.bias()
