from typing import ClassVar, Literal

from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._engine.pattern import Band
from xformers_lab.attention.longformer import GlobalTokens, Where
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Etc(GlobalTokens):
    """Extended Transformer Construction: a global memory beside a long input (Ainslie et al., 2020, arXiv 2004.08483,
    section 3).

    The first `tokens` positions are the global memory, all others the long input. Long queries see the long keys at
    most `radius` away (l2l) and every global key (l2g) in one softmax; global queries see every key (g2g and g2l) in
    another.

    Global and long queries have projections of their own, and each of l2l, l2g, g2g, g2l its own keys and values, as in
    the paper's unshared form; relative positions come from `position`.
    Deviations from the paper: the memory is part of the sequence, so that its states pass through the same layers,
    outputs and feed-forward; pieces carry no masks of a task's structure. With projections=own rotary positions leave
    global queries, their keys and those of l2g as if all stood at position 0.

    Options:
        radius: long keys seen on each side of a long query, besides itself
        tokens: first positions that are the global memory; the whole sequence where it is shorter; with where=marked at
            most
        projections: own: those of the pieces differ, as in the paper; shared: one for all
        where: first: the first positions are the memory; marked: those that the task marks, which does not decode
    """

    later_options: ClassVar = ("where",)

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(
        time="O(T (radius + tokens) H)",
        memory="O(S (H + tokens))",
        decoding="a ring of radius + 1 keys and values, and the global tokens'",
        time_note=", with projections=own also those of the pieces",
    )

    def __init__(
        self,
        size: Size,
        *,
        radius: int = 84,
        tokens: int = 64,
        projections: Literal["own", "shared"] = "own",
        where: Where = "first",
        rngs: nnx.Rngs,
    ):
        if radius < 1:
            raise Refused(f"radius must be at least 1, got {radius}")
        own = projections == "own"
        options = {"tokens": tokens, "reach": radius, "own": own, "pieces": own, "where": where}
        super().__init__(size, Band(radius), **options, rngs=rngs)
        self.radius = radius

    @staticmethod
    def limit(length: int):
        return {"radius": length, "projections": "shared"}
