import dataclasses
from typing import Literal

import jax
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size
from xformers_lab.position import Bias, Position
from xformers_lab.position._rows import products, row
from xformers_lab.position.t5 import T5


class Tupe(Position):
    """TUPE: positions correlate by projections of their own (Ke et al., 2020, arXiv 2006.15595, equations 7 and 8).

    score = (q_t . k_s + U_q p_t . U_k p_s) / sqrt(2 H), p being a learned vector for every position; with relative=t5
    (the paper's TUPE-R) a learned score of the distance's bucket is added, as position=t5 does.
    The correlation is the same in all layers, as in the paper.
    Deviations from the paper: p starts as standard normal. The scores of the symbol [CLS] are not reset, for there is
    no such symbol here.

    Options:
        relative: none: absolute positions alone; t5: scores of the buckets of position=t5 are added
    """

    turns = True  # its `rotate` only looks at how many tokens there are
    by_place = True
    tables = ("table",)
    share = 2**-0.5  # makes sqrt(2 H) of the mechanism's sqrt(H)

    def __init__(self, size: Size, *, relative: Literal["none", "t5"] = "none", causal: bool, rngs: nnx.Rngs):
        super().__init__(size, rngs=rngs)
        self.table = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (size.length, size.dim)), decays=False)
        project = lambda: Linear(size.dim, size.heads * size.head, use_bias=False, rngs=rngs)
        self.query, self.key = project(), project()
        self.relative = T5(size, causal=causal, rngs=rngs) if relative == "t5" else None

    def rotate(self, x: jax.Array, at: jax.Array) -> jax.Array:
        """As they are, where all positions have a vector."""
        if len(at) > self.size.length:
            raise Refused(f"position=tupe knows {self.size.length} positions, and there are {len(at)} tokens")
        return x

    def bias(self) -> "Untied":
        size, table = self.size, self.table[...]
        heads = lambda project: project(table).reshape(-1, size.heads, size.head).swapaxes(0, 1)
        queries = heads(self.query) * (2 * size.head) ** -0.5
        return Untied(queries, heads(self.key), None if self.relative is None else self.relative.bias())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Untied:
    """Scores to add: products of what stands for two positions, (L, H) each, and what `relative` adds."""

    queries: jax.Array
    keys: jax.Array
    relative: Bias | None

    def __call__(self, q_at: jax.Array, k_at: jax.Array) -> jax.Array:
        queries, keys = self.queries[row(q_at, 0, self.queries)], self.keys[row(k_at, 0, self.keys)]
        scores = products(queries, keys, q_at, k_at)
        return scores if self.relative is None else scores + self.relative(q_at, k_at)
