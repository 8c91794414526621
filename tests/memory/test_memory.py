"""Memories across segments: what is seen, what is not, and what is kept."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from flax import nnx
from test_resume import arrays, train

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.config import Config, edit
from xformers_lab.depth import Context
from xformers_lab.errors import UsageError
from xformers_lab.generate import beam_search, generate
from xformers_lab.memory import Remembered
from xformers_lab.memory.compressive import Compressive
from xformers_lab.model import build_model, build_task, check_config
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size
from xformers_lab.train import checkpoint, loop, optimizer, trained
from xformers_lab.train.state import begun, init, merge, split, structure
from xformers_lab.train.step import make_train_step

pytestmark = pytest.mark.full

T, M = 4, 4


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(str(number * 7919 % 1009) for number in range(900)))
    return str(path)


def tiny(text: str, memory: str = f"xl:length={M}", **changes) -> Config:
    small = {"task": f"lm:path={text}", "seq_len": T, "dim": 16, "heads": 2, "layers": 1, "batch": 2, "eval_batches": 2}
    return edit(Config(), memory=memory, **(small | {"position": "alibi"} | changes))


def model_of(config: Config) -> Any:
    return build_model(config, build_task(config))


def whole(model: Any, config: Config) -> Any:
    """The model without its memory: the same parameters, on what `config` is changed to."""
    plain = model_of(config)
    nnx.update(plain, nnx.state(model, nnx.Param))
    return plain


def tokens(count: int, rows: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).integers(0, 256, (rows, count)), jnp.int32)


def by_segments(model: Any, inputs) -> jax.Array:
    """The logits of the whole, read segment by segment from an empty memory; the model stays as it was."""
    graph, params, extra, memory = split(model)

    @jax.jit
    def read(memory, segment):
        reader = merge(graph, params, extra, memory)
        return reader(segment)[0], split(reader)[3]

    parts, memory = [], jax.tree.map(lambda leaf: jnp.repeat(leaf, len(inputs), 1), memory)
    for at in range(0, inputs.shape[1], T):
        logits, memory = read(memory, inputs[:, at : at + T])
        parts.append(logits)
    return jnp.concatenate(parts, 1)


def by_tokens(model: Any, inputs) -> jax.Array:
    """The logits of the whole, decoded token by token."""
    graph, variables = nnx.split(model)

    @jax.jit
    def read(inputs):
        reader = nnx.merge(graph, variables)
        step = lambda cache, token: reader.step(cache, token)[::-1]
        return jax.lax.scan(step, reader.init_cache(len(inputs), T), inputs.T)[1].swapaxes(0, 1)

    return read(inputs)


def at_once(model: Any, inputs) -> jax.Array:
    return jax.jit(lambda inputs: model(inputs)[0])(inputs)


@pytest.mark.parametrize("layers, position", kinds.every_third([*itertools.product(
    [1, 3], ["alibi", "rope", "none", "xl", "t5:sides=past"]
)]))  # fmt: skip
def test_segments_with_all_of_the_past_are_the_whole(text, layers, position):
    config = tiny(text, "xl:length=8", layers=layers, position=position)
    model, inputs = model_of(config), tokens(12)
    plain = whole(model, edit(config, memory="none", seq_len=12))
    np.testing.assert_allclose(by_segments(model, inputs), at_once(plain, inputs), atol=2e-5)


def test_an_early_memory_is_shorter_and_a_late_one_a_window(text):
    """One layer: the outputs of a segment are those of a model that reads the last M tokens and the segment alone."""
    config = tiny(text)
    model, inputs = model_of(config), tokens(16)
    plain = whole(model, edit(config, memory="none", seq_len=T + M))
    logits = by_segments(model, inputs)
    for at in range(M, 16, T):
        np.testing.assert_allclose(logits[:, at : at + T], at_once(plain, inputs[:, at - M : at + T])[:, M:], atol=2e-5)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_reach_grows_by_the_memory_with_every_layer(text, layers):
    """The last segment of five depends on the segment n before it for n up to the number of layers, and no further."""
    model, inputs = model_of(tiny(text, layers=layers)), tokens(5 * T, rows=1)
    # Row `back` of the batch differs in the segment that many before the last; row 0 is as it was.
    ends = [(4 - back) * T + T - 1 for back in range(1, 5)]
    rows = jnp.concatenate([inputs, *(inputs.at[:, at].add(1) % 256 for at in ends)])
    last = by_segments(model, rows)[:, -T:]
    changed = np.abs(last - last[:1]).max((1, 2)) > 0
    assert changed.tolist() == [False] + [back <= layers for back in range(1, 5)]


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_what_a_layer_gave_is_remembered(text, norm):
    """By hand: each layer reads its own outputs of the segments before; one layer reaches back without an end."""
    model, inputs = model_of(tiny(text, "same_layer:length=6", layers=2, norm=norm)), tokens(4 * T)
    graph, variables = nnx.split(model.stack.periods[0])
    blocks = [nnx.merge(graph, jax.tree.map(lambda leaf, n=n: leaf[n], variables)) for n in range(2)]
    outputs, logits = [jnp.zeros((2, 0, 16))] * 2, []
    for at in range(0, 4 * T, T):
        x = model.embedding(inputs[:, at : at + T])
        for number, block in enumerate(blocks):
            before = lambda states, block=block: block.attention_norm.before(states, LayerContext())
            source = before(jnp.concatenate([outputs[number][:, -6:], x], 1))
            options = {"causal": True, "position": model.position}
            x = block.attention_norm.after(x, block.attention(source[:, -T:], source, **options)[0], LayerContext())
            x = block.ffn_norm.after(x, block.ffn(block.ffn_norm.before(x, LayerContext()))[0], LayerContext())
            outputs[number] = jnp.concatenate([outputs[number], x], 1)
        logits.append(model.predict(x))
    np.testing.assert_allclose(by_segments(model, inputs), jnp.concatenate(logits, 1), atol=2e-5)
    one, rows = model_of(tiny(text, "same_layer", norm=norm)), tokens(5 * T, rows=1)
    ends = [(4 - back) * T + T - 1 for back in range(1, 5)]
    last = by_segments(one, jnp.concatenate([rows, *(rows.at[:, at].add(1) % 256 for at in ends)]))[:, -T:]
    assert (np.abs(last - last[:1]).max((1, 2))[1:] > 0).all()


@pytest.mark.parametrize("layer", [None, 1])
def test_a_recurrence_is_its_equation(text, layer):
    """By hand: one key more, made of the mean of what the layer gave, in all layers or in one of them."""
    memory = "recurrent" if layer is None else f"recurrent:layer={layer}"
    model, inputs = model_of(tiny(text, memory, layers=2)), tokens(3 * T)
    graph, variables = nnx.split(model.stack.periods[0])
    blocks = [nnx.merge(graph, jax.tree.map(lambda leaf, n=n: leaf[n], variables)) for n in range(2)]
    means, logits = [None, None], []
    for at in range(0, 3 * T, T):
        x = model.embedding(inputs[:, at : at + T])
        for number, block in enumerate(blocks):
            rows, mean, normed = [x], means[number], lambda y, block=block: block.attention_norm.norm(y)
            if mean is not None and layer in (None, number):
                rows = [mean + block.memory.out(jnp.maximum(block.memory.into(mean), 0)), x]
            source = normed(jnp.concatenate(rows, 1))
            options = {"causal": True, "position": model.position}
            x = x + block.attention(source[:, -T:], source, **options)[0]
            x = x + block.ffn(block.ffn_norm.norm(x))[0]
            means[number] = x.mean(1, keepdims=True)
        logits.append(model.predict(x))
    np.testing.assert_allclose(by_segments(model, inputs), jnp.concatenate(logits, 1), atol=2e-5)


def test_a_trained_model_takes_a_recurrence(text, tmp_path):
    """What is new of it is the recurrence alone."""
    plain = tiny(text, "none", runs=str(tmp_path), steps=1)
    first = loop.run(plain)
    again = loop.run(edit(plain, memory="recurrent", init=first["run_dir"]))
    fresh = again["initialised"]["fresh"]
    assert fresh and all(".memory." in name for name in fresh)


def test_gradients_stop_at_the_old_segment(text):
    model, inputs = model_of(tiny(text, layers=2)), tokens(2 * T)
    x = model.embedding(inputs)

    def last(x):
        fresh: Any = merge(*split(model))
        context = Context(model.position)
        fresh.stack(x[:, :T], context)
        return (fresh.stack(x[:, T:], context)[0] ** 2).sum()

    slope = jax.jit(jax.grad(last))(x)
    assert not slope[:, :T].any() and slope[:, T:].any()


def test_one_sequence_never_sees_another_s_memory_and_a_new_text_none(text):
    model, inputs = model_of(tiny(text, layers=2)), tokens(2 * T)
    other = inputs.at[0].add(1) % 256
    a, b = (by_segments(model, sequences) for sequences in (inputs, other))
    assert np.array_equal(a[1], b[1]) and not np.array_equal(a[0], b[0])
    model(inputs[:, :T])
    graph, params, extra, memory = split(model)
    after = merge(graph, params, extra, begun(memory, jnp.array([True, False])))(inputs[:, T:])[0]
    alone = model_of(tiny(text, layers=2))(inputs[:, T:])[0]
    np.testing.assert_allclose(after[0], alone[0], atol=1e-5)
    np.testing.assert_allclose(after[1], a[1, T:], atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "max", "conv"])
@pytest.mark.parametrize(("length", "compressed", "rate"), [(4, 2, 2), (2, 3, 4), (6, 2, 2)])
def test_compressive_is_its_definition(length, compressed, rate, pool):
    """Queues of each sequence, one state at a time."""
    size, random = Size(length=T, dim=3), np.random.default_rng(5)
    memory = Compressive(size, length=length, compressed=compressed, rate=rate, pool=pool, rngs=nnx.Rngs(0))
    recent, old = ([[(np.zeros(3), False)] * count for _ in range(2)] for count in (length, compressed))
    for _ in range(4):
        x, valid = random.standard_normal((2, T, 3)).astype(np.float32), random.random((2, T)) < 0.7
        for row in range(2):
            recent[row] = recent[row] + list(zip(x[row], valid[row], strict=True))
            leaving, recent[row] = recent[row][:T], recent[row][T:]
            for at in range(0, T, rate):
                known = [state for state, is_valid in leaving[at : at + rate] if is_valid]
                if pool == "conv":
                    side = [state * is_valid for state, is_valid in leaving[at : at + rate]]
                    pooled = memory.conv(jnp.asarray(np.concatenate(side), jnp.float32)[None])[0]
                else:
                    pooled = getattr(np, pool)(known, 0) if known else np.zeros(3)
                old[row] = [*old[row][1:], (pooled, bool(known))]
        memory.write(jnp.asarray(x), jnp.asarray(valid))
        states, known = memory.read(2)
        for row in range(2):
            expected = old[row] + recent[row]
            assert known[row].tolist() == [bool(is_valid) for _, is_valid in expected]
            for actual, (state, is_valid) in zip(states[row], expected, strict=True):
                if is_valid:
                    np.testing.assert_allclose(actual, state, atol=1e-6)


def test_compression_is_learned_by_what_attention_gets_of_it(text):
    """One head of one query at a time; in the first segments nothing leaves the memory."""
    model = model_of(tiny(text, "compressive:length=4:compressed=4:rate=2:pool=conv", kv_heads=1))
    inputs, x = tokens(3 * T), []
    (stacked,) = model.stack.periods
    valid = jnp.ones((2, T), bool).at[1, 0].set(False)
    for at in range(0, 3 * T, T):
        x.append(model.embedding(inputs[:, at : at + T]))
        loss = model(inputs[:, at : at + T], valid=valid)[1].losses["compression"]
        assert (loss > 0) == (at > 0)
    graph, variables = nnx.split(stacked)
    block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], variables))
    of, norm, conv, errors = block.attention, block.attention_norm.norm, block.memory.conv, []

    def look(q, states):
        k, v = of.key(norm(states)), of.value(norm(states))
        return jax.nn.softmax(k @ q / 8**0.5) @ v

    for row in range(2):
        old = x[1][row] * valid[row][:, None]
        new = jnp.stack([conv(jnp.concatenate([old[at], old[at + 1]])) for at in (0, 2)])
        for t in range(4):
            if valid[row, t]:
                for q in jnp.split(of.query(norm(x[2][row, t])), 2):
                    errors.append((look(q, old[valid[row]]) - look(q, new)) ** 2)
    np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-4)


def test_what_is_asked_trains_no_compression_and_compression_nothing_else(text):
    model = model_of(tiny(text, "compressive:length=4:compressed=4:rate=2:pool=conv", layers=2))
    graph, params, extra, memory = split(model)
    memory, inputs = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 1), memory), tokens(3 * T)

    def both(params):
        reader = merge(graph, params, extra, memory)
        output = [reader(inputs[:, at : at + T]) for at in range(0, 3 * T, T)][-1]
        return jnp.stack([(output[0] ** 2).sum(), output[1].losses["compression"]])

    grads = jax.jit(jax.jacrev(both))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        reached = [bool(part.any()) for part in leaf]
        assert reached == [False, True] if "'conv'" in name else not reached[1], name


def test_compression_gets_better(text):
    """Descent on its own loss, with one text and a layer that stays as it is."""
    model = model_of(tiny(text, "compressive:length=4:compressed=4:rate=2:pool=conv"))
    graph, params, extra, memory = split(model)
    memory, inputs = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 1), memory), tokens(2 * T)

    def loss(params):
        reader = merge(graph, params, extra, memory)
        return [reader(inputs[:, at : at + T])[1].losses["compression"] for at in (0, T)][-1]

    def descend(params, _):
        value, slope = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.03 * g, params, slope), value

    values = jax.jit(lambda params: jax.lax.scan(descend, params, length=40)[1])(params)
    assert values[-1] < 0.5 * values[0]


def test_compressive_reads_what_xl_forgot(text):
    """Three segments back, one layer: out of reach of the states, within that of the compressed ones."""
    inputs = tokens(4 * T, rows=1)
    rows = jnp.concatenate([inputs, inputs.at[:, 0].add(1) % 256])
    changed = []
    for memory in ("xl:length=4", "compressive:length=4:compressed=4:rate=2"):
        last = by_segments(model_of(tiny(text, memory)), rows)[:, -T:]
        changed.append(not np.array_equal(last[0], last[1]))
    assert changed == [False, True]


def test_padding_is_remembered_as_padding(text):
    model, inputs = model_of(tiny(text, layers=2)), tokens(2 * T)
    valid = jnp.ones((2, T), bool).at[:, -1].set(False)
    outputs = []
    for filler in (1, 2):
        reader = nnx.clone(model)
        reader(inputs[:, :T].at[:, -1].set(filler), valid=valid)
        outputs.append(reader(inputs[:, T:])[0])
    assert np.array_equal(*outputs)


def test_the_state_has_a_row_for_each_sequence_and_layer(text):
    config = tiny(text, layers=3, batch=6)
    task = build_task(config)
    state = init(config, task, optimizer.of(config, task))
    shapes = {name: leaf.shape for name, leaf in checkpoint.named_leaves(state.memory).items()}
    assert sorted(shapes.values()) == [(3, 6, M), (3, 6, M, 16)]
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.memory))
    plain = edit(config, memory="none")
    assert init(plain, task, optimizer.of(plain, task)).memory == {}
    same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    assert same(nnx.state(model_of(config), nnx.Param), nnx.state(model_of(plain), nnx.Param))
    assert not nnx.state(model_of(plain), Remembered)


def test_parts_of_a_batch_keep_the_memory_of_their_rows(text):
    states = []
    for accumulate in (1, 2):
        config = tiny(text, layers=2, batch=4, accumulate=accumulate)
        task = build_task(config)
        tx = optimizer.of(config, task)
        step, state = jax.jit(make_train_step(config, task, structure(config, task), tx)), init(config, task, tx)
        for number in range(2):
            state, _ = step(state, task.segment("train", number))
        states.append(state.memory)
    for one, two in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_a_step_that_is_skipped_begins_new_texts_all_the_same(text):
    config = tiny(text)
    task = build_task(config)
    tx = optimizer.of(config, task)
    step = jax.jit(make_train_step(config, task, structure(config, task), tx))
    before, _ = step(init(config, task, tx), task.segment("train", 0))
    batch = task.segment("train", 1)
    spoilt = dataclasses.replace(batch, fresh=np.array([True, False]), weights=batch.weights * np.float32(np.nan))
    after, metrics = step(before, spoilt)
    assert not metrics["ok"]
    for old, new in zip(jax.tree.leaves(before.memory), jax.tree.leaves(after.memory), strict=True):
        assert old[:, 0].any() and not new[:, 0].any()
        np.testing.assert_array_equal(new[:, 1], old[:, 1])


@pytest.mark.parametrize("depth", ["recurrent_memory:segment=2:tokens=2", "memformer:segment=2:slots=3"])
def test_a_depth_carries_its_memory_from_batch_to_batch(text, depth):
    """Three batches are one text of three times the length, whose gradients end with each batch; a new text begins with
    nothing."""
    config = tiny(text, "none", depth=f"{depth}:carry=true", position="rope", layers=2)
    model, inputs = model_of(config), tokens(3 * T)
    plain = whole(model, edit(config, depth=depth, seq_len=3 * T))
    np.testing.assert_allclose(by_segments(model, inputs), at_once(plain, inputs), atol=2e-5)
    assert model.endless and not plain.endless
    np.testing.assert_allclose(by_tokens(model, inputs), at_once(plain, inputs), atol=2e-5)
    graph, params, extra, memory = split(model)
    memory = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 1), memory)

    @jax.jit
    def read(first, fresh):
        def second(first):
            reader: Any = merge(graph, params, extra, memory)
            reader.stack(first, Context(reader.position))
            reader = merge(graph, params, extra, begun(split(reader)[3], fresh))
            return reader.stack(model.embedding(inputs[:, T : 2 * T]), Context(reader.position))[0]

        return second(first), jax.grad(lambda first: (second(first) ** 2).sum())(first)

    x = model.embedding(inputs[:, :T])
    (y, slope), (other, _) = (read(x + more, jnp.array([False, True])) for more in (0, 1))
    assert np.array_equal(y[1], other[1]) and not np.array_equal(y[0], other[0]) and not slope.any()


def test_training_carries_what_a_depth_remembers(text, tmp_path):
    """It is in the checkpoint; a task without texts that go on is refused, and so is a state that is the same
    everywhere."""
    words = {"memory": "none", "depth": "recurrent_memory:segment=2:carry=true", "steps": 2}
    config = tiny(text, **words, runs=str(tmp_path))
    assert loop.run(config)["status"] == "ok"
    kept = {name: leaf for name, leaf in arrays(config).items() if name.startswith("memory.")}
    assert len(kept) == 2 and all(map(any, kept.values()))
    with pytest.raises(UsageError, match="from batch to batch: the task gives unrelated"):
        check_config(edit(config, task="copy", seq_len=32))
    with pytest.raises(UsageError, match="layout=data"):
        loop.run(edit(config, layout="pmap"))


@pytest.mark.parametrize("split_", ["train", "validation", "test"])
def test_rows_of_the_text_go_on_from_step_to_step(text, split_):
    task: Any = build_task(tiny(text, seq_len=8))
    content = bytes(task.bytes[split_])
    each = (len(content) - 1) // 16
    for step in (0, each - 1, each):
        assert task.segment(split_, step).fresh.tolist() == [step % each == 0] * 2
    first, second = task.segment(split_, 0), task.segment(split_, 1)
    for row in range(2):
        joined = bytes([*first.inputs[row], *second.inputs[row]])
        assert joined in content
        assert first.targets[row, -1] == second.inputs[row, 0]
    again = task.segment(split_, each + 1)
    assert np.array_equal(again.inputs, build_task(tiny(text, seq_len=8)).segment(split_, each + 1).inputs)


@pytest.mark.full
def test_interrupted_and_resumed_with_a_memory(text, tmp_path):
    words = {"layers": 2, "steps": 8, "save_every": 3, "eval_every": 4, "dropout": 0.1}
    straight, broken = (tiny(text, **words, runs=str(tmp_path / name)) for name in ("straight", "broken"))
    record = loop.run(straight)
    seen = []
    with pytest.raises(loop.Interrupted):
        loop.run(broken, progress=lambda step, *_: seen.append(step), stop=lambda: len(seen) >= 5)
    again = loop.run(broken, resume=True)
    assert (again["loss"], again["validation"]) == (record["loss"], record["validation"])
    assert [point[:2] for point in again["curve"]] == [point[:2] for point in record["curve"]]
    one, two = arrays(straight), arrays(broken)
    assert one == two and any(name.startswith("memory.") for name in one)
    scored = trained.evaluate(configs.folder(straight), split="validation")
    assert scored["loss"] == record["validation"][-1][1]  # an empty memory of its own, whatever training had read


@pytest.mark.full
def test_trains_from_the_command_line(text, tmp_path):
    config = tiny(text, position="xl", steps=3, runs=str(tmp_path))
    ran = train(config, "")
    assert ran.returncode == 0, ran.stderr
    assert '"status": "ok"' in ran.stdout


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"memory": "same_layer", "depth": "reversible"}, "takes layers apart"),
        ({"memory": "recurrent:layer=1"}, "from 0 to 0, one of layers=1"),
        ({"position": "learned"}, "begins anew in every segment"),
        ({"position": "sinusoidal"}, "begins anew in every segment"),
        ({"task": "copy", "seq_len": 32}, "use task=lm"),
        ({"depth": "universal"}, "use depth=fixed"),
        ({"attention": "rwkv", "position": "none"}, "no keys but the segment's own"),
        ({"attention": "realformer"}, "layer above"),
        ({"memory": "xl:length=0"}, "at least 1"),
        ({"memory": "compressive:rate=3"}, "must divide seq_len=4"),
        ({"memory": "compressive:pool=conv", "attention": "mla", "position": "none"}, "in a way of its own"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(text, changes, reason):
    with pytest.raises(UsageError, match=reason):
        check_config(tiny(text, **changes))


@pytest.mark.parametrize(
    ("memory", "changes"),
    [
        ("xl:length=4", {"position": "xl"}),
        ("xl:length=6", {"attention": "local:window=3+linear", "position": "none"}),
        ("xl:length=6", {"attention": "streaming:window=2:sinks=1:logit=learned"}),
        ("xl:length=3", {"attention": "block_local:block=5", "position": "rope", "depth": "sandwich_order"}),
        ("compressive:length=6:compressed=4:rate=2:pool=conv", {"position": "t5", "depth": "reversible"}),
        ("xl:length=6", {"position": "rope", "conv": 5, "qk_norm": "rms"}),
        ("xl:length=6", {"attention": "local:window=3+full", "position": "rope", "log_n": "learned"}),
        ("xl:length=6", {"position": "rope+none"}),
        ("xl:length=3", {"depth": "local_rnn:window=3", "position": "none"}),
        ("same_layer:length=6", {"position": "rope"}),
        ("recurrent", {"position": "rope", "attention": "full+local:window=3"}),
        ("recurrent:layer=1", {}),
        ("same_layer:length=3", {"depth": "sandwich_order", "norm": "post", "position": "t5"}),
        ("xl:length=6", {"position": "rope", "ffn": "rwkv"}),
        ("xl:length=6", {"position": "rope", "ffn": "rwkv", "depth": "sandwich_order:k=1"}),
        (
            "compressive:length=6:compressed=4:rate=2:pool=conv",
            {"attention": "linear+full", "position": "none", "conv": 3},
        ),
    ],
    ids=str,
)
def test_decoding_is_reading_segment_by_segment(text, memory, changes):
    """Five segments, of which the first fill the memory."""
    model, inputs = model_of(tiny(text, memory, **({"layers": 2} | changes))), tokens(5 * T)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(by_tokens(model, inputs), by_segments(model, inputs), atol=2e-5)


@pytest.mark.parametrize("attention", ["moba", "nsa", "bp", "sinkhorn", "mca", "synthesizer"])
def test_what_goes_by_places_is_not_decoded_behind_a_memory(text, attention):
    with pytest.raises(UsageError, match="by places from the first key on"):
        generate(model_of(tiny(text, attention=attention, position="none", dim=64)), [[1, 2]], new=1, length=T)


def test_generation_goes_on_beyond_a_segment(text):
    """Prompts of different lengths, one of them longer than a segment; what training remembered is not read."""
    model, prompts = model_of(tiny(text, layers=2)), [[1, 2], [3, 1, 4, 1, 5, 9, 2]]
    model(tokens(T))
    fresh = model_of(tiny(text, layers=2))
    generated = generate(model, prompts, new=9, length=T)
    assert generate(model, prompts[1:], new=9, length=T, at_once=3) == generated[1:]
    for prompt, new in zip(prompts, generated, strict=True):
        whole = prompt + new
        filled = jnp.asarray([whole + [0] * (-len(whole) % T)], jnp.int32)
        greedy = by_segments(fresh, filled)[0, len(prompt) - 1 : len(whole) - 1].argmax(-1)
        assert greedy.tolist() == new and len(new) == 9
    best, score = beam_search(fresh, prompts[1], new=6, length=T, beams=1, at_once=3)
    assert best == generated[1][:6] and score < 0


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["xl:length=6", "compressive:length=6:compressed=4:rate=2"])
@pytest.mark.parametrize("attention", spec.names("attention"))
def test_every_mechanism_decodes_behind_a_memory_or_says_why_not(text, attention, memory):
    config = tiny(text, memory, attention=attention, position="none", layers=2)
    try:
        model = model_of(config)
        check_config(config)
        model.init_cache(1, T)
        jax.eval_shape(model.step, model.init_cache(1, T), jnp.zeros(1, jnp.int32))
    except (UsageError, ValueError) as reason:
        assert len(str(reason)) > 20
        return
    inputs = tokens(5 * T)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(by_tokens(model, inputs), by_segments(model, inputs), atol=2e-5)


def test_pmap_is_refused(text):
    with pytest.raises(UsageError, match="layout=data"):
        loop.run(tiny(text, layout="pmap"))


@pytest.mark.parametrize("attention", ["full", "linear", "local", "streaming", "softcap"])
def test_other_mechanisms_and_depths_take_a_memory(text, attention):
    """What a segment gives depends on the one before it, and equals the whole text where nothing is forgotten."""
    config = tiny(text, "xl:length=8", layers=2, attention=attention, position="none", depth="layerdrop")
    model, inputs = model_of(config), tokens(12)
    plain = whole(model, edit(config, memory="none", seq_len=12))
    np.testing.assert_allclose(by_segments(model, inputs), at_once(plain, inputs), atol=2e-5)
