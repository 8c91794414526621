import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
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
    The correlation is the same in all layers, as in the paper. With reset=true (equation 10, untied [CLS]) the first
    position, where the symbol stands that an answer is read off, is as far from all others: what is added to scores is
    theta_1 for it as a query and theta_2, a learned number of every head, for it as a key of the others.
    Deviations from the paper: p starts as standard normal. theta_1 is 0: the same number on all scores of a query
    changes no softmax. By default nothing is reset, for most tasks have no such symbol.

    Options:
        relative: none: absolute positions alone; t5: scores of the buckets of position=t5 are added
        reset: whether the first position is untied from the others
    """

    later_options: ClassVar = ("reset",)

    turns = True  # its `rotate` only looks at how many tokens there are
    by_place = True
    tables = ("table",)
    share = 2**-0.5  # makes sqrt(2 H) of the mechanism's sqrt(H)

    def __init__(
        self,
        size: Size,
        *,
        relative: Literal["none", "t5"] = "none",
        reset: bool = False,
        causal: bool,
        rngs: nnx.Rngs,
    ):
        super().__init__(size, rngs=rngs)
        self.table = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (size.length, size.dim)), decays=False)
        project = lambda: Linear(size.dim, size.heads * size.head, use_bias=False, rngs=rngs)
        self.query, self.key = project(), project()
        self.relative = T5(size, causal=causal, rngs=rngs) if relative == "t5" else None
        draw = lambda: nnx.initializers.normal(0.02)(rngs.params(), (size.heads,))
        self.first = nnx.Param(draw(), decays=False) if reset else None

    def rotate(self, x: jax.Array, at: jax.Array) -> jax.Array:
        """As they are, where all positions have a vector."""
        if len(at) > self.size.length:
            raise Refused(f"position=tupe knows {self.size.length} positions, and there are {len(at)} tokens")
        return x

    def bias(self) -> "Untied":
        size, table = self.size, self.table[...]
        heads = lambda project: project(table).reshape(-1, size.heads, size.head).swapaxes(0, 1)
        queries = heads(self.query) * (2 * size.head) ** -0.5
        relative = None if self.relative is None else self.relative.bias()
        return Untied(queries, heads(self.key), relative, None if self.first is None else self.first[...])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Untied:
    """Scores to add: products of what stands for two positions, (L, H) each, and what `relative` adds; where `first`
    is, in their place that number for the first key, and 0 for the first query."""

    queries: jax.Array
    keys: jax.Array
    relative: Bias | None
    first: jax.Array | None = None

    def __call__(self, q_at: jax.Array, k_at: jax.Array) -> jax.Array:
        queries, keys = self.queries[row(q_at, 0, self.queries)], self.keys[row(k_at, 0, self.keys)]
        scores = products(queries, keys, q_at, k_at)
        scores = scores if self.relative is None else scores + self.relative(q_at, k_at)
        if self.first is None:
            return scores
        return jnp.where(q_at <= 0, 0, jnp.where(k_at <= 0, self.first, scores))
