"""FLOPs, memory, exponents and timing, and the rows of a bench."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from xformers_lab import config as configs
from xformers_lab.bench import cells as benches
from xformers_lab.bench.cells import PASSES, bench, subject
from xformers_lab.check import cache, values
from xformers_lab.check import run as kit
from xformers_lab.errors import UsageError
from xformers_lab.measure import memory, speed
from xformers_lab.measure.exponent import fit
from xformers_lab.measure.flops import count_flops, largest_intermediate

SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
PRODUCT = 2 * 4 * 4 * 4


# ---- FLOPs -------------------------------------------------------------------------------------------------------


def layers(x, w):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_scan_counts_every_layer():
    """Eight layers (32, 64) @ (64, 64); XLA's own count has one."""
    x, w = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)
    assert count_flops(layers, x, w) == 2 * 8 * 32 * 64 * 64 == 2_097_152
    grad = jax.grad(lambda x, w: layers(x, w).sum(), argnums=(0, 1))
    assert count_flops(grad, x, w) == 3 * 2_097_152


@jax.custom_vjp
def squared(x):
    return x @ x


squared.defvjp(lambda x: (x @ x, x), lambda x, grad: (grad @ x + x @ grad,))


@jax.custom_jvp
def cubed(x):
    return x @ x @ x


cubed.defjvp(lambda primal, tangent: (cubed(primal[0]), tangent[0]))


def tiled(x):
    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    row, whole = pallas.BlockSpec((1, 4), lambda i: (i, 0)), pallas.BlockSpec((4, 4), lambda i: (0, 0))
    return pallas.pallas_call(kernel, SQUARE, grid=(4,), in_specs=[row, whole], out_specs=row)(x, x)


@pytest.mark.parametrize(
    "fn, products",
    [
        (lambda x: x + 1, 0),
        (lambda x: x @ x, 1),
        (jax.jit(lambda x: x @ x), 1),
        (jax.checkpoint(lambda x: jnp.sin(x @ x)), 1),
        (squared, 1),
        (jax.grad(lambda x: squared(x).sum()), 3),
        (cubed, 2),
        (lambda x: lax.fori_loop(0, 7, lambda _, x: x @ x, x), 7),
        (lambda x: lax.map(lambda i: lax.map(lambda j: x @ x * i * j, jnp.arange(3.0)), jnp.arange(5.0)), 15),
        (lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), 2),
        (lambda x: lax.while_loop(lambda x: x[0, 0] < 5, lambda x: x + 1, x) @ x, 1),
        (jax.vmap(lambda v, x: x @ v, in_axes=(0, None)), None),
        (tiled, 1),
    ],
)
def test_count_of_each_construct(fn, products):
    if products is None:
        assert count_flops(fn, jax.ShapeDtypeStruct((3, 4), jnp.float32), SQUARE) == 3 * 2 * 4 * 4
    else:
        assert count_flops(fn, SQUARE) == products * PRODUCT


def test_shard_map_counts_all_devices():
    mesh, rows = AbstractMesh((4,), ("data",), (AxisType.Auto,)), PartitionSpec("data")
    each = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows)
    assert count_flops(each, SQUARE) == 4 * 2 * 1 * 1 * 4


def test_convolution():
    """Output (2, 6, 8), each element a sum over 3 taps of 2 of the 4 input features."""
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1,), "SAME", feature_group_count=2)
    x, w = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32), jax.ShapeDtypeStruct((6, 2, 3), jnp.float32)
    assert count_flops(conv, x, w) == 2 * (2 * 6 * 8) * (2 * 3)


def test_pytrees_and_arrays_are_arguments():
    assert count_flops(lambda tree: tree["a"] @ tree["b"][0], {"a": jnp.ones((2, 3)), "b": [jnp.ones((3, 5))]}) == 60


def test_what_cannot_be_counted_is_named():
    with pytest.raises(ValueError, match=r"while_loop over .*doubling"):

        def doubling(x):
            return x @ x

        count_flops(lambda x: lax.while_loop(lambda x: x[0, 0] < 5, doubling, x), SQUARE)
    foreign = jax.ffi.ffi_call("someone_elses_product", SQUARE)
    with pytest.raises(ValueError, match="ffi_call is opaque"):
        count_flops(foreign, SQUARE)


# ---- the largest array ---------------------------------------------------------------------------------------------


def test_largest_intermediate_sees_into_loops_and_branches():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    assert largest_intermediate(lambda x: x.sum(), x) == 1
    assert largest_intermediate(lambda x: (x[:, None] * x[None]).sum(), x) == 1000 * 1000
    assert largest_intermediate(lambda x: lax.map(lambda y: (y * x).sum(), x), x) == 1000
    assert largest_intermediate(lambda x: lax.map(lambda y: y * x, x).sum(), x) == 1000 * 1000
    hidden = lambda x: lax.cond(x[0] > 0, lambda x: x.sum(), lambda x: jnp.outer(x, x[:7]).sum(), x)
    assert largest_intermediate(hidden, x) == 7000
    mask = lambda x: (jnp.arange(1000)[:, None] < jnp.arange(1000)[None]).sum() + x[0]
    assert largest_intermediate(mask, x) == 1000 * 1000


def test_a_broadcast_scalar_is_no_array():
    assert largest_intermediate(lambda x: jnp.full((50, 50), 3.0)[0, :4] + x[0], SQUARE) == 4


# ---- exponents -----------------------------------------------------------------------------------------------------


def test_fit_is_exact_on_power_laws():
    lengths = [64, 128, 512, 4096]
    assert fit(lengths, [3 * n**1.5 for n in lengths]) == pytest.approx(1.5, abs=1e-12)
    assert fit(lengths, [7] * 4) == pytest.approx(0, abs=1e-12)
    assert fit([1, 2, 4], [1, 4, 4]) == pytest.approx(1)  # least squares, not the end points' slope


@pytest.mark.parametrize(
    "lengths, values",
    [
        ([8], [1]),
        ([8, 8], [1, 2]),
        ([8, 16], [1, 2]),  # a line goes through any two points
        ([8, 16, 32], [0, 1, 2]),
        ([8, 16, 32], [1, 2, float("nan")]),
    ],
)
def test_fit_refuses_what_has_no_slope(lengths, values):
    with pytest.raises(ValueError, match="exponent needs"):
        fit(lengths, values)


def traced(attention, lengths, direction="forward", model="encoder"):
    edit = lambda T: configs.edit(
        configs.Config(), attention=attention, seq_len=T, model=model, dim=64, heads=1, batch=1
    )
    subjects = [subject(edit(length), direction) for length in lengths]
    return [(one.run, one.params, *one.shapes) for one in subjects]


# The strided lengths are squares, so that no residue is padded.
@pytest.mark.parametrize(
    "attention, lengths, exponent",
    [
        ("full", (1024, 2048, 4096), 2.0),
        ("local:window=16", (1024, 2048, 4096), 1.0),
        ("local", (1024, 2048, 4096), 1.0),
        ("linear", (1024, 2048, 4096), 1.0),
        ("strided", (1024, 2304, 4096), 1.5),
        ("axial", (1024, 2304, 4096), 1.5),
    ],
)
@pytest.mark.parametrize("direction", PASSES[:2])
@pytest.mark.parametrize("model", ["encoder", "decoder"])
def test_flops_grow_as_published(attention, lengths, exponent, direction, model):
    flops = [count_flops(*call) for call in traced(attention, lengths, direction, model=model)]
    assert fit(lengths, flops) == pytest.approx(exponent, abs=0.02)


def test_full_attention_does_two_products():
    (call,) = traced("full", [1024])
    assert count_flops(*call) == 2 * 2 * 1024 * 1024 * 64


@pytest.mark.parametrize("attention", ["full", "local", "linear", "strided", "axial"])
@pytest.mark.parametrize("model", ["encoder", "decoder"])
@pytest.mark.parametrize("direction", PASSES[:2])
def test_no_array_is_quadratic(attention, model, direction):
    lengths = (9216, 16384, 36864)  # squares; and what is computed together has reached its full size
    largest = [largest_intermediate(*call) for call in traced(attention, lengths, direction, model=model)]
    assert fit(lengths, largest) < 1.2


# ---- memory --------------------------------------------------------------------------------------------------------


def test_compiled_memory_names_its_bytes():
    compiled, seconds = speed.compile_timed(lambda x, y: (x @ y, x + 1), jnp.ones((16, 32)), jnp.ones((32, 8)))
    sizes = memory.compiled_memory(compiled)
    assert sizes["argument_bytes"] == 4 * (16 * 32 + 32 * 8)
    assert sizes["output_bytes"] >= 4 * (16 * 8 + 16 * 32)
    assert sizes["temp_bytes"] >= 0 and seconds > 0
    assert ("peak_bytes" in sizes) == (jax.default_backend() != "cpu")


def test_temporaries_grow_with_what_is_kept():
    def kept(x):
        return jnp.linalg.norm(lax.map(lambda y: jnp.sort(x * y), x), axis=0)

    small, large = (memory.compiled_memory(speed.compile_timed(kept, jnp.ones(n))[0])["temp_bytes"] for n in (64, 256))
    assert large > 8 * small > 0


def test_available_bytes_is_the_smaller_limit(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("the host's memory is asked on CPU only")
    monkeypatch.setattr(memory, "_host_bytes", lambda: 900)
    monkeypatch.setattr(memory, "_container_bytes", lambda: 700)
    assert memory.available_bytes() == 700
    monkeypatch.setattr(memory, "_container_bytes", lambda: None)
    assert memory.available_bytes() == 900
    monkeypatch.setattr(memory, "_host_bytes", lambda: None)
    assert memory.available_bytes() is None


# ---- speed ---------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that only calls move."""

    def __init__(self):
        self.now = 0.0

    def takes(self, *seconds, log=None, name=None):
        """A call that takes each of `seconds` in turn, the last one from then on."""
        left = list(seconds)

        def call():
            if log is not None:
                log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    return clock


def test_warm_up_is_not_timed(clock):
    timing = speed.interleaved({"a": clock.takes(9.0, 1.0, 5.0, 2.0)}, rounds=3)["a"]
    assert timing == speed.Timing(1.0, 2.0, (1.0, 5.0, 2.0))


def test_short_calls_repeat_to_fill_a_round(clock):
    log = []
    speed.interleaved({"a": clock.takes(0.004, log=log)}, rounds=3)
    assert len(log) == 2 + 3 * (1 + 5)  # two of warm-up; in a round, one untimed and five that fill it


def test_rounds_are_interleaved_in_a_seeded_random_order(clock):
    def order(seed):
        log = []
        calls = {name: clock.takes(1.0, log=log, name=name) for name in "abcd"}
        speed.interleaved(calls, rounds=6, seed=seed)
        return [log[at : at + 4] for at in range(4, len(log), 4)]

    rounds = order(0)
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert order(0) == rounds != order(1)


def test_a_case_that_raises_ends_alone(clock):
    def broken():
        raise MemoryError("too much")

    left = [1.0, 1.0]

    def breaks_later():
        clock.now += left.pop()

    timings = speed.interleaved({"a": broken, "b": clock.takes(1.0), "c": breaks_later}, rounds=4)
    assert isinstance(timings["a"], MemoryError) and isinstance(timings["c"], IndexError)
    assert timings["b"] == speed.Timing(1.0, 1.0, (1.0,) * 4)


def test_machine_says_what_measured():
    assert {"processor", "cores", "jax"} <= speed.machine().keys()
    assert all(isinstance(value, str) and value for value in speed.machine().values())


# ---- bench ---------------------------------------------------------------------------------------------------------


def grid(*words):
    return configs.sweep(["batch=2", "dim=16", "heads=2", *words])[0]


MECHANISM = '''
import jax, jax.numpy as jnp
from xformers_lab.attention import OneHead

class Mine(OneHead):
    """The mean of the values."""

    def attend(self, q, k, v, *, valid):
        {body}

    def reference(self, q, k, v, *, valid):
        return jnp.broadcast_to(v.mean(0), q.shape)
'''


@pytest.fixture
def mine(tmp_path):
    def write(body):
        path = tmp_path / "mine.py"
        path.write_text(MECHANISM.replace("{body}", body))
        return path

    return write


def test_rows_of_two_mechanisms():
    messages = []
    rows = bench(grid("attention=full,linear", "seq_len=8,16,32"), rounds=2, check=False, progress=messages.append)
    assert [(row["attention"], row["seq_len"], row["pass"]) for row in rows] == [
        (attention, length, direction)
        for attention in ("full", "linear")
        for length in (8, 16, 32)
        for direction in PASSES[:2]
    ]
    for row in rows:
        assert row["status"] == "ok" and "reason" not in row and row["kind"] == "bench"
        assert 0 < row["seconds_min"] <= row["seconds_median"] and row["compile_seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(2 * row["seq_len"] / row["seconds_median"])
        assert row["parameters"] == 4 * 16 * 16 and row["timed"] == "mix" and row["causal"] is True
        assert row["temp_bytes"] >= 0 and row["flops"] > 0 and np.isfinite(row["exponent"])
        assert len(row["seconds_rounds"]) == 2 and min(row["seconds_rounds"]) == row["seconds_min"]
        assert row["seconds_ratio"] == row["seconds_median"] / row["seconds_min"] and row["load"] >= 0
        assert row["config"]["seq_len"] == row["seq_len"]
    full = [row for row in rows if row["attention"] == "full"]
    assert [row["flops"] for row in full] == [2 * 2 * n * n * 16 * 2 * times for n in (8, 16, 32) for times in (1, 3.5)]
    assert [row["exponent_flops"] for row in full] == pytest.approx([2.0] * 6)
    assert any("timing 4 cells at 32 tokens, round 2 of 2" in text for text in messages)


def test_a_refused_mechanism_is_not_timed(mine, monkeypatch):
    path = mine("return jnp.broadcast_to(v[0], q.shape)")
    compiled = []
    monkeypatch.setattr(benches.speed, "compile_timed", lambda *a, **k: compiled.append(a))
    monkeypatch.setattr(kit, "PROPERTIES", [values.equals_reference])  # the whole kit takes half a minute
    rows = bench(grid(f"attention={path}", "seq_len=16"), rounds=1)
    assert [row["status"] for row in rows] == ["refused", "refused"] and not compiled
    assert "equals_reference" in rows[0]["reason"] and f"xlab check {path}" in rows[0]["reason"]
    assert rows[0]["seconds_min"] is None and rows[0]["exponent"] is None


def test_each_mechanism_of_ones_own_is_checked_once(mine, monkeypatch):
    """What comes with the package is proven by its tests, and by a verdict that is known already."""
    checked = []
    report = {"passed": False, "failed": [{"property": "causality", "message": ""}]}
    monkeypatch.setattr(cache, "verdict", lambda choice: checked.append(choice) or report)
    monkeypatch.setattr(cache, "known", lambda choice: report if choice == "local" else None)
    path = str(mine("return jnp.broadcast_to(v[0], q.shape)"))
    rows = bench(grid(f"attention=linear,local,{path}", "seq_len=8,16"), rounds=1, passes=["forward"])
    assert checked == [path]
    assert {row["status"] for row in rows if row["attention"] == "linear"} == {"ok"}
    refused = [row for row in rows if row["attention"] != "linear"]
    assert len(refused) == 4 and all(row["reason"].startswith("fails its check: causality") for row in refused)


def test_a_verdict_is_remembered_until_a_source_changes(mine, monkeypatch, tmp_path):
    runs = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kit, "PROPERTIES", [lambda subject: runs.append(subject.name)])
    path = mine("return jnp.broadcast_to(v[0], q.shape)")
    first = cache.verdict(str(path))
    assert cache.verdict(str(path)) == first and len(runs) == 1
    path.write_text(path.read_text() + "\n# changed\n")
    cache.verdict(str(path))
    assert len(runs) == 2


def test_out_of_memory_and_failure_are_rows_and_the_others_go_on(monkeypatch):
    compile_timed = speed.compile_timed

    def failing(fn, params, inputs, *rest, **options):
        length = inputs["q"].shape[1]
        if length == 16:
            raise MemoryError("no room")
        if length == 24:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nsecond line")
        if length == 40:
            raise TypeError("odd")
        return compile_timed(fn, params, inputs, *rest, **options)

    monkeypatch.setattr(speed, "compile_timed", failing)
    rows = bench(grid("attention=linear", "seq_len=16,24,32,40"), rounds=1, check=False, passes=["forward"])
    assert [row["status"] for row in rows] == ["oom", "oom", "ok", "failed"]
    assert rows[0]["reason"] == "MemoryError: no room" and rows[3]["reason"] == "TypeError: odd"
    assert rows[1]["reason"] == "RuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"
    assert rows[0]["flops"] > 0 and rows[0]["seconds_min"] is None


def test_what_cannot_fit_is_refused_before_it_compiles(monkeypatch):
    monkeypatch.setattr(benches, "available_bytes", lambda: 2**20)
    rows = bench(grid("attention=full,linear", "seq_len=16,65536"), rounds=1, check=False, passes=["forward"])
    assert [row["status"] for row in rows] == ["ok", "oom", "ok", "oom"]
    assert rows[1]["reason"].startswith("needs at least 0.0") and rows[1]["reason"].endswith("0.00 GiB are free")
    assert rows[1]["compile_seconds"] is None


def test_what_breaks_while_it_runs_is_a_row(mine):
    """A mechanism that compiles and then fails on the data it gets."""
    stop = "def stop(x): raise RuntimeError('RESOURCE_EXHAUSTED: at last')"
    path = mine(f"{stop}\n        jax.debug.callback(stop, v)\n        return v")
    rows = bench(grid(f"attention={path},linear", "seq_len=16"), rounds=1, check=False, passes=["forward"])
    assert [row["status"] for row in rows] == ["oom", "ok"]
    assert rows[0]["causal"] is False and rows[1]["causal"] is True


def test_an_interrupt_keeps_what_was_measured(monkeypatch):
    interleaved = speed.interleaved

    def once(calls, **kwargs):
        monkeypatch.setattr(speed, "interleaved", interrupt)
        return interleaved(calls, **kwargs)

    def interrupt(calls, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "interleaved", once)
    rows = bench(grid("attention=linear", "seq_len=32,16"), rounds=1, check=False, passes=["forward"])
    assert [row["status"] for row in rows] == ["interrupted", "ok"]
    assert rows[0]["seconds_min"] is None and rows[0]["reason"]


def test_an_encoder_in_bfloat16_with_grouped_keys():
    words = ["attention=full", "model=encoder", "seq_len=16", "dtype=bfloat16", "kv_heads=1"]
    (row,) = bench(grid(*words), rounds=1, check=False, passes=["forward"])
    assert row["status"] == "ok" and row["causal"] is False
    inputs = subject(grid(*words)[0], "forward").shapes[0]
    assert {name: (leaf.shape, str(leaf.dtype)) for name, leaf in inputs.items()} == {
        "q": ((2, 16, 2, 8), "bfloat16"),
        "k": ((2, 16, 1, 8), "bfloat16"),
        "v": ((2, 16, 1, 8), "bfloat16"),
    }


def test_gradients_of_own_parameters_and_no_others_are_timed(mine):
    init = [
        "def __init__(self, size, *, rngs):",
        "super().__init__(size, rngs=rngs)",
        "self.w = nnx.Param(jnp.ones(2))",
    ]
    path = mine("return v\n\n    " + "\n        ".join(init))
    path.write_text("from flax import nnx\n" + path.read_text())
    case = subject(grid(f"attention={path}", "seq_len=16")[0], "forward+backward")
    _, (params, inputs) = jax.eval_shape(case.run, case.params, *case.shapes)
    assert list(params) == ["w"] and set(inputs) == {"q", "k", "v"}


def test_a_mechanism_that_is_no_head_is_timed_whole(mine):
    path = mine(
        "return v\n\n    projects = False\n\n"
        "    def __call__(self, x, memory=None, *, valid=None, **_):\n        return self.out(x), None, {}"
    )
    rows = bench(grid(f"attention={path}", "seq_len=16"), rounds=1, check=False)
    assert [(row["timed"], row["causal"]) for row in rows] == [("call", False)] * 2
    assert [row["flops"] for row in rows] == [2 * 2 * 16 * 16 * 16 * times for times in (1, 3)]


@pytest.mark.parametrize(
    "words, message",
    [
        (["attention=full+linear"], r"write attention=full,linear"),
        (["attention=full", "heads=3"], "not divisible by heads=3"),
        (["attention=full", "kv_heads=3"], "not divisible by kv_heads=3"),
    ],
)
def test_impossible_configs_are_refused_before_anything_runs(words, message, monkeypatch):
    monkeypatch.setattr(speed, "compile_timed", lambda *a, **k: pytest.fail("compiled"))
    with pytest.raises(UsageError, match=message):
        bench(grid("seq_len=16", *words), check=False)


def test_unknown_pass():
    with pytest.raises(UsageError, match='did you mean "forward"'):
        bench(grid("attention=full", "seq_len=16"), passes=["forwards"], check=False)


@pytest.mark.full
def test_decoding_costs_a_window_or_a_state_the_same_at_every_context():
    """FLOPs and kept bytes of one more token: as the context for full attention, constant for a window and a state."""
    sweep, _ = configs.sweep(["attention=full,local:window=8,linear", "seq_len=64..256:x2", "dim=16", "batch=1"])
    rows = bench(sweep, rounds=1, passes=("prefill", "decode"), check=False)
    decoded = [row for row in rows if row["pass"] == "decode"]
    assert [row["status"] for row in rows] == ["ok"] * 18
    for name, slope in (("full", 1.0), ("local:window=8", 0.0), ("linear", 0.0)):
        mine = [row for row in decoded if row["attention"] == name]
        assert mine[0]["exponent_flops"] == pytest.approx(slope, abs=0.02)
        assert mine[-1]["state_bytes"] / mine[0]["state_bytes"] == pytest.approx(4**slope, rel=0.02)


@pytest.mark.full
@pytest.mark.parametrize("name", ["full", "local:window=8", "linear", "mla", "rwkv"])
def test_prefill_gives_what_forward_does_and_the_cache_of_single_tokens(name):
    """Two parts and a rest."""
    config = grid(f"attention={name}", "seq_len=131", "dim=16", "batch=2", "model=decoder", "heads=2")[0]
    prefill, forward = (subject(config, direction) for direction in ("prefill", "forward"))
    one, arrays = subject(config, "decode"), {}
    params, (inputs,) = prefill.params, benches._drawn(prefill.shapes, arrays)
    with jax.default_matmul_precision("highest"):
        parts, last, cache = jax.jit(prefill.run)(params, inputs)
        whole = jax.jit(forward.run)(forward.params, inputs)
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one.shapes[0])
        step = lambda cache, token: one.run(params, cache, token)[1::-1]
        singly = jax.jit(lambda tokens: jax.lax.scan(step, empty, tokens)[0])
        expected = singly(jax.tree.map(lambda x: x.swapaxes(0, 1), inputs))
    outputs = jnp.concatenate([parts.swapaxes(0, 1).reshape(2, 128, *whole.shape[2:]), last], 1)
    np.testing.assert_allclose(outputs, whole, atol=1e-4)
    for a, b in zip(*map(jax.tree.leaves, (cache, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("name", ["full", "local:window=8", "linear"])
def test_a_token_is_written_into_the_cache_and_the_cache_is_not_copied(name):
    case = subject(grid(f"attention={name}", "seq_len=256", "dim=16", "batch=2")[0], "decode")
    compiled, _ = speed.compile_timed(case.run, case.params, *case.shapes, donate=(1,))
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(case.shapes[0]))
    memory = compiled.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes == kept and memory.temp_size_in_bytes < 2 * kept
    call = benches.caller(compiled, case, {})
    first, second = jax.device_get(call()), jax.device_get(call())
    assert not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


def test_what_cannot_decode_is_refused_before_anything_is_timed(tmp_path):
    (tmp_path / "pooled.py").write_text(
        "from xformers_lab.attention import OneHead\n\n\n"
        'class Pooled(OneHead):\n    refuses = {"causal": "it is a mean of everything"}\n\n'
        "    def attend(self, q, k, v, *, valid):\n        return v.mean(0)[None] + 0 * q\n"
    )
    with pytest.raises(UsageError, match="cannot be causal: it is a mean of everything"):
        bench(configs.sweep([f"attention={tmp_path}/pooled.py"])[0], passes=("decode",), check=False)
