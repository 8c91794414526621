"""What the heads of a model do, in numbers: how widely each looks, how far, at what, and whether it does anything.

A figure is a mean over the queries that have a choice: those that are no padding and may look at two keys or more.
Of weights below 0, as differences of softmaxes have, the sizes count; they are divided by their sum over the keys.
"""

import dataclasses

import numpy as np

# A head is dead where it adds less than this share of what the heads of its layer add on average,
SMALL = 0.1
# or where a token that half of the queries may look at gets this share of its weights.
FIXED = 0.9
# Why a head is dead.
NOTHING, ONE_TOKEN = "adds nothing", "looks at one token"


@dataclasses.dataclass(frozen=True)
class Heads:
    """Arrays (L, N) of float64, NaN where there is no such figure or no query has a choice.

    Args:
        entropy: Bits, -sum_s p_s log2 p_s (as in Clark et al., 2019, arXiv 1906.04341, in nats).
        relative: Of each query the entropy over that of equal weights on all keys that it may look at: 0 where all is
            on one key, 1 where it looks at all alike.
        distance: Tokens between a query and what it looks at, sum_s p_s |t - s| (Vig and Belinkov, 2019, arXiv
            1906.04284); NaN where keys are of another sequence.
        first: Share of the first key that is no padding.
        itself: Share of the query's own position; NaN where keys are of another sequence.
        padding: Share of keys that are padding.
        total: What the weights of a query add up to, their signs kept: 1 of a softmax.
        output: The length of what the head adds to the output of its layer, through its part of the output projection,
            over the mean of all heads of the layer (as Kobayashi et al., 2020, arXiv 2004.10102, weigh a head by the
            vectors that it gives), over all queries that are no padding; NaN where a layer does not add up what heads
            give.
        fixed: The largest share that one key gets among those that at least half of the queries may look at.
    """

    entropy: np.ndarray
    relative: np.ndarray
    distance: np.ndarray
    first: np.ndarray
    itself: np.ndarray
    padding: np.ndarray
    total: np.ndarray
    output: np.ndarray
    fixed: np.ndarray

    @property
    def dead(self) -> np.ndarray:
        """(L, N) bool: heads whose `reason` is not empty."""
        return self.reason != ""

    @property
    def reason(self) -> np.ndarray:
        """(L, N) of text, why a head is dead: it adds next to nothing, `output` below 0.1, or it looks at one and the
        same token, `fixed` 0.9 or more, so that it adds the same to every query. Both are scores by which
        Sandoval-Segura et al. (2025, arXiv 2504.03889) call a head inactive; the thresholds are this lab's.
        """
        reasons = np.where(self.fixed >= FIXED, ONE_TOKEN, "")
        return np.where(self.output < SMALL, NOTHING, reasons)


def figures_of(
    weights: np.ndarray,
    *,
    causal: bool,
    real_queries: np.ndarray,
    real_keys: np.ndarray,
    norms: np.ndarray | None = None,
    crosses: bool = False,
    documents: np.ndarray | None = None,
) -> Heads:
    """The figures of weights (L, N, T, S), T queries and S keys.

    real_queries (T,), real_keys (S,) bool: which are no padding. norms (L, N, T): how much each head adds at each
    query. crosses: whether keys are of another sequence than queries; else T = S, and position t is its own key.
    documents (T,): of packed data the document of each token, for a query sees its own alone.
    """
    T, S = weights.shape[2:]
    seen = seeing(T, S, causal, real_keys, documents)
    sizes = np.abs(weights.astype(np.float64))
    sums = sizes.sum(-1, keepdims=True)
    p = np.divide(sizes, sums, out=np.zeros_like(sizes), where=sums > 0)
    choosing = real_queries & (seen.sum(-1) > 1)
    keys = seen.sum(-1)
    mean = lambda of_queries: _mean(of_queries, choosing)
    logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
    entropy = -(p * logs).sum(-1)
    apart = np.abs(np.arange(T)[:, None] - np.arange(S)[None])
    nothing = np.full(weights.shape[:2], np.nan)
    first = int(real_keys.argmax()) if real_keys.any() else 0
    output = nothing
    if norms is not None:
        each = _mean(norms, real_queries)
        whole = each.mean(1, keepdims=True)
        output = np.divide(each, whole, out=np.where(np.isnan(each), np.nan, 0), where=whole > 0)
    return Heads(
        entropy=mean(entropy),
        relative=mean(entropy / np.log2(np.maximum(keys, 2))),
        distance=nothing if crosses else mean((p * apart).sum(-1)),
        first=mean(p[..., first]),
        itself=nothing if crosses else mean(np.diagonal(p, axis1=2, axis2=3)),
        padding=mean(p[..., ~real_keys].sum(-1)),
        total=mean(weights.sum(-1, dtype=np.float64)),
        output=output,
        fixed=_fixed(p, seen & choosing[:, None], choosing),
    )


def seeing(T: int, S: int, causal: bool, real_keys: np.ndarray, documents: np.ndarray | None = None) -> np.ndarray:
    """(T, S) bool: which keys causality, padding and packed documents leave to each query, whatever else a mechanism
    leaves out."""
    ahead = np.tri(T, S, S - T, dtype=bool) if causal else np.ones((T, S), bool)
    own = True if documents is None else documents[:, None] == documents[None]
    return ahead & real_keys[None] & own


def _fixed(p: np.ndarray, seen: np.ndarray, choosing: np.ndarray) -> np.ndarray:
    """The largest mean share of one key, over the choosing queries that may look at it, if those are half of all."""
    queries = seen.sum(0)
    often = (2 * queries >= choosing.sum()) & (queries > 0)
    if not often.any():
        return np.full(p.shape[:2], np.nan)
    return ((p * seen).sum(2)[..., often] / queries[often]).max(-1)


def _mean(of_queries: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(..., T) -> (...), over the chosen queries; NaN without any."""
    if not chosen.any():
        return np.full(of_queries.shape[:-1], np.nan)
    return of_queries[..., chosen].astype(np.float64).mean(-1)
