"""Position-based sparse mechanisms: other implementations' numbers, the geometry of each paper, options that are
refused."""

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from agreement import assert_close

from xformers_lab import drawing, shelves, spec
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.dense import dense
from xformers_lab.attention._engine.order import NATURAL, Runs
from xformers_lab.attention._engine.pattern import Causal
from xformers_lab.attention._engine.random_blocks import RandomBlocks
from xformers_lab.attention.bp import _graph
from xformers_lab.attention.fixed import Summary
from xformers_lab.attention.image_local import Line, Plane
from xformers_lab.errors import UsageError
from xformers_lab.nn.buckets import Buckets

pytestmark = pytest.mark.full


def build(choice: str, length: int, dim: int = 8, heads: int = 1, kv_heads: int | None = None):
    return spec.build("attention", choice, length=length, dim=dim, heads=heads, kv_heads=kv_heads)


def drawn(*shapes, seed: int = 0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


def mask(choice: str, length: int, causal: bool = False, head: int = 0, heads: int = 1):
    """(length, length) bool: which keys each query sees."""
    at = np.arange(length)
    seen = build(choice, length, 8 * heads, heads).seen(causal, head)(at[:, None], at[None])
    return np.broadcast_to(np.asarray(seen), (length, length))


def mixed(layer, q, k, v, **options):
    return jax.jit(lambda q, k, v: layer.mix(q, k, v, **options)[0])(q, k, v)


def quickly(layer, q, k, v, **options):
    return jax.jit(lambda q, k, v: layer.mix(q, k, v, **options)[0])(q, k, v)


def softmax_over(seen, q, k, v):
    s = np.where(seen, np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


# ---- other implementations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["attend", "reference"])
@pytest.mark.parametrize("name", ["bidir", "causal"])
def test_block_local_is_the_chunked_attention_of_reformer(golden, name, method):
    peer = golden(f"reformer_local_{name}")
    meta, x = peer["meta"], peer["x"]
    heads = lambda weight: (x @ peer[f"w.{weight}.weight"].T).reshape(2, 64, 2, 16)
    layer = build(f"block_local:block={meta['chunk']}:before={meta['before']}:after={meta['after']}", 64, 32, 2)
    out = layer.mix(*map(heads, ("query", "key", "value")), causal=name == "causal", method=method)[0]
    # Its first chunk looks back around the end at the last one, ours at nothing; causally both see nothing there.
    compared = slice(None) if name == "causal" else slice(meta["chunk"], None)
    assert_close(out.reshape(2, 64, 32)[:, compared], peer["y"][:, compared])


@pytest.mark.parametrize("name, choice", [("bidir", "before=1:after=1"), ("causal", "before=1")])
def test_block_local_is_the_local_attention_package(golden, name, choice):
    peer = golden(f"local_attention_{name}")
    q, k, v = (np.swapaxes(peer[x], 1, 2) for x in "qkv")
    out = build(f"block_local:block=4:{choice}", 24, 64, 4).mix(q, k, v, causal=peer["meta"]["causal"])[0]
    assert_close(np.swapaxes(out, 1, 2), peer["y"])


@pytest.mark.parametrize("method", ["attend", "reference"])
def test_transient_global_is_longt5(golden, method):
    """With positions behind the last whole block, and padding; T5 does not scale its scores, the lab by sqrt(H)."""
    peer = golden("longt5_transient_global")
    meta, x, valid = peer["meta"], jnp.asarray(peer["x"]), jnp.asarray(peer["valid"]) > 0
    layer = build(f"transient_global:window={meta['window']}:block={meta['block']}", x.shape[1], 32, 4)
    for linear, name in ((layer.query, "q"), (layer.key, "k"), (layer.value, "v"), (layer.out, "o")):
        linear.kernel[...] = peer[f"w.{name}.weight"].T * (8**0.5 if name == "q" else 1)
    layer.unit.scale[...] = peer["w.global_input_layer_norm.weight"]
    layer.table[...] = peer["w.global_relative_attention_bias.weight"].T
    bias = Buckets(jnp.asarray(peer["w.relative_attention_bias.weight"].T), 128, both=True)
    q, k, v = (layer.heads_of(linear(x)) for linear in (layer.query, layer.key, layer.value))
    out = layer.mix(q, k, v, x=x, valid=valid, bias=bias, method=method)[0]
    out = layer.out(out.reshape(x.shape))
    assert_close(out[valid], peer["y"][np.asarray(valid)])


@pytest.mark.parametrize("method", ["attend", "reference"])
def test_streaming_with_a_learned_logit_is_gpt_oss(golden, method):
    """Its full causal layers: no sink tokens, a window over everything."""
    peer = golden("attention_sinks_gptoss")
    q, k, v = (np.swapaxes(peer[x], 1, 2) for x in "qkv")
    layer = build("streaming:sinks=0:logit=learned:window=9", 9, 32, 4, 2)
    layer.logit[...] = peer["sinks"]
    assert_close(layer.mix(q, k, v, causal=True, method=method)[0], peer["y"])


# ---- geometry ----------------------------------------------------------------------------------------------------


def test_axial_on_a_cube_sees_what_differs_in_one_coordinate():
    shape, at = (3, 4, 5), np.array(list(np.ndindex(3, 4, 5)))
    apart = np.not_equal(at[:, None], at[None])
    differ = apart.sum(-1)
    q, k, v = drawn(*[(2, 60, 1, 8)] * 3)
    along = lambda axis: (differ == 0) | ((differ == 1) & apart[..., axis])
    for axis, seen in {"both": differ <= 1, "0": along(0), "1": along(1), "column": along(1), "row": along(2)}.items():
        layer = build(f"axial:shape={'x'.join(map(str, shape))}:axis={axis}", 60)
        assert_close(mixed(layer, q, k, v), softmax_over(seen, q, k, v))
        causal = softmax_over(seen & np.tri(60, dtype=bool), q, k, v)
        assert_close(mixed(layer, q, k, v, causal=True), causal)


def test_bigbird_sees_window_ends_and_random_blocks():
    size, blocks, random = 4, 12, 3
    seen = mask(f"bigbird:block={size}:random={random}", size * blocks)
    linked = seen.reshape(blocks, size, blocks, size)
    assert (linked.all((1, 3)) == linked.any((1, 3))).all()  # whole blocks
    linked = np.asarray(linked.any((1, 3)))
    assert linked[[0, -1]].all() and linked[:, [0, -1]].all()
    near = abs(np.subtract.outer(np.arange(blocks), np.arange(blocks))) <= 1
    near[:, [0, -1]] = near[[0, -1]] = True
    assert linked[near].all()
    assert ((linked & ~near)[1:-1].sum(1) == random).all()
    others = mask(f"bigbird:block={size}:random={random}:seed=1", size * blocks)
    assert (others != seen).any()
    assert mask(f"bigbird:block={size}:random={random}", size * 5).all()


def test_heads_of_their_own_draw_their_own_blocks():
    """Three patterns in one layer are three layers of one pattern each, grouped keys and values included."""
    q, k, v = drawn((2, 60, 4, 8), (2, 60, 2, 8), (2, 60, 2, 8))
    layer = build("random:block=4:count=2:heads=own", 60, 32, 4, 2)
    seen = np.stack([mask("random:block=4:count=2:heads=own", 60, True, head, 4) for head in range(4)])
    assert len({one.tobytes() for one in seen}) == 4
    expected = softmax_over(seen, q, np.repeat(k, 2, 2), np.repeat(v, 2, 2))
    for method in ("attend", "reference"):
        assert_close(mixed(layer, q, k, v, causal=True, method=method), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_fixed_sees_its_run_and_the_ends_of_all(causal):
    """Floor(s / l) = floor(t / l), or s mod l among the last c places; of heads=own the c before them for the next
    head."""
    t, s = np.indices((50, 50))
    for head, places in enumerate([(5, 6), (3, 4), (1, 2)]):
        expected = (s // 7 == t // 7) | np.isin(s % 7, places)
        seen = mask("fixed:stride=7:summary=2:heads=own", 50, causal, head, 3)
        np.testing.assert_array_equal(seen, expected & (s <= t) if causal else expected)


def test_image_local_tiles_see_the_memory_around_them():
    rows, columns, tile, memory = 9, 11, (3, 4), (2, 1)
    row, column = np.divmod(np.arange(rows * columns), columns)
    q_row, q_column, k_row, k_column = row[:, None], column[:, None], row[None], column[None]
    top, left = q_row // tile[0] * tile[0], q_column // tile[1] * tile[1]
    seen = (k_row >= top - memory[0]) & (k_row < top + tile[0] + memory[0])
    seen &= (k_column >= left - memory[1]) & (k_column < left + tile[1] + memory[1])
    q, k, v = drawn(*[(2, rows * columns, 1, 8)] * 3)
    layer = build("image_local:form=2d:shape=9x11:block=3x4:memory=2x1", rows * columns)
    assert_close(mixed(layer, q, k, v), softmax_over(seen, q, k, v))
    causal = softmax_over(seen & np.tri(rows * columns, dtype=bool), q, k, v)
    assert_close(mixed(layer, q, k, v, causal=True), causal)


OWN_PATTERNS = {
    "summaries": Summary(6, 4, 6),
    "summaries further in front": Summary(6, 1, 3),
    "random blocks": RandomBlocks(5, 12, near=1, ends=1, count=2, seed=0),
    "random blocks alone": RandomBlocks(5, 12, near=0, ends=0, count=2, seed=0),
    "line": Line(6, 2),
    "line with long memory": Line(6, 9),
    "plane": Plane(13, 3, 4, 2, 3),
    "plane with whole memory": Plane(13, 3, 4, 3, 4),
}


@pytest.mark.parametrize("name", OWN_PATTERNS)
def test_states_never_lie_about_a_rectangle(name):
    pattern, random = OWN_PATTERNS[name], np.random.default_rng(0)
    for _ in range(300):
        low = random.integers(0, 70, 2)
        high = low + random.integers(0, 8, 2)
        seen = np.asarray(pattern(np.arange(low[0], high[0] + 1)[:, None], np.arange(low[1], high[1] + 1)[None]))
        q, k = (Runs(NATURAL, np.asarray(a), np.asarray(b)) for a, b in zip(low, high, strict=True))
        said = int(pattern.state(q, k))
        assert said == 1 or (said == 2 and seen.all()) or (said == 0 and not seen.any())


@pytest.mark.parametrize("name", OWN_PATTERNS)
def test_spans_hold_every_key_that_is_seen(name):
    pattern, low = OWN_PATTERNS[name], np.arange(0, 60, 3)
    spans, keys = pattern.spans(low, low + 2), np.arange(65)
    for row, first in enumerate(low):
        seen = np.asarray(pattern(np.arange(first, first + 3)[:, None], keys[None])).any(0)
        held = np.any([(keys >= begin[row]) & (keys <= end[row]) for begin, end in spans], 0)
        assert not (seen & ~held).any()


@pytest.mark.parametrize("name, T, causal", kinds.every_third([
    (name, *shape) for name in OWN_PATTERNS for shape in ((60, False), (23, True))
]))  # fmt: skip
def test_engine_runs_them_as_their_dense_mask_says(name, T, causal):
    pattern = OWN_PATTERNS[name] & Causal() if causal else OWN_PATTERNS[name]
    q, k, v = drawn((T, 4), (60, 4), (60, 4))
    fast = jax.jit(lambda q, k, v: block_sparse(q, k, v, pattern=pattern, blocks=(4, 8)))
    assert_close(fast(q, k, v), dense(q, k, v, pattern=pattern))


# ---- the binary partition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 13, 40])
@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_bp_spans_tile_the_sequence_and_grow_with_distance(nodes, length):
    for causal in (False, True):
        members, edges = _graph(nodes, length, length, causal)
        cover = edges.astype(int) @ members.astype(int)
        np.testing.assert_array_equal(cover, np.tri(length, dtype=int) if causal else np.ones((length, length)))
        for t in range(length):
            spans = members[edges[t]]
            sizes, ends = spans.sum(1), spans.argmax(1) + spans.sum(1)
            past = sizes[ends <= t][np.argsort(ends[ends <= t])]
            assert (np.diff(past) <= 0).all()  # coarser with distance
            # k of each size: one more where a pair of spans is completed for the coarser level, one fewer thereafter
            counts = [np.sum(past == size) for size in np.unique(past)[:-1]]
            assert all(nodes - 1 <= count <= nodes + 1 for count in counts)


def test_bp_keys_are_means_of_spans():
    """Eight positions, two spans of a size: position 7 sees 7, 6, 5, 4 and, of twice the size, the means of 2, 3 and 0,
    1."""
    members, edges = _graph(2, 8, 8, True)
    spans = {tuple(np.nonzero(span)[0]) for span in members[edges[7]]}
    assert spans == {(7,), (6,), (5,), (4,), (2, 3), (0, 1)}
    q, k, v = drawn((8, 8), (8, 8), (8, 8))
    keys, values = (np.stack([x[7], x[6], x[5], x[4], x[2:4].mean(0), x[:2].mean(0)]) for x in (k, v))
    weights = jax.nn.softmax(q[7] @ keys.T / np.sqrt(8))
    assert_close(build("bp:nodes=2", 8).attend(q, k, v, causal=True)[7], weights @ values)


# ---- global tokens and sinks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["longformer", "etc"])
def test_global_queries_use_their_own_projections(name):
    """Copied from the shared ones they give the shared form; changed, only the outputs of global queries change."""
    near = {"longformer": "window", "etc": "radius"}[name]
    own, shared = (build(f"{name}:{near}=3:tokens=2:projections={kind}", 24, 16, 2) for kind in ("own", "shared"))
    (x,) = drawn((2, 24, 16))
    for linear in ("query", "key", "value", "out"):
        getattr(shared, linear).kernel[...] = getattr(own, linear).kernel[...]
    own.global_query.kernel[...] = own.query.kernel[...]
    for pair in [own.of_global] + ([own.among_global, own.to_global] if name == "etc" else []):
        pair["k"].kernel[...], pair["v"].kernel[...] = own.key.kernel[...], own.value.kernel[...]
    for causal in (False, True):
        run = lambda layer, causal=causal: jax.jit(lambda x: layer(x, causal=causal)[0])(x)
        assert_close(run(own), run(shared))
    before = own(x)[0]
    own.of_global["v"].kernel[...] *= 2
    changed = np.abs(own(x)[0] - before).max((0, 2)) > 1e-4
    np.testing.assert_array_equal(changed, np.arange(24) < 2)


@pytest.mark.parametrize("projections", ["own", "shared"])
@pytest.mark.parametrize("name", ["longformer", "etc"])
def test_marked_positions_in_front_are_the_first_tokens(name, projections):
    near = {"longformer": "window", "etc": "radius"}[name]
    words = f"{name}:{near}=3:tokens=2:projections={projections}"
    first, marked = build(words, 24, 16, 2), build(f"{words}:where=marked", 24, 16, 2)
    (x,), marks = drawn((2, 24, 16)), jnp.broadcast_to(jnp.arange(24) < 2, (2, 24))
    for causal in (False, True):
        assert_close(marked(x, causal=causal, marked=marks)[0], first(x, causal=causal)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_marked_positions_see_all_and_are_seen_by_all(causal):
    """Any positions, other ones in each row, fewer than there is room for: against a mask, written out."""
    layer = build("longformer:window=2:tokens=3:projections=shared:where=marked", 40)
    q, k, v = drawn(*[(2, 40, 1, 8)] * 3)
    at, marks = np.arange(40), np.zeros((2, 40), bool)
    marks[0, [7, 20, 31]] = marks[1, 39] = True
    near = np.abs(at[:, None] - at) <= 2
    seen = near | marks[:, None] | marks[:, :, None]
    seen = seen & (at <= at[:, None]) if causal else seen
    out = mixed(layer, q, k, v, marked=jnp.asarray(marks), causal=causal)
    assert_close(out, softmax_over(seen[:, None], q, k, v))


def test_etc_has_keys_of_its_own_for_what_long_queries_see_of_the_memory():
    layer, (x,) = build("etc:radius=3:tokens=2", 24, 16, 2), drawn((2, 24, 16))
    before = layer(x)[0]
    layer.to_global["v"].kernel[...] *= 2
    changed = np.abs(layer(x)[0] - before).max((0, 2)) > 1e-4
    np.testing.assert_array_equal(changed, np.arange(24) >= 2)


@pytest.mark.parametrize(
    "choice, rows",
    [
        ("local:window=5", 6),
        ("local:window=5:tokens=3", 9),
        ("dilated:window=5:dilation=3", 16),
        ("block_local:block=5:before=1", 10),
        ("streaming:window=5:sinks=2", 8),
        ("streaming:window=5:sinks=0:logit=learned", 7),
        ("longformer:window=5:tokens=2", 8),
        ("image_local:block=5:memory=3", 8),
    ],
)
def test_near_patterns_decode_from_a_state_that_does_not_grow(choice, rows):
    sizes = [build(choice, length).init_cache(1, length)["k"].shape[2] for length in (64, 1024)]
    assert sizes == [rows, rows]


# ---- hashing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("across", ["bucket", "chunk"])
@pytest.mark.parametrize("padded", [0, 5])
def test_reformer_sees_across_buckets_where_asked(across, padded):
    """One round: tokens sorted by bucket and position see their chunk and the one before, the first the last."""
    T, C = 22, 4
    layer = build(f"reformer:across={across}:rounds=1:chunk={C}:buckets=6", T, 24)
    (q,) = drawn((T, 24))
    rotations, valid = layer.per_head()["rotations"][0], jnp.arange(T) < T - padded
    bucket = np.asarray(layer._buckets(q, rotations)[0])
    order = sorted(range(T - padded), key=lambda t: (bucket[t], t))
    chunk, chunks = {t: place // C for place, t in enumerate(order)}, -(-len(order) // C)
    expected = np.zeros((T, T), bool)
    for t in order:
        if across == "chunk":
            expected[t, [s for s in order if s != t and (chunk[t] - chunk[s]) % chunks <= 1]] = True
        else:
            expected[t, [s for s in order if s != t and bucket[t] == bucket[s] and chunk[t] - chunk[s] in (0, 1)]] = (
                True
            )
        expected[t, t] = not expected[t].any()
    for method in ("attend", "reference"):
        run = lambda q, method=method: getattr(layer, method)(
            q, q, jnp.eye(T, 24), valid=valid, causal=False, rotations=rotations
        )
        weights = jax.jit(run)(q)[:, :T]
        np.testing.assert_array_equal(np.asarray(weights) > 1e-9, expected)


def test_reformer_across_buckets_is_its_definition_in_several_rounds_and_never_causal():
    layer = build("reformer:across=chunk:rounds=3:chunk=4:buckets=4", 21, 8)
    (q, v), valid = drawn((21, 8), (21, 8)), jnp.arange(21) % 5 != 2
    rotations = layer.per_head()["rotations"][0]

    def run(method):
        of = lambda q, v: getattr(layer, method)(q, q, v, valid=valid, causal=False, rotations=rotations)
        out, pull = jax.vjp(of, q, v)
        return out, pull(jnp.cos(out))

    for fast, slow in zip(
        *(jax.tree.leaves(jax.jit(lambda m=m: run(m))()) for m in ("attend", "reference")), strict=True
    ):
        assert_close(fast, slow)
    with pytest.raises(ValueError, match="across=chunk cannot be causal: which tokens share a chunk"):
        layer(jnp.ones((1, 21, 8)), causal=True)
    assert "causal" in layer.refusals() and "causal" not in build("reformer", 21).refusals()
    assert "causal" in build("star", 21).refusals()


# ---- drawings ----------------------------------------------------------------------------------------------------


def picture(choice: str, length: int, causal: bool = True) -> np.ndarray:
    patterns = shelves.sampled(build(choice, length), causal)
    assert patterns is not None and len(patterns) == 1
    return patterns[0]


@pytest.mark.parametrize("sinks", [0, 1])
def test_streaming_draws_no_key_of_its_logit(sinks):
    first = "█" if sinks else "·"
    lines = ["█·····", "██····", first + "██···", first + "·██··", first + "··██·", first + "···██"]
    assert drawing.lines(picture(f"streaming:window=1:sinks={sinks}:logit=learned", 6)) == lines


def test_star_draws_its_ring():
    assert drawing.lines(picture("star", 5)) == ["██··█", "███··", "·███·", "··███", "█··██"]


@pytest.mark.parametrize("causal", [False, True])
def test_bp_draws_every_span_it_sees_at_its_last_position(causal):
    length = 23
    seen = picture("bp:nodes=2", length, causal)
    members, edges = _graph(2, length, length, causal)
    last = np.array([row.nonzero()[0].max(initial=0) for row in members])
    expected = np.zeros((length, length), bool)
    for t, span in np.argwhere(edges):
        expected[t, last[span]] = True
    np.testing.assert_array_equal(seen, expected)
    assert seen.sum(1).max() < length


# ---- the star ----------------------------------------------------------------------------------------------------


def test_star_is_a_ring():
    """Turning the sequence turns the output: the first and the last position are neighbours like any others."""
    star, (x,) = build("star", 12, 16, 2), drawn((2, 12, 16))
    layer = jax.jit(lambda x: star(x)[0])
    assert_close(jnp.roll(layer(x), 3, 1), layer(jnp.roll(x, 3, 1)))


def test_star_reaches_every_position_through_the_relay():
    """In the first layer by the mean; in the next by what the relay attended to, from the carry."""
    star, (x,) = build("star", 12, 16, 2), drawn((1, 12, 16))

    @jax.jit
    def layers(x):
        first, carry, _ = star(x, carry=star.initial_carry(1, 12, 12))
        return first, star(jnp.zeros_like(x), carry=carry)[0], carry

    (first, second, carry), moved = layers(x), layers(x.at[0, 0].add(1.0))
    assert int(carry["layers"][0]) == 1
    assert_close(carry["relay"][0], x[0].mean(0))
    np.testing.assert_array_equal(carry["embedding"], x)
    assert all(np.abs(after - before)[0, 6].max() > 1e-4 for before, after in zip((first, second), moved, strict=False))


# ---- native sparse attention --------------------------------------------------------------------------------------


def branch_of_nsa(which: int, options: str, length: int, heads: int = 2, kv_heads: int = 1):
    """A layer whose gates let one branch through: 0 compressed, 1 selected, 2 window; and its q, k, v and x."""
    layer = build(f"nsa:{options}", length, 8 * heads, heads, kv_heads)
    layer.gate.kernel[...] = jnp.zeros_like(layer.gate.kernel[...])
    layer.gate.bias[...] = jnp.tile(jnp.where(jnp.arange(3) == which, 90.0, -90.0), heads)
    shapes = [(1, length, *shape) for shape in layer.shapes()]
    return layer, *drawn(*shapes, (1, length, 8 * heads))


@pytest.mark.parametrize("causal", [True, False])
def test_window_branch_of_nsa_is_local(causal):
    layer, q, k, v, x = branch_of_nsa(2, "block=4:stride=2:window=3", 21)
    expected = quickly(build("local:window=3", 21, 16, 2, 1), q[..., 8:], k[..., 16:], v[..., 16:], causal=causal)
    assert_close(quickly(layer, q, k, v, x=x, causal=causal), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_nsa_that_chooses_every_run_sees_all(causal):
    layer, q, k, v, x = branch_of_nsa(1, "block=4:stride=2:select=4:chosen=6", 21)
    expected = quickly(build("full", 21, 16, 2, 1), q[..., 8:], k[..., 8:16], v[..., 8:16], causal=causal)
    assert_close(quickly(layer, q, k, v, x=x, causal=causal), expected)


def test_heads_of_a_group_choose_the_runs_that_their_compressed_keys_weigh_most():
    """Runs of 4, compressed keys of 4 without overlap: a run is as important as its compressed key is to both heads."""
    options = "block=4:stride=4:select=4:chosen=4"
    layer, q, k, v, x = branch_of_nsa(1, options, 40, heads=4, kv_heads=2)

    @jax.jit
    def influence(v):
        return jax.jacrev(lambda v: layer.mix(q, k, v, x=x, causal=True)[0][0, -1].sum(-1))(v)

    seen = np.abs(np.asarray(influence(v))[:, 0, :, :, 8:16]).max(-1).reshape(4, 10, 4, 2).max(2) > 0  # (N, runs, K)
    own_group = np.repeat(np.eye(2, dtype=bool), 2, 0)
    seen = (seen & own_group[:, None]).any(2)
    assert (seen == seen[[0, 0, 2, 2]]).all() and (seen.sum(1) == 4).all() and seen[:, [0, 8, 9]].all()
    keys = jax.jit(jax.vmap(lambda k: layer._compressed(k, jnp.ones(40, bool), 0), 1))(k[0, :, :, :8])  # (K, runs, H)
    for group in range(2):
        s = q[0, -1, 2 * group : 2 * group + 2, :8] @ keys[group].T / np.sqrt(8)
        weight = np.asarray(jax.nn.softmax(s)).sum(0)
        assert seen[2 * group][1 + np.argmax(weight[1:8])]


def test_compressed_keys_of_nsa_know_the_order_in_a_block():
    layer, q, k, v, x = branch_of_nsa(0, "block=4:stride=4", 8)
    turned = lambda y: y.at[:, :4].set(y[:, :4][:, ::-1])
    run = lambda k, v: np.asarray(quickly(layer, q, k, v, x=x, causal=True))
    before, after = run(k, v), run(turned(k), turned(v))
    assert (before[:, :3] == 0).all()  # no block is full yet
    assert np.abs(after - before)[:, 3:].max() > 1e-3


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice, message",
    [
        ("local:window=0", "window must be at least 1, got 0"),
        ("local:tokens=-1", "tokens must be at least 0, got -1"),
        ("dilated:dilation=0", "dilation must be at least 1, got 0"),
        ("block_local:block=0", "block must be at least 1, got 0"),
        ("block_local:before=-1", "before and after must be at least 0"),
        ("random:block=0", "block must be at least 1, got 0"),
        ("bigbird:random=-1", "random and seed must be at least 0"),
        ("fixed:stride=4:summary=5", "summary must be from 1 to stride=4, got 5"),
        ("longformer:window=0", "window must be at least 1, got 0"),
        ("longformer:tokens=0:projections=own", "tokens=0 leaves none"),
        ("longformer:tokens=0:where=marked", "tokens=0 leaves no room for a marked position"),
        ("etc:radius=0", "radius must be at least 1, got 0"),
        ("bp:nodes=0", "nodes must be at least 1, got 0"),
        ("nsa:chosen=0", "chosen must be at least 1, got 0"),
        ("nsa:block=4", "block must be at least stride, or positions are lost: got 4 and 16"),
        ("streaming:sinks=0", "without sinks use local"),
        ("axial:shape=4x5", "rows x columns must be 60, for example 6x10"),
        ("axial:axis=3", "axis must be both, row, column or a number below 2"),
        ("image_local:form=2d:shape=7x9", "rows x columns must be 60, for example 6x10"),
        ("image_local:shape=6x10", "use form=2d"),
        ("image_local:form=2d:block=4", "wants sizes of at least 1 like 8x8, got 4"),
    ],
)
def test_options_that_do_not_fit_are_refused(choice, message):
    with pytest.raises(UsageError, match=message):
        build(choice, 60)
