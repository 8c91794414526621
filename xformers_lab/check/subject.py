"""A mechanism under test: built for small sizes, given inputs, run with its gradients, each run compiled once and kept.

Properties look at one interface, whether the mechanism is one head, all heads or a layer of its own: a `Case` is run to
an output and its gradients, and what is attended to is held by the arrays named in `sources`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.attention import Attention, MultiHead, OneHead, Projected
from xformers_lab.errors import Refused
from xformers_lab.nn.plan import Plan
from xformers_lab.nn.size import Size

# A prime, so that no window, chunk, block or grid divides it; T below S and above it; a length with many divisors.
LENGTH, SHORT, EVEN = 67, 11, 60
# Several blocks of the engines at their default sizes, and long enough for the loop over heads.
LONG = 523
HEADS, KEY_HEADS, HEAD = 4, 2, 8
# Relative to the largest entry, in float32. Sums run in another order in a fast form; a wrong key costs far more.
VALUE, GRADIENT = 2e-5, 5e-5


class Broken(Exception):
    """A property does not hold; the message is for the author of the mechanism."""


class NotApplicable(Exception):
    """A property that says nothing about this mechanism; the message says why."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wave:
    """A score bias that tells every pair of positions apart; its leaves hold one number per head."""

    slope: jax.Array
    height: jax.Array

    def __call__(self, q_at, k_at):
        return self.slope * (q_at - k_at) / 16 + self.height * jnp.sin(0.9 * q_at + 0.4 * k_at)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ramp:
    """Vectors of pairs that tell every distance apart, u + (s - t) w / 16; its leaves hold two vectors per head."""

    vectors: jax.Array

    def __call__(self, p, q_at, k_at):
        still, moving = (jnp.broadcast_to(x, p.shape) for x in (1.0, (k_at - q_at) / 16))
        return (p * still).sum(-1)[..., None] * self.vectors[0] + (p * moving).sum(-1)[..., None] * self.vectors[1]


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of call: T queries at the end of S keys, with padding and a bias or without."""

    T: int
    S: int
    causal: bool
    padded: bool = True
    biased: bool = False
    batch: int = 4
    packed: bool = False

    def __str__(self) -> str:
        words = ["causal" if self.causal else "not causal", f"T={self.T}", f"S={self.S}"]
        return ", ".join([*words, *["padded"] * self.padded, *["biased"] * self.biased, *["packed"] * self.packed])


class Result:
    """Output and gradients of one run, as float32 numpy arrays; grads has "inputs" and "own"."""

    def __init__(self, out, grads):
        self.dtype = out.dtype
        self.out, self.grads = jax.tree.map(lambda x: np.asarray(x, np.float32), (out, grads))


class Subject:
    """A mechanism at the kit's sizes. `make(size, small)` builds it, with its options shrunk where `small`.

    Its parameters are moved a little, as training does, unless `initial`: heads whose parameters start equal, or that
    start as zeros, would hide that they are mistaken for one another or never used. jit: how its runs are compiled; the
    kit compiles as users do. brief: fast and reference are compared at one shape alone. gradients: False where
    values alone are looked at, so that half of each program is never compiled. marks_seed: of the places that are
    marked for a mechanism that looks at marks.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[Size, bool], Attention],
        *,
        length: int = LENGTH,
        small: bool = True,
        initial: bool = False,
        jit: Callable = jax.jit,
        brief: bool = False,
        gradients: bool = True,
        marks_seed: int = 0,
    ):
        self.name, self.make, self.length, self.small, self.jit = name, make, length, small, jit
        self.brief, self.gradients, self.marks_seed = brief, gradients, marks_seed
        self.mechanism = self.built(length)
        graph, own, rest = nnx.split(self.mechanism, nnx.Param, ...)
        if not initial:
            self.mechanism = nnx.merge(graph, moved(own), rest)
        self.whole = not isinstance(self.mechanism, MultiHead)
        self.per_head = isinstance(self.mechanism, OneHead)
        self.sources = ("x",) if self.whole else ("k", "v")
        self.graph, self.own, self.rest = nnx.split(self.mechanism, nnx.Param, ...)
        self._runs: dict = {}
        self._traces: dict = {}
        self._pulled: set = set()
        self._results: dict = {}
        self._refused: dict[Case, str | None] = {}

    @functools.cached_property
    def looped(self) -> nnx.GraphDef:
        """The structure of the mechanism under a plan that runs heads one after the other."""
        return nnx.split(self.built(self.length, plan=Plan(loop_from=0)))[0]

    @functools.cached_property
    def modes(self) -> list[bool]:
        """The values of `causal` that the mechanism can do, causal first; what it refuses is in `refusals`."""
        reasons = {causal: self.refusal(Case(self.length, self.length, causal)) for causal in (True, False)}
        self.refusals = {causal: reason for causal, reason in reasons.items() if reason}
        if len(self.refusals) == 2:
            raise Broken(f"it refuses to run, causal or not: {self.refusals[True]}")
        return [causal for causal, reason in reasons.items() if not reason]

    @functools.cached_property
    def takes_bias(self) -> bool:
        return not self.whole and self.refusal(Case(self.length, self.length, self.modes[0], biased=True)) is None

    @property
    def multi_head(self) -> MultiHead:
        assert isinstance(self.mechanism, MultiHead)
        return self.mechanism

    @property
    def one_head(self) -> OneHead:
        assert isinstance(self.mechanism, OneHead)
        return self.mechanism

    def tokens(self) -> dict[str, Any]:
        """What `from_keys` and `from_queries` name, with shapes (B, S, N, ...)."""
        mechanism = self.one_head
        x = jax.ShapeDtypeStruct((1, self.length, mechanism.size.dim), jnp.float32)
        return jax.eval_shape(lambda x: mechanism.from_keys(x) | mechanism.from_queries(x), x)

    @property
    def takes_x(self) -> bool:
        """Whether it may look at the block's input, besides q, k and v."""
        mechanism = self.mechanism
        if not isinstance(mechanism, OneHead):
            return True
        return mechanism.reads_keys_input() or mechanism.reads_queries_input()

    @property
    def own_input(self) -> bool:
        """Whether a query may depend on the input at its own position otherwise than through q."""
        mechanism = self.mechanism
        return not isinstance(mechanism, OneHead) or mechanism.reads_queries_input()

    @functools.cached_property
    def as_given(self) -> "Subject":
        """The same with its options as they were asked for, at a length of several blocks."""
        return Subject(self.name, self.make, length=LONG, small=False)

    def built(self, length: int, **sizes: Any) -> Attention:
        size = Size(length, dim=HEADS * HEAD, heads=HEADS, kv_heads=KEY_HEADS)
        return self.make(dataclasses.replace(size, **sizes), self.small)

    def causal_only(self) -> None:
        if True not in self.modes:
            raise NotApplicable(self.refusals[True])

    # ---- inputs --------------------------------------------------------------------------------------------------

    def inputs(self, case: Case, seed: int = 0) -> dict[str, Any]:
        """Arrays to differentiate: q (B, T, N, H), k and v (B, S, K, H), the bias, and x (B, S, D) where taken.

        They are numpy's, for what properties change in them would cost a compilation for every shape."""
        size = self.mechanism.size
        random = np.random.default_rng(seed)
        draw = lambda *shape: random.standard_normal((case.batch, *shape)).astype(np.float32)
        shapes = heads_of(self.mechanism)
        # Keys first: cases that differ in T alone attend to the same.
        arrays: dict[str, Any] = {name: draw(case.S, *shapes[name]) for name in ("k", "v")}
        x = draw(case.S, size.dim)
        q = draw(max(case.S, case.T), *shapes["q"])[:, -case.T :]
        if self.whole:
            arrays = {"x": x} if case.T == case.S else {"q": draw(case.T, size.dim), "x": x}
        else:
            arrays["q"] = q
            if self.takes_x:
                arrays["x"] = x
                if case.T > case.S:
                    arrays["x_q"] = draw(case.T, size.dim)
        if case.biased:
            heads = np.arange(1.0, size.heads + 1, dtype=np.float32)
            arrays["bias"] = Wave(jnp.asarray(heads / size.heads), jnp.asarray(1 - heads / 8))
        return arrays

    @staticmethod
    def valid(case: Case):
        """(B, S) bool by sample: nothing padded, a padded end, random holes (the first key is one), all padding."""
        if not case.padded:
            return None
        holes = np.random.default_rng(3).random(case.S) < 0.6
        holes[0], holes[-1] = False, True
        rows = [np.ones(case.S, bool), np.arange(case.S) < -(-2 * case.S // 3), holes, np.zeros(case.S, bool)]
        return jnp.asarray(np.stack(rows)[: case.batch])

    @staticmethod
    def documents(case: Case) -> np.ndarray | None:
        """(B, S) int32 of packed rows, whose documents end at other places in each sample."""
        if not case.packed:
            return None
        ends = [np.array([case.S // 5, case.S // 2 + sample, case.S - 3]) for sample in range(case.batch)]
        return np.stack([np.searchsorted(of_row, np.arange(case.S), "right") for of_row in ends]).astype(np.int32)

    @staticmethod
    def marked(marks: int, B: int, S: int, seed: int = 0) -> np.ndarray:
        """(B, S) bool: places that a task may mark, in a sample as many as the mechanism has room for, in the next one
        fewer, and so on; a row that is padding has some too."""
        random = np.random.default_rng([5, seed, S])
        at = [random.permutation(S)[: max(marks - sample, 0)] for sample in range(B)]
        return np.stack([np.isin(np.arange(S), of_row) for of_row in at])

    # ---- running -------------------------------------------------------------------------------------------------

    def forward(self, own, inputs: dict, valid, key, documents=None, *, causal: bool, method: str, loop: bool = False):
        """The output alone; raises Refused where the mechanism does."""
        options = {"causal": causal, "method": method, "documents": documents}
        return self.call(self.layer(own, self.rest, loop), inputs, valid, key, **options)[0]

    def layer(self, own, rest, loop: bool = False) -> Attention:
        """The mechanism with these variables, whatever traces the call: copies, so that it may write to its own.

        loop: it runs its heads one after the other, whatever their length.
        """
        return nnx.merge(self.looped if loop else self.graph, own, jax.tree.map(lambda leaf: leaf, rest))

    def call(self, layer, inputs: dict, valid, key, *, causal: bool, method: str = "attend", documents=None):
        """The output and the auxiliary results."""
        rest = {"valid": valid, "causal": causal, "key": key}
        if documents is not None:
            layer.check_documents(documents)
            rest["documents"] = documents
        if layer.marks:
            B, S, *_ = inputs["x" if self.whole else "k"].shape
            rest["marked"] = jnp.asarray(self.marked(layer.marks, B, S, self.marks_seed))
        if self.whole:
            with_method = {"method": method} if method != "attend" else {}
            sources = (inputs["q"], inputs["x"]) if "q" in inputs else (inputs["x"],)
            out, _, aux = layer(*sources, **rest, **with_method)
            return out, aux
        rest |= {name: inputs.get(name) for name in ("x", "x_q", "bias", "pair_values")}
        if method != "attend":
            rest["method"] = method
        out, _, aux = layer.mix(inputs["q"], inputs["k"], inputs["v"], **rest)
        return out, aux

    def refusal(self, case: Case) -> str | None:
        """Why the mechanism refuses a kind of call, None where it does not: only Refused is a refusal."""
        if case not in self._refused:
            self._refused[case] = self._refusal(case)
        return self._refused[case]

    def _refusal(self, case: Case) -> str | None:
        try:
            given = self.inputs(case), self.valid(case), jax.random.key(0), self.documents(case)
            with jax.default_matmul_precision("highest"):
                self.traced(case.causal, "attend").eval_shape(self.own, *given)
        except Refused as error:
            return str(error)
        except Exception:  # a mistake, not a refusal: the property that makes this call will show it
            return None
        return None

    def apply(
        self,
        case: Case,
        inputs: dict,
        *,
        valid=None,
        cotangent=None,
        method: str = "attend",
        loop: bool = False,
        training: bool = True,
        gradients: bool = True,
    ):
        """-> Result of `inputs` with the case's padding; cotangent (of the output's shape) defaults to a random one.

        Without gradients the half of the program that finds them is not compiled, unless a call of these shapes has
        compiled it already."""
        valid = self.valid(case) if valid is None else valid
        call = (inputs, valid, jax.random.key(1) if training else None, self.documents(case))
        leaves, tree = jax.tree.flatten(call)
        shapes = (case.causal, method, loop, tree, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if gradients and self.gradients:
            self._pulled.add(shapes)
        gradients = shapes in self._pulled
        run = self._run(case.causal, method, loop, gradients)
        if cotangent is None:
            cotangent = self.cotangent(case, inputs)
        with jax.default_matmul_precision("highest"):
            return Result(*run(self.own, *call, cotangent)) if gradients else Result(run(self.own, *call), {})

    def rounding(self, case: Case, inputs: dict | None = None, unit: float = 1e-7, method: str = "reference"):
        """How far rounding may move output and gradients, a Result: what a change of `unit` in all inputs does to a
        row, times 20. It is little, but for what divides by nearly nothing or chooses between nearly equal scores."""
        inputs = self.inputs(case) if inputs is None else inputs
        result = self.apply(case, inputs, method=method)
        most = jax.tree.map(np.zeros_like, (result.out, result.grads))
        for seed in range(2):
            random = np.random.default_rng(seed)
            nudged = jax.tree.map(lambda x, random=random: x * (1 + unit * random.standard_normal(x.shape)), inputs)
            nudged = jax.tree.map(lambda new, x: jnp.asarray(new, x.dtype), nudged, inputs)
            other = self.apply(case, nudged, method=method)
            gaps = jax.tree.map(lambda a, b: np.abs(a - b), (other.out, other.grads), (result.out, result.grads))
            most = jax.tree.map(np.maximum, most, gaps)
        row = lambda x: 20 * (np.broadcast_to(x.max(-1, keepdims=True), x.shape) if x.ndim else x)
        return Result(*jax.tree.map(row, most))

    def cotangent(self, case: Case, inputs: dict, rows: slice | int = slice(None)):
        """A random gradient of the output, zero but in some rows (positions of queries)."""
        like = inputs.get("q", inputs.get("x"))
        assert like is not None
        shape = like.shape if self.whole else (*like.shape[:3], self.mechanism.size.head)
        whole = np.random.default_rng(5).standard_normal(shape)
        kept = np.zeros(shape)
        kept[:, rows] = whole[:, rows]
        return jnp.asarray(kept, like.dtype)

    def result(self, case: Case, method: str = "attend", *, loop: bool = False) -> Result:
        """The case on its own inputs, kept."""
        if (case, method, loop) not in self._results:
            self._results[case, method, loop] = self.apply(case, self.inputs(case), method=method, loop=loop)
        return self._results[case, method, loop]

    def error(self) -> float | None:
        """The largest difference between attend and reference so far, relative to the largest output of its case."""
        errors = []
        for (case, method, loop), slow in self._results.items():
            fast = self._results.get((case, "attend", loop))
            if method == "reference" and fast is not None and fast.out.shape == slow.out.shape:
                errors.append(float(np.abs(fast.out - slow.out).max() / max(np.abs(slow.out).max(), 0.1)))
        return max(errors, default=None)

    def traced(self, causal: bool, method: str, loop: bool = False):
        """The output alone, traced once for each kind of call, whoever asks: tracing is a third of what a brief kit
        takes."""
        if (causal, method, loop) not in self._traces:
            self._traces[causal, method, loop] = jax.jit(
                functools.partial(self.forward, causal=causal, method=method, loop=loop)
            )
        return self._traces[causal, method, loop]

    def _run(self, causal: bool, method: str, loop: bool, gradients: bool):
        if (causal, method, loop, gradients) not in self._runs:
            forward = self.traced(causal, method, loop)

            def both(own, inputs, valid, key, documents, cotangent):
                out, pull = jax.vjp(lambda own, inputs: forward(own, inputs, valid, key, documents), own, inputs)
                return out, dict(zip(("own", "inputs"), pull(cotangent.astype(out.dtype)), strict=True))

            self._runs[causal, method, loop, gradients] = self.jit(both if gradients else forward)
        return self._runs[causal, method, loop, gradients]

    # ---- cases ---------------------------------------------------------------------------------------------------

    def square(self, causal: bool) -> Case:
        return Case(self.length, self.length, causal, biased=self.takes_bias)

    def cases(self) -> list[Case]:
        """What fast and reference are compared on: T = S, a length with many divisors without padding, T < S, T > S."""
        first, last = self.modes[0], self.modes[-1]
        if self.brief:
            return [self.square(first)]
        cases = [self.square(causal) for causal in self.modes]
        cases.append(Case(EVEN, EVEN, first, padded=False))
        tall = [Case(SHORT, LENGTH, first, biased=self.takes_bias), Case(LENGTH, SHORT, last, biased=self.takes_bias)]
        return cases + [case for case in tall if self.refusal(case) is None]


def moved(own):
    """Parameters with noise of a tenth of their size, or of 0.1 where they are all zero."""
    random = np.random.default_rng(7)

    def one(leaf):  # on the host: see Subject.inputs
        start = np.asarray(leaf, np.float32)
        size = float(np.sqrt(np.mean(start**2))) if leaf.size else 0.0
        return jnp.asarray(start + 0.1 * (size or 1.0) * random.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(one, own)


def heads_of(mechanism: Attention) -> dict[str, tuple[int, ...]]:
    """Shapes of one position's q, k and v, as a `Call` has them."""
    if isinstance(mechanism, Projected):
        return dict(zip("qkv", mechanism.shapes(), strict=True))
    size = mechanism.size
    keys = (size.key_heads, size.head)
    return {"q": (size.heads, size.head), "k": keys, "v": keys}


def compare(fast, slow, tolerance: float, where: str, advice: str | Callable[[], str], slack=None) -> None:
    """Raises Broken where two arrays (B, T, ...) differ by more than tolerance times the second's largest entry.

    advice: what to look at, or a function that finds out. slack: a function that finds an array of what each entry may
    differ beyond that, called only where it decides.
    """
    if fast.shape != slow.shape:
        raise Broken(f"{where}: shape {fast.shape} instead of {slow.shape}")
    if not fast.size:
        return
    if not np.isfinite(fast).all():
        raise Broken(f"{where}: not finite at {_index(np.argwhere(~np.isfinite(fast))[0])}")
    gap, scale = np.abs(fast - slow), max(float(np.abs(slow).max()), 0.1)
    beyond = lambda: slack is None or (gap > tolerance * scale + slack()).any()
    if gap.max() > tolerance * scale and beyond():
        advice = advice if isinstance(advice, str) else advice()
        worst = np.unravel_index(gap.argmax(), gap.shape)
        raise Broken(
            f"{where}: {float(fast[worst]):.6g} instead of {float(slow[worst]):.6g} at {_index(worst)}, "
            f"{float((gap > tolerance * scale).mean()):.0%} of entries differ. {advice}"
        )


def compare_trees(fast: Mapping, slow: Mapping, tolerance: float, where: str, advice: str, slack=None) -> None:
    """`compare` on every leaf, named in the message; slack finds a tree of the same structure."""
    slow_leaves = dict(jax.tree_util.tree_leaves_with_path(slow))
    for path, leaf in jax.tree_util.tree_leaves_with_path(fast):
        name = " ".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path if str(key) != ".value")
        own = None if slack is None else lambda path=path: dict(jax.tree_util.tree_leaves_with_path(slack()))[path]
        compare(leaf, slow_leaves[path], tolerance, f"{where}, gradient of {name}", advice, own)


def _index(at) -> str:
    names = ("sample", "position", "head", "channel") if len(at) == 4 else ("sample", "position", "channel")
    return (
        ", ".join(f"{name} {index}" for name, index in zip(names, at, strict=False)) if len(at) > 1 else f"index {at}"
    )
