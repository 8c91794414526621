from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention.local import Local


class MaskedWindow(Local):
    """A window computed as a mask over all pairs, as several codes do (Tay et al., 2021, arXiv 2011.04006, timed none).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over |t - s| <= window: sparse by its pattern, full by its cost.

    Options:
        window: keys seen on each side of a query, besides itself
        tokens: first positions that see every key and are seen by every query
    """

    complexity = Complexity(time="O(T S H)", memory="O(T S)", decoding="every key and value")

    def fused(self, causal):
        return None

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None):
        return self.reference(q, k, v, valid=valid, documents=documents, causal=causal, bias=bias)

    def cost(self, T: int, S: int) -> Cost:
        return Cost(flops=4 * T * S * self.size.head, memory=T * S, state=2 * self.slots(S) * self.size.head)
