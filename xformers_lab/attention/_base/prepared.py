"""What may stand between a layer's projections and its mechanism, for any that has them: a short convolution of
queries, keys and values, a norm of each head's queries and keys, queries that grow with the number of keys they
see, and values of the first layer."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.nn.normalisation import RMSNorm
from xformers_lab.nn.short_conv import ShortConv
from xformers_lab.nn.size import Size

HeadNorms = Literal["none", "rms", "l2"]
ValueMix = Literal["none", "half", "learned", "only"]
LogLength = int | Literal["learned"] | None
# The least length of a vector that is divided by its own.
SHORTEST = 1e-6


class ShortConvs(nnx.Module):
    """A short convolution behind each projection of a layer, under its name, `query`, `key` or `value`, as the heads of
    Primer have them (So et al., 2021, arXiv 2109.08668), and Hyena's operators (Poli et al., 2023, arXiv 2302.10866).

    In an encoder they see both sides, as Primer's have them there.

    channels: those of each projection that there is.
    """

    def __init__(self, width: int, channels: Mapping[str, int], *, causal: bool):
        self.names = tuple(channels)
        for name, count in channels.items():
            setattr(self, name, ShortConv(count, width, causal=causal))

    @property
    def before(self) -> int:
        """How many positions in front of its own a convolution sees."""
        return getattr(self, self.names[0]).before

    def __call__(self, name: str, y: jax.Array, valid: jax.Array | None, documents: jax.Array | None) -> jax.Array:
        """What a projection gave (B, S, C), convolved."""
        return getattr(self, name)(y, valid=valid, documents=documents) if name in self.names else y

    def tails(self, B: int, dtype: Any) -> dict[str, jax.Array]:
        """What decoding keeps beside the mechanism's cache: the newest inputs of every convolution."""
        return {name: getattr(self, name).init_tail(B, dtype) for name in self.names}

    def step(self, name: str, y: jax.Array, tails: dict) -> tuple[jax.Array, dict]:
        """What a projection gave of one token (B, C), or of T (B, T, C), convolved, and the tails behind it."""
        if name not in self.names:
            return y, tails
        conv = getattr(self, name)
        y, tail = (conv.step if y.ndim == 2 else conv.step_several)(tails[name], y)
        return y, tails | {name: tail}


class HeadNorm(nnx.Module):
    """Queries and keys of every head, normalised, so that no score outgrows them.

    rms: each over its root mean square, times learned weights of its channels, one row for queries and one for keys,
    which the heads share (Dehghani et al., 2023, arXiv 2302.05442, there with layer norms; root mean squares as in
    Qwen3). l2: each over its length, and scores times one learned number of the layer in the place of 1 / sqrt(H), at
    the start log2(L^2 - L) of the length L that it is built for (QKNorm: Henry et al., 2020, arXiv 2010.04245, where L
    is a percentile of the lengths of the data).
    """

    def __init__(self, size: Size, kind: HeadNorms):
        self.kind, self.head = kind, size.head
        if kind == "rms":
            # No random numbers: it draws none.
            self.query, self.key = (RMSNorm(size.head, dtype=size.dtype, rngs=nnx.Rngs(0)) for _ in range(2))
        else:
            length = max(size.length, 2)
            self.scale = nnx.Param(jnp.asarray(math.log2(length * length - length), jnp.float32), decays=False)

    def of_queries(self, q: jax.Array) -> jax.Array:
        """(..., N, H) -> the same, which the mechanism divides by sqrt(H) once more."""
        return self.query(q) if self.kind == "rms" else _unit(q, self.scale[...] * self.head**0.5)

    def of_keys(self, k: jax.Array) -> jax.Array:
        """(..., K, H) -> the same."""
        return self.key(k) if self.kind == "rms" else _unit(k, 1.0)


class LogScale(nnx.Module):
    """Queries times a logarithm of the number n of keys that each may see, so that the softmax of many keys can be as
    sharp as that of few (Chiang and Cholak, 2022, arXiv 2202.12172, section 5.2).

    reference: a number n0: times log n / log n0 (Su, 2021, kexue.fm/archives/8823); learned: times s log n, with a
    learned s of every head (Scalable-Softmax: Nakanishi, 2025, arXiv 2501.19399, equation 2), at the start the inverse
    of the mean of log n over the positions it is built for.
    """

    def __init__(self, size: Size, reference: int | Literal["learned"]):
        self.reference = reference
        if reference == "learned":
            mean = sum(map(math.log, range(1, size.length + 1))) / size.length
            self.share = nnx.Param(jnp.full(size.heads, 1 / max(mean, math.log(2) / 2), jnp.float32), decays=False)

    def __call__(self, q: jax.Array, count: jax.Array) -> jax.Array:
        """Queries (..., N, H) and what each sees, (..., 1) or (..., N) whole numbers -> the same queries, scaled."""
        share = 1 / math.log(self.reference) if isinstance(self.reference, int) else self.share[...]
        times = share * jnp.log(jnp.maximum(count, 1).astype(jnp.float32))
        return (q * times[..., None]).astype(q.dtype)


class FirstValues(nnx.Module):
    """Values of the first layer, mixed into those of the layers above (ResFormer: Zhou et al., 2024, arXiv 2410.17897).

    v' = a v_1 + b v, of layer 1 v_1 itself. half: a = b = 1/2; learned: two numbers of every layer, 1/2 at the start;
    only: a = 1 and b = 0, so that all layers share the values of the first (SVFormer, there without projections of
    values in the others, which here are idle).
    """

    def __init__(self, kind: ValueMix):
        self.kind = kind
        self.shares = nnx.Param(jnp.full(2, 0.5), decays=False) if kind == "learned" else None

    def __call__(self, v: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        """Values (..., K, H), and of the first layer those and how many layers are below () -> values, that for the
        layer above."""
        first, below = carry
        if self.shares is None:
            first_share, own_share = {"half": (0.5, 0.5), "only": (1.0, 0.0)}[self.kind]
        else:
            first_share, own_share = self.shares[...]
        mixed = (first_share * first + own_share * v).astype(v.dtype)
        return jnp.where(below == 0, v, mixed), (jnp.where(below == 0, v, first), below + 1)


def counted(T: int, S: int, valid: jax.Array | None, documents: jax.Array | None, causal: bool) -> jax.Array:
    """How many keys each of T queries at the end of S positions may see: those of its document that are no padding,
    and where it is causal stand no later, (B or 1, T)."""
    there = (jnp.ones((1, S), bool) if valid is None else valid).astype(jnp.int32)
    if not causal and documents is None:
        return jnp.broadcast_to(there.sum(1, keepdims=True), (len(there), T))
    seen = _so_far(there, documents)
    if not causal:
        others = _so_far(there[:, ::-1], documents if documents is None else documents[:, ::-1])[:, ::-1]
        seen = seen + others - there
    return seen[:, S - T :] if T <= S else jnp.pad(seen, ((0, 0), (T - S, 0)))


def _so_far(there, documents):
    """(B, S): the sum of `there` over the positions of a document up to each."""
    total = jnp.cumsum(there, 1)
    if documents is None:
        return total
    begins = documents[:, 1:] != documents[:, :-1]
    return total - jax.lax.cummax(jnp.pad(jnp.where(begins, total[:, :-1], 0), ((0, 0), (1, 0))), axis=1)


def _unit(x, times):
    wide = x.astype(jnp.float32)
    return (wide * (times * jax.lax.rsqrt((wide * wide).sum(-1, keepdims=True) + SHORTEST**2))).astype(x.dtype)
