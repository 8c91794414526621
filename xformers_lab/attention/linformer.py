from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost, OneHead
from xformers_lab.attention._engine.products import weighted
from xformers_lab.attention._engine.slots import over_all
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Linformer(OneHead):
    """Linformer (Wang et al., 2020, arXiv 2006.04768, equation 7).

    out = softmax(q (E k)^T / sqrt(H)) F v: learned E and F project the keys and the values of all positions to `rank`
    rows.

    Deviations from the paper: E and F begin with variance 1 / length, as the authors' linear layers over positions do,
    not 1 / rank; sharing them between layers is left out. Padded keys and values are zero before they are projected. A
    sequence shorter than the length that the model is built for takes the first columns of E and F, a longer one is
    refused.

    Options:
        rank: rows that keys and values are projected to; at most the length counts
        share: nothing (each head has an E and an F), between heads (headwise), or one E = F for all (keyvalue)
    """

    kind = "memory compression"
    heads_together = True
    exact = False
    accuracy = ": every query's weights over positions are mixtures of the `rank` rows of F"
    complexity = Complexity(time="O(T rank H)", memory="O(T rank)")
    refuses: ClassVar = {
        "causal": "every projected row is a sum over all positions, later ones too",
        "bias": "a projected row has no position",
    }

    def __init__(
        self,
        size: Size,
        *,
        rank: int = 128,
        share: Literal["none", "headwise", "keyvalue"] = "headwise",
        rngs: nnx.Rngs,
    ):
        if rank < 1:
            raise Refused(f"rank must be at least 1, got {rank}")
        super().__init__(size, rngs=rngs)
        self.rank, self.share = min(rank, size.length), share
        draw = lambda *shape: nnx.Param(
            jax.random.normal(rngs.params(), (*shape, self.rank, size.length)) * scale, decays=True
        )
        scale = size.length**-0.5
        if share == "none":
            self.project = draw(size.heads, 2)
        else:
            self.project = draw(1 if share == "keyvalue" else 2)

    def per_head(self):
        return {"project": self.project[...] if self.share == "none" else None}

    def attend(self, q, k, v, *, valid=None, project=None):
        E, F = self._projections(project, k.shape[0])
        k, v = (x if valid is None else jnp.where(valid[:, None], x, 0) for x in (k, v))
        # In float32: XLA:CPU has no product of half precision for the gradient of a P that all samples share.
        keys, values = (weighted(P, x.astype(jnp.float32)).astype(x.dtype) for P, x in ((E, k), (F, v)))
        return over_all(q, keys, values)

    def _projections(self, own, S: int):
        """E and F (rank, S)."""
        if self.size.length < S:
            raise Refused(
                f"linformer is built for {self.size.length} positions, got {S}: "
                "its projections are as wide as the sequence; build it longer or use nystrom"
            )
        both = (self.project[...] if own is None else own)[..., :S]
        return both[0], both[-1]

    def reference(self, q, k, v, *, valid=None, project=None):
        E, F = self._projections(project, k.shape[0])
        there = jnp.ones(len(k)) if valid is None else valid
        terms = lambda P, x: jnp.where(there[:, None] > 0, P[..., None] * x, 0).sum(1)
        keys, values = terms(E, k), terms(F, v)
        return (jax.nn.softmax(q @ keys.T / self.size.head**0.5, -1) @ values).astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H, r = self.size.head, self.rank
        return Cost(flops=4 * r * H * (S + T), memory=max(T, S) * max(r, H), state=0)
