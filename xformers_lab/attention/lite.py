import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost, KeepsKeys
from xformers_lab.attention.full import Full
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.size import Size


# Keys newest last: a convolution counts from there.
class Lite(KeepsKeys, Full):
    """Long-short range attention of the Lite Transformer (Wu et al., 2020, arXiv 2004.11886, section 4).

    Some heads attend, out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s, for what is far; the others convolve their
    values, out_t = sum_j softmax(w)_j v_(t+j), for what is near, with one learned w (width) for each head (lightweight
    convolution: Wu et al., 2019, arXiv 1901.10430).

    Positions outside the sequence and padding count as zeros in a convolution, which sees the `width` positions around
    its own, causally the last `width`; a bias is for the heads that attend.
    Deviations from the paper: heads are shared out, not channels in front of the projections; the branch that
        convolves has no gate of its own. A model with one head attends alone.

    Options:
        share: heads that attend, of all; at least one does
        width: positions that a convolution sees
    """

    kind = "multi-head"
    exact = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O(S)",
        decoding="every key and value",
        time_note="in the heads that attend, O(T width H) in those that convolve",
        memory_note="per row of blocks",
    )

    def __init__(self, size: Size, *, share: float = 0.5, width: int = 7, rngs: nnx.Rngs):
        if not 0 < share < 1:
            raise Refused(f"share must be between 0 and 1, got {share:g}; attention=full attends in every head")
        if width < 2:
            raise Refused(f"width must be at least 2, got {width}: one position alone is no neighbourhood")
        super().__init__(size, rngs=rngs)
        self.width = width
        self.attending = max(1, min(size.heads - 1, round(share * size.heads)))
        self.taps = nnx.Param(
            0.1 * jax.random.normal(rngs.params(), (size.heads - self.attending, width)), decays=False
        )

    def attend_heads(self, call: Call):
        many, (q, k, v, valid) = self.attending, (call.q, call.k, call.v, call.valid)
        group = jnp.arange(q.shape[2]) // (q.shape[2] // k.shape[2])
        near = jnp.take(v, group[many:], 2)
        # Grouped key/value heads are repeated where the heads that attend are no whole number of groups.
        k, v = (
            (y[:, :, : many * y.shape[2] // q.shape[2]] for y in (k, v))
            if self._whole()
            else (jnp.take(y, group[:many], 2) for y in (k, v))
        )
        bias = jax.tree.map(lambda leaf: leaf[:many], call.bias)
        far, _, _ = super().attend_heads(call.replace(q=q[:, :, :many], k=k, v=v, bias=bias))
        near = near if valid is None else jnp.where(valid[..., None, None], near, 0)
        before = self.width - 1 if call.causal else self.width // 2
        taps = jax.nn.softmax(self.taps[...])
        convolve = _by_definition if call.method == "reference" else _shifted
        near = convolve(near, taps, before, q.shape[1]).astype(v.dtype)
        return jnp.concatenate([far, near], 2), call.carry, Aux()

    def _whole(self) -> bool:
        return self.attending * self.size.key_heads % self.size.heads == 0

    def cost(self, T: int, S: int) -> Cost:
        full, attends = super().cost(T, S), self.attending / self.size.heads
        return Cost(flops=full.flops * attends, memory=full.memory, state=full.state)


def _shifted(v, taps, before: int, T: int):
    """v (B, S, N, H), taps (N, width) -> (B, T, N, H), of T queries at the end of S positions."""
    S, width = v.shape[1], taps.shape[1]
    front, behind = before + max(T - S, 0), width - 1 - before
    wide = jnp.pad(v, ((0, 0), (front, behind), (0, 0), (0, 0)))[:, -(T + width - 1) :].astype(jnp.float32)
    return sum(wide[:, j : j + T] * taps[:, j, None] for j in range(width))


def _by_definition(v, taps, before: int, T: int):
    """The same, as a matrix of queries and positions."""
    S, width = v.shape[1], taps.shape[1]
    tap = jnp.arange(S)[None] - (jnp.arange(T) + S - T)[:, None] + before
    weights = jnp.where((tap >= 0) & (tap < width), jnp.take(taps, jnp.clip(tap, 0, width - 1), 1), 0)
    return jnp.einsum("nts,bsnh->btnh", weights, v.astype(jnp.float32))
