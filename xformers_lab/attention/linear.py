from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.attention import Complexity, Cost, Stepwise
from xformers_lab.attention._engine.linear.features import (
    EXACT,
    divided,
    elu,
    empty_state,
    exponential,
    one_more,
    several_more,
    sums,
)
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size

EPSILON = 1e-6
# exp(k) of the softmax over positions: beyond this a key's channel counts as this.
CLIP = 40.0


def dpfp(x, nu: int):
    """Products of every channel of relu([x, -x]) with those 1 .. nu before it: 2 H nu features."""
    both = jax.nn.relu(jnp.concatenate([x, -x], -1))
    return jnp.concatenate([both * jnp.roll(both, shift, -1) for shift in range(1, nu + 1)], -1)


def taylor(x):
    """phi(q) . phi(k) = 1 + q . k + (q . k)^2 / 2, each product of two channels once: 1 + H + H (H // 2 + 1) features.

    Channel i is multiplied by channel i + j modulo H for j up to H / 2: slices, where an upper triangle is a gather.
    """
    T, H = x.shape
    twice, half = jnp.concatenate([x, x], -1), H // 2
    pairs = jnp.stack([x * twice[:, shift : shift + H] for shift in range(half + 1)], 1)
    # Squares count half; so do the pairs half a turn apart, which come twice.
    weight = np.where((np.arange(half + 1) == 0) | (2 * np.arange(half + 1) == H), 0.5**0.5, 1)
    pairs = pairs * jnp.asarray(weight, x.dtype)[:, None]
    return jnp.concatenate([jnp.ones((T, 1), x.dtype), x, pairs.reshape(T, -1)], -1)


def turned(x, at, length: int):
    """relu(x) times the cosine and the sine of its position's angle: weights fall as cos(pi (i - j) / 2 length)."""
    angle = (jnp.pi / 2 / length * at)[:, None]
    x = jax.nn.relu(x)
    return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], -1).astype(x.dtype)


class Linear(Stepwise):
    """Linear attention with a choice of feature maps (Katharopoulos et al., 2020, arXiv 2006.16236, equations 4 to 9).

    out_t = phi(q_t) sum_s phi(k_s) v_s^T / (phi(q_t) . sum_s phi(k_s)), the sums over all keys, causally over s <= t.

    F is H for elu, relu and softmax, 2 H for cosformer, 2 H nu for dpfp, 2 width for hedgehog, about width^2 / 2 for
    taylor. No scores exist, so no bias can be added. Feature maps:
    elu(x) + 1;
    relu(x);
    dpfp: products of channels of relu([x, -x]) (Schlag et al., 2021, arXiv 2102.11174);
    taylor: weights 1 + s + s^2 / 2 with s = q . k / sqrt(width), Based (Arora et al., 2024, arXiv 2402.18668);
    cosformer: weights relu(q) . relu(k) cos(pi (i - j) / 2 length) (Qin et al., 2022, arXiv 2202.08791);
    hedgehog: exp([Wx, -Wx]) with learned W for q and for k of each head (Zhang et al., 2024, arXiv 2402.04347);
    softmax: over features for q, over the visible positions of each channel for k, without a further normaliser
    (Shen et al., 2018, arXiv 1812.01243).
    Deviations from the papers: Based's sliding window is another layer here; cosFormer's length is that the model is
    built for; Hedgehog's W starts as the identity and is trained with the rest, not by distillation; Shen's softmax
    over positions sees, causally, those up to the query's, and takes keys beyond 40 as 40.

    Options:
        features: the map phi: elu, relu, dpfp, taylor, cosformer, hedgehog or softmax
        nu: shifts of dpfp, each of which gives 2 H features
        width: channels a learned map per head brings q and k to first (taylor, hedgehog); 0: all H, taylor without map
        chunk: positions whose causal products are computed together
    """

    kind = "linearised"
    heads_together = True
    exact = True
    accuracy = "for its kernel, which is not the softmax"
    complexity = Complexity(
        time="O(T H F)",
        memory="O(T F)",
        decoding="one H x F matrix and one vector",
        time_note=", chunked where causal",
    )

    refuses: ClassVar = {"documents": "its sums are over all keys that stand before"}

    def __init__(
        self,
        size: Size,
        *,
        features: Literal["elu", "relu", "dpfp", "taylor", "cosformer", "hedgehog", "softmax"] = "elu",
        nu: int = 1,
        width: int = 0,
        chunk: int = 64,
        rngs: nnx.Rngs,
    ):
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        if not 1 <= nu < 2 * size.head:
            raise Refused(f"nu must be between 1 and {2 * size.head - 1} for heads of {size.head}, got {nu}")
        if not 0 <= width <= size.head:
            raise Refused(f"width must be between 0 and {size.head}, the size of a head, got {width}")
        if nu != 1 and features != "dpfp":
            raise Refused(f"nu is an option of features=dpfp, got features={features}")
        if width and features not in ("taylor", "hedgehog"):
            raise Refused(f"width is an option of features=taylor and features=hedgehog, got features={features}")
        super().__init__(size, rngs=rngs)
        self.features, self.nu, self.width, self.chunk = features, nu, width or size.head, chunk
        shape = (size.heads, 2, size.head, self.width)
        if features == "hedgehog":
            self.maps = nnx.Param(jnp.broadcast_to(jnp.eye(*shape[2:]), shape), decays=True)
        elif features == "taylor" and width:
            self.maps = nnx.Param(jax.random.normal(rngs.params(), shape) * size.head**-0.5, decays=True)
        else:
            self.maps = None

    def per_head(self):
        return {"maps": None if self.maps is None else self.maps[...]}

    def of_length(self):
        return {"period": 4 * self.size.length} if self.features == "cosformer" else {}

    def attend(self, q, k, v, *, valid=None, causal, maps=None):
        return jax.checkpoint(self._attend, static_argnums=5)(q, k, v, valid, maps, causal)

    def _attend(self, q, k, v, valid, own, causal):
        T, S = q.shape[0], k.shape[0]
        length = max(self.size.length, S)
        # A query further than that in front of the last key counts as if it stood there: its cosine is not negative.
        q, _ = self._map(q, jnp.maximum(jnp.arange(T) + S - T, S - length), length, own, 0)
        k, log = self._map(k, jnp.arange(S), length, own, 1)
        options = {"valid": valid, "causal": causal, "chunk": self.chunk, "log": log}
        if self.features == "softmax":
            q = q / _seen_sums(k if valid is None else jnp.where(valid[:, None], k, 0), T, causal)
            return sums(q, k, v, **options)[0].astype(v.dtype)
        out, total = sums(q, k, v, **options)
        return _divided(out, total, log).astype(v.dtype)

    def _map(self, x, at, length, own, which: int):
        """phi of queries (which = 0) or keys (1) at positions, and the logarithm of its scale, None where that is 1."""
        if own is not None:
            x = jnp.dot(x, own[which], **EXACT)
        match self.features:
            case "elu":
                return elu(x), None
            case "relu":
                return jax.nn.relu(x), None
            case "dpfp":
                return dpfp(x, self.nu), None
            case "taylor":
                return taylor(x * x.shape[-1] ** -0.25), None
            case "cosformer":
                return turned(x, at, length), None
            case "hedgehog":
                return exponential(jnp.concatenate([x, -x], -1))
        x = x.astype(jnp.float32)
        return (jnp.exp(jnp.clip(x, -CLIP, CLIP)) if which else jax.nn.softmax(x, -1)), None

    def reference(self, q, k, v, *, valid=None, causal, maps=None):
        T, S = q.shape[0], k.shape[0]
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        seen = (keys <= at) | (not causal) if valid is None else ((keys <= at) | (not causal)) & valid
        if self.features == "softmax":
            weights = jnp.exp(jnp.clip(k, -CLIP, CLIP)) * seen[..., None]  # (T, S, H)
            total = weights.sum(1, keepdims=True)
            weights = weights / jnp.where(total > 0, total, 1)
            return jnp.einsum("tf,tsf,sh->th", jax.nn.softmax(q, -1), weights, v).astype(v.dtype)
        weights = self._weights(q, k, jnp.maximum(at, S - max(self.size.length, S)) - keys, maps) * seen
        epsilon = 0 if self.features == "hedgehog" else EPSILON
        total = weights.sum(-1, keepdims=True)
        return (weights @ v / jnp.where(seen.any(-1, keepdims=True), total + epsilon, 1)).astype(v.dtype)

    def _weights(self, q, k, apart, own):
        """(T, S) unnormalised weights by the definition of the kernel."""
        if own is not None:
            q, k = q @ own[0], k @ own[1]
        dot = lambda q, k: jnp.dot(q, k.T, **EXACT)
        relu = jax.nn.relu
        match self.features:
            case "elu":
                return dot(jax.nn.elu(q) + 1, jax.nn.elu(k) + 1)
            case "relu":
                return dot(relu(q), relu(k))
            case "dpfp":
                q, k = (relu(jnp.concatenate([x, -x], -1)) for x in (q, k))
                i = jnp.arange(2 * self.size.head)
                before = [(i - shift) % len(i) for shift in range(1, self.nu + 1)]
                return sum((dot(q * q[:, j], k * k[:, j]) for j in before), jnp.zeros(()))
            case "taylor":
                s = dot(q, k) * q.shape[1] ** -0.5
                return 1 + s + s**2 / 2
            case "cosformer":
                length = max(self.size.length, len(k))
                return dot(relu(q), relu(k)) * jnp.cos(jnp.pi / 2 * apart / length)
        return 2 * jnp.cosh(q[:, None] + k[None]).sum(-1)  # hedgehog: exp(q + k) + exp(-q - k)

    def cost(self, T: int, S: int) -> Cost:
        H, W, F = self.size.head, self.width, self._count()
        mapped = 0 if self.maps is None else 2 * H * W * (T + S)
        state = H * F + F + (3 if self.features == "cosformer" else 1)
        return Cost(flops=2 * H * F * (T + S) + mapped, memory=max(T, S) * max(H, F), state=state)

    def _count(self) -> int:
        """F, the number of features."""
        H, W = self.size.head, self.width
        taylor = 1 + W + W * (W // 2 + 1)
        return {"dpfp": 2 * H * self.nu, "taylor": taylor, "cosformer": 2 * H, "hedgehog": 2 * W}.get(self.features, H)

    def init_state(self, length: int, dtype=jnp.float32):
        state = {"sums": empty_state(self._count(), self.size.head)}
        if self.features == "cosformer":
            state |= {"at": jnp.zeros((), jnp.int32), "length": jnp.asarray(max(self.size.length, length), jnp.int32)}
        return state

    def step(self, state, q, k, v, *, maps=None):
        at, length = state.get("at", 0), state.get("length", 1)
        q, k = (self._map(x[None], jnp.asarray(at)[None], length, maps, which) for which, x in enumerate((q, k)))
        sums, out, total = one_more(state["sums"], q[0][0], k[0][0], v, k[1])
        state = state | {"sums": sums} | ({"at": at + 1} if "at" in state else {})
        if self.features == "softmax":
            return (sums[0] @ (q[0][0] / sums[1])).astype(v.dtype), state
        return _divided(out[None], total[None], k[1])[0].astype(v.dtype), state

    def steps(self, state, q, k, v, *, maps=None):
        at, length = state.get("at", 0) + jnp.arange(len(q)), state.get("length", 1)
        (q, _), (k, log) = (self._map(x, at, length, maps, which) for which, x in enumerate((q, k)))
        if self.features == "softmax":
            q = q / (state["sums"][1] + jnp.cumsum(k, 0))
        sums, out, total = several_more(state["sums"], q, k, v, log, chunk=self.chunk)
        state = state | {"sums": sums} | ({"at": at[-1] + 1} if "at" in state else {})
        out = out if self.features == "softmax" else _divided(out, total, log)
        return out.astype(v.dtype), state


def _divided(out, total, log):
    return divided(out, total) if log is not None else out / (total + EPSILON)[:, None]


def _seen_sums(k, T: int, causal: bool):
    """(T, F) sums of the features of the keys that each query sees, 1 where there are none."""
    S = k.shape[0]
    total = jnp.cumsum(k, 0) if causal else k.sum(0, keepdims=True)
    if causal:
        total = total[S - T :] if T <= S else jnp.pad(total, ((T - S, 0), (0, 0)))
    return jnp.where(total > 0, total, 1)
