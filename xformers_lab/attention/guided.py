import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost
from xformers_lab.attention._engine.heads import over_samples
from xformers_lab.attention._engine.query_blocks import ROWS, by_blocks, largest, seen_from
from xformers_lab.attention._engine.softmax import masked_softmax
from xformers_lab.attention.full import Full
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size


class Guided(Full):
    """Attention guidance: a loss leads heads to simple patterns (Deshpande and Narasimhan, 2020, arXiv 2010.02399).

    Full attention; the loss gets, for each of three patterns P, weight times the mean over its heads, over queries t
    and over keys s of (p_t(s) - P_t(s))^2, p the head's weights. P_t is 1 at the next position, at the one before, or
    at the first, and 0 elsewhere. The first heads are led to the next, then come those of the one before and of the
    first; further heads are left alone. By default it is a twelfth, a twelfth and a third of them, rounded to one or
    more.

    Deviations from the paper: a query whose P_t it cannot see (the next in a decoder, the one before the first,
    padding) has no part in the mean; the weight stays what it is, where the authors' code lets it fall; there is no
    pattern of delimiters.

    Options:
        next: heads led to the next position (none: a twelfth of all)
        previous: heads led to the position before (none: a twelfth of all)
        first: heads led to the first position (none: a third of all)
        weight: the share of this in the loss
    """

    kind = "multi-head"
    exact = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O(S)",
        decoding="every key and value",
        time_note=", for guided heads half as much again",
        memory_note="per row of blocks",
    )

    def __init__(
        self,
        size: Size,
        *,
        next: int | None = None,
        previous: int | None = None,
        first: int | None = None,
        weight: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if weight < 0:
            raise Refused(f"weight must be at least 0, got {weight:g}")
        N, led = size.heads, []
        for name, count, part in (("next", next, 12), ("previous", previous, 12), ("first", first, 3)):
            count = min(max(1, round(N / part)), N - sum(led)) if count is None else count
            if count < 0:
                raise Refused(f"{name} must be at least 0, got {count}")
            led.append(count)
        if sum(led) > N:
            raise Refused(f"next, previous and first lead {sum(led)} heads, and there are {N}: lead fewer")
        super().__init__(size, rngs=rngs)
        self.led, self.weight = tuple(led), weight

    def attend_heads(self, call: Call):
        out, carry, aux = super().attend_heads(call)
        if not sum(self.led):
            return out, carry, aux
        far = (self._by_definition if call.method == "reference" else self._by_rows)(call)
        return out, carry, aux | Aux(losses={"guidance": self.weight * far}, scalars={"guided": far})

    def _by_rows(self, call: Call):
        """A block of queries of all guided heads at a time; the T x S weights are never stored."""
        (q, k, valid), S = self._guided(call), call.k.shape[1]

        def one(q, k, _, valid):
            def row(q, at, keys):
                q, of_keys = jnp.swapaxes(q, 0, 1) * q.shape[-1] ** -0.5, jnp.swapaxes(k[:, :keys], 1, 2)
                s = jnp.matmul(q, of_keys, preferred_element_type=jnp.float32)
                far, counted = self._far(s, at, seen_from(at, keys, valid, call.causal), call.bias)
                return far.T, counted.T

            return by_blocks(row, jnp.swapaxes(q, 0, 1), S, call.causal, at_once=self._at_once())

        far, counted = over_samples(one, q, k, None, valid, plan=plan_of(self.size))
        return self._mean(jnp.swapaxes(far, 1, 2), jnp.swapaxes(counted, 1, 2), call)

    def _by_definition(self, call: Call):
        (q, k, valid), (T, S) = self._guided(call), (call.q.shape[1], call.k.shape[1])
        at = jnp.arange(T)[:, None] + S - T
        s = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32) / q.shape[3] ** 0.5
        far, counted = jax.vmap(lambda s, valid: self._far(s, at, seen_from(at, S, valid, call.causal), call.bias))(
            s, jnp.ones((len(q), S), bool) if valid is None else valid
        )
        return self._mean(far, counted, call)

    def _guided(self, call: Call):
        """Queries and keys of guided heads (B, heads, T, H) and (B, heads, S, H), and which keys are no padding."""
        count = sum(self.led)
        heads = lambda y: jnp.swapaxes(jnp.repeat(y, call.q.shape[2] // y.shape[2], 2), 1, 2)[:, :count]
        return heads(call.q), heads(call.k), call.valid

    def _far(self, s, at, seen, bias):
        """Scores s (heads, C, keys) of queries at positions (C, 1) -> the squared distance of their weights from their
        pattern (heads, C), and whether its position is seen."""
        keys, count = jnp.arange(s.shape[2])[None], sum(self.led)
        if bias is not None:
            of_heads = jax.tree.map(lambda leaf: leaf[:count], bias)
            s = s + jax.vmap(lambda bias: bias(at, keys))(of_heads)
        targets = [keys == at + 1, keys == at - 1, keys == jnp.zeros_like(at)]
        pattern = jnp.concatenate([
            jnp.broadcast_to(target, (led, *target.shape)) for target, led in zip(targets, self.led, strict=True)
        ])  # fmt: skip
        p = masked_softmax(s, seen)
        return jnp.square(p - pattern).sum(-1), (pattern & seen).any(-1)

    def _mean(self, far, counted, call: Call):
        """Of distances (B, heads, T) the sum over patterns of the mean over what counts, and over keys."""
        B, S = call.k.shape[:2]
        valid = jnp.ones((B, S), bool) if call.valid is None else call.valid
        if call.q.shape[1] == S:  # queries that are no padding
            counted = counted & valid[:, None]
        far, total, start = jnp.where(counted, far / jnp.maximum(valid.sum(1), 1)[:, None, None], 0), 0.0, 0
        for led in self.led:
            part = slice(start, start := start + led)
            total += far[:, part].sum() / jnp.maximum(counted[:, part].sum(), 1)
        return jnp.asarray(total, jnp.float32)

    def _at_once(self) -> int:
        return max(16, ROWS // max(1, sum(self.led)))

    @staticmethod
    def limit(length: int):
        return {}

    def cost(self, T: int, S: int) -> Cost:
        one, H, led = super().cost(T, S), self.size.head, sum(self.led) / self.size.heads
        memory = max(one.memory, largest(T, S, H, self._at_once()))
        return Cost(flops=one.flops + 2 * T * S * H * led, memory=memory, state=one.state)
