import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from xformers_lab.attention import Call, Complexity, Cost
from xformers_lab.attention._base.patterned import near_block
from xformers_lab.attention._base.projected import Projected
from xformers_lab.attention._engine import by_content
from xformers_lab.attention._engine.by_content import batched, grouped, in_blocks, scores_at_once
from xformers_lab.attention._engine.dense import scores
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.attention._engine.pattern import Band
from xformers_lab.attention._engine.products import products, weighted
from xformers_lab.attention._engine.query_blocks import BLOCK, by_blocks, widened
from xformers_lab.attention._engine.softmax import EMPTY, MASKED, hiding, masked_softmax, softmax_average
from xformers_lab.attention._engine.windows import count, windows
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size

# More than any sum of weights.
ALWAYS = 1e6


class Nsa(Projected):
    """Native sparse attention, NSA (Yuan et al., 2025, arXiv 2502.11089, section 3).

    out_t = g_c attention(compressed keys) + g_s attention(keys of chosen runs) + g_w attention(keys at most `window`
    away), with gates g = sigmoid(W x_t) of every query and head. A compressed key is phi(k_i .. k_(i + block - 1)), one
    every `stride`: a perceptron with one hidden layer, on keys with a learned vector added for each place in the block;
    values alike. A run of `select` positions is as important as the weights that compressed keys got in the first
    softmax, each in the share that overlaps with it, summed over the query heads that share a key head; the `chosen`
    most important runs are attended to, always the query's own, the first and the one before the own among them.

    The choice has no gradient of its own; phi learns from the first branch. The three branches have keys and values of
    their own. Causally a compressed key is seen from its last position on; without causality all are seen, any run may
    be chosen, and the window has two sides.
    Deviations from the paper: runs are small and few, for sequences of some thousand positions (the paper has block=32,
    stride=16, select=64, chosen=16, window=512 for 64 thousand); phi is shared by the heads of a layer, its hidden
    layer is as wide as a head, and padded positions are zeros to it; rotary positions and a score bias leave the
    compressed branch alone, which knows the order within a block; a last block that is not full is compressed too where
    nothing is causal.

    Options:
        block: positions that one compressed key stands for, at least stride
        stride: positions from one compressed key to the next
        select: positions in a run that is chosen as a whole
        chosen: runs that a query sees; the first, the own and the one before it count
        window: keys seen on each side of a query in the third branch, besides itself
    """

    refuses: ClassVar = {"map": "it adds up three values of every position, some of them made of whole blocks"}
    kind = "sparse by content"
    exact = True
    accuracy = "over what is chosen"
    complexity = Complexity(
        time="O(T (S / stride + chosen select + window) H)",
        memory="O(T chosen H + S H block / stride)",
        decoding="every key and value of selected runs, the compressed ones, and a ring of window + 1",
    )

    def __init__(
        self,
        size: Size,
        *,
        block: int = 32,
        stride: int = 16,
        select: int = 64,
        chosen: int = 6,
        window: int = 128,
        rngs: nnx.Rngs,
    ):
        for name, value in {"stride": stride, "select": select, "chosen": chosen, "window": window}.items():
            if value < 1:
                raise Refused(f"{name} must be at least 1, got {value}")
        if block < stride:
            raise Refused(f"block must be at least stride, or positions are lost: got {block} and {stride}")
        super().__init__(size, rngs=rngs)
        self.pattern = Band(window)
        self.width, self.stride, self.select, self.chosen, self.window = block, stride, select, chosen, window
        linear = functools.partial(Linear, size.dim, dtype=size.dtype, rngs=rngs)
        self.query = linear(size.heads * size.head, use_bias=False)
        self.key, self.value = (linear(3 * size.key_heads * size.head, use_bias=False) for _ in range(2))
        self.gate = linear(3 * size.heads)
        # phi of keys and phi of values.
        H, wide = size.head, nnx.initializers.lecun_normal(batch_axis=0)
        self.place = nnx.Param(0.02 * jax.random.normal(rngs.params(), (2, block, H)), decays=False)
        self.hidden = nnx.Param(wide(rngs.params(), (2, block * H, H)), decays=True)
        self.squeezed = nnx.Param(wide(rngs.params(), (2, H, H)), decays=True)

    def project(self, x, source, turn_q, turn_k):
        """q (B, T, N, 2H): as it is and turned; k and v (B, S, K, 3H): compressed, selected and window."""
        H, K = self.size.head, self.size.key_heads
        q = self.query(x).reshape(*x.shape[:2], -1, H)
        k, v = (linear(source).reshape(*source.shape[:2], 3 * K, H) for linear in (self.key, self.value))
        turned = turn_k(k).reshape(*source.shape[:2], K, 3 * H)
        k, v = (y.reshape(*source.shape[:2], K, 3 * H) for y in (k, v))
        return jnp.concatenate([q, turn_q(q)], -1), jnp.concatenate([k[..., :H], turned[..., H:]], -1), v

    def from_queries(self, x):
        """How much of each branch is taken."""
        gates = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
        return {"gates": gates.reshape(*x.shape[:2], self.size.heads, 3)}

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        block = near_block(self.window, causal)
        return (block, block) if min(T, S) > block else super().blocks(T, S, causal)

    def attend_heads(self, call: Call):
        """What `attend` and `reference` compute for one head is the window; the other branches see a group of heads."""
        q, k, v, H = call.q, call.k, call.v, self.size.head
        near, _, _ = super().attend_heads(call.replace(q=q[..., H:], k=k[..., 2 * H :], v=v[..., 2 * H :]))
        far = self._far(call.replace(k=k[..., : 2 * H], v=v[..., : 2 * H]))
        gates = self.from_queries(call.queries_input)["gates"]
        return _gated(gates, [*jnp.moveaxis(far, 3, 0), near]).astype(v.dtype), call.carry, Aux()

    def _far(self, call: Call):
        """(B, T, N, 2H) and (B, S, K, 2H) -> (B, T, N, 2, H), the compressed and the selected branch.

        Groups choose alike, so a group is what is mapped. Its g query heads are those of one of the model's key heads,
        even where the keys that are given have been repeated, G for each group.
        """
        q, k, v, causal = call.q, call.k, call.v, call.causal
        (B, T, N, _), K, H = q.shape, self.size.key_heads, self.size.head
        one = self._group if call.method == "attend" else self._group_by_definition
        packed = q.reshape(B, T, K, -1)
        k, v = (y.reshape(*y.shape[:2], K, -1, 2, H) for y in (k, v))
        bias = jax.tree.map(lambda leaf: leaf.reshape(K, -1, *leaf.shape[1:]), call.bias)

        def group(q, k, v, _, valid, bias):
            G = k.shape[1]
            bias = jax.tree.map(lambda leaf: leaf.reshape(G, -1, *leaf.shape[1:]), bias)
            q = q.reshape(T, G, -1, 2, H).transpose(3, 1, 0, 2, 4)  # (2, G, T, g, H)
            k, v = (y.transpose(2, 1, 0, 3) for y in (k, v))  # (2, G, S, H)
            valid = jnp.ones(k.shape[2], bool) if valid is None else valid
            far = jnp.stack(one(q, k, v, valid, causal, bias))
            return far.transpose(2, 1, 3, 0, 4).reshape(T, -1, 2, H), None

        out, _ = over_heads(group, packed, k, v, None, call.valid, bias, plan=plan_of(self.size))
        return out.reshape(B, T, N, 2, H)

    def _group(self, q, k, v, valid, causal: bool, bias):
        """(2, G, T, g, H) and (2, G, S, H) -> two of (G, T, g, H)."""
        keys, values = (jax.vmap(lambda x, i=i: self._compressed(x, valid, i))(y[0]) for i, y in enumerate((k, v)))
        compressed, chosen = self._first(q[0], keys, values, valid, causal)
        second = lambda q, k, v, bias: self._second(q, k, v, chosen, valid, causal, bias)
        return compressed, jax.vmap(second)(q[1], k[1], v[1], bias)

    def _compressed(self, x, valid, which: int):
        """(S, H) -> (slots, H)."""
        there = windows(valid, self.width, self.stride)
        return self._phi(windows(x, self.width, self.stride), there, which)

    def _phi(self, x, there, which: int):
        """(slots, width, H) -> (slots, H) in float32, lest rounding chooses; which: 0 for keys, 1 for values."""
        place, hidden, squeezed = (y[...][which] for y in (self.place, self.hidden, self.squeezed))
        x = jnp.where(there[..., None], x.astype(jnp.float32) + place, 0).reshape(len(x), -1)
        return weighted(jax.nn.gelu(weighted(x, hidden)), squeezed)

    def _first(self, q, compressed, values, valid, causal: bool):
        """The compressed branch (G, T, g, H), and the runs (T, choices) that each query chooses."""
        (G, _, g, H), S, slots = q.shape, len(valid), compressed.shape[1]
        ends = jnp.arange(slots) * self.stride + self.width - 1
        something_real = (
            windows(valid, self.width, self.stride).any(1),
            in_blocks(valid, self._geometry(S)[0], False).any(1),
        )

        def row(q, at, keys):
            # Masks must look dependent on the data: else each of them is stored for the backward, T x slots in all.
            q, at, there, full = lax.optimization_barrier((q, at, *something_real))
            C, known = len(q), max(1, min(slots, (keys - self.width) // self.stride + 1)) if causal else slots
            s = jax.vmap(products)(q.transpose(1, 0, 2, 3).reshape(G, -1, H) * H**-0.5, compressed[:, :known])
            seen = there[:known] & (ends[:known] <= at) if causal else there[None]
            p = masked_softmax(jnp.where(seen[:, None], s.reshape(G, C, g, known), MASKED))
            out = jax.vmap(weighted)(p.reshape(G, -1, known), values[:, :known]).reshape(G, C, g, H)
            total = widened(lax.stop_gradient(p).sum((0, 2)), slots)
            return out.swapaxes(0, 1), self._choose(total, at, full, causal, S)

        out, chosen = by_blocks(row, q.swapaxes(0, 1).astype(jnp.float32), S, causal)
        return out.swapaxes(0, 1), chosen

    def _choose(self, weight, at, full, causal: bool, S: int):
        """Weights (C, slots) of compressed keys for queries at (C, 1) -> runs (C, choices); `runs` for none."""
        run, choices, _ = self._geometry(S)
        slot, share = self._shares(S)
        importance = (weight.at[:, slot].get(mode="fill", fill_value=0) * share).sum(-1)
        own, number = jnp.maximum(at, 0) // run, jnp.arange(len(full))
        # Weights sum to one for each head, so that nothing is as important as the runs that are always chosen.
        always = jnp.select([number == own, number == 0, number == own - 1], [3, 2, 1], 0)
        importance = jnp.where(always > 0, always * ALWAYS, importance)
        best, chosen = lax.top_k(jnp.where(full & (number <= own) if causal else full, importance, MASKED), choices)
        return jnp.where(best > EMPTY, chosen, len(full))

    def _geometry(self, S: int) -> tuple[int, int, int]:
        """Positions in a run, runs a query sees, and queries in a group of those that chose the same."""
        run = min(self.select, S)
        return run, min(self.chosen, -(-S // run)), max(8, run // 2)

    def _shares(self, S: int):
        """Compressed keys that overlap with each run (runs, most), and how much of each does, 0 for others."""
        run = self._geometry(S)[0]
        start = np.arange(0, S, run)
        first = np.maximum(0, -(-(start - self.width + 1) // self.stride))
        last = (start + run - 1) // self.stride
        slot = first[:, None] + np.arange((last - first).max() + 1)
        begin = slot * self.stride
        both = np.minimum(begin + self.width, start[:, None] + run) - np.maximum(begin, start[:, None])
        return slot, (np.maximum(both, 0) / self.width).astype(np.float32)

    def _second(self, q, k, v, chosen, valid, causal: bool, bias):
        """The selected branch of heads with the same keys: (T, g, H), (S, H) and runs (T, choices) -> (T, g, H)."""
        (T, g, H), S = q.shape, len(k)
        run, choices, C = self._geometry(S)
        keys, values, valid = in_blocks(k, run), in_blocks(v, run), in_blocks(valid, run, False)
        groups = grouped(chosen.reshape(-1), len(keys), C)

        def added(of_block):
            q_at, block, valid = of_block
            k_at = (block[:, None] * run + jnp.arange(run))[:, None]
            hidden = hiding(valid[:, None] & (k_at <= q_at) if causal else valid[:, None])[:, :, None]
            if bias is not None:
                hidden = hidden + jnp.moveaxis(jax.vmap(lambda bias: bias(q_at, k_at))(bias), 0, 2)
            return jnp.broadcast_to(hidden, (len(block), C, g, run)).reshape(len(block), -1, run)

        at = groups.sent(jnp.arange(T) + S - T, choices)[..., None]
        sent, block = groups.sent(q * H**-0.5, choices).reshape(len(groups.block), -1, H), groups.block
        out, lse = batched(sent, keys[block], values[block], added, (at, block, valid[block]))
        back = lambda x, fill: groups.returned(x.reshape(-1, C, g, *x.shape[2:]), choices, fill)
        # As `merged`, by a product and with choices last: sums of products over a middle axis of so many are wrong on
        # some processors (see _engine/linear/gated.py).
        weights = jax.nn.softmax(jnp.swapaxes(back(lse, EMPTY), 1, 2), -1)
        return jnp.einsum("tgc,tcgh->tgh", weights, back(out, 0))

    def _group_by_definition(self, q, k, v, valid, causal: bool, bias):
        (_, G, T, _, H), S, slots = q.shape, k.shape[2], count(k.shape[2], self.width, self.stride)
        at, runs = jnp.arange(S - T, S)[:, None], -(-S // self.select)
        member = np.arange(slots)[:, None] * self.stride + np.arange(self.width)
        there = jnp.pad(valid, (0, slots * self.stride + self.width))[member]

        def phi(x, i):
            x = jnp.pad(x, ((0, slots * self.stride + self.width), (0, 0)))[member] + self.place[...][i]
            hidden = jnp.einsum("cph,phd->cd", x * there[..., None], self.hidden[...][i].reshape(-1, H, H))
            return jax.nn.gelu(hidden) @ self.squeezed[...][i]

        k, v = (jnp.where(valid[:, None], x, 0) for x in (k, v))
        seen = there.any(1) & (member[:, -1] <= at) if causal else jnp.broadcast_to(there.any(1), (T, slots))
        p = [masked_softmax(scores(q[0, i, :, j], phi(k[0, i], 0)), seen) for i in range(G) for j in range(q.shape[3])]
        first = [p @ phi(v[0, i // q.shape[3]], 1) for i, p in enumerate(p)]
        share = (member[:, :, None] // self.select == np.arange(runs)).mean(1)
        importance, number, own = lax.stop_gradient(sum(p)) @ share, np.arange(runs), jnp.maximum(at, 0) // self.select
        always = [(number == own - 1, 10), (number == 0, 20), (number == own, 30)]
        for which, more in always:
            importance = jnp.where(which, len(p) * more, importance)
        filled = jnp.pad(valid, (0, -S % self.select)).reshape(runs, -1).any(1)
        importance = jnp.where(filled & (number <= own) if causal else filled, importance, -1)
        one, other = importance[:, :, None], importance[:, None]
        ahead = (other > one) | ((other == one) & (number < number[:, None]))
        chosen = (ahead.sum(2) < self.chosen) & (importance >= 0)
        seen = jnp.repeat(chosen, self.select, 1)[:, :S] & valid
        seen = seen & (jnp.arange(S) <= at) if causal else seen
        of = lambda i, j: jax.tree.map(lambda leaf: leaf[i, j], bias)
        heads = [(i, j) for i in range(G) for j in range(q.shape[3])]
        second = [softmax_average(scores(q[1, i, :, j], k[1, i], of(i, j)), seen, v[1, i]) for i, j in heads]
        return [jnp.stack(x).reshape(G, -1, T, H).swapaxes(1, 2) for x in (first, second)]

    def cost(self, T: int, S: int) -> Cost:
        near, H, slots = super().cost(T, S), self.size.head, count(S, self.width, self.stride)
        g, (run, choices, C) = self.size.heads // self.size.key_heads, self._geometry(S)
        n = by_content.count(T * choices, -(-S // run), C)
        phi = 4 * slots * (self.width + 1) * H * H / g
        sizes = slots * self.width * H, T * choices * H, n * max(C, run) * H, scores_at_once(n, C, run)
        row = min(T, BLOCK) * max(slots, self._shares(S)[0].size)
        return Cost(
            flops=near.flops + phi + 4 * T * slots * H + 4 * n * C * run * H + 6 * T * self.size.dim,
            memory=max(near.memory, row, *sizes),
            state=2 * H * (self._kept(S) + min(S, self.window + 1) + slots + self.width) + 1,
        )

    def _kept(self, length: int) -> int:
        """Positions of whole runs."""
        return -(-length // self.select) * self.select

    keeps_keys = False
    on_places = "its blocks go"

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        """Selected keys stand at their positions, those of the window in a ring; compressed ones as in `mca`."""
        slots = count(length, self.width, self.stride)
        sizes = {"slots": slots, "newest": self.width, "kept": self._kept(length), "ring": min(length, self.window + 1)}
        rows = {name: jnp.zeros((B, self.size.key_heads, 2, n, self.size.head), dtype) for name, n in sizes.items()}
        return {"rows": rows, "seen": jnp.zeros((), jnp.int32)}

    def decode_heads(self, cache, call: Call):
        (B, N, _), K, H = call.q.shape, self.size.key_heads, self.size.head
        gates = self.from_queries(call.as_row().queries_input)["gates"][:, 0]
        q, gates = call.q.reshape(B, K, -1, 2, H), gates.reshape(B, K, -1, 3)
        new = jnp.stack([call.k, call.v], 2).reshape(B, K, 2, 3, H)
        bias = jax.tree.map(lambda leaf: leaf.reshape(K, -1, *leaf.shape[1:]), call.bias)
        step = lambda rows, q, new, gates, bias: self._step(rows, q, new, gates, bias, cache["seen"])
        out, rows = jax.vmap(jax.vmap(step), (0, 0, 0, 0, None))(cache["rows"], q, new, gates, bias)
        return out.reshape(B, N, H).astype(call.v.dtype), {"rows": rows, "seen": cache["seen"] + 1}, call.carry

    def _step(self, rows, q, new, gates, bias, at):
        """One group: q (g, 2, H), keys and values new (2, 3, H), gates (g, 3) -> (g, H), and the new rows."""
        plain, turned = q[:, 0], q[:, 1]
        newest = jnp.concatenate([rows["newest"][:, 1:], new[:, :1]], 1)
        slots, run, R = rows["slots"].shape[1], min(self.select, rows["kept"].shape[1]), rows["ring"].shape[1]
        there = jnp.ones((1, self.width), bool)
        made = jnp.concatenate([self._phi(newest[i][None], there, i) for i in range(2)])
        ends = jnp.arange(slots) * self.stride + self.width - 1
        compressed = jnp.where((ends == at)[:, None], made[:, None], rows["slots"])
        kept = rows["kept"].at[:, at].set(new[:, 1])
        ring = rows["ring"].at[:, at % R].set(new[:, 2])
        p = masked_softmax(jnp.where(ends <= at, scores(plain.astype(jnp.float32), compressed[0]), MASKED))
        first = weighted(p, compressed[1])
        full = jnp.arange(kept.shape[1] // run) * run <= at
        chosen = self._choose(p.sum(0)[None], at[None, None], full, True, kept.shape[1])[0]
        k_at = (chosen[:, None] * run + jnp.arange(run)).reshape(-1)
        near_at = at - (at - jnp.arange(R)) % R

        def look(rows, k_at):
            s = scores(turned, rows[0])
            if bias is not None:
                s = s + jax.vmap(lambda bias: bias(at[None, None], k_at[None])[0])(bias)
            return softmax_average(s, ((k_at >= 0) & (k_at <= at))[None], rows[1])

        second = look(kept.at[:, k_at].get(mode="fill", fill_value=0), k_at)
        third = look(ring, near_at)
        out = _gated(gates, [first, second, third])
        return out, {"slots": compressed, "newest": newest, "kept": kept, "ring": ring}


def _gated(gates, branches):
    """(..., 3) and three of (..., H) -> (..., H)."""
    first, second, third = (gates[..., i, None] * branch for i, branch in enumerate(branches))
    return first + second + third
