import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.ffn import Activation
from xformers_lab.ffn._experts import Experts
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.size import Size


class Salt(nnx.Variable):
    """What makes the hash of one layer another than that of the next."""


class Hash(Experts):
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
        super().__init__(size, experts=experts, ratio=ratio, activation=activation, rngs=rngs)
        self.salt = Salt(jax.random.bits(rngs.params(), (), jnp.uint32))

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
        y = self.run_chosen(x, expert[..., None], jnp.ones((*expert.shape, 1), jnp.float32))
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
