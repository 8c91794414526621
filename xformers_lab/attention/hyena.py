import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost, MultiHead, why_not, why_not_one_way
from xformers_lab.attention._engine.fourier import causal_convolution, convolution_by_definition
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size

# Sinusoidal layers between a position and its taps, what the first multiplies by, and how small a tap is at the end.
LAYERS, FREQUENCY, LEAST = 3, 10.0, 1e-2


class Hyena(MultiHead):
    """Hyena of order 2: gates around a convolution as long as the sequence (Poli et al., 2023, arXiv 2302.10866,
    sections 3 and 4).

    out_t = q_t * (sum_(s <= t) h_(t-s) * k_s * v_s + d * k_t * v_t), channel by channel, where q, k and v pass a short
    causal convolution first, and the filter h is implicit: h_t = exp(-a t / L) FFN(t), a network with sines of
    1 + 2 bands features of the position t of L, with a rate a for every channel.

    Nothing is attended to, so heads only share out channels. The filter is that of the length the model is built for.
    Deviations from the paper: the convolution goes by halves of 2, 4, 8, ... chunks in the place of one transform, so
        that no rounding of what comes later reaches what comes before: O(T log^2 T); features have whole frequencies,
        and the first layer's sines alone are multiplied, for three such factors would multiply rounding too.

    Options:
        short: positions that the short convolutions of q, k and v see
        bands: frequencies of a position's features
        width: hidden units of the network that makes the filter
        fastest: the share of the length after which taps of the channel that forgets most are at a hundredth
        slowest: of the channel that forgets least
        chunk: positions whose products are computed together
    """

    kind = "without attention"
    exact = True
    keeps_keys = False
    complexity = Complexity(
        time="O(T H log^2 T)",
        memory="O(T (H + width))",
        decoding="a number for each channel of every position, and the filter",
        time_note=" and O(T width^2) for the filter of all heads; O(T H) to decode one token",
    )
    refuses: ClassVar = {
        "bidirectional": "its filter looks back alone, so it serves no encoder and no cross-attention",
        "cross": "what it convolves are products of keys and values, and every one has a query",
        "bias": "it has no scores",
        "documents": "its filter passes from one document to the next",
        "map": "its weights are those of single channels",
    }

    def __init__(
        self,
        size: Size,
        *,
        short: int = 3,
        bands: int = 16,
        width: int = 64,
        fastest: float = 0.3,
        slowest: float = 1.5,
        chunk: int = 32,
        rngs: nnx.Rngs,
    ):
        if min(short, bands, width, chunk) < 1:
            raise Refused(f"short, bands, width and chunk must be at least 1, got {short}, {bands}, {width}, {chunk}")
        if not 0 < fastest <= slowest:
            raise Refused(f"fastest must be above 0 and at most slowest, got {fastest:g} and {slowest:g}")
        super().__init__(size, rngs=rngs)
        self.short, self.bands, self.width, self.chunk = short, bands, width, chunk
        self.fastest, self.slowest = fastest, slowest
        channels = size.heads * size.head
        sizes = [1 + 2 * bands, *[width] * LAYERS, channels]
        # In float32 whatever the model computes in: sines of large numbers need its bits.
        self.filter = nnx.List([Linear(before, after, rngs=rngs) for before, after in itertools.pairwise(sizes)])
        self.frequency = nnx.Param(jnp.full(width, FREQUENCY), decays=False)
        draw = jax.random.uniform(rngs.params(), (3, short, size.heads, size.head), minval=-1.0, maxval=1.0)
        self.shorts = nnx.Param(draw * short**-0.5, decays=False)
        self.skip = nnx.Param(jax.random.normal(rngs.params(), (size.heads, size.head)), decays=False)

    def turns(self) -> bool:
        return False

    def of_length(self):
        return {"filter_of": self.size.length}

    def attend_heads(self, call: Call):
        self._check(call)
        S = call.k.shape[1]
        if call.q.shape[1] != S:
            raise Refused(f"hyena cannot attend to another sequence: {self.refuses['cross']}")
        there = None if call.valid is None else call.valid[..., None, None]
        known = lambda x: x if there is None else jnp.where(there, x, 0)
        q, k, v = (_short(known(x), taps) for x, taps in zip(self._wide(call), self.shorts[...], strict=True))
        z = known(k * v)
        channels_first = lambda x: jnp.moveaxis(x.reshape(*x.shape[:-2], -1), -2, -1)
        run = convolution_by_definition
        if call.method == "attend":
            run = jax.checkpoint(lambda z, taps: causal_convolution(z, taps, chunk=self.chunk))
        mixed = run(channels_first(z), channels_first(self._taps(jnp.arange(S))))
        mixed = jnp.moveaxis(mixed, 1, 2).reshape(z.shape)
        return (q * (mixed + self.skip[...] * z)).astype(call.v.dtype), call.carry, Aux()

    def _check(self, call: Call) -> None:
        if call.bias is not None:
            raise Refused(why_not(self, "bias"))
        if not call.causal:
            raise Refused(why_not_one_way(Hyena))
        if call.k.shape[1] > self.size.length:
            raise Refused(f"hyena's filter is built for {self.size.length} positions, got {call.k.shape[1]}")

    def _wide(self, call: Call):
        """q, k and v (..., N, H) in float32, keys and values of every head."""
        times = call.q.shape[-2] // call.k.shape[-2]
        return (x.astype(jnp.float32) for x in (call.q, jnp.repeat(call.k, times, -2), jnp.repeat(call.v, times, -2)))

    def _taps(self, at):
        """The filter (n, N, H) at distances `at` (n,)."""
        share = at[:, None] / max(self.size.length - 1, 1)
        turned = at[:, None] * np.arange(1, self.bands + 1) % self.size.length
        angle = (2 * np.pi / self.size.length) * turned
        y = jnp.concatenate([share, jnp.cos(angle), -jnp.sin(angle)], 1).astype(jnp.float32)
        first, *hidden, last = self.filter
        y = jnp.sin(self.frequency[...] * first(y))
        for layer in hidden:
            y = jnp.sin(layer(y))
        y = last(y)
        rates = -np.log(LEAST) / np.linspace(self.slowest, self.fastest, y.shape[1], dtype=np.float32)
        return (y * jnp.exp(-share * rates)).reshape(len(at), self.size.heads, -1)

    def cost(self, T: int, S: int) -> Cost:
        N, H, W = self.size.heads, self.size.head, self.width
        network = 2 * S * (W * (1 + 2 * self.bands + (LAYERS - 1) * W) / N + W * H)
        return Cost(
            flops=network + 2 * S * self.chunk * H,
            memory=max(S * max(W, 2 * H), H * self.chunk**2),
            state=2 * S * H + 3 * (self.short - 1) * H,
        )

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        """What was convolved, the filter as far as it was needed, and the newest of what the short ones see."""
        N, H = self.size.heads, self.size.head
        none = lambda *shape: jnp.zeros((*shape, N, H), jnp.float32)
        newest = none(B, 3, self.short - 1)
        return {"z": none(B, length), "taps": none(length), "newest": newest, "seen": jnp.zeros((), jnp.int32)}

    def decode_heads(self, cache, call: Call):
        self._check(call.replace(causal=True))
        rows = jnp.concatenate([cache["newest"], jnp.stack(list(self._wide(call)), 1)[:, :, None]], 2)
        q, k, v = jnp.moveaxis((rows * self.shorts[...][:, ::-1]).sum(2), 1, 0)
        at = cache["seen"]
        z, taps = cache["z"].at[:, at].set(k * v), cache["taps"].at[at].set(self._taps(at[None])[0])
        back = at - jnp.arange(len(taps))
        reached = jnp.where((back >= 0)[:, None, None], taps[jnp.maximum(back, 0)], 0)
        mixed = (reached * z).sum(1)
        out = (q * (mixed + self.skip[...] * k * v)).astype(call.v.dtype)
        return out, {"z": z, "taps": taps, "newest": rows[:, :, 1:], "seen": at + 1}, call.carry


def _short(x, taps):
    """sum_j taps_j x_(t-j): x (B, S, N, H), taps (width, N, H)."""
    width, S = len(taps), x.shape[1]
    wide = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0), (0, 0)))
    return sum(wide[:, width - 1 - j : width - 1 - j + S] * taps[j] for j in range(width))
