"""Encoder-decoder: what a target sees of its source and of itself, decoding, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.depth import Context
from xformers_lab.errors import UsageError
from xformers_lab.generate import apart, beam_search, generate
from xformers_lab.model import build_model, build_task
from xformers_lab.model._block import Block
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.train import checkpoint, optimizer, prefetch
from xformers_lab.train.state import init, structure
from xformers_lab.train.step import make_train_step

pytestmark = pytest.mark.full

SMALL = {"task": "copy", "seq_len": 13, "dim": 16, "heads": 2, "layers": 2, "batch": 3}  # 7 of source, 6 of target


def model_of(model: str = "encoder_decoder", **changes) -> tuple[Any, Any]:
    config = edit(Config(), model=model, **(SMALL | changes))
    task = build_task(config)
    return build_model(config, task), jnp.asarray(task.batch("train", 0).inputs)


def compiled(model):
    graph, variables = nnx.split(model)
    run = jax.jit(lambda variables, tokens, valid: nnx.merge(graph, variables)(tokens, valid=valid)[0])
    return lambda tokens, valid=None: np.asarray(run(variables, tokens, valid))


def dependence(model, tokens):
    """(positions, positions) bool: which logits change with which token."""
    run, rows = compiled(model), []
    for at in range(tokens.shape[1]):
        other = run(tokens.at[0, at].set((tokens[0, at] + 1) % 11))[0]
        rows.append(np.abs(other - run(tokens)[0]).max(-1) > 1e-7)
    return np.stack(rows, 1)


@pytest.mark.parametrize("attention", ["full", "local:window=3+linear"])
def test_a_target_sees_its_source_and_what_stands_before_it(attention):
    model, tokens = model_of(attention=attention)
    S, seen = 7, dependence(model, tokens)
    assert not seen[:S].any() and not compiled(model)(tokens)[:, :S].any()
    assert seen[S:, :S].all()
    np.testing.assert_array_equal(seen[S:, S:], np.tril(np.ones((6, 6), bool)) & seen[S:, S:])
    assert seen[S:, S:].diagonal().all()


def test_cross_attention_is_its_formula():
    """One head at a time, over the encoded source, without positions."""
    model, tokens = model_of(layers=1, ffn="none", position="none")
    block = jax.tree.map(lambda leaf: leaf[0], model.stack.periods[0])
    states = model.encode(tokens[:, :7])[0]
    x = model.embedding(tokens[:, 7:])
    context = Context(model.position, source=states)
    y, _, _ = Block.attend(block, x, {}, context)
    x = block.attention_norm.after(x, y, LayerContext())
    queries, cross = block.cross_norm.before(x, LayerContext()), block.cross
    heads = lambda y: np.asarray(y).reshape(3, -1, 2, 8)
    q, k, v = heads(cross.query(queries)), heads(cross.key(states)), heads(cross.value(states))
    p = jax.nn.softmax(np.einsum("btnh,bsnh->bnts", q, k) / 8**0.5)
    x = x + cross.out(jnp.asarray(np.einsum("bnts,bsnh->btnh", p, v).reshape(3, 6, 16)))
    np.testing.assert_allclose(model(tokens)[0][:, 7:], model.predict(x), atol=1e-5)


def test_every_layer_of_the_decoder_looks_at_a_mix_of_its_own():
    """Layer j looks at the sum over i of softmax(w_j)_i h_i, of all layers of the encoder, one by one."""
    model, tokens = model_of(depth="transparent:mixes=each", layers=3, norm="pre")
    weights = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    model.encoder.mix[...] = jnp.asarray(weights)
    layers = lambda stack: [jax.tree.map(lambda leaf, i=i: leaf[i], stack.periods[0]).block for i in range(3)]
    source, target = tokens[:, :7], tokens[:, 7:]
    first = lambda position, tokens: model.entering(
        position.embed(model.embedding(tokens), jnp.arange(tokens.shape[1]))
    )
    states = [first(model.source_position, source)]
    for block in layers(model.encoder):
        states.append(block(states[-1], {}, Context(model.source_position))[0])
    shares = np.exp(weights) / np.exp(weights).sum(0)
    x = first(model.position, target)
    for j, block in enumerate(layers(model.stack)):
        mix = sum(share * h for share, h in zip(shares[:, j], states, strict=True))
        x = block(x, {}, Context(model.position, source=model.source_final.final(mix, LayerContext())))[0]
    np.testing.assert_allclose(compiled(model)(tokens)[:, 7:], model.predict(x), atol=2e-5)
    grads = jax.grad(lambda mix: (_with_mix(model, mix)(tokens)[0] ** 2).sum())(model.encoder.mix[...])
    assert (np.abs(grads) > 0).all()


def _with_mix(model, mix):
    graph, variables = nnx.split(model)
    again = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, variables))
    again.encoder.mix[...] = mix
    return again


def test_padding_of_the_source_changes_nothing():
    model, tokens = model_of()
    valid = jnp.ones(tokens.shape, bool).at[:, 4:7].set(False)
    other = tokens.at[:, 4:7].set(3)
    run = compiled(model)
    np.testing.assert_array_equal(run(tokens, valid), run(other, valid))
    assert np.abs(run(tokens) - run(other)).max() > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "local:window=3+linear", "position": "rope", "kv_heads": 1},
        {"model": "encoder_decoder:cross=linear", "norm": "post", "position": "alibi"},
        {"model": "encoder_decoder:cross=mla", "depth": "macaron"},
        {"conv": 3, "qk_norm": "rms", "log_n": 8, "kv_heads": 1, "position": "rope+none"},
        {"norm": "residual_dual", "embed_norm": "layernorm"},
        {"depth": "transparent:mixes=each"},
        {"depth": "evolved", "position": "rope"},
        {"depth": "local_rnn:window=3"},
        {"ffn": "hash", "layers": 1},  # writes to a variable
        {"ffn": "rwkv"},
        {"ffn": "rwkv", "depth": "macaron"},
    ],
    ids=str,
)
def test_decoding_is_the_whole_pass(changes):
    model, tokens = model_of(**changes)
    cache, step, outputs = model.init_cache(3, 13), jax.jit(lambda cache, token: model.step(cache, token)), []
    for token in tokens.T:
        logits, cache = step(cache, token)
        outputs.append(logits)
    np.testing.assert_allclose(np.stack(outputs, 1)[:, 7:], compiled(model)(tokens)[:, 7:], atol=2e-5)


def test_generates_and_searches():
    model, tokens = model_of()
    prompt = [int(token) for token in tokens[0, :8]]
    greedy, run = generate(model, [prompt], new=5, length=13)[0], compiled(model)
    text = list(prompt)
    for token in greedy:
        padded = jnp.asarray([text + [0] * (13 - len(text))], jnp.int32)
        assert token == run(padded)[0, len(text) - 1].argmax()
        text.append(token)
    best, score = beam_search(model, prompt, new=5, length=13, beams=3, length_penalty=0)
    whole = jnp.asarray([[*prompt, *best]], jnp.int32)
    logs = np.asarray(jax.nn.log_softmax(run(whole)))[0, 7:12]
    assert score == pytest.approx(sum(logs[np.arange(5), best]), abs=1e-3)


SOURCES = [[0, 3, 1, 2], [0, 5], [0, 4, 4, 7, 1, 9, 2]]
ENCODED = [
    {},
    {"model": "encoder_decoder:cross=linear", "attention": "local:window=3"},
    {"model": "seq2seq:reads=both:look=additive"},
]


@pytest.mark.parametrize("changes", ENCODED, ids=str)
def test_sources_of_different_lengths_share_a_batch(changes):
    """Each is continued as alone; the shortest also as by a model that reads no more than this source."""
    model, _ = model_of(**changes, layers=1)
    together = generate(model, [[0], [0, 4], [0]], sources=SOURCES, new=4, length=13)
    for source, prompt, tokens in zip(SOURCES, [[0], [0, 4], [0]], together, strict=True):
        assert generate(model, [prompt], sources=[source], new=4, length=13) == [tokens]
    assert generate(model, [[*SOURCES[2], 0]], new=4, length=13) == together[2:]
    best, score = beam_search(model, [0, 4], source=[0, 5], new=4, length=13, beams=1, length_penalty=0)
    model.source = 2
    whole = compiled(model)(jnp.asarray([[0, 5, 0, 4, *best]], jnp.int32))[0, 3:-1]
    assert best == together[1] == whole.argmax(-1).tolist()
    assert score == pytest.approx(np.asarray(jax.nn.log_softmax(whole)).max(-1).sum(), abs=1e-4)


def test_a_prompt_alone_is_a_source_and_what_a_target_begins_with():
    model, _ = model_of()
    prompt = [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert apart(model, [[0, 3], prompt[:7], prompt], begin=(0,)) == (
        [(0,), (0,), [0, 1]],
        [[0, 3], prompt[:7], prompt[:7]],
    )
    assert apart(model_of("decoder")[0], [prompt]) == ([prompt], [])


def test_sources_that_cannot_be_read():
    model, _ = model_of()
    refused = [
        ({"prompts": [[0, 1, 2]]}, "3 tokens, of which the encoder reads the first 7"),
        ({"prompts": [[0]], "sources": [[]]}, "a source of 0 tokens: the encoder reads 1 to 7"),
        ({"prompts": [[0]], "sources": [[0] * 8]}, "a source of 8 tokens"),
        ({"prompts": [[0], [1]], "sources": [[0]]}, "2 prompts and 1 sources"),
        ({"prompts": [[]], "sources": [[0]]}, "an empty prompt"),
    ]
    for options, reason in refused:
        with pytest.raises(UsageError, match=reason):
            generate(model, **options, new=2, length=13)
    with pytest.raises(UsageError, match="put it in front of the prompt"):
        generate(model_of("decoder")[0], [[0]], sources=[[1]], new=2, length=13)


def test_learns_to_copy():
    """Where only the source holds the answer, the answer is learned through cross-attention."""
    changes = {"seq_len": 9, "dim": 32, "layers": 1, "batch": 64, "steps": 150, "lr": 1e-2, "warmup": 0.1}
    config = edit(Config(), model="encoder_decoder", **(SMALL | changes))
    task = build_task(config)
    tx = optimizer.of(config, task)
    state = init(config, task, tx)
    step = jax.jit(make_train_step(config, task, structure(config, task), tx))
    for at in range(150):
        state, metrics = step(state, prefetch.checked(task, "train", at))
    assert metrics["loss"] < 0.3


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_a_tied_head_is_the_table_of_embeddings(kind, tmp_path):
    """Fewer parameters by the head's, one table for both ends, which a checkpoint keeps once."""
    (model, _), (apart, _) = model_of(f"{kind}:tied=true"), model_of(kind)
    count = lambda model: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count(apart) - count(model) == 11 * 16 + 11
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 16)), jnp.float32)
    expected = model.final.final(x, LayerContext()) @ model.embedding.embedding[...].T / (0.02 * 16)
    np.testing.assert_allclose(model.predict(x), expected, atol=1e-6)
    np.testing.assert_allclose(model.predict(x[:, 1]), expected[:, 1], atol=1e-6)
    config = edit(Config(), model=f"{kind}:tied=true", **SMALL)
    task = build_task(config)
    tx = optimizer.of(config, task)
    state = init(config, task, tx)
    checkpoint.save(tmp_path, 1, state, {})
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore(tmp_path, like, {})[0], state)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "listops", "model": "encoder:tied=true"}, "no tokens of its inputs"),
        ({"task": "needle", "model": "decoder:tied=true"}, "no tokens of its inputs"),
        ({"model": "decoder:pool=mean"}, "an answer at every position"),
        ({"task": "listops", "model": "decoder:pool=first"}, "the first position sees itself alone"),
        ({"task": "lm"}, "no source and target apart"),
        ({"task": "listops"}, "no source and target apart"),
        ({"model": "encoder_decoder:cross=fnet"}, "cross=fnet cannot look at a source"),
        ({"model": "encoder_decoder:cross=retnet"}, "cross=retnet cannot look at a source"),
        ({"model": "encoder_decoder:cross=nowhere"}, "nowhere"),
        ({"attention": "retnet"}, "serves no encoder"),
        ({"depth": "mixture_of_depths", "position": "rope"}, "no place for cross-attention"),
        ({"depth": "reversible"}, "no place for cross-attention"),
        ({"model": "decoder", "depth": "transparent:mixes=each"}, "whose decoder looks at an encoder; use mixes=one"),
    ],
    ids=str,
)
def test_refused(changes, says, capsys, tmp_path):
    words = [f"{key}={value}" for key, value in ({"model": "encoder_decoder", "seq_len": 64} | changes).items()]
    task = [] if "task" in changes else ["task=copy"]
    assert main(["train", f"runs={tmp_path}", *task, *words]) == 2
    assert says in capsys.readouterr().err
