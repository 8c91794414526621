from typing import Literal

from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.global_tokens import GlobalTokens
from xformers_lab.attention._engine.pattern import Band, Dilated
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Longformer(GlobalTokens):
    """Longformer: a sliding window and global tokens (Beltagy et al., 2020, arXiv 2004.05150, section 3).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over |t - s| <= window dilation with (t - s) mod dilation = 0, and
    over s < tokens; the first `tokens` positions see every key, by q', k' and v' of their own projections.

    The published window counts both sides together; here it is one side.
    Deviations from the paper: global tokens are the first positions of the sequence, not chosen by a task; a dilation
    is that of a layer, where the paper gives it to two heads of the higher ones. Rotary positions leave q' and k' as
    they are, as if all stood at position 0.

    Options:
        window: keys seen on each side of a query, besides itself
        tokens: first positions that see every key and are seen by every query
        dilation: distance between neighbouring keys of the window
        projections: own: global queries use projections of their own, as in the paper; shared: those of all others;
            none: own
    """

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(
        time="O(T (window + tokens) H)",
        memory="O(S (H + tokens))",
        decoding="a ring of window dilation + 1 keys and values, and the global tokens'",
        time_note=", with projections=own also two more projections of every position",
    )

    def __init__(
        self,
        size: Size,
        *,
        window: int = 128,
        tokens: int = 1,
        dilation: int = 1,
        projections: Literal["own", "shared"] | None = None,
        rngs: nnx.Rngs,
    ):
        if window < 1:
            raise Refused(f"window must be at least 1, got {window}")
        if dilation < 1:
            raise Refused(f"dilation must be at least 1, got {dilation}")
        if projections == "own" and not tokens:
            raise Refused("projections=own are those of global tokens, and tokens=0 leaves none")
        near = Band(window) if dilation == 1 else Dilated(window, dilation)
        reach, own = window * dilation, projections != "shared"
        super().__init__(size, near, tokens=tokens, reach=reach, own=own, rngs=rngs)
        self.window = window

    @staticmethod
    def limit(length: int):
        return {"window": length, "projections": "shared"}
