from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Attention, Complexity, Cost
from xformers_lab.attention._base.recurrent import Recurrent, at_queries
from xformers_lab.attention._engine.linear.gated import aligned, power_of_two
from xformers_lab.attention._engine.linear.levels import by_definition, by_levels, level_count, one_more
from xformers_lab.attention.gated_delta_net import GatedDeltaNet
from xformers_lab.attention.mamba2 import Mamba2
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class LogLinear(Recurrent):
    """Log-linear attention: a recurrence with a state for every level of a Fenwick tree (Guo et al., 2025, arXiv
    2506.04761, sections 3.1 to 3.3).

    out_t = sum_l lambda_t^l q_t S_t^l, where S_t^l is the state of a linear recurrence that only the keys of level l
    wrote to, and lambda_t = softplus(c * (W x_t)), with learned c, is a scale of every level, for each head. Level 0 is
    the position itself, level l a run of 2^(l - 1) positions, the nearest runs being the shortest: one run for each 1
    in the binary digits of t. So out = ((q k^T) * M * lambda_t^level(t, s)) v, with M the decays of the recurrence.
    Gates, norms and skips around it are those of the rule.

    Runs are counted from the first position on, padding included, which writes nothing.
    Deviations from the paper: the short convolution before the silu of q, k and v is the model's conv=4; values are as
        wide as the block unless expand says more; what else its rule declares.

    Options:
        rule: what each state is: mamba2: it fades by a scalar; gated_delta: it is corrected, too, by the delta rule
        levels: scales of every head, the last for all runs beyond it: 15 are enough for 16,384 positions
        groups: with rule=mamba2, how many different q and k there are
        expand: channels of the values for each of the block's
        chunk: positions whose products are computed together, rounded up to a power of two
    """

    kind = "linearised"
    exact = True
    complexity = Complexity(
        time="O(T H (H log(T / chunk) + chunk))",
        memory="O(T (H + chunk))",
        decoding="log(T) matrices of H x H, and a count",
        time_note=", under the delta rule O(T chunk^2) besides",
    )
    on_places: ClassVar = "its levels are runs of positions, which are counted"

    def __init__(
        self,
        size: Size,
        *,
        rule: Literal["mamba2", "gated_delta"] = "mamba2",
        levels: int = 15,
        groups: int = 1,
        expand: int = 1,
        chunk: int = 64,
        rngs: nnx.Rngs,
    ):
        if levels < 1:
            raise Refused(f"levels must be at least 1, got {levels}")
        if rule != "mamba2" and groups != 1:
            raise Refused(f"groups={groups} share q and k under rule=mamba2 alone: leave groups out, or use that rule")
        Attention.__init__(self, size, rngs=rngs)
        if rule == "mamba2":
            self.rule = Mamba2(size, groups=groups, expand=expand, chunk=chunk, rngs=rngs)
        else:
            self.rule = GatedDeltaNet(size, expand=expand, chunk=chunk, rngs=rngs)
        for name in ("query", "key", "value", "out"):  # the layer's own: its rule stands between them
            setattr(self, name, getattr(self.rule, name))
            delattr(self.rule, name)
        self.levels, self.chunk, self.corrects = levels, chunk, rule == "gated_delta"
        self.scales = Linear(size.dim, size.heads * levels, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.spread = nnx.Param(jnp.ones((size.heads, levels)), decays=False)

    def refusals(self):
        return {**self.rule.refusals(), **super().refusals()}

    def scale_init(self, share: float) -> None:
        super().scale_init(share)
        self.rule.scale_init(share)

    def per_head(self):
        """What its rule has for each head, but for what it adds to its means: a share of the value itself."""
        of_rule = self.rule.per_head()
        return {"skip": of_rule.pop("skip", jnp.zeros(self.size.heads)), "of_rule": of_rule}

    def from_keys(self, x):
        return {"written": self.rule.from_keys(x)}

    def from_queries(self, x):
        scales = self.scales(x).astype(jnp.float32).reshape(*x.shape[:2], self.size.heads, self.levels)
        return {"scales": jax.nn.softplus(self.spread[...] * scales), "behind": self.rule.from_queries(x)}

    def summed(self, v):
        return self.rule.summed(v)

    def finished(self, mean, *, behind):
        return self.rule.finished(mean, **behind)

    def attend(self, q, k, v, *, valid=None, causal, scales, written, skip, of_rule):
        self.one_way(causal)
        q, keys = self.rule.asked(q, k, v, **written, **of_rule)
        fast = jax.checkpoint(lambda asked, keys: aligned(self._by_levels, asked, keys, valid))
        return fast(_with(q, scales), keys) + skip * at_queries(q, keys["v"], valid)

    def _by_levels(self, asked, **keys):
        return by_levels(*self._apart(asked), **keys, chunk=self.chunk)

    def reference(self, q, k, v, *, valid=None, causal, scales, written, skip, of_rule):
        self.one_way(causal)
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        q, keys = self.rule.asked(*wide, **written, **of_rule)
        slow = lambda asked, **keys: by_definition(*self._apart(asked), **keys)
        return aligned(slow, _with(q, scales), keys, valid) + skip * at_queries(q, keys["v"], valid)

    def _apart(self, asked):
        """Queries and their scales."""
        return asked[..., : -self.levels], asked[..., -self.levels :].astype(jnp.float32)

    def init_state(self, length: int, dtype=jnp.float32):
        """The state of every level that there is in so many tokens, and how many were read."""
        H, levels = self.size.head, self._levels_in(length)
        return {"levels": jnp.zeros((levels, H, self.rule.expand * H), jnp.float32), "read": jnp.zeros((), jnp.int32)}

    def _levels_in(self, length: int) -> int:
        return min(self.levels, level_count(length))

    def step(self, state, q, k, v, *, scales, written, skip, of_rule):
        q, keys = self.rule.asked(*(x.astype(jnp.float32) for x in (q, k, v)), **written, **of_rule)
        scales = scales[: len(state["levels"])]
        out, levels = one_more(state["levels"], q, scales, **keys, at=state["read"])
        return out + skip * keys["v"], {"levels": levels, "read": state["read"] + 1}

    def cost(self, T: int, S: int) -> Cost:
        H, C, W = self.size.head, power_of_two(min(self.chunk, S)), self.rule.expand * self.size.head
        rows = C * power_of_two(-(-S // C))
        above = (rows // C - 1).bit_length()
        flops = rows * (2 * C * (H + W) + 2 * H * W + above * H * W)
        if self.corrects:
            flops += rows * (2 * C * (2 * H + C) + 2 * C * C // 3 + 2 * C * H + 2 * H * H + above * H * H)
            flops += 2 * (rows // C) * H * H * (H + W)  # chunks' states and transitions, two by two
        flops += self.rule.flops_of_width(S)
        return Cost(flops=flops, memory=rows * max(C, W), state=self._levels_in(S) * H * W + 1)


def _with(q, scales):
    """Queries and their scales in one array."""
    return jnp.concatenate([q, scales.astype(q.dtype)], -1)
