import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.config import Config
from xformers_lab.errors import Refused
from xformers_lab.model import Model
from xformers_lab.model._recurrent import refuse_unused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.dropout import drop
from xformers_lab.nn.embedding import first_layer
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.normalisation import LayerNorm
from xformers_lab.nn.size import Size
from xformers_lab.tasks import Task


class Bytenet(Model):
    """Dilated causal convolutions in residual blocks, a decoder as in ByteNet (Kalchbrenner et al., 2016, arXiv
    1610.10099): block l looks back 2^l positions between its taps, up to `farthest`, and then begins again.

    Options:
        kernel: taps of a convolution
        farthest: the largest dilation
    """

    causal = True
    headed = False
    most_layers = 64

    def __init__(self, size: Size, *, kernel: int = 3, farthest: int = 16, config: Config, task: Task, rngs: nnx.Rngs):
        if kernel < 2 or farthest < 1:
            raise Refused(f"kernel must be at least 2 and farthest at least 1, got {kernel} and {farthest}")
        refuse_unused("bytenet", config)
        self.target, self.dropout = task.target, config.model.dropout
        self.embedding = first_layer(task.vocab, task.channels, size.dim, dtype=size.dtype, rngs=rngs)
        cycle = farthest.bit_length()
        self.blocks = nnx.List(ConvBlock(size, kernel, 2 ** (at % cycle), rngs) for at in range(size.layers))
        self.norm = LayerNorm(size.dim, dtype=size.dtype, rngs=rngs)
        self.head = Linear(size.dim, task.outputs, dtype=size.dtype, rngs=rngs)

    def __call__(self, inputs, *, valid=None, key=None):
        keys = [None] * len(self.blocks) if key is None else list(jax.random.split(key, len(self.blocks)))
        x = self.embedding(inputs)
        for block, key in zip(self.blocks, keys, strict=True):
            x = x + drop(block(x, valid), self.dropout, key)
        x = self.norm(x)
        if self.target == "sequence":
            last = inputs.shape[1] - 1 if valid is None else inputs.shape[1] - 1 - jnp.argmax(valid[:, ::-1], 1)
            x = jnp.take_along_axis(x, jnp.broadcast_to(last, len(x))[:, None, None], 1)[:, 0]
        return self.head(x).astype(jnp.float32), Aux()

    def init_cache(self, B: int, length: int):
        """How many tokens came, and of every block the newest inputs of its taps."""
        if self.target == "sequence":
            raise Refused("this model gives one answer per sequence, not one per token: there is nothing to decode")
        return {"at": jnp.zeros((), jnp.int32), "rings": [block.init_ring(B) for block in self.blocks]}

    def step(self, cache, tokens):
        x, rings = self.embedding(tokens), []
        for block, ring in zip(self.blocks, cache["rings"], strict=True):
            y, ring = block.step(x, ring, cache["at"])
            x = x + y
            rings.append(ring)
        return self.head(self.norm(x)).astype(jnp.float32), {"at": cache["at"] + 1, "rings": rings}


class ConvBlock(nnx.Module):
    """Norm, squeeze to half the width, norm, dilated causal convolution, norm, back to the full width."""

    def __init__(self, size: Size, kernel: int, dilation: int, rngs: nnx.Rngs):
        half = max(1, size.dim // 2)
        self.dilation, self.reach, self.dtype = dilation, (kernel - 1) * dilation, size.dtype
        self.norms = nnx.List(LayerNorm(width, dtype=size.dtype, rngs=rngs) for width in (size.dim, half, half))
        self.down = Linear(size.dim, half, dtype=size.dtype, rngs=rngs)
        self.up = Linear(half, size.dim, dtype=size.dtype, rngs=rngs)
        self.taps = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (kernel, half, half)), decays=True)

    def __call__(self, x, valid):
        x = self._before(x)
        x = x if valid is None else jnp.where(valid[..., None], x, 0)
        x = lax.conv_general_dilated(
            x, self.taps[...].astype(x.dtype), (1,), [(self.reach, 0)],
            rhs_dilation=(self.dilation,), dimension_numbers=("NTC", "TIO", "NTC"),
        )  # fmt: skip
        return self._after(x)

    def init_ring(self, B: int):
        """The newest `reach` inputs of the convolution, (1, B, reach, half), that of position t at t modulo reach."""
        return jnp.zeros((1, B, self.reach, self.taps.shape[1]), self.dtype)

    def step(self, x, ring, at):
        """One token (B, D) at position `at` () -> (B, D), and the new ring."""
        x = self._before(x)
        # The farthest tap stands where the newest input is going to.
        back = self.dilation * jnp.arange(len(self.taps[...]) - 1, 0, -1)
        seen = jnp.concatenate([ring[0][:, (at - back) % self.reach], x[:, None]], 1)
        y = jnp.einsum("bki,kio->bo", seen, self.taps[...].astype(x.dtype))
        return self._after(y), ring.at[0, :, at % self.reach].set(x)

    def _before(self, x):
        return jax.nn.relu(self.norms[1](self.down(jax.nn.relu(self.norms[0](x)))))

    def _after(self, x):
        return self.up(jax.nn.relu(self.norms[2](x)))
