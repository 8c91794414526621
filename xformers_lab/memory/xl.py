import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.errors import Refused
from xformers_lab.memory import Memory, Remembered
from xformers_lab.nn.size import Size


class Xl(Memory):
    """Transformer-XL: every layer also attends to its own last M inputs of earlier segments (Dai et al., 2019, arXiv
    1901.02860, section 3.2).

        source = [stop_gradient(m); h]     (B, M + T, D), keys and values; queries come from h (B, T, D) alone
        m'     = the last M rows of [m; h]

    The queries of a segment reach M tokens further back with every layer. Keys of memory stand at the positions before
    the segment; the paper's relative positions are position=xl. As with every residual placement that normalises before
    the sub-layer, memory and segment are normalised alike. Gradients reach the projections of remembered states, not
    the states.

    Options:
        length: remembered states M per layer (none: as many as a segment has)
    """

    def __init__(self, size: Size, *, length: int | None = None, rngs: nnx.Rngs):
        if length is not None and length < 1:
            raise Refused(f"length must be at least 1, got {length}; memory=none remembers nothing")
        self.length = size.length if length is None else length
        self.states = Remembered(jnp.zeros((1, self.length, size.dim), size.dtype))
        self.valid = Remembered(jnp.zeros((1, self.length), bool))

    def read(self, B: int) -> tuple[jax.Array, jax.Array]:
        states, valid = self.states[...], self.valid[...]
        states = lax.stop_gradient(jnp.broadcast_to(states, (B, *states.shape[1:])))
        return states, jnp.broadcast_to(valid, (B, self.length))

    def write(self, x: jax.Array, valid: jax.Array | None) -> None:
        states, known = self.read(len(x))
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        latest = lambda old, new: jnp.concatenate([old, new], 1)[:, -self.length :]
        # Variables of another shape: a memory that was built for one sequence now holds that of a batch.
        self.states.set_value(lax.stop_gradient(latest(states, x.astype(states.dtype))))
        self.valid.set_value(latest(known, valid))
