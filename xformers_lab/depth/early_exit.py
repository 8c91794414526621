from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.depth import Context, MakeBlock
from xformers_lab.depth._buckets import over_first
from xformers_lab.depth._stack import build_stack, initial_carries, run_watched
from xformers_lab.depth.fixed import Fixed
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux, by_token, computation
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size

THRESHOLDS = {"entropy": 0.3, "confidence": 0.9, "patience": 0.0}


class EarlyExit(Fixed):
    """Early exit: each layer has a head of its own, and what is sure of its answer stops there (DeeBERT: Xin et al.,
    2020, arXiv 2004.12993; PABEE: Zhou et al., 2020, arXiv 2006.04152; for decoders CALM: Schuster et al., 2022, arXiv
    2207.07061).

    The head above layer l is the model's own head on x + W_l x, W_l (D, D) zeros at first; the last is the model's.
    A whole sequence leaves where it gets one answer, else each token on its own, by

        entropy      entropy of the head's prediction in nats < threshold      (DeeBERT)
        confidence   its largest probability > threshold                       (CALM's softmax response)
        patience     `patience` heads in a row said the same as the one below  (PABEE)

    Training runs all layers. stages=joint adds the loss of head l times l / L (PABEE's weights, the last head's being
    1). stages=two adds each with weight 1, but with all gradients stopped that would not go to W_l: the backbone and
    its head learn what they would without exits, which DeeBERT's second stage gets by freezing them. Both stages run in
    one here, so the heads follow a backbone that still moves; with clip above 0 their gradients count in the norm.

    In evaluation sequences that left are no longer computed: layers run on the smallest of B, 3B/4, B/2, B/4, B/8, 0
    samples that holds the others. Among tokens, the state of one that left goes on unchanged: layers above make their
    keys and values of it (CALM), so they run until all tokens left, and in decoding do no more than that for a token
    that left. With mechanisms joined by `+` there is an exit above each round of them. "computation" is the mean number
    of layers below the exit, and of each token its own, "exit/<l>" the share of answers that came from
    there; see `expected_saving`.

    Options:
        exit: what makes an answer sure
        threshold: of entropy or confidence; none: 0.3 nats, or 0.9
        patience: how many heads must agree with the one below them
        stages: joint: exits and backbone learn together; two: exits do not change the backbone
    """

    own_layers = False  # layers run on the sequences that are still inside
    plain_step = False
    stacked_caches = True

    def __init__(
        self,
        size: Size,
        *,
        exit: Literal["entropy", "confidence", "patience"] = "confidence",
        threshold: float | None = None,
        patience: int = 2,
        stages: Literal["joint", "two"] = "joint",
        make_block: MakeBlock,
        period: int,
        rngs: nnx.Rngs,
    ):
        if size.layers % period or size.layers == period:
            raise Refused(
                f"exits lie between rounds of the {period} mechanism(s), but layers={size.layers} are not two or more "
                "whole rounds"
            )
        if threshold is not None and threshold < 0:
            raise Refused(f"threshold must be at least 0, got {threshold}")
        if patience < 1:
            raise Refused(f"patience must be at least 1, got {patience}")
        super().__init__(size, make_block=make_block, period=period, rngs=rngs)
        self.period, self.rounds = period, size.layers // period
        start = {"use_bias": False, "kernel_init": nnx.initializers.zeros, "dtype": size.dtype}
        self.exits = build_stack(
            lambda index, rngs: Linear(size.dim, size.dim, **start, rngs=rngs), list(range(self.rounds - 1)), rngs
        )
        self.exit, self.patience, self.stages = exit, patience, stages
        self.threshold = THRESHOLDS[exit] if threshold is None else threshold

    def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        if context.predict is None:
            raise Refused("depth=early_exit needs a model that tells how it predicts, see Context.predict")
        return self._evaluate(x, context) if key is None else self._train(x, context, key)

    def _train(self, x, context: Context, key):
        assert context.predict is not None
        predict = context.predict
        carries = initial_carries(list(self.periods), x.shape[0], x.shape[1], x.shape[1])
        x, _, aux, states = run_watched(list(self.periods), x, carries, context, key=key, plan=self.plan)
        graph, exits = nnx.split(self.exits)

        def head(state, variables):
            return predict(state + nnx.merge(graph, variables)(state), valid=context.valid)

        for number in range(self.rounds - 1):
            state, variables = states[number], jax.tree.map(lambda leaf, number=number: leaf[number], exits)
            if self.stages == "two":
                state = lax.stop_gradient(state)
                # Makes the parameters of the model's head, which `predict` holds, arguments that can be stopped.
                pure, held = jax.closure_convert(head, state, variables)
                prediction = 1.0, pure(state, variables, *map(lax.stop_gradient, held))
            else:
                prediction = (number + 1) / self.rounds, head(state, variables)
            aux |= Aux(predictions={f"exit{(number + 1) * self.period}": prediction})
        return x, aux

    # ---- leaving -----------------------------------------------------------------------------------------------

    def leaves(self, logits: jax.Array, vote: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Whether an answer (..., outputs) is sure (...), and the vote of the heads so far with it."""
        label = logits.argmax(-1)
        count = jnp.where(label == vote["label"], vote["count"] + 1, 0)
        logs = jax.nn.log_softmax(logits)
        if self.exit == "entropy":
            sure = -(jnp.exp(logs) * logs).sum(-1) < self.threshold
        elif self.exit == "confidence":
            sure = jnp.exp(logs.max(-1)) > self.threshold
        else:
            sure = count >= self.patience
        return sure, {"label": label, "count": count}

    def _begin(self, x, inside):
        """Nothing has left: inside (...) bool, the states to answer from, the rounds run, and the heads' vote."""
        zeros = jnp.zeros(inside.shape, jnp.int32)
        return {"inside": inside, "out": x, "rounds": zeros, "vote": {"label": zeros - 1, "count": zeros}}

    def _leave(self, x, state: dict, number, exit_head, predict):
        """What is inside and sure, or at the last exit, leaves with its head's state."""
        last, inside = number == self.rounds - 1, state["inside"]
        # The last head is the model's own, whatever stands in its place among the exits.
        answer = x + jnp.where(last, 0, exit_head(x)).astype(x.dtype)
        sure, vote = self.leaves(predict(answer), state["vote"])
        leaving = inside & (sure | last)
        wide = leaving.reshape(*leaving.shape, *[1] * (x.ndim - leaving.ndim))
        return {
            "inside": inside & ~leaving,
            "out": jnp.where(wide, answer, state["out"]),
            "rounds": state["rounds"] + inside,
            "vote": vote,
        }

    def _layers(self):
        """Structures and stacked variables of a round's blocks and of its exit, one exit more than there is."""
        split = [nnx.split(block) for block in self.periods]
        graph, exits = nnx.split(self.exits)
        exits = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[-1:]]), exits)
        return [graph for graph, _ in split], [variables for _, variables in split], graph, exits

    def _evaluate(self, x, context: Context):
        B, T, _ = x.shape
        assert context.predict is not None
        predict = context.predict
        shape = jax.eval_shape(lambda x: predict(x, valid=context.valid), x).shape[:-1]
        inside = jnp.ones(shape, bool)
        if len(shape) == 2 and context.valid is not None:
            inside = context.valid
        counted = inside
        carries = initial_carries(list(self.periods), B, T, T)
        # What layers hand on has no known axis of samples, so it keeps the batch whole.
        sizes = [0, B] if len(shape) == 2 or carries else sorted({B * n // 8 for n in (0, 1, 2, 4, 6, 8)})
        graphs, stacked, exit_graph, exits = self._layers()

        def round_of(state, layer):
            number, variables, exit_variables = layer

            def run(size: int):
                x, carries, inner = state
                if not size:
                    return state
                # Samples that are still inside, in front.
                some = jnp.argsort(~inner["inside"], stable=True)[:size] if size < B else None
                take = lambda leaf: leaf if some is None else leaf[some]
                part, part_state = take(x), jax.tree.map(take, inner)
                valid = None if context.valid is None else take(context.valid)
                tokens = None if context.tokens is None else take(context.tokens)
                where = Context(context.position, valid, predict, tokens=tokens)
                frozen = ~part_state["inside"].reshape(*part_state["inside"].shape, *[1] * (3 - len(shape)))
                for graph, variable in zip(graphs, variables, strict=True):
                    y, carries, _ = nnx.merge(graph, variable)(part, carries, where)
                    part = jnp.where(frozen, part, y)
                exit_head = nnx.merge(exit_graph, exit_variables)
                part_state = self._leave(part, part_state, number, exit_head, lambda x: predict(x, valid=valid))
                if some is None:
                    return part, carries, part_state
                put = lambda whole, new: whole.at[some].set(new)
                return put(x, part), carries, jax.tree.map(put, inner, part_state)

            count = state[2]["inside"].sum() if len(shape) == 1 else jnp.where(state[2]["inside"].any(), B, 0)
            return over_first(count, sizes, run), None

        start = (x, carries, self._begin(x, inside))
        (_, _, state), _ = lax.scan(round_of, start, (jnp.arange(self.rounds), stacked, exits))
        total = jnp.maximum(counted.sum(), 1)
        share = lambda number: (counted & (state["rounds"] == number)).sum() / total
        shares = {f"exit/{number * self.period}": share(number) for number in range(1, self.rounds + 1)}
        layers = state["rounds"] * self.period
        # A sequence leaves with all of its tokens, and counts once however long it is.
        each = layers if len(shape) == 2 else jnp.broadcast_to(layers[:, None], (B, T))
        spent = computation(jnp.where(counted, layers, 0).sum() / total)
        return state["out"], Aux(scalars=shares) | by_token("computation", each, context.valid) | spent

    def step(self, x: jax.Array, cache: Any, context: Context, *, at: jax.Array) -> tuple[jax.Array, Any]:
        assert context.predict is not None
        predict = context.predict
        graphs, stacked, exit_graph, exits = self._layers()

        def round_of(state, layer):
            number, variables, exit_variables, caches = layer

            def run(state, caches):
                x, carries, inner = state
                frozen, after = ~inner["inside"][:, None], []
                for graph, variable, one in zip(graphs, variables, caches, strict=True):
                    y, one, carries = nnx.merge(graph, variable).step(x, one, carries, context, at)
                    x = jnp.where(frozen, x, y)
                    after.append(one)
                inner = self._leave(x, inner, number, nnx.merge(exit_graph, exit_variables), predict)
                return (x, carries, inner), after

            def remember(state, caches):
                """All have left. The compiler drops what only the layers' unused outputs need: queries, the mixing of
                values and the feed-forward layer, where a cache holds keys and values."""
                x, carries, inner = state
                after = []
                for graph, variable, one in zip(graphs, variables, caches, strict=True):
                    _, one, carries = nnx.merge(graph, variable).step(x, one, carries, context, at)
                    after.append(one)
                return (x, carries, inner), after

            return lax.cond(state[2]["inside"].any(), run, remember, state, caches)

        start = (x, cache["below"], self._begin(x, jnp.ones(len(x), bool)))
        rounds = (jnp.arange(self.rounds), stacked, exits, cache["layers"][0])
        (_, _, state), layers = lax.scan(round_of, start, rounds)
        return state["out"], cache | {"layers": [layers, cache["layers"][1]]}


def expected_saving(counts: Sequence[int]) -> float:
    """The share of layers that is not run where counts[l - 1] samples leave above layer l of L: 1 - sum l n_l / (L sum
    n_l) (DeeBERT, section 4.1). Heads cost nothing in it."""
    L, total = len(counts), sum(counts)
    if not total:
        raise ValueError("counts are all 0: no sample left anywhere")
    return 1 - sum(layer * count for layer, count in enumerate(counts, 1)) / (L * total)
