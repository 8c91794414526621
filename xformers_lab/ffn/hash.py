import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.ffn import ACTIVATIONS, Activation, Bank, Ffn, hidden_size
from xformers_lab.ffn._experts import run_experts
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.size import Size


class Salt(nnx.Variable):
    """What makes the hash of one layer another than that of the next."""


class Hash(Ffn):
    """Hash layer: the token itself, not a learned router, says which of many networks runs (Roller et al., 2021, arXiv
    2106.04426).

    y_t = f_e(x_t), e = hash(token_t) mod experts. Every occurrence of a token goes to the same expert of a layer;
    nothing is dropped, and there is nothing to balance by a loss. The experts' shares follow the frequencies of the
    tokens, so "busiest_expert", the largest share over an equal one, is reported.
    Deviations from the paper: its table of random experts, one for all layers, is a hash function here, for a layer
    need not know the vocabulary; each layer has its own (the paper's "multi-layer" variant of different hashes).

    Options:
        experts: how many networks
        ratio: hidden width of one expert over model width
        activation: between the layers
    """

    documents_apart = True

    def __init__(
        self,
        size: Size,
        *,
        experts: int = 8,
        ratio: float = 4.0,
        activation: Activation = "gelu",
        rngs: nnx.Rngs,
    ):
        if experts < 1:
            raise Refused(f"experts must be at least 1, got {experts}")
        hidden = hidden_size(size, ratio)
        draw = nnx.initializers.lecun_normal(batch_axis=0)
        self.up = Bank(draw(rngs.params(), (experts, size.dim, hidden)), decays=True)
        self.down = Bank(draw(rngs.params(), (experts, hidden, size.dim)), decays=True)
        self.salt = Salt(jax.random.bits(rngs.params(), (), jnp.uint32))
        self.experts, self.activation = experts, activation

    def __call__(
        self,
        x: jax.Array,
        *,
        valid: jax.Array | None = None,
        key: jax.Array | None = None,
        tokens: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        assert tokens is not None, "a hash layer is called with the tokens"
        expert = self.expert(tokens)
        expert = expert if valid is None else jnp.where(valid, expert, self.experts)
        place = jnp.broadcast_to(jnp.arange(expert.shape[1]), expert.shape)
        up, down = self.up[...].astype(x.dtype), self.down[...].astype(x.dtype)
        ones = jnp.ones(expert.shape, jnp.float32)
        y = run_experts(x, place, expert, ones, up, down, ACTIVATIONS[self.activation])
        sent = jnp.zeros(self.experts).at[expert].add(1, mode="drop")
        busiest = self.experts * sent.max() / jnp.maximum(sent.sum(), 1)
        return y, Aux(scalars={"busiest_expert": busiest})

    def expert(self, tokens: jax.Array) -> jax.Array:
        """int32 tokens -> the number of their expert."""
        return (mixed(tokens.astype(jnp.uint32) ^ self.salt[...]) % self.experts).astype(jnp.int32)


def mixed(h: jax.Array) -> jax.Array:
    """uint32 -> uint32, each bit of which depends on all: the finaliser of MurmurHash3 (Appleby, 2011)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
