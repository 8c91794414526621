"""What attention mechanisms cost: time, FLOPs and memory of one layer's mixing, over lengths.

Timed is the mechanism itself, `mix` on projected heads, q (B, T, N, H) and k, v (B, T, K, H): no projections, no
position, no padding. A mechanism with projections of its own is timed on (B, T, D) with all that it does; the row says
which, `timed`: "mix" or "call", of a prefill "decode_heads_several" or "decode_several", of one more token
"decode_heads" or "decode". With forward+backward come the gradients of every input and of the mechanism's own
parameters. B, N, K, D and the type come from the config; it is causal where the mechanism can be and `model` is auto or
causal (a decoder), and the row says so.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from xformers_lab import spec
from xformers_lab.attention import Call, MultiHead, why_not_decode
from xformers_lab.attention._engine import kernels
from xformers_lab.bench import rows
from xformers_lab.bench.rows import PASSES, Cell
from xformers_lab.config import Config
from xformers_lab.errors import BrokenChoice, Refused, UsageError, contained
from xformers_lab.generate import AT_ONCE
from xformers_lab.measure import speed
from xformers_lab.measure.flops import count_flops, largest_intermediate
from xformers_lab.measure.memory import available_bytes, compiled_memory
from xformers_lab.model import size_of
from xformers_lab.nn.plan import AUTO
from xformers_lab.nn.size import Size

Doing = Callable[[str, Cell], None]
# The layer's parts around `mix`: no part of what is timed, so no part of what is differentiated.
PROJECTIONS = ("query", "key", "value", "out")


def bench(
    configs: Sequence[Config],
    *,
    rounds: int = 5,
    passes: Sequence[str] = PASSES[:2],
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> list[dict]:
    """One row for each config and pass, in that order; cells run one at a time, those of one length interleaved.

    The pass "prefill" reads a context of seq_len into an empty cache, in the parts that generation reads a prompt in;
    "decode" is one more token behind it, with state_bytes, the size of its cache. tokens_per_second is B T
    (decode: B) / seconds_median. flops and temp_bytes (on accelerators also peak_bytes) are of one call, parameters of
    the whole layer with its projections. exponent (of seconds_min), exponent_flops and exponent_bytes are fitted over
    the lengths of an otherwise equal config, None with fewer than three. seconds_rounds has the time of each round.
    What has no figure is None. kernel: what ran attention over a pattern of positions, "blocks" for the block engine.
    checked says whether the conformance of mechanisms of one's own was to be checked, machine what measured.

    A mechanism that fails its conformance check is not timed: status "refused", with the failed properties. A cell that
    cannot fit into memory ("oom") or fails is a row with a reason, and the others go on. After an interrupt (Ctrl-C)
    the rows measured so far come back, the rest as "interrupted". progress(words) says what is being done. Raises
    UsageError, before anything is compiled, at a config that cannot be.
    """
    cells, machine, last = rows.blank(configs, passes, check), speed.machine(), None
    for cell in cells:
        cell.row["machine"] = machine
    for start in range(0, len(cells), len(passes)):
        look(cells[start : start + len(passes)])

    def doing(words: str, cell: Cell) -> None:
        nonlocal last
        if progress is not None and words != last:
            progress(words)
        last = words

    reports: dict[str, str | None] = {}
    try:
        for length in sorted({cell.config.seq_len for cell in cells}):
            ready = [cell for cell in cells if cell.config.seq_len == length]
            for cell in ready:
                if check and cell.open and (reason := _refused(cell, reports, doing)):
                    cell.end("refused", reason)
            measure([cell for cell in ready if cell.open], rounds, doing)
    except KeyboardInterrupt:
        rows.interrupted(cells)
    rows.exponents(cells)
    return [cell.row for cell in cells]


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """One pass of one mechanism: `run(params, *shapes)`, pure; shapes are those of its other arguments.

    keeps: whether the first of shapes is a cache, which a call uses up and whose successor is its second result: as in
    generation, a cache is written in place and never copied.
    """

    run: Callable
    params: dict
    shapes: tuple
    parameters: int
    timed: str
    causal: bool
    keeps: bool = False


def subject(config: Config, direction: str) -> Subject:
    """What is timed for a config: run(params, inputs), and with a backward pass also the gradient of the output.

    Raises UsageError where the config cannot be.
    """
    size, batch = size_of(config), config.train.batch
    model, choice = config.model.model, config.model.attention
    layer = spec.build("attention", choice, size, where=f"attention={choice} seq_len={config.seq_len}")
    layer.check_kernel()
    whole = not layer.projects
    can = layer.accepts("causal") and "causal" not in layer.refusals()
    causal = can and (model == "auto" or spec.entry("model", spec.parse(model).name).causal)
    graph, variables, rest = nnx.split(layer, nnx.Param, ...)
    every = nnx.to_pure_dict(variables)
    fixed = {} if whole else {name: every[name] for name in PROJECTIONS if name in every}
    params = {name: leaf for name, leaf in every.items() if name not in fixed}
    shape = lambda *axes: jax.ShapeDtypeStruct((batch, size.length, *axes), size.dtype)
    inputs = {"x": shape(size.dim)} if whole else {"q": shape(size.heads, size.head)}
    if not whole:
        inputs |= dict.fromkeys("kv", shape(size.key_heads, size.head))

    # Marks, where it looks at any: as many as it has room for, evenly over a row.
    places = np.linspace(0, size.length - 1, layer.marks, dtype=int)
    row = jnp.isin(jnp.arange(size.length), places)
    marked = {"marked": jnp.broadcast_to(row, (batch, size.length))} if layer.marks else {}

    def build(params):
        # Copies, so that a mechanism may write to its variables under whatever traces the call.
        return nnx.merge(graph, fixed | params, jax.tree.map(lambda leaf: leaf, rest))

    def forward(params, inputs):
        layer = build(params)
        if whole:
            return layer(inputs["x"], **({"causal": True} if causal else {}))[0]
        return layer.mix(**inputs, **marked, causal=causal, key=jax.random.key(0))[0]

    def forward_backward(params, inputs, grad):
        out, pull = jax.vjp(forward, params, inputs)
        return out, pull(grad)

    try:
        jax.eval_shape(forward, params, inputs)
    except Exception:  # it cannot do without the block's input; whatever else is wrong shows again
        inputs = {"x": shape(size.dim)} | inputs
    count = sum(leaf.size for leaf in jax.tree.leaves(every))
    timed = "call" if whole else "mix"
    if direction == "decode":
        cache = _cache(layer, choice, batch, size)
        token = {name: jax.ShapeDtypeStruct((batch, *leaf.shape[2:]), leaf.dtype) for name, leaf in inputs.items()}

        def decode(params, cache, token):
            layer = build(params)
            if whole:
                return layer.decode(token["x"], cache, at=jnp.asarray(size.length - 1))
            return layer.decode_heads(cache, Call(**token))

        return Subject(decode, params, (cache, token), count, "decode" if whole else "decode_heads", True, keeps=True)
    if direction == "prefill":
        _cache(layer, choice, batch, size)
        prefill = lambda params, inputs: _prefill(build(params), inputs, whole)
        return Subject(prefill, params, (inputs,), count, "decode_several" if whole else "decode_heads_several", True)
    if direction == "forward":
        return Subject(forward, params, (inputs,), count, timed, causal)
    return Subject(forward_backward, params, (inputs, jax.eval_shape(forward, params, inputs)), count, timed, causal)


def _prefill(layer: MultiHead, inputs: dict, whole: bool):
    """The outputs and the cache behind a context, inputs (B, T, ...), read AT_ONCE tokens at a time."""
    some = next(iter(inputs.values()))
    B, T, *_ = some.shape

    def part(cache, chunk):
        at, tokens = chunk
        if whole:
            out, cache = layer.decode_several(tokens["x"], cache, at=at)
        else:
            out, cache = layer.decode_heads_several(cache, Call(**tokens))
        return cache, out

    parts, left = divmod(T, AT_ONCE)
    in_parts = lambda x: jnp.swapaxes(x[:, : T - left].reshape(B, parts, AT_ONCE, *x.shape[2:]), 0, 1)
    chunks = AT_ONCE * jnp.arange(parts), jax.tree.map(in_parts, inputs)
    cache, out = lax.scan(part, layer.init_cache(B, T, some.dtype), chunks)
    if not left:
        return out, cache
    cache, last = part(cache, (jnp.asarray(T - left), jax.tree.map(lambda x: x[:, T - left :], inputs)))
    return out, last, cache


def _cache(layer: MultiHead, choice: str, batch: int, size: Size):
    """Shapes of the cache of a whole context; raises UsageError where the mechanism cannot decode."""
    if reason := why_not_decode(layer):
        raise UsageError(f"attention={choice}: {reason}")
    return jax.eval_shape(lambda: layer.init_cache(batch, size.length, size.dtype))


def look(cells: Sequence[Cell]) -> None:
    """End the cells of one config where its mechanism cannot be built; raises UsageError where the config cannot be."""
    try:
        with contained():
            for direction in {"forward", *(cell.direction for cell in cells)}:
                jax.eval_shape(lambda direction=direction: subject(cells[0].config, direction).params)
            if cells[0].config.train.kernel != AUTO:
                one = subject(cells[0].config, "forward")
                jax.eval_shape(one.run, one.params, *one.shapes)
    except BrokenChoice as error:  # its file exits
        for cell in cells:
            cell.fail(error)
    except UsageError:
        raise
    except Refused as reason:  # the kernel that is asked for cannot
        raise UsageError(f"attention={cells[0].config.model.attention}: {reason}") from None
    except Exception as error:  # a mechanism whose file is broken: its rows say so, the others go on
        for cell in cells:
            cell.fail(error)


def _refused(cell: Cell, reports: dict[str, str | None], doing: Doing) -> str | None:
    """Why a mechanism's conformance check refuses it, None where it passes; each is looked at once."""
    from xformers_lab.check import cache

    choice = cell.config.model.attention
    if choice not in reports:
        if cache.unproven(choice):
            doing(f"checking {choice}", cell)
        reports[choice] = cache.refusal(choice)
    return reports[choice]


def measure(
    cells: Sequence[Cell], rounds: int, doing: Doing, ended: Callable[[Cell], None] = lambda cell: None
) -> None:
    """Fill the rows of cells of one length: each compiled in turn, then all timed in interleaved rounds.

    doing(words, cell) says what is being done before each compilation and timed call, ended(cell) which cells have
    their row before the rounds.
    """
    compiled = {}
    for cell in cells:
        doing(f"compiling {cell.title}", cell)
        try:
            with contained():
                ready = _compile(cell)
        except Exception as error:
            cell.fail(error)
        else:
            if ready is not None:
                compiled[cell] = ready
        if not cell.open:
            ended(cell)
    if not compiled:
        return
    arrays: dict = {}
    calls = {cell: caller(run, one, arrays) for cell, (run, one) in compiled.items()}

    def begun(at: int | None, cell: Cell) -> None:
        stage = "first calls" if at is None else f"round {at + 1} of {rounds}"
        doing(f"timing {len(calls)} cells at {cell.config.seq_len} tokens, {stage}", cell)

    for cell, timing in speed.interleaved(calls, rounds=rounds, begun=begun).items():
        if isinstance(timing, Exception):
            cell.fail(timing)
            continue
        tokens = cell.config.train.batch * (1 if cell.direction == "decode" else cell.config.seq_len)
        cell.row.update(dataclasses.asdict(timing), status="ok", tokens_per_second=tokens / timing.seconds_median)
        cell.row.update(speed.disturbance(timing.seconds_rounds))


def _compile(cell: Cell):
    """The compiled pass and its subject, or None where it cannot fit; the row gets all that needs no run."""
    one = subject(cell.config, cell.direction)
    cell.row.update(parameters=one.parameters, timed=one.timed, causal=one.causal)
    if cell.direction == "decode":
        cell.row["state_bytes"] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one.shapes[0]))
    with contextlib.suppress(ValueError):  # a loop of unknown length, an opaque kernel: there is no figure
        cell.row["flops"] = count_flops(one.run, one.params, *one.shapes)
    too_much = _too_much(_least_bytes(one))
    if too_much is None:
        with kernels.noted() as ran:
            compiled, seconds = speed.compile_timed(one.run, one.params, *one.shapes, donate=(1,) if one.keeps else ())
        cell.row["kernel"] = kernels.joined(ran)
        memory = compiled_memory(compiled)
        figures = {name: memory[name] for name in ("temp_bytes", "peak_bytes") if name in memory}
        cell.row.update(figures, compile_seconds=seconds)
        too_much = _too_much(sum(memory[f"{name}_bytes"] for name in ("temp", "argument", "output")))
        if too_much is None:
            return compiled, one
    cell.end("oom", too_much)
    return None


def _least_bytes(one: Subject) -> int:
    """Bytes without which a pass cannot run, known before it is compiled: arguments, and outputs or the largest array
    between, which XLA:CPU's own figures leave out where YNNPACK runs it."""
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    arguments = one.params, *one.shapes
    item = jax.tree.leaves(one.shapes)[0].dtype.itemsize
    largest = largest_intermediate(one.run, *arguments) * item if jax.default_backend() == "cpu" else 0
    return size(arguments) + max(size(jax.eval_shape(one.run, *arguments)), largest)


def _too_much(needed: int) -> str | None:
    left = available_bytes()
    if left is None or needed <= left:
        return None
    return f"needs at least {needed / 2**30:.2f} GiB, {left / 2**30:.2f} GiB are free"


def caller(run: Callable, one: Subject, arrays: dict) -> Callable[[], object]:
    """A call on random arrays, made at the first one. Cells of equal shapes share them; each has a cache of its own."""
    if not one.keeps:
        return lambda: run(one.params, *_drawn(one.shapes, arrays))
    cache = None

    def step() -> tuple:
        nonlocal cache
        cache = _drawn(one.shapes[0], {}) if cache is None else cache
        out, cache, _ = run(one.params, cache, *_drawn(one.shapes[1:], arrays))
        return out, cache

    return step


def _drawn(shapes, arrays: dict):
    """Random arrays of these shapes, each the one of `arrays` with its path, shape and type where there is one."""

    def array(path: tuple, shape: jax.ShapeDtypeStruct):
        key = jax.tree_util.keystr(path), shape.shape, shape.dtype
        if key not in arrays:
            values = np.random.default_rng(len(arrays)).standard_normal(shape.shape, np.float32)
            arrays[key] = jnp.asarray(values, shape.dtype)
        return arrays[key]

    return jax.tree_util.tree_map_with_path(array, shapes)
